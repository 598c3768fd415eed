"""Counts of true and false pairs against brute force and scikit-learn, and what they say of a pool."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from curation.calibrate import Calibration, at_least, calibrate, false_pairs, pick_thresholds, true_similarities
from curation.neighbors import nearest_neighbors


def sample(seed, n=23, kinds=4, d=6, noise=0.6):
    """Images and their copies, some of them alike to the last bit: (n, kinds, d) float32 unit rows."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, 1, d))
    x = images + noise * rng.normal(size=(n, kinds, d)) * np.arange(kinds)[None, :, None]
    x[3] = x[5]
    x[:, 1] = x[:, 0]
    return (x / np.linalg.norm(x, axis=2, keepdims=True)).astype("f4")


def pairs_by_hand(x):
    """Lists of similarities: of the true pairs of each way, and of the false pairs of each kind of query."""
    n, kinds = x.shape[:2]
    wide = x.astype("f8")
    true = [[np.float32(wide[i, 0] @ wide[i, k]) for i in range(n)] for k in range(1, kinds)]
    false = [[np.float32(wide[i, k] @ wide[j, 0]) for i in range(n) for j in range(n) if i != j] for k in range(kinds)]
    return np.array(true), np.array(false)


@pytest.mark.parametrize("seed", range(10))
def test_pairs_are_counted_as_by_hand(seed):
    x = sample(seed)
    true, false = pairs_by_hand(x)
    found = calibrate(x, n_rows=len(x))
    assert len(found.thresholds) > 30 and (np.diff(found.thresholds) > 0).all() and found.thresholds[0] > 0
    for m, threshold in enumerate(found.thresholds):
        np.testing.assert_array_equal(found.true_pairs[:, m], (true >= threshold).sum(axis=1))
        np.testing.assert_array_equal(found.false_pairs[:, m], (false >= threshold).sum(axis=1))


@pytest.mark.parametrize("seed", range(10))
def test_precision_and_recall_are_those_of_scikit_learn(seed):
    """Where searches start from an image as often as from its copy, so that pairs of both count half."""
    x = sample(seed)
    true, false = pairs_by_hand(x)
    found = calibrate(x, n_rows=len(x), n_thresholds=10**4)
    ways = [[0], [1], [2], [0, 1, 2]]
    curves = [*zip(found.precision_of_each, found.recall_of_each, strict=True), (found.precision, found.recall)]
    for some, (ours, our_recall) in zip(ways, curves, strict=True):
        negatives = [scores for way in some for scores in (false[0], false[1 + way])]
        scores = np.concatenate([*true[some], *negatives])
        is_true = np.arange(len(scores)) < len(some) * len(x)
        theirs, their_recall, at = precision_recall_curve(is_true, scores, sample_weight=np.where(is_true, 1, 0.5))
        place = np.searchsorted(at, found.thresholds)  # the values at or above a threshold begin here
        np.testing.assert_allclose(our_recall, their_recall[place], rtol=1e-12)
        has = place < len(at)  # above all values scikit-learn says 1, and so do we where it is not 0 of 0
        np.testing.assert_allclose(ours[has], theirs[place][has], rtol=1e-12)
        assert np.isnan(ours[~has]).all()


def test_the_suggestion_is_the_lowest_threshold_that_is_precise_enough():
    curve = Calibration(
        np.array([0.2, 0.4, 0.6, 0.8], "f4"),
        np.array([[10, 9, 6, 2]]),
        np.array([[90, 8, 2, 0], [30, 2, 0, 0]]),
        n_images=10,
        n_rows=10,
    )
    np.testing.assert_allclose(curve.precision, [10 / 70, 9 / 14, 6 / 7, 1])
    assert [curve.suggest(p) for p in (0.14, 0.15, 0.64, 0.65, 0.86, 1.0)] == [0, 1, 1, 2, 3, 3]
    assert curve.recall.tolist() == [1.0, 0.9, 0.6, 0.2]
    np.testing.assert_allclose(curve.false_per_image, [9, 0.8, 0.2, 0])
    large = curve._replace(n_rows=91)  # each image meets ten times as many others
    np.testing.assert_allclose(large.precision, [10 / 610, 9 / 59, 6 / 16, 1])
    np.testing.assert_allclose(large.false_per_image, [90, 8, 2, 0])
    assert large.suggest(0.75) == 3 and curve._replace(false_pairs=curve.false_pairs + 1).suggest(0.95) is None


