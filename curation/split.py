"""A level of very many clusters in two steps: a first k-means, and one in each of its clusters, all of them apart.

What Vo et al. (2024, "Automatic Data Curation for Self-Supervised Learning", their ``n_splits``) do to have 10^7
clusters: no worker ever holds all centroids, and a row is compared with those of its first cluster alone. They cut
every first cluster into as many; here each gets a share of all by its sum of squares, which leaves a lower objective.
"""

import numpy as np

BISECTIONS = 200  # more than a float64 can tell apart
LEAST_SHARE = 1e-12  # of all squares: what is less counts as so much


def split_shares(sizes: np.ndarray, squares: np.ndarray, n_clusters: int) -> np.ndarray:
    """int64 (m,): how many clusters each first cluster is split into, ``n_clusters`` in all if there are rows for it.

    sizes: int64 (m,), rows of each first cluster. squares: float64 (m,), sums of squared distances to its centroid.
    For rows of many dimensions the objective is lowest where every cluster has the same sum of squares (Zador 1982), so
    shares are proportional to it: at least 1, none for a cluster without rows, at most its rows. What rounding leaves
    goes to the largest remainders, ties to the lower cluster. A cluster of equal rows stays one.
    """
    filled = sizes > 0
    least, most = filled.astype(np.int64), np.where(squares > 0, sizes, filled)
    wanted = min(max(n_clusters, int(least.sum())), int(most.sum()))
    squares = np.where(squares > 0, np.maximum(squares, LEAST_SHARE * squares.sum()), 0)
    low, high = 0.0, float(most.max(initial=0)) / float(squares[squares > 0].min(initial=np.inf))
    for _ in range(BISECTIONS):  # for the number of clusters of a unit of squares
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * squares, least, most).sum() < wanted else (low, middle)
    real = np.clip(low * squares, least, most)
    shares = np.floor(real).astype(np.int64)
    left = wanted - int(shares.sum())
    by_rest = np.lexsort((np.arange(len(sizes)), shares - real))
    shares[by_rest[shares[by_rest] < most[by_rest]][:left]] += 1
    return shares


def cut_pieces(sizes: np.ndarray, most: int) -> np.ndarray:
    """int64 (p + 1,): consecutive clusters in pieces of at most ``most`` rows each, or of one cluster; piece i has the
    clusters from value i up to the next. sizes: int64 (m,), rows of each."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    pieces = [0]
    while pieces[-1] < len(sizes):
        last = int(np.searchsorted(ends, ends[pieces[-1]] + most, side="right")) - 1
        pieces.append(max(last, pieces[-1] + 1))
    return np.array(pieces, np.int64)
