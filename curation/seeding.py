"""Rows to start k-means from: greedy k-means++, and for many clusters inside the cells of a coarse first round.

Greedy k-means++ looks at all rows for every row it chooses. Here a first round chooses few rows that cut
the others into cells; then every cell chooses from its own rows, as many as its share of the sum of squared
distances says. A choice looks at the rows of one cell alone; after a round all rows are compared with what is new.
"""

import math

import numpy as np

from curation.nearest import Target, assign

CELLS_FROM = 256  # clusters; fewer are seeded by greedy k-means++ alone
MIN_CELLS, PER_CELL = 8, 64  # clusters that a cell gets: a choice costs what so many share
COARSE_ROWS = 64  # rows that the first round sees for every cell
GROWTH = 0.25  # rows of a round, of those chosen before: in larger rounds cells choose what their neighbours have
PROPOSED = 2.0  # rows that cells offer for one that is taken: as greedy k-means++ takes the best wherever it lies
BLOCK_ROWS = 4096
COPIED_BYTES = 1 << 26  # of rows that are copied in the order of their cells
EMPTY = np.empty(0)


def seed_rows(
    x: np.ndarray, n_clusters: int, rng: np.random.Generator, weights: np.ndarray | None = None
) -> np.ndarray:
    """Rows int64 (k,) of x float32 (n, d) to start k-means from.

    weights: numbers (n,), at least 0, that squared distances are multiplied by, as if each row stood there so often;
    None: all 1. A row is chosen twice only where all others (of a weight above 0) coincide with chosen ones. Holds 44
    bytes a row, and a copy of x where it has at most COPIED_BYTES, or for k below CELLS_FROM. Takes n * d * k products,
    and in the choices up to 2 * PER_CELL * (2 + ln k) * n * d; for k below CELLS_FROM n * d * k * (2 + ln k).
    """
    if n_clusters < CELLS_FROM:
        return kmeans_plus_plus(x, n_clusters, rng, weights)
    n_cells = max(MIN_CELLS, n_clusters // PER_CELL)
    seen = np.sort(rng.choice(len(x), min(len(x), COARSE_ROWS * n_cells), replace=False, shuffle=False))
    cells = Cells(x, seen[kmeans_plus_plus(x[seen], n_cells, rng, at(weights, seen))], weights)
    rounds, n_chosen = [cells.order[cells.chosen]], n_cells
    while n_chosen < n_clusters:
        new = cells.choose(min(math.ceil(n_chosen * GROWTH), n_clusters - n_chosen), 2 + int(math.log(n_clusters)), rng)
        if not len(new):  # all rows coincide with chosen ones
            return np.concatenate([*rounds, np.repeat(rounds[0][:1], n_clusters - n_chosen)])
        rounds.append(cells.order[new])
        n_chosen += len(new)
    return np.concatenate(rounds)


class Cells:
    """Rows sorted by the cell they lie in, and how far each is from the nearest chosen row. Where all have more than
    COPIED_BYTES they stay where they are, and a cell is copied while it is looked at."""

    def __init__(self, x: np.ndarray, chosen: np.ndarray, weights: np.ndarray | None = None) -> None:
        labels, nearest = nearest_of(x, x[chosen])
        self.order = np.argsort(labels, kind="stable")  # int64 (n,): rows of x
        self.x, self.shift = x, x.mean(axis=0)
        self.sorted = self._seen(slice(0, len(x))) if x.nbytes <= COPIED_BYTES else None
        cells = (self._seen(slice(start, start + BLOCK_ROWS)) for start in range(0, len(x), BLOCK_ROWS))
        self.norms = np.concatenate([np.einsum("nd,nd->n", some, some) for some in cells])
        self.nearest = nearest[self.order]  # float32 (n,), squared
        self.weights = at(weights, self.order)
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=len(chosen)))])
        self.chosen = np.argsort(self.order)[chosen]  # places

    def _seen(self, own: slice) -> np.ndarray:
        """Rows by their places, from their mean on."""
        seen: np.ndarray = self.x[self.order[own]] - self.shift
        return seen

    def choose(self, n: int, n_candidates: int, rng: np.random.Generator) -> np.ndarray:
        """At most n more places, int64: fewer where no row is left in a cell that differs from a chosen one."""
        costs = np.append(weighed(self.nearest, self.weights), 0).astype(np.float64)
        of_cells = np.add.reduceat(costs, self.starts[:-1])
        of_cells[np.diff(self.starts) == 0] = 0
        shares = draw_shares(of_cells, math.ceil(n * PROPOSED), rng)
        offers = [self._offers(cell, shares[cell], n_candidates, rng) for cell in np.flatnonzero(shares).tolist()]
        places, gains = (np.concatenate(column) for column in zip(*offers, strict=True)) if offers else (EMPTY, EMPTY)
        new: np.ndarray = places[np.sort(np.argsort(-gains, kind="stable")[:n])].astype(np.int64)
        if len(new):  # rows of other cells may be near to them too
            found = nearest_of(self.x, self.x[self.order[new]])[1]
            np.minimum(self.nearest, found[self.order], out=self.nearest)
        return new

    def _offers(self, cell: int, n: int, n_candidates: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """At most n places of a cell one after the other, and how much each lowers the sum of the cell; never more
        than the one before it, so that the best of several cells begin where each begins."""
        first, last = self.starts[[cell, cell + 1]].tolist()
        own = slice(first, last)
        x = self._seen(own) if self.sorted is None else self.sorted[own]
        norms, nearest, weights = self.norms[own], self.nearest[own], at(self.weights, own)
        costs = weighed(nearest, weights)
        places, sums = list[int](), [float(costs.sum(dtype=np.float64))]
        while len(places) < n and costs.any():
            best, nearest = choose_best(x, norms, nearest, draw_candidates(costs, n_candidates, rng), weights)
            costs = weighed(nearest, weights)
            places.append(first + best)
            sums.append(float(costs.sum(dtype=np.float64)))
        return np.array(places, np.int64), np.minimum.accumulate(-np.diff(sums))


def at(weights: np.ndarray | None, rows: np.ndarray | slice) -> np.ndarray | None:
    """The weights of some rows, float64; None where all are 1."""
    return None if weights is None else weights[rows].astype(np.float64, copy=False)


def weighed(nearest: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Squared distances as they count: times the weights of their rows."""
    return nearest if weights is None else nearest * weights


def nearest_of(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``nearest_centroid``, block by block."""
    target = Target(centroids)
    found = [assign(x[start : start + BLOCK_ROWS], target) for start in range(0, len(x), BLOCK_ROWS)]
    return np.concatenate([some.labels for some in found]), np.concatenate([some.sq_distance for some in found])


def draw_shares(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64: n split by weights float64, each share rounded up or down, from one random start; 0 when none has any."""
    cumulative = np.cumsum(weights)
    if not cumulative[-1] > 0:
        return np.zeros(len(weights), np.int64)
    ends = np.floor(cumulative / cumulative[-1] * n + rng.random()).astype(np.int64)
    ends[-1] = n
    return np.diff(np.minimum(ends, n), prepend=0)


def kmeans_plus_plus(
    x: np.ndarray, n_clusters: int, rng: np.random.Generator, weights: np.ndarray | None = None
) -> np.ndarray:
    """Rows int64 (k,) of x to start k-means from: greedy k-means++ (Arthur & Vassilvitskii 2007).

    x: float32 (n, d). The first row is uniform; for each next one 2 + floor(ln k) candidates are drawn with
    probability proportional to the squared distance to the nearest chosen row, and the one that leaves the smallest
    sum of these stays (ties: the first drawn). A row is chosen twice only where all others coincide with chosen ones.
    With ``weights`` (see ``seed_rows``) the first one is drawn by them, and squared distances are multiplied by them.
    Holds a copy of x and (2 + ln k) * n * 8 bytes, with weights twice that.
    """
    n_candidates = 2 + int(math.log(n_clusters))
    x = x - x.mean(axis=0)
    norms = np.einsum("nd,nd->n", x, x)
    weights = at(weights, slice(None))
    nearest = np.full(len(x), np.inf, np.float32)
    chosen = np.empty(n_clusters, np.int64)
    drawn = rng.integers(len(x), size=1) if weights is None else draw_candidates(weights, 1, rng)
    for i in range(n_clusters):
        if i:
            drawn = draw_candidates(weighed(nearest, weights), n_candidates, rng)
        chosen[i], nearest = choose_best(x, norms, nearest, drawn, weights)
    return chosen


def choose_best(
    x: np.ndarray, norms: np.ndarray, nearest: np.ndarray, drawn: np.ndarray, weights: np.ndarray | None = None
) -> tuple[int, np.ndarray]:
    """Of the drawn rows the one that leaves the smallest sum of squared distances, each times its weight, ties to the
    first, and these distances."""
    left = np.minimum(sq_distances_to(x, norms, drawn), nearest)
    best = int((left.sum(axis=1) if weights is None else left @ weights).argmin())
    near = np.flatnonzero(left[best] <= 1e-3 * float(norms.max()))  # inexact in a product: copies must be at 0
    left[best, near] = np.minimum(nearest[near], ((x[near] - x[drawn[best]]) ** 2).sum(axis=1))
    return int(drawn[best]), left[best]


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
