"""The k-NN join of ``neighbors``, in cells of a coarse quantizer: n ** 2 * nprobe ** 2 / nlist / 2 pairs of n rows.

Every row lies in its ``nprobe`` nearest cells and is compared with all rows there, by signatures of 1,024 bits
(``curation.signatures``); of pairs that these do not rule out the exact similarity is computed, so whatever edge there
is is right, and what may be missing is measured (``pipelines.stages.recall``). In scratch:

    sample/<part>, centroids   rows the quantizer is trained on, and its centroids
    reach.parquet              the true edges of sampled rows, and which nprobe finds them
    members/<part>             signatures of a part's rows, shuffled to their cells
    found/<piece>-<n>          pairs that a task found near in some cells, shuffled to the parts of their first rows
    found/<piece>              how many such files there are
    lists/<part>               the candidates of a part's rows
    wanted/<part>              which vectors a part lacks, shuffled to the parts that have them
    vectors/<part>             these vectors, shuffled to the parts that want them

Tasks hold at most one part, or GROUP_ROWS signatures, or RUN_PAIRS pairs and what they make of them.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from curation import cells, scan_torch
from curation.artifact import FileInfo, part_name
from curation.cells import (
    Piece,
    Rows,
    near_in_cell,
    nearest_cells,
    plan_pieces,
    sample_rows,
    slice_rows,
    train_centroids,
)
from curation.checks import check_unit_rows
from curation.embeddings import BLOCK_ROWS, read_embeddings, stored_form, stored_norms
from curation.execute import Device, Executor, Ref, on_worker
from curation.neighbors import NeighborsConfig
from curation.seed_sample import sample_counts
from curation.shuffle import Bounds, read_bounds, read_range, read_shuffle, write_groups, write_shuffle
from curation.signatures import WORDS, limits_at, signatures
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Output, make_aside
from pipelines.stages.connect import range_at, raw_name
from pipelines.stages.edges import (
    Distinct,
    EqualRows,
    KnownEdges,
    Part,
    device_of,
    edge_records,
    equal_edges,
    most_neighbors,
    part_names,
    starts_of,
    strongest,
    write_edges,
)
from pipelines.stages.recall import Quantizer, choose_nprobe, find_reach, measure_recall, read_reach, write_reach

RUN_PAIRS = 1 << 21  # candidates of one file
LISTED = 4  # candidates of a row that are kept, by distance, for each neighbour it may have
END = np.iinfo(np.int64).max  # after all rows
SAMPLE = 2  # purpose of a generator

CANDIDATE = np.dtype([("row_id", "<i8"), ("near_row", "<i8"), ("distance", "<i2")])
MEMBER = np.dtype([("row_id", "<i8"), ("signature", "<u8", (WORDS,))])
LISTING = np.dtype([("row", "<i4"), ("near_row", "<i8")])
ROW_ID = np.dtype("<i8")


class Job(NamedTuple):
    """What every task of a join needs to know."""

    config: NeighborsConfig
    n_neighbors: int  # of a row, at most
    equal: EqualRows
    folder: Location
    nlist: int
    width: int
    nprobe: int
    known: KnownEdges | None
    first_new: int  # the first row that edges are looked for from; pairs of earlier rows are known
    vector: np.dtype  # a vector on its way: row_id, norm, x as it is stored


def join_in_cells(
    config: NeighborsConfig, parts: Sequence[Part], equal: EqualRows, sizes: Sequence[int],
    known: KnownEdges | None, out: Output, executor: Executor,
) -> None:  # fmt: skip
    """Write the edges of every part. sizes: rows of each part that are no copies. Raises UserError.

    Rows of the parts with known edges are compared with those of later parts alone.
    """
    nlist = number_of_cells(config, sum(sizes))
    forms = list(executor.map(stored_form, [part.vectors.location for part in parts]))
    width = forms[0][1]
    x_dtype = max((dtype for dtype, _ in forms), key=lambda dtype: dtype.itemsize)  # float32 if one part has that
    vector = np.dtype([("row_id", "<i8"), ("norm", "<f4"), ("x", x_dtype, (width,))])
    first_new = 0 if known is None else int(starts_of(parts)[known.n_parts]) if known.n_parts < len(parts) else END
    k = most_neighbors(config, parts)
    folder = out.scratch(f"join-{cells.GROUP_ROWS}-{slice_rows(LISTED * k)}")  # pieces are numbered by these
    job = Job(config, k, equal, folder, nlist, width, 0, known, first_new, vector)
    with timed(out, "train"):
        quantizer = train(job, parts, sizes, executor)
    with timed(out, "measure"):
        most = most_probed(config, nlist)
        reach_at = job.folder / "reach.parquet"
        if not reach_at.exists():
            write_reach(reach_at, find_reach(config, parts, sizes, equal, quantizer, most, executor))
        reach = read_reach(reach_at)
        job = job._replace(nprobe=choose_nprobe(config, reach, most))
    with timed(out, "assign"):
        names = part_names(parts)
        make_aside(
            partial(assign_part, job=job), parts, names, job.folder / "members", executor, {"quantizer": quantizer}
        )
    with timed(out, "scan"):
        scan_cells(job, parts, quantizer, device_of(executor), executor)
    with timed(out, "verify"):
        verify(job, parts, out, executor)
        found = measure_recall(config, parts, reach, job.nprobe, out.location, executor)
    out.facts |= {"method": "cells", "nlist": nlist, "nprobe": job.nprobe, **found}


@contextmanager
def timed(out: Output, name: str) -> Iterator[None]:
    """Note the seconds of a phase in the log of the run."""
    start = time.perf_counter()
    yield
    out.log[f"{name}_seconds"] = time.perf_counter() - start


def number_of_cells(config: NeighborsConfig, n_rows: int) -> int:
    """How many cells there are. Raises UserError for more than rows."""
    if config.nlist > n_rows:
        raise UserError(
            f"neighbors.nlist must be at most the number of rows that differ: got {config.nlist} for {n_rows}",
            "ask for fewer cells, or leave nlist out",
        )
    return config.nlist or cells.cells_for(n_rows)


def most_probed(config: NeighborsConfig, nlist: int) -> int:
    """How many cells of a row are looked at to see which nprobe finds an edge. Raises UserError for too high a one."""
    if config.nprobe == "auto":
        return min(nlist, cells.MAX_NPROBE)
    if int(config.nprobe) > nlist:
        raise UserError(
            f"neighbors.nprobe must be at most the number of cells: got {config.nprobe} for {nlist}",
            "ask for fewer, or set it to auto",
        )
    return min(nlist, max(int(config.nprobe), cells.MAX_NPROBE))


def train(job: Job, parts: Sequence[Part], sizes: Sequence[int], executor: Executor) -> Ref[Quantizer]:
    """The quantizer, on a worker, trained by one task on rows drawn from all parts."""
    wanted = sample_rows(sum(sizes), job.width, job.nlist)
    counts = sample_counts(sizes, wanted, np.random.default_rng([job.config.seed, SAMPLE]))
    draws = [(part.number, part, n) for part, n in zip(parts, counts, strict=True)]
    names = part_names(parts)
    make_aside(partial(draw_sample, job=job), draws, names, job.folder / "sample", executor)
    work = partial(train_on_sample, job=job, names=names)
    make_aside(work, [wanted], ["centroids"], job.folder, executor)
    return on_worker(executor, partial(read_quantizer, job=job), {})


def draw_sample(draw: tuple[int, Part, int], job: Job) -> None:
    """Write some rows of a part that are no copies, uniform without replacement, as float32."""
    number, part, n = draw
    x = Distinct(part, job.equal).read()[1]
    rng = np.random.default_rng([job.config.seed, SAMPLE, number])
    at = np.sort(rng.choice(len(x), n, replace=False, shuffle=False))
    check_unit_rows(x, "embeddings")
    (job.folder / "sample" / raw_name(number)).write(x[at].astype("<f4").tobytes())


def train_on_sample(n_rows: int, job: Job, names: Sequence[str]) -> None:
    """Write the centroids."""
    sample, at = np.empty((n_rows, job.width), np.float32), 0
    for name in names:
        rows = np.frombuffer((job.folder / "sample" / name).read(), "<f4").reshape(-1, job.width)
        sample[at : at + len(rows)] = rows
        at += len(rows)
    centroids = train_centroids(sample, job.nlist, job.config.seed)
    (job.folder / "centroids").write(centroids.astype("<f4").tobytes())


def read_quantizer(job: Job) -> Quantizer:
    """The quantizer that was trained."""
    centroids = np.frombuffer((job.folder / "centroids").read(), "<f4").reshape(job.nlist, job.width)
    return Quantizer(centroids, limits_at(job.config.min_similarity, job.width, job.config.seed), job.config.seed)


def assign_part(part: Part, job: Job, quantizer: Quantizer) -> None:
    """The signatures of a part's rows, to their cells."""
    rows, x = Distinct(part, job.equal).read()
    check_unit_rows(x, "embeddings")
    members, nearest = np.empty(len(rows), MEMBER), np.empty((len(rows), job.nprobe), np.int32)
    members["row_id"] = rows + np.int64(part.start)
    for start in range(0, len(rows), BLOCK_ROWS):
        at = slice(start, start + BLOCK_ROWS)
        members["signature"][at] = signatures(x[at], job.config.seed)
        nearest[at] = nearest_cells(x[at], quantizer.centroids, job.nprobe)
    order = np.argsort(nearest.ravel(), kind="stable") // job.nprobe
    ends = np.cumsum(np.bincount(nearest.ravel(), minlength=job.nlist))
    groups = (members[order[begin:end]] for begin, end in pairwise([0, *ends.tolist()]))
    write_groups(job.folder / "members" / raw_name(part.number), groups, job.nlist)


