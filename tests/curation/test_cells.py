from math import comb

import numpy as np
import pytest

from curation import cells, loops_bits
from curation.cells import (
    Rows,
    allowed_misses,
    cells_for,
    near_in_cell,
    nearest_cells,
    needed_nprobe,
    plan_pieces,
    recall_at,
    train_centroids,
)
from curation.signatures import limits_at, signature_distances, signatures, within_limits


def random_rows(seed, n, width=16):
    x = np.random.default_rng(seed).normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


@pytest.mark.parametrize("seed", range(5))
def test_first_shared_cell_is_that_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    n_cells, m = 30, int(rng.integers(1, 12))
    a, b = (np.argsort(rng.random((200, n_cells)), axis=1)[:, :m].astype(np.int32) for _ in range(2))
    expected = [next((p for p in range(1, m + 1) if set(x[:p]) & set(y[:p])), 0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(loops_bits.first_shared(a, b, n_cells), expected)
    assert m == 1 or 0 in expected or len(set(expected)) > 1


@pytest.mark.parametrize("n", [0, 10, 298, 299, 512, 1000])
@pytest.mark.parametrize("recall", [0.5, 0.99, 1.0])
def test_allowed_misses_make_the_recall_sure(n, recall):
    """The chance of so few misses or fewer is at most 5 % when the true recall is just ``recall``; of one more, not."""

    def chance(misses):
        share = 1 - recall
        return sum(comb(n, m) * share**m * recall ** (n - m) for m in range(misses + 1))

    misses = allowed_misses(n, recall)
    assert misses >= -1
    if misses >= 0:
        assert chance(misses) <= 0.05
    assert chance(misses + 1) > 0.05
    assert (allowed_misses(298, 0.99), allowed_misses(299, 0.99)) == (-1, 0)  # .99 ** 299 < .05


def test_needed_nprobe():
    needed = np.array([3, 1, 0, 7, 7])
    assert [needed_nprobe(needed, m) for m in range(6)] == [None, 7, 7, 3, 1, 1]
    assert recall_at(needed, 3) == 0.4 and recall_at(needed, 7) == 0.8 and recall_at(needed[:0], 3) is None


def test_cells_of_a_pool():
    for n in (1, 7, 8, 100, 5000, 60_000, 10**6, 10**9):
        nlist = cells_for(n)
        assert nlist & (nlist - 1) == 0 and 1 <= nlist <= max(1, n // cells.MIN_ROWS_PER_CELL)
        assert nlist <= cells.MAX_CELLS
    assert cells_for(10**6) == 2048 and cells_for(10**9) == cells.MAX_CELLS


@pytest.mark.parametrize("seed", range(20))
def test_pieces_cover_every_row_once_and_hold_no_more_than_they_may(seed, monkeypatch):
    monkeypatch.setattr(cells, "GROUP_ROWS", 100)
    rng = np.random.default_rng(seed)
    sizes = (rng.pareto(0.7, 40) * 10).astype(np.int64)
    sizes[rng.random(40) < 0.3] = 0
    pieces = plan_pieces(sizes, 30)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    covered = [np.zeros(size, int) for size in sizes]
    for piece in pieces:
        if piece.begin is None:
            assert sizes[piece.first : piece.last].sum() <= 100
            for cell in range(piece.first, piece.last):
                covered[cell] += 1
        else:
            assert piece.last == piece.first + 1
            covered[piece.first][piece.begin : piece.begin + 30] += 1
    assert all((c == 1).all() for c in covered)
    assert (sizes > 100).any() == any(piece.begin is not None for piece in pieces)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("most", [1, 3, 400])
def test_near_in_cell_is_the_nearest_by_distance(sliced, most, monkeypatch):
    monkeypatch.setattr(cells, "CHUNK_PAIRS", 900)
    rng = np.random.default_rng(most)
    x = np.repeat(random_rows(3, 60), 5, axis=0)
    x = (x + 0.05 * rng.normal(size=x.shape)).astype("f4")
    rows = Rows(rng.permutation(5000)[:300].astype(np.int64), signatures(x, 0))
    limits = limits_at(0.7, 16, 0)
    base = list(rows.slices(70)) if sliced else [rows]
    found = set()
    for queries in base:
        for near in near_in_cell(queries, base, limits, most):
            found |= set(zip(*(a.tolist() for a in near), strict=True))
    expected = set()
    for i in range(300):
        other = np.flatnonzero(np.arange(300) != i)
        a, b = np.repeat(rows.signatures[i : i + 1], 299, 0), rows.signatures[other]
        other, a, b = (v[within_limits(limits, a, b)] for v in (other, a, b))
        near = sorted(zip(signature_distances(a, b)[2].tolist(), rows.ids[other].tolist(), strict=True))[:most]
        expected |= {(int(rows.ids[i]), row, distance) for distance, row in near}
    assert found == expected and len(expected) > 250


def test_quantizer_has_unit_centroids_and_needs_a_row_for_each():
    x = random_rows(0, 500)
    centroids = train_centroids(x, 32, 5)
    assert centroids.shape == (32, 16) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(centroids, train_centroids(x, 32, 5))
    assert (centroids != train_centroids(x, 32, 6)).any()
    near = nearest_cells(x, centroids, 32)
    order = np.argsort(-(x.astype("f8") @ centroids.T.astype("f8")), axis=1)
    assert (near == order).mean() > 0.999 and near.dtype == np.int32
    with pytest.raises(ValueError, match="501 cells need at least as many rows: got 500"):
        train_centroids(x, 501, 0)
