"""The nearest centroid of every row, exactly: float32 products find it, float64 sums decide where they cannot.

Between two steps of k-means most centroids move little or not at all, so a row keeps a bound on how near any other
centroid can be, and meets again those alone that can have come nearer. Bounds save work; no label depends on them.
"""

import math
from typing import NamedTuple

import numpy as np

CENTROID_COLUMNS = 2048  # centroids that a row in doubt is compared with at once
UNIT_ROUNDOFF = 2.0**-24  # of float32
UP, DOWN = 1 + 1e-6, 1 - 1e-6  # cover the rounding of a distance to float32


class Bounds(NamedTuple):
    """What is known of rows from the step before: 8 bytes a row."""

    labels: np.ndarray  # int32 (n,), of the nearest centroid
    lower: np.ndarray  # float32 (n,): no other centroid was nearer than this; Euclidean


class Assigned(NamedTuple):
    """Rows with their centroids."""

    labels: np.ndarray  # int32 (n,)
    sq_distance: np.ndarray  # float32 (n,), squared Euclidean, to the own centroid
    lower: np.ndarray  # float32 (n,): no other centroid is nearer than this; Euclidean

    @property
    def bounds(self) -> Bounds:
        """What the next step wants to know."""
        return Bounds(self.labels, self.lower)


