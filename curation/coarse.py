"""The nearest centroid of every row through a coarse quantizer over the centroids, for very many of them.

Centroids lie in about 4 * sqrt(k) groups, those of a small k-means of the centroids. A row is compared with the centres
of all groups, with the centroids of the ``N_PROBES`` nearest ones, and then with those of every group that may have a
better one than was found: so a row of a tight cluster meets few centroids and one of a wide cluster many, and the cost
of a row grows about like the square root of k. What a group may have is not a bound, which no row of many dimensions
could use, but measured on centroids that stand for rows.
"""

from typing import NamedTuple

import numpy as np

from curation.nearest import Target, assign

GROUP_SIZE = 0.25  # centroids of a group, on average, in square roots of k
GROUP_STEPS = 4  # of the k-means of the centroids ...
GROUP_SAMPLE = 64  # ... which sees so many of them for every group
N_QUERIES = 1024  # centroids that stand for rows when it is measured what a group may have
N_PROBES = 48  # groups whose centroids a row is compared with in any case
BLOCK_ROWS = 4096
SCORE_BYTES = 1 << 25  # of the scores of rows and all centres at a time
PANEL_BYTES = 1 << 24  # of rows packed for the groups they meet: in memory that is asked for once a block
COARSE_FROM = 65_536  # clusters from which rows are assigned so; fewer are all compared


class CentroidGroups(NamedTuple):
    """Centroids in groups, packed to be met by rows."""

    centres: np.ndarray  # float32 (g, d)
    order: np.ndarray  # int64 (m,): centroids by group, -1 where a tile of a group has none
    starts: np.ndarray  # int64 (g + 1,): first tile of each group
    centroids: np.ndarray  # float32 (k, d)
    shift: np.ndarray  # float32 (d,): what rows and centroids are seen from
    middle: np.ndarray  # float32 (g,): half the mean squared length of the centroids of a group, seen from there
    gain: np.ndarray  # float32 (g,): how far the best score of a group lies above that of its middle, at distance 1


