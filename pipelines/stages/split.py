"""A level of ``cluster`` in two steps (``curation.split``): a first k-means, then every cluster of it by itself.

Rows are labelled by the first k-means and sent to its clusters, one shuffle of their vectors. A task takes consecutive
clusters, as many as PIECE_BYTES hold, and leaves their centroids and the labels of their rows, which go back to the
parts. A larger cluster is a task of its own, with its rows in a local file, up to ALONE_BYTES; one that is larger still
is fitted like a pool of its own, on all workers.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curation.coarse import CentroidGroups
from curation.embeddings import EmbeddingsPart, read_embeddings, row_norms, stored_form
from curation.execute import Device, Executor, Ref, SerialExecutor, stored
from curation.hierarchy import ClusterConfig, HeldLevel, LevelTrail, fit_level
from curation.kmeans import fit, members_of, step_of
from curation.labelling import Member, Step, assign_member, assign_part, step_shared, step_to
from curation.rows import BLOCK_ROWS, ArrayRows, Rows
from curation.shuffle import read_bounds, read_range, read_shuffle, write_shuffle
from curation.split import cut_pieces, split_shares
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import range_at, raw_name
from pipelines.stages.trails import FileLevel, place_for_labels

PIECE_BYTES = 1 << 28  # of the vectors of a task as float32: it holds them twice, and its seeding sample
ALONE_BYTES = 1 << 32  # of those of one cluster that a task takes in a file
LABEL = np.dtype([("row", "<i8"), ("label", "<i4"), ("sq_distance", "<f4")])
FIRST_LABEL = np.dtype([("label", "<i4"), ("sq_distance", "<f4")])


@dataclass(frozen=True)
class Job:
    """What the tasks of a level share."""

    config: ClusterConfig
    level: int
    folder: Location  # of scratch
    starts: np.ndarray  # int64 (n_parts,), position of the first row of each part, empty ones too
    stored: np.dtype  # of the vectors
    width: int
    unit: bool
    device: Device  # that compares rows and centroids

    @property
    def n_first(self) -> int:
        """Clusters of the first k-means, at most."""
        return -(-self.config.n_clusters[self.level] // self.config.splits[self.level])

    @property
    def sent(self) -> np.dtype:
        """A row on its way to its first cluster; ``row`` counts over all parts."""
        return np.dtype([("row", "<i8"), ("x", self.stored, (self.width,))])

    @property
    def piece_rows(self) -> int:
        """Rows that a task may hold."""
        return max(1, PIECE_BYTES // (4 * self.width))

    def floats(self, x: np.ndarray) -> np.ndarray:
        """Stored vectors (n, d) as the parts give them, float32."""
        x = x.astype(np.float32)
        return x / row_norms(x)[:, None] if self.unit else x

    def fit(self, rows: Sequence[Rows], k: int, cluster: int, executor: Executor, trail: LevelTrail) -> np.ndarray:
        """Centroids float32 (k, d) of the rows of a first cluster."""
        return fit_level(
            rows, k, self.config.runs[self.level], self.config.sizes[self.level],
            seed_key=(self.config.seed, self.level, 1, cluster),
            executor=executor, how=self.config.lloyd, trail=trail, pick=self.config.resample, device=self.device,
        )  # fmt: skip


def job_of(
    config: ClusterConfig, level: int, parts: Sequence[EmbeddingsPart], folder: Location, device: Device,
    executor: Executor,
) -> Job:  # fmt: skip
    """The job of a level over ``parts``."""
    forms = list(executor.map(stored_form, [part.location for part in parts]))
    width, stored = forms[0][1], max((dtype for dtype, _ in forms), key=lambda dtype: dtype.itemsize)
    return Job(config, level, folder, np.array([part.first for part in parts]), stored, width, parts[0].unit, device)


class Plan(NamedTuple):
    """How the first clusters are split, and which tasks do it."""

    sizes: np.ndarray  # int64 (m,), rows of each first cluster
    offsets: np.ndarray  # int64 (m + 1,): first centroid of each first cluster among all
    pieces: np.ndarray  # int64 (p + 1,): first cluster of each piece

    def n_rows(self, piece: int) -> int:
        """Rows of a piece."""
        first, last = self.pieces[[piece, piece + 1]]
        return int(self.sizes[first:last].sum())

    def is_large(self, piece: int, job: Job) -> bool:
        """If a piece is one cluster of more rows than a task may take."""
        return self.n_rows(piece) * 4 * job.width > max(PIECE_BYTES, ALONE_BYTES)


def split_level(job: Job, parts: Sequence[EmbeddingsPart], executor: Executor) -> Plan:
    """Leave centroids and labels of a level in scratch. This process holds what ``fit`` of the first clusters does."""
    names = [raw_name(i) for i in range(len(parts))]
    label_first(job, parts, names, executor)
    first = [job.folder / "first" / name for name in names]
    sizes, squares = executor.reduce(partial(count_first, n_first=job.n_first), first, add_counts).get()
    shares = split_shares(sizes, squares, job.config.n_clusters[job.level])
    plan = Plan(sizes, np.concatenate([[0], np.cumsum(shares)]), cut_pieces(sizes, job.piece_rows))
    make_aside(send_rows, list(enumerate(parts)), names, job.folder / "rows", executor, {"job": job})
    pieces = range(len(plan.pieces) - 1)
    small = [piece for piece in pieces if not plan.is_large(piece, job)]
    shared, names = {"job": job, "plan": plan}, [raw_name(p) for p in small]
    make_aside(split_piece, small, names, job.folder / "centroids", executor, shared, job.device.gpus)
    for piece in pieces:
        if plan.is_large(piece, job) and not (job.folder / "centroids" / raw_name(piece)).exists():
            split_large(piece, job, plan, executor)
    return plan


def label_first(job: Job, parts: Sequence[EmbeddingsPart], names: Sequence[str], executor: Executor) -> None:
    """Leave the first cluster of every row, and its squared distance."""
    trail = FileLevel(job.folder).run(0)
    filled = [part for part in parts if part.n_rows]
    state = fit(filled, job.n_first, (job.config.seed, job.level, 0), executor, job.config.lloyd, trail, job.device)
    memory = {part: trail.memory(i) for i, part in enumerate(filled)}
    members = [Member(part, memory.get(part)) for part in parts]
    tasks = list(zip(names, members, strict=True))
    shared = step_shared(step_of(state, job.device), executor, members)
    make_aside(partial(write_first, folder=job.folder / "first"), tasks, names, job.folder / "first", executor, shared)


def write_first(task: tuple[str, Member], folder: Location, step: Step, groups: CentroidGroups | None = None) -> None:
    """The first labels of a part."""
    name, member = task
    records = np.empty(member.part.n_rows, FIRST_LABEL)
    records["label"], records["sq_distance"] = assign_member(member, step, groups)
    (folder / name).write(records.tobytes())


def count_first(file: Location, n_first: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of a part: how many are in each first cluster, int64 (m,), and their sums of squares, float64."""
    records = np.frombuffer(file.read(), FIRST_LABEL)
    squares = np.bincount(records["label"], records["sq_distance"].astype(np.float64), n_first)
    return np.bincount(records["label"], minlength=n_first), squares


