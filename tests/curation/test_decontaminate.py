import numpy as np
import pytest

from curation import decontaminate, neighbors
from curation.components import part_forest
from curation.decontaminate import (
    DecontaminateConfig,
    edge_records,
    forest_of_pairs,
    is_among,
    merge_both_ways,
    near_pairs,
    similarity_bins,
    strongest_from,
)
from curation.neighbors import Neighbors


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("field", ["min_similarity", "max_drop_fraction"])
def test_shares_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"decontaminate.{field} must be in \(0, 1\]: got {value}"):
        DecontaminateConfig(**{"reference": "exam", "min_similarity": 0.45, field: value})


def test_a_threshold_has_no_default():
    with pytest.raises(TypeError, match="min_similarity"):
        DecontaminateConfig(reference="exam")
    assert DecontaminateConfig(reference="exam", min_similarity=1).max_drop_fraction == 0.5


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"decontaminate.mode must be 'direct' or 'component': got 'all'"):
        DecontaminateConfig(reference="exam", min_similarity=0.5, mode="all")
    assert DecontaminateConfig(reference="exam", min_similarity=0.5).mode == "direct"


@pytest.mark.parametrize("nothing", ["", (), ("exam", "")])
def test_a_reference_must_be_named(nothing):
    with pytest.raises(ValueError, match=r"decontaminate.reference must name at least one step: got "):
        DecontaminateConfig(reference=nothing, min_similarity=0.5)
    assert DecontaminateConfig(reference="exam", min_similarity=1).references == ("exam",)


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


@pytest.mark.parametrize("seed", range(20))
def test_a_search_both_ways_finds_the_nearest_of_rows_and_of_columns(seed, monkeypatch):
    """In blocks of any order and cut, with many ties. The oracle takes the sums apart from a matrix product."""
    monkeypatch.setattr(decontaminate, "TILE_ROWS", 1 + seed)
    monkeypatch.setattr(decontaminate, "TILE_COLUMNS", 1 + 3 * (seed % 5))
    rng = np.random.default_rng(seed)
    x, y = unit_rows(rng, int(rng.integers(1, 40))), unit_rows(rng, int(rng.integers(1, 40)))
    y[: len(x) : 3] = x[: len(y) : 3][: len(y[: len(x) : 3])]
    exact = (x[:, None].astype("f8") * y[None].astype("f8")).sum(2).astype("f4")
    of_y = Neighbors.none_yet(len(y), 1)
    for start in [7, 0] if len(x) > 7 else [0]:
        some = slice(start, start + 7 if start == 0 and len(x) > 7 else None)
        of_x = Neighbors.none_yet(len(x[some]), 1)
        for piece in np.array_split(rng.permutation(len(y)), 3):
            cut = np.sort(piece)
            part = Neighbors(of_y.row_ids[cut], of_y.similarity[cut])
            of_x, part = merge_both_ways(x[some], y[cut], np.arange(len(x))[some], cut, of_x, part)
            of_y.row_ids[cut], of_y.similarity[cut] = part
        assert of_x.row_ids[:, 0].tolist() == exact[some].argmax(1).tolist()  # of equals the first
        assert of_x.similarity[:, 0].tolist() == exact[some].max(1).tolist()
    assert of_y.row_ids[:, 0].tolist() == exact.argmax(0).tolist()
    assert of_y.similarity[:, 0].tolist() == exact.max(0).tolist()


def test_a_search_both_ways_refuses_rows_that_are_not_unit_and_widths_that_differ():
    x, none = np.eye(3, dtype="f4"), Neighbors.none_yet(3, 1)
    with pytest.raises(ValueError, match=r"base must have unit rows: 1 of 3 do not, first row 1 has norm 2"):
        merge_both_ways(x, np.diag([1, 2, 1]).astype("f4"), np.arange(3), np.arange(3), none, none)
    with pytest.raises(ValueError, match=r"x and base must have one width: got \(3, 3\) and \(3, 4\)"):
        merge_both_ways(x, np.eye(3, 4, dtype="f4"), np.arange(3), np.arange(3), none, none)


def test_a_threshold_of_two_digits_begins_a_bin():
    for percent in range(1, 100):
        low = np.float32(percent / 100)
        bins = similarity_bins(np.array([low, np.nextafter(low, np.float32(0))]))
        assert np.flatnonzero(bins).tolist() == [percent - 1, percent]
    ends = similarity_bins(np.array([-1, 0, 1, 1.0000001], "f4"))
    assert (ends[0], ends[-1], ends.sum(), len(ends)) == (2, 2, 4, 100)
