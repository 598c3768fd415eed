"""Which of near-duplicate images stays. Only rows that have an edge are held.

Rule ``component`` keeps one image of every connected component of the graph of similar pairs: DINOv2's
self-deduplication (appendix A.3 of arXiv 2304.07193). A chain of near copies may join images that are not alike:
with ``max_chain`` an image is dropped only for one that it is at least so similar to itself.

The other two rules go by rank, the order of ``keep``. Rule ``greedy`` takes the images in that order and drops what is
near one that was kept: the lexicographically first maximal independent set, in which no two images are near and every
dropped one is near one that stays. Rule ``semdedup`` drops an image when it is near one that comes before it, also when
that one is dropped itself (SemDeDup, arXiv 2303.09540, algorithm 1; there the order is by falling distance to the
centroid, and pairs are looked for within clusters): a chain of near copies loses all but those that nothing before them
is near to.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

KEEP = ("most_pixels", "largest_file", "first", "source_priority", "score", "farthest", "closest")
RULES = ("component", "greedy", "semdedup")

# An edge between rows of different rank; equal rows count as one, the best of them, known at its home.
RANKED = np.dtype([("score", "<i8"), ("better", "<i8"), ("worse", "<i8"), ("home", "<i8"), ("similarity", "<f4")])
SPLIT_ROWS = 1024  # of a group, compared with one another pair by pair; what comes after them by blocks
N_SIZES = 64  # sizes of groups are counted by their power of two
TIGHT_BINS = 24
UNSCORED = -(1 << 31) - 1  # the score of a row without one: below that of every float32


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which copy of an image stays, and how much a step may drop."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rule: str = "component"  # one of every connected component; "greedy": in the order of keep, what is near none that
    # was kept before it; "semdedup": what is near none before it, kept or not
    keep: str = "most_pixels"  # first in order; or "largest_file"; "first": lowest row id; "source_priority": the pools
    # of a union, and the sources of a pool, in their order; "score": the highest, with scores: a score step; with a
    # hierarchy "farthest" from or "closest" to the centroid of its cluster; ties go to the lowest row id
    max_chain: float = 0.0  # for rule component: the least similarity to the image that one is dropped for; those of a
    # component that are farther from it are judged again among themselves; 0: a chain of any length is enough
    max_drop_fraction: float = 0.5  # share of rows; more means the threshold does not fit the descriptor

    def __post_init__(self) -> None:
        if not 0 < self.max_drop_fraction <= 1:
            raise ValueError(f"dedup.max_drop_fraction must be in (0, 1]: got {self.max_drop_fraction}")
        if self.keep not in KEEP:
            raise ValueError(f"dedup.keep must be one of {', '.join(KEEP)}: got {self.keep!r}")
        if self.rule not in RULES:
            raise ValueError(f"dedup.rule must be one of {', '.join(RULES)}: got {self.rule!r}")
        if not 0 <= self.max_chain < 1:
            raise ValueError(f"dedup.max_chain must be in [0, 1): got {self.max_chain}")
        if self.max_chain and self.rule != "component":
            raise ValueError(f"dedup.max_chain is for rule component: got {self.max_chain} with {self.rule}")


class Best(NamedTuple):
    """The best row of each component."""

    component: np.ndarray  # int64 (m,), ascending, each once
    score: np.ndarray  # int64 (m,), higher is better
    row_id: np.ndarray  # int64 (m,)


def best_rows(component: np.ndarray, score: np.ndarray, row_id: np.ndarray) -> Best:
    """Highest score of each component, ties to the lowest row id. All int64 (n,)."""
    order = np.lexsort((row_id, -score, component))
    ordered = component[order]
    first = order[np.r_[True, ordered[1:] != ordered[:-1]]] if len(order) else order
    return Best(component[first], score[first], row_id[first])


class Dropped(NamedTuple):
    """Rows that are near a better one, and the nearest of those."""

    row_id: np.ndarray  # int64 (m,), ascending, each once
    near_row: np.ndarray  # int64 (m,)
    similarity: np.ndarray  # float32 (m,)


class End(NamedTuple):
    """One end of some edges."""

    score: np.ndarray  # int64 (n,), higher is better
    best: np.ndarray  # int64 (n,): of the row and those equal to it the one that comes first
    home: np.ndarray  # int64 (n,): the lowest of them


def rank_edges(a: End, b: End, similarity: np.ndarray) -> np.ndarray:
    """RANKED (n,) of edges between rows that are not equal: the higher score is better, ties: the lower best row.

    ``home`` is that of the worse end. similarity: float32 (n,).
    """
    a_first = (a.score > b.score) | ((a.score == b.score) & (a.best < b.best))
    edges = np.empty(len(similarity), RANKED)
    edges["score"] = np.where(a_first, a.score, b.score)
    edges["better"], edges["worse"] = np.where(a_first, a.best, b.best), np.where(a_first, b.best, a.best)
    edges["home"], edges["similarity"] = np.where(a_first, b.home, a.home), similarity
    return edges


def in_order(edges: np.ndarray) -> np.ndarray:
    """RANKED (n,) in the order of the better ends, the best first."""
    ordered: np.ndarray = edges[np.lexsort((edges["better"], -edges["score"]))]
    return ordered


def order_bounds(sample: np.ndarray, n_slices: int) -> np.ndarray:
    """Cut the order of rank into about as many slices: RANKED (m,), m < n_slices, the first edge of each but the first.

    sample: RANKED (n,), in any order, of edges that are spread evenly over all.
    """
    sample = in_order(sample)
    cuts = sample[np.arange(1, n_slices) * len(sample) // n_slices] if len(sample) else sample
    new = np.ones(len(cuts), bool)
    new[1:] = (cuts["score"][1:] != cuts["score"][:-1]) | (cuts["better"][1:] != cuts["better"][:-1])
    bounds: np.ndarray = cuts[new]
    return bounds


def slice_of(edges: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 (n,): the slice of each of RANKED (n,), all edges of one better end in the same."""
    from curation import loops_graph

    some = (np.ascontiguousarray(x[name]) for x in (edges, bounds) for name in ("score", "better"))
    found: np.ndarray = loops_graph.places_in_order(*some)
    return found


