"""The inner loops of k-means: a float32 product of packed rows and centroids that leaves the best two scores of every
row, and nothing else, in memory. Compiled by numba, and imported inside the function that needs them, as ``loops``.

Rows are packed in panels of ROWS, centroids in tiles of COLUMNS, both with the width outermost: the scores of a panel
and a tile stay in the registers of the processor from the first product to the comparison. A score is summed in the
order of the width, wherever its row stands, so no bit depends on how rows are cut.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from curation.loops import compiled, sq_distance

# As many scores as registers hold beside a row's lanes: 32 registers of 16 lanes, or 16 of 8.
LANES, COLUMNS = (16, 12) if "+avx512f" in get_host_cpu_features().split(",") else (8, 6)
ROWS = 2 * LANES
PANELS, TILES = 4, 8  # that meet before others come: at a width of 384 both stay in 1 MiB of level-2 cache
STRIP = 16  # values of a row packed at a time: a cache line

_ir = cgutils.ir


def _scan_tile(
    _: Any, x: Any, tiles: Any, half: Any, best: Any, second: Any, labels: Any,
    x_at: Any, tile_at: Any, row_at: Any, column_at: Any, width: Any,
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """Compare the rows of a panel with the centroids of a tile, in vectors of LLVM: numba keeps no array in registers.

    ``x_at`` and so on: where the panel, the tile, the rows of ``best`` and the columns of ``half`` begin. LLVM fuses a
    product with its addition where the processor can.
    """
    floats, ints = (_ir.VectorType(kind, LANES) for kind in (_ir.FloatType(), _ir.IntType(32)))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = zip(signature.args[:6], args[:6], strict=True)
        x, tiles, half, best, second, labels = (
            context.make_array(kind)(context, builder, a).data for kind, a in arrays
        )
        x_at, tile_at, row_at, column_at, width = args[6:]
        sums = [[cgutils.alloca_once(builder, floats) for _ in range(2)] for _ in range(COLUMNS)]
        for total in itertools.chain(*sums):
            builder.store(_ir.Constant(floats, [0.0] * LANES), total)
        with cgutils.for_range(builder, width) as loop:
            here = builder.add(x_at, builder.mul(loop.index, _int(ROWS)))
            rows = [_load(builder, x, here, floats, part * LANES) for part in range(2)]
            here = builder.add(tile_at, builder.mul(loop.index, _int(COLUMNS)))
            for c in range(COLUMNS):
                value = _spread(builder, _at(builder, tiles, here, c), floats)
                for total, row in zip(sums[c], rows, strict=True):
                    product = builder.fmul(row, value, flags=["contract"])
                    builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
        for part in range(2):
            top, runner = (_load(builder, array, row_at, floats, part * LANES) for array in (best, second))
            label = _load(builder, labels, row_at, ints, part * LANES)
            for c in range(COLUMNS):
                below = _spread(builder, _at(builder, half, column_at, c), floats)
                score = builder.fsub(builder.load(sums[c][part]), below)
                higher = builder.fcmp_ordered(">", score, top)
                loser = builder.select(higher, top, score)
                runner = builder.select(builder.fcmp_ordered(">", loser, runner), loser, runner)
                index = builder.trunc(builder.add(column_at, _int(c)), _ir.IntType(32))
                label = builder.select(higher, _spread(builder, index, ints), label)
                top = builder.select(higher, score, top)
            for array, value in ((best, top), (second, runner), (labels, label)):
                _store(builder, array, row_at, value, part * LANES)
        return context.get_dummy_value()

    kinds = (x, tiles, half, best, second, labels)
    return types.void(*kinds, *[types.intp] * 5), generate


def _int(value: int) -> Any:
    return _ir.Constant(_ir.IntType(64), value)


def _at(builder: Any, array: Any, index: Any, offset: int) -> Any:
    return builder.load(builder.gep(array, [builder.add(index, _int(offset))]))


def _place(builder: Any, array: Any, index: Any, kind: Any, offset: int) -> Any:
    return builder.bitcast(builder.gep(array, [builder.add(index, _int(offset))]), kind.as_pointer())


def _load(builder: Any, array: Any, index: Any, kind: Any, offset: int) -> Any:
    value = builder.load(_place(builder, array, index, kind, offset))
    value.align = 4  # numpy promises no more
    return value


def _store(builder: Any, array: Any, index: Any, value: Any, offset: int) -> None:
    builder.store(value, _place(builder, array, index, value.type, offset)).align = 4


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """The value in all lanes."""
    nothing = _ir.Constant(kind, _ir.Undefined)
    one = builder.insert_element(nothing, value, _ir.Constant(_ir.IntType(32), 0))
    return builder.shuffle_vector(one, nothing, _ir.Constant(_ir.VectorType(_ir.IntType(32), LANES), [0] * LANES))


scan_tile: Any = intrinsic(_scan_tile)


@compiled
def best_two(
    x: np.ndarray,
    tiles: np.ndarray,
    half: np.ndarray,
    starts: np.ndarray,
    limits: np.ndarray,
    best: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    width: int,
) -> None:
    """Raise ``best`` and ``second`` float32, and ``labels`` int32, to the best scores ``row . centroid - half``.

    x: packed panels, tiles: packed centroids, both float32 and flat; half: float32, one a column. The rows of panel p
    (places p * ROWS and on) meet ``limits[p]`` tiles from ``starts[p]`` on; a label is the column. Of equal scores the
    earlier wins.
    """
    n_panels = len(limits)
    for first in range(0, n_panels, PANELS):
        last = min(first + PANELS, n_panels)
        most = limits[first:last].max()
        for from_tile in range(0, most, TILES):
            for p in range(first, last):
                for t in range(from_tile, min(from_tile + TILES, limits[p])):
                    at, tile = p * width * ROWS, starts[p] + t
                    tile_at, column = tile * width * COLUMNS, tile * COLUMNS
                    scan_tile(x, tiles, half, best, second, labels, at, tile_at, p * ROWS, column, width)


@compiled
def raise_best(rows: np.ndarray, scores: np.ndarray, found: np.ndarray, best: np.ndarray, labels: np.ndarray) -> None:
    """Raise ``best`` float32 and ``labels`` int32 of rows to the scores float32 (n,) of what was found, int64 (n,);
    of equal scores the lower label stays."""
    for i in range(len(rows)):
        row = rows[i]
        if scores[i] > best[row] or (scores[i] == best[row] and found[i] < labels[row]):
            best[row], labels[row] = scores[i], found[i]


@compiled
def pack_rows(x: np.ndarray, rows: np.ndarray, shift: np.ndarray, panels: np.ndarray) -> None:
    """Fill panels float32 (n, d, ROWS) with ``x[rows] - shift``; places beyond the rows repeat the last one,
    rows below 0 are any: nobody asks for them."""
    width = x.shape[1]
    for p in range(len(panels)):
        for start in range(0, width, STRIP):
            for r in range(ROWS):
                i = max(rows[min(p * ROWS + r, len(rows) - 1)], 0)
                for j in range(start, min(start + STRIP, width)):
                    panels[p, j, r] = x[i, j] - shift[j]


@compiled
def pack_centroids(
    centroids: np.ndarray, order: np.ndarray, shift: np.ndarray, tiles: np.ndarray, half: np.ndarray, first: int
) -> None:
    """Fill tiles float32 (m, d, COLUMNS), from tile ``first`` on, with ``centroids[order] - shift``, and ``half``
    float32 with half of each squared norm: infinite where there is no centroid (an order below 0, or none), so that
    its score is the lowest."""
    for t in range(first, len(tiles)):
        for c in range(COLUMNS):
            place = t * COLUMNS + c
            if place >= len(order) or order[place] < 0:
                half[place] = np.inf
                tiles[t, :, c] = 0
                continue
            i, norm = order[place], 0.0
            for j in range(centroids.shape[1]):
                value = centroids[i, j] - shift[j]
                tiles[t, j, c] = value
                norm += np.float64(value) * np.float64(value)
            half[place] = norm / 2


@compiled
def lengths_and_scores(
    x: np.ndarray, rows: np.ndarray, shift: np.ndarray, centroids: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of ``rows``, both float64: the squared length from ``shift`` on, and the score of the centroid a row is labelled
    with, ``row . centroid - |centroid|^2 / 2``, both from ``shift`` on."""
    squares, scores = np.empty(len(rows)), np.empty(len(rows))
    for r in range(len(rows)):
        i = rows[r]
        squares[r] = sq_distance(x[i], shift)
        scores[r] = (squares[r] - sq_distance(x[i], centroids[labels[i]])) / 2
    return squares, scores


@compiled
def sq_distances_from(point: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float64 (n,): squared distances of all rows from one point."""
    out = np.empty(len(x))
    for i in range(len(x)):
        out[i] = sq_distance(x[i], point)
    return out


@compiled
def sq_distances_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 (n,): squared distance of every row of ``a`` from that row of ``b``."""
    out = np.empty(len(a))
    for i in range(len(a)):
        out[i] = sq_distance(a[i], b[i])
    return out
