"""What rows add to the next centroids of k-means: float64 sums, sizes, and the rows farthest from their centroids."""

from typing import NamedTuple

import numpy as np

MOST_FAR = 1024  # empty clusters that get a far row in one step


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
