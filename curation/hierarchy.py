"""Hierarchical k-means with resampling (Vo et al. 2024, arXiv 2405.15613), level by level over parts of rows."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise
from numbers import Integral
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from curation.coarse import CentroidGroups
from curation.execute import CPU, Device, Executor, Here, Ref, SerialExecutor, on_worker
from curation.kmeans import (
    EMPTY,
    LLOYD,
    METRICS,
    NO_TRAIL,
    TOLERANCE,
    HeldTrail,
    Lloyd,
    NoTrail,
    State,
    Trail,
    checked_rows,
    fit,
    members_of,
    step_of,
)
from curation.labelling import Member, Step, assign_member, assign_part, step_shared
from curation.rows import ArrayRows, Rows, SubsetRows, weighted, weights_of

RESAMPLE = ("closest", "random")
WEIGHTS = ("equal", "size")
LUCK_KEY = 3  # of a run beside its seed key: its k-means draws with 0, 1 and 2


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How many clusters each level has, and how they are resampled."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines/, no import here

    n_clusters: tuple[int, ...]  # of each level, finest first, e.g. (1000, 300)
    n_resamples: int | tuple[int, ...] = 10  # k-means runs of a level after the first; a list: one number a level
    resample_size: tuple[int, ...] | None = None  # rows kept a cluster, a level; None: half the average cluster; 1: off
    n_splits: tuple[int, ...] | None = None  # a level: so many of its clusters are made, on average, inside one of a
    # first k-means, each apart; for very many clusters. None, 1: one k-means makes all
    resample: str = "closest"  # rows a cluster keeps: those nearest to its centre; "random": any, drawn anew each run
    weights: str = "equal"  # a centre counts once in the level above; "size": as often as it has images below it
    metric: str = "euclidean"  # or "cosine": spherical k-means, centres are unit vectors at every level
    n_iter: int = 50  # Lloyd steps of a run, at most
    tol: float = TOLERANCE  # a run ends when a step lowers its objective by at most this share; 0: when nothing moves
    empty: str = "keep"  # a cluster that loses its rows stays where it was; "split": it takes half of the largest one;
    # "farthest": it takes the row that is farthest from its own centre
    seed: int = 0  # of first centroids and of what is resampled

    def __post_init__(self) -> None:
        if not self.n_clusters or min(self.n_clusters) < 1 or any(a <= b for a, b in pairwise(self.n_clusters)):
            raise ValueError(
                f"cluster.n_clusters must be positive and get smaller, finest first: got {self.n_clusters}"
            )
        if self.resample_size is not None and len(self.resample_size) != len(self.n_clusters):
            raise ValueError(
                f"cluster.resample_size must have one number a level: got {self.resample_size} for {self.n_clusters}"
            )
        if len(self.splits) != len(self.n_clusters) or any(
            not 1 <= n <= k for n, k in zip(self.splits, self.n_clusters, strict=True)
        ):
            raise ValueError(
                "cluster.n_splits must have one number a level, from 1 up to its clusters: "
                f"got {self.n_splits} for {self.n_clusters}"
            )
        if self.weights == "size" and max(self.splits[1:], default=1) > 1:
            raise ValueError(
                f"cluster.n_splits must be 1 above the first level when weights are of size: got {self.n_splits}"
            )
        if isinstance(self.n_resamples, tuple) and len(self.n_resamples) != len(self.n_clusters):
            raise ValueError(
                f"cluster.n_resamples must be one number or one a level: got {self.n_resamples} for {self.n_clusters}"
            )
        if min(self.runs) < 0:
            raise ValueError(f"cluster.n_resamples must be at least 0: got {self.n_resamples}")
        for name, least in (("n_iter", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"cluster.{name} must be at least {least}: got {getattr(self, name)}")
        if not 0 <= self.tol < 1:
            raise ValueError(f"cluster.tol must be in [0, 1): got {self.tol}")
        for name, known in (("empty", EMPTY), ("resample", RESAMPLE), ("weights", WEIGHTS), ("metric", METRICS)):
            check_one_of(f"cluster.{name}", getattr(self, name), known)

    @property
    def runs(self) -> tuple[int, ...]:
        """Runs of each level after its first."""
        given = self.n_resamples
        return given if isinstance(given, tuple) else (given,) * len(self.n_clusters)

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Rows kept a cluster at each level; None: half the average cluster."""
        return self.resample_size or (None,) * len(self.n_clusters)

    @property
    def splits(self) -> tuple[int, ...]:
        """Into how many each first cluster of a level is split; 1: it has no first clusters."""
        return (1,) * len(self.n_clusters) if self.n_splits is None else self.n_splits

    @property
    def lloyd(self) -> Lloyd:
        """How every run goes on."""
        return Lloyd(n_iter=self.n_iter, tol=self.tol, empty=self.empty, metric=self.metric)


