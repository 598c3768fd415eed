import pickle
from dataclasses import dataclass

import numpy as np
import pytest

from curation import labelling as module
from curation.execute import Device, Here, SerialExecutor, fold_tree
from curation.hierarchy import (
    Chosen,
    ClusterConfig,
    HeldLevel,
    Hierarchy,
    Level,
    chosen_counts,
    closest_members,
    fit_level,
    group_rows,
    hierarchical_kmeans,
    resample,
    rows_below,
)
from curation.kmeans import Lloyd, fit, kmeans, unit_rows
from curation.labelling import Member, Step
from curation.nearest import nearest_centroid
from curation.rows import ArrayRows, SubsetRows, weighted, weights_of


def two_squares(rng, dense, sparse):
    """Uniform points on two unit squares, 5 apart."""
    corners = np.repeat([[0, 0], [5, 0]], [dense, sparse], axis=0)
    return (rng.random((dense + sparse, 2)) + corners).astype("f4")


def ratio(centroids):
    """Centroids on the dense square for each on the sparse one."""
    return (centroids[:, 0] < 3).sum() / (centroids[:, 0] > 3).sum()


def test_settings_may_be_positional_and_numpy():
    x = np.random.default_rng(1).normal(size=(200, 3))
    rng = np.random.default_rng
    expected = hierarchical_kmeans(x, [20, 4], rng(0), n_resamples=2, resample_size=[5, 3], n_iter=3)
    given = [
        ([20, 4], 2, [5, 3]), ((20, 4), np.int64(2), (5, 3)), (np.array([20, 4]), np.int32(2), np.array([5, 3], "i2")),
        (np.array([20, 4], "u1"), np.array([2, 2]), [np.int64(5), 3]),
    ]  # fmt: skip
    for n_clusters, n_resamples, resample_size in given:
        found = hierarchical_kmeans(x, n_clusters, rng(0), n_resamples, resample_size, 3)
        for level, same in zip(found.levels, expected.levels, strict=True):
            np.testing.assert_array_equal(level.centroids, same.centroids)
    one, same = (hierarchical_kmeans(x, [20], rng(0), 1, size, 3).levels[0] for size in (np.int64(4), 4))
    np.testing.assert_array_equal(one.centroids, same.centroids)
    with pytest.raises(TypeError, match="integer"):
        hierarchical_kmeans(x, [20.5], rng(0))


# Zador (1982): the best centroids of a density p have density p ** (d / (d + 2)).
def test_kmeans_flattens_density_by_zadors_exponent():
    rng = np.random.default_rng(0)
    x = two_squares(rng, 16_000, 1000)
    assert ratio(kmeans(x, 250, rng, n_iter=30).centroids) == pytest.approx(16**0.5, rel=0.15)
    line = np.concatenate([rng.random(13_500), rng.random(500) + 5]).astype("f4")[:, None]
    assert ratio(kmeans(line, 100, rng, n_iter=30).centroids) == pytest.approx(27 ** (1 / 3), rel=0.15)


def test_a_second_level_flattens_again():
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(2):
        levels = hierarchical_kmeans(two_squares(rng, 16_000, 1000), [500, 75], rng, n_resamples=0, n_iter=30).levels
        assert ratio(levels[0].centroids) == pytest.approx(4, rel=0.15)
        ratios.append(ratio(levels[1].centroids))
    assert np.mean(ratios) == pytest.approx(2, rel=0.2)


def test_resampling_makes_centroids_uniform():
    rng = np.random.default_rng(2)
    x = two_squares(rng, 16_000, 1000)
    levels = hierarchical_kmeans(x, [500, 75], rng, resample_size=[8, 3], n_iter=15).levels
    assert ratio(levels[0].centroids) < 2.2  # from 4
    assert 0.7 < ratio(levels[1].centroids) < 1.35


