import pickle

import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from curation import kmeans as module
from curation import loops
from curation.execute import SerialExecutor
from curation.kmeans import (
    BLOCK_ROWS,
    ArrayRows,
    Draw,
    SubsetRows,
    Sums,
    assign_part,
    draw_candidates,
    fit_centroids,
    full_blocks,
    kmeans,
    kmeans_plus_plus,
    lloyd_step,
    nearest_centroid,
    part_sums,
    sample_counts,
    seeds_of_sample,
)


def blobs(seed, n=4000, width=8, n_blobs=30, spread=0.3):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(n_blobs, width))[rng.integers(n_blobs, size=n)] + spread * rng.normal(size=(n, width))
    ).astype("f4")


def cut(x, cuts):
    return [ArrayRows(piece) for piece in np.split(x, cuts)]


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


@pytest.mark.parametrize("shape", [{}, {"n_blobs": 400, "spread": 0.05}, {"width": 2}, {"width": 64, "spread": 2}])
def test_inertia_is_that_of_scikit_learn(shape):
    x, k = blobs(0, **shape), 50
    ours = [kmeans(x, k, np.random.default_rng(seed), n_iter=300).sq_distance.sum() for seed in range(4)]
    theirs = [SklearnKMeans(k, n_init=1, max_iter=300, tol=0, random_state=seed).fit(x).inertia_ for seed in range(4)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)
    assert np.mean(theirs) <= 1.05 * np.mean(ours)  # nor far better: that would be another objective


def test_lloyd_from_the_same_start_matches_scikit_learn():
    x = blobs(5)
    start = x[:40].copy()
    theirs = SklearnKMeans(40, init=start, n_init=1, max_iter=7, tol=0, algorithm="lloyd").fit(x)
    centroids = start
    for _ in range(7):
        centroids = lloyd_step([ArrayRows(x)], centroids, SerialExecutor())
    np.testing.assert_allclose(centroids, theirs.cluster_centers_, atol=1e-4)


def test_labels_and_distances_belong_to_the_centroids():
    x = blobs(1)
    fitted = kmeans(x, 20, np.random.default_rng(0))
    assert fitted.centroids.dtype == np.float32
    labels, sq_distance = nearest_centroid(x, fitted.centroids)
    np.testing.assert_array_equal(fitted.labels, labels)
    np.testing.assert_array_equal(fitted.sq_distance, sq_distance)
    for c in range(20):
        np.testing.assert_allclose(fitted.centroids[c], x[labels == c].mean(0), atol=1e-5)


def test_the_objective_never_rises():
    x = blobs(2)
    inertia = [kmeans(x, 40, np.random.default_rng(0), n_iter=n).sq_distance.sum(dtype="f8") for n in (0, 1, 2, 5, 50)]
    assert (np.diff(inertia) <= 0).all() and inertia[-1] < 0.99 * inertia[0]


def test_it_stops_when_nothing_moves(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "lloyd_step", lambda *args: calls.append(1) or lloyd_step(*args))
    kmeans(blobs(3, n_blobs=4, spread=0.01), 4, np.random.default_rng(0), n_iter=1000)
    assert len(calls) <= 5


def test_an_empty_cluster_stays_where_it_was():
    x, far = blobs(4)[:, :2], np.array([[100, 100]], "f4")
    moved = lloyd_step([ArrayRows(x)], np.concatenate([x[:3], far]), SerialExecutor())
    np.testing.assert_array_equal(moved[3], far[0])
    np.testing.assert_allclose(moved[:3].mean(), x.mean(), atol=1)


def test_more_clusters_than_rows():
    x = blobs(0)[:5]
    fitted = kmeans(x, 9, np.random.default_rng(0))
    assert sorted(fitted.labels.tolist()) == [0, 1, 2, 3, 4] and not fitted.sq_distance.any()


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(blobs(0)[:3], 50, axis=0)
    fitted = kmeans(x, 10, np.random.default_rng(0))
    assert fitted.centroids.shape == (10, 8) and not fitted.sq_distance.any()


