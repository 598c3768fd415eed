import pickle

import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from curation import kmeans as module
from curation.execute import SerialExecutor
from curation.kmeans import (
    BLOCK_ROWS,
    ArrayRows,
    Draw,
    HeldTrail,
    Lloyd,
    Member,
    State,
    Step,
    SubsetRows,
    Sums,
    assign_part,
    fit,
    full_blocks,
    kmeans,
    lloyd_step,
    part_sums,
    refine,
    sample_counts,
    seeds_of_sample,
)
from curation.nearest import nearest_centroid


def blobs(seed, n=4000, width=8, n_blobs=30, spread=0.3):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(n_blobs, width))[rng.integers(n_blobs, size=n)] + spread * rng.normal(size=(n, width))
    ).astype("f4")


def cut(x, cuts):
    return [ArrayRows(piece) for piece in np.split(x, cuts)]


@pytest.mark.parametrize("shape", [{}, {"n_blobs": 400, "spread": 0.05}, {"width": 2}, {"width": 64, "spread": 2}])
def test_inertia_is_that_of_scikit_learn(shape):
    x, k = blobs(0, **shape), 50
    ours = [kmeans(x, k, np.random.default_rng(seed), n_iter=300, tol=0).sq_distance.sum() for seed in range(4)]
    theirs = [SklearnKMeans(k, n_init=1, max_iter=300, tol=0, random_state=seed).fit(x).inertia_ for seed in range(4)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)
    assert np.mean(theirs) <= 1.05 * np.mean(ours)  # nor far better: that would be another objective


def test_lloyd_from_the_same_start_matches_scikit_learn():
    x = blobs(5)
    start = x[:40].copy()
    theirs = SklearnKMeans(40, init=start, n_init=1, max_iter=7, tol=0, algorithm="lloyd").fit(x)
    state = refine([ArrayRows(x)], State(start), SerialExecutor(), Lloyd(n_iter=7, tol=0))
    assert state.n_done == 7
    np.testing.assert_allclose(state.centroids, theirs.cluster_centers_, atol=1e-4)


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
    inertia = [
        kmeans(x, 40, np.random.default_rng(0), n_iter=n, tol=0).sq_distance.sum(dtype="f8") for n in (0, 1, 2, 5, 50)
    ]
    assert (np.diff(inertia) <= 0).all() and inertia[-1] < 0.99 * inertia[0]


def test_it_stops_when_nothing_moves(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "lloyd_step", lambda *args: calls.append(1) or lloyd_step(*args))
    kmeans(blobs(3, n_blobs=4, spread=0.01), 4, np.random.default_rng(0), n_iter=1000, tol=0)
    assert len(calls) <= 5


def test_an_empty_cluster_stays_where_it_was():
    x, far = blobs(4)[:, :2], np.array([[100, 100]], "f4")
    start = State(np.concatenate([x[:3], far]))
    moved = lloyd_step([Member(ArrayRows(x))], start, SerialExecutor(), Lloyd()).centroids
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
    centroids = fit(parts, 25, (int(np.random.default_rng(3).integers(2**32)),), SerialExecutor()).centroids
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
    fits = [fit(parts, 30, (s,), SerialExecutor()).centroids for s in range(4)]
    sampled = np.mean([nearest_centroid(x, c)[1].sum() for c in fits])
    assert sampled <= 1.05 * whole


def test_sums_are_those_of_the_labels():
    x, c = blobs(8), blobs(9)[:40]
    total = Sums.merge(*(part_sums(Member(part), Step(c)) for part in cut(x, [1500])))
    labels = nearest_centroid(x, c)[0]
    np.testing.assert_allclose(total.objective, nearest_centroid(x, c)[1].sum(dtype="f8"))
    np.testing.assert_array_equal(total.sizes, np.bincount(labels, minlength=40))
    expected = np.zeros((40, 8))
    np.add.at(expected, labels, x.astype("f8"))
    np.testing.assert_allclose(total.sums, expected, rtol=1e-12, atol=1e-12)


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
        fit(cut(blobs(0), [1000, 2000, 3000]), 5, seed_key, Recording())
    states = {tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys}
    assert len(keys) == len(states) == 2 * (4 + 1)


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [{}, {"n_blobs": 400, "spread": 0.05}, {"width": 64, "spread": 2}])
def test_the_tolerance_costs_less_than_a_thousandth(shape, seed):
    x = blobs(seed, **shape)
    stopped, to_the_end = (kmeans(x, 60, np.random.default_rng(seed), 300, tol) for tol in (module.TOLERANCE, 0))
    assert stopped.sq_distance.sum(dtype="f8") <= 1.001 * to_the_end.sq_distance.sum(dtype="f8")


def test_a_tolerance_ends_it_sooner():
    start, x = State(blobs(0)[:60].copy()), blobs(0)
    steps = [
        refine([ArrayRows(x)], start, SerialExecutor(), Lloyd(n_iter=300, tol=tol)).n_done for tol in (0, 1e-3, 0.99)
    ]
    assert steps[0] > steps[1] > steps[2] == 2


def test_what_is_remembered_changes_no_bit():
    """With bounds, without them, and for any blocks a step gives the same centroids and the same objective."""
    x = blobs(3, n=9000, width=20)
    parts, start = cut(x, [100, 5000]), State(x[:200].copy())
    how = Lloyd(n_iter=20, tol=0, empty="split")
    fresh = refine(parts, start, SerialExecutor(), how)
    held = refine(parts, start, SerialExecutor(), how, HeldTrail())
    for a, b in zip(fresh, held, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_cluster_takes_half_of_the_largest():
    c = np.array([[0, 0], [8, 4], [9, 9], [1, 1], [5, 5]], "f4")
    sizes = np.array([0, 10, 0, 5, 0])
    module.split_largest(c, sizes)
    up, down = 1 + module.SPLIT, 1 - module.SPLIT
    np.testing.assert_allclose(c[[0, 2]], [[8 * down * up, 4 * up * down], [8 * down * down, 4 * up * up]], rtol=1e-6)
    np.testing.assert_allclose(c[[1, 4]], [[8 * up * up, 4 * down * down], [8 * up * down, 4 * down * up]], rtol=1e-6)
    np.testing.assert_array_equal(c[3], [1, 1])  # of three with five rows the first two were split


def test_splitting_leaves_no_cluster_empty():
    x = blobs(1)
    start = State(np.concatenate([x[:30], x[:30], np.full((5, 8), 99, "f4")]))
    for empty, full in (("keep", False), ("split", True)):
        state = refine([ArrayRows(x)], start, SerialExecutor(), Lloyd(n_iter=30, tol=0, empty=empty))
        assert (len(np.unique(assign_part(ArrayRows(x), state.centroids)[0])) == 65) == full


def test_equal_rows_are_split_to_no_end():
    fitted = kmeans(np.ones((50, 3), "f4"), 5, np.random.default_rng(0), empty="split")
    assert (fitted.sq_distance < 1e-9).all() and np.isfinite(fitted.centroids).all()


@pytest.mark.parametrize(
    "setting, words",
    [({"tol": -1}, r"tol must be in \[0, 1\): got -1"), ({"empty": "drop"}, "one of keep, split: got 'drop'")],
)
def test_settings_that_cannot_be_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        Lloyd(**setting)