def test_every_level_is_a_kmeans_of_the_centroids_below():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2000, 6)).astype("f4")
    hierarchy = hierarchical_kmeans(x, [100, 20, 5], rng, n_resamples=[2, 1, 0], resample_size=[5, 3, 0], n_iter=8)
    points = x
    for level, k in zip(hierarchy.levels, (100, 20, 5), strict=True):
        assert level.centroids.shape == (k, 6) and level.centroids.dtype == np.float32
        labels, sq_distance = nearest_centroid(points, level.centroids)
        np.testing.assert_array_equal(level.labels, labels)
        np.testing.assert_array_equal(level.sq_distance, sq_distance)
        points = level.centroids
    assert hierarchy.n_clusters == (100, 20, 5)


def test_without_resampling_a_level_is_one_kmeans():
    x = np.random.default_rng(4).normal(size=(500, 3)).astype("f4")
    seed = int(np.random.default_rng(0).integers(2**32))
    plain = fit([ArrayRows(x)], 20, (seed, 0, 0), SerialExecutor()).centroids
    for kwargs in ({"n_resamples": 0}, {"resample_size": 1}, {"resample_size": [0]}):
        hierarchy = hierarchical_kmeans(x, [20], np.random.default_rng(0), **kwargs)
        np.testing.assert_array_equal(hierarchy.levels[0].centroids, plain)


def test_half_the_average_cluster_is_the_default_size():
    x = np.random.default_rng(5).normal(size=(630, 3)).astype("f4")
    half = hierarchical_kmeans(x, [30, 5], np.random.default_rng(0), n_resamples=2)
    same = hierarchical_kmeans(x, [30, 5], np.random.default_rng(0), n_resamples=2, resample_size=[10, 3])
    other = hierarchical_kmeans(x, [30, 5], np.random.default_rng(0), n_resamples=2, resample_size=[9, 3])
    np.testing.assert_array_equal(half.levels[1].centroids, same.levels[1].centroids)
    assert not np.array_equal(half.levels[0].centroids, other.levels[0].centroids)


def test_a_resampling_is_a_fresh_kmeans_on_the_closest_rows():
    x = np.random.default_rng(6).normal(size=(800, 4)).astype("f4")
    first = fit_level([ArrayRows(x)], 30, 0, None, seed_key=(7,), executor=SerialExecutor())
    second = fit_level([ArrayRows(x)], 30, 1, 6, seed_key=(7,), executor=SerialExecutor())
    rows = brute_closest(*nearest_centroid(x, first), 30, 6)
    expected = fit([SubsetRows(ArrayRows(x), rows)], 30, (7, 1), SerialExecutor()).centroids
    np.testing.assert_array_equal(second, expected)


def random_rows(parts, centroids, size, key):
    """Which rows are drawn, over all parts."""
    chosen = resample([Member(part) for part in parts], Step(centroids), size, SerialExecutor(), key)
    starts = np.cumsum([0, *(part.n_rows for part in parts)])
    return np.concatenate([c.chosen.get()[c.index] + start for c, start in zip(chosen, starts, strict=False)])


def test_a_random_resampling_is_a_fresh_kmeans_on_any_rows_of_each_cluster():
    x = np.random.default_rng(6).normal(size=(800, 4)).astype("f4")
    first = fit_level([ArrayRows(x)], 30, 0, None, seed_key=(7,), executor=SerialExecutor())
    labels = nearest_centroid(x, first)[0]
    rows = random_rows([ArrayRows(x)], first, 6, (7, 1))
    np.testing.assert_array_equal(np.bincount(labels[rows], minlength=30), np.bincount(labels).clip(max=6))
    assert len(np.unique(rows)) == len(rows) and (np.diff(rows) > 0).all()
    for run in (1, 2):
        runs = fit_level([ArrayRows(x)], 30, run, 6, seed_key=(7,), executor=SerialExecutor(), pick="random")
        expected = fit([SubsetRows(ArrayRows(x), rows)], 30, (7, run), SerialExecutor()).centroids
        np.testing.assert_array_equal(runs, expected)
        again = random_rows([ArrayRows(x)], runs, 6, (7, run + 1))
        assert not np.array_equal(again, rows)  # every run draws anew
        rows = again


