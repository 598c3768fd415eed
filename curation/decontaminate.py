"""DINOv2's relative deduplication (appendix A.3 of arXiv 2304.07193): the config of ``decontaminate``, its kernels.

In mode ``direct`` an image is dropped when it is itself near an image to stay away from, in mode ``component`` (the
paper's) also when a chain of near images leads from it to such a one. Hop 1 are the rows near a reference image, hop
h + 1 those with an edge to a row of hop h that no earlier hop has.

A certificate says of a reference what was found in the pool and how near the rest is: for that the search goes both
ways, from rows to their nearest images and from images to their nearest rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from curation.checks import check_unit_rows
from curation.components import spanning_forest
from curation.neighbors import UNIT_ROUNDOFF, Neighbors, best_pairs, merge_candidates, recheck_pairs

MODES = ("direct", "component")
FOLD_PAIRS = 1 << 18  # pairs held before they are folded into a forest
TILE_ROWS, TILE_COLUMNS = 1024, 2048  # of the scores that a search both ways holds: 8 MiB
N_BINS = 100  # of the histogram of a certificate, from similarity 0 to 1

# An edge as the part of its row sees it: row within the part, position of the other row in the pool.
EDGE = np.dtype([("row", "<i4"), ("near_row", "<i8"), ("similarity", "<f4")])


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """How near to a reference image is too near."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    reference: str | tuple[str, ...]  # images to stay away from: a step, or a list of several
    min_similarity: float  # cosine; belongs to the descriptor, so it has no default
    mode: str = "direct"  # drop what is near a reference; "component": also what chains of such pairs lead to
    max_drop_fraction: float = 0.5  # share of rows; more means the threshold does not fit the descriptor

    @property
    def references(self) -> tuple[str, ...]:
        """The references in order."""
        return (self.reference,) if isinstance(self.reference, str) else self.reference

    def __post_init__(self) -> None:
        if not self.references or not all(self.references):
            raise ValueError(f"decontaminate.reference must name at least one step: got {self.reference!r}")
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"decontaminate.min_similarity must be in (0, 1]: got {self.min_similarity}")
        if self.mode not in MODES:
            raise ValueError(f"decontaminate.mode must be 'direct' or 'component': got {self.mode!r}")
        if not 0 < self.max_drop_fraction <= 1:
            raise ValueError(f"decontaminate.max_drop_fraction must be in (0, 1]: got {self.max_drop_fraction}")


