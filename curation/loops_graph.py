"""Inner loops over graphs of near rows, compiled by numba. See ``curation.loops``."""

import numpy as np

from curation.loops import compiled, dot


@compiled
def places_in_order(score: np.ndarray, row: np.ndarray, bound_score: np.ndarray, bound_row: np.ndarray) -> np.ndarray:
    """int64 (n,): how many bounds do not come after each (score, row), by falling score and then by row.

    The bounds stand in that order.
    """
    out = np.empty(len(score), np.int64)
    for i in range(len(score)):
        low, high = 0, len(bound_score)
        while low < high:
            middle = (low + high) // 2
            if bound_score[middle] > score[i] or (bound_score[middle] == score[i] and bound_row[middle] <= row[i]):
                low = middle + 1
            else:
                high = middle
        out[i] = low
    return out


@compiled
def drop_in_order(better: np.ndarray, worse: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """bool (n,): whether ``better[i]`` is not dropped; if so ``worse[i]`` is, from then on, in the bits of ``dropped``.

    Right when the edges stand in the order of their better ends: what drops a row then stands before all edges in which
    it is the better end.
    """
    stays = np.empty(len(better), np.bool_)
    for i in range(len(better)):
        stays[i] = (dropped[better[i] >> 3] >> (better[i] & 7)) & 1 == 0
        if stays[i]:
            dropped[worse[i] >> 3] |= np.uint8(1 << (worse[i] & 7))
    return stays


@compiled
def split_groups(x: np.ndarray, group: np.ndarray, low: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the first that stays of its group and is at least ``low`` similar, itself if there is none.

    x float32 (n, d) unit rows; group int64 (n,), ascending: in a group the rows come in the order in which they are
    rather kept. Returns int64 (n,), the row of ``x``, and the similarities float32 (n,), 1 to itself. Each row is
    compared with those that stay before it.
    """
    near, similarity = np.empty(len(x), np.int64), np.ones(len(x), np.float32)
    stays, n_stays = np.empty(len(x), np.int64), 0
    for i in range(len(x)):
        if i == 0 or group[i] != group[i - 1]:
            n_stays = 0
        near[i] = i
        for k in range(n_stays):
            found = np.float32(dot(x[i], x[stays[k]]))
            if found >= low:
                near[i], similarity[i] = stays[k], found
                break
        if near[i] == i:
            stays[n_stays] = i
            n_stays += 1
    return near, similarity


@compiled
def first_confirmed(
    score: np.ndarray, floor: np.float32, x: np.ndarray, base: np.ndarray, low: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of x the first row of base that is at least ``low`` similar, -1 if there is none: int64 (n,).

    Only those with ``score[i, k]`` of at least ``floor`` are looked at. Also the similarities float32 (n,), 0 for none.
    """
    near, similarity = np.full(len(x), -1, np.int64), np.zeros(len(x), np.float32)
    for i in range(len(x)):
        for k in range(len(base)):
            if score[i, k] >= floor:
                found = np.float32(dot(x[i], base[k]))
                if found >= low:
                    near[i], similarity[i] = k, found
                    break
    return near, similarity