def test_what_is_drawn_depends_on_positions_alone():
    x = np.random.default_rng(0).normal(size=(9000, 2)).astype("f4")
    whole = random_rows([ArrayRows(x)], x[:40], 50, (1, 0, 3))
    for cuts in ([0, 1, 1, 5000], [4096], [8999, 9000]):
        parts = [ArrayRows(piece) for piece in np.split(x, cuts)]
        np.testing.assert_array_equal(random_rows(parts, x[:40], 50, (1, 0, 3)), whole)
    assert len(np.intersect1d(random_rows([ArrayRows(x)], x[:40], 50, (1, 0, 4)), whole)) < len(whole) / 2


def test_every_row_of_a_cluster_is_drawn_as_often():
    x = np.repeat(np.eye(3, dtype="f4"), [10, 40, 3], axis=0)
    counts = np.zeros(53)
    for seed in range(2000):
        counts[random_rows([ArrayRows(x)], np.eye(3, dtype="f4"), 4, (seed, 1))] += 1
    expected = 2000 * np.repeat([4 / 10, 4 / 40, 1], [10, 40, 3])
    spread = np.sqrt(expected * (1 - expected / 2000))
    assert (abs(counts - expected) <= 4.5 * spread).all() and (counts[-3:] == 2000).all()
    drawn = np.array([np.isin([0, 1], random_rows([ArrayRows(x)], np.eye(3), 4, (seed, 2))) for seed in range(2000)])
    assert abs(drawn.all(axis=1).mean() - 4 / 10 * 3 / 9) < 0.04  # two neighbours together, as without replacement


@pytest.mark.parametrize("pick", ["closest", "random"])
def test_a_gpu_makes_the_level_of_a_cpu(pick, monkeypatch):
    """Rows apart enough; every run of resampling needs labels of all rows, though it is on few."""
    rng = np.random.default_rng(3)
    x = (3 * rng.normal(size=(40, 8))[rng.integers(40, size=5000)] + rng.normal(size=(5000, 8))).astype("f4")
    parts = [ArrayRows(piece) for piece in np.split(x, [0, 1000, 1001])]
    given = {"seed_key": (1,), "executor": SerialExecutor(), "how": Lloyd(n_iter=9), "pick": pick}
    expected = fit_level(parts, 40, 3, 20, **given)
    monkeypatch.setattr(module, "assign", None)  # what compares rows and centroids on a CPU
    found = fit_level(parts, 40, 3, 20, **given, trail=HeldLevel(), device=Device("cpu:0", 0))
    np.testing.assert_array_equal(found, expected)


def test_random_resampling_flattens_too():
    """Equally many rows of each cluster, from a density that centroids have flattened already."""
    x = two_squares(np.random.default_rng(2), 16_000, 1000)
    kwargs = {"n_resamples": 6, "resample_size": 8, "n_iter": 15}
    closest, any_row = (
        ratio(hierarchical_kmeans(x, [500], np.random.default_rng(0), resample=how, **kwargs).levels[0].centroids)
        for how in ("closest", "random")
    )
    assert closest < 2.2 and any_row < 2.2


def brute_closest(labels, sq_distance, n_clusters, size):
    order = np.lexsort((np.arange(len(labels)), sq_distance))
    return np.sort(np.concatenate([order[labels[order] == c][:size] for c in range(n_clusters)]))


@pytest.mark.parametrize("seed", range(40))
def test_closest_members_of_many_parts_match_a_sort(seed):
    rng = np.random.default_rng(seed)
    n, k, size = (int(rng.integers(low, high)) for low, high in ((1, 500), (1, 30), (1, 12)))
    labels = rng.integers(0, k, n).astype("i4")
    sq_distance = rng.integers(0, rng.choice([1, 4, 1000]), n).astype("f4")  # many ties
    cuts = np.sort(rng.integers(0, n + 1, size=int(rng.integers(0, 9))))
    parts = zip(np.split(labels, cuts), np.split(sq_distance, cuts), strict=True)
    chosen = closest_members(parts, k, size)
    starts = [0, *cuts]
    assert len(chosen) == len(starts) and all(rows.dtype == np.int64 for rows in chosen)
    found = np.concatenate([rows + start for rows, start in zip(chosen, starts, strict=True)])
    np.testing.assert_array_equal(found, brute_closest(labels, sq_distance, k, size))