def check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is among the known ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}: got {value!r}")


class Groups(NamedTuple):
    """Group g holds ``rows[offsets[g]:offsets[g + 1]]``, in ascending order."""

    rows: np.ndarray  # int64 (n,), a permutation of 0..n-1
    offsets: np.ndarray  # int64 (n_groups + 1,)


def group_rows(labels: np.ndarray, n_groups: int) -> Groups:
    """Rows of each label; groups without rows are kept, empty. labels: int (n,) in [0, n_groups).

    A counting sort: holds 8 bytes a row and 24 a group. Raises ValueError for a label out of range.
    """
    from curation import loops

    if len(labels) and not 0 <= labels.min() <= labels.max() < n_groups:
        raise ValueError(f"labels must be in [0, {n_groups}): got {labels.min()}..{labels.max()}")
    offsets = np.zeros(n_groups + 1, np.int64)
    np.cumsum(np.bincount(labels, minlength=n_groups), out=offsets[1:])
    rows = np.empty(len(labels), np.int64)
    loops.fill_groups(labels, offsets[:-1].copy(), rows)
    return Groups(rows, offsets)


class Level(NamedTuple):
    """One level of clusters over the rows, or over the clusters of the level below."""

    centroids: np.ndarray | None  # float32 (n_clusters, d); None when only labels are known
    labels: np.ndarray  # int (n,), cluster of each row, or of each cluster of the level below
    sq_distance: np.ndarray | None = None  # float32 (n,), squared Euclidean, to the own centroid


@dataclass(frozen=True)
class Hierarchy:
    """Levels of clusters, the finest first: ``levels[t].labels`` are of the clusters of level t - 1, or the rows.

    Raises ValueError if there is no level, or if a level's labels do not fit the levels around it.
    """

    levels: Sequence[Level]

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a hierarchy must have at least one level: got none")
        for t, (level, n_clusters) in enumerate(zip(self.levels, self.n_clusters, strict=True)):
            labels = level.labels
            if labels.ndim != 1 or labels.dtype.kind not in "iu":
                raise ValueError(f"labels of level {t} must be integers (n,): got {labels.dtype} {labels.shape}")
            if len(labels) and not 0 <= labels.min() <= labels.max() < n_clusters:
                raise ValueError(
                    f"labels of level {t} must be in [0, {n_clusters}), the clusters that the level above labels: "
                    f"got {labels.min()}..{labels.max()}"
                )
            if level.centroids is not None and len(level.centroids) != n_clusters:
                raise ValueError(
                    f"level {t} must have a centroid for each of its {n_clusters} clusters: got {len(level.centroids)}"
                )
            if level.sq_distance is not None and level.sq_distance.shape != labels.shape:
                raise ValueError(
                    f"sq_distance of level {t} must have one value a label, {labels.shape}: "
                    f"got {level.sq_distance.shape}"
                )

    @property
    def n_clusters(self) -> tuple[int, ...]:
        """Clusters of each level, empty ones too (at the top without centroids: up to the highest label)."""
        top = self.levels[-1]
        n_top = int(top.labels.max()) + 1 if len(top.labels) else 0
        if top.centroids is not None:
            n_top = len(top.centroids)
        return (*(len(level.labels) for level in self.levels[1:]), n_top)

    @staticmethod
    def from_labels(labels: Sequence[np.ndarray]) -> "Hierarchy":
        """A hierarchy without centroids, from the labels of the rows, of the level-0 clusters, and so on."""
        return Hierarchy([Level(None, np.asarray(level)) for level in labels])