class Target:
    """Centroids float32 (k, d) to assign rows to; with ``drift`` float (k,), how far each has moved since the bounds
    that ``assign`` is given were right. They are packed, those that moved farthest first, as far as rows meet them.

    Holds k * d * 4 bytes beside the centroids once all are packed. Raises ValueError when k is 0.
    """

    def __init__(self, centroids: np.ndarray, drift: np.ndarray | None = None) -> None:
        from curation import loops_kmeans

        if len(centroids) == 0:
            raise ValueError(f"rows need at least one centroid: got {centroids.shape}")
        k, width = centroids.shape
        self.centroids = np.ascontiguousarray(centroids, np.float32)
        self.shift = centroids.mean(axis=0)  # distances stay, products get smaller, and with them their rounding errors
        squares = loops_kmeans.sq_distances_from(self.shift, self.centroids)
        self.reach = math.sqrt(float(squares.max()))  # longest centroid
        self.order = np.arange(k) if drift is None else np.argsort(-drift, kind="stable")
        self.rank = np.empty(k, np.int64)
        self.rank[self.order] = np.arange(k)
        self.drift = np.zeros(k) if drift is None else drift[self.order].astype(np.float64) * UP
        n_tiles = -(-k // loops_kmeans.COLUMNS)
        self._tiles = np.empty((n_tiles, width, loops_kmeans.COLUMNS), np.float32)
        self._half = np.empty(n_tiles * loops_kmeans.COLUMNS, np.float32)
        self._n_packed = 0

    def packed(self, n_tiles: int) -> tuple[np.ndarray, np.ndarray]:
        """The first tiles, flat, and half the squared norms of their centroids."""
        from curation import loops_kmeans

        if n_tiles > self._n_packed:
            tiles = self._tiles[:n_tiles]
            loops_kmeans.pack_centroids(self.centroids, self.order, self.shift, tiles, self._half, self._n_packed)
            self._n_packed = n_tiles
        return self._tiles.reshape(-1), self._half

    def needed(self, sq_distance: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """int64 (n,): how many of the centroids, by drift, each row must meet, for its distance to the own one."""
        gap = lower.astype(np.float64) * DOWN - np.sqrt(sq_distance.astype(np.float64)) * UP
        needed: np.ndarray = np.searchsorted(-self.drift, -gap, side="right")
        return needed

    def error(self, squares: np.ndarray) -> np.ndarray:
        """float64 (n,): a bound of the rounding error of the scores of rows with such squared lengths."""
        width = self.centroids.shape[1]
        bound: np.ndarray = (width + 8) * UNIT_ROUNDOFF * self.reach * (np.sqrt(squares) + self.reach)
        return bound


def nearest_centroid(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row, ties to the lower index.

    x (n, d) and centroids (k, d): float32, finite. Returns labels int32 (n,) and squared Euclidean distances
    float32 (n,). A float32 product finds the candidates; where two are closer than its rounding error, the distances
    themselves, summed in float64, decide. So neither labels nor distances depend on how x is cut into blocks. Holds a
    copy of x and of the centroids. Raises ValueError if the widths differ or k is 0.
    """
    found = assign(x, Target(centroids)) if len(centroids) and x.shape[1] == centroids.shape[1] else None
    if found is None:
        raise ValueError(f"cannot assign rows {x.shape} to centroids {centroids.shape}")
    return found.labels, found.sq_distance


def assign(x: np.ndarray, target: Target, known: Bounds | None = None) -> Assigned:
    """What ``nearest_centroid`` says of rows float32 (n, d), and bounds for the next step; the same with and without
    what is ``known`` of them. Holds a copy of the rows that meet a centroid, and about 60 bytes a row."""
    from curation import loops

    if known is None:
        labels, lower = np.zeros(len(x), np.int32), np.full(len(x), np.inf)
        _meet(x, np.arange(len(x)), np.full(len(x), len(target.order)), target, labels, lower, first=True)
        return Assigned(labels, loops.row_sq_distances(x, target.centroids, labels), _rounded_down(lower))
    labels = known.labels.copy()
    sq_distance = loops.row_sq_distances(x, target.centroids, labels)
    needed = target.needed(sq_distance, known.lower)
    lower = known.lower - target.drift[0]
    rows = np.flatnonzero(needed)
    if len(rows):
        rows = rows[np.argsort(needed[rows], kind="stable")]
        lower[rows] = known.lower[rows]
        _meet(x, rows, needed[rows], target, labels, lower, first=False)
        changed = np.flatnonzero(labels != known.labels)
        sq_distance[changed] = loops.row_sq_distances(x[changed], target.centroids, labels[changed])
    return Assigned(labels, sq_distance, _rounded_down(lower))


def _meet(
    x: np.ndarray, rows: np.ndarray, needed: np.ndarray, target: Target, labels: np.ndarray, lower: np.ndarray,
    *, first: bool,
) -> None:  # fmt: skip
    """Compare rows with as many centroids as each needs, ascending; bring ``labels`` and ``lower`` up to date."""
    from curation import loops_kmeans

    n, k, width = len(rows), len(target.order), x.shape[1]
    panels = np.empty((-(-n // loops_kmeans.ROWS), width, loops_kmeans.ROWS), np.float32)
    loops_kmeans.pack_rows(x, rows, target.shift, panels)
    lasts = np.minimum(np.arange(1, len(panels) + 1) * loops_kmeans.ROWS, n) - 1
    limits = -(-needed[lasts] // loops_kmeans.COLUMNS)
    met = np.minimum(np.repeat(limits * loops_kmeans.COLUMNS, loops_kmeans.ROWS)[:n], k)
    squares, own = loops_kmeans.lengths_and_scores(x, rows, target.shift, target.centroids, labels)
    best, second = np.full((2, panels.shape[0] * loops_kmeans.ROWS), -np.inf, np.float32)
    places = np.zeros(len(best), np.int32)
    if not first:  # the own centroid is a candidate too, also where it is not met
        rank = target.rank[labels[rows]]
        outside = rank >= met
        best[:n][outside], places[:n][outside] = own[outside], rank[outside]
    tiles, half = target.packed(int(limits.max()))
    loops_kmeans.best_two(panels.reshape(-1), tiles, half, np.zeros_like(limits), limits, best, second, places, width)
    best, second, error = best[:n].astype(np.float64), second[:n].astype(np.float64), target.error(squares)
    labels[rows] = target.order[places[:n]]
    doubt = np.flatnonzero(~(best - second > 2 * error))
    if len(doubt):
        floor = (best - 2 * error)[doubt].astype(np.float32)
        labels[rows[doubt]] = _settle(x[rows[doubt]], target, floor, labels[rows[doubt]])
        second[doubt] = best[doubt]  # what wins in the end may be another
    apart = np.sqrt(np.maximum(squares - 2 * (second + error), 0)) * DOWN
    beyond = np.append(target.drift, -np.inf)[met]  # of those not met, the one that moved farthest
    lower[rows] = np.minimum(apart, lower[rows] - beyond)


def _settle(x: np.ndarray, target: Target, floor: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int32 (n,): the nearest centroid of each row by float64 sums, among those whose score reaches ``floor``."""
    from curation import loops

    settled, distance = labels.copy(), np.full(len(x), np.inf)
    near = x - target.shift
    for first in range(0, len(target.centroids), CENTROID_COLUMNS):
        far = target.centroids[first : first + CENTROID_COLUMNS] - target.shift
        score = near @ far.T
        score -= 0.5 * np.einsum("kd,kd->k", far, far)
        loops.settle(x, target.centroids, score, floor, first, distance, settled)
    return settled


def _rounded_down(distance: np.ndarray) -> np.ndarray:
    """float32, not above the float64 distances, and at least 0."""
    low: np.ndarray = np.nextafter(np.maximum(distance, 0).astype(np.float32), np.float32(0))
    return low


def moved_by(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """float64 (k,): how far each centroid has moved, rounded up; exactly 0 where its bits are the same."""
    from curation import loops_kmeans

    drift: np.ndarray = np.sqrt(loops_kmeans.sq_distances_between(before, after)) * UP
    return drift