def edge_records(row: np.ndarray, near_row: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """EDGE (n,) of three columns (n,)."""
    edges = np.empty(len(row), EDGE)
    edges["row"], edges["near_row"], edges["similarity"] = row, near_row, similarity
    return edges


def is_among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """bool (n,): which of ``values`` int (n,) are in ``ascending`` int (m,). 9 bytes a value."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.searchsorted(ascending, values)
    np.minimum(at, len(ascending) - 1, out=at)
    found: np.ndarray = ascending[at] == values
    return found


def strongest_from(best: Neighbors, rows: np.ndarray, edges: np.ndarray, frontier: np.ndarray) -> Neighbors:
    """``best`` with more edges: of each row the strongest edge to a row of the frontier, ties to the lowest row id.

    best: Neighbors (n, 1) of ``rows`` int32 (n,), ascending within their part. edges: EDGE (m,) of this part, in any
    order and more than once; those of other rows and to other rows than the frontier's do not count. frontier: int64,
    ascending, positions in the pool. Returns new Neighbors (n, 1), float32 similarity. Holds about 60 bytes an edge.
    """
    edges = edges[is_among(edges["row"], rows)]
    edges = edges[is_among(edges["near_row"], frontier)]
    at = np.searchsorted(rows, edges["row"])
    found = best_pairs(at, edges["near_row"], edges["similarity"], len(rows), 1)
    return merge_candidates(best, found.row_ids, found.similarity, np.full(len(rows), -1, np.int64))


def near_pairs(x: np.ndarray, base: np.ndarray, min_similarity: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair of rows at or above a similarity, exactly: (row of x, row of base), int64, some pairs at a time.

    x (n, d) and base (m, d): float32, contiguous, unit rows; equal rows of x and base pair up too. The similarity is
    that of ``curation.neighbors``. Holds 8 MiB of scores, and 60 bytes for each of them that is near: at most 130 MB.
    """
    from curation import loops

    if not len(x) or not len(base):
        return
    lowest = np.float32(min_similarity)
    error = np.float32((x.shape[1] + 2) * UNIT_ROUNDOFF * 1.01)  # bound of one product of unit rows in float32
    floor = np.full(len(x), lowest - 2 * error, np.float32)
    for at, (position, column) in recheck_pairs(x, base, np.arange(len(x)), floor):
        rows = at[position]
        near = loops.pair_dots(x, base, rows, column) >= lowest
        yield rows[near], column[near]


def merge_both_ways(
    x: np.ndarray, base: np.ndarray, x_ids: np.ndarray, base_ids: np.ndarray, of_x: Neighbors, of_base: Neighbors
) -> tuple[Neighbors, Neighbors]:
    """``of_x`` with the nearest row of base for each row of x, and ``of_base`` with the nearest row of x for each of
    base: exactly, in one pass over all pairs. Blocks of either may come in any order, each pair of rows once.

    x (n, d) and base (m, d): float32, unit rows; x_ids int64 (n,), base_ids int64 (m,); of_x: Neighbors (n, 1),
    of_base: Neighbors (m, 1). Similarity and ties are those of ``curation.neighbors``. Holds 16 MiB of scores, and 60
    bytes for each of them that ties with the best of its row or column: at most 150 MB. Raises ValueError if rows are
    not unit or widths differ.
    """
    from curation import loops

    check_unit_rows(x, "x")
    check_unit_rows(base, "base")
    if x.shape[1] != base.shape[1]:
        raise ValueError(f"x and base must have one width: got {x.shape} and {base.shape}")
    of_x, of_base = (Neighbors(best.row_ids.copy(), best.similarity.copy()) for best in (of_x, of_base))
    margin = np.float32(2 * (x.shape[1] + 2) * UNIT_ROUNDOFF * 1.01)  # twice the bound of one product in float32
    for i in range(0, len(x), TILE_ROWS):
        for j in range(0, len(base), TILE_COLUMNS):
            rows, columns = slice(i, i + TILE_ROWS), slice(j, j + TILE_COLUMNS)
            score = x[rows] @ base[columns].T
            for at, to in best_scores(score, of_x.similarity[rows, 0], of_base.similarity[columns, 0], margin):
                similarity = loops.pair_dots(x, base, at + i, to + j)
                loops.raise_best(of_x.row_ids[rows, 0], of_x.similarity[rows, 0], at, base_ids[to + j], similarity)
                loops.raise_best(
                    of_base.row_ids[columns, 0], of_base.similarity[columns, 0], to, x_ids[at + i], similarity
                )
    return of_x, of_base


def best_scores(
    score: np.ndarray, of_rows: np.ndarray, of_columns: np.ndarray, margin: np.float32
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs that may be the best of their row, then of their column: (row, column), int64 (k,).

    score float32 (n, m); of_rows (n,) and of_columns (m,): the best so far; margin: how far two scores may be off.
    """
    highest = score.max(axis=1)
    rows = np.flatnonzero(highest >= of_rows - margin)
    position, column = np.nonzero(score[rows] >= (np.maximum(highest, of_rows)[rows] - margin)[:, None])
    yield rows[position], column
    highest = score.max(axis=0)
    columns = np.flatnonzero(highest >= of_columns - margin)
    row, position = np.nonzero(score[:, columns] >= (np.maximum(highest, of_columns)[columns] - margin)[None])
    yield row, columns[position]


def similarity_bins(similarity: np.ndarray) -> np.ndarray:
    """int64 (N_BINS,): how many of the similarities float32 (n,) are in each bin; below 0 counts as 0, above 1 as 1.

    Bin i begins with the float32 nearest to i / N_BINS, so a threshold of two digits is the beginning of one.
    """
    edges = (np.arange(1, N_BINS) / N_BINS).astype(np.float32)
    bins: np.ndarray = np.bincount(np.searchsorted(edges, similarity, side="right"), minlength=N_BINS)
    return bins


def forest_of_pairs(pairs: Iterable[np.ndarray]) -> np.ndarray:
    """Spanning forest int64 (f, 2) of pairs int64 (m, 2) that come a few at a time: see ``part_forest``.

    Holds the forest and at most FOLD_PAIRS pairs more than come at a time, in the workspace of ``part_forest``.
    """
    forest, waiting, n_waiting = np.empty((0, 2), np.int64), list[np.ndarray](), 0
    for some in pairs:
        waiting.append(some)
        n_waiting += len(some)
        if n_waiting >= FOLD_PAIRS:
            forest, waiting, n_waiting = spanning_forest([forest, *waiting]), [], 0
    return spanning_forest([forest, *waiting])
