"""K-means over parts of rows: seeds from a bounded sample, then Lloyd's steps with float64 sums until little changes.

An array is one part and the serial executor one worker, so both forms are the same code. The driver holds
centroids and sums, O(k * d), and O(parts); never anything O(rows).

With GPUs a step has two passes. Workers that have one label the rows, all centroids compared, and leave the labels in
the memories of the parts. The tasks of a CPU find them there and add up, for sums are as large as all centroids and go
from task to task.
"""

import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from curation import coarse
from curation.coarse import CentroidGroups, CoarseTarget, group_centroids
from curation.execute import CPU, Device, Executor, Ref, SerialExecutor, local_values, on_worker, stored
from curation.nearest import Bounds, Target, assign, moved_by
from curation.nearest_torch import ROWS, TorchTarget, torch_target
from curation.seeding import seed_rows

BLOCK_ROWS = 4096  # rows of a part meet a kernel in blocks of this height; part of the stage version
SEED_ROWS_PER_CLUSTER, LEAST_SEED_ROWS = 32, 8  # rows the seeding sees for every cluster, if they fit and if not in ...
SEED_BYTES = 1 << 27  # ... so much, as float32
MIN_SEED_ROWS = 65_536  # that it sees in any case
SAMPLE_PIECES = 16  # that the sample is gathered in: to be one it would be copied once more
MOST_SUMS = 4096  # of clusters, that a step hands from task to task
TOLERANCE = 1e-4  # relative decrease of the objective in a step: less changes it by less than .001 to the end
SPLIT = 2.0**-10  # of a value: how far the two halves of a cluster begin apart, up and down in turns
NO_DIRECTION = 2.0**-40  # a mean of unit rows that is no longer than this is rounding alone
EMPTY = ("keep", "split", "farthest")
MOST_FAR = 1024  # empty clusters that get a far row in one step
METRICS = ("euclidean", "cosine")


class Rows(Protocol):
    """A part: rows that can be read several times, block after block. Must be picklable to leave the process.

    A part may have ``weights`` too, see ``weights_of``; without them every row counts once.
    """

    @property
    def n_rows(self) -> int:
        """Rows in all blocks together."""
        ...

    def blocks(self) -> Iterator[np.ndarray]:
        """float32 (BLOCK_ROWS, d) arrays, the last one shorter; no blocks when there are no rows."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """The rows of an array (n, d) as a part."""

    x: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the array."""
        return len(self.x)

    def blocks(self) -> Iterator[np.ndarray]:
        """Slices of the array, converted to float32 where they are not."""
        for start in range(0, len(self.x), BLOCK_ROWS):
            yield np.ascontiguousarray(self.x[start : start + BLOCK_ROWS], np.float32)


@dataclass(frozen=True)
class SubsetRows:
    """The given rows of another part, as a part. rows: ascending int64, counted inside the part."""

    part: Rows
    rows: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the subset."""
        return len(self.rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """Read the whole part once, two blocks in memory, and cut what is picked into full blocks again."""
        return full_blocks(self._picked()) if len(self.rows) else iter(())

    @property
    def weights(self) -> np.ndarray | None:
        """Those of the picked rows."""
        weights = weights_of(self.part)
        return None if weights is None else weights[self.rows]

    def _picked(self) -> Iterator[np.ndarray]:
        start = 0
        for block in self.part.blocks():
            low, high = np.searchsorted(self.rows, (start, start + len(block)))
            yield block[self.rows[low:high] - start]
            start += len(block)


@dataclass(frozen=True)
class WeightedRows:
    """A part whose rows count as often as their weights say. These are looked up where the rows are read."""

    part: Rows
    all_weights: Ref[np.ndarray]  # int64, at least 0, of the rows of all parts; a row of weight 0 moves nothing
    first: int  # position of the first row of the part among them

    @property
    def n_rows(self) -> int:
        """Rows of the part."""
        return self.part.n_rows

    def blocks(self) -> Iterator[np.ndarray]:
        """Those of the part."""
        return self.part.blocks()

    @property
    def weights(self) -> np.ndarray:
        """int64 (n_rows,)."""
        return self.all_weights.get()[self.first : self.first + self.n_rows]


def weighted(parts: Sequence[Rows], weights: Ref[np.ndarray]) -> list[WeightedRows]:
    """The parts with weights int64, at least 0, one for every row of all parts in their order."""
    firsts = itertools.accumulate((part.n_rows for part in parts), initial=0)
    return [WeightedRows(part, weights, first) for part, first in zip(parts, firsts, strict=False)]


def weights_of(part: Rows) -> np.ndarray | None:
    """How often each row of a part counts, int64 (n_rows,); None: once."""
    weights: np.ndarray | None = getattr(part, "weights", None)
    return weights


def full_blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cut pieces (at most BLOCK_ROWS rows each) into blocks of BLOCK_ROWS rows, the last one shorter."""
    held: list[np.ndarray] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= BLOCK_ROWS:
            rows = np.concatenate(held)
            yield rows[:BLOCK_ROWS]
            held = [rows[BLOCK_ROWS:]]
    rest = np.concatenate(held) if held else np.empty(0)
    if len(rest):
        yield rest


