"""Inner loops over bits, compiled by numba: digests of rows, and the scan of signatures (``curation.signatures``).

As ``curation.loops``, these are imported inside the function that needs them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from curation.loops import compiled

LANES = 256  # base rows that are tested side by side: 8 words of each are 16 KiB, which the first cache holds
SIGN_WORDS = 8  # words of the signs, and as many of the magnitudes
FIRST_WORDS = 4  # words of the signs that the first test looks at
ROW_BITS = 50  # of a key: the distance stands above the row id


def _count_bits(_: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """How many bits of a word are set: numba has no word for it, LLVM has, and makes a vector of it in a loop."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.ctpop", [args[0].type]), args)

    return types.uint64(types.uint64), generate


count_bits: Any = intrinsic(_count_bits)


@compiled
def row_digests(words: np.ndarray) -> np.ndarray:
    """uint64 (n, 2): 128 bits of every row of uint16 (n, w). Equal rows have equal digests, others almost surely not.

    Two lanes of multiply and rotate over the words, mixed at the end as MurmurHash3 does. Not for secrets.
    """
    digests = np.empty((len(words), 2), np.uint64)
    for i in range(len(words)):
        a, b = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
        for j in range(words.shape[1]):
            word = np.uint64(words[i, j]) + np.uint64(1)
            a = (a ^ word) * np.uint64(0x87C37B91114253D5)
            a = (a << np.uint64(29)) | (a >> np.uint64(35))
            b = (b ^ word) * np.uint64(0x4CF5AD432745937F)
            b = (b << np.uint64(37)) | (b >> np.uint64(27))
        digests[i, 0] = mixed(a)
        digests[i, 1] = mixed(b + a)
    return digests


@compiled
def mixed(h: np.uint64) -> np.uint64:
    """Every bit of the result depends on every bit of ``h``."""
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@compiled
def pack_coordinates(y: np.ndarray, large: float) -> np.ndarray:
    """uint64 (n, 16): the signatures of rows with coordinates float32 (n, 512)."""
    packed = np.zeros((len(y), 2 * SIGN_WORDS), np.uint64)
    for i in range(len(y)):
        total = 0.0
        for j in range(y.shape[1]):
            total += np.float64(y[i, j]) * np.float64(y[i, j])
        least = np.float32(large * np.sqrt(total / y.shape[1]))
        for word in range(SIGN_WORDS):
            signs, turned = np.uint64(0), np.uint64(0)
            for bit in range(64):
                value = y[i, 64 * word + bit]
                sign = np.uint64(value > 0)
                signs |= sign << np.uint64(bit)
                turned |= (sign ^ np.uint64(abs(value) < least)) << np.uint64(bit)
            packed[i, word], packed[i, word + SIGN_WORDS] = signs, turned
    return packed


