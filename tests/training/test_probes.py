import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from training import probes
from training.evaluate import EvaluateConfig
from training.probes import (
    choose_strength,
    fit_linear,
    fit_probe,
    held_last,
    held_out_right,
    knn_accuracy,
    knn_predict,
    linear_predict,
    rankme,
    standardise,
)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


def brute_force(bank, labels, query, k, temperature):
    near = sorted(range(len(bank)), key=lambda i: (-float(bank[i] @ query), i))[:k]
    votes = {}
    for i in near:
        votes[labels[i]] = votes.get(labels[i], 0) + np.exp(float(bank[i] @ query) / temperature)
    return max(sorted(votes), key=votes.get)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_matches_brute_force(seed, k):
    rng = np.random.default_rng(seed)
    bank, queries, labels = unit(rng.normal(size=(60, 6))), unit(rng.normal(size=(40, 6))), rng.integers(0, 7, 60)
    expected = [brute_force(bank, labels, q, k, 0.07) for q in queries]
    np.testing.assert_array_equal(knn_predict(bank, labels, queries, k), expected)


def test_blocks_do_not_change_the_answer():
    rng = np.random.default_rng(0)
    bank, queries, labels = unit(rng.normal(size=(300, 8))), unit(rng.normal(size=(2500, 8))), rng.integers(0, 4, 300)
    whole = knn_predict(bank, labels, queries)
    np.testing.assert_array_equal(whole[1500:], knn_predict(bank, labels, queries[1500:]))
    assert knn_accuracy(bank, labels, queries, whole) == 1


def test_near_and_few_beat_far_and_many():
    bank = unit(np.array([[1, 0.01], [1, 1], [1, 1.1], [1, 1.2]]))
    assert knn_predict(bank, np.array([3, 1, 1, 1]), unit(np.array([[1.0, 0]])), k=4).tolist() == [3]


def test_k_beyond_the_bank_is_named():
    with pytest.raises(ValueError, match="got k 5, bank"):
        knn_predict(np.eye(4, dtype="f4"), np.arange(4), np.eye(4, dtype="f4"), k=5)