def hierarchical_kmeans(
    x: np.ndarray,
    n_clusters: Sequence[int] | np.ndarray,
    rng: np.random.Generator,
    n_resamples: int | Sequence[int] | np.ndarray = 10,
    resample_size: int | Sequence[int] | np.ndarray | None = None,
    n_iter: int = 50,
    tol: float = TOLERANCE,
    empty: str = "keep",
    resample: str = "closest",
    weights: str = "equal",
    metric: str = "euclidean",
) -> Hierarchy:
    """Cluster the rows, then the centroids of the rows' clusters, and so on.

    x: float (n, d), finite; used in float32. ``n_clusters``, finest first. ``n_resamples`` k-means runs follow the
    first one of a level (a number, or one a level), each from a fresh start on ``resample_size`` rows of every cluster;
    None stands for half the average cluster, 1 or less for no resampling. With ``resample`` ``closest`` these are the
    rows closest to the centroid, with ``random`` any, drawn without replacement in every run. With ``weights``
    ``equal`` a centroid counts once in the level above, whatever its rows, empty clusters too; with ``size`` as often
    as it has rows of x below it, and an empty cluster gets a label there and moves nothing. With ``metric`` ``cosine``
    rows are made unit, in a copy, and so are the centroids of all levels, see ``Lloyd``; ``sq_distance`` is then that
    of unit vectors, 2 - 2 * cosine. A level has at most as many clusters as the level below.
    ``n_iter``, ``tol`` and ``empty`` as in ``kmeans``. ``rng`` gives one seed; level t draws from keys (seed, t, ...).
    Holds, beside x, the chosen rows of a run, k * d * 32 bytes, 16 bytes a row and, while it resamples, 16 more.
    Raises ValueError for what k-means refuses, for lists of other lengths and for other words.
    """
    how = Lloyd(n_iter=n_iter, tol=tol, empty=empty, metric=metric)
    check_one_of("weights", weights, WEIGHTS)
    points, seed, levels = checked_rows(x, metric), int(rng.integers(2**32)), list[Level]()
    sizes = per_level(resample_size, len(n_clusters), "resample_size")
    runs = per_level(n_resamples, len(n_clusters), "n_resamples")
    part: Rows = ArrayRows(points)
    for t, k in enumerate(n_clusters):
        centroids = fit_level(
            [part],
            operator.index(k),
            runs[t] or 0,
            sizes[t],
            seed_key=(seed, t),
            executor=SerialExecutor(),
            how=how,
            trail=HeldLevel(),
            pick=resample,
        )
        levels.append(Level(centroids, *assign_part(part, centroids)))
        above: Rows = ArrayRows(centroids)
        if weights == "size":
            [above] = weighted([above], Here(rows_below(levels[t].labels, len(centroids), weights_of(part))))
        part = above
    return Hierarchy(levels)


def rows_below(labels: np.ndarray, n_clusters: int, weights: np.ndarray | None = None) -> np.ndarray:
    """int64 (n_clusters,): how many rows lie below each cluster, from the labels of rows, or of clusters with as many
    rows below them as ``weights`` int64 say."""
    counts = np.bincount(labels, weights, n_clusters)  # float64 with weights, which is exact below 2**53
    return counts.astype(np.int64)


def per_level(value: int | Sequence[int] | np.ndarray | None, n_levels: int, name: str) -> Sequence[int | None]:
    """One value a level; a single number or None goes to every level."""
    if value is None:
        return [None] * n_levels
    if isinstance(value, int | Integral):  # numpy's integers are no int
        return [int(value)] * n_levels
    if len(value) != n_levels:
        raise ValueError(f"{name} must be one number or one a level, {n_levels} of them: got {list(value)}")
    return [None if one is None else operator.index(one) for one in value]


