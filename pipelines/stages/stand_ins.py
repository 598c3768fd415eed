"""Edges of rows that a selection left out, handed on to copies of them that it kept.

A copy has one edge, to the lowest row that it is equal to; what is near the copy has an edge to that row. Where nobody
looked at that row, the lowest of its copies that was looked at stands in for it: it takes its edges, and the other
copies are joined to it. What this needs lies in scratch files, part by part:

    copies/              the edges of copies that were looked at, shuffled to the part of the lowest row
    lent/                the edges of left out rows as those of their stand-ins, shuffled to the part of the other end
    forwarded/, here/    edges of stand-ins with one another and with rows that were looked at, shuffled to both ends
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from curation.artifact import part_name, read_table
from curation.decontaminate import EDGE, edge_records, is_among
from curation.embeddings import covered_rows
from curation.execute import Executor
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.stage import Output, make_aside
from pipelines.stages.connect import raw_name, raw_names
from pipelines.stages.references import Job, Part

EDGES_AT_ONCE = 1 << 20  # edges of a part in memory


def hand_on(job: Job, parts: Sequence[Part], starts: np.ndarray, out: Output, executor: Executor) -> None:
    """Leave the edges of stand-ins in ``here``, when all edges of rows that were looked at have arrived."""
    names, shared = raw_names(parts), {"starts": starts}
    make_aside(partial(send_copies, job=job), parts, names, out.scratch("copies"), executor, shared)
    make_aside(partial(lend_edges, job=job), parts, names, out.scratch("lent"), executor, shared)
    make_aside(partial(forward_edges, job=job), parts, names, out.scratch("forwarded"), executor, shared)
    gather = partial(gather_forwarded, job=job, n_parts=len(parts))
    make_aside(gather, parts, names, out.scratch("here"), executor)


def own_edges(part: Part, job: Job) -> np.ndarray:
    """EDGE (m,): the edges that start in a part, from the threshold of this step on."""
    assert job.edges is not None, "asked for with neighbors alone"
    table = read_table(job.edges.part(part.number))
    similarity = table["similarity"].to_numpy()
    near = similarity >= np.float32(job.config.min_similarity)
    return edge_records(table["row"].to_numpy()[near], table["near_row"].to_numpy()[near], similarity[near])


def looked_rows(part: Part, job: Job) -> np.ndarray:
    """int32 (n,), ascending: the rows of a part that were looked at."""
    return covered_rows(job.aside("direct", part_name(part.number)))


def send(location: Location, to: np.ndarray, near_row: np.ndarray, similarity: np.ndarray, starts: np.ndarray) -> None:
    """Shuffle edges to the parts of their ends: ``to`` and ``near_row`` int64 (n,), positions in the pool."""
    at = np.searchsorted(starts, to, side="right") - 1
    write_shuffle(location, edge_records(to - starts[at], near_row, similarity), at, len(starts))


def send_copies(part: Part, job: Job, starts: np.ndarray) -> None:
    """The copies of a part that were looked at, to the part of the row that they are equal to."""
    assert job.edges is not None, "asked for with neighbors alone"
    table = read_table(job.edges.part(part.number), ["row", "near_row", "similarity", "equal"])
    rows = table["row"].to_numpy()
    mine = table["equal"].to_numpy() & is_among(rows, looked_rows(part, job))
    near_rows, similarity = table["near_row"].to_numpy()[mine], table["similarity"].to_numpy()[mine]
    send(job.aside("copies", raw_name(part.number)), near_rows, rows[mine] + np.int64(part.start), similarity, starts)


def received(part: Part, job: Job, folder: str, n_parts: int) -> Iterator[np.ndarray]:
    """EDGE: what other parts have sent to one, as it arrives."""
    for other in range(n_parts):
        yield read_shuffle(job.aside(folder, raw_name(other)), EDGE, part.number)


def stand_ins(part: Part, job: Job, n_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a part that were not looked at, int32 (n,) ascending, and the lowest copy of each that was, int64."""
    rows, ids = np.zeros(0, np.int32), np.zeros(0, np.int64)
    for copies in received(part, job, "copies", n_parts):
        rows, ids = np.concatenate([rows, copies["row"]]), np.concatenate([ids, copies["near_row"]])
        order = np.lexsort((ids, rows))
        order = order[np.r_[True, np.diff(rows[order]) != 0]] if len(order) else order
        rows, ids = rows[order], ids[order]
    left_out = ~is_among(rows, looked_rows(part, job))
    return rows[left_out], ids[left_out]