def test_seeds_repeat_and_differ():
    x = blobs(0)
    first, same, other = (kmeans(x, 30, np.random.default_rng(s)).centroids for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_other_floats_are_used_in_float32(dtype):
    x = blobs(0).astype(dtype)
    for a, b in zip(
        kmeans(x, 9, np.random.default_rng(0)), kmeans(x.astype("f4"), 9, np.random.default_rng(0)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n_parts", [2, 7, 40])
def test_parts_give_what_one_array_gives(n_parts):
    """All rows are in the seeding sample, so only the rounding of the sums differs."""
    x = blobs(6, n=9000)
    whole = kmeans(x, 25, np.random.default_rng(3))
    cuts = np.sort(np.random.default_rng(n_parts).integers(0, 9000, n_parts - 1))
    parts = [*cut(x, cuts), ArrayRows(x[:0])]  # an empty part is ordinary
    centroids = fit_centroids(parts, 25, (int(np.random.default_rng(3).integers(2**32)),), SerialExecutor())
    np.testing.assert_allclose(centroids, whole.centroids, atol=1e-5)
    labels, sq_distance = map(np.concatenate, zip(*(assign_part(p, centroids) for p in parts), strict=True))
    assert (labels != whole.labels).mean() < 1e-3
    np.testing.assert_allclose(sq_distance.sum(), whole.sq_distance.sum(), rtol=1e-5)


@pytest.mark.parametrize("n_parts", [1, 5])
def test_a_bounded_seeding_sample_costs_no_quality(n_parts, monkeypatch):
    x = blobs(7, n=9000)
    whole = np.mean([kmeans(x, 30, np.random.default_rng(s)).sq_distance.sum() for s in range(4)])
    monkeypatch.setattr(module, "MIN_SEED_ROWS", 500)
    parts = cut(x, np.arange(1, n_parts) * 9000 // n_parts)
    fits = [fit_centroids(parts, 30, (s,), SerialExecutor()) for s in range(4)]
    sampled = np.mean([nearest_centroid(x, c)[1].sum() for c in fits])
    assert sampled <= 1.05 * whole


def test_sums_are_those_of_the_labels():
    x, c = blobs(8), blobs(9)[:40]
    total = Sums.merge(*(part_sums(part, c) for part in cut(x, [1500])))
    labels = nearest_centroid(x, c)[0]
    np.testing.assert_array_equal(total.sizes, np.bincount(labels, minlength=40))
    expected = np.zeros((40, 8))
    np.add.at(expected, labels, x.astype("f8"))
    np.testing.assert_allclose(total.sums, expected, rtol=1e-12, atol=1e-12)


def test_seeds_are_distinct_rows_while_there_are_any():
    x = np.repeat(blobs(0, width=64)[:60], 20, axis=0) + np.float32(50)  # 20 copies of each, off centre
    for seed in range(20):
        chosen = kmeans_plus_plus(x, 60, np.random.default_rng(seed))
        assert chosen.dtype == np.int64 and len(np.unique(chosen // 20)) == 60


def test_seeds_are_distinct_where_products_cannot_tell():
    """Two tight groups far apart: squared distances inside a group are below the rounding of a float32 product."""
    rng = np.random.default_rng(0)
    x = np.concatenate([1e-4 * rng.normal(size=(30, 64)) + side for side in (-1, 1)]).astype("f4")
    for seed in range(5):
        chosen = kmeans_plus_plus(np.repeat(x, 20, axis=0), 60, np.random.default_rng(seed))
        assert len(np.unique(chosen // 20)) == 60


def test_a_draw_at_the_edge_skips_rows_without_weight():
    class Lowest:
        def random(self, n):
            return np.zeros(n)

    assert draw_candidates(np.array([0, 0, 1, 0], "f4"), 2, Lowest()).tolist() == [2, 2]
    assert draw_candidates(np.zeros(4, "f4"), 2, Lowest()).tolist() == [3, 3]  # all rows coincide with chosen ones


def test_every_part_draws_from_its_own_key():
    keys = []

    class Recording(SerialExecutor):
        def reduce(self, fn, items, *args, **kwargs):
            keys.extend(item.key for item in items if isinstance(item, Draw))
            return super().reduce(fn, items, *args, **kwargs)

        def map(self, fn, items, *args, **kwargs):
            keys.extend(item for item in items if isinstance(item, tuple) and fn is seeds_of_sample)
            return super().map(fn, items, *args, **kwargs)

    for seed_key in ((5, 0), (5, 1)):
        fit_centroids(cut(blobs(0), [1000, 2000, 3000]), 5, seed_key, Recording())
    states = {tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys}
    assert len(keys) == len(states) == 2 * (4 + 1)


def test_candidates_are_drawn_by_weight():
    weights = np.array([0, 1, 0, 3, 6, 0], "f4")
    counts = np.bincount(draw_candidates(weights, 20_000, np.random.default_rng(0)), minlength=6)
    np.testing.assert_allclose(counts / 20_000, weights / 10, atol=0.015)
    assert not counts[[0, 2, 5]].any()


def test_every_row_has_the_same_chance_to_be_in_the_sample():
    sizes, total = [3, 0, 1, 50, 7, 1], np.zeros(6)
    for seed in range(4000):
        counts = sample_counts(sizes, 20, np.random.default_rng(seed))
        assert sum(counts) == 20 and all(0 <= c <= size for c, size in zip(counts, sizes, strict=True))
        total += counts
    np.testing.assert_allclose(total / 4000, 20 * np.array(sizes) / 62, atol=0.04)
    assert sample_counts(sizes, 62, np.random.default_rng(0)) == sizes
    assert sum(sample_counts([10**10] * 3, 10**7, np.random.default_rng(0))) == 10**7


@pytest.mark.parametrize("n_rows", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
def test_blocks_are_cut_at_fixed_offsets(n_rows):
    x = np.arange(2 * n_rows, dtype="f8").reshape(n_rows, 2)
    for part, rows in [
        (ArrayRows(x), np.arange(n_rows)),
        (SubsetRows(ArrayRows(x), np.arange(1, n_rows, 3)), np.arange(1, n_rows, 3)),
        (SubsetRows(ArrayRows(x), np.arange(0)), np.arange(0)),
    ]:
        blocks = list(pickle.loads(pickle.dumps(part)).blocks())
        assert part.n_rows == len(rows) == sum(map(len, blocks))
        assert all(len(b) == BLOCK_ROWS for b in blocks[:-1]) and all(b.dtype == np.float32 and len(b) for b in blocks)
        np.testing.assert_array_equal(np.concatenate([np.empty((0, 2)), *blocks]), x[rows])


def test_ragged_pieces_become_full_blocks():
    pieces = [np.ones((n, 1), "f4") for n in (0, 4000, 0, 4096, 1, 95)]
    assert [len(b) for b in full_blocks(pieces)] == [4096, 4096]


@pytest.mark.parametrize(
    "x, k, words",
    [
        (np.zeros((0, 3), "f4"), 2, "at least one cluster and one row: got 2 clusters of 0 rows"),
        (np.zeros((4, 3), "f4"), 0, "got 0 clusters of 4 rows"),
        (np.zeros(4, "f4"), 2, r"rows must be a float array \(n, d\): got float32 \(4,\)"),
        (np.zeros((4, 3), int), 2, "got int64"),
        (np.array([[0.0], [np.nan], [np.inf]]), 2, "rows must be finite: 2 of 3 are not, the first is row 1"),
    ],
)
def test_what_cannot_be_clustered_is_named(x, k, words):
    with pytest.raises(ValueError, match=words):
        kmeans(x, k, np.random.default_rng(0))