class LevelTrail(Protocol):
    """What the fit of a level leaves behind on its way."""

    def run(self, number: int) -> Trail:
        """The trail of a k-means run of the level; the first one is run 0."""
        ...


class NoLevel:
    """Nothing is kept."""

    def run(self, number: int) -> NoTrail:
        """As ``LevelTrail``."""
        return NO_TRAIL


NO_LEVEL = NoLevel()


class HeldLevel:
    """Bounds in this process, of one run at a time."""

    def __init__(self) -> None:
        self._now = (-1, HeldTrail())

    def run(self, number: int) -> HeldTrail:
        """As ``LevelTrail``."""
        if number != self._now[0]:
            self._now = (number, HeldTrail())
        return self._now[1]


def fit_level(
    parts: Sequence[Rows],
    n_clusters: int,
    n_resamples: int,
    resample_size: int | None,
    *,
    seed_key: tuple[int, ...],
    executor: Executor,
    how: Lloyd = LLOYD,
    trail: LevelTrail = NO_LEVEL,
    pick: str = "closest",
    device: Device = CPU,
) -> np.ndarray:
    """Centroids float32 (k, d) of one level over all parts: k-means, then ``n_resamples`` runs on resampled rows.

    Run r draws from keys (seed_key..., r, ...). ``resample_size`` None is half the average cluster of the level, 1 or
    less means no resampling; ``pick`` says which rows, see ``hierarchical_kmeans``. Where so many clusters are
    empty that fewer rows than clusters would be chosen, the runs end. Labels are not kept:
    ``assign_part`` gives them, part by part, from what is returned. Goes on where ``trail`` says that it stood, to the
    same bits; on another ``device`` than the CPU it must have memories, see ``fit``. This process holds centroids and
    sums, and what ``resample`` holds; the rows stay on the workers. Raises ValueError for what k-means refuses and for
    another ``pick``.
    """
    check_one_of("resample", pick, RESAMPLE)
    n_rows = sum(part.n_rows for part in parts)
    state, begun = last_state(trail, n_resamples)
    if begun == 0:
        state = fit(parts, n_clusters, (*seed_key, 0), executor, how, trail.run(0), device)
    assert state is not None, "a run that has begun follows one that has ended"
    size = n_rows // (2 * min(n_clusters, n_rows)) if resample_size is None else resample_size
    for run in range(max(begun, 1), n_resamples + 1 if size > 1 else 1):
        # later runs are on fewer rows, so nothing is known; but a GPU needs a place for the labels of all
        known = trail.run(0) if run == 1 or device.name != CPU.name else NO_TRAIL
        key, members, step = (*seed_key, run), members_of(parts, known), step_of(state, device)
        chosen = resample(members, step, size, executor, key if pick == "random" else None)
        if sum(part.n_rows for part in chosen) < min(n_clusters, n_rows):
            break
        state = fit(chosen, n_clusters, key, executor, how, trail.run(run), device)
    return state.centroids


def last_state(trail: LevelTrail, n_resamples: int) -> tuple[State | None, int]:
    """The last run of a level that has left a state, and the state of the run before; (None, 0) when the first has not
    ended."""
    for run in range(n_resamples, 0, -1):
        if trail.run(run).load() is not None:
            return trail.run(run - 1).load(), run
    return None, 0


def resample(
    members: Sequence[Member], step: Step, size: int, executor: Executor, random_key: tuple[int, ...] | None = None
) -> list["ChosenRows"]:
    """The ``size`` rows closest to each centroid, as parts; with ``random_key`` any ``size`` rows of each cluster,
    uniform without replacement, which rows by the key and their position over all parts.

    Dense regions lose most rows, so the centroids of a fresh k-means on the others spread towards a uniform density
    over the support of the data. Labels and distances are gathered on a worker, which holds them and what
    ``closest_members`` does: at most 16 bytes a row when ``size`` is half the average cluster. This process holds the
    number of chosen rows of each part.
    """
    placed = list(zip(members, accumulate((member.part.n_rows for member in members), initial=0), strict=False))
    work = partial(assigned_part, key=None if random_key is None else luck_key(random_key))
    assigned = executor.reduce(work, placed, operator.add, shared=step_shared(step, executor, members))
    wanted = {"assigned": assigned, "n_clusters": len(step.centroids), "size": size}
    chosen = on_worker(executor, closest_members, wanted)
    counts = on_worker(executor, chosen_counts, {"chosen": chosen}).get()
    parts = (member.part for member in members)
    return [ChosenRows(part, chosen, i, n_rows) for i, (part, n_rows) in enumerate(zip(parts, counts, strict=True))]


