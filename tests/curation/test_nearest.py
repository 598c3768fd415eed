import numpy as np
import pytest

from curation import loops
from curation import nearest as module
from curation.nearest import Assigned, Bounds, Target, assign, moved_by, nearest_centroid


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("columns", [4, 2048])
def test_nearest_matches_brute_force(seed, columns, monkeypatch):
    monkeypatch.setattr(module, "CENTROID_COLUMNS", columns)
    rng = np.random.default_rng(seed)
    x, c = rng.normal(size=(100, 5)).astype("f4"), rng.normal(size=(9, 5)).astype("f4")
    distance = ((x[:, None].astype("f8") - c[None]) ** 2).sum(-1)
    labels, sq_distance = nearest_centroid(x, c)
    assert labels.dtype == np.int32 and sq_distance.dtype == np.float32
    np.testing.assert_array_equal(labels, distance.argmin(1))
    np.testing.assert_allclose(sq_distance, distance.min(1), rtol=1e-6)


@pytest.mark.parametrize("columns", [7, 64, 2048])
@pytest.mark.parametrize("shift", [0, 1000])
def test_nearest_is_exact_where_float32_products_are_not(columns, shift, monkeypatch):
    """Equal and nearly equal centroids, far from the origin: the lowest index of the true nearest one wins."""
    monkeypatch.setattr(module, "CENTROID_COLUMNS", columns)
    rng = np.random.default_rng(0)
    c = rng.normal(size=(30, 100)).astype("f4")
    c = np.concatenate([c, c + rng.normal(size=c.shape) * 1e-6, c]).astype("f4") + np.float32(shift)
    x = (c[rng.integers(90, size=500)] + 1e-3 * rng.normal(size=(500, 100))).astype("f4")
    labels, sq_distance = nearest_centroid(x, c)
    distance = ((x[:, None].astype("f8") - c[None]) ** 2).sum(-1)
    np.testing.assert_allclose(distance[np.arange(500), labels], distance.min(1), rtol=1e-12)
    assert (labels < 60).all()  # never the second of two equal ones
    np.testing.assert_allclose(sq_distance, distance.min(1), rtol=1e-6)


def test_nearest_does_not_depend_on_the_block():
    rng = np.random.default_rng(1)
    x, c = rng.normal(size=(1000, 65)).astype("f4"), rng.normal(size=(333, 65)).astype("f4")
    whole = nearest_centroid(x, c)
    pieces = [nearest_centroid(piece, c) for piece in np.split(x, [1, 2, 5, 300, 777])]
    for all_at_once, cut_up in zip(whole, zip(*pieces, strict=True), strict=True):
        np.testing.assert_array_equal(all_at_once, np.concatenate(cut_up))


@pytest.mark.parametrize("shift", [0, 1000])
def test_products_decide_wherever_they_can(shift, monkeypatch):
    """The slow comparison is for doubts only, also when all rows stand on one side of the origin."""
    doubts = []
    monkeypatch.setattr(loops, "settle", lambda x, *args: doubts.append(len(x)))
    c = np.random.default_rng(0).normal(size=(50, 64)).astype("f4") + np.float32(shift)
    labels = np.random.default_rng(1).integers(50, size=1000)
    x = (c[labels] + 0.1 * np.random.default_rng(2).normal(size=(1000, 64))).astype("f4")
    np.testing.assert_array_equal(nearest_centroid(x, c)[0], labels)
    assert sum(doubts) == 0


def test_one_centroid_takes_all():
    labels, sq_distance = nearest_centroid(np.full((3, 2), 2, "f4"), np.zeros((1, 2), "f4"))
    assert labels.tolist() == [0, 0, 0] and sq_distance.tolist() == [8, 8, 8]


def test_widths_that_differ_are_named():
    with pytest.raises(ValueError, match=r"rows \(2, 3\) to centroids \(2, 4\)"):
        nearest_centroid(np.zeros((2, 3), "f4"), np.zeros((2, 4), "f4"))


