from functools import partial

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from curation.components import connected_components, join_forests, merge_forests, part_forest
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


def test_a_long_chain_in_the_worst_order():
    n_rows = 200_000
    edges = np.stack([np.arange(n_rows - 1), np.arange(1, n_rows)], axis=1)
    for order in (edges, edges[::-1], np.random.default_rng(0).permutation(edges), edges[:, ::-1]):
        assert not connected_components(order, n_rows).any()


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