def scan_cells(job: Job, parts: Sequence[Part], quantizer: Ref[Quantizer], device: Device, executor: Executor) -> None:
    """Leave the candidates that signatures find in all cells."""
    members = [job.folder / "members" / name for name in part_names(parts)]
    sizes = executor.reduce(partial(cell_sizes, nlist=job.nlist), members, np.add).get()
    pieces = plan_pieces(sizes, slice_rows(LISTED * job.n_neighbors))
    work = partial(scan_piece, job=job, device=device.name)
    shared = {"members": members, "starts": starts_of(parts), "quantizer": quantizer}
    names = [raw_name(piece.number) for piece in pieces]
    make_aside(work, pieces, names, job.folder / "found", executor, shared, device.gpus)


def cell_sizes(members: Location, nlist: int) -> np.ndarray:
    """int64 (nlist,): how many rows of one part lie in each cell."""
    return np.diff(read_bounds(members, 0, nlist).at)


def scan_piece(
    piece: Piece, job: Job, device: str, members: Sequence[Location], starts: np.ndarray, quantizer: Quantizer
) -> None:
    """The candidates in some cells, or of some rows of one large cell, to the parts of their rows."""
    scan = near_in_cell if device == "cpu" else partial(scan_torch.near_in_cell, device=device)
    most, waiting, n_waiting, n_files = LISTED * job.n_neighbors, list[np.ndarray](), 0, 0
    folder, name = job.folder / "found", raw_name(piece.number)
    for queries, base in what_meets(piece, members, job.first_new, slice_rows(most)):
        for near in scan(queries, base, quantizer.limits, most):
            waiting.append(candidate_records(*near))
            n_waiting += len(waiting[-1])
            if n_waiting >= RUN_PAIRS:
                send_candidates(folder / f"{name}-{n_files}", waiting, starts)
                waiting, n_waiting, n_files = [], 0, n_files + 1
    send_candidates(folder / f"{name}-{n_files}", waiting, starts)
    (folder / name).write(str(n_files + 1).encode())


