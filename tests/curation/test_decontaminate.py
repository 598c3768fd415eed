import numpy as np
import pytest

from curation import decontaminate, neighbors
from curation.components import part_forest
from curation.decontaminate import (
    DecontaminateConfig,
    edge_records,
    forest_of_pairs,
    is_among,
    near_pairs,
    strongest_from,
)
from curation.neighbors import Neighbors


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("field", ["min_similarity", "max_drop_fraction"])
def test_shares_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"decontaminate.{field} must be in \(0, 1\]: got {value}"):
        DecontaminateConfig(**{"min_similarity": 0.45, field: value})


def test_a_threshold_has_no_default():
    with pytest.raises(TypeError, match="min_similarity"):
        DecontaminateConfig()
    assert DecontaminateConfig(min_similarity=1).max_drop_fraction == 0.5


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"decontaminate.mode must be 'direct' or 'component': got 'all'"):
        DecontaminateConfig(min_similarity=0.5, mode="all")
    assert DecontaminateConfig(min_similarity=0.5).mode == "direct"


@pytest.mark.parametrize("seed", range(10))
def test_membership_is_that_of_a_set(seed):
    rng = np.random.default_rng(seed)
    ascending = np.unique(rng.integers(0, 30, int(rng.integers(0, 20))))
    values = rng.integers(-3, 35, 50)
    assert is_among(values, ascending).tolist() == [value in set(ascending.tolist()) for value in values.tolist()]


def unit_rows(rng, n, width=6):
    """Unit rows of which some are equal and some are opposite."""
    x = rng.normal(size=(n, width))
    for i in range(1, n, 4):
        x[i] = x[int(rng.integers(0, i))] * rng.choice([1, 1, -1])
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("min_similarity", [1e-6, 0.5, 0.9, 1.0])
def test_near_pairs_are_all_that_reach_the_threshold(seed, min_similarity, monkeypatch):
    """Also where few scores are held at once. The oracle takes the sums apart from a matrix product."""
    monkeypatch.setattr(neighbors, "RECHECK_SCORES", 50 + 1000 * (seed % 2))
    rng = np.random.default_rng(seed)
    x = unit_rows(rng, int(rng.integers(0, 40)))
    y = np.concatenate([unit_rows(rng, int(rng.integers(0, 40))), x[::3]])
    exact = (x[:, None].astype("f8") * y[None].astype("f8")).sum(2).astype("f4")
    found = [pair for i, j in near_pairs(x, y, min_similarity) for pair in zip(i.tolist(), j.tolist(), strict=True)]
    assert sorted(found) == [tuple(pair) for pair in np.argwhere(exact >= np.float32(min_similarity)).tolist()]


@pytest.mark.parametrize("seed", range(30))
def test_the_strongest_edge_to_the_frontier_is_kept_however_edges_come(seed):
    rng = np.random.default_rng(seed)
    rows = np.unique(rng.integers(0, 40, int(rng.integers(0, 25)))).astype("i4")
    frontier = np.unique(rng.integers(0, 60, int(rng.integers(0, 25))))
    n = int(rng.integers(0, 150))
    edges = edge_records(rng.integers(0, 40, n), rng.integers(0, 60, n), rng.choice([0.5, 0.75, 1], n))
    best = Neighbors.none_yet(len(rows), 1)
    for some in np.array_split(edges, int(rng.integers(1, 5))):
        best = strongest_from(best, rows, some, frontier)
    for at, row in enumerate(rows.tolist()):
        mine = edges[(edges["row"] == row) & np.isin(edges["near_row"], frontier)]
        expected = min(((-e["similarity"], e["near_row"]) for e in mine), default=(np.inf, -1))
        assert (-best.similarity[at, 0], best.row_ids[at, 0]) == expected


@pytest.mark.parametrize("seed", range(30))
def test_pairs_that_come_a_few_at_a_time_give_the_forest_of_all(seed, monkeypatch):
    monkeypatch.setattr(decontaminate, "FOLD_PAIRS", 7)
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 40, (int(rng.integers(0, 40)), 2))
    forest = forest_of_pairs(np.array_split(pairs, 5))
    assert len(forest) < 40
    np.testing.assert_array_equal(forest, part_forest(pairs))
