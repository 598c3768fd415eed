"""Which of near-duplicate images stays. Only rows that have an edge are held.

Rule ``component`` keeps one image of every connected component of the graph of similar pairs: DINOv2's
self-deduplication (appendix A.3 of arXiv 2304.07193). Rule ``semdedup`` drops an image when it is near one that comes
before it in the order of ``keep``, also when that one is dropped itself (SemDeDup, arXiv 2303.09540, algorithm 1; there
the order is by falling distance to the centroid, and pairs are looked for within clusters): a chain of near copies
loses all but those that nothing before them is near to.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

KEEP = ("most_pixels", "first", "farthest", "closest")
RULES = ("component", "semdedup")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which copy of an image stays, and how much a step may drop."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rule: str = "component"  # one of every connected component; or "semdedup": none that is near an earlier one
    keep: str = "most_pixels"  # or "first": lowest row id; with a hierarchy "farthest" from or "closest" to the
    # centroid of its cluster; ties go to the lowest row id
    max_drop_fraction: float = 0.5  # share of rows; more means the threshold does not fit the descriptor

    def __post_init__(self) -> None:
        if not 0 < self.max_drop_fraction <= 1:
            raise ValueError(f"dedup.max_drop_fraction must be in (0, 1]: got {self.max_drop_fraction}")
        if self.keep not in KEEP:
            raise ValueError(f"dedup.keep must be one of {', '.join(KEEP)}: got {self.keep!r}")
        if self.rule not in RULES:
            raise ValueError(f"dedup.rule must be 'component' or 'semdedup': got {self.rule!r}")


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
    """Rows that are near an earlier one, and the nearest of those."""

    row_id: np.ndarray  # int64 (m,), ascending, each once
    near_row: np.ndarray  # int64 (m,)
    similarity: np.ndarray  # float32 (m,)


def near_earlier(edges: np.ndarray, similarity: np.ndarray, row_id: np.ndarray, score: np.ndarray) -> Dropped:
    """The rows that rule ``semdedup`` drops because of these edges.

    edges: int64 (e, 2), direction and repeats do not matter; similarity: float32 (e,); row_id int64 (n,), ascending,
    holds every row of an edge; score int64 (n,): the higher comes earlier, ties: the lower row id.
    """
    a, b = np.searchsorted(row_id, edges[:, 0]), np.searchsorted(row_id, edges[:, 1])
    a_first = (score[a] > score[b]) | ((score[a] == score[b]) & (a < b))
    later, earlier = np.where(a_first, b, a), np.where(a_first, a, b)
    other = later != earlier
    return nearest_dropped(row_id[later[other]], row_id[earlier[other]], similarity[other])


def merge_dropped(a: Dropped, b: Dropped) -> Dropped:
    """What both say, for ``executor.reduce``."""
    return nearest_dropped(*(np.concatenate([x, y]) for x, y in zip(a, b, strict=True)))


def nearest_dropped(row_id: np.ndarray, near_row: np.ndarray, similarity: np.ndarray) -> Dropped:
    """Of each row the most similar near row, ties to the lowest."""
    order = np.lexsort((near_row, -similarity, row_id))
    rows = row_id[order]
    first = order[np.r_[True, rows[1:] != rows[:-1]]] if len(order) else order
    return Dropped(row_id[first], near_row[first], similarity[first])


def distance_scores(sq_distance: np.ndarray, farthest: bool) -> np.ndarray:
    """float32 distances (n,), at least 0, as int64 scores with the same order, or turned round for the closest."""
    bits = sq_distance.astype(np.float32).view(np.int32).astype(np.int64)  # of floats from 0 on: in their order
    return bits if farthest else -bits


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