class Far(NamedTuple):
    """Rows far from their centroids, the farthest first."""

    x: np.ndarray  # float32 (m, d)
    sq_distance: np.ndarray  # float32 (m,)
    labels: np.ndarray  # int32 (m,)
    weights: np.ndarray  # int64 (m,), how often each row counts

    def joined(self, other: "Far", n: int) -> "Far":
        """The n farthest of both; of equal distances those of this one come first."""
        both = Far(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))
        first = np.argsort(-both.sq_distance, kind="stable")[:n]
        return Far(*(values[first] for values in both))


class Sums(NamedTuple):
    """What rows add to the next centroids."""

    sums: np.ndarray  # float64 (k, d), of the rows of each cluster
    sizes: np.ndarray  # int64 (k,), rows of each cluster, each as often as it counts
    objective: float = 0.0  # squared distances of the rows to the centroids they were assigned to
    far: Far | None = None  # rows that empty clusters may take, if they do

    @staticmethod
    def zeros(n_clusters: int, width: int) -> "Sums":
        """Nothing added yet."""
        return Sums(np.zeros((n_clusters, width)), np.zeros(n_clusters, np.int64))

    def add(self, x: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add float32 rows (n, d) with labels (n,), in row order, each once or as often as its weight int64 (n,) says;
        the objective is the caller's."""
        from curation import loops

        if weights is None:
            loops.add_rows(self.sums, self.sizes, x, labels)
        else:
            loops.add_weighted_rows(self.sums, self.sizes, x, labels, weights)

    def merge(self, other: "Sums") -> "Sums":
        """Both together, in new arrays: on a cluster the inputs are read-only."""
        far = None if self.far is None or other.far is None else self.far.joined(other.far, MOST_FAR)
        return Sums(self.sums + other.sums, self.sizes + other.sizes, self.objective + other.objective, far)

    def with_farthest(self) -> "Sums":
        """Every empty cluster with the farthest row that is left, which its own cluster loses: as scikit-learn does. A
        row alone in its cluster stays there."""
        assert self.far is not None, "the step must have collected far rows"
        sums, sizes = self.sums.copy(), self.sizes.copy()
        empty = iter(np.flatnonzero(sizes == 0).tolist())
        for row, apart, label, weight in zip(*self.far, strict=True):
            if apart > 0 and sizes[label] > weight > 0:
                to = next(empty, None)
                if to is None:
                    break
                sums[to], sizes[to] = row.astype(np.float64) * weight, weight
                sums[label] -= sums[to]
                sizes[label] -= weight
        return self._replace(sums=sums, sizes=sizes)


class Memory(Protocol):
    """Where the bounds of a part lie from one step to the next; a place that travels with the part. What it holds saves
    work and changes no bit, so it may be lost; labels made on a GPU are lost with it, and made again by the next
    attempt."""

    def load(self) -> tuple[bytes, Bounds] | None:
        """What was saved last and its tag, which tells for what centroids it is true; None when there is nothing."""
        ...

    def save(self, tag: bytes, bounds: Bounds) -> None:
        """Replace what is there."""
        ...


class State(NamedTuple):
    """Where k-means stands: all that it needs to go on."""

    centroids: np.ndarray  # float32 (k, d)
    before: np.ndarray | None = None  # float32 (k, d): those that rows were last assigned to
    n_done: int = 0  # steps
    objective: float = math.inf  # of ``before``: the sum of squared distances
    done: bool = False


class Trail(Protocol):
    """What a fit leaves behind on its way."""

    def memory(self, part: int) -> Memory | None:
        """Where the bounds of a part may lie; None: nowhere, every step begins afresh."""
        ...

    def load(self) -> State | None:
        """Where an interrupted fit stood."""
        ...

    def save(self, state: State) -> None:
        """Keep this, whole or not at all: called after the seeding and after every step."""
        ...


@dataclass
class Held:
    """Bounds in this process, 8 bytes a row: for an executor that does everything here."""

    tag: bytes = b""
    bounds: Bounds | None = None

    def load(self) -> tuple[bytes, Bounds] | None:
        """As ``Memory``."""
        return None if self.bounds is None else (self.tag, self.bounds)

    def save(self, tag: bytes, bounds: Bounds) -> None:
        """As ``Memory``."""
        self.tag, self.bounds = tag, bounds


@dataclass
class HeldTrail:
    """Bounds in this process; nothing that outlives it."""

    parts: dict[int, Held] = field(default_factory=dict)

    def memory(self, part: int) -> Held:
        """As ``Trail``."""
        return self.parts.setdefault(part, Held())

    def load(self) -> State | None:
        """Nothing."""
        return None

    def save(self, state: State) -> None:
        """Nowhere."""


class NoTrail:
    """Nothing is kept."""

    def memory(self, part: int) -> Memory | None:
        """None."""
        return None

    def load(self) -> State | None:
        """Nothing."""
        return None

    def save(self, state: State) -> None:
        """Nowhere."""


@dataclass(frozen=True, kw_only=True)
class Lloyd:
    """How long Lloyd's algorithm goes on, what a centroid is, and what becomes of clusters that lose their rows.

    With ``cosine`` it is spherical k-means (Dhillon & Modha 2001): rows and first centroids have norm 1, and a centroid
    is the mean of its rows made unit, the direction from which their cosines have the highest sum. Between unit vectors
    the squared distance is 2 - 2 * cosine, so all else is as for ``euclidean``.
    """

    n_iter: int = 50  # steps, at most
    tol: float = TOLERANCE  # stop when a step lowers the objective by at most this share; 0: when nothing moves
    empty: str = "keep"  # an empty cluster stays where it was; "split": it takes half of the largest one; "farthest":
    # it takes the row that is farthest from its own centroid, MOST_FAR clusters in a step
    metric: str = "euclidean"  # or "cosine": centroids are unit; where the mean of the rows is 0 one stays as it was

    def __post_init__(self) -> None:
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol must be in [0, 1): got {self.tol}")
        if self.empty not in EMPTY:
            raise ValueError(f"empty must be one of {', '.join(EMPTY)}: got {self.empty!r}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}: got {self.metric!r}")


LLOYD, NO_TRAIL = Lloyd(), NoTrail()  # the defaults


class KMeans(NamedTuple):
    """A fitted k-means."""

    centroids: np.ndarray  # float32 (k, d)
    labels: np.ndarray  # int32 (n,), cluster of each row
    sq_distance: np.ndarray  # float32 (n,), squared Euclidean, to the row's own centroid


def kmeans(
    x: np.ndarray, n_clusters: int, rng: np.random.Generator, n_iter: int = 50, tol: float = TOLERANCE,
    empty: str = "keep", metric: str = "euclidean",
) -> KMeans:  # fmt: skip
    """K-means of rows by Lloyd's algorithm from seeds that are spread as those of k-means++.

    x: float (n, d), finite; used in float32 (other floats are copied). At most n clusters are made. ``n_iter`` Lloyd
    steps, fewer when one lowers the objective by a share of at most ``tol``, or when the centroids stop moving; see
    ``Lloyd`` for ``empty`` and ``metric``; for ``cosine`` rows are made unit, in a copy. ``rng`` gives one seed. Ties
    go to the lower cluster. Holds, beside x, 16 bytes a row, the seeding sample twice (``seed_sample`` rows)
    and k * d * 32 bytes. Raises ValueError for no rows, no clusters, rows that are not finite and, for ``cosine``, rows
    of zeros.
    """
    how = Lloyd(n_iter=n_iter, tol=tol, empty=empty, metric=metric)
    part, trail, executor = ArrayRows(checked_rows(x, metric)), HeldTrail(), SerialExecutor()
    key = (int(rng.integers(2**32)),)
    state = fit([part], n_clusters, key, executor, how, trail)
    member = Member(part, trail.memory(0))
    shared = step_shared(step_of(state), executor, [member])
    return KMeans(state.centroids, *assign_member(member, **local_values(shared)))


def finite_rows(x: np.ndarray) -> np.ndarray:
    """``x`` as float32; raises ValueError unless it is a finite float array (n, d). Holds n * d bytes."""
    if x.ndim != 2 or x.dtype.kind != "f":
        raise ValueError(f"rows must be a float array (n, d): got {x.dtype} {x.shape}")
    x = np.ascontiguousarray(x, np.float32)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise ValueError(f"rows must be finite: {len(bad)} of {len(x)} are not, the first is row {bad[0]}")
    return x


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows float32 (n, d) scaled to norm 1, in a new array; raises ValueError for rows of zeros."""
    norms = row_lengths(x)
    bad = np.flatnonzero(norms == 0)
    if len(bad):
        raise ValueError(
            f"rows must not be zeros for the cosine: {len(bad)} of {len(x)} are, the first is row {bad[0]}"
        )
    unit = np.empty_like(x)
    for start in range(0, len(x), BLOCK_ROWS):
        at = slice(start, start + BLOCK_ROWS)
        unit[at] = x[at] / norms[at, None]
    return unit


def checked_rows(x: np.ndarray, metric: str) -> np.ndarray:
    """``x`` as the metric wants it: ``finite_rows``, for ``cosine`` made unit."""
    rows = finite_rows(x)
    return unit_rows(rows) if metric == "cosine" else rows


def fit(
    parts: Sequence[Rows],
    n_clusters: int,
    seed_key: tuple[int, ...],
    executor: Executor,
    how: Lloyd = LLOYD,
    trail: Trail = NO_TRAIL,
    device: Device = CPU,
) -> State:
    """K-means of the rows of all parts, k = min(n_clusters, rows), to its end; goes on where ``trail`` says it stood.

    The seeding draws from ``default_rng([*seed_key, purpose, part])``. The same parts give the same bits on any number
    of workers; other parts of the same rows another rounding of the sums and, when there are more rows than the seeding
    sample takes, another sample. On another device than the CPU a row between two centroids may get the other one, see
    ``curation.nearest_torch``, and ``trail`` must have a memory for every part.
    """
    n_rows = sum(part.n_rows for part in parts)
    if n_clusters < 1 or n_rows == 0:
        raise ValueError(f"k-means needs at least one cluster and one row: got {n_clusters} clusters of {n_rows} rows")
    state = trail.load()
    if state is None:
        state = State(seed_centroids(parts, min(n_clusters, n_rows), seed_key, executor))
        trail.save(state)
    return refine(parts, state, executor, how, trail, device)


def refine(
    parts: Sequence[Rows], state: State, executor: Executor,
    how: Lloyd = LLOYD, trail: Trail = NO_TRAIL, device: Device = CPU,
) -> State:  # fmt: skip
    """Lloyd's steps from a state to the end that ``how`` sets."""
    members = members_of(parts, trail)
    while not state.done and state.n_done < how.n_iter:
        state = lloyd_step(members, state, executor, how, device)
        trail.save(state)
    return state


class Member(NamedTuple):
    """A part and the memory of its bounds."""

    part: Rows
    memory: Memory | None = None


def members_of(parts: Sequence[Rows], trail: Trail) -> list[Member]:
    """The parts with what a trail has for each."""
    return [Member(part, trail.memory(i)) for i, part in enumerate(parts)]


class Step(NamedTuple):
    """What a worker needs to assign the rows of a part: centroids, and how they came from those before."""

    centroids: np.ndarray  # float32 (k, d)
    drift: np.ndarray | None = None  # float64 (k,), see ``moved_by``
    tag: bytes = b""  # of the centroids, and of the device
    tag_before: bytes = b""  # of those that bounds are known for
    collects_far: bool = False  # sums have the rows that empty clusters may take
    device: Device = CPU  # that compares rows and centroids


def step_of(state: State, device: Device = CPU) -> Step:
    """How rows are assigned to the centroids of a state."""
    step = step_to(state.centroids, device)
    if state.before is None or device.name != CPU.name:  # a GPU meets all centroids anyhow
        return step
    return step._replace(drift=moved_by(state.before, state.centroids), tag_before=tag_of(state.before))


def step_to(centroids: np.ndarray, device: Device = CPU) -> Step:
    """How rows of which nothing is known are assigned to centroids."""
    return Step(centroids, tag=tag_of(centroids, device), device=device)


def tag_of(centroids: np.ndarray, device: Device = CPU) -> bytes:
    """32 bytes that tell centroids from others, and labels by one device from those by another."""
    tag = hashlib.sha256(centroids.tobytes())
    tag.update(b"" if device.name == CPU.name else device.name.encode())
    return tag.digest()


def step_shared(step: Step, executor: Executor, members: Sequence[Member]) -> dict[str, Any]:
    """What tasks that assign the rows of members share: the step, and the groups of very many centroids, made on a
    worker. On a GPU there are no groups, and the labels of all members are in their memories when this returns."""
    if step.device.name != CPU.name:
        there = stored(executor, step)
        for _ in executor.map_workers(partial(labeller, there), in_loads(members), step.device.gpus):
            pass
        return {"step": there}
    if len(step.centroids) < coarse.COARSE_FROM:
        return {"step": step}
    return {"step": step, "groups": on_worker(executor, group_centroids, {"centroids": step.centroids})}


def in_loads(members: Sequence[Member]) -> list[list[Member]]:
    """Neighbours that have as many rows together as keep a GPU busy; those without rows are left out. Raises ValueError
    where a member has no memory."""
    loads, n_rows = list[list[Member]](), ROWS
    for member in members:
        if not member.part.n_rows:
            continue
        if member.memory is None:
            raise ValueError("labels that a GPU makes must have a memory to lie in: got a part without one")
        if n_rows >= ROWS:
            loads.append([])
            n_rows = 0
        loads[-1].append(member)
        n_rows += member.part.n_rows
    return loads


def labeller(step: Ref[Step]) -> Callable[[Sequence[Member]], None]:
    """What a worker labels members by: the centroids are on its device from the first one to the last."""
    held = step.get()
    return partial(label_members, target=torch_target(held.centroids, held.device.name), tag=held.tag)


def label_members(members: Sequence[Member], target: TorchTarget, tag: bytes) -> None:
    """Leave the labels of members in their memories, unless all are there. Holds ROWS rows twice, and a part."""
    if all(known_under(tag, member) is not None for member in members):
        return
    blocks = itertools.chain.from_iterable(member.part.blocks() for member in members)
    labels = np.concatenate([target.assign(x)[0] for x in joined(blocks, ROWS)])
    ends = np.cumsum([member.part.n_rows for member in members])
    for member, own in zip(members, np.split(labels, ends[:-1]), strict=True):
        assert member.memory is not None, "in_loads has seen it"
        member.memory.save(tag, Bounds(own, np.zeros(len(own), np.float32)))  # of others nothing is known


def known_under(tag: bytes, member: Member) -> Bounds | None:
    """What the memory of a member has for the centroids of this tag."""
    held = None if member.memory is None else member.memory.load()
    return held[1] if held is not None and held[0] == tag else None


def joined(blocks: Iterable[np.ndarray], n_rows: int) -> Iterator[np.ndarray]:
    """Blocks, neighbours in one array as long as they have at most ``n_rows`` rows together."""
    held: list[np.ndarray] = []
    for block in blocks:
        if held and sum(map(len, held)) + len(block) > n_rows:
            yield np.concatenate(held)
            held = []
        held.append(block)
    if held:
        yield np.concatenate(held)


def lloyd_step(members: Sequence[Member], state: State, executor: Executor, how: Lloyd, device: Device = CPU) -> State:
    """One step of Lloyd's algorithm."""
    centroids = state.centroids
    step = step_of(state, device)._replace(collects_far=how.empty == "farthest")
    shared = step_shared(step, executor, members)
    total: Sums = executor.reduce(sums_of_parts, in_runs(members), Sums.merge, shared=shared, fan_in=2).get()
    moved = next_centroids(total, centroids, how)
    small = how.tol > 0 and state.objective - total.objective <= how.tol * total.objective
    done = small or np.array_equal(moved, centroids)  # then nothing will move any more, nor will a label change
    return State(moved, centroids, state.n_done + 1, total.objective, bool(done))


def next_centroids(total: Sums, centroids: np.ndarray, how: Lloyd) -> np.ndarray:
    """float32 (k, d): the means of what was summed, unit for the cosine; what has none stays, or gets rows."""
    if how.empty == "farthest":
        total = total.with_farthest()
    moved, lengths = centroids.copy(), total.sizes.astype(np.float64)
    full = total.sizes > 0
    if how.metric == "cosine":
        lengths = row_lengths(total.sums)
        full = lengths > NO_DIRECTION * total.sizes
    moved[full] = total.sums[full] / lengths[full, None]
    if how.empty == "split":
        apart = split_largest(moved, total.sizes)
        if how.metric == "cosine":
            moved[apart] /= row_lengths(moved[apart])[:, None]
    return moved


def row_lengths(x: np.ndarray) -> np.ndarray:
    """float64 (n,): the norms of rows (n, d)."""
    lengths: np.ndarray = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    return lengths


def split_largest(centroids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Give every empty cluster half of what is the largest one by then, ties to the lower, in place: the two begin a
    little to both sides of it. What FAISS does too; no row is looked at. Returns the clusters that moved, int64."""
    import heapq

    heap = [(-size, cluster) for cluster, size in enumerate(sizes.tolist()) if size > 1]
    heapq.heapify(heap)
    way = np.where(np.arange(centroids.shape[1]) % 2, -SPLIT, SPLIT).astype(np.float32)
    moved = set[int]()
    for empty in np.flatnonzero(sizes == 0).tolist():
        if not heap:
            break
        moved |= {empty, heap[0][1]}
        size, largest = heap[0]
        centroids[empty] = centroids[largest] * (1 - way)
        centroids[largest] *= 1 + way
        heapq.heapreplace(heap, (size + (-size // 2), largest))
        heapq.heappush(heap, (-(-size // 2), empty))
    return np.array(sorted(moved), np.int64)


def in_runs(members: Sequence[Member]) -> list[Sequence[Member]]:
    """Neighbours together, MOST_SUMS runs at most: sums are as large as all centroids, and every run hands on one."""
    height = max(1, -(-len(members) // MOST_SUMS))
    return [members[start : start + height] for start in range(0, len(members), height)]


def sums_of_parts(members: Sequence[Member], step: Step, groups: CentroidGroups | None = None) -> Sums:
    """What parts add: float64 sums (k, d), int64 sizes (k,) and the objective of the clusters their rows are nearest
    to, every row as often as it counts. Holds one set of sums."""
    sums, objective = Sums.zeros(*step.centroids.shape), 0.0
    far = no_rows(step.centroids.shape[1]) if step.collects_far else None
    for member in members:
        weights, start = weights_of(member.part), 0
        for x, labels, sq_distance in assigned_blocks(member, step, groups):
            own = None if weights is None else weights[start : start + len(x)]
            sums.add(x, labels, own)
            objective += float((sq_distance if own is None else sq_distance * own).sum(dtype=np.float64))
            start += len(x)
            if far is not None:
                far = with_far_rows(far, x, labels, sq_distance, own)
    return sums._replace(objective=objective, far=far)


def no_rows(width: int) -> Far:
    """None yet."""
    return Far(np.empty((0, width), np.float32), np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int64))


def with_far_rows(
    far: Far, x: np.ndarray, labels: np.ndarray, sq_distance: np.ndarray, weights: np.ndarray | None
) -> Far:
    """The MOST_FAR farthest of what there was and of the rows of a block; of equal distances the earlier ones."""
    least = far.sq_distance[-1] if len(far.sq_distance) == MOST_FAR else np.float32(0)
    rows = np.flatnonzero(sq_distance > least)
    if weights is not None:
        rows = rows[weights[rows] > 0]  # others would fill no cluster
    if len(rows) > MOST_FAR:
        rows = np.sort(rows[np.argsort(-sq_distance[rows], kind="stable")[:MOST_FAR]])
    if not len(rows):
        return far
    counted = np.ones(len(rows), np.int64) if weights is None else weights[rows]
    return far.joined(Far(x[rows], sq_distance[rows], labels[rows], counted), MOST_FAR)


def assigned_blocks(
    member: Member, step: Step, groups: CentroidGroups | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of a part with their labels and squared distances; at the end what is known then goes to its memory.
    With ``groups`` rows are assigned through them, and nothing is known. Raises ValueError where a GPU should have left
    labels in the memory and none are there."""
    part, memory = member
    if groups is not None:
        probed = CoarseTarget(groups)
        for x in part.blocks():
            yield x, *probed.assign(x)
        return
    tag, known = (None if memory is None else memory.load()) or (b"", None)
    if known is not None and tag == step.tag:
        yield from labelled_blocks(part, known.labels, step.centroids)
        return
    if step.device.name != CPU.name and part.n_rows:
        raise ValueError(f"labels made on {step.device.name} must be in the memory of their part: they were lost")
    if step.drift is None or tag != step.tag_before:
        known = None
    target = Target(step.centroids, None if known is None else step.drift)
    bounds, start = [], 0
    for x in part.blocks():
        at = slice(start, start + len(x))
        found = assign(x, target, None if known is None else Bounds(known.labels[at], known.lower[at]))
        start = at.stop
        if memory is not None:
            bounds.append(found.bounds)
        yield x, found.labels, found.sq_distance
    if memory is not None and bounds:
        memory.save(step.tag, Bounds(*map(np.concatenate, zip(*bounds, strict=True))))


def labelled_blocks(
    part: Rows, labels: np.ndarray, centroids: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``assigned_blocks`` of a part whose rows have their labels."""
    from curation import loops

    start = 0
    for x in part.blocks():
        own = labels[start : start + len(x)].copy()
        start += len(x)
        yield x, own, loops.row_sq_distances(x, centroids, own)


def assign_member(member: Member, step: Step, groups: CentroidGroups | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row of a part: labels int32 (n,) and squared distances float32 (n,)."""
    part = member.part
    labels, sq_distance = np.empty(part.n_rows, np.int32), np.empty(part.n_rows, np.float32)
    start = 0
    for _, some, distances in assigned_blocks(member, step, groups):
        at = slice(start, start + len(some))
        labels[at], sq_distance[at] = some, distances
        start = at.stop
    return labels, sq_distance


def assign_part(part: Rows, centroids: np.ndarray, device: Device = CPU) -> tuple[np.ndarray, np.ndarray]:
    """``assign_member`` of a part of which nothing is known, all in this process."""
    member = Member(part, None if device.name == CPU.name else Held())
    return assign_member(member, **local_values(step_shared(step_to(centroids, device), SerialExecutor(), [member])))


def seed_centroids(parts: Sequence[Rows], n_clusters: int, seed_key: tuple[int, ...], executor: Executor) -> np.ndarray:
    """First centroids float32 (k, d): see ``seed_rows``, on a uniform sample of the rows, see ``seed_sample``.

    The sample is gathered and used on a worker (rows * d * 8 bytes there); only the centroids come to the driver.
    Rows with weights are sampled as all others and keep them: a sum over the sample stands for one over all, but
    where a few rows have most of the weight it may miss them.
    """
    [width] = executor.map(width_of, [next(part for part in parts if part.n_rows)])
    n_wanted = seed_sample(n_clusters, width)
    counts = sample_counts([part.n_rows for part in parts], n_wanted, np.random.default_rng([*seed_key, 2, 0]))
    draws = [Draw(part, counts[i], (*seed_key, 0, i)) for i, part in enumerate(parts)]
    height = -(-len(draws) // SAMPLE_PIECES)
    pieces = [draws[start : start + height] for start in range(0, len(draws), height)]
    sample = {f"drawn_{i:02d}": executor.reduce(draw_rows, some, operator.add) for i, some in enumerate(pieces)}
    [centroids] = executor.map(partial(seeds_of_sample, n_clusters=n_clusters), [(*seed_key, 1, 0)], shared=sample)
    return centroids


def width_of(part: Rows) -> int:
    """Values of a row."""
    return int(next(part.blocks()).shape[1])


def seed_sample(n_clusters: int, width: int) -> int:
    """Rows that the seeding sees: SEED_ROWS_PER_CLUSTER for every cluster as far as SEED_BYTES hold them as float32,
    but LEAST_SEED_ROWS for every cluster and MIN_SEED_ROWS in all in any case."""
    wanted = min(SEED_ROWS_PER_CLUSTER * n_clusters, SEED_BYTES // (4 * width))
    return max(wanted, LEAST_SEED_ROWS * n_clusters, MIN_SEED_ROWS)


def sample_counts(sizes: Sequence[int], n_wanted: int, rng: np.random.Generator) -> list[int]:
    """How many rows to draw from each part, so that every row has the same chance and ``n_wanted`` are drawn.

    All rows if there are no more than wanted. The running share is rounded down from one random start, so a count
    is its part's share rounded up or down, and never above the part's rows. Python integers: no overflow.
    """
    total = sum(sizes)
    if total <= n_wanted:
        return list(sizes)
    start = int(rng.integers(total))
    ends = [(running * n_wanted + start) // total for running in itertools.accumulate(sizes, initial=0)]
    return [after - before for before, after in itertools.pairwise(ends)]


class Draw(NamedTuple):
    """How many rows of a part are drawn, and the key of its generator."""

    part: Rows
    n_wanted: int
    key: tuple[int, ...]


class Drawn(NamedTuple):
    """The rows drawn from one part."""

    blocks: list[np.ndarray]  # float32 (n, d)
    weights: np.ndarray | None  # int64, one a row; None: every row counts once


def draw_rows(draw: Draw) -> list[Drawn]:
    """The rows drawn from one part, uniform without replacement, in ascending order; a list of one, to be joined."""
    rng = np.random.default_rng(draw.key)
    rows = rng.choice(draw.part.n_rows, draw.n_wanted, replace=False, shuffle=False)
    drawn = SubsetRows(draw.part, np.sort(rows))
    return [Drawn(list(drawn.blocks()), drawn.weights)]


def seeds_of_sample(key: tuple[int, ...], n_clusters: int, **pieces: list[Drawn]) -> np.ndarray:
    """Centroids float32 (k, d) chosen from the rows of a sample, in pieces by name."""
    sample = [drawn for name in sorted(pieces) for drawn in pieces[name]]
    x = np.concatenate([block for drawn in sample for block in drawn.blocks])
    weights = [drawn.weights for drawn in sample if drawn.weights is not None]
    rng = np.random.default_rng(key)
    chosen: np.ndarray = x[seed_rows(x, n_clusters, rng, np.concatenate(weights) if weights else None)]
    return chosen
