import numpy as np
import pytest

from training.probes import knn_accuracy, knn_predict, rankme


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
