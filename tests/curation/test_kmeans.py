import numpy as np
import pytest
from blobs import blobs, cut, with_weights
from sklearn.cluster import KMeans as SklearnKMeans

from curation import kmeans as module
from curation.execute import SerialExecutor
from curation.kmeans import HeldTrail, Lloyd, State, fit, kmeans, lloyd_step, refine, sums_of_parts, unit_rows
from curation.labelling import Member, Step, assign_part
from curation.nearest import nearest_centroid
from curation.rows import ArrayRows
from curation.sums import Sums


@pytest.mark.parametrize("shape", [{}, {"n_blobs": 400, "spread": 0.05}, {"width": 2}, {"width": 64, "spread": 2}])
def test_inertia_is_that_of_scikit_learn(shape):
    x, k = blobs(0, **shape), 50
    ours = [kmeans(x, k, np.random.default_rng(seed), n_iter=300, tol=0).sq_distance.sum() for seed in range(4)]
    theirs = [SklearnKMeans(k, n_init=1, max_iter=300, tol=0, random_state=seed).fit(x).inertia_ for seed in range(4)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)
    assert np.mean(theirs) <= 1.05 * np.mean(ours)  # nor far better: that would be another objective


def noise(rng):
    return rng.normal(size=(3000, 32))


def groups(rng):
    """Far apart."""
    return 4 * rng.normal(size=(20, 32))[rng.integers(20, size=3000)] + 0.5 * rng.normal(size=(3000, 32))


def heavy_tail(rng):
    """Groups of very different sizes and spreads."""
    share = rng.pareto(1, 200) + 0.01
    of = rng.choice(200, 3000, p=share / share.sum())
    return rng.normal(size=(200, 32))[of] + rng.lognormal(0, 0.5, 200)[of, None] * rng.normal(size=(3000, 32))


@pytest.mark.parametrize("make", [noise, groups, heavy_tail])
def test_ten_seeds_end_as_well_as_those_of_scikit_learn(make):
    """With the defaults of both: ours stops at a tolerance sooner."""
    x = make(np.random.default_rng(0)).astype("f4")
    ours = [kmeans(x, 60, np.random.default_rng(seed)).sq_distance.sum(dtype="f8") for seed in range(10)]
    theirs = [SklearnKMeans(60, init="k-means++", n_init=1, random_state=seed).fit(x).inertia_ for seed in range(10)]
    assert np.mean(ours) <= 1.005 * np.mean(theirs)


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


def test_sums_are_those_of_the_labels():
    x, c = blobs(8), blobs(9)[:40]
    total = Sums.merge(*(sums_of_parts([Member(part)], Step(c)) for part in cut(x, [1500])))
    labels = nearest_centroid(x, c)[0]
    np.testing.assert_allclose(total.objective, nearest_centroid(x, c)[1].sum(dtype="f8"))
    np.testing.assert_array_equal(total.sizes, np.bincount(labels, minlength=40))
    expected = np.zeros((40, 8))
    np.add.at(expected, labels, x.astype("f8"))
    np.testing.assert_allclose(total.sums, expected, rtol=1e-12, atol=1e-12)


def test_a_step_hands_on_a_bounded_number_of_sums(monkeypatch):
    parts = cut(blobs(0), np.arange(1, 20) * 150)
    whole = fit(parts, 30, (0,), SerialExecutor())
    monkeypatch.setattr(module, "MOST_SUMS", 6)
    runs = module.in_runs([Member(part) for part in parts])
    assert len(runs) <= 6 and [member.part for run in runs for member in run] == parts
    few = fit(parts, 30, (0,), SerialExecutor())
    np.testing.assert_allclose(few.centroids, whole.centroids, rtol=1e-5, atol=1e-5)
    assert few.n_done == whole.n_done


