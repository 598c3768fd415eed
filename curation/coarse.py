"""The nearest centroid of every row through a coarse quantizer over the centroids, for very many of them.

Centroids lie in about sqrt(k) groups, those of a small k-means of the centroids. A row is compared with the centres of
all groups and with the centroids of the ``n_probes`` nearest ones, so its cost grows like the square root of k. What
is found is the nearest of these; how often that is the nearest of all, ``n_agreeing`` tells.
"""

from typing import NamedTuple

import numpy as np

from curation.nearest import Target, assign, nearest_centroid

GROUP_SIZE = 0.5  # centroids of a group, on average, in square roots of k
GROUP_STEPS = 4  # of the k-means of the centroids
N_PROBES = 64  # groups whose centroids a row is compared with
BLOCK_ROWS = 4096
PROBED_ROWS = 1024  # rows of a block that are compared at once: N_PROBES copies of each are held
COARSE_FROM = 65_536  # clusters from which rows are assigned so; fewer are all compared


class CentroidGroups(NamedTuple):
    """Centroids in groups, packed to be met by rows."""

    centres: np.ndarray  # float32 (g, d)
    order: np.ndarray  # int64 (m,): centroids by group, -1 where a tile of a group has none
    starts: np.ndarray  # int64 (g + 1,): first tile of each group
    centroids: np.ndarray  # float32 (k, d)
    shift: np.ndarray  # float32 (d,): what rows and centroids are seen from


def group_centroids(centroids: np.ndarray) -> CentroidGroups:
    """Cut centroids float32 (k, d) into about 2 * sqrt(k) groups. Takes GROUP_STEPS * k * g * d products, and holds
    k * d * 4 bytes."""
    from curation import loops, loops_kmeans

    k = len(centroids)
    n_groups = min(k, int(np.sqrt(k) / GROUP_SIZE))
    rng = np.random.default_rng(k)
    centres = centroids[np.sort(rng.choice(k, n_groups, replace=False))].copy()
    for step in range(GROUP_STEPS + 1):
        target = Target(centres)
        blocks = (centroids[start : start + BLOCK_ROWS] for start in range(0, k, BLOCK_ROWS))
        labels = np.concatenate([assign(block, target).labels for block in blocks])
        if step < GROUP_STEPS:
            sums, sizes = np.zeros(centres.shape), np.zeros(n_groups, np.int64)
            loops.add_rows(sums, sizes, centroids, labels)
            centres[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
    sizes = np.bincount(labels, minlength=n_groups)
    starts = np.concatenate([[0], np.cumsum(-(-sizes // loops_kmeans.COLUMNS))])
    order = np.full(starts[-1] * loops_kmeans.COLUMNS, -1, np.int64)
    by_group = np.argsort(labels, kind="stable")  # ascending inside a group
    first = np.cumsum(sizes) - sizes
    order[np.arange(k) + np.repeat(starts[:-1] * loops_kmeans.COLUMNS - first, sizes)] = by_group
    return CentroidGroups(centres, order, starts, centroids, centroids.mean(axis=0))


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
        self._centre_half = 0.5 * np.einsum("gd,gd->g", self._centres, self._centres)

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a block of rows float32 (n, d): labels int32 (n,), ties to the lower, and float32 (n,) squared distances.

        Holds PROBED_ROWS * (8 * g + 4 * n_probes * d) bytes.
        """
        from curation import loops

        pieces = [self._nearest(x[start : start + PROBED_ROWS]) for start in range(0, len(x), PROBED_ROWS)]
        labels = np.concatenate([np.empty(0, np.int32), *pieces])
        return labels, loops.row_sq_distances(x, self.groups.centroids, labels)

    def _nearest(self, x: np.ndarray) -> np.ndarray:
        from curation import loops_kmeans

        groups, n, p = self.groups, len(x), self.n_probes
        score = (x - groups.shift) @ self._centres.T - self._centre_half
        probes = np.argpartition(score, -p, axis=1)[:, -p:].ravel()
        by_group = np.argsort(probes, kind="stable")  # places of (row, probe)
        sizes = np.bincount(probes, minlength=len(groups.centres))
        panels_of = -(-sizes // loops_kmeans.ROWS)
        first_panel = np.cumsum(panels_of) - panels_of
        begin = np.repeat(first_panel * loops_kmeans.ROWS - (np.cumsum(sizes) - sizes), sizes)
        places = np.empty(n * p, np.int64)  # of each (row, probe) among the rows of all panels
        places[by_group] = np.arange(n * p) + begin
        rows = np.full(int(panels_of.sum()) * loops_kmeans.ROWS, -1, np.int64)
        rows[places] = np.arange(n * p) // p
        panels = np.empty((len(rows) // loops_kmeans.ROWS, x.shape[1], loops_kmeans.ROWS), np.float32)
        loops_kmeans.pack_rows(x, rows, groups.shift, panels)
        starts, limits = (np.repeat(tiles, panels_of) for tiles in (groups.starts[:-1], np.diff(groups.starts)))
        best, second = np.full((2, len(rows)), -np.inf, np.float32)
        columns = np.zeros(len(rows), np.int32)
        loops_kmeans.best_two(
            panels.reshape(-1), self._tiles.reshape(-1), self._half, starts, limits, best, second, columns, x.shape[1]
        )
        found, score = groups.order[columns[places]].reshape(n, p), best[places].reshape(n, p)
        found[score < score.max(axis=1, keepdims=True)] = len(groups.centroids)
        labels: np.ndarray = found.min(axis=1).astype(np.int32)
        return labels


def n_agreeing(x: np.ndarray, target: CoarseTarget) -> int:
    """How many rows get a centroid as near as the nearest of all."""
    exact = nearest_centroid(x, target.groups.centroids)[1]
    return int(np.sum(target.assign(x)[1] <= exact))
