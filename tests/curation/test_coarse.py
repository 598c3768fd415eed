import numpy as np
import pytest

from curation import coarse as module
from curation.coarse import CoarseTarget, group_centroids, n_agreeing
from curation.execute import SerialExecutor
from curation.kmeans import ArrayRows, Lloyd, State, assign_part, kmeans, refine
from curation.nearest import nearest_centroid


def mixture(seed, n, width=16):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(60, width))[rng.integers(60, size=n)] + 0.4 * rng.normal(size=(n, width))).astype("f4")


@pytest.mark.parametrize("k, width", [(1, 3), (7, 5), (400, 16), (1500, 33)])
def test_every_centroid_is_in_one_group(k, width):
    c = mixture(0, k, width)
    groups = group_centroids(c)
    assert sorted(groups.order[groups.order >= 0].tolist()) == list(range(k))
    assert groups.starts[-1] * len(groups.order) == groups.starts[-1] ** 2 * (len(groups.order) // groups.starts[-1])
    x = mixture(1, 300, width)
    everywhere = CoarseTarget(groups, n_probes=len(groups.centres)).assign(x)
    labels, sq_distance = nearest_centroid(x, c)
    assert (everywhere[0] == labels).mean() > 0.99
    np.testing.assert_allclose(everywhere[1], sq_distance, rtol=1e-5)


def test_it_is_the_nearest_of_the_probed_groups():
    c, x = mixture(0, 900), mixture(1, 500)
    groups = group_centroids(c)
    group_of = np.empty(900, int)
    from curation.loops_kmeans import COLUMNS

    for g in range(len(groups.centres)):
        some = groups.order[groups.starts[g] * COLUMNS : groups.starts[g + 1] * COLUMNS]
        group_of[some[some >= 0]] = g
    probed = np.argsort(((x[:, None] - groups.centres[None]) ** 2).sum(-1), axis=1)[:, :5]
    distance = ((x[:, None].astype("f8") - c[None]) ** 2).sum(-1)
    distance[~(group_of[None] == probed[:, :, None]).any(1)] = np.inf
    labels = CoarseTarget(groups, 5).assign(x)[0]
    assert (labels == distance.argmin(1)).mean() > 0.995  # but for rounding


def test_labels_do_not_depend_on_the_pieces(monkeypatch):
    target, x = CoarseTarget(group_centroids(mixture(0, 900)), 6), mixture(1, 500)
    whole = target.assign(x)
    monkeypatch.setattr(module, "PROBED_ROWS", 77)
    for a, b in zip(whole, target.assign(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_more_probes_agree_more_often():
    groups, x = group_centroids(mixture(0, 2000)), mixture(1, 1000)
    found = [n_agreeing(x, CoarseTarget(groups, p)) for p in (1, 4, 16, 89)]
    assert found == sorted(found) and found[0] < 900 and found[2] > 970 and found[3] >= 998


def test_k_means_goes_through_groups_from_a_number_of_clusters_on(monkeypatch):
    x, how = mixture(0, 3000), Lloyd(n_iter=10, tol=0)
    exact = refine([ArrayRows(x)], State(x[:500].copy()), SerialExecutor(), how)
    monkeypatch.setattr(module, "COARSE_FROM", 500)
    monkeypatch.setattr(module, "N_PROBES", 4)
    through = refine([ArrayRows(x)], State(x[:500].copy()), SerialExecutor(), how)
    assert through.objective != exact.objective
    assert through.objective <= 1.01 * exact.objective
    fitted = kmeans(x, 500, np.random.default_rng(0))
    np.testing.assert_array_equal(fitted.labels, assign_part(ArrayRows(x), fitted.centroids)[0])