@pytest.mark.parametrize(
    "x, k, words",
    [
        (np.zeros((0, 3), "f4"), 2, "at least one cluster and one row: got 2 clusters of 0 rows"),
        (np.ones((4, 3), "f4"), 0, "got 0 clusters of 4 rows"),
        (np.zeros(4, "f4"), 2, r"rows must be a float array \(n, d\): got float32 \(4,\)"),
        (np.zeros((4, 3), int), 2, "got int64"),
        (np.array([[0.0], [np.nan], [np.inf]]), 2, "rows must be finite: 2 of 3 are not, the first is row 1"),
        (np.array([[2.0], [0], [1], [0]]), 2, "rows must not be zeros for the cosine: 2 of 4 are, the first is row 1"),
    ],
)
def test_what_cannot_be_clustered_is_named(x, k, words):
    with pytest.raises(ValueError, match=words):
        kmeans(x, k, np.random.default_rng(0), metric="cosine")


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
    [
        ({"tol": -1}, r"tol must be in \[0, 1\): got -1"),
        ({"empty": "drop"}, "one of keep, split, farthest: got 'drop'"),
        ({"metric": "l1"}, "metric must be one of euclidean, cosine: got 'l1'"),
    ],
)
def test_settings_that_cannot_be_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        Lloyd(**setting)


def spherical_lloyd(x, centroids, n_iter):
    """Plain, in float64."""
    for _ in range(n_iter):
        labels = (x @ centroids.T).argmax(axis=1)
        for c in range(len(centroids)):
            total = x[labels == c].sum(axis=0)
            if np.linalg.norm(total) > 1e-9:
                centroids[c] = total / np.linalg.norm(total)
    return centroids, (x @ centroids.T).argmax(axis=1)


def unit_blobs(seed, **shape):
    return unit_rows(blobs(seed, **shape))


@pytest.mark.parametrize("seed", range(4))
def test_spherical_kmeans_matches_plain_numpy(seed):
    x = unit_blobs(seed, n=1500, spread=1)
    start = np.concatenate([x[:38], -x[:2]])
    expected, labels = spherical_lloyd(x.astype("f8"), start.astype("f8"), 9)
    parts = cut(x, [400, 401])
    state = refine(parts, State(start), SerialExecutor(), Lloyd(n_iter=9, tol=0, metric="cosine"), HeldTrail())
    np.testing.assert_allclose(state.centroids, expected, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([assign_part(p, state.centroids)[0] for p in parts]), labels)


@pytest.mark.parametrize("empty", ["keep", "split"])
@pytest.mark.parametrize("seed", range(3))
def test_the_spherical_objective_never_rises(seed, empty):
    x = unit_blobs(seed, spread=1)
    how, members = Lloyd(tol=0, metric="cosine", empty=empty), [Member(ArrayRows(x), HeldTrail().memory(0))]
    state, objectives = State(x[:60].copy()), []
    while not state.done:
        state = lloyd_step(members, state, SerialExecutor(), how)
        objectives.append(state.objective)
        np.testing.assert_allclose(np.linalg.norm(state.centroids.astype("f8"), axis=1), 1, atol=1e-6)
    assert len(objectives) > 10 and (np.diff(objectives) <= 1e-7 * objectives[0]).all()
    assert objectives[-1] < 0.95 * objectives[0]
    cosine = 1 - state.objective / len(x) / 2  # the mean over rows
    np.testing.assert_allclose(cosine, (x.astype("f8") @ state.before.astype("f8").T).max(axis=1).mean(), rtol=1e-6)


def test_a_mean_of_zero_leaves_a_direction_as_it_was():
    start = np.array([[1, 0]], "f4")
    x = np.array([[1, 0], [1e-20, 1], [-1, 0], [-1e-20, -1]], "f4")  # the sum rounds to -1e-20, 0
    for rows in (x, x[[0, 2]], x[[1, 3]]):
        state = lloyd_step([Member(ArrayRows(rows))], State(start), SerialExecutor(), Lloyd(metric="cosine"))
        np.testing.assert_array_equal(state.centroids, start)


def test_halves_of_a_direction_are_unit_and_leave_none_empty():
    x = unit_blobs(1)
    start = State(np.concatenate([x[:30], x[:30], -x[:1]]))
    how = Lloyd(n_iter=30, tol=0, empty="split", metric="cosine")
    first = lloyd_step([Member(ArrayRows(x))], start, SerialExecutor(), how).centroids
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    state = refine([ArrayRows(x)], start, SerialExecutor(), how)
    assert len(np.unique(assign_part(ArrayRows(x), state.centroids)[0])) == 61


