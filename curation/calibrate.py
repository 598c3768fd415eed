"""Which threshold tells copies: true and false pairs at each of many, counted on images whose copies are known.

A sample of n images of a pool is copied in k ways. A copy and its own image are a true pair; an image or a copy, and
any *other* image of the sample, are a false one. What that says of a search in the whole pool:

- Each image meets N - 1 others in a pool of N, and n - 1 in the sample, so false pairs grow by (N - 1) / (n - 1).
- Precision needs to know how many copies there are. It is told for one copy an image, each way as frequent as the
  others, so that searches start as often from a copy as from its image. If an image has c copies on average, a
  precision of p becomes c p / (c p + 1 - p).
- False pairs of the images themselves need no such assumption: they are what the pool would give.

Copies that are in the sample already count as false pairs, since nobody knows of them.
"""

from typing import NamedTuple

import numpy as np

from curation.checks import check_unit_rows

N_THRESHOLDS = 200  # at even shares of the true pairs
UNSEEN = 3.0  # events of n trials that may be usual when none was seen, at 95 %: (1 - 3 / n) ** n is .05


class Calibration(NamedTuple):
    """Pairs at or above each threshold. Queries of kind 0 are the images themselves, of kind i the i-th way of copying.

    Precision is nan where nothing is found.
    """

    thresholds: np.ndarray  # float32 (m,), ascending, in (0, 1]
    true_pairs: np.ndarray  # int64 (k, m), of each way of copying
    false_pairs: np.ndarray  # int64 (1 + k, m), of each kind of query
    n_images: int  # in the sample, at least 2
    n_rows: int  # in the pool

    @property
    def growth(self) -> float:
        """False pairs of the pool for one of the sample."""
        return (self.n_rows - 1) / (self.n_images - 1)

    @property
    def recall(self) -> np.ndarray:
        """float64 (m,): the share of all copies that are found."""
        share: np.ndarray = self.recall_of_each.mean(axis=0)
        return share

    @property
    def recall_of_each(self) -> np.ndarray:
        """float64 (k, m): of every way of copying."""
        each: np.ndarray = self.true_pairs / self.n_images
        return each

    @property
    def precision(self) -> np.ndarray:
        """float64 (m,): the share of true pairs among those that images and their copies give in the pool."""
        return _share(self.true_pairs.sum(axis=0), self._false_of_each.sum(axis=0))

    @property
    def precision_of_each(self) -> np.ndarray:
        """float64 (k, m): of every way of copying, if all copies were made by it."""
        return _share(self.true_pairs, self._false_of_each)

    @property
    def _false_of_each(self) -> np.ndarray:
        """float64 (k, m): false pairs in the pool for one true pair of every image; half of the searches start from the
        images."""
        expected: np.ndarray = self.growth * (self.false_pairs[0] + self.false_pairs[1:]) / 2
        return expected

    @property
    def false_per_image(self) -> np.ndarray:
        """float64 (m,): other images that an image of the pool is expected to be taken for a copy of."""
        expected: np.ndarray = self.growth * self.false_pairs[0] / self.n_images
        return expected

    @property
    def unseen_per_image(self) -> float:
        """As ``false_per_image``, how many there may be where the sample shows none (at 95 %); 0 when it is the pool.

        Pairs are taken as independent, and those of copies not counted, which are much like those of their images.
        """
        pairs, seen = (n * (n - 1) / 2 for n in (self.n_rows, self.n_images))
        return UNSEEN * (pairs / seen - 1) * 2 / self.n_rows

    def suggest(self, min_precision: float) -> int | None:
        """The position of the lowest threshold with at least this precision, so of the highest recall; None: none."""
        fits = np.flatnonzero(self.precision >= min_precision)  # not where it is nan
        return int(fits[0]) if len(fits) else None


def _share(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        share: np.ndarray = true / (true + false)
    return share


def calibrate(x: np.ndarray, n_rows: int, n_thresholds: int = N_THRESHOLDS) -> Calibration:
    """The calibration of a sample in memory, as the blocks of a larger one give it.

    x (n, 1 + k, d): float32 unit rows, each image and behind it its copies; n and n_rows are at least 2.
    """
    similarity = true_similarities(x)
    thresholds = pick_thresholds(similarity, n_thresholds)
    false = false_pairs(x, np.arange(len(x)), x[:, 0], thresholds)
    return Calibration(thresholds, at_least(similarity.T, thresholds), false, len(x), n_rows)


def true_similarities(x: np.ndarray) -> np.ndarray:
    """float32 (n, k): how similar each copy is to its image, as ``neighbors`` has it. x: as in ``calibrate``."""
    from curation import loops

    n, kinds, width = x.shape
    rows = np.repeat(np.arange(n), kinds - 1)
    copies = np.ascontiguousarray(x[:, 1:], np.float32).reshape(len(rows), width)
    found = loops.pair_dots(np.ascontiguousarray(x[:, 0]), copies, rows, np.arange(len(rows)))
    return found.reshape(n, kinds - 1)


def pick_thresholds(similarity: np.ndarray, n: int) -> np.ndarray:
    """float32 (m,), ascending, distinct, in (0, 1]: at most n of the values, at even shares of them, the ends included.

    Between two values of true pairs a threshold finds what the higher finds, with no fewer false pairs: so these are
    the ones to choose from. Values that are not above 0 are left out, a ``min_similarity`` cannot be one of them.
    """
    values = np.sort(similarity[similarity > 0], axis=None)
    if not len(values):
        return np.zeros(0, np.float32)
    at = np.rint(np.linspace(0, len(values) - 1, n)).astype(np.int64)
    return np.unique(np.minimum(values[at], np.float32(1)))  # rounding may have passed 1


def false_pairs(x: np.ndarray, own: np.ndarray, base: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """int64 (1 + k, m): pairs of a query and another image that are at or above each threshold, of each kind of query.

    x (n, 1 + k, d): some images and their copies; own int64 (n,): where those images stand in base; base (b, d): all
    images of the sample; float32 unit rows. A similarity is a float64 sum of products, rounded to float32, as in
    ``neighbors``. Holds 8 b d + 20 n b bytes. Raises ValueError if base has no unit rows.
    """
    check_unit_rows(base, "base")
    wide = base.astype(np.float64).T
    counts = np.zeros((x.shape[1], len(thresholds)), np.int64)
    for kind in range(x.shape[1]):
        similarity = (x[:, kind].astype(np.float64) @ wide).astype(np.float32)
        similarity[np.arange(len(own)), own] = -np.inf
        counts[kind] = at_least(similarity.reshape(1, -1), thresholds)[0]
    return counts


def at_least(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """int64 (k, m): how many of each row of values (k, n) are at or above each of the ascending thresholds (m,)."""
    m = len(thresholds)
    reached = np.searchsorted(thresholds, values, side="right")  # so many thresholds are at or below a value
    counts = np.stack([np.bincount(row, minlength=m + 1) for row in reached])
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
