import numpy as np
import pytest

from curation import coarse as module
from curation.coarse import CoarseTarget, group_centroids
from curation.execute import SerialExecutor
from curation.kmeans import Lloyd, State, kmeans, refine
from curation.labelling import assign_part
from curation.nearest import nearest_centroid
from curation.rows import ArrayRows


def n_agreeing(x, target):
    return int(np.sum(target.assign(x)[1] <= nearest_centroid(x, target.groups.centroids)[1]))


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


def groups_of_centroids(groups):
    from curation.loops_kmeans import COLUMNS

    group_of = np.empty(len(groups.centroids), int)
    tiles = np.repeat(np.arange(len(groups.centres)), np.diff(groups.starts) * COLUMNS)
    group_of[groups.order[groups.order >= 0]] = tiles[groups.order >= 0]
    return group_of


def test_it_is_the_nearest_of_the_probed_groups_and_of_those_that_may_have_a_better_one():
    c, x = mixture(0, 900), mixture(1, 500)
    groups = group_centroids(c)
    group_of = groups_of_centroids(groups)
    near = ((x[:, None].astype("f8") - groups.centres[None]) ** 2).sum(-1)
    probed = np.zeros(near.shape, bool)
    np.put_along_axis(probed, near.argsort(axis=1)[:, :2], True, axis=1)
    far, seen = c - groups.shift.astype("f8"), x - groups.shift.astype("f8")
    score = seen @ far.T - 0.5 * (far**2).sum(1)
    best = np.where(probed[:, group_of], score, -np.inf).max(1)
    may_have = seen @ (groups.centres - groups.shift).T - groups.middle + groups.gain * np.sqrt(near)
    probed |= may_have > best[:, None]
    assert 2 < probed.sum(1).mean() < len(groups.centres) / 2, "the rule must decide something here"
    score[~probed[:, group_of]] = -np.inf
    labels = CoarseTarget(groups, 2).assign(x)[0]
    assert (labels == score.argmax(1)).mean() > 0.995  # but for rounding


def test_what_groups_have_is_their_second_best_for_the_queries():
    c = mixture(0, 300)
    groups = group_centroids(c)  # every centroid is a query
    group_of, shift = groups_of_centroids(groups), groups.shift.astype("f8")
    seen = c - shift
    score = seen @ seen.T - 0.5 * (seen**2).sum(1)
    np.fill_diagonal(score, -np.inf)
    apart = np.sqrt(((c[:, None].astype("f8") - groups.centres[None]) ** 2).sum(-1))
    for g in np.unique(group_of)[:20]:
        middle = 0.5 * (seen[group_of == g] ** 2).sum(1).mean()
        assert groups.middle[g] == pytest.approx(middle, rel=1e-5)
        above = (score[:, group_of == g].max(1) - (seen @ (groups.centres[g] - shift) - middle)) / apart[:, g]
        assert groups.gain[g] == pytest.approx(np.sort(above)[-2], rel=1e-3, abs=1e-4)


def test_labels_do_not_depend_on_the_pieces(monkeypatch):
    target, x = CoarseTarget(group_centroids(mixture(0, 900)), 6), mixture(1, 500)
    whole = target.assign(x)
    monkeypatch.setattr(module, "BLOCK_ROWS", 77)
    monkeypatch.setattr(module, "PANEL_BYTES", 1)
    for a, b in zip(whole, target.assign(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_groups_that_may_have_a_better_one_are_what_makes_it_agree():
    groups, x = group_centroids(mixture(0, 2000)), mixture(1, 1000)
    nowhere_else = groups._replace(middle=np.full_like(groups.middle, np.inf))
    found = [n_agreeing(x, CoarseTarget(some, p)) for p in (1, 4) for some in (nowhere_else, groups)]
    assert max(found[0], found[2]) < 960
    assert min(found[1], found[3]) > 980
    assert n_agreeing(x, CoarseTarget(groups, len(groups.centres))) >= 998


def test_k_means_goes_through_groups_from_a_number_of_clusters_on(monkeypatch):
    x, how = mixture(0, 3000), Lloyd(n_iter=10, tol=0)
    exact = refine([ArrayRows(x)], State(x[:500].copy()), SerialExecutor(), how)
    monkeypatch.setattr(module, "COARSE_FROM", 500)
    monkeypatch.setattr(module, "N_PROBES", 4)
    nothing = (np.full(89, np.inf, np.float32), np.zeros(89, np.float32))
    monkeypatch.setattr(module, "what_groups_have", lambda *_: nothing)  # so that it differs from an exact assignment
    through = refine([ArrayRows(x)], State(x[:500].copy()), SerialExecutor(), how)
    assert through.objective != exact.objective
    assert through.objective <= 1.01 * exact.objective
    fitted = kmeans(x, 500, np.random.default_rng(0))
    np.testing.assert_array_equal(fitted.labels, assign_part(ArrayRows(x), fitted.centroids)[0])


def test_rows_whose_products_overflow_get_a_centroid_that_is_there():
    c, x = mixture(0, 900), mixture(1, 200)
    with np.errstate(over="ignore", invalid="ignore"):
        labels = CoarseTarget(group_centroids(c * np.float32(1e20))).assign(x * np.float32(1e20))[0]
    assert labels.min() >= 0 and labels.max() < 900