def lend_edges(part: Part, job: Job, starts: np.ndarray) -> None:
    """The edges of left out rows of a part as those of their stand-ins, to the part of the other end."""
    rows, ids = stand_ins(part, job, len(starts))
    edges = own_edges(part, job)
    edges = edges[is_among(edges["row"], rows)]
    mine = ids[np.searchsorted(rows, edges["row"])]
    send(job.aside("lent", raw_name(part.number)), edges["near_row"], mine, edges["similarity"], starts)


def forward_edges(part: Part, job: Job, starts: np.ndarray) -> None:
    """All that concerns stand-ins, some at a time, to the parts of both ends; last, how many files that took."""
    n_files = 0
    for a, b, similarity in in_blocks(edges_of_stand_ins(part, job, len(starts))):
        location = job.aside("forwarded", f"{raw_name(part.number)}-{raw_name(n_files)}")
        send(location, np.concatenate([a, b]), np.concatenate([b, a]), np.tile(similarity, 2), starts)
        n_files += 1
    job.aside("forwarded", raw_name(part.number)).write(str(n_files).encode())


Ends = tuple[np.ndarray, np.ndarray, np.ndarray]  # two rows of the pool, int64 (n,), and their similarity float32 (n,)


def edges_of_stand_ins(part: Part, job: Job, n_parts: int) -> Iterator[Ends]:
    """The edges that the stand-ins of a part have, and those lent to its rows that were looked at: no other row's."""
    rows, ids = stand_ins(part, job, n_parts)
    looked = looked_rows(part, job)
    for folder in ("copies", "arrived", "lent"):
        pieces = edges_in(part, job, folder) if folder == "arrived" else received(part, job, folder, n_parts)
        for edges in pieces:
            mine = edges[is_among(edges["row"], rows)]
            yield ids[np.searchsorted(rows, mine["row"])], mine["near_row"], mine["similarity"]
            if folder == "lent":
                mine = edges[is_among(edges["row"], looked)]
                yield mine["row"] + np.int64(part.start), mine["near_row"], mine["similarity"]


def in_blocks(pieces: Iterator[Ends]) -> Iterator[Ends]:
    """Edges put together until they are EDGES_AT_ONCE or more, the last may be fewer; none of a row with itself."""
    waiting, n_waiting = list[Ends](), 0
    for a, b, similarity in pieces:
        apart = a != b
        waiting.append((a[apart], b[apart], similarity[apart]))
        n_waiting += int(apart.sum())
        if n_waiting >= EDGES_AT_ONCE:
            yield joined(waiting)
            waiting, n_waiting = [], 0
    if n_waiting:
        yield joined(waiting)


def joined(pieces: Sequence[Ends]) -> Ends:
    """Pieces as one."""
    a, b, similarity = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return a, b, similarity


def gather_forwarded(part: Part, job: Job, n_parts: int) -> None:
    """What was forwarded to a part, as one file."""
    with job.aside("here", raw_name(part.number)).side_file() as side, side.open("wb") as file:
        for other in range(n_parts):
            for number in range(int(job.aside("forwarded", raw_name(other)).read())):
                name = f"{raw_name(other)}-{raw_name(number)}"
                file.write(read_shuffle(job.aside("forwarded", name), EDGE, part.number).tobytes())


def edges_in(part: Part, job: Job, folder: str) -> Iterator[np.ndarray]:
    """EDGE (<= EDGES_AT_ONCE,): the file of a part in a folder. A row may be in more lists than fit into memory."""
    location = job.aside(folder, raw_name(part.number))
    step = EDGES_AT_ONCE * EDGE.itemsize
    for offset in range(0, location.entry().size, step):
        yield np.frombuffer(location.read(offset, step), EDGE)