@pytest.mark.parametrize("n_parts", [3, 20])
def test_parts_give_what_one_array_gives(n_parts):
    """Groups far apart, one a cluster: rounding of the sums cannot change who is closest to what."""
    rng = np.random.default_rng(8)
    x = (10 * rng.normal(size=(25, 5))[rng.integers(25, size=3000)] + 0.1 * rng.normal(size=(3000, 5))).astype("f4")
    whole = fit_level([ArrayRows(x)], 25, 3, 20, seed_key=(1, 0), executor=SerialExecutor())
    cuts = np.sort(rng.integers(0, 3000, n_parts - 1))
    parts = [ArrayRows(piece) for piece in np.split(x, cuts)]
    streamed = fit_level(parts, 25, 3, 20, seed_key=(1, 0), executor=SerialExecutor())
    np.testing.assert_allclose(streamed, whole, atol=1e-5)


def converged(x, n_clusters, **kwargs):
    """Without resampling, until nothing moves."""
    return hierarchical_kmeans(x, n_clusters, np.random.default_rng(0), n_resamples=0, n_iter=500, tol=0, **kwargs)


def means(x, labels, n_clusters):
    """float64 mean of the rows of each cluster, NaN of none."""
    sums = np.zeros((n_clusters, x.shape[1]))
    np.add.at(sums, labels, x.astype("f8"))
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(labels, minlength=n_clusters)[:, None]


def test_with_weights_a_centroid_is_the_mean_of_all_rows_below_it():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(60, 5))[rng.integers(60, size=3000) ** 2 % 60] + 0.4 * rng.normal(size=(3000, 5))).astype(
        "f4"
    )
    sized, equal = (converged(x, [80, 15, 4], weights=weights) for weights in ("size", "equal"))
    np.testing.assert_array_equal(sized.levels[0].centroids, equal.levels[0].centroids)
    labels = np.arange(len(x))
    for t, level in enumerate(sized.levels):
        labels = level.labels[labels]
        np.testing.assert_allclose(level.centroids, means(x, labels, len(level.centroids)), atol=2e-6)
        below = equal.levels[t - 1].centroids if t else x
        other = means(below, equal.levels[t].labels, len(level.centroids))
        np.testing.assert_allclose(equal.levels[t].centroids, other, atol=2e-6)


def test_clusters_without_rows_move_nothing_and_have_a_label():
    x = np.repeat(np.array([[0, 0], [1, 0], [9, 9]], "f4"), [50, 10, 20], axis=0)
    levels = converged(x, [12, 2], weights="size").levels
    assert len(np.unique(levels[0].labels)) == 3 and levels[1].labels.shape == (12,)
    top = levels[1].centroids[np.argsort(levels[1].centroids[:, 0])]
    np.testing.assert_allclose(top, [[10 / 60, 0], [9, 9]], atol=1e-6)


def test_rows_below_are_summed_up_the_levels():
    labels = [np.array([0, 2, 2, 5]), np.array([1, 0, 0, 0, 1, 1]), np.array([0, 0])]
    counts, expected = None, ([1, 0, 2, 0, 0, 1], [2, 2], [4])
    for level, sizes in zip(labels, expected, strict=True):
        counts = rows_below(level, len(sizes), counts)
        assert counts.dtype == np.int64 and counts.tolist() == sizes


def test_chosen_rows_have_their_weights():
    x = np.repeat(np.eye(3, dtype="f4"), 5, axis=0)
    parts = weighted([ArrayRows(x[:7]), ArrayRows(x[7:])], Here(np.arange(15)))
    for key, rows in ((None, [0, 1, 5, 6, 10, 11]), ((4,), random_rows(parts, np.eye(3, dtype="f4"), 2, (4,)))):
        chosen = resample([Member(part) for part in parts], Step(np.eye(3, dtype="f4")), 2, SerialExecutor(), key)
        np.testing.assert_array_equal(np.concatenate([weights_of(part) for part in chosen]), rows)
    plain = resample([Member(ArrayRows(x))], Step(np.eye(3, dtype="f4")), 2, SerialExecutor())
    assert weights_of(plain[0]) is None


