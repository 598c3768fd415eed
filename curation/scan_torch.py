"""The scan of a cell by matrix products, for a GPU: what ``cells.near_in_cell`` finds, pair for pair.

A signature is 512 coordinates of -3, -1, 1 or 3, and the product of two of them 9 * 512 - 2 * distance
(``curation.signatures``). Products of int8 are summed as int32, so the distances are exact on every device. They are
made in tiles of TILE_ROWS x TILE_ROWS; the few pairs of a tile that are near enough are tested for their signs, bit by
bit, and kept by the rows they are near to.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from curation.cells import Near, Rows
from curation.finders import check_device, on_device
from curation.signatures import COORDINATES, Limits

TILE_ROWS = 8192  # rows of a tile, at most
PADDED = 32  # rows of a tile are a multiple of it: products of int8 on a GPU take 17 at least, and multiples of 8
TESTED_PAIRS = 2**22  # pairs whose signs are compared at once
WAITING_PAIRS = 2**22  # pairs that a tile keeps beyond the nearest of its rows
SIGN_WORDS = 8  # of a signature
FIRST_WORDS = 4  # of them
ROW_BITS = 50  # of a key: the distance stands above the row id


def near_in_cell(queries: Rows, base: Iterable[Rows], limits: Limits, most: int, device: str) -> Iterator[Near]:
    """As ``cells.near_in_cell``, by torch on a device ("cpu", "cuda"): the rows of a cell whose signatures are near
    those of the queries, at most ``most`` of each: the nearest, ties to the lowest id.

    Yields the pairs of a tile of queries after those of another, for each query the nearest first. The device holds
    650 bytes for each query and each row of what ``base`` yields, 16 * most bytes a query, and for two tiles 5 for
    each of their 2 ** 26 pairs and some 130 for each that is near.
    Raises ValueError where there is no such device.
    """
    check_device(device)
    mine = tiles_of(queries, device)
    for rows in base:
        compare(mine, mine if rows is queries else tiles_of(rows, device), limits, most)
    for tile in mine:
        query_ids, row_ids, distances = (column.cpu().numpy() for column in tile.nearest(most))
        yield query_ids, row_ids, distances


def tiles_of(rows: Rows, device: str) -> list["Tile"]:
    """Rows on a device, in tiles."""
    tiles = []
    for start in range(0, len(rows.ids), TILE_ROWS):
        ids, signatures = (on_device(some[start : start + TILE_ROWS].view(np.int64), device) for some in rows)
        tiles.append(Tile(ids, signatures))
    return tiles


def compare(mine: Sequence["Tile"], others: Sequence["Tile"], limits: Limits, most: int) -> None:
    """Have ``mine`` keep what is near among ``others``; where these are the same, each two tiles meet once."""
    if others is mine:
        for a, b in combinations_with_replacement(mine, 2):
            position, column, distance = near_pairs(a, b, limits)
            a.keep(position, b.ids[column], distance, most)
            if a is not b:
                b.keep(column, a.ids[position], distance, most)
        return
    for b in others:
        for a in mine:
            position, column, distance = near_pairs(a, b, limits)
            a.keep(position, b.ids[column], distance, most)


class Tile:
    """Some rows of a cell, on a device, and what was found near them so far.

    ids: int64 (n,). signatures: int64 (n, 16), the bits of ``curation.signatures``.
    """

    def __init__(self, ids: Any, signatures: Any) -> None:
        import torch

        self.ids, self.signs = ids, signatures[:, :SIGN_WORDS].contiguous()
        self.coordinates = coordinates(signatures)
        self.reach = torch.full_like(ids, 9 * COORDINATES)  # distance from which on nothing is new to a row
        self.position, self.key = torch.empty_like(ids[:0]), torch.empty_like(ids[:0])
        self.waiting: list[tuple[Any, Any]] = []
        self.n_waiting = 0

    def keep(self, position: Any, row_ids: Any, distance: Any, most: int) -> None:
        """Offer rows at a distance to those at ``position``; int64 (p,) each."""
        new = (distance <= self.reach[position]).nonzero()[:, 0]
        if not len(new):
            return
        self.waiting.append((position[new], (distance[new] << ROW_BITS) | row_ids[new]))
        self.n_waiting += len(new)
        if self.n_waiting > WAITING_PAIRS:
            self.settle(most)

    def settle(self, most: int) -> None:
        """Keep the ``most`` lowest keys of each row."""
        import torch

        position, key = (torch.cat(column) for column in zip((self.position, self.key), *self.waiting, strict=True))
        order = key.argsort()
        order = order[position[order].argsort(stable=True)]
        position, key = position[order], key[order]
        rank = torch.arange(len(key), device=key.device) - torch.searchsorted(position, position)
        stays = (rank < most).nonzero()[:, 0]
        last = (rank == most - 1).nonzero()[:, 0]
        self.reach[position[last]] = key[last] >> ROW_BITS
        self.position, self.key = position[stays], key[stays]
        self.waiting, self.n_waiting = [], 0

    def nearest(self, most: int) -> tuple[Any, Any, Any]:
        """(row of the tile, row near it, distance), int64 (m,) each: the ids of rows, the nearest first for each."""
        self.settle(most)
        return self.ids[self.position], self.key & ((1 << ROW_BITS) - 1), self.key >> ROW_BITS


def coordinates(signatures: Any) -> Any:
    """int8 (n, 512) of signatures int64 (n, 16), and rows of zeros up to a multiple of PADDED.

    Where a coordinate stands is the same in all rows, but need not be where it stood before it was packed.
    """
    import torch

    n = len(signatures)
    shifts = torch.arange(8, dtype=torch.uint8, device=signatures.device)
    bits = (signatures.view(torch.uint8)[:, :, None] >> shifts).bitwise_and_(1).view(n, 2 * COORDINATES)
    out = torch.zeros(-(-n // PADDED) * PADDED, COORDINATES, dtype=torch.int8, device=signatures.device)
    out[:n] = 4 * bits[:, :COORDINATES] + 2 * bits[:, COORDINATES:]
    out[:n] -= 3
    return out


def near_pairs(a: Tile, b: Tile, limits: Limits) -> tuple[Any, Any, Any]:
    """(position in a, position in b, distance), int64 (p,) each, of the pairs of different rows that pass all tests."""
    import torch

    products = torch._int_mm(a.coordinates, b.coordinates.T)[: len(a.ids), : len(b.ids)]
    position, column = (products >= 9 * COORDINATES - 2 * limits.distance).nonzero(as_tuple=True)
    passed = []
    for start in range(0, len(position), TESTED_PAIRS):
        i, j = position[start : start + TESTED_PAIRS], column[start : start + TESTED_PAIRS]
        differ = bits_set(a.signs[i] ^ b.signs[j])
        first, signs = differ[:, :FIRST_WORDS].sum(dim=1), differ.sum(dim=1)
        good = (first <= limits.first_signs) & (signs <= limits.signs) & (a.ids[i] != b.ids[j])
        passed.append(good.nonzero()[:, 0] + start)
    stays = torch.cat(passed) if passed else position
    position, column = position[stays], column[stays]
    return position, column, (9 * COORDINATES - products[position, column].long()) // 2


def bits_set(words: Any) -> Any:
    """int64 of the shape of int64 ``words``: how many bits of each are set. Neighbouring counts are added, in pairs of
    bits, in fours, in bytes; a product adds the bytes."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56
