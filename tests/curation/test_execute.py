import pickle
from functools import partial

import numpy as np
import pytest

from curation.execute import Here, SerialExecutor, fold, fold_tree, local_values, on_worker


def join(a, b):
    return f"({a}{b})"


def by_levels(results, fan_in):
    """The contract, to the letter: neighbours are folded level by level until one is left."""
    level = list(results)
    while len(level) > 1:
        groups = [level[start : start + fan_in] for start in range(0, len(level), fan_in)]
        level = []
        for group in groups:
            total = group[0]
            for result in group[1:]:
                total = join(total, result)
            level.append(total)
    return level[0]


@pytest.mark.parametrize("fan_in", [2, 3, 5, 16, 400])
def test_a_tree_folds_level_by_level(fan_in):
    for n in range(1, 301):
        results = [chr(97 + i % 26) for i in range(n)]
        assert fold_tree(results, join, fan_in) == by_levels(results, fan_in), n


def test_a_tree_holds_fan_in_results_a_level():
    alive, most = set(), 0

    class Result:
        def __init__(self):
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    fold_tree((Result() for _ in range(4**5)), lambda a, b: Result(), 4)
    assert most <= 4 * 6


def test_a_tree_needs_results_and_neighbours():
    with pytest.raises(ValueError, match="nothing to fold"):
        fold_tree([], join, 2)
    with pytest.raises(ValueError, match="fan_in must be at least 2: got 1"):
        fold_tree("ab", join, 1)
    with pytest.raises(ValueError, match="reduce needs at least one item: got none"):
        SerialExecutor().reduce(str, [], join)


def test_fold_goes_from_the_left():
    assert fold("abc", join) == "((ab)c)" and fold("a", join) == "a"


def scaled(item, factor, shift=0):
    return item * factor + shift


def test_map_gives_results_in_order_with_what_is_shared():
    executor = SerialExecutor()
    assert list(executor.map(scaled, [1, 2, 3], {"factor": 10, "shift": Here(1)})) == [11, 21, 31]
    assert list(executor.map(str, [])) == []


def test_map_is_lazy():
    seen = []
    results = SerialExecutor().map(lambda item: seen.append(item) or item, range(5))
    assert next(results) == 0 and seen == [0]


def test_a_failure_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(SerialExecutor().map(lambda item: 1 / item, [1, 0]))


def test_a_worker_is_made_once_and_only_for_items():
    made = []

    def make():
        made.append(1)
        return partial(scaled, factor=2)

    assert list(SerialExecutor().map_workers(make, [])) == [] and not made
    assert list(SerialExecutor().map_workers(make, [1, 2, 3])) == [2, 4, 6] and made == [1]


@pytest.mark.parametrize("n", [1, 7, 40])
def test_reduce_is_the_tree_over_the_results(n):
    parts = [np.random.default_rng(i).normal(size=9).astype("f4") for i in range(n)]
    total = SerialExecutor().reduce(np.negative, parts, np.add, fan_in=4)
    np.testing.assert_array_equal(total.get(), fold_tree([-part for part in parts], np.add, 4))


def test_a_reference_is_handed_on():
    executor = SerialExecutor()
    total = executor.reduce(partial(scaled, factor=1), [1, 2, 3], int.__add__)
    assert total.get() == 6
    assert list(executor.map(scaled, [1, 2], {"factor": total})) == [6, 12]
    assert local_values({"a": total, "b": 2}) == {"a": 6, "b": 2} and local_values(None) == {}
    assert pickle.loads(pickle.dumps(total)).get() == 6  # inside an item, too


def test_work_on_a_worker_leaves_its_value_there():
    executor = SerialExecutor()
    value = on_worker(executor, scaled, {"item": Here(4), "factor": 2})
    assert isinstance(value, Here) and value.get() == 8
