"""One image of every group of near-duplicates: DINOv2's self-deduplication (appendix A.3 of arXiv 2304.07193).

The connected components of the graph of similar pairs are the groups. Only rows that have an edge are held:
8 bytes each for the row, its component and its representative.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

KEEP = ("most_pixels", "first")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which copy of an image stays, and how much a step may drop."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    keep: str = "most_pixels"  # or "first": lowest row id; ties go to the lowest row id
    max_drop_fraction: float = 0.5  # share of rows; more means the threshold does not fit the descriptor

    def __post_init__(self) -> None:
        if not 0 < self.max_drop_fraction <= 1:
            raise ValueError(f"dedup.max_drop_fraction must be in (0, 1]: got {self.max_drop_fraction}")
        if self.keep not in KEEP:
            raise ValueError(f"dedup.keep must be 'most_pixels' or 'first': got {self.keep!r}")


class Best(NamedTuple):
    """The best row of each component seen so far."""

    component: np.ndarray  # int64 (m,), ascending, each once
    score: np.ndarray  # int64 (m,), higher is better
    row_id: np.ndarray  # int64 (m,)


def best_rows(component: np.ndarray, score: np.ndarray, row_id: np.ndarray) -> Best:
    """Highest score of each component, ties to the lowest row id. All int64 (n,)."""
    order = np.lexsort((row_id, -score, component))
    ordered = component[order]
    first = order[np.r_[True, ordered[1:] != ordered[:-1]]] if len(order) else order
    return Best(component[first], score[first], row_id[first])


def merge_best(a: Best, b: Best) -> Best:
    """The best of both, for ``executor.reduce``."""
    return best_rows(*(np.concatenate([x, y]) for x, y in zip(a, b, strict=True)))


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
