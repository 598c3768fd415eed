"""Mode ``component`` of ``decontaminate``: outward from the rows near a reference image, hop by hop.

With the input ``neighbors`` the hops go along its edges, in both directions. Without it each hop is an exact search
with the rows of the last one as reference, so a row has as many edges as it has near rows. Both reach the same rows
where no list of neighbours is cut; a copy, whose one edge leads to the lowest row that it is equal to, is reached
along the edges one hop after that row. What a hop leaves lies in scratch files, part by part:

    direct/part-*        every row looked at: row, near_row, similarity, reference (more is in ``references``)
    hop-<h>/part-*       rows that hop h reached, from where, and their vectors where something is to search them
    sent/, arrived/      with ``neighbors``: every edge as its other end sees it, shuffled to the part of that end; with
                         a selection too see ``stand_ins``
    frontier-<h>/part-*  without: the vectors of hop h in files of one size
    joined/              the spanning forests of what is dropped, and of the reference images it is near to
    components/          those joined, and counted: see ``connect``; touched/: which references each has images of
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from curation.artifact import FileInfo, by_name, part_name, pool_of, write_table
from curation.decontaminate import (
    EDGE,
    edge_records,
    forest_of_pairs,
    is_among,
    near_pairs,
    strongest_from,
)
from curation.embeddings import EmbeddingsPart, covered_rows, embeddings_table, read_embeddings
from curation.execute import Executor
from curation.neighbors import Neighbors
from curation.selection import rows_among
from curation.shuffle import read_shuffle, write_shuffle
from pipelines.stage import Output, make_aside
from pipelines.stages.connect import connect, count_components, even_ranges, raw_name, raw_names, write_pairs
from pipelines.stages.neighbors import Base, nearest_in_base
from pipelines.stages.references import Job, Part, Reference, images_of, looked_at, nearest_images
from pipelines.stages.stand_ins import edges_in, hand_on, own_edges
from pipelines.stages.touched import Touched, count_touched

FRONTIER_ROWS = 65_536  # vectors of a frontier file, unless one part gives more


def columns_of(best: Neighbors, row_id: str, similarity: str) -> dict[str, pa.Array]:
    """The nearest of each row as columns, null where there is none."""
    none = best.row_ids[:, 0] < 0
    return {
        row_id: pa.array(best.row_ids[:, 0], mask=none),
        similarity: pa.array(best.similarity[:, 0], mask=none),
    }


def reach(
    job: Job, parts: Sequence[Part], references: Sequence[Reference], out: Output, executor: Executor
) -> tuple[list[Part], list[Base]]:
    """Go outward until a hop reaches nothing new. Returns the parts with the hops that reached them, and the
    vectors of each hop as a base (with ``neighbors`` none)."""
    out.facts["hops"] = {}
    looked = make_tables(partial(look_part, job=job), parts, "direct", out, executor, {"references": references})
    parts = [part._replace(bad=file.counts.get("bad", 0)) for part, file in zip(parts, looked, strict=True)]
    n_new, frontiers, hop = counts_of(looked), list[Base](), 1
    if job.edges is not None and any(n_new):
        turn_edges(job, parts, out, executor)
    while any(n_new):
        out.facts["hops"][str(hop)] = sum(n_new)
        parts = [part._replace(hops=(*part.hops, hop)) if n else part for part, n in zip(parts, n_new, strict=True)]
        at_hop = [part for part in parts if hop in part.hops]
        work: Callable[..., FileInfo]
        shared: dict[str, Any]
        if job.edges is not None:
            ids = executor.reduce(partial(ids_of_part, job=job, hop=hop), at_hop, join_ids)
            work, shared = walk_part, {"frontier": ids}
        else:
            frontiers.append(frontier_of(job, hop, at_hop, [n for n in n_new if n], out, executor))
            work, shared = search_part, {"frontier": frontiers[-1]}
        hop += 1
        n_new = counts_of(make_tables(partial(work, job=job, hop=hop), parts, hop_folder(hop), out, executor, shared))
    return parts, frontiers


def make_tables(
    work: Callable[..., FileInfo],
    parts: Sequence[Part],
    folder: str,
    out: Output,
    executor: Executor,
    shared: Mapping[str, Any],
) -> list[FileInfo]:
    """Have a scratch table made of every part, unless it is whole. Returns them in the order of the parts."""
    side = Output(out.scratch(folder), executor)
    side.make(work, parts, [[part_name(part.number)] for part in parts], shared)
    return sorted(side.files, key=by_name)


def counts_of(files: Sequence[FileInfo]) -> list[int]:
    """How many rows of each part a hop reached."""
    return [file.counts["reached"] for file in files]


def hop_folder(hop: int) -> str:
    """``hop-0002`` for 2."""
    return f"hop-{hop:04d}"


def look_part(part: Part, job: Job, references: Sequence[Reference]) -> FileInfo:
    """The nearest reference image of every row looked at, and those that are near one as hop 1."""
    rows, x, bad = looked_at(part, job)
    nearest = nearest_images(part, job, rows, x, references)
    hit = nearest.similarity >= np.float32(job.config.min_similarity)
    nowhere = Neighbors.none_yet(int(hit.sum()), 1)
    write_hop(part, job, 1, rows[hit], nowhere, x[hit])
    table = pa.table({"row": pa.array(rows, pa.int32()), **nearest.columns()})
    return write_table(job.aside("direct", part_name(part.number)), table, {"reached": int(hit.sum()), **bad})


def write_hop(part: Part, job: Job, hop: int, rows: np.ndarray, best: Neighbors, x: np.ndarray | None) -> FileInfo:
    """The rows that a hop reached in one part, from where, and their vectors as float32: scaled once, for all."""
    table = pa.table({"row": pa.array(rows, pa.int32())}) if x is None else embeddings_table(rows, x)
    for name, column in columns_of(best, "through", "through_similarity").items():
        table = table.append_column(name, column)
    location = job.aside(hop_folder(hop), part_name(part.number))
    return write_table(location, table, {"reached": len(rows)}, compress=False)


def unreached_rows(part: Part, job: Job) -> np.ndarray:
    """int32 (n,): the rows looked at that no hop has reached so far."""
    rows = covered_rows(job.aside("direct", part_name(part.number)))
    for hop in part.hops:
        rows = rows[~is_among(rows, covered_rows(job.aside(hop_folder(hop), part_name(part.number))))]
    return rows


def search_part(part: Part, job: Job, hop: int, frontier: Base) -> FileInfo:
    """One more hop by an exact search among the rows of the hop before."""
    rows, x = part.vectors.read()
    left = unreached_rows(part, job)
    x = x[rows_among(left, rows, "embeddings")]
    best = nearest_in_base(x, frontier, 1)
    new = best.similarity[:, 0] >= np.float32(job.config.min_similarity)
    return write_hop(part, job, hop, left[new], Neighbors(best.row_ids[new], best.similarity[new]), x[new])


def frontier_of(
    job: Job, hop: int, parts: Sequence[Part], n_rows: Sequence[int], out: Output, executor: Executor
) -> Base:
    """The vectors of a hop as a base to search, in files that are worth a read: many parts give few rows each."""
    groups = group_parts(parts, n_rows)
    side = Output(out.scratch(frontier_folder(hop)), executor)
    names = [part_name(group[0].number) for group in groups]
    side.make(partial(pack_frontier, job=job, hop=hop), groups, [[name] for name in names])
    sizes = {file.name: file.rows for file in side.files}
    return [
        (group[0].start, EmbeddingsPart(side.location / name, sizes[name], 0, unit=False))
        for group, name in zip(groups, names, strict=True)
    ]


def frontier_folder(hop: int) -> str:
    """``frontier-0002`` for 2."""
    return f"frontier-{hop:04d}"


def group_parts(parts: Sequence[Part], n_rows: Sequence[int]) -> list[list[Part]]:
    """Consecutive parts with at most FRONTIER_ROWS rows together, and int32 between first and last position."""
    groups: list[list[Part]] = []
    size = 0
    for part, n in zip(parts, n_rows, strict=True):
        apart = bool(groups) and part.start - groups[-1][0].start > np.iinfo(np.int32).max // 2
        if not groups or apart or size + n > FRONTIER_ROWS:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += n
    return groups


def pack_frontier(group: Sequence[Part], job: Job, hop: int) -> FileInfo:
    """One file of the rows that a hop reached in some parts; rows count from the start of the first part."""
    found = [read_hop(part, job, hop) for part in group]
    rows = np.concatenate([rows + (part.start - group[0].start) for part, (rows, _) in zip(group, found, strict=True)])
    location = job.aside(frontier_folder(hop), part_name(group[0].number))
    return write_table(location, embeddings_table(rows, np.concatenate([x for _, x in found])), compress=False)


def read_hop(part: Part, job: Job, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and vectors float32 that a hop reached in one part."""
    return read_embeddings(job.aside(hop_folder(hop), part_name(part.number)))


