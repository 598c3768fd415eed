import functools

import numpy as np
import pytest
from blobs import blobs, cut

from curation import sums as module
from curation.execute import Here
from curation.kmeans import sums_of_parts
from curation.labelling import Member, Step
from curation.nearest import nearest_centroid
from curation.rows import ArrayRows, weighted
from curation.sums import Sums


@pytest.mark.parametrize("n_parts", [1, 7])
def test_the_farthest_rows_are_those_of_all_parts(n_parts, monkeypatch):
    monkeypatch.setattr(module, "MOST_FAR", 25)
    x, c = blobs(8), blobs(9)[:40]
    parts = cut(x, np.arange(1, n_parts) * len(x) // n_parts)
    step = Step(c, collects_far=True)
    total = functools.reduce(Sums.merge, (sums_of_parts([Member(part)], step) for part in parts))
    labels, sq_distance = nearest_centroid(x, c)
    rows = np.argsort(-sq_distance, kind="stable")[:25]
    np.testing.assert_array_equal(total.far.x, x[rows])
    np.testing.assert_array_equal(total.far.labels, labels[rows])
    np.testing.assert_array_equal(total.far.sq_distance, sq_distance[rows])


def test_a_row_alone_in_its_cluster_is_not_taken_and_sums_stay_whole():
    x = np.array([[0, 0], [1, 0], [100, 0], [4, 0]], "f4")
    far = module.Far(x[[2, 3, 1]], np.array([9, 4, 1], "f4"), np.array([1, 0, 0], "i4"), np.ones(3, np.int64))
    sums = np.array([[5.0, 0], [100, 0], [0, 0], [0, 0], [0, 0]])
    total = Sums(sums, np.array([3, 1, 0, 0, 0]), 14.0, far).with_farthest()
    assert total.sizes.tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_array_equal(total.sums[:, 0], [0, 100, 4, 1, 0])
    assert sums[0, 0] == 5  # what came in is read-only on a cluster


def test_rows_without_weight_take_no_place_among_the_farthest(monkeypatch):
    monkeypatch.setattr(module, "MOST_FAR", 5)
    x = blobs(3)[:300]
    weights = np.r_[np.ones(290, np.int64), np.zeros(10, np.int64)]
    x[290:] += 100  # the farthest
    step = Step(x[:20], collects_far=True)
    found = sums_of_parts([Member(part) for part in weighted([ArrayRows(x)], Here(weights))], step)
    sq_distance = nearest_centroid(x[:290], x[:20])[1]
    np.testing.assert_array_equal(found.far.x, x[np.argsort(-sq_distance, kind="stable")[:5]])
    assert np.all(found.far.weights == 1)
