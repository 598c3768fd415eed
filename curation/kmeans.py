"""K-means over parts of rows: greedy k-means++ on a bounded sample, then Lloyd's steps with float64 sums.

An array is one part and the serial executor one worker, so both forms are the same code. The driver holds
centroids and sums, O(k * d), and O(parts); never anything O(rows).
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from curation.execute import Executor, Ref, SerialExecutor

BLOCK_ROWS = 4096  # rows of a part meet a kernel in blocks of this height; part of the stage version
CENTROID_COLUMNS = 2048  # centroids compared at once: scores of a block take 32 MiB
SEED_ROWS_PER_CLUSTER = 32  # rows k-means++ sees for every cluster it seeds ...
MIN_SEED_ROWS = 65_536  # ... and at least so many
UNIT_ROUNDOFF = 2.0**-24  # of float32


class Rows(Protocol):
    """A part: rows that can be read several times, block after block. Must be picklable to leave the process."""

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

    def _picked(self) -> Iterator[np.ndarray]:
        start = 0
        for block in self.part.blocks():
            low, high = np.searchsorted(self.rows, (start, start + len(block)))
            yield block[self.rows[low:high] - start]
            start += len(block)


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


class Sums(NamedTuple):
    """What rows add to the next centroids."""

    sums: np.ndarray  # float64 (k, d), of the rows of each cluster
    sizes: np.ndarray  # int64 (k,), rows of each cluster

    @staticmethod
    def zeros(n_clusters: int, width: int) -> "Sums":
        """Nothing added yet."""
        return Sums(np.zeros((n_clusters, width)), np.zeros(n_clusters, np.int64))

    def add(self, x: np.ndarray, labels: np.ndarray) -> None:
        """Add float32 rows (n, d) with labels (n,), in row order."""
        from curation import loops

        loops.add_rows(self.sums, self.sizes, x, labels)

    def merge(self, other: "Sums") -> "Sums":
        """Both together, in new arrays: on a cluster the inputs are read-only."""
        return Sums(self.sums + other.sums, self.sizes + other.sizes)


class KMeans(NamedTuple):
    """A fitted k-means."""

    centroids: np.ndarray  # float32 (k, d)
    labels: np.ndarray  # int32 (n,), cluster of each row
    sq_distance: np.ndarray  # float32 (n,), squared Euclidean, to the row's own centroid


def kmeans(x: np.ndarray, n_clusters: int, rng: np.random.Generator, n_iter: int = 50) -> KMeans:
    """K-means of rows by Lloyd's algorithm from a greedy k-means++ start.

    x: float (n, d), finite; used in float32 (other floats are copied). At most n clusters are made. ``n_iter`` Lloyd
    steps, fewer when the centroids stop moving; a cluster that loses its rows keeps its centroid. ``rng`` gives one
    seed. Ties go to the lower cluster. Holds, beside x, 8 bytes a row, the seeding sample twice (max(32 * k, 65536)
    rows) and k * d * 28 bytes. Raises ValueError for no rows, no clusters, or rows that are not finite.
    """
    part = ArrayRows(finite_rows(x))
    centroids = fit_centroids([part], n_clusters, (int(rng.integers(2**32)),), SerialExecutor(), n_iter)
    return KMeans(centroids, *assign_part(part, centroids))


def finite_rows(x: np.ndarray) -> np.ndarray:
    """``x`` as float32; raises ValueError unless it is a finite float array (n, d). Holds n * d bytes."""
    if x.ndim != 2 or x.dtype.kind != "f":
        raise ValueError(f"rows must be a float array (n, d): got {x.dtype} {x.shape}")
    x = np.ascontiguousarray(x, np.float32)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise ValueError(f"rows must be finite: {len(bad)} of {len(x)} are not, the first is row {bad[0]}")
    return x


def fit_centroids(
    parts: Sequence[Rows], n_clusters: int, seed_key: tuple[int, ...], executor: Executor, n_iter: int = 50
) -> np.ndarray:
    """Centroids float32 (k, d) of the rows of all parts, k = min(n_clusters, rows), by ``n_iter`` Lloyd steps.

    The seeding draws from ``default_rng([*seed_key, purpose, part])``. The same
    parts give the same bits on any number of workers; other parts of the same rows another rounding of the sums
    and, when there are more rows than the seeding sample takes, another sample.
    """
    n_rows = sum(part.n_rows for part in parts)
    if n_clusters < 1 or n_rows == 0:
        raise ValueError(f"k-means needs at least one cluster and one row: got {n_clusters} clusters of {n_rows} rows")
    centroids = seed_centroids(parts, min(n_clusters, n_rows), seed_key, executor)
    for _ in range(n_iter):
        moved = lloyd_step(parts, centroids, executor)
        if np.array_equal(moved, centroids):  # nothing will move any more, nor will a label change
            break
        centroids = moved
    return centroids


def lloyd_step(parts: Sequence[Rows], centroids: np.ndarray, executor: Executor) -> np.ndarray:
    """One step of Lloyd's algorithm, centroids float32 (k, d) to the same; an empty cluster stays where it was."""
    total = executor.reduce(part_sums, parts, Sums.merge, shared={"centroids": centroids}).get()
    full, moved = total.sizes > 0, centroids.copy()
    moved[full] = total.sums[full] / total.sizes[full, None]
    return moved