def blobs(n, d, n_classes, spread, seed=0, scale=1.0):
    """Points around one centre a class, (n, d) and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    centres = np.random.default_rng(99).normal(size=(n_classes, d))
    return ((centres[labels] + spread * rng.normal(size=(n, d))) * scale).astype("f4"), labels


def test_a_probe_tells_separable_blobs_apart():
    x, labels = blobs(200, 8, 5, 0.1, scale=1e-3)
    probe, strength = fit_probe(x, labels)
    asked, theirs = blobs(500, 8, 5, 0.1, seed=1, scale=1e-3)
    assert (linear_predict(probe, asked) == theirs).all()
    assert strength in EvaluateConfig(backbone="pixels").linear_strengths


@pytest.mark.parametrize("n_classes", [2, 7])
def test_one_strength_is_scikit_learns_own(n_classes):
    """Standardised features, L-BFGS, C = 1 / strength, and nothing is held out where there is no choice."""
    x, labels = blobs(300, 6, n_classes, 2.0)
    asked = blobs(400, 6, n_classes, 2.0, seed=1)[0]
    probe, strength = fit_probe(x, labels + 3, strengths=[8.0])
    scaler = StandardScaler().fit(x.astype("f8"))
    theirs = LogisticRegression(C=1 / 8, tol=1e-8, max_iter=10_000).fit(scaler.transform(x), labels + 3)
    assert strength == 8.0
    score = theirs.decision_function(scaler.transform(asked))
    sure = np.abs(score) > 1e-2 if n_classes == 2 else np.diff(np.sort(score)[:, -2:])[:, 0] > 1e-2
    assert sure.mean() > 0.95
    expected = theirs.predict(scaler.transform(asked))[sure]
    np.testing.assert_array_equal(linear_predict(probe, asked)[sure], expected)
    weight = probe.weight[1:] - probe.weight[:1] if n_classes == 2 else probe.weight
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-3)
    np.testing.assert_array_equal(probe.classes, np.unique(labels) + 3)


def test_the_strength_is_that_of_most_right_answers_on_what_was_held_out():
    x, labels = blobs(400, 30, 4, 6.0)
    strengths = [10.0**e for e in range(5, -3, -1)]
    order, n_fit = held_last(labels, 7)
    scaled, y = x[order], labels[order]
    mean, scale = standardise(scaled)
    right = {s: held_out_right(scaled, y, n_fit, s) for s in strengths}
    assert len(set(right.values())) > 2, "the choice must matter"
    probe, strength = fit_probe(x, labels, strengths=strengths[::-1], seed=7)  # in whatever order they are given
    assert strength == max(strengths, key=lambda s: (right[s], s))
    whole = fit_linear(scaled, y, strength)  # on all rows, what was held out too
    np.testing.assert_array_equal(probe.weight, whole.weight)
    np.testing.assert_array_equal([probe.mean, probe.scale], [mean, scale])


def asked_for(right, n_held=10):
    """What is chosen and asked, of strengths 16, 8, ... that have these right answers."""
    asked, strengths = [], [2.0 ** (4 - i) for i in range(len(right))]

    def n_right(strength):
        asked.append(strength)
        return right[strengths.index(strength)]

    return choose_strength(strengths[::-1], n_right, n_held), len(asked)


@pytest.mark.parametrize(
    ("right", "chosen", "n_asked"),
    [
        ([1, 5, 7, 6, 8], 1.0, 5),  # one that is worse may be followed by a better one
        ([1, 7, 5, 6, 8, 9], 8.0, 4),  # two may not
        ([3, 3, 3, 3, 3], 16.0, 5),  # ties go to the stronger, and are no reason to stop
        ([3, 3, 4, 3, 4, 3, 5], 0.25, 7),
        ([3, 10, 10], 8.0, 2),  # nothing can be better
    ],
)
def test_weaker_strengths_are_asked_until_they_are_worse(right, chosen, n_asked):
    assert asked_for(right) == (chosen, n_asked)


def test_where_there_is_no_choice_nothing_is_asked():
    assert asked_for([1, 2, 3], n_held=0) == (16.0, 0)
    assert asked_for([5]) == (16.0, 0)


@pytest.mark.parametrize("n", [2, 5, 9, 10, 57, 400])
def test_a_tenth_is_held_out_and_a_row_of_every_class_stays(n):
    labels = np.random.default_rng(n).integers(0, 1 + n // 4, n)
    order, n_fit = held_last(labels, 3)
    assert sorted(order) == list(range(n))
    assert set(labels[order[:n_fit]]) == set(labels)
    assert n - n_fit == min(max(n // 10, 1), n - len(set(labels)))
    assert not np.array_equal(order, held_last(labels, 4)[0]) or n == 2
    np.testing.assert_array_equal(order, held_last(labels, 3)[0])


def test_rows_of_one_each_are_all_fitted():
    x = np.eye(3, dtype="f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe, strength = fit_probe(x, np.array([4, 2, 9]), strengths=[1.0, 100.0])
    assert strength == 100 and linear_predict(probe, x).tolist() == [4, 2, 9]


def test_what_is_standardised():
    x = np.random.default_rng(0).normal([3, 0, 0.25], [2, 1e-3, 0], size=(5000, 3)).astype("f4")
    again, (mean, scale) = x.copy(), standardise(x)
    np.testing.assert_allclose(mean, again.mean(0), rtol=1e-4)
    np.testing.assert_allclose(scale, [*again[:, :2].std(0), np.inf], rtol=1e-4)
    np.testing.assert_allclose(x[:, :2].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(x[:, :2].std(0), 1, rtol=1e-4)
    assert (x[:, 2] == 0).all()  # constant: it says nothing, neither here nor of a query


def test_blocks_of_a_prediction_do_not_show():
    x, labels = blobs(3000, 6, 4, 1.0)
    probe = fit_probe(x[:300], labels[:300])[0]
    whole = linear_predict(probe, x)
    np.testing.assert_array_equal(whole[1500:], linear_predict(probe, x[1500:]))


def test_a_fit_leaves_features_alone_and_does_not_warn_of_its_last_step(monkeypatch):
    x, labels = blobs(90, 6, 3, 2.0)
    monkeypatch.setattr(probes, "_MAX_ITER", 4)
    model = LogisticRegression(C=1e9, max_iter=4)
    with pytest.warns(ConvergenceWarning):
        model.fit(x, labels)
    before = x.copy()
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = fit_linear(x, labels, 1e-9)
    np.testing.assert_array_equal(probe.weight, model.coef_.astype("f4"))
    np.testing.assert_array_equal(x, before)


def test_one_class_is_named():
    with pytest.raises(ValueError, match="a linear probe must have labels of at least 2 classes: got 1"):
        fit_probe(np.eye(4, dtype="f4"), np.full(4, 3))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"linear_rows": 1}, "evaluate.linear_rows must be at least 2: got 1"),
        ({"linear_strengths": ()}, r"evaluate.linear_strengths must be one or more numbers above 0: got \(\)"),
        ({"linear_strengths": (1.0, 0.0)}, "one or more numbers above 0"),
        ({"linear_strengths": (float("nan"),)}, "one or more numbers above 0"),
    ],
)
def test_settings_of_the_probe_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(backbone="pixels", **fields)


def test_rankme_golden():
    assert rankme(np.outer(np.arange(1, 9), np.arange(1, 5))) == pytest.approx(1, abs=1e-5)
    assert rankme(np.eye(7) * 3) == pytest.approx(7)
    rng = np.random.default_rng(0)
    assert rankme(rng.normal(size=(1000, 64))) == pytest.approx(63.5, abs=0.3)
    assert rankme(rng.normal(size=(1000, 384))) == pytest.approx(363, abs=2)
    assert rankme(rng.normal(size=(5000, 384))) == pytest.approx(380, abs=1)
    for shape in ((3, 9), (9, 3)):
        assert 1 <= rankme(rng.normal(size=shape)) <= 3
    with pytest.raises(ValueError, match="not all 0"):
        rankme(np.zeros((3, 3)))