def turn_edges(job: Job, parts: Sequence[Part], out: Output, executor: Executor) -> None:
    """Shuffle every edge to the part of its other end: a row in the list of another is its neighbour too."""
    starts, names = np.array([part.start for part in parts], np.int64), raw_names(parts)
    make_aside(partial(send_edges, job=job), parts, names, out.scratch("sent"), executor, {"starts": starts})
    gather = partial(gather_edges, job=job, n_parts=len(parts))
    make_aside(gather, parts, names, out.scratch("arrived"), executor)
    if job.before is not None:
        hand_on(job, parts, starts, out, executor)


def send_edges(part: Part, job: Job, starts: np.ndarray) -> None:
    """The edges of the rows looked at in one part, turned round and sorted by the part they go to."""
    edges = own_edges(part, job)
    edges = edges[is_among(edges["row"], covered_rows(job.aside("direct", part_name(part.number))))]
    to = np.searchsorted(starts, edges["near_row"], side="right") - 1
    turned = edge_records(edges["near_row"] - starts[to], edges["row"] + np.int64(part.start), edges["similarity"])
    write_shuffle(job.aside("sent", raw_name(part.number)), turned, to, len(starts))


def gather_edges(part: Part, job: Job, n_parts: int) -> None:
    """The turned edges that arrive at one part, also at rows that nothing looked at: those are never asked for."""
    with job.aside("arrived", raw_name(part.number)).side_file() as side, side.open("wb") as file:
        for other in range(n_parts):
            file.write(read_shuffle(job.aside("sent", raw_name(other)), EDGE, part.number).tobytes())