def what_meets(
    piece: Piece, members: Sequence[Location], first_new: int, n_slice: int
) -> Iterator[tuple[Rows, Iterable[Rows]]]:
    """Rows and all those that they are compared with, for all that a piece scans.

    The rows of a cell of at most ``n_slice`` meet one another, and ``queries`` is the one item of ``base``; those of a
    larger one slice meets slice. Rows before ``first_new`` meet those from it on alone.
    """
    bounds = [read_bounds(location, piece.first, piece.last) for location in members]
    if piece.begin is not None:
        queries = Rows.concatenate(rows_between(members, bounds, piece.begin, piece.begin + n_slice))
        old, new = queries.split(first_new)
        n_rows = int(sum(b.at[-1] - b.at[0] for b in bounds))
        if len(new.ids):
            yield new, rows_between(members, bounds, 0, n_rows)
        if len(old.ids):
            yield old, (rows.split(first_new)[1] for rows in rows_between(members, bounds, 0, n_rows))
        return
    for rows in rows_by_cell(members, bounds):
        before, later = (list(some.slices(n_slice)) for some in rows.split(first_new))
        for queries in later:
            yield queries, [*later, *before]
        for queries in before if later else ():
            yield queries, later


def rows_by_cell(members: Sequence[Location], bounds: Sequence[Bounds]) -> Iterator[Rows]:
    """The rows of every cell in some files, from a range read of each file."""
    sizes = np.stack([np.diff(b.at) for b in bounds])
    records = np.empty(int(sizes.sum()), MEMBER)
    at = (np.cumsum(sizes.T.ravel()).reshape(sizes.T.shape).T - sizes).tolist()  # by cell, then by file
    for location, b, starts in zip(members, bounds, at, strict=True):
        found = read_range(location, MEMBER, b.head, int(b.at[0]), int(b.at[-1]))
        for start, (begin, end) in zip(starts, pairwise((b.at - b.at[0]).tolist()), strict=True):
            records[start : start + end - begin] = found[begin:end]
    for begin, end in pairwise([0, *np.cumsum(sizes.sum(axis=0)).tolist()]):
        yield rows_of(records[begin:end])