Assigned = list[tuple[np.ndarray, np.ndarray]]  # labels of parts, one after the other, and what orders their rows


def luck_key(seed_key: tuple[int, ...]) -> int:
    """What the luck of all rows in a run is keyed by."""
    return int(np.random.SeedSequence([*seed_key, LUCK_KEY, 0]).generate_state(1, np.uint64)[0])


def assigned_part(
    placed: tuple[Member, int], step: Step, groups: CentroidGroups | None = None, key: int | None = None
) -> Assigned:
    """``assign_member`` of a part whose first row has this position over all parts, as a list of one: lists of
    neighbours are joined where they were made. With a key there are random numbers, uint32, in place of distances."""
    member, first = placed
    labels, order = assign_member(member, step, groups)
    if key is not None:
        from curation import loops_sampling

        order = np.empty(len(labels), np.uint32)
        loops_sampling.row_luck(np.uint64(key), first, order)
    return [(labels, order)]


@dataclass(frozen=True)
class Chosen(Sequence[np.ndarray]):
    """Rows of every part, in two flat arrays; item i is the rows of part i, int64, ascending, counted in the part."""

    positions: np.ndarray  # int64 (m,), ascending, counted over all parts
    starts: np.ndarray  # int64 (n_parts + 1,), position of the first row of each part

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, part: int) -> np.ndarray:  # type: ignore[override]  # no slices
        low, high = np.searchsorted(self.positions, self.starts[[part, part + 1]])
        rows: np.ndarray = self.positions[low:high] - self.starts[part]
        return rows


def chosen_counts(chosen: Chosen) -> list[int]:
    """How many rows of each part are chosen."""
    counts: list[int] = np.diff(np.searchsorted(chosen.positions, chosen.starts)).tolist()
    return counts


@dataclass(frozen=True)
class ChosenRows:
    """The chosen rows of another part, as a part. Which rows these are is looked up where they are read."""

    part: Rows
    chosen: Ref[Chosen]
    index: int  # of the part in ``chosen``
    n_rows: int

    def blocks(self) -> Iterator[np.ndarray]:
        """As ``SubsetRows``."""
        return SubsetRows(self.part, self.chosen.get()[self.index]).blocks()

    @property
    def weights(self) -> np.ndarray | None:
        """As ``SubsetRows``."""
        weights = weights_of(self.part)
        return None if weights is None else weights[self.chosen.get()[self.index]]


def closest_members(assigned: Iterable[tuple[np.ndarray, np.ndarray]], n_clusters: int, size: int) -> Chosen:
    """The ``size`` rows closest to the centroid in every cluster, ties to the earlier row.

    assigned: labels int (n,) and squared distances float32 (n,), or other numbers of 4 bytes, of one part after the
    other, at least one, read once. Holds a heap of ``size`` (distance, row) a cluster, n_clusters * size * 12 bytes,
    with a byte a row; then that byte with 8 for each chosen row.
    """
    from curation import loops

    rest = iter(assigned)
    one = next(rest)
    distance = np.empty((n_clusters, size), one[1].dtype)
    row = np.empty((n_clusters, size), np.int64)
    filled = np.zeros(n_clusters, np.int64)
    starts = [0]
    for labels, sq_distance in chain([one], rest):
        loops.push_closest(distance, row, filled, labels, sq_distance, starts[-1])
        starts.append(starts[-1] + len(labels))
    mask = np.zeros(starts[-1], bool)
    mask[row[np.arange(size) < filled[:, None]]] = True
    del distance, row  # before there are positions
    return Chosen(np.flatnonzero(mask), np.array(starts, np.int64))
