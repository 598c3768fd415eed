from functools import reduce

import numpy as np
import pytest

from curation.dedup import (
    DedupConfig,
    best_rows,
    distance_scores,
    histogram_text,
    merge_dropped,
    near_earlier,
    strongest_edge,
)


def best_by_dict(component, score, row_id):
    best = {}
    for c, s, r in zip(component.tolist(), score.tolist(), row_id.tolist(), strict=True):
        best[c] = max(best.get(c, (-(10**18), 0)), (s, -r))
    return [(c, s, -r) for c, (s, r) in sorted(best.items())]


@pytest.mark.parametrize("seed", range(30))
def test_the_best_row_of_each_component_matches_a_dict(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 60))
    component, score = rng.integers(0, 12, n), rng.integers(-2, int(rng.choice([0, 50])), n)  # many ties, or few
    row_id = rng.permutation(1000)[:n]
    oracle = best_by_dict(component, score, row_id)
    whole = best_rows(component, score, row_id)
    assert list(zip(*(column.tolist() for column in whole), strict=True)) == oracle


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
        ({"keep": "last"}, "dedup.keep must be one of most_pixels, first, farthest, closest: got 'last'"),
        ({"max_drop_fraction": 0}, r"dedup.max_drop_fraction must be in \(0, 1\]: got 0"),
        ({"max_drop_fraction": 1.1}, r"in \(0, 1\]: got 1.1"),
        ({"max_drop_fraction": float("nan")}, r"in \(0, 1\]: got nan"),
    ],
)
def test_settings_out_of_range_are_named(setting, words):
    with pytest.raises(ValueError, match=words):
        DedupConfig(**setting)


def semdedup_by_definition(x, distance, threshold):
    """Algorithm 1 of the paper: order by falling distance; j goes when its largest cosine to an earlier i is enough."""
    order = sorted(range(len(x)), key=lambda i: (-distance[i], i))
    similarity = x @ x.T
    gone = {}
    for place, j in enumerate(order):
        earlier = order[:place]
        near = [i for i in earlier if similarity[i, j] >= threshold]
        if near:
            gone[j] = max(near, key=lambda i: (similarity[i, j], -i))
    return gone


@pytest.mark.parametrize("seed", range(20))
def test_semdedup_is_its_definition_however_the_edges_are_cut(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    x = rng.normal(size=(n, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = rng.choice([0.0, 0.5, 1.5, 2.0], n).astype("f4")  # with ties
    oracle = semdedup_by_definition(x, distance, 0.8)
    i, j = np.nonzero(np.triu(x @ x.T >= 0.8, 1))
    turned = rng.random(len(i)) < 0.5  # an edge may be known from one side alone
    edges = np.stack([np.where(turned, i, j), np.where(turned, j, i)], axis=1)
    similarity = (x @ x.T)[i, j].astype("f4")
    touched = np.unique(edges)
    score = distance_scores(distance, farthest=True)[touched]
    pieces = np.array_split(rng.permutation(len(edges)), 3)
    some = [near_earlier(edges[at], similarity[at], touched, score) for at in pieces]
    for order in (some, some[::-1]):
        dropped = reduce(merge_dropped, order)
        assert dict(zip(dropped.row_id.tolist(), dropped.near_row.tolist(), strict=True)) == oracle


def test_the_rules_differ_on_a_chain():
    """a - b - c, a and c not near: one component keeps one row, semdedup what nothing before it is near to."""
    edges, similarity, rows = np.array([[0, 1], [1, 2]]), np.array([0.9, 0.9], "f4"), np.arange(3)
    assert near_earlier(edges, similarity, rows, np.array([3, 2, 1])).row_id.tolist() == [1, 2]  # b goes, and c for b
    assert near_earlier(edges, similarity, rows, np.array([1, 3, 2])).row_id.tolist() == [0, 2]
    assert near_earlier(edges, similarity, rows, np.array([3, 1, 2])).row_id.tolist() == [1]


def test_distances_keep_their_order_as_scores():
    distance = np.array([0.0, 1e-30, 0.5, 0.5, 1.0, 1e30], "f4")
    assert (np.diff(distance_scores(distance, farthest=True)) >= 0).all()
    assert (distance_scores(distance, farthest=False) == -distance_scores(distance, farthest=True)).all()


@pytest.mark.parametrize(("field", "value"), [("rule", "both"), ("keep", "any")])
def test_rules_and_orders_are_known_words(field, value):
    with pytest.raises(ValueError, match=rf"dedup.{field} must be .*: got '{value}'"):
        DedupConfig(**{field: value})