def steps(seed, n=900, width=12, k=70, spread=0.5):
    """Rows, and centroids as k-means moves them: all at first, then few, some of them twice."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(30, width))[rng.integers(30, size=n)] + spread * rng.normal(size=(n, width))).astype("f4")
    c = x[rng.choice(n, k)].copy()
    yield x, c
    for share in (1, 0.5, 0.2, 0.05, 0, 1):
        c = c.copy()
        who = rng.random(k) < share
        c[who] += (rng.exponential(0.3, (who.sum(), 1)) * rng.normal(size=(who.sum(), width))).astype("f4")
        if share == 0.2:
            c[3] = c[8]
        yield x, c


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("spread", [0.05, 0.5, 3])
@pytest.mark.parametrize("shift", [0, 100])
def test_what_is_known_changes_nothing(seed, spread, shift):
    """Labels and distances are those of a fresh comparison, and the bounds hold, step after step."""
    known, before = None, None
    for rows, centroids in steps(seed, spread=spread):
        x, c = rows + np.float32(shift), centroids + np.float32(shift)
        fresh = assign(x, Target(c))
        drift = None if before is None else moved_by(before, c)
        found = assign(x, Target(c, drift), known)
        np.testing.assert_array_equal(found.labels, fresh.labels)
        np.testing.assert_array_equal(found.sq_distance, fresh.sq_distance)
        distance = np.sqrt(((x[:, None].astype("f8") - c[None]) ** 2).sum(-1))
        distance[np.arange(len(x)), found.labels] = np.inf
        assert (found.lower <= distance.min(1)).all() and (fresh.lower <= distance.min(1)).all()
        known, before = found.bounds, c


def test_bounds_are_near_the_truth():
    """A fresh comparison knows the second centroid's distance; rows whose centroids rest meet none."""
    x, c = next(steps(0))
    c += np.float32(0.1) * np.random.default_rng(1).normal(size=c.shape).astype("f4")  # no two are equal
    found = assign(x, Target(c))
    distance = np.sqrt(((x[:, None].astype("f8") - c[None]) ** 2).sum(-1))
    distance[np.arange(len(x)), found.labels] = np.inf
    np.testing.assert_allclose(found.lower, distance.min(1), rtol=1e-3, atol=1e-3)
    target = Target(c, np.zeros(len(c)))
    assert (target.needed(found.sq_distance, found.lower) > 0).mean() < 0.01  # those between two
    again = assign(x, target, found.bounds)
    np.testing.assert_array_equal(again.labels, found.labels)


@pytest.mark.parametrize("k, n, width", [(1, 1, 1), (2, 33, 3), (5, 31, 16), (12, 64, 17), (13, 200, 385)])
def test_any_shape_fits_panels_and_tiles(k, n, width):
    rng = np.random.default_rng(k)
    x, c = rng.normal(size=(n, width)).astype("f4"), rng.normal(size=(k, width)).astype("f4")
    distance = ((x[:, None].astype("f8") - c[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(nearest_centroid(x, c)[0], distance.argmin(1))
    known = Bounds(np.zeros(n, "i4"), np.zeros(n, "f4"))  # true of anything
    found = assign(x, Target(c, np.ones(k)), known)
    assert isinstance(found, Assigned)
    np.testing.assert_array_equal(found.labels, distance.argmin(1))


def test_rest_is_told_from_motion():
    c = np.random.default_rng(0).normal(size=(5, 9)).astype("f4")
    moved = c.copy()
    moved[2, 4] = np.nextafter(moved[2, 4], np.float32(9))
    assert np.flatnonzero(moved_by(c, moved)).tolist() == [2]


def test_no_centroids_are_refused():
    with pytest.raises(ValueError, match=r"at least one centroid: got \(0, 3\)"):
        Target(np.zeros((0, 3), "f4"))
