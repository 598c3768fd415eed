from functools import reduce

import numpy as np
import pytest

from curation import dedup
from curation.dedup import (
    UNSCORED,
    DedupConfig,
    End,
    best_rows,
    count_sizes,
    count_tightness,
    distance_scores,
    drop_in_order,
    first_near,
    float_scores,
    histogram_text,
    in_order,
    merge_dropped,
    merge_groups,
    nearest_dropped,
    no_row_dropped,
    order_bounds,
    rank_edges,
    slice_of,
    split_groups,
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
        ({"keep": "last"}, "dedup.keep must be one of most_pixels, largest_file, .*, closest: got 'last'"),
        ({"max_chain": 1}, r"dedup.max_chain must be in \[0, 1\): got 1"),
        ({"max_chain": float("nan")}, r"in \[0, 1\): got nan"),
        ({"max_chain": 0.5, "rule": "greedy"}, "dedup.max_chain is for rule component: got 0.5 with greedy"),
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


def ranked(edges, similarity, score):
    """RANKED of edges between rows that differ."""
    at = np.arange(len(score))
    ends = (End(score[rows], at[rows], at[rows]) for rows in np.asarray(edges).T)
    return rank_edges(*ends, np.asarray(similarity, "f4"))


def semdedup(edges):
    return nearest_dropped(edges["home"], edges["better"], edges["similarity"])


def greedily_kept(edges, n_rows):
    """The rows that rule ``greedy`` keeps, by one slice."""
    edges = in_order(edges)
    return sorted(set(range(n_rows)) - set(edges["worse"][drop_in_order(edges, no_row_dropped(n_rows))].tolist()))


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
    pairs = np.stack([np.where(turned, i, j), np.where(turned, j, i)], axis=1)
    edges = ranked(pairs, (x @ x.T)[i, j], distance_scores(distance, farthest=True))
    some = [semdedup(edges[at]) for at in np.array_split(rng.permutation(len(edges)), 3)]
    for order in (some, some[::-1]):
        dropped = reduce(merge_dropped, order)
        assert dict(zip(dropped.row_id.tolist(), dropped.near_row.tolist(), strict=True)) == oracle


@pytest.mark.parametrize("n_slices", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", range(15))
def test_greedy_keeps_the_first_maximal_independent_set_however_the_order_is_cut(seed, n_slices):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    pairs = rng.integers(0, n, (int(rng.integers(1, 3 * n)), 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    score = rng.integers(-3, int(rng.choice([2, 50])), n)  # many ties, or few
    kept: list[int] = []
    for row in np.lexsort((np.arange(n), -score)).tolist():
        if not any({row, k} in [set(pair) for pair in pairs.tolist()] for k in kept):
            kept.append(row)
    edges = ranked(pairs, np.ones(len(pairs)), score)
    assert greedily_kept(edges, n) == sorted(kept)
    bounds = order_bounds(edges[rng.random(len(edges)) < 0.5], n_slices)
    assert len(bounds) < n_slices
    number, dropped, gone = slice_of(edges, bounds), no_row_dropped(n), set[int]()
    assert len(set(zip(edges["better"].tolist(), number.tolist(), strict=True))) == len(set(edges["better"].tolist()))
    for k in range(len(bounds) + 1):
        some = in_order(edges[number == k])
        gone |= set(some["worse"][drop_in_order(some, dropped)].tolist())
    assert sorted(set(range(n)) - gone) == sorted(kept)
    assert np.flatnonzero(np.unpackbits(dropped, bitorder="little")).tolist() == sorted(gone)


def test_slices_are_even_and_a_chain_takes_one_pass():
    n = 100_000
    score = np.random.default_rng(0).permutation(n)
    path = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    number = slice_of(ranked(path, np.ones(n - 1), score), order_bounds(ranked(path, np.ones(n - 1), score)[::7], 16))
    assert np.bincount(number, minlength=16).min() > 0.8 * n / 16
    assert greedily_kept(ranked(path, np.ones(n - 1), -np.arange(n)), n) == list(range(0, n, 2))


def test_the_rules_differ_on_a_chain():
    """a - b - c, a and c not near: one component keeps one row, the others what the order leaves."""
    chain = [[0, 1], [1, 2]]
    for score, by_semdedup, by_greedy in (
        ([3, 2, 1], [1, 2], [0, 2]),  # a stays; b goes; c goes for b, or stays because b has gone
        ([1, 3, 2], [0, 2], [1]),
        ([3, 1, 2], [1], [0, 2]),
    ):
        edges = ranked(chain, [0.9, 0.9], np.array(score))
        assert semdedup(edges).row_id.tolist() == by_semdedup
        assert greedily_kept(edges, 3) == by_greedy


def test_the_most_similar_of_several_better_rows_is_named():
    edges = ranked([[0, 3], [3, 1], [2, 3]], [0.7, 0.9, 0.9], np.array([4, 3, 2, 1]))
    assert [column.tolist() for column in semdedup(edges)[:2]] == [[3], [1]]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("block", [1, 4, 100])
def test_a_group_is_split_as_far_as_its_rows_are_near_the_first(monkeypatch, seed, block):
    monkeypatch.setattr(dedup, "SPLIT_ROWS", block)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, 3)).astype("f4")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    group, stays, oracle = np.sort(rng.integers(0, 4, 30)), list[int](), list[int]()
    for i in range(30):
        near = [k for k in stays if group[k] == group[i] and x[i] @ x[k] >= 0.6]
        oracle.append(near[0] if near else i)
        stays += [] if near else [i]
    near, similarity = split_groups(x, group, 0.6)
    assert near.tolist() == oracle
    np.testing.assert_allclose(similarity, (x * x[near]).sum(axis=1), atol=1e-6)
    near, similarity = first_near(x[20:], x[:20], 0.6)
    for i in range(10):
        some = np.flatnonzero(x[:20] @ x[20 + i] >= 0.6)
        assert near[i] == (some[0] if len(some) else -1)
        assert similarity[i] == pytest.approx(x[some[0]] @ x[20 + i] if len(some) else 0, abs=1e-6)


def test_groups_merge_to_their_sizes_and_lowest_similarities():
    row_id = np.array([5, 2, 5, 9, 5, 2])
    groups = merge_groups(row_id, np.array([1, 2, 3, 1, 1, 1]), np.array([0.9, np.nan, 0.7, 0.5, 0.8, 0.6], "f4"))
    assert groups.row_id.tolist() == [2, 5, 9] and groups.n_dropped.tolist() == [3, 5, 1]
    np.testing.assert_array_equal(groups.lowest, np.array([np.nan, 0.7, 0.5], "f4"))
    assert len(merge_groups(*(np.zeros(0, kind) for kind in ("i8", "i8", "f4"))).row_id) == 0
    assert count_sizes(np.array([2, 3, 4, 5, 8, 9, 1 << 40]))[:5].tolist() == [0, 1, 2, 2, 1]
    assert count_sizes(np.array([1 << 40]))[40] == 1
    tight = count_tightness(np.array([0.5, 0.76, 1.0000001, np.nan], "f4"), 0.5)
    assert (tight[0], tight[12], tight[-1], tight.sum()) == (1, 1, 1, 3)
    assert count_tightness(np.ones(4, "f4"), 1.0)[-1] == 4


def test_scores_keep_their_order_as_integers():
    score = np.array([-3e38, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3e38], "f4")
    whole = float_scores(score)
    assert (np.diff(whole) > 0).tolist() == (np.diff(score) > 0).tolist()
    assert whole.min() > UNSCORED and whole.dtype == np.int64


def test_distances_keep_their_order_as_scores():
    distance = np.array([0.0, 1e-30, 0.5, 0.5, 1.0, 1e30], "f4")
    assert (np.diff(distance_scores(distance, farthest=True)) >= 0).all()
    assert (distance_scores(distance, farthest=False) == -distance_scores(distance, farthest=True)).all()


@pytest.mark.parametrize(("field", "value"), [("rule", "both"), ("keep", "any")])
def test_rules_and_orders_are_known_words(field, value):
    with pytest.raises(ValueError, match=rf"dedup.{field} must be .*: got '{value}'"):
        DedupConfig(**{field: value})