def part_sums(part: Rows, centroids: np.ndarray) -> Sums:
    """What one part adds: float64 sums (k, d) and int64 sizes (k,) of the clusters its rows are nearest to."""
    sums = Sums.zeros(*centroids.shape)
    for x in part.blocks():
        sums.add(x, nearest_centroid(x, centroids)[0])
    return sums


def assign_part(part: Rows, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row of a part: labels int32 (n,) and squared distances float32 (n,)."""
    labels, sq_distance = np.empty(part.n_rows, np.int32), np.empty(part.n_rows, np.float32)
    start = 0
    for x in part.blocks():
        at = slice(start, start + len(x))
        labels[at], sq_distance[at] = nearest_centroid(x, centroids)
        start = at.stop
    return labels, sq_distance


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row, ties to the lower index.

    x (n, d) and centroids (k, d): float32, finite. Returns labels int32 (n,) and squared Euclidean distances
    float32 (n,). A float32 product finds the candidates; where two are closer than its rounding error, the distances
    themselves, summed in float64, decide. So neither labels nor distances depend on how x is cut into blocks.
    Holds n * min(k, CENTROID_COLUMNS) * 4 bytes, so the caller cuts x into blocks.
    Raises ValueError if the widths differ or k is 0.
    """
    from curation import loops

    if centroids.shape[0] == 0 or x.shape[1] != centroids.shape[1]:
        raise ValueError(f"cannot assign rows {x.shape} to centroids {centroids.shape}")
    shift = centroids.mean(axis=0)  # distances stay, products get smaller, and with them their rounding errors
    near, far = x - shift, centroids - shift
    half = 0.5 * np.einsum("kd,kd->k", far, far)
    labels, best, second = best_two(near, far, half)
    reach = math.sqrt(2 * float(half.max()))  # longest centroid
    length = np.sqrt(np.einsum("nd,nd->n", near, near))
    error = (x.shape[1] + 8) * UNIT_ROUNDOFF * reach * (length + reach)  # bound of one score's error
    doubt = np.flatnonzero(~(best - second > 2 * error))
    if len(doubt):
        rows, floor = x[doubt], (best - 2 * error)[doubt].astype(np.float32)
        settled, distance = labels[doubt], np.full(len(doubt), np.inf)
        for first, score in scores(near[doubt], far, half):
            loops.settle(rows, centroids, score, floor, first, distance, settled)
        labels[doubt] = settled
    return labels, loops.row_sq_distances(x, centroids, labels)


def scores(x: np.ndarray, centroids: np.ndarray, half: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """``x @ centroids.T - half``, highest for the nearest, CENTROID_COLUMNS columns at a time with the first index."""
    for first in range(0, len(centroids), CENTROID_COLUMNS):
        score = x @ centroids[first : first + CENTROID_COLUMNS].T
        score -= half[first : first + CENTROID_COLUMNS]
        yield first, score


def best_two(x: np.ndarray, centroids: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label int32 of the best score of each row, that score, and the second best (-inf if k is 1), float32 (n,)."""
    rows, labels = np.arange(len(x)), np.zeros(len(x), np.int32)
    best, second = np.full((2, len(x)), -np.inf, np.float32)
    for first, score in scores(x, centroids, half):
        column = score.argmax(axis=1)
        top = score[rows, column]
        score[rows, column] = -np.inf
        second = np.maximum(np.maximum(second, score.max(axis=1)), np.minimum(best, top))
        labels[top > best] = (first + column)[top > best]
        best = np.maximum(best, top)
    return labels, best, second


def seed_centroids(parts: Sequence[Rows], n_clusters: int, seed_key: tuple[int, ...], executor: Executor) -> np.ndarray:
    """First centroids float32 (k, d): greedy k-means++ on a uniform sample of max(32 * k, 65536) rows, or all rows.

    The sample is gathered and used on a worker (rows * d * 8 bytes there); only the centroids come to the driver.
    """
    n_wanted = max(SEED_ROWS_PER_CLUSTER * n_clusters, MIN_SEED_ROWS)
    counts = sample_counts([part.n_rows for part in parts], n_wanted, np.random.default_rng([*seed_key, 2, 0]))
    draws = [Draw(part, counts[i], (*seed_key, 0, i)) for i, part in enumerate(parts)]
    sample: Ref[list[np.ndarray]] = executor.reduce(draw_rows, draws, operator.add)
    shared = {"sample": sample, "n_clusters": n_clusters}
    [centroids] = executor.map(seeds_of_sample, [(*seed_key, 1, 0)], shared=shared)
    return centroids


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


def draw_rows(draw: Draw) -> list[np.ndarray]:
    """Blocks of the rows drawn from one part, uniform without replacement, in ascending order."""
    rng = np.random.default_rng(draw.key)
    rows = rng.choice(draw.part.n_rows, draw.n_wanted, replace=False, shuffle=False)
    return list(SubsetRows(draw.part, np.sort(rows)).blocks())


def seeds_of_sample(key: tuple[int, ...], sample: list[np.ndarray], n_clusters: int) -> np.ndarray:
    """Centroids float32 (k, d) chosen from the rows of a sample."""
    x = np.concatenate(sample)
    chosen: np.ndarray = x[kmeans_plus_plus(x, n_clusters, np.random.default_rng(key))]
    return chosen


def kmeans_plus_plus(x: np.ndarray, n_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Rows int64 (k,) of x to start k-means from: greedy k-means++ (Arthur & Vassilvitskii 2007).

    x: float32 (n, d). The first row is uniform; for each next one 2 + floor(ln k) candidates are drawn with
    probability proportional to the squared distance to the nearest chosen row, and the one that leaves the smallest
    sum of these stays (ties: the first drawn). A row is chosen twice only where all others coincide with chosen ones.
    Holds a copy of x and (2 + ln k) * n * 8 bytes.
    """
    n_candidates = 2 + int(math.log(n_clusters))
    x = x - x.mean(axis=0)
    norms = np.einsum("nd,nd->n", x, x)
    close = 1e-3 * float(norms.max())
    nearest = np.full(len(x), np.inf, np.float32)
    chosen = np.empty(n_clusters, np.int64)
    for i in range(n_clusters):
        drawn = draw_candidates(nearest, n_candidates, rng) if i else rng.integers(len(x), size=1)
        left = np.minimum(sq_distances_to(x, norms, drawn), nearest)
        best = int(left.sum(axis=1).argmin())
        chosen[i] = drawn[best]
        near = np.flatnonzero(left[best] <= close)  # inexact in a product: copies of the row must be at 0
        left[best, near] = np.minimum(nearest[near], ((x[near] - x[chosen[i]]) ** 2).sum(axis=1))
        nearest = left[best]
    return chosen


def draw_candidates(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` indices int64 with probability proportional to the weights, with replacement."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    drawn: np.ndarray = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
    drawn[drawn == len(weights)] -= 1  # all weights 0
    return drawn


def sq_distances_to(x: np.ndarray, norms: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32 (m, n) squared distances of all rows to the given ones, by a product: small ones are inexact."""
    distance: np.ndarray = x[rows] @ x.T
    distance *= -2
    distance += norms
    distance += norms[rows][:, None]
    np.maximum(distance, 0, out=distance)
    return distance
