import numpy as np
import pytest

from curation.balance import balance, level_balance, size_bins


@pytest.mark.parametrize("seed", range(20))
def test_the_numbers_are_those_of_their_definitions(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 50, int(rng.integers(1, 30)))
    sizes[0] += 1
    k, total = len(sizes), sizes.sum()
    told = balance(sizes, np.arange(1, k + 1))
    p = sizes / total
    entropy = -sum(x * np.log(x) for x in p if x)
    assert told["images"] == total
    assert told["effective"] == pytest.approx(np.exp(entropy))
    assert told["kl_to_uniform"] == pytest.approx(sum(x * np.log(x * k) for x in p if x), abs=1e-12)
    assert told["gini"] == pytest.approx(abs(sizes[:, None] - sizes[None]).sum() / (2 * k * total))
    assert told["at_ranks"] == sorted(sizes.tolist(), reverse=True)
    for low, high, n in told["sizes"]:
        assert n == ((sizes >= low) & (sizes <= high)).sum()
    assert sum(n for *_, n in told["sizes"]) == k


def test_what_is_even_and_what_is_not():
    even, one, none = (balance(np.array(sizes), np.array([1])) for sizes in ([5, 5, 5, 5], [0, 0, 9, 0], [0, 0]))
    assert even["effective"] == pytest.approx(4) and even["gini"] == pytest.approx(0)
    assert even["kl_to_uniform"] == pytest.approx(0)
    assert one["effective"] == pytest.approx(1) and one["gini"] == pytest.approx(0.75)
    assert one["kl_to_uniform"] == pytest.approx(np.log(4))
    assert (none["images"], none["effective"], none["gini"], none["kl_to_uniform"]) == (0, 0, 0, 0)


def test_bins_are_powers_of_two():
    bins = size_bins(np.array([0, 0, 1, 2, 3, 4, 7, 8]))
    assert bins == [(0, 0, 2), (1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 1)]


def test_levels_add_up_and_leave_empty_clusters_out():
    before, after = np.array([4, 0, 6, 1, 0]), np.array([2, 0, 3, 1, 0])
    upper = [np.array([0, 0, 2, 2, 1]), np.array([0, 0, 0])]
    found = level_balance(before, after, upper)
    assert [level["clusters"] for level in found] == [3, 2, 1]
    assert [level["before"]["at_ranks"] for level in found] == [[6, 4, 1], [7, 4], [11]]
    assert [level["after"]["at_ranks"] for level in found] == [[3, 2, 1], [4, 2], [6]]
    assert found[1]["ranks"] == [1, 2]


def test_a_curve_of_many_clusters_is_bounded():
    sizes = np.arange(1, 100_001)
    [level] = level_balance(sizes, sizes // 2, [])
    assert len(level["ranks"]) <= 64 and level["ranks"][0] == 1 and level["ranks"][-1] == 100_000
    assert level["before"]["at_ranks"][0] == 100_000 and level["before"]["at_ranks"][-1] == 1