def test_a_cosine_hierarchy_is_one_of_directions():
    x = np.random.default_rng(1).normal(size=(1500, 6)) * np.random.default_rng(2).lognormal(0, 2, (1500, 1))
    found = {w: converged(x, [60, 12, 3], metric="cosine", weights=w) for w in ("equal", "size")}
    unit = unit_rows(x.astype("f4"))
    for weights, hierarchy in found.items():
        points, labels = unit, np.arange(len(x))
        for level in hierarchy.levels:
            np.testing.assert_allclose(np.linalg.norm(level.centroids, axis=1), 1, atol=1e-6)
            nearest, sq_distance = nearest_centroid(points, level.centroids)
            np.testing.assert_array_equal(level.labels, nearest)
            np.testing.assert_array_equal(level.sq_distance, sq_distance)
            if weights == "equal":
                direction = means(points, level.labels, len(level.centroids))
                direction /= np.linalg.norm(direction, axis=1)[:, None]
                np.testing.assert_allclose(level.centroids, direction, atol=1e-6)
            points, labels = level.centroids, level.labels[labels]
    assert not np.array_equal(found["equal"].levels[1].centroids, found["size"].levels[1].centroids)


def test_seeds_repeat_and_differ():
    x = np.random.default_rng(9).normal(size=(400, 3)).astype("f4")
    first, same, other = (
        hierarchical_kmeans(x, [40, 5], np.random.default_rng(s), n_resamples=2).levels[1].centroids for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_small_inputs():
    x = np.random.default_rng(0).normal(size=(3, 2))
    hierarchy = hierarchical_kmeans(x, [10, 5], np.random.default_rng(0))
    assert hierarchy.n_clusters == (3, 3)
    copies = hierarchical_kmeans(np.ones((50, 2), "f4"), [5, 2], np.random.default_rng(0))  # four clusters are empty
    assert copies.n_clusters[0] <= 5 and not copies.levels[0].labels.any()


def test_resampling_keeps_a_cluster_for_every_row_it_keeps():
    x = np.repeat(np.eye(3, dtype="f4"), 5, axis=0)
    parts = resample([Member(ArrayRows(x))], Step(np.eye(3, dtype="f4")), 2, SerialExecutor())
    assert len(fit(parts, 8, (0,), SerialExecutor()).centroids) == 6  # three clusters, two rows of each


@dataclass(frozen=True)
class FileRows:
    """A part that travels as a path, as the parts of an artifact do."""

    path: str
    n_rows: int

    def blocks(self):
        return ArrayRows(np.load(self.path)).blocks()


class StoreRef:
    """A value in the store of a ``RecordingExecutor``; what travels is its number."""

    def __init__(self, store, number):
        self.store, self.number = store, number

    def get(self):
        value = pickle.loads(self.store.values[self.number])
        return value if self.store.on_worker else self.store.through_driver(value)

    def __reduce__(self):
        return RecordingExecutor.ref, (self.number,)


class RecordingExecutor:
    """Workers behind pickle and a store of their own; keeps the size of everything that the driver sees."""

    current = None

    def __init__(self):
        self.values, self.seen, self.on_worker = [], [], False
        RecordingExecutor.current = self

    @staticmethod
    def ref(number):
        return StoreRef(RecordingExecutor.current, number)

    def put(self, value):
        self.values.append(pickle.dumps(value))
        return StoreRef(self, len(self.values) - 1)

    def through_driver(self, value):
        data = pickle.dumps(value)
        self.seen.append(len(data))
        return pickle.loads(data)

    def call(self, fn, item, shared):
        fn, item, shared = self.through_driver((fn, item, dict(shared or {})))
        self.on_worker = True
        try:
            return fn(item, **{k: v.get() if isinstance(v, StoreRef) else v for k, v in shared.items()})
        finally:
            self.on_worker = False

    def map(self, fn, items, shared=None):
        for item in items:
            yield self.through_driver(self.call(fn, item, shared))

    def reduce(self, fn, items, merge, shared=None, fan_in=16):
        leaves = (self.call(fn, item, shared) for item in items)
        return self.put(fold_tree(leaves, merge, fan_in))


def test_the_driver_holds_parts_and_centroids_never_rows(tmp_path):
    n_parts, k, width = 8, 10, 4
    x = np.random.default_rng(0).normal(size=(20_000, width)).astype("f4")
    parts = []
    for i, piece in enumerate(np.split(x, [100, 3000, 3000, 9000, 9001, 15_000, 19_000])):
        np.save(tmp_path / f"{i}.npy", piece)
        parts.append(FileRows(str(tmp_path / f"{i}.npy"), len(piece)))
    recording = RecordingExecutor()
    fitted = fit_level(parts, k, 2, None, seed_key=(3,), executor=recording, how=Lloyd(n_iter=5))
    assert max(recording.seen) < 2000 + 100 * n_parts + 16 * k * width  # half the rows as bits are 1250, as rows 80,000
    assert max(map(len, recording.values)) > 8 * len(x) // 2  # the store had them
    serial = fit_level(parts, k, 2, None, seed_key=(3,), executor=SerialExecutor(), how=Lloyd(n_iter=5))
    np.testing.assert_array_equal(fitted, serial)


def test_nor_does_it_hold_weights_or_what_was_drawn(tmp_path):
    n_rows, k, width = 20_000, 10, 4
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(n_rows, width)).astype("f4"))
    recording, weights = RecordingExecutor(), np.random.default_rng(1).integers(0, 9, n_rows)
    how = {"seed_key": (3,), "how": Lloyd(n_iter=5, metric="euclidean"), "pick": "random"}
    parts = [FileRows(str(tmp_path / "x.npy"), n_rows)]
    fitted = fit_level(weighted(parts, recording.put(weights)), k, 2, None, executor=recording, **how)
    assert max(recording.seen) < 2100 + 16 * k * width
    serial = fit_level(weighted(parts, Here(weights)), k, 2, None, executor=SerialExecutor(), **how)
    np.testing.assert_array_equal(fitted, serial)


