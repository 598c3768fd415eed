"""The numbers of a drift are those that numpy and scipy find in all rows."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import entropy

from curation import drift as kernel
from curation.drift import AssignConfig, Spread, chance_variation, divergence, drift, level_drift, most_grown


def rows(rng, n, k=12, scale=1.0, power=1.0):
    """Labels of a heavy-tailed distribution over k clusters, of which the last has no row, and distances."""
    shares = np.append(1 / np.arange(1, k) ** power, 0)
    labels = rng.choice(k, n, p=shares / shares.sum()).astype(np.int32)
    return labels, (scale * rng.gamma(3, 0.1, n)).astype(np.float32)


def spread(labels, sq_distance, k=12):
    """In parts of unequal size, merged."""
    at = [0, len(labels) // 3, len(labels) // 2, len(labels)]
    parts = [Spread.zeros(k).add(labels[a:b], sq_distance[a:b]) for a, b in pairwise(at)]
    return parts[0].merge(parts[1]).merge(parts[2])


@pytest.mark.parametrize("seed", range(10))
def test_the_numbers_are_those_of_all_rows(seed):
    rng = np.random.default_rng(seed)
    old, new = rows(rng, 5000), rows(rng, 1200, scale=rng.uniform(0.5, 3), power=rng.uniform(0, 2))
    upper = rng.integers(0, 4, 12).astype(np.int32)
    found = drift(AssignConfig(), spread(*old), spread(*new), [(upper, 5)])
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert found["rows"] == {"old": 5000, "new": 1200}
    for which, (_, distance) in (("old", old), ("new", new)):
        assert found["mean_sq_distance"][which] == pytest.approx(distance.astype("f8").mean(), rel=1e-12)
    edge = found["far"]["sq_distance"]
    quantile = np.sort(old[1])[int(np.ceil(0.99 * 5000)) - 1]
    assert quantile < edge <= quantile * (1 + 2**-7)
    assert found["far"]["share"] == (new[1] >= edge).mean()
    for level, labels, k in (
        (found["levels"][0], (old[0], new[0]), 12),
        (found["levels"][1], (upper[old[0]], upper[new[0]]), 5),
    ):
        a, b = (np.bincount(some, minlength=k) for some in labels)
        p, q = a / a.sum(), b / b.sum()
        assert level["clusters"] == k
        assert level["total_variation"] == pytest.approx(np.abs(p - q).sum() / 2)
        assert level["emptied"] == sum(x > 0 and y == 0 for x, y in zip(a, b, strict=True))
        assert level["opened"] == sum(x == 0 and y > 0 for x, y in zip(a, b, strict=True))
        if not level["opened"]:
            assert level["kl"] == pytest.approx(entropy(q, p))
        growth = sorted(((x - y, i) for i, (x, y) in enumerate(zip(p, q, strict=True)) if y > x))[:10]
        assert [some["cluster"] for some in level["grown"]] == [i for _, i in growth]
        assert all((some["old"], some["new"]) == (p[some["cluster"]], q[some["cluster"]]) for some in level["grown"])


def test_equal_rows_do_not_drift():
    labels, distance = rows(np.random.default_rng(0), 3000)
    found = drift(AssignConfig(max_far=0.01, max_variation=0), spread(labels, distance), spread(labels, distance))
    assert found["levels"][0]["kl"] == found["levels"][0]["total_variation"] == found["levels"][0]["emptied"] == 0
    assert found["levels"][0]["grown"] == [] and 0 < found["far"]["share"] <= 0.01
    assert found["histogram"]["old"] == found["histogram"]["new"]
    assert (found["drifted"], found["verdict"]) == (False, "the new images are spread as the old ones")


def test_the_verdict_tells_far_rows_from_other_shares():
    rng = np.random.default_rng(0)
    old = rows(rng, 20_000)
    far = drift(AssignConfig(), spread(*old), spread(*rows(rng, 500, scale=3)))
    share = f"{100 * far['far']['share']:.3g} % of the new images are farther from any centroid than 99 % of the old"
    assert far["drifted"] and far["verdict"] == f"{share} ones: cluster anew"
    other = drift(AssignConfig(), spread(*old), spread(*rows(rng, 500, power=0)))
    level = other["levels"][0]
    told = f"{level['total_variation']:.3g} at level 0, where chance gives {level['by_chance']:.3g}"
    assert other["drifted"] and other["verdict"].endswith(f"in other shares: the total variation is {told}")
    alike = drift(AssignConfig(), spread(*old), spread(*rows(rng, 500)))
    assert not alike["drifted"]
    assert drift(AssignConfig(max_far=0), spread(*old), spread(*rows(rng, 500)))["drifted"]


def test_few_rows_in_many_clusters_do_not_drift_by_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10_000, 100_000).astype(np.int32)
    distance = rng.gamma(3, 0.1, 100_000).astype("f4")
    new = rng.choice(100_000, 300, replace=False)
    found = drift(AssignConfig(), spread(labels, distance, 10_000), spread(labels[new], distance[new], 10_000))
    assert found["levels"][0]["total_variation"] > 0.9 and not found["drifted"]


@pytest.mark.parametrize(("n_old", "n_new", "k"), [(3000, 500, 12), (40, 60, 4), (200, 9, 60), (50, 50, 2)])
def test_chance_is_what_rows_dealt_out_again_have(n_old, n_new, k):
    rng = np.random.default_rng(k)
    labels = np.concatenate([rows(rng, n_old, k)[0], rows(rng, n_new, k)[0]])
    seen = []
    for _ in range(2000):
        dealt = rng.permutation(labels)
        a, b = (np.bincount(some, minlength=k) for some in (dealt[:n_old], dealt[n_old:]))
        seen.append(np.abs(a / n_old - b / n_new).sum() / 2)
    expected = chance_variation(np.bincount(labels[:n_old], minlength=k), np.bincount(labels[n_old:], minlength=k))
    assert expected == pytest.approx(np.mean(seen), rel=0.05)


@pytest.mark.parametrize("k", [1, 9, 10, 11, 40])
def test_the_clusters_that_grew_most_tie_to_the_lower(k):
    growth = np.random.default_rng(k).integers(-2, 3, k).astype("f8")
    expected = sorted((-value, i) for i, value in enumerate(growth.tolist()) if value > 0)[:10]
    assert most_grown(growth) == [i for _, i in expected]


def test_one_cluster_has_nothing_to_drift():
    found = level_drift(np.array([7]), np.array([1]))
    assert (found["kl"], found["total_variation"], found["by_chance"]) == (0, 0, 0)


def test_a_cluster_without_old_rows_counts_as_one_in_the_divergence():
    assert divergence(np.array([4, 0, 0]), np.array([1, 1, 0])) == pytest.approx(entropy([0.5, 0.5], [0.8, 0.2]))


def test_the_histogram_is_that_of_the_distances():
    rng = np.random.default_rng(0)
    old, new = rows(rng, 4000)[1], rows(rng, 700, scale=2)[1]
    new[:3] = 0  # rows that are their centroid
    found = kernel.even_histogram(*(spread(np.zeros(len(x), int), x).bins for x in (old, new)))
    assert found["edges"][0] == 0 and old.max() < found["edges"][-1] and len(found["edges"]) == kernel.N_BARS + 1
    assert found["edges"][-1] <= max(old.max(), new.max()) * (1 + 2**-7)
    for name, x in (("old", old), ("new", new)):
        expected = np.histogram(x, found["edges"])[0] / len(x)
        assert sum(found[name]) == pytest.approx(1)
        np.testing.assert_allclose(np.cumsum(found[name]), np.cumsum(expected), atol=0.01)


def test_distances_that_are_all_zero():
    zero = Spread.zeros(1).add(np.zeros(5, int), np.zeros(5, np.float32))
    found = drift(AssignConfig(), zero, zero)
    assert found["far"]["share"] == 0 and found["histogram"]["old"][0] == pytest.approx(1 / kernel.N_BARS)


def test_what_cannot_be_is_refused():
    some = Spread.zeros(2).add(np.zeros(1, int), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="old and new must have rows: got 1 and 0"):
        drift(AssignConfig(), some, Spread.zeros(2))
    for name in ("max_far", "max_variation"):
        with pytest.raises(ValueError, match=rf"assign\.{name} must be in \[0, 1\]: got 1\.5"):
            AssignConfig(**{name: 1.5})