def rows_between(members: Sequence[Location], bounds: Sequence[Bounds], begin: int, end: int) -> Iterator[Rows]:
    """Rows [begin, end) of one cell, counted over some files, at most SLICE_ROWS at a time."""
    before = 0
    for location, b in zip(members, bounds, strict=True):
        first, last = (int(n) for n in b.at)
        low, high = first + max(begin - before, 0), min(last, first + end - before)
        for start in range(low, high, cells.SLICE_ROWS):
            yield rows_of(read_range(location, MEMBER, b.head, start, min(start + cells.SLICE_ROWS, high)))
        before += last - first


def rows_of(members: np.ndarray) -> Rows:
    """MEMBER (n,) as contiguous arrays."""
    return Rows(np.ascontiguousarray(members["row_id"]), np.ascontiguousarray(members["signature"]))


def candidate_records(query_ids: np.ndarray, near_rows: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """CANDIDATE (n,) of what ``near_in_cell`` found."""
    found = np.empty(len(query_ids), CANDIDATE)
    found["row_id"], found["near_row"], found["distance"] = query_ids, near_rows, distances
    return found


def send_candidates(location: Location, some: Sequence[np.ndarray], starts: np.ndarray) -> None:
    """Shuffle candidates to the parts of their rows."""
    found = np.concatenate([np.zeros(0, CANDIDATE), *some])
    write_shuffle(location, found, range_at(starts, found["row_id"]), len(starts))


def verify(job: Job, parts: Sequence[Part], out: Output, executor: Executor) -> None:
    """Write the edges among the candidates: vectors travel to where a candidate has none, each once a part."""
    names, shared = part_names(parts), {"starts": starts_of(parts)}
    pieces = sorted(entry.name for entry in (job.folder / "found").list() if "-" not in entry.name)
    counts = executor.map(partial(n_files_of, job=job), pieces)
    files = [job.folder / "found" / f"{name}-{i}" for name, n in zip(pieces, counts, strict=True) for i in range(n)]
    seek = partial(list_candidates, job=job)
    make_aside(seek, parts, names, job.folder / "wanted", executor, {**shared, "files": files})
    make_aside(partial(send_vectors, job=job, names=names), parts, names, job.folder / "vectors", executor)
    work = partial(write_part, job=job, names=names, out=out.location)
    out.make(work, parts, [[part_name(part.number)] for part in parts], shared)


def n_files_of(piece: str, job: Job) -> int:
    """How many files of candidates a piece left."""
    return int((job.folder / "found" / piece).read())


def list_candidates(part: Part, job: Job, files: Sequence[Location], starts: np.ndarray) -> None:
    """Keep the nearest candidates of each row of a part, and ask for the vectors of theirs."""
    most = LISTED * job.n_neighbors
    kept, waiting, n_waiting = np.zeros(0, CANDIDATE), list[np.ndarray](), 0
    for location in files:
        waiting.append(read_shuffle(location, CANDIDATE, part.number))
        n_waiting += len(waiting[-1])
        if n_waiting >= RUN_PAIRS:
            kept, waiting, n_waiting = nearest_candidates(np.concatenate([kept, *waiting]), most), [], 0
    kept = nearest_candidates(np.concatenate([kept, *waiting]), most)
    listing = np.empty(len(kept), LISTING)
    listing["row"], listing["near_row"] = kept["row_id"] - part.start, kept["near_row"]
    listing = listing[np.lexsort((listing["row"], listing["near_row"]))]
    (job.folder / "lists" / raw_name(part.number)).write(listing.tobytes())
    wanted = np.unique(listing["near_row"]).astype("<i8", copy=False)
    write_shuffle(job.folder / "wanted" / raw_name(part.number), wanted, range_at(starts, wanted), len(starts))


def nearest_candidates(found: np.ndarray, most: int) -> np.ndarray:
    """Each pair of CANDIDATE (n,) once, and at most the ``most`` of a row with the lowest distance, ties: near row."""
    found = found[np.lexsort((found["near_row"], found["distance"], found["row_id"]))]
    new = np.ones(len(found), bool)  # a pair has the same distance in every cell
    new[1:] = (found["row_id"][1:] != found["row_id"][:-1]) | (found["near_row"][1:] != found["near_row"][:-1])
    found = found[new]
    rank = np.arange(len(found)) - np.searchsorted(found["row_id"], found["row_id"])
    kept: np.ndarray = found[rank < most]
    return kept


def send_vectors(part: Part, job: Job, names: Sequence[str]) -> None:
    """The vectors of a part that others want, as they are stored, and their norms."""
    rows, x = read_embeddings(part.vectors.location)
    norms = stored_norms(x)

    def wanted_by(name: str) -> np.ndarray:
        row_ids = read_shuffle(job.folder / "wanted" / name, ROW_ID, part.number)
        at = np.searchsorted(rows, row_ids - part.start)
        vectors = np.empty(len(at), job.vector)
        vectors["row_id"], vectors["norm"], vectors["x"] = row_ids, norms[at], x[at]
        return vectors

    write_groups(job.folder / "vectors" / raw_name(part.number), map(wanted_by, names), len(names))


def write_part(part: Part, job: Job, names: Sequence[str], out: Location, starts: np.ndarray) -> FileInfo:
    """The edges of a part: candidates whose exact similarity is high enough, and equal rows."""
    from curation import loops

    rows, x = part.vectors.read()
    listing = np.frombuffer((job.folder / "lists" / raw_name(part.number)).read(), LISTING)
    similarity = np.empty(len(listing), np.float32)
    ends = np.searchsorted(range_at(starts, listing["near_row"]), np.arange(len(names)), side="right")
    for name, begin, end in zip(names, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        if begin == end:
            continue
        vectors = read_shuffle(job.folder / "vectors" / name, job.vector, part.number)
        near = vectors["x"].astype(np.float32) / vectors["norm"][:, None]
        mine = np.searchsorted(rows, listing["row"][begin:end])
        theirs = np.searchsorted(vectors["row_id"], listing["near_row"][begin:end])
        similarity[begin:end] = loops.pair_dots(x, near, mine, theirs)
    edges = edge_records(listing["row"], listing["near_row"], similarity)
    edges = edges[similarity >= np.float32(job.config.min_similarity)]
    alike = job.equal.of(part)
    if job.known is not None:
        edges = np.concatenate([edges, job.known.of(part, job.config, alike)])
    edges = np.concatenate([strongest(edges, job.n_neighbors), equal_edges(part, alike)])
    return write_edges(out / part_name(part.number), len(rows), edges, job.n_neighbors)