def arrived_edges(part: Part, job: Job) -> Iterator[np.ndarray]:
    """EDGE, some at a time: what arrived at a part, and what was handed on to stand-ins and from them."""
    yield from edges_in(part, job, "arrived")
    if job.before is not None:
        yield from edges_in(part, job, "here")


def ids_of_part(part: Part, job: Job, hop: int) -> np.ndarray:
    """int64 (n,): row ids that a hop reached in one part."""
    return covered_rows(job.aside(hop_folder(hop), part_name(part.number))) + np.int64(part.start)


def join_ids(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The ids of earlier parts, then those of later ones: ascending. With its inputs 16 bytes a row of the hop."""
    return np.concatenate([a, b])


def walk_part(part: Part, job: Job, hop: int, frontier: np.ndarray) -> FileInfo:
    """One more hop along the edges, in both directions."""
    rows = unreached_rows(part, job)
    best = Neighbors.none_yet(len(rows), 1)
    if len(rows):
        best = strongest_from(best, rows, own_edges(part, job), frontier)
        for edges in arrived_edges(part, job):
            best = strongest_from(best, rows, edges, frontier)
    new = best.row_ids[:, 0] >= 0
    return write_hop(part, job, hop, rows[new], Neighbors(best.row_ids[new], best.similarity[new]), None)


def measure(
    job: Job,
    parts: Sequence[Part],
    frontiers: Sequence[Base],
    references: Sequence[Reference],
    n_images: int,
    out: Output,
    executor: Executor,
) -> tuple[str, list[Touched]]:
    """Count the dropped components, into the facts. Returns the words for a step that drops too much, and what is
    dropped for each reference.

    n_images: rows of the pools of all references.
    """
    n_hops, sizes = len(out.facts["hops"]), (0, 0)
    of_each = [Touched(0, 0, 0) for _ in references]
    touched = [part for part in parts if part.hops]
    if touched:
        n_rows = int(pool_of(job.embeddings).starts[-1])
        images = [(start + n_rows, vectors) for start, vectors in images_of(references)]
        join = partial(join_part, job=job)
        names = raw_names(touched)
        make_aside(join, touched, names, out.scratch("joined"), executor, {"frontiers": frontiers, "images": images})
        folder, ranges = out.scratch("components"), even_ranges(n_rows + n_images)
        connect(folder, [out.scratch("joined") / name for name in names], ranges, executor)
        sizes = count_components(folder, ranges, n_rows, executor)
        firsts = np.array([reference.first + n_rows for reference in references], np.int64)
        of_each = count_touched(folder, ranges, firsts, executor)
    out.facts |= {"n_components": sizes[0], "largest_component": sizes[1]}
    return f", in {sizes[0]} components, the largest of {sizes[1]} rows, reached in {n_hops} hops", of_each


def join_part(part: Part, job: Job, frontiers: Sequence[Base], images: Base) -> None:
    """The spanning forest of the dropped rows of one part and what they are joined to; images of the references
    stand behind the rows of the pool."""
    rows = rows_by_edges(part, job) if job.edges is not None else rows_by_search(part, job, frontiers)
    forest = forest_of_pairs(chain(rows, near_ids(part, job, 1, images) if 1 in part.hops else []))
    write_pairs(job.aside("joined", raw_name(part.number)), forest)


def rows_by_edges(part: Part, job: Job) -> Iterator[np.ndarray]:
    """int64 (m, 2): the edges that arrived at dropped rows; what they come from is dropped as well."""
    dropped = np.sort(np.concatenate([ids_of_part(part, job, hop) for hop in part.hops]))
    for edges in arrived_edges(part, job):
        pairs = np.stack([edges["row"] + np.int64(part.start), edges["near_row"]], axis=1)
        yield pairs[is_among(pairs[:, 0], dropped)]


def rows_by_search(part: Part, job: Job, frontiers: Sequence[Base]) -> Iterator[np.ndarray]:
    """int64 (m, 2): near rows of the same hop and of the hop before; farther hops have none, or it were nearer."""
    for hop in part.hops:
        same = frontiers[hop - 1]
        first = bisect_right([start for start, _ in same], part.start) - 1  # in earlier files these rows are found
        yield from near_ids(part, job, hop, same[first:])
        if hop > 1:
            yield from near_ids(part, job, hop, frontiers[hop - 2])


def near_ids(part: Part, job: Job, hop: int, base: Base) -> Iterator[np.ndarray]:
    """int64 (m, 2): the rows that a hop reached in one part beside every near row of a base."""
    rows, x = read_hop(part, job, hop)
    for start, vectors in base:
        near, y = vectors.read()
        for i, j in near_pairs(x, y, job.config.min_similarity):
            yield np.stack([rows[i] + np.int64(part.start), near[j] + np.int64(start)], axis=1)