def test_a_sample_that_is_the_pool_hides_nothing_and_a_smaller_one_does():
    curve = Calibration(np.zeros(0, "f4"), np.zeros((1, 0), int), np.zeros((2, 0), int), n_images=100, n_rows=100)
    assert curve.unseen_per_image == 0
    large = curve._replace(n_rows=10_000)
    rate = 3 / (100 * 99 / 2)  # of pairs, by the rule of three
    assert large.unseen_per_image == pytest.approx(rate * 9_999, rel=1e-3)
    assert (1 - rate) ** (100 * 99 / 2) == pytest.approx(0.05, abs=1e-3)


def test_false_pairs_of_a_pool_are_foretold_by_a_sample_of_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 3)).astype("f4")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    drawn = x[rng.choice(len(x), 300, replace=False)]
    with_copies = np.stack([drawn, drawn], axis=1)
    with_copies[:, 1] += rng.normal(size=drawn.shape).astype("f4") / 10
    with_copies /= np.linalg.norm(with_copies, axis=2, keepdims=True)
    found = calibrate(with_copies, n_rows=len(x))
    at = int(np.searchsorted(found.thresholds, 0.99))
    truth = ((x @ x.T >= found.thresholds[at]).sum() - len(x)) / len(x)
    assert 5 < truth < 10
    assert found.false_per_image[at] == pytest.approx(truth, rel=0.15)


def test_thresholds_are_at_even_shares_of_what_is_there():
    values = np.arange(1, 1002, dtype="f4").reshape(7, -1) / 1001
    np.testing.assert_array_equal(pick_thresholds(values, 5), np.float32([1, 251, 501, 751, 1001]) / np.float32(1001))
    np.testing.assert_array_equal(pick_thresholds(np.float32([[0.5, 0.5], [-1, 0]]), 200), np.float32([0.5]))
    np.testing.assert_array_equal(pick_thresholds(np.float32([[1.0000001, 0.5]]), 9), np.float32([0.5, 1]))
    assert pick_thresholds(np.float32([[-0.5, 0]]), 200).shape == (0,)


def test_copies_that_are_never_alike_have_no_threshold():
    x = np.eye(4, dtype="f4")[[[0, 1], [2, 3]]]
    found = calibrate(x, n_rows=2)
    assert found.thresholds.shape == (0,) and found.false_pairs.shape == (2, 0) and found.suggest(0.5) is None


def test_a_value_at_a_threshold_counts():
    values = np.float32([[0.5, 0.25, 0.5, 0.75], [0, 0, 0, 1]])
    found = at_least(values, np.float32([0.25, 0.5, 0.9]))
    np.testing.assert_array_equal(found, [[4, 3, 0], [1, 1, 1]])


def test_blocks_add_up_and_similarities_are_those_of_neighbors():
    x = sample(1)
    thresholds = pick_thresholds(true_similarities(x), 50)
    whole = false_pairs(x, np.arange(len(x)), x[:, 0], thresholds)
    cut = [false_pairs(x[a:b], np.arange(a, b), x[:, 0], thresholds) for a, b in ((0, 9), (9, 9), (9, 23))]
    np.testing.assert_array_equal(sum(cut), whole)
    near = nearest_neighbors(x[:, 2], x[:, 0], len(x))
    own = near.row_ids == np.arange(len(x))[:, None]
    np.testing.assert_array_equal(true_similarities(x)[:, 1], near.similarity[own])
    np.testing.assert_array_equal(whole[2], at_least(near.similarity[~own][None], thresholds)[0])


def test_rows_that_are_not_unit_are_refused():
    x = sample(0)
    with pytest.raises(ValueError, match="base must have unit rows: 23 of 23 do not"):
        false_pairs(x, np.arange(len(x)), 2 * x[:, 0], np.float32([0.5]))
