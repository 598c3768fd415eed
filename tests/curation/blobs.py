"""Rows for the tests of k-means, and parts of them."""

import numpy as np

from curation.execute import Here
from curation.rows import ArrayRows, weighted


def blobs(seed, n=4000, width=8, n_blobs=30, spread=0.3):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(n_blobs, width))[rng.integers(n_blobs, size=n)] + spread * rng.normal(size=(n, width))
    ).astype("f4")


def cut(x, cuts):
    return [ArrayRows(piece) for piece in np.split(x, cuts)]


def with_weights(parts, weights):
    return weighted(parts, Here(weights))