def test_chosen_rows_are_a_sequence_of_parts():
    chosen = Chosen(np.array([0, 4, 5, 9]), np.array([0, 3, 3, 5, 10]))
    assert [rows.tolist() for rows in chosen] == [[0], [], [1], [0, 4]]
    assert len(chosen) == 4 and chosen_counts(chosen) == [1, 0, 1, 2]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", ["i4", "i8", "u2"])
def test_groups_match_a_stable_sort(seed, dtype):
    rng = np.random.default_rng(seed)
    n_groups = int(rng.integers(1, 50))
    labels = rng.integers(0, n_groups, size=int(rng.integers(0, 100))).astype(dtype)
    groups = group_rows(labels, n_groups)
    np.testing.assert_array_equal(groups.rows, np.argsort(labels, kind="stable"))
    np.testing.assert_array_equal(np.diff(groups.offsets), np.bincount(labels, minlength=n_groups))
    assert groups.offsets[0] == 0


def test_runs_are_one_number_or_one_a_level():
    assert ClusterConfig(n_clusters=(9, 3), n_resamples=4).runs == (4, 4)
    assert ClusterConfig(n_clusters=(9, 3), n_resamples=(2, 0)).runs == (2, 0)


def test_groups_of_equal_size_and_of_none():
    assert group_rows(np.array([1, 0, 1, 0]), 2).rows.tolist() == [1, 3, 0, 2]
    assert group_rows(np.empty(0, int), 3).offsets.tolist() == [0, 0, 0, 0]
    assert group_rows(np.empty(0, int), 0).offsets.tolist() == [0]