def add_counts(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Both together."""
    return a[0] + b[0], a[1] + b[1]


def send_rows(numbered: tuple[int, EmbeddingsPart], job: Job) -> None:
    """Send the rows of a part to their first clusters."""
    number, part = numbered
    labels = np.frombuffer((job.folder / "first" / raw_name(number)).read(), FIRST_LABEL)["label"]
    records = np.empty(part.n_rows, job.sent)
    records["row"], records["x"] = np.arange(part.first, part.first + part.n_rows), read_embeddings(part.location)[1]
    write_shuffle(job.folder / "rows" / raw_name(number), records, labels, job.n_first)


def split_piece(piece: int, job: Job, plan: Plan) -> None:
    """Leave the centroids of a piece, which say that it is done, and before that the labels of its rows."""
    first, last = plan.pieces[[piece, piece + 1]].tolist()
    centroids = [np.empty((0, job.width), np.float32)]
    with tempfile.TemporaryDirectory() as aside:
        x, row_ids = gather_rows(job, first, last, plan, None if plan.n_rows(piece) <= job.piece_rows else Path(aside))
        labels, done = np.empty(len(x), LABEL), 0
        labels["row"] = row_ids
        for cluster in range(first, last):
            at = slice(done, done + int(plan.sizes[cluster]))
            done = at.stop
            if at.start == at.stop:
                continue
            rows = ArrayRows(x[at])
            begin, end = plan.offsets[[cluster, cluster + 1]].tolist()
            found = check_made(job.fit([rows], end - begin, cluster, SerialExecutor(), HeldLevel()), end - begin)
            near, labels["sq_distance"][at] = assign_part(rows, found, job.device)
            labels["label"][at] = near + begin
            centroids.append(found)
        del x  # before the file goes
    to = range_at(job.starts, labels["row"])
    write_shuffle(job.folder / "labels" / raw_name(piece), labels, to, len(job.starts))
    (job.folder / "centroids" / raw_name(piece)).write(np.concatenate(centroids).tobytes())


def check_made(centroids: np.ndarray, n: int) -> np.ndarray:
    """The centroids, n of them: those of the clusters behind are numbered on."""
    assert len(centroids) == n, f"a first cluster must be split into {n}: got {len(centroids)}"
    return centroids


def gather_rows(job: Job, first: int, last: int, plan: Plan, aside: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows sent to first clusters [first, last), float32 (n, d), cluster after cluster and ascending in each, and
    their places among all, int64 (n,). With ``aside`` the rows are in a file of that folder."""
    starts = np.cumsum(plan.sizes[first:last]) - plan.sizes[first:last]  # where the next row of each cluster goes
    n_rows = int(plan.sizes[first:last].sum())
    row_ids = np.empty(n_rows, np.int64)
    if aside is None:
        x = np.empty((n_rows, job.width), np.float32)
    else:
        x = np.memmap(aside / "rows", np.float32, "w+", shape=(n_rows, job.width))
    for number in range(len(job.starts)):
        file = job.folder / "rows" / raw_name(number)
        head, at = read_bounds(file, first, last)
        records = read_range(file, job.sent, head, int(at[0]), int(at[-1]))
        here = np.arange(len(records)) + np.repeat(starts - (at[:-1] - at[0]), np.diff(at))
        x[here], row_ids[here] = job.floats(records["x"]), records["row"]
        starts += np.diff(at)
    return x, row_ids


@dataclass(frozen=True)
class SentRows:
    """The rows of one part in one first cluster, as a part of that cluster."""

    job: Ref[Job]
    number: int  # of the part
    cluster: int
    n_rows: int

    def records(self) -> Iterator[np.ndarray]:
        """``Job.sent`` records, BLOCK_ROWS at a time."""
        job = self.job.get()
        file = job.folder / "rows" / raw_name(self.number)
        head, at = read_bounds(file, self.cluster, self.cluster + 1)
        begin, end = at.tolist()
        for start in range(begin, end, BLOCK_ROWS):
            yield read_range(file, job.sent, head, start, min(start + BLOCK_ROWS, end))

    def blocks(self) -> Iterator[np.ndarray]:
        """As ``Rows``."""
        return (self.job.get().floats(some["x"]) for some in self.records())


def split_large(piece: int, job: Job, plan: Plan, executor: Executor) -> None:
    """``split_piece`` of one large cluster, by all workers."""
    cluster = int(plan.pieces[piece])
    shared = {"job": job, "cluster": cluster}
    counts = list(executor.map(rows_in_cluster, range(len(job.starts)), shared))
    held = stored(executor, job)
    rows = [SentRows(held, number, cluster, n) for number, n in enumerate(counts) if n]
    begin, end = plan.offsets[[cluster, cluster + 1]].tolist()
    trail = FileLevel(job.folder / f"large-{cluster}")
    found = check_made(job.fit(rows, end - begin, cluster, executor, trail), end - begin)
    members = members_of(rows, place_for_labels(job.folder / f"large-{cluster}" / "labels", job.device))
    folder = job.folder / f"labels-{piece:07d}"
    work = partial(label_large, folder=folder, begin=begin)
    names = [raw_name(some.number) for some in rows]
    make_aside(work, members, names, folder, executor, step_shared(step_to(found, job.device), executor, members))
    (job.folder / "centroids" / raw_name(piece)).write(found.tobytes())


def rows_in_cluster(number: int, job: Job, cluster: int) -> int:
    """How many rows of a part are in a first cluster."""
    at = read_bounds(job.folder / "rows" / raw_name(number), cluster, cluster + 1).at
    return int(at[1] - at[0])


def label_large(member: Member, folder: Location, begin: int, step: Step, groups: CentroidGroups | None = None) -> None:
    """The labels of the rows of one part in a large cluster; the part of the member is ``SentRows``."""
    rows = member.part
    assert isinstance(rows, SentRows)
    labels = np.empty(rows.n_rows, LABEL)
    labels["row"] = np.concatenate([some["row"] for some in rows.records()])
    near, labels["sq_distance"] = assign_member(member, step, groups)
    labels["label"] = near + begin
    (folder / raw_name(rows.number)).write(labels.tobytes())


def labels_of_part(number: int, part: EmbeddingsPart, job: Job, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 (n,) and squared distances float32 (n,) of the rows of a part."""
    some = [np.zeros(0, LABEL)]
    for piece in range(len(plan.pieces) - 1):
        if not plan.is_large(piece, job):
            some.append(read_shuffle(job.folder / "labels" / raw_name(piece), LABEL, number))
            continue
        file = job.folder / f"labels-{piece:07d}" / raw_name(number)
        if file.exists():
            some.append(np.frombuffer(file.read(), LABEL))
    found = np.concatenate(some)
    labels, sq_distance = np.empty(part.n_rows, np.int32), np.empty(part.n_rows, np.float32)
    at = found["row"] - part.first
    labels[at], sq_distance[at] = found["label"], found["sq_distance"]
    return labels, sq_distance


def read_centroids(begin: int, end: int, job: Job, plan: Plan) -> np.ndarray:
    """Centroids [begin, end) of the level, float32 (n, d)."""
    bounds, size, some = plan.offsets[plan.pieces], 4 * job.width, list[bytes]()
    for piece in np.flatnonzero((bounds[1:] > begin) & (bounds[:-1] < end)).tolist():
        low, high = max(begin, int(bounds[piece])), min(end, int(bounds[piece + 1]))
        file = job.folder / "centroids" / raw_name(piece)
        some.append(file.read((low - int(bounds[piece])) * size, (high - low) * size))
    return np.frombuffer(b"".join(some), np.float32).reshape(-1, job.width)