@compiled
def signs_in_lanes(rows: np.ndarray) -> np.ndarray:
    """uint64 (blocks, 8, LANES): the signs of signatures (n, 16), word by word, so that LANES rows lie side by side."""
    blocks = np.zeros((-(-len(rows) // LANES), SIGN_WORDS, LANES), np.uint64)
    for i in range(len(rows)):
        for word in range(SIGN_WORDS):
            blocks[i // LANES, word, i % LANES] = rows[i, word]
    return blocks


@compiled
def first_signs_apart(a: np.ndarray, i: int, b: np.ndarray, j: int) -> np.uint64:
    """How many of the first signs of two signatures differ."""
    bits = np.uint64(0)
    for word in range(FIRST_WORDS):
        bits += count_bits(a[i, word] ^ b[j, word])
    return bits


@compiled
def distance(a: np.ndarray, i: int, b: np.ndarray, j: int, signs_apart: np.uint64) -> np.uint64:
    """The distance of two signatures, see ``curation.signatures``, when it is known how many signs differ."""
    crossed = np.uint64(0)
    magnitudes = np.uint64(0)
    for word in range(SIGN_WORDS):
        crossed += count_bits(a[i, word] ^ b[j, word + SIGN_WORDS]) + count_bits(a[i, word + SIGN_WORDS] ^ b[j, word])
        magnitudes += count_bits(a[i, word + SIGN_WORDS] ^ b[j, word + SIGN_WORDS])
    return np.uint64(4) * signs_apart + np.uint64(2) * crossed + magnitudes


@compiled
def keep_lowest(heap: np.ndarray, filled: np.ndarray, row: int, key: np.int64) -> None:
    """Offer a key to the heap of a row, heap int64 (n, most), which holds its lowest keys with the highest on top."""
    size = heap.shape[1]
    at = filled[row]
    if at < size:  # room left: sift up
        filled[row] += 1
        while at > 0 and heap[row, (at - 1) // 2] < key:
            heap[row, at] = heap[row, (at - 1) // 2]
            at = (at - 1) // 2
        heap[row, at] = key
        return
    if key >= heap[row, 0]:
        return
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and heap[row, child + 1] > heap[row, child]:
            child += 1
        if heap[row, child] <= key:
            break
        heap[row, at] = heap[row, child]
        at = child
    heap[row, at] = key


@compiled
def scan(
    query_ids: np.ndarray, queries: np.ndarray, row_ids: np.ndarray, rows: np.ndarray, blocks: np.ndarray,
    most: np.ndarray, within: bool, heap: np.ndarray, filled: np.ndarray,
) -> None:  # fmt: skip
    """Offer every row near a query to the heap of the query: key ``distance << ROW_BITS | row id``.

    queries (n, 16) and rows (m, 16): signatures, with their int64 ids; ``blocks`` the signs of rows in lanes; ``most``
    uint64 (3,) what each test lets pass. A query is not near itself. ``within``: the queries are the rows, each pair
    is tested once and offered to the heaps of both. A block is done where no row of it passes a test.
    """
    most_first, most_signs, most_distance = most[0], most[1], most[2]
    apart, lanes = np.empty(LANES, np.uint64), np.empty(LANES + 1, np.int64)
    for b in range(len(blocks)):
        start, end = b * LANES, min((b + 1) * LANES, len(rows))
        b0, b1, b2, b3 = blocks[b, 0], blocks[b, 1], blocks[b, 2], blocks[b, 3]  # not inside: these are objects
        b4, b5, b6, b7 = blocks[b, 4], blocks[b, 5], blocks[b, 6], blocks[b, 7]
        for i in range(start + 1 if within else 0, len(queries)):
            width = min(i, end) - start if within else end - start
            q0, q1, q2, q3 = queries[i, 0], queries[i, 1], queries[i, 2], queries[i, 3]
            lowest = np.uint64(64 * SIGN_WORDS)
            for j in range(width):
                bits = count_bits(q0 ^ b0[j]) + count_bits(q1 ^ b1[j]) + count_bits(q2 ^ b2[j]) + count_bits(q3 ^ b3[j])
                apart[j] = bits
                lowest = min(lowest, bits)
            if lowest > most_first:
                continue
            q0, q1, q2, q3 = queries[i, 4], queries[i, 5], queries[i, 6], queries[i, 7]
            lowest = np.uint64(64 * SIGN_WORDS)
            for j in range(width):
                bits = count_bits(q0 ^ b4[j]) + count_bits(q1 ^ b5[j]) + count_bits(q2 ^ b6[j]) + count_bits(q3 ^ b7[j])
                apart[j] += bits
                lowest = min(lowest, apart[j])
            if lowest > most_signs:
                continue
            n = 0
            for j in range(width):  # without a branch: which rows pass cannot be foreseen
                lanes[n] = j
                n += apart[j] <= most_signs
            for k in range(n):
                j = start + lanes[k]
                d = distance(queries, i, rows, j, apart[lanes[k]])
                if d > most_distance or query_ids[i] == row_ids[j]:
                    continue
                if first_signs_apart(queries, i, rows, j) > most_first:  # it stood beside one that passed
                    continue
                above = np.int64(d) << ROW_BITS
                keep_lowest(heap, filled, i, above | row_ids[j])
                if within:
                    keep_lowest(heap, filled, j, above | query_ids[i])


@compiled
def first_shared(a: np.ndarray, b: np.ndarray, n_cells: int) -> np.ndarray:
    """int32 (n,): how many cells of both rows of a pair must be looked at until they share one, 0 where they never do.

    a and b: int32 (n, m), the cells of each row, the nearest first.
    """
    place = np.full(n_cells, -1, np.int32)
    needed = np.zeros(len(a), np.int32)
    for i in range(len(a)):
        for j in range(a.shape[1]):
            place[a[i, j]] = j
        best = np.int32(a.shape[1])
        for j in range(b.shape[1]):
            if place[b[i, j]] >= 0:
                best = min(best, max(np.int32(j), place[b[i, j]]))
        needed[i] = best + 1 if best < a.shape[1] else 0
        for j in range(a.shape[1]):
            place[a[i, j]] = -1
    return needed
