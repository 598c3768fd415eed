"""Inner loops that numpy has no words for, compiled by numba.

Kernels import this module inside the function that needs it, because importing numba takes a second. No loop here
depends on the number of threads or on where a row stands, and none reorders a floating-point sum.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

LOOK_AHEAD = 64  # edges; with 32 a third slower, with 128 no faster

F = TypeVar("F", bound=Callable[..., Any])


def compiled(loop: F) -> F:
    """Compile at the first call; keep the machine code on disk where a folder for it can be written."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(loop))
    except RuntimeError:  # a read-only installation: compiling again takes a second a process
        return cast(F, numba.njit(nogil=True)(loop))


@compiled
def dot(a: np.ndarray, b: np.ndarray) -> float:
    """``sum(a * b)`` of two float32 rows in float64: each product is exact, eight lanes are added in a fixed order.

    ``dot(a, b) == dot(b, a)``, and equal rows give equal bits wherever they stand in memory.
    """
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = len(a) - len(a) % 8
    for i in range(0, whole, 8):
        s0 += np.float64(a[i]) * np.float64(b[i])
        s1 += np.float64(a[i + 1]) * np.float64(b[i + 1])
        s2 += np.float64(a[i + 2]) * np.float64(b[i + 2])
        s3 += np.float64(a[i + 3]) * np.float64(b[i + 3])
        s4 += np.float64(a[i + 4]) * np.float64(b[i + 4])
        s5 += np.float64(a[i + 5]) * np.float64(b[i + 5])
        s6 += np.float64(a[i + 6]) * np.float64(b[i + 6])
        s7 += np.float64(a[i + 7]) * np.float64(b[i + 7])
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(whole, len(a)):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@compiled
def sq_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Euclidean distance of two float32 rows in float64, four lanes added in a fixed order."""
    s0 = s1 = s2 = s3 = 0.0
    whole = len(a) - len(a) % 4
    for i in range(0, whole, 4):
        d0 = np.float64(a[i]) - np.float64(b[i])
        d1 = np.float64(a[i + 1]) - np.float64(b[i + 1])
        d2 = np.float64(a[i + 2]) - np.float64(b[i + 2])
        d3 = np.float64(a[i + 3]) - np.float64(b[i + 3])
        s0 += d0 * d0
        s1 += d1 * d1
        s2 += d2 * d2
        s3 += d3 * d3
    total = (s0 + s1) + (s2 + s3)
    for i in range(whole, len(a)):
        rest = np.float64(a[i]) - np.float64(b[i])
        total += rest * rest
    return total


@compiled
def pair_dots(x: np.ndarray, y: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float32 ``dot(x[rows[i]], y[columns[i]])`` of every pair i."""
    out = np.empty(len(rows), np.float32)
    for i in range(len(rows)):
        out[i] = dot(x[rows[i]], y[columns[i]])
    return out


@compiled
def raise_best(
    best_ids: np.ndarray, best: np.ndarray, at: np.ndarray, row_ids: np.ndarray, similarity: np.ndarray
) -> None:
    """Offer ``similarity[i]`` to row ``row_ids[i]``, in any order, to place ``at[i]`` of ``best`` and ``best_ids``, in
    place; a tie stays with, or goes to, the lower row id."""
    for i in range(len(at)):
        place = at[i]
        if similarity[i] > best[place] or (similarity[i] == best[place] and row_ids[i] < best_ids[place]):
            best[place], best_ids[place] = similarity[i], row_ids[i]