def test_spherical_kmeans_sees_no_lengths():
    x = blobs(4)
    scaled = x * np.random.default_rng(0).lognormal(0, 2, (len(x), 1)).astype("f4")
    ours, same = (kmeans(rows, 20, np.random.default_rng(0), metric="cosine") for rows in (x, scaled))
    np.testing.assert_allclose(ours.centroids, same.centroids, atol=1e-5)
    np.testing.assert_allclose(ours.sq_distance, 2 - 2 * (unit_rows(x) @ ours.centroids.T).max(axis=1), atol=1e-5)
    tiny = unit_rows(np.array([[1e-40, 0], [3e30, 4e30]], "f4"))
    np.testing.assert_allclose(tiny, [[1, 0], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("empty", ["keep", "split"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_weights_are_repeated_rows(metric, empty):
    rng = np.random.default_rng(0)
    x = unit_blobs(0, n=1200, spread=1)
    weights = rng.integers(0, 6, len(x)) * rng.integers(0, 3, len(x))
    repeated, start = np.repeat(x, weights, axis=0), State(np.concatenate([x[:40], x[:3]]))
    how = Lloyd(n_iter=12, tol=0, metric=metric, empty=empty)
    expected = refine([ArrayRows(repeated)], start, SerialExecutor(), how)
    parts = with_weights(cut(x, [0, 300, 1000]), weights)
    found = refine(parts, start, SerialExecutor(), how, HeldTrail())
    np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-6)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-9)
    assert found.n_done == expected.n_done
    labels = np.concatenate([assign_part(part, found.centroids)[0] for part in parts])
    again = assign_part(ArrayRows(repeated), expected.centroids)[0]
    np.testing.assert_array_equal(np.repeat(labels, weights), again)
    assert len(labels) == len(x)  # those without weight too


def test_the_tolerance_sees_weights():
    """A few heavy rows decide when it ends."""
    x = blobs(0)
    weights = np.where(np.arange(len(x)) < 100, 10_000, 1)
    start, how = State(x[:60].copy()), Lloyd(n_iter=300, tol=1e-3)
    heavy, repeated = (
        refine(parts, start, SerialExecutor(), how)
        for parts in (with_weights([ArrayRows(x)], weights), [ArrayRows(np.repeat(x, weights, axis=0))])
    )
    assert heavy.n_done == repeated.n_done
    np.testing.assert_allclose(heavy.centroids, repeated.centroids, atol=1e-5)


def test_rows_without_weight_move_nothing():
    x = np.array([[0], [1], [9], [5]], "f4")
    state = State(np.array([[0], [9]], "f4"))
    parts = with_weights([ArrayRows(x)], np.array([1, 3, 0, 0]))
    moved = lloyd_step([Member(part) for part in parts], state, SerialExecutor(), Lloyd())
    np.testing.assert_array_equal(moved.centroids, [[0.75], [9]])
    assert moved.objective == 3 and assign_part(parts[0], moved.centroids)[0].tolist() == [0, 0, 1, 1]


def test_empty_clusters_take_the_farthest_rows_as_in_scikit_learn():
    x = blobs(3)[:2000]
    start = np.concatenate([x[:30], np.full((10, x.shape[1]), 50, "f4") + np.arange(10, dtype="f4")[:, None]])
    for n_iter in (1, 2, 5):
        ours = refine([ArrayRows(x)], State(start), SerialExecutor(), Lloyd(n_iter=n_iter, tol=0, empty="farthest"))
        theirs = SklearnKMeans(40, init=start, n_init=1, max_iter=n_iter, tol=0, algorithm="lloyd").fit(x)
        if n_iter == 1:  # later ones may take other rows of equal use
            found, wanted = (c[np.lexsort(c.T)] for c in (ours.centroids, theirs.cluster_centers_.astype("f4")))
            np.testing.assert_allclose(found, wanted, atol=1e-4)
        inertia = nearest_centroid(x, ours.centroids)[1].sum(dtype="f8")
        assert inertia == pytest.approx(theirs.inertia_, rel=0.02)
        assert len(np.unique(nearest_centroid(x, ours.centroids)[0])) == 40


def test_the_objective_falls_when_empty_clusters_take_rows():
    x = blobs(5)
    start, objectives = State(np.repeat(x[:8], 10, axis=0)), []
    state = start
    for _ in range(6):
        state = lloyd_step([Member(ArrayRows(x))], state, SerialExecutor(), Lloyd(tol=0, empty="farthest"))
        objectives.append(state.objective)
    assert objectives == sorted(objectives, reverse=True)
    kept = refine([ArrayRows(x)], start, SerialExecutor(), Lloyd(n_iter=2, tol=0))
    assert objectives[1] < 0.8 * kept.objective
