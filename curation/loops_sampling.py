"""Inner loops of balanced sampling, compiled by numba. Each goes over rows once, in order, and holds clusters."""

import numpy as np

from curation.loops import compiled, prefetch

LOOK_AHEAD = 32  # rows: the state of a cluster is in no cache when its next row comes
WHOLE, LEFT, NEED = range(3)  # columns of the state of an urn


@compiled
def mix(x: np.uint64) -> np.uint64:
    """``curation.sampling.split_mix`` of one number."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def row_luck(key: np.uint64, first: int, luck: np.ndarray) -> None:
    """Fill ``luck`` uint32 (n,) with random numbers, that of row ``first + i`` a hash of this position and the key."""
    for i in range(len(luck)):
        luck[i] = mix(key + np.uint64(first + i)) >> np.uint64(32)


@compiled
def is_drawn(key: np.uint64, left: int, need: int) -> bool:
    """Whether the next of ``left`` tickets is among the ``need`` drawn ones: with probability need / left.

    The last tickets are all drawn when no other is left, whatever rounding says, so that the number is exact.
    """
    luck = np.float64(mix(key + np.uint64(left)) >> np.uint64(11)) * 2.0**-53
    return bool(need == left or luck * left < need)


@compiled
def draw_random(labels: np.ndarray, urns: np.ndarray, per_row: int, key: np.uint64, counts: np.ndarray) -> None:
    """How often each row is drawn, added to ``counts``: every urn goes on where it stood (selection sampling).

    Row i is in urn ``labels[i]``, with ``per_row`` tickets there; a row below 0 is in none. urns int64 (k, 3), changed
    in place: copies that every row has without a draw, tickets left, tickets still to be drawn.
    """
    table = urns.ravel()
    for i in range(len(labels)):
        prefetch(table, 3 * np.int64(labels[min(i + LOOK_AHEAD, len(labels) - 1)]))
        c = np.int64(labels[i])
        if c < 0:
            continue
        drawn = urns[c, WHOLE]
        if urns[c, NEED] > 0:
            own = mix(key + np.uint64(c))
            for _ in range(per_row):
                if is_drawn(own, urns[c, LEFT], urns[c, NEED]):
                    drawn += 1
                    urns[c, NEED] -= 1
                urns[c, LEFT] -= 1
                if urns[c, NEED] == 0:
                    break
        counts[i] += drawn


@compiled
def thin(groups: np.ndarray, counts: np.ndarray, urns: np.ndarray, key: np.uint64) -> None:
    """Leave of what is drawn of each group what its urn says, at random: ``counts`` fall in place.

    A row has as many tickets as it was drawn; groups below 0, and those whose urn has no tickets, stay as they are.
    """
    for i in range(len(groups)):
        g = np.int64(groups[i])
        if g < 0 or urns[g, LEFT] == 0:
            continue
        own = mix(key + np.uint64(g))
        stay = 0
        for _ in range(counts[i]):
            if is_drawn(own, urns[g, LEFT], urns[g, NEED]):
                stay += 1
                urns[g, NEED] -= 1
            urns[g, LEFT] -= 1
        counts[i] = stay


@compiled
def place(labels: np.ndarray, values: np.ndarray, first: int, cursor: np.ndarray, out: np.ndarray) -> None:
    """Gather the values of clusters ``first + j`` that have a cursor (from 0 on) in ``out``, in place."""
    n = np.uint64(len(cursor))
    for i in range(len(labels)):
        j = np.int64(labels[i]) - first
        if np.uint64(j) < n and cursor[j] >= 0:  # below 0 counts as very high
            out[cursor[j]] = values[i]
            cursor[j] += 1


@compiled
def find_cuts(values: np.ndarray, offsets: np.ndarray, need: np.ndarray, cut: np.ndarray, ties: np.ndarray) -> None:
    """Of each slice of values the ``need`` lowest: the highest of these, and how many that are equal to it they have.

    Slices are reordered in place; where ``need`` is 0 nothing is written.
    """
    for g in range(len(need)):
        if need[g] == 0:
            continue
        own = values[offsets[g] : offsets[g + 1]]
        cut[g] = select(own, need[g] - 1)
        below = 0
        for i in range(need[g]):  # what is lower stands before it
            below += own[i] < cut[g]
        ties[g] = need[g] - below


@compiled
def select(values: np.ndarray, k: int) -> float:
    """The k-th lowest, from 0, with what is lower before it: Hoare's quickselect around the median of three."""
    low, high = 0, len(values) - 1
    while low < high:
        a, b, c = values[low], values[(low + high) // 2], values[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    found: float = values[k]
    return found


@compiled
def draw_closest(
    labels: np.ndarray,
    distance: np.ndarray,
    whole: np.ndarray,
    cut: np.ndarray,
    ties: np.ndarray,
    counts: np.ndarray,
) -> None:
    """How often each row is drawn, added to ``counts``: ``whole`` times, and once more below the cut of its cluster.

    Of rows at the cut the first ``ties`` are drawn, which count down in place. A row with a label below 0 is left out.
    """
    for i in range(len(labels)):
        c = np.int64(labels[i])
        if c < 0:
            continue
        drawn = whole[c]
        if distance[i] < cut[c]:
            drawn += 1
        elif distance[i] == cut[c] and ties[c] > 0:
            drawn += 1
            ties[c] -= 1
        counts[i] += drawn


@compiled
def add_counts(sums: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> None:
    """``sums[labels[i]] += counts[i]`` of every row, in place; labels below 0 are left out."""
    for i in range(len(labels)):
        if labels[i] >= 0:
            sums[labels[i]] += counts[i]


@compiled
def add_rows(sums: np.ndarray, labels: np.ndarray) -> None:
    """``sums[labels[i]] += 1`` of every row, in place; labels below 0 are left out."""
    for i in range(len(labels)):
        if labels[i] >= 0:
            sums[labels[i]] += 1