@compiled
def row_sq_distances(x: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float32 squared distance of every row to the centroid it is labelled with."""
    out = np.empty(len(x), np.float32)
    for i in range(len(x)):
        out[i] = sq_distance(x[i], centroids[labels[i]])
    return out


@compiled
def settle(
    x: np.ndarray,
    centroids: np.ndarray,
    score: np.ndarray,
    floor: np.ndarray,
    first: int,
    nearest: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Where ``score[i, j]`` reaches ``floor[i]``, compare row i with centroid ``first + j`` directly.

    ``nearest`` float64 and ``labels`` of every row are updated in place; a tie stays with the lower index.
    """
    for i in range(len(x)):
        for j in range(score.shape[1]):
            if score[i, j] >= floor[i]:
                distance = sq_distance(x[i], centroids[first + j])
                if distance < nearest[i]:
                    nearest[i] = distance
                    labels[i] = first + j


@compiled
def add_rows(sums: np.ndarray, sizes: np.ndarray, x: np.ndarray, labels: np.ndarray) -> None:
    """Add every row to the float64 sum of its label, in row order, in place."""
    for i in range(len(x)):
        label = labels[i]
        sizes[label] += 1
        for j in range(x.shape[1]):
            sums[label, j] += x[i, j]


@compiled
def add_weighted_rows(
    sums: np.ndarray, sizes: np.ndarray, x: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> None:
    """``add_rows`` of rows that count as often as their weight int64 says."""
    for i in range(len(x)):
        label, weight = labels[i], np.float64(weights[i])
        sizes[label] += weights[i]
        for j in range(x.shape[1]):
            sums[label, j] += weight * np.float64(x[i, j])


@compiled
def fill_groups(labels: np.ndarray, cursor: np.ndarray, rows: np.ndarray) -> None:
    """Counting sort: put row i at ``cursor[labels[i]]`` and advance that cursor."""
    for i in range(len(labels)):
        label = labels[i]
        rows[cursor[label]] = i
        cursor[label] += 1


@compiled
def push_closest(
    heap_distance: np.ndarray,
    heap_row: np.ndarray,
    filled: np.ndarray,
    labels: np.ndarray,
    distance: np.ndarray,
    first_row: int,
) -> None:
    """Offer rows ``first_row + i``, in ascending order, to the heaps (k, size) of the closest rows of each label.
    A distance may be any number that orders rows.

    Each heap has its farthest (distance, row) on top. A row as far as the top comes later, so it stays outside.
    """
    size = heap_row.shape[1]
    for i in range(len(labels)):
        c, d, row = labels[i], distance[i], first_row + i
        if filled[c] < size:  # room left: sift up from the end; the new row is the highest of all so far
            at = filled[c]
            filled[c] += 1
            while at > 0 and heap_distance[c, (at - 1) // 2] <= d:
                heap_distance[c, at] = heap_distance[c, (at - 1) // 2]
                heap_row[c, at] = heap_row[c, (at - 1) // 2]
                at = (at - 1) // 2
        elif d < heap_distance[c, 0]:  # replaces the farthest: sift down from the top
            at = 0
            while 2 * at + 1 < size:
                child = 2 * at + 1
                right = child + 1
                if right < size and (
                    heap_distance[c, right] > heap_distance[c, child]
                    or (heap_distance[c, right] == heap_distance[c, child] and heap_row[c, right] > heap_row[c, child])
                ):
                    child = right
                if heap_distance[c, child] <= d:  # at a tie the new row is the higher one and stays above
                    break
                heap_distance[c, at] = heap_distance[c, child]
                heap_row[c, at] = heap_row[c, child]
                at = child
        else:
            continue
        heap_distance[c, at] = d
        heap_row[c, at] = row


def _prefetch(_: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Ask for ``array[index]`` before it is needed: numba has no word for the processor's instruction, LLVM has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        at = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.voidptr_t, *[cgutils.int32_t] * 3])
        call = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(call, [at, *(cgutils.int32_t(flag) for flag in (0, 3, 1))])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


prefetch: Any = intrinsic(_prefetch)  # of any index: the processor drops what is not there


@compiled
def link(parent: np.ndarray, a: np.ndarray, b: np.ndarray, low: int) -> int:
    """Union-find over edges (a[i], b[i]) by Rem's algorithm with splicing; row ``low`` stands at ``parent[0]``.

    ``parent[i] <= i`` always holds. Both ends climb towards their roots, always the one with the higher parent, and
    hang on that of the other: an edge inside a component that is flat costs one look at each end. Returns -1, or the
    first edge that leaves the rows of ``parent``: those after it are not linked.
    """
    n_rows = np.uint64(len(parent))
    for i in range(len(a)):
        ahead = min(i + LOOK_AHEAD, len(a) - 1)  # the parents of an edge are far apart, most of them in no cache
        prefetch(parent, np.int64(a[ahead]) - low)
        prefetch(parent, np.int64(b[ahead]) - low)
        x, y = np.int64(a[i]) - low, np.int64(b[i]) - low
        if np.uint64(x) >= n_rows or np.uint64(y) >= n_rows:  # below 0 counts as very high
            return i
        up_x, up_y = parent[x], parent[y]
        while up_x != up_y:
            if up_x > up_y:
                x, y = y, x
                up_x, up_y = up_y, up_x
            parent[y] = up_x
            if y == up_y:
                break
            y = np.int64(up_y)
            up_y = parent[y]
    return -1


@compiled
def flatten(parent: np.ndarray) -> None:
    """Point every row at its root, in place; one pass is enough because parents come before children."""
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]


@compiled
def lower(minima: np.ndarray, a: np.ndarray, b: np.ndarray, low: int) -> None:
    """``minima[a[i] - low] = min(minima[a[i] - low], b[i])`` for every i, in place."""
    for i in range(len(a)):
        minima[a[i] - low] = min(minima[a[i] - low], b[i])


@compiled
def take_turns(lists: np.ndarray, starts: np.ndarray, mask: np.ndarray, target: int, owner: np.ndarray) -> None:
    """Let pools take rows in turns until ``target`` are taken; ``owner[row]``, -1 at first, becomes who took it.

    Pool p wants ``lists[starts[p]:starts[p + 1]]``, in this order. Whoever has the fewest rows takes next, ties to the
    lower pool; a taken row counts for every pool whose bit is in ``mask[row]``. One look at each entry of the lists
    and, for each taken row, at each pool.
    """
    n_pools = len(starts) - 1
    cursor = starts[:-1].copy()
    counts = np.zeros(n_pools, np.int64)
    n_taken = 0
    while n_taken < target:
        turn = -1
        for p in range(n_pools):
            if cursor[p] < starts[p + 1] and (turn < 0 or counts[p] < counts[turn]):
                turn = p
        if turn < 0:
            return
        while cursor[turn] < starts[turn + 1] and owner[lists[cursor[turn]]] >= 0:
            cursor[turn] += 1
        if cursor[turn] == starts[turn + 1]:
            continue
        row = lists[cursor[turn]]
        owner[row] = turn
        n_taken += 1
        for p in range(n_pools):
            counts[p] += (mask[row] >> p) & 1