def test_a_hierarchy_from_labels():
    hierarchy = Hierarchy.from_labels([np.array([0, 2, 2, 1]), np.array([0, 1, 0, 1]), np.array([0, 0])])
    assert hierarchy.n_clusters == (4, 2, 1)  # one leaf is empty
    assert [level.centroids for level in hierarchy.levels] == [None] * 3


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Hierarchy([]), "a hierarchy must have at least one level: got none"),
        (
            lambda: Hierarchy.from_labels([np.array([0, 3]), np.array([0, 0, 0])]),
            r"level 0 must be in \[0, 3\).*0\.\.3",
        ),
        (lambda: Hierarchy.from_labels([np.array([0, 0]), np.array([0, -1])]), r"level 1 must be in \[0, 1\).*-1\.\.0"),
        (lambda: Hierarchy.from_labels([np.array([0.0])]), r"labels of level 0 must be integers \(n,\): got float64"),
        (lambda: Hierarchy.from_labels([np.zeros((2, 2), int)]), r"integers \(n,\): got int64 \(2, 2\)"),
        (
            lambda: Hierarchy([Level(np.zeros((3, 1)), np.array([0])), Level(None, np.array([0]))]),
            "level 0 must have a centroid for each of its 1 clusters: got 3",
        ),
        (
            lambda: Hierarchy([Level(None, np.array([0]), np.zeros(2, "f4"))]),
            r"sq_distance of level 0 must have one value a label, \(1,\): got \(2,\)",
        ),
        (
            lambda: hierarchical_kmeans(np.ones((9, 2)), [3, 2], np.random.default_rng(0), resample_size=[2]),
            r"resample_size must be one number or one a level, 2 of them: got \[2\]",
        ),
        (lambda: group_rows(np.array([0, 5]), 5), r"labels must be in \[0, 5\): got 0..5"),
        (lambda: ClusterConfig(n_clusters=()), r"cluster.n_clusters must be positive and get smaller"),
        (lambda: ClusterConfig(n_clusters=(10, 10)), r"finest first: got \(10, 10\)"),
        (lambda: ClusterConfig(n_clusters=(10, 0)), r"finest first: got \(10, 0\)"),
        (
            lambda: ClusterConfig(n_clusters=(10, 5), resample_size=(3,)),
            r"one number a level: got \(3,\) for \(10, 5\)",
        ),
        (lambda: ClusterConfig(n_clusters=(10,), n_resamples=-1), "cluster.n_resamples must be at least 0: got -1"),
        (lambda: ClusterConfig(n_clusters=(10,), n_iter=0), "cluster.n_iter must be at least 1: got 0"),
        (lambda: ClusterConfig(n_clusters=(10,), seed=-3), "cluster.seed must be at least 0: got -3"),
        (
            lambda: ClusterConfig(n_clusters=(10, 5), n_resamples=(3, -1)),
            r"cluster.n_resamples must be at least 0: got \(3, -1\)",
        ),
        (
            lambda: ClusterConfig(n_clusters=(10, 5), n_resamples=(3,)),
            r"cluster.n_resamples must be one number or one a level: got \(3,\) for \(10, 5\)",
        ),
        (
            lambda: ClusterConfig(n_clusters=(10,), resample="far"),
            "cluster.resample must be one of closest, random: got 'far'",
        ),
        (
            lambda: ClusterConfig(n_clusters=(10,), weights="log"),
            "cluster.weights must be one of equal, size: got 'log'",
        ),
        (
            lambda: ClusterConfig(n_clusters=(10,), metric="l1"),
            "cluster.metric must be one of euclidean, cosine: got 'l1'",
        ),
        (
            lambda: hierarchical_kmeans(np.ones((9, 2)), [3], np.random.default_rng(0), resample="far"),
            "^resample must be one of closest, random: got 'far'",
        ),
        (
            lambda: hierarchical_kmeans(np.ones((9, 2)), [3], np.random.default_rng(0), weights="log"),
            "^weights must be one of equal, size: got 'log'",
        ),
        (
            lambda: hierarchical_kmeans(np.ones((9, 2)), [3], np.random.default_rng(0), metric="l1"),
            "^metric must be one of euclidean, cosine: got 'l1'",
        ),
        (
            lambda: hierarchical_kmeans(np.eye(9)[:, :5], [3], np.random.default_rng(0), metric="cosine"),
            "rows must not be zeros for the cosine: 4 of 9 are, the first is row 5",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
