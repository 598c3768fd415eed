"""K-means over parts of rows: first centroids, then Lloyd's steps with float64 sums until little changes.

An array is one part and the serial executor one worker, so both forms are the same code. The driver holds
centroids and sums, O(k * d), and O(parts); never anything O(rows). Sums are made on CPUs, for they are as large as all
centroids and go from task to task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from curation.coarse import CentroidGroups
from curation.execute import CPU, Device, Executor, SerialExecutor, local_values
from curation.labelling import Held, Member, Memory, Step, assign_member, assigned_blocks, step_shared, step_to, tag_of
from curation.nearest import moved_by
from curation.rows import BLOCK_ROWS, ArrayRows, Rows, weights_of
from curation.seed_sample import seed_centroids
from curation.sums import Sums, no_rows, with_far_rows

MOST_SUMS = 4096  # of clusters, that a step hands from task to task
TOLERANCE = 1e-4  # relative decrease of the objective in a step: less changes it by less than .001 to the end
SPLIT = 2.0**-10  # of a value: how far the two halves of a cluster begin apart, up and down in turns
NO_DIRECTION = 2.0**-40  # a mean of unit rows that is no longer than this is rounding alone
EMPTY = ("keep", "split", "farthest")
METRICS = ("euclidean", "cosine")


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


def members_of(parts: Sequence[Rows], trail: Trail) -> list[Member]:
    """The parts with what a trail has for each."""
    return [Member(part, trail.memory(i)) for i, part in enumerate(parts)]


def step_of(state: State, device: Device = CPU) -> Step:
    """How rows are assigned to the centroids of a state."""
    step = step_to(state.centroids, device)
    if state.before is None or device.name != CPU.name:  # a GPU meets all centroids anyhow
        return step
    return step._replace(drift=moved_by(state.before, state.centroids), tag_before=tag_of(state.before))


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
