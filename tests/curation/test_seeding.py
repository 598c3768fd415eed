import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from curation import seeding as module
from curation.seeding import draw_candidates, draw_shares, kmeans_plus_plus, seed_rows


def blobs(seed, n=4000, width=8, n_blobs=30, spread=0.3):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(n_blobs, width))[rng.integers(n_blobs, size=n)] + spread * rng.normal(size=(n, width))
    ).astype("f4")


@pytest.mark.parametrize("choose", [kmeans_plus_plus, seed_rows])
def test_seeds_are_distinct_rows_while_there_are_any(choose, monkeypatch):
    monkeypatch.setattr(module, "CELLS_FROM", 9)
    x = np.repeat(blobs(0, width=64)[:60], 20, axis=0) + np.float32(50)  # 20 copies of each, off centre
    for seed in range(20):
        chosen = choose(x, 60, np.random.default_rng(seed))
        assert chosen.dtype == np.int64 and len(np.unique(chosen // 20)) == 60


@pytest.mark.parametrize("choose", [kmeans_plus_plus, seed_rows])
def test_seeds_are_distinct_where_products_cannot_tell(choose, monkeypatch):
    """Two tight groups far apart: squared distances inside a group are below the rounding of a float32 product."""
    monkeypatch.setattr(module, "CELLS_FROM", 9)
    rng = np.random.default_rng(0)
    x = np.concatenate([1e-4 * rng.normal(size=(30, 64)) + side for side in (-1, 1)]).astype("f4")
    for seed in range(5):
        chosen = choose(np.repeat(x, 20, axis=0), 60, np.random.default_rng(seed))
        assert len(np.unique(chosen // 20)) == 60


def test_a_draw_at_the_edge_skips_rows_without_weight():
    class Lowest:
        def random(self, n):
            return np.zeros(n)

    assert draw_candidates(np.array([0, 0, 1, 0], "f4"), 2, Lowest()).tolist() == [2, 2]
    assert draw_candidates(np.zeros(4, "f4"), 2, Lowest()).tolist() == [3, 3]  # all rows coincide with chosen ones


def test_candidates_are_drawn_by_weight():
    weights = np.array([0, 1, 0, 3, 6, 0], "f4")
    counts = np.bincount(draw_candidates(weights, 20_000, np.random.default_rng(0)), minlength=6)
    np.testing.assert_allclose(counts / 20_000, weights / 10, atol=0.015)
    assert not counts[[0, 2, 5]].any()


def mixture(seed, n=4000, width=64):
    """Groups of very different sizes and spreads, as unit rows."""
    rng = np.random.default_rng(seed)
    weights = rng.pareto(1, 80) + 0.01
    of = rng.choice(80, n, p=weights / weights.sum())
    x = rng.normal(size=(80, width))[of] + rng.lognormal(-0.3, 0.5, 80)[of, None] * rng.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


@pytest.mark.parametrize(
    "x, allowed",
    [
        (mixture(0), 0),
        (blobs(0), 0),
        (blobs(0, width=2), 0),
        (blobs(0, width=64, spread=2), 0.01),  # one cloud
        (blobs(0, n_blobs=1000, spread=0.1), 0.02),  # tight groups, more than clusters, of which many lie at borders
    ],
)
def test_cells_cost_no_inertia(x, allowed):
    """After k-means from ten seedings each: as scikit-learn's greedy k-means++, within the noise; where most rows lie
    at borders of cells a little more."""
    k = 300

    def inertia(start, seed):
        return SklearnKMeans(k, init=start, n_init=1, max_iter=60, tol=0, random_state=seed).fit(x).inertia_

    ours = [inertia(x[seed_rows(x, k, np.random.default_rng(seed))], 0) for seed in range(10)]
    theirs = [inertia("k-means++", seed) for seed in range(10)]
    noise = (np.std(ours) + np.std(theirs)) / np.sqrt(10)
    assert np.mean(ours) <= np.mean(theirs) * (1 + allowed) + 2 * noise


def test_seeds_repeat_and_differ_with_the_generator():
    x = blobs(0)
    a, b, c = (seed_rows(x, 500, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c) and len(np.unique(a)) == 500


def test_fewer_distinct_rows_than_seeds():
    x = np.repeat(blobs(0)[:40], 50, axis=0)
    chosen = seed_rows(x, 300, np.random.default_rng(0))
    assert len(chosen) == 300 and len(np.unique(x[chosen], axis=0)) == 40


@pytest.mark.parametrize("seed", range(10))
def test_shares_follow_weights(seed):
    rng = np.random.default_rng(seed)
    weights = rng.pareto(1, 50) * (rng.random(50) < 0.7)
    shares = draw_shares(weights, 1000, rng)
    exact = weights / weights.sum() * 1000
    assert shares.sum() == 1000 and (abs(shares - exact) < 1 + 1e-9).all() and not shares[weights == 0].any()
    assert not draw_shares(np.zeros(3), 7, rng).any()


@pytest.mark.parametrize("cells_from", [3, 1000])
def test_weighted_seeds_are_those_of_repeated_rows(cells_from, monkeypatch):
    """Of a few rows, one beside the other: how often each is chosen, of 4000 times."""
    monkeypatch.setattr(module, "CELLS_FROM", cells_from)
    monkeypatch.setattr(module, "MIN_CELLS", 1)
    x, weights = np.array([[0], [1], [3], [7], [20]], "f4"), np.array([9, 1, 4, 0, 1])
    repeated = np.repeat(np.arange(5), weights)
    counts = np.zeros((2, 5))
    for seed in range(4000):
        rng = np.random.default_rng(seed)
        counts[0, seed_rows(x, 3, rng, weights)] += 1
        counts[1, repeated[seed_rows(x[repeated], 3, rng)]] += 1
    np.testing.assert_allclose(counts[0], counts[1], atol=4 * (2 * 4000 / 4) ** 0.5)
    assert counts[0, 3] == 0 and counts[0].sum() == 3 * 4000


@pytest.mark.parametrize("k", [50, 300])
def test_weighted_seeds_cost_no_inertia(k):
    """Of a k-means of weighted rows, beside that from seeds of the rows repeated."""
    x, rng = mixture(1), np.random.default_rng(0)
    weights = 1 + (rng.pareto(1, len(x)) * (rng.random(len(x)) < 0.3)).astype(int).clip(0, 50)
    repeated = np.repeat(x, weights, axis=0)

    def inertia(start):
        return SklearnKMeans(k, init=start, n_init=1, max_iter=60, tol=0).fit(x, sample_weight=weights).inertia_

    ours = [inertia(x[seed_rows(x, k, np.random.default_rng(seed), weights)]) for seed in range(8)]
    theirs = [inertia(repeated[seed_rows(repeated, k, np.random.default_rng(seed))]) for seed in range(8)]
    blind = [inertia(x[seed_rows(x, k, np.random.default_rng(seed))]) for seed in range(8)]
    assert np.mean(ours) <= np.mean(theirs) + 2 * (np.std(ours) + np.std(theirs)) / np.sqrt(8)
    assert np.mean(ours) < np.mean(blind)


def test_cells_share_by_weight():
    """A tight group of heavy rows beside a wide one of light rows."""
    rng = np.random.default_rng(0)
    x = np.concatenate([0.1 * rng.normal(size=(500, 4)), 100 + rng.normal(size=(500, 4))]).astype("f4")
    for weights, n_heavy in ((None, 0), (np.repeat([10_000, 1], 500), 20), (np.repeat([100, 1], 500), 10)):
        cells = module.Cells(x, np.array([0, 500]), weights)
        new = cells.order[cells.choose(20, 5, np.random.default_rng(0))]
        assert abs((new < 500).sum() - n_heavy) <= 2


def test_rows_that_are_not_copied_give_the_same_seeds(monkeypatch):
    x = np.random.default_rng(0).normal(size=(4000, 12)).astype("f4") + 3
    copied = seed_rows(x, 400, np.random.default_rng(1))
    monkeypatch.setattr(module, "COPIED_BYTES", 0)
    np.testing.assert_array_equal(seed_rows(x, 400, np.random.default_rng(1)), copied)
