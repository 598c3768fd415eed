from functools import reduce

import numpy as np
import pytest

from curation.dedup import DedupConfig, best_rows, histogram_text, merge_best, strongest_edge


def best_by_dict(component, score, row_id):
    best = {}
    for c, s, r in zip(component.tolist(), score.tolist(), row_id.tolist(), strict=True):
        best[c] = max(best.get(c, (-(10**18), 0)), (s, -r))
    return [(c, s, -r) for c, (s, r) in sorted(best.items())]


@pytest.mark.parametrize("seed", range(30))
def test_the_best_row_of_each_component_matches_a_dict_however_it_is_cut(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 60))
    component, score = rng.integers(0, 12, n), rng.integers(-2, int(rng.choice([0, 50])), n)  # many ties, or few
    row_id = rng.permutation(1000)[:n]
    oracle = best_by_dict(component, score, row_id)
    whole = best_rows(component, score, row_id)
    assert list(zip(*(column.tolist() for column in whole), strict=True)) == oracle
    cuts = np.sort(rng.integers(0, n + 1, 3))
    pieces = [best_rows(*piece) for piece in zip(*(np.split(x, cuts) for x in (component, score, row_id)), strict=True)]
    for order in (pieces, pieces[::-1]):
        merged = reduce(merge_best, order)
        assert all(np.array_equal(a, b) for a, b in zip(merged, whole, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_strongest_edge_is_the_first_of_its_row(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 40))
    rows, similarity = np.sort(rng.integers(0, 15, n)), rng.integers(0, 5, n).astype("f4") / 4
    order = np.lexsort((-similarity, rows))
    similarity = similarity[order]
    found, first = strongest_edge(rows, similarity)
    assert found.tolist() == sorted(set(rows.tolist()))
    for row, at in zip(found, first, strict=True):
        assert rows[at] == row and similarity[at] == similarity[rows == row].max()
        assert at == 0 or rows[at - 1] != row  # a tie goes to the edge that is written first


@pytest.mark.parametrize("similarity", [[0.5, 0.6], [0.9, float("nan")]])
def test_edges_in_another_order_are_refused(similarity):
    with pytest.raises(ValueError, match="the edges of a row must stand in descending similarity"):
        strongest_edge(np.array([3, 3]), np.array(similarity, "f4"))
    assert len(strongest_edge(np.array([3, 4]), np.array([0.5, 0.6], "f4"))[0]) == 2


def test_a_histogram_has_ten_bins_and_leaves_empty_ones_out():
    similarity = np.concatenate([np.full(12, 0.5), np.full(3, 1.0)]).astype("f4")
    assert histogram_text(similarity) == "0.500-0.550: 12, 0.950-1.000: 3"
    assert histogram_text(np.zeros(0, "f4")) == "no similarities"
    assert ": 7" in histogram_text(np.full(7, 0.6, "f4"))
    narrow = np.array([0.6, np.nextafter(np.float32(0.6), np.float32(1))], "f4")
    assert histogram_text(narrow) == "0.600-0.600: 1, 0.600-0.600: 1"


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"keep": "last"}, "dedup.keep must be 'most_pixels' or 'first': got 'last'"),
        ({"max_drop_fraction": 0}, r"dedup.max_drop_fraction must be in \(0, 1\]: got 0"),
        ({"max_drop_fraction": 1.1}, r"in \(0, 1\]: got 1.1"),
        ({"max_drop_fraction": float("nan")}, r"in \(0, 1\]: got nan"),
    ],
)
def test_settings_out_of_range_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        DedupConfig(**setting)
