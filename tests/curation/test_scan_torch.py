"""The scan by matrix products finds what the scan by bits finds."""

import numpy as np
import pytest
import torch

from curation import cells, loops_bits, scan_torch
from curation.cells import Rows
from curation.signatures import Limits, limits_at, signature_distances, signatures


def near_rows(seed, n, width=16):
    """Some rows are near others, and some have equal signatures."""
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(-(-n // 5), width)), 5, axis=0)[:n]
    x += rng.choice([0, 0.05, 0.3], (n, 1)) * rng.normal(size=x.shape)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Rows(rng.permutation(50 * n)[:n].astype(np.int64), signatures(x.astype("f4"), seed))


def in_order(found):
    """By query, distance and row."""
    query, row, distance = found
    assert query.dtype == row.dtype == distance.dtype == np.int64
    order = np.lexsort((row, distance, query))
    return np.stack([query, distance, row])[:, order]


def together(chunks):
    """All pairs that were yielded."""
    none = (np.zeros(0, np.int64),) * 3
    return tuple(np.concatenate(columns) for columns in zip(none, *chunks, strict=True))


def same(queries, base, limits, most):
    base = list(base)
    ours = together(scan_torch.near_in_cell(queries, base, limits, most, "cpu"))
    np.testing.assert_array_equal(in_order(ours), in_order(together(cells.near_in_cell(queries, base, limits, most))))
    place = {row: i for i, row in enumerate(queries.ids.tolist())}
    at = np.array([place[row] for row in ours[0].tolist()], np.int64)
    assert (np.lexsort((ours[1], ours[2], at)) == np.arange(len(at))).all(), "by query, the nearest first"
    return ours


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 3, 400])
def test_the_pairs_are_those_of_the_scan_by_bits(seed, most, monkeypatch):
    monkeypatch.setattr(scan_torch, "TILE_ROWS", [8192, 70, 33][seed % 3])
    rows = near_rows(seed, 300)
    found = same(rows, [rows], limits_at(0.7, 16, seed), most)
    assert len(found[0]) > (250 if most == 1 else 500)


@pytest.mark.parametrize("most", [2, 50])
def test_slices_of_a_cell(most, monkeypatch):
    monkeypatch.setattr(scan_torch, "TILE_ROWS", 40)
    rows, limits = near_rows(1, 301), limits_at(0.6, 16, 0)
    slices = list(rows.slices(90))
    for queries in slices:
        same(queries, slices, limits, most)  # one of them is the queries themselves
        copies = [Rows(some.ids.copy(), some.signatures.copy()) for some in slices]
        same(queries, copies, limits, most)  # rows meet themselves as others


@pytest.mark.parametrize("most", [1, 5])
def test_ties_go_to_the_lowest_id_however_often_tiles_settle(most, monkeypatch):
    monkeypatch.setattr(scan_torch, "TILE_ROWS", 32)
    monkeypatch.setattr(scan_torch, "WAITING_PAIRS", 50)
    monkeypatch.setattr(scan_torch, "TESTED_PAIRS", 37)
    rows = near_rows(2, 200)  # fives are near one another
    equal = Rows(rows.ids, np.ascontiguousarray(rows.signatures[np.arange(200) % 3 * 5]))
    query, row, _ = same(equal, [equal], limits_at(0.5, 16, 0), most)
    assert len(query) == 200 * most
    group = {int(i): sorted(rows.ids[n % 3 :: 3].tolist()) for n, i in enumerate(rows.ids)}
    lowest = [[i for i in group[q] if i != q][:most] for q in rows.ids.tolist()]
    assert row.reshape(200, most).tolist() == lowest


@pytest.mark.parametrize("limits", [Limits(256, 512, 4608), Limits(40, 512, 4608), Limits(256, 90, 4608)])
def test_every_test_counts(limits):
    """Each pair of random signatures passes where its bits say so: also those that only one test keeps out."""
    bits = np.random.default_rng(0).integers(0, 2**63, (80, 16), np.uint64)
    bits[:, :8] = np.where(np.random.default_rng(1).random((80, 8)) < 0.6, bits[:1, :8], bits[:, :8])
    rows = Rows(np.arange(80) * 3, bits)
    query, row, distance = same(rows, [rows], limits, 100)
    i, j = (found.ravel() for found in np.divmod(np.arange(6400), 80))
    told = signature_distances(bits[i], bits[j])
    passed = (i != j) & np.all([d <= most for d, most in zip(told, limits, strict=True)], axis=0)
    assert set(zip(query, row, distance, strict=True)) == set(
        zip(3 * i[passed], 3 * j[passed], told[2][passed], strict=True)
    )
    assert len(query) > 0 and (limits.signs == 512 and limits.first_signs == 256) == (len(query) == 80 * 79)


def test_the_highest_row_id_and_empty_cells():
    rows = near_rows(3, 40)
    high = Rows(rows.ids + (1 << scan_torch.ROW_BITS) - 1 - rows.ids.max(), rows.signatures)
    assert same(high, [high], limits_at(0.5, 16, 3), 4)[1].max() == (1 << scan_torch.ROW_BITS) - 1
    assert scan_torch.ROW_BITS == loops_bits.ROW_BITS
    none = Rows(rows.ids[:0], rows.signatures[:0])
    for queries, base in ((none, [none]), (none, [rows]), (rows, [none]), (rows, [])):
        assert len(same(queries, base, limits_at(0.5, 16, 3), 4)[0]) == 0


def test_coordinates_are_those_of_the_definition():
    bits = np.random.default_rng(5).integers(0, 2**63, (50, 16), np.uint64) * np.uint64(2) + np.uint64(1)
    found = scan_torch.coordinates(torch.from_numpy(bits.view(np.int64))).numpy()
    assert found.dtype == np.int8 and found.shape == (64, 512) and not found[50:].any()
    s, t = (np.unpackbits(some.view(np.uint8), axis=1, bitorder="little") for some in np.split(bits, 2, axis=1))
    s, t = (2 * some.reshape(50, 512).astype(int) - 1 for some in (np.ascontiguousarray(s), np.ascontiguousarray(t)))
    np.testing.assert_array_equal(found[:50], 2 * s + t)


def test_bits_are_counted():
    words = np.random.default_rng(0).integers(-(2**63), 2**63, 1000, np.int64)
    words[:3] = 0, -1, -(2**63)
    found = scan_torch.bits_set(torch.from_numpy(words)).numpy()
    np.testing.assert_array_equal(found, np.bitwise_count(words.view(np.uint64)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    rows = near_rows(0, 10)
    with pytest.raises(ValueError, match="device must be one that torch sees: got cuda"):
        next(scan_torch.near_in_cell(rows, [rows], limits_at(0.5, 16, 0), 3, "cuda"))
