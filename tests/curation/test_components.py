from functools import partial

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from curation.components import (
    connected_components,
    distinct,
    join_forests,
    large_star,
    lower,
    merge_forests,
    part_forest,
    small_star,
)
from curation.execute import SerialExecutor


def oracle(edges, n_rows):
    """Smallest row of each component, by scipy."""
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (n_rows, n_rows))
    labels = scipy_components(graph, directed=False)[1]
    return np.unique(labels, return_index=True)[1][labels]


def random_edges(seed):
    rng = np.random.default_rng(seed)
    n_rows = int(rng.integers(1, 400))
    edges = rng.integers(0, n_rows, size=(int(rng.integers(0, 2 * n_rows)), 2))
    return rng, edges.astype(rng.choice(["i4", "i8", "u4", "u8"])), n_rows


@pytest.mark.parametrize("seed", range(60))
def test_components_match_scipy(seed):
    _, edges, n_rows = random_edges(seed)
    labels = connected_components(edges, n_rows)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, oracle(edges, n_rows))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("stretch", [1, 10_000])  # dense and sparse row ids
def test_forests_of_parts_merge_to_the_same_components(seed, stretch):
    rng, edges, n_rows = random_edges(seed)
    cuts = np.sort(rng.integers(0, len(edges) + 1, size=int(rng.integers(0, 40))))
    parts = np.split(edges.astype("i8") * stretch, cuts)
    forest = SerialExecutor().reduce(part_forest, parts, merge_forests).get()
    expected = oracle(edges, n_rows)
    rows = np.flatnonzero(expected != np.arange(n_rows))
    np.testing.assert_array_equal(forest, np.stack([rows, expected[rows]], axis=1) * stretch)
    np.testing.assert_array_equal(join_forests((part_forest(part // stretch) for part in parts), n_rows), expected)
    np.testing.assert_array_equal(connected_components(forest // stretch, n_rows), expected)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("stretch", [1, 10_000])
def test_forests_merge_in_any_order_and_grouping(seed, stretch):
    rng, edges, _ = random_edges(seed)
    forests = [part_forest(part) for part in np.array_split(edges.astype("i8") * stretch, int(rng.integers(1, 12)))]
    while len(forests) > 1:
        a, b = (forests.pop(int(rng.integers(len(forests)))) for _ in range(2))
        np.testing.assert_array_equal(merge_forests(a, b), merge_forests(b, a))
        forests.append(merge_forests(a, b))
    np.testing.assert_array_equal(forests[0], part_forest(edges.astype("i8") * stretch))


@pytest.mark.parametrize("seed", range(30))
def test_stars_keep_the_components_and_end_as_stars_to_the_smallest_row(seed):
    rng, edges, n_rows = random_edges(seed)
    edges, expected = edges.astype("i8"), oracle(edges, n_rows)
    starts, before = np.unique([0, *rng.integers(0, n_rows, 4)]), -1
    for turn in range(40):
        star, pulled, n_moved = (large_star, small_star)[turn % 2], [np.empty((0, 2), "i8")], 0
        seen = np.concatenate([edges, edges[:, ::-1]])
        for start, stop in zip(starts, [*starts[1:], n_rows], strict=True):
            mine = seen[(seen[:, 0] >= start) & (seen[:, 0] < stop)]
            minima = np.arange(start, stop)
            lower(minima, mine, start)
            for block in np.array_split(mine, 3):
                some, moved = star(block, minima, start)
                pulled.append(some)
                n_moved += moved
        edges = np.concatenate(pulled)
        assert (edges[:, 0] > edges[:, 1]).all()
        np.testing.assert_array_equal(connected_components(edges, n_rows), expected)
        if turn % 2 == 0 and n_moved == before == 0:
            break
        before = n_moved
    rows = np.flatnonzero(expected != np.arange(n_rows))
    np.testing.assert_array_equal(np.unique(edges, axis=0), np.stack([rows, expected[rows]], axis=1))


def test_a_long_chain_in_the_worst_order():
    n_rows = 200_000
    edges = np.stack([np.arange(n_rows - 1), np.arange(1, n_rows)], axis=1)
    for order in (edges, edges[::-1], np.random.default_rng(0).permutation(edges), edges[:, ::-1]):
        assert not connected_components(order, n_rows).any()


@pytest.mark.parametrize("n_rows", [1 << 14])
def test_trees_that_are_as_deep_as_unions_make_them(n_rows):
    """Pairs, pairs of pairs, ...: joined at their roots, then at their deepest rows."""
    for at in (0, -1):
        edges = [
            np.stack([np.arange(0, n_rows, 2 * step), np.arange(step, n_rows, 2 * step)], axis=1) + (at and step - 1)
            for step in 2 ** np.arange(14)
        ]
        assert not connected_components(np.concatenate(edges), n_rows).any()


@pytest.mark.parametrize("ids", [[], [3], [5, 2, 5, 2, 9], [[1, 1], [0, 1]]])
def test_distinct_is_unique(ids):
    np.testing.assert_array_equal(distinct(np.array(ids, "i8")), np.unique(ids))


def test_labels_take_four_bytes_a_row():
    assert join_forests([], 5).dtype == np.uint32
    assert join_forests([np.array([[3, 1]])], 5).tolist() == [0, 1, 2, 1, 4]


def test_a_forest_holds_only_touched_rows():
    far = np.array([[10**12, 10**12 + 5], [3, 10**15]])
    np.testing.assert_array_equal(part_forest(far), [[10**12 + 5, 10**12], [10**15, 3]])
    assert part_forest(np.empty((0, 2), "i8")).shape == merge_forests(*[np.empty((0, 2), "i8")] * 2).shape == (0, 2)


def test_bad_edges_are_named():
    with pytest.raises(ValueError, match=r"edges must join rows in \[0, 5\): got row 5"):
        connected_components(np.array([[0, 1], [5, 2]]), 5)
    for find in (part_forest, partial(connected_components, n_rows=5)):
        with pytest.raises(ValueError, match="edges must join rows from 0 on: got row -1"):
            find(np.array([[0, -1]]))
        with pytest.raises(ValueError, match=r"edges must be an integer array \(m, 2\): got float64 \(1, 2\)"):
            find(np.zeros((1, 2)))