def group_centroids(centroids: np.ndarray) -> CentroidGroups:
    """Cut centroids float32 (k, d) into g, about 4 * sqrt(k), groups.

    Takes at most (GROUP_STEPS * GROUP_SAMPLE * g + k) * g * d products and N_QUERIES * k * d more; holds N_QUERIES * 8
    bytes for each centroid of a group.
    """
    from curation import loops_kmeans

    k = len(centroids)
    n_groups = min(k, int(np.sqrt(k) / GROUP_SIZE))
    rng = np.random.default_rng(k)
    seen = centroids[np.sort(rng.choice(k, min(k, GROUP_SAMPLE * n_groups), replace=False))]
    centres = centres_of(seen, n_groups, rng)
    labels = labels_of(centroids, centres)
    sizes = np.bincount(labels, minlength=n_groups)
    starts = np.concatenate([[0], np.cumsum(-(-sizes // loops_kmeans.COLUMNS))])
    order = np.full(starts[-1] * loops_kmeans.COLUMNS, -1, np.int64)
    by_group = np.argsort(labels, kind="stable")  # ascending inside a group
    first = np.cumsum(sizes) - sizes
    order[np.arange(k) + np.repeat(starts[:-1] * loops_kmeans.COLUMNS - first, sizes)] = by_group
    groups = [by_group[begin : begin + size] for begin, size in zip(first.tolist(), sizes.tolist(), strict=True)]
    queries = np.sort(rng.choice(k, min(k, N_QUERIES), replace=False))
    shift = centroids.mean(axis=0)
    middle, gain = what_groups_have(centroids, centres, shift, groups, queries)
    return CentroidGroups(centres, order, starts, centroids, shift, middle, gain)


def centres_of(x: np.ndarray, n_groups: int, rng: np.random.Generator) -> np.ndarray:
    """Centres float32 (g, d) of a few steps of k-means from random rows."""
    from curation import loops

    centres = x[np.sort(rng.choice(len(x), n_groups, replace=False))].copy()
    for _ in range(GROUP_STEPS):
        sums, sizes = np.zeros(centres.shape), np.zeros(n_groups, np.int64)
        loops.add_rows(sums, sizes, x, labels_of(x, centres))
        centres[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
    return centres


def labels_of(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """int32 (n,): the nearest centre of every row, all compared."""
    target = Target(centres)
    return np.concatenate([assign(x[at : at + BLOCK_ROWS], target).labels for at in range(0, len(x), BLOCK_ROWS)])


def what_groups_have(
    centroids: np.ndarray, centres: np.ndarray, shift: np.ndarray, groups: list[np.ndarray], queries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``middle`` and ``gain`` float32 (g,) of groups of centroids, as CentroidGroups has them.

    The gain is the second highest over the queries, centroids themselves: with it a row misses a group that has its
    nearest centroid about as seldom as two in N_QUERIES.
    """
    x, far = centroids[queries] - shift, centres - shift
    middle, gain = np.full(len(groups), np.inf, np.float32), np.zeros(len(groups), np.float32)
    to_centres = x @ far.T
    apart = np.sqrt(np.maximum(sq_distances(x, far, to_centres), np.finfo(np.float32).tiny))
    for g, members in enumerate(groups):
        if not len(members):
            continue
        near = centroids[members] - shift
        half = 0.5 * np.einsum("kd,kd->k", near, near)
        score = x @ near.T - half
        score[queries[:, None] == members[None]] = -np.inf  # itself
        middle[g] = half.mean()
        above = (score.max(axis=1) - (to_centres[:, g] - middle[g])) / apart[:, g]
        second = np.sort(above)[-2:][0]
        gain[g] = second if np.isfinite(second) else 0
    return middle, gain


def sq_distances(x: np.ndarray, centres: np.ndarray, products: np.ndarray) -> np.ndarray:
    """float32 (n, g): squared distances of rows and centres from their products, inexact where they are small."""
    distance: np.ndarray = products * np.float32(-2)
    distance += np.einsum("nd,nd->n", x, x)[:, None]
    distance += np.einsum("gd,gd->g", centres, centres)
    return distance


class CoarseTarget:
    """CentroidGroups of centroids that blocks of rows are assigned to. Holds k * d * 4 bytes beside the groups."""

    def __init__(self, groups: CentroidGroups, n_probes: int | None = None) -> None:
        from curation import loops_kmeans

        self.groups, self.n_probes = groups, min(n_probes or N_PROBES, len(groups.centres))
        width = groups.centroids.shape[1]
        self._tiles = np.empty((groups.starts[-1], width, loops_kmeans.COLUMNS), np.float32)
        self._half = np.empty(len(groups.order), np.float32)
        loops_kmeans.pack_centroids(groups.centroids, groups.order, groups.shift, self._tiles, self._half, 0)
        self._centres = groups.centres - groups.shift

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a block of rows float32 (n, d): labels int32 (n,), ties to the lower, and float32 (n,) squared distances.

        Holds about 4 * SCORE_BYTES + PANEL_BYTES, and 16 bytes for every group that a row meets.
        """
        from curation import loops, loops_kmeans

        height = max(1, min(BLOCK_ROWS, SCORE_BYTES // (4 * len(self._centres))))
        n_panels = max(-(-height // loops_kmeans.ROWS), PANEL_BYTES // (4 * x.shape[1] * loops_kmeans.ROWS))
        panels = np.empty((n_panels, x.shape[1], loops_kmeans.ROWS), np.float32)
        pieces = [self._nearest(x[start : start + height], panels) for start in range(0, len(x), height)]
        labels = np.concatenate([np.empty(0, np.int32), *pieces])
        return labels, loops.row_sq_distances(x, self.groups.centroids, labels)

    def _nearest(self, x: np.ndarray, panels: np.ndarray) -> np.ndarray:
        best, labels = np.full(len(x), -np.inf, np.float32), np.full(len(x), len(self.groups.centroids), np.int32)
        products = (x - self.groups.shift) @ self._centres.T
        apart = sq_distances(x - self.groups.shift, self._centres, products)
        most = np.partition(apart, self.n_probes - 1, axis=1)[:, self.n_probes - 1 : self.n_probes]
        near = apart <= most
        self._meet(x, near, panels, best, labels)
        np.sqrt(np.maximum(apart, 0, out=apart), out=apart)
        apart *= self.groups.gain
        products += apart
        products -= self.groups.middle  # what each group may have
        self._meet(x, (products > best[:, None]) & ~near, panels, best, labels)
        return np.minimum(labels, len(self.groups.centroids) - 1)  # products of huge rows overflow: no score is any

    def _meet(self, x: np.ndarray, pairs: np.ndarray, panels: np.ndarray, best: np.ndarray, labels: np.ndarray) -> None:
        """Compare rows with the centroids of groups, pairs bool (n, g); raise ``best`` and ``labels``. Pairs are packed
        in the order of their groups, those of as many groups at a time as ``panels`` hold."""
        from curation import loops_kmeans

        height = loops_kmeans.ROWS
        probes, rows = np.nonzero(np.ascontiguousarray(pairs.T))
        panel = np.cumsum(-(-pairs.sum(axis=0) // height))  # panels up to each group, its own among them
        first = np.searchsorted(probes, np.arange(len(panel) + 1))
        begin = 0
        while begin < len(panel):
            done = panel[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(panel, done + len(panels), side="right")))
            some = slice(first[begin], first[end])
            self._meet_some(x, rows[some], probes[some], panels, best, labels)
            begin = end

    def _meet_some(
        self, x: np.ndarray, rows: np.ndarray, probes: np.ndarray, panels: np.ndarray, best: np.ndarray,
        labels: np.ndarray,
    ) -> None:  # fmt: skip
        """The same for pairs in the order of their groups, as many as are packed at once."""
        from curation import loops_kmeans

        groups = self.groups
        sizes = np.bincount(probes, minlength=len(groups.centres))
        panels_of = -(-sizes // loops_kmeans.ROWS)
        first_panel = np.cumsum(panels_of) - panels_of
        places = np.arange(len(rows)) + np.repeat(first_panel * loops_kmeans.ROWS - (np.cumsum(sizes) - sizes), sizes)
        panels = panels[: int(panels_of.sum())]
        packed = np.full(len(panels) * loops_kmeans.ROWS, -1, np.int64)
        packed[places] = rows
        loops_kmeans.pack_rows(x, packed, groups.shift, panels)
        starts, limits = (np.repeat(tiles, panels_of) for tiles in (groups.starts[:-1], np.diff(groups.starts)))
        score, second = np.full((2, len(packed)), -np.inf, np.float32)
        columns = np.zeros(len(packed), np.int32)
        loops_kmeans.best_two(
            panels.reshape(-1), self._tiles.reshape(-1), self._half, starts, limits, score, second, columns, x.shape[1]
        )
        loops_kmeans.raise_best(rows, score[places], groups.order[columns[places]], best, labels)
