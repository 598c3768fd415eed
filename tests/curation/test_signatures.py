import numpy as np
import pytest

from curation import loops_bits
from curation.signatures import LARGE, Limits, directions, limits_at, signature_distances, signatures, within_limits


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


def random_rows(seed, n, width=48):
    return unit(np.random.default_rng(seed).normal(size=(n, width)))


def pairs_at(similarity, seed, n, width):
    x, y = random_rows(seed, n, width).astype("f8"), random_rows(seed + 1, n, width).astype("f8")
    y = unit(y - x * (x * y).sum(1, keepdims=True)).astype("f8")
    return x.astype("f4"), (similarity * x + np.sqrt(1 - similarity**2) * y).astype("f4")


def values_of(x, seed):
    """The coordinates as -3, -1, 1, 3."""
    y = x @ directions(x.shape[1], seed)
    large = np.abs(y) >= LARGE * np.sqrt((y.astype("f8") ** 2).mean(1, keepdims=True)).astype("f4")
    return np.where(y > 0, 1, -1) * np.where(large, 3, 1)


@pytest.mark.parametrize("width", [2, 48, 512, 700])
def test_directions_keep_lengths(width):
    turn = directions(width, 3)
    assert turn.shape == (width, 512)
    gram = turn @ turn.T if width <= 512 else turn.T @ turn
    if width <= 512:
        np.testing.assert_allclose(gram, np.eye(width), atol=1e-5)
    else:  # some of the length is lost, about the same of every row
        lengths = np.linalg.norm(random_rows(0, 500, width) @ turn, axis=1) ** 2
        assert abs(lengths.mean() - 512 / width) < 0.01


@pytest.mark.parametrize("width", [3, 48, 512, 700])
def test_distance_is_that_of_the_product_of_four_valued_coordinates(width):
    x, y = pairs_at(0.5, 1, 200, width)
    a, b = signatures(x, 7), signatures(y, 7)
    first, signs, distance = signature_distances(a, b)
    p, q = values_of(x, 7), values_of(y, 7)
    np.testing.assert_array_equal(9 * 512 - 2 * distance, (p * q).sum(1))
    np.testing.assert_array_equal(signs, ((p > 0) != (q > 0)).sum(1))
    np.testing.assert_array_equal(first, ((p > 0) != (q > 0))[:, :256].sum(1))


def test_a_seed_decides_the_bits():
    x = random_rows(0, 10)
    np.testing.assert_array_equal(signatures(x, 1), signatures(x, 1))
    assert (signatures(x, 1) != signatures(x, 2)).any()


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("width", [16, 384, 1024])
def test_hardly_a_similar_pair_is_lost_and_more_similar_ones_less(similarity, width):
    limits = limits_at(similarity, width, 0)
    lost = []
    for more in (similarity, (1 + similarity) / 2):
        a, b = (signatures(x, 0) for x in pairs_at(more, 5, 4000, width))
        lost.append(1 - within_limits(limits, a, b).mean())
    assert lost[0] < 0.03 and lost[1] < 0.002 and lost[1] <= lost[0]


def test_hardly_a_pair_that_is_not_similar_passes():
    a, b = signatures(random_rows(1, 4000, 384), 0), signatures(random_rows(2, 4000, 384), 0)
    assert within_limits(limits_at(0.6, 384, 0), a, b).mean() < 1e-3


def test_equal_rows_pass_the_strictest_test():
    x = random_rows(1, 50, 384)
    a = signatures(x, 0)
    assert within_limits(limits_at(1.0, 384, 0), a, a).all()


@pytest.mark.parametrize("n", [1, 255, 256, 700])
@pytest.mark.parametrize("within", [True, False])
def test_scan_finds_what_the_tests_let_pass(n, within):
    rng = np.random.default_rng(n)
    x = random_rows(n, n, 24)
    x[n // 2 :] = unit(x[: n - n // 2] + 0.1 * rng.normal(size=(n - n // 2, 24)))
    rows, ids = signatures(x, 0), rng.permutation(10 * n)[:n].astype(np.int64)
    queries, query_ids = (rows, ids) if within else (rows[::3].copy(), ids[::3].copy())
    limits = limits_at(0.5, 24, 0)
    most = n
    heap, filled = np.empty((len(queries), most), np.int64), np.zeros(len(queries), np.int64)
    blocks = loops_bits.signs_in_lanes(rows)
    loops_bits.scan(query_ids, queries, ids, rows, blocks, limits.array(), within, heap, filled)
    i, j = np.nonzero(query_ids[:, None] != ids)
    passed = within_limits(limits, queries[i], rows[j])
    distance = signature_distances(queries[i], rows[j])[2]
    for q in range(len(queries)):
        mine = passed & (i == q)
        expected = sorted((distance[mine] << loops_bits.ROW_BITS | ids[j[mine]]).tolist())
        assert sorted(heap[q, : filled[q]].tolist()) == expected
    assert (filled > 0).any() or n == 1


def test_a_full_heap_holds_the_lowest_keys():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 8):
        heap, filled = np.empty((1, n), np.int64), np.zeros(1, np.int64)
        keys = rng.permutation(1000)[:300]
        for key in keys:
            loops_bits.keep_lowest(heap, filled, 0, key)
        assert filled[0] == n and sorted(heap[0].tolist()) == sorted(keys.tolist())[:n] and heap[0, 0] == heap.max()


def test_limits_are_what_scan_takes():
    np.testing.assert_array_equal(Limits(1, 2, 3).array(), np.array([1, 2, 3], np.uint64))