def no_row_dropped(n_rows: int) -> np.ndarray:
    """What ``drop_in_order`` needs to know: a bit a row, uint8."""
    return np.zeros(-(-n_rows // 8), np.uint8)


def drop_in_order(edges: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Rule ``greedy`` over RANKED (n,) ``in_order``: bool (n,), whether the better end of each edge stays.

    Then its worse end goes, noted in ``dropped``: edges may come slice by slice, each slice after all better ones.
    """
    from curation import loops_graph

    ends = np.ascontiguousarray(edges["better"]), np.ascontiguousarray(edges["worse"])
    stays: np.ndarray = loops_graph.drop_in_order(*ends, dropped)
    return stays


def merge_dropped(a: Dropped, b: Dropped) -> Dropped:
    """What both say, for ``executor.reduce``."""
    return nearest_dropped(*(np.concatenate([x, y]) for x, y in zip(a, b, strict=True)))


def nearest_dropped(row_id: np.ndarray, near_row: np.ndarray, similarity: np.ndarray) -> Dropped:
    """Of each row the most similar near row, ties to the lowest."""
    order = np.lexsort((near_row, -similarity, row_id))
    rows = row_id[order]
    first = order[np.r_[True, rows[1:] != rows[:-1]]] if len(order) else order
    return Dropped(row_id[first], near_row[first], similarity[first])


class Group(NamedTuple):
    """Rows for which others were dropped."""

    row_id: np.ndarray  # int64 (m,), ascending, each once
    n_dropped: np.ndarray  # int64 (m,)
    lowest: np.ndarray  # float32 (m,): the lowest similarity of these to the row; NaN where one is not known


def merge_groups(row_id: np.ndarray, n_dropped: np.ndarray, lowest: np.ndarray) -> Group:
    """What some groups int64 (n,), int64 (n,), float32 (n,), in any order and not each once, come to."""
    if not len(row_id):
        return Group(row_id, n_dropped, lowest)
    order = np.argsort(row_id, kind="stable")
    rows = row_id[order]
    first = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    return Group(rows[first], np.add.reduceat(n_dropped[order], first), np.minimum.reduceat(lowest[order], first))


def count_sizes(n_rows: np.ndarray) -> np.ndarray:
    """int64 (N_SIZES,): how many groups of int64 (m,) rows, at least 2, have more than 2**(k - 1) and up to 2**k."""
    return np.bincount(np.searchsorted(2 ** np.arange(62), n_rows), minlength=N_SIZES)


def count_tightness(lowest: np.ndarray, low: float) -> np.ndarray:
    """int64 (TIGHT_BINS,): how many groups have their lowest similarity in each bin from ``low`` to 1; not the NaN.

    float64, and what rounding lifts above 1 counts as 1.
    """
    known = np.minimum(lowest[~np.isnan(lowest)].astype(np.float64), 1.0)
    return (
        np.histogram(known, TIGHT_BINS, (low, 1.0))[0] if low < 1 else np.r_[np.zeros(TIGHT_BINS - 1, int), len(known)]
    )


def split_groups(x: np.ndarray, group: np.ndarray, low: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the first that stays of its group and is at least ``low`` similar, itself if there is none.

    x float32 (n, d) unit rows; group int64 (n,), ascending: in a group the rows come in the order in which they are
    rather kept. Returns int64 (n,), the row of ``x``, and the similarities float32 (n,), 1 to itself. A row is compared
    with those that stay before it in its group, up to the first that is near.
    """
    from curation import loops_graph

    near, similarity, left = np.empty(len(x), np.int64), np.ones(len(x), np.float32), np.arange(len(x))
    while len(left):
        some, left = left[:SPLIT_ROWS], left[SPLIT_ROWS:]
        at, similarity[some] = loops_graph.split_groups(x[some], group[some], np.float32(low))
        near[some], last = some[at], group[some[-1]]
        stays = some[(near[some] == some) & (group[some] == last)]
        of_last = left[: np.searchsorted(group[left], last, side="right")]
        at, found = first_near(x[of_last], x[stays], low)
        near[of_last[at >= 0]], similarity[of_last[at >= 0]] = stays[at[at >= 0]], found[at >= 0]
        left = np.concatenate([of_last[at < 0], left[len(of_last) :]])
    return near, similarity


def first_near(x: np.ndarray, base: np.ndarray, low: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of x the first row of base that is at least ``low`` similar, -1 if there is none: int64 (n,).

    Both float32, unit rows. Also the similarities float32 (n,), 0 where there is none. A product of blocks rules out
    most pairs, ``loops.dot`` decides on the others, so no bit depends on the blocks.
    """
    from curation import loops_graph

    near, similarity = np.full(len(x), -1, np.int64), np.zeros(len(x), np.float32)
    floor = np.float32(low - (x.shape[1] + 8) * 2.0**-23)  # twice what a float32 product of unit rows can be off
    for start in range(0, len(x), SPLIT_ROWS):
        left = np.arange(start, min(start + SPLIT_ROWS, len(x)))
        for first in range(0, len(base), SPLIT_ROWS):
            some = base[first : first + SPLIT_ROWS]
            at, found = loops_graph.first_confirmed(x[left] @ some.T, floor, x[left], some, np.float32(low))
            near[left[at >= 0]], similarity[left[at >= 0]] = first + at[at >= 0], found[at >= 0]
            left = left[at < 0]
    return near, similarity


def distance_scores(sq_distance: np.ndarray, farthest: bool) -> np.ndarray:
    """float32 distances (n,), at least 0, as int64 scores with the same order, or turned round for the closest."""
    bits = sq_distance.astype(np.float32).view(np.int32).astype(np.int64)  # of floats from 0 on: in their order
    return bits if farthest else -bits


def float_scores(score: np.ndarray) -> np.ndarray:
    """float32 scores (n,), finite, as int64 scores with the same order, all above UNSCORED."""
    bits = (score.astype(np.float32) + np.float32(0)).view(np.int32)  # -0 becomes 0
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)


def strongest_edge(rows: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most similar neighbour of each row: (row (m,) ascending, index of its edge (m,)).

    ``rows`` int (n,) ascending with each row's edges in descending similarity, as ``neighbors`` writes them.
    """
    found, first = np.unique(rows, return_index=True)
    if len(rows) > 1:
        same = rows[1:] == rows[:-1]
        if not (np.diff(similarity)[same] <= 0).all():
            raise ValueError("the edges of a row must stand in descending similarity")
    return found, first


def histogram_text(similarity: np.ndarray) -> str:
    """Similarities as ``0.990-0.992: 12, ...`` in ten bins, for the message that stops a step."""
    if not len(similarity):
        return "no similarities"
    counts, edges = np.histogram(similarity.astype(np.float64), bins=10)  # float32: no ten bins in a narrow range
    bins = [f"{a:.3f}-{b:.3f}: {n}" for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True) if n]
    return ", ".join(bins)
