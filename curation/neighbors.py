"""Exact cosine neighbours of unit rows: FAISS finds candidates, float64 sums decide.

The similarity of a pair is the float64 sum of float32 products, rounded to float32. It is the same in both
directions, wherever the rows stand and however the base is cut, so thresholds and ties mean the same everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from curation.checks import check_unit_rows

QUERY_ROWS = 4096  # queries searched at once
SLACK = 16  # candidates beyond k: where the last one is clearly worse than the k-th, nothing can be missing
RECHECK_SCORES = 2**21  # scores held at once where it is not
UNIT_ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True, kw_only=True)
class NeighborsConfig:
    """How many neighbours of each image are kept, and from which similarity on."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines/, no import here

    n_neighbors: int = 64  # of each row, at most
    min_similarity: float  # cosine; no default, because a threshold belongs to a descriptor

    def __post_init__(self) -> None:
        if self.n_neighbors < 1:
            raise ValueError(f"neighbors.n_neighbors must be at least 1: got {self.n_neighbors}")
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"neighbors.min_similarity must be in (0, 1]: got {self.min_similarity}")


class Neighbors(NamedTuple):
    """The nearest rows of each query, by (similarity descending, row id ascending)."""

    row_ids: np.ndarray  # int64 (n, k), -1 where there are fewer than k
    similarity: np.ndarray  # float32 (n, k), cosine, -inf where there are fewer than k

    @staticmethod
    def none_yet(n_queries: int, k: int) -> "Neighbors":
        """The running result before the first block."""
        return Neighbors(np.full((n_queries, k), -1, np.int64), np.full((n_queries, k), -np.inf, np.float32))


def nearest_neighbors(queries: np.ndarray, base: np.ndarray, k: int, query_ids: np.ndarray | None = None) -> Neighbors:
    """The k rows of base most similar to each query, exactly: row_ids int64 (n, k) and similarity float32 (n, k).

    queries (n, d) and base (m, d): float with unit rows. A row id is the position in base; with ``query_ids`` int64
    (n,) the base row of that id is never a neighbour of its query. Order, ties and padding: see Neighbors. Holds
    (k + 16) * 60 bytes for each of 4,096 queries and, where ties at the k-th place are rechecked, 8 MiB of scores and
    60 bytes for each of them that ties: 130 MB when all do.
    Raises ValueError if rows are not unit, widths differ or k < 1.
    """
    return merge_block(queries, base, np.arange(len(base)), Neighbors.none_yet(len(queries), k), query_ids)


def merge_block(
    queries: np.ndarray,
    base: np.ndarray,
    base_ids: np.ndarray,
    best: Neighbors,
    query_ids: np.ndarray | None = None,
) -> Neighbors:
    """``best`` with the rows of one more block of base: blocks may come in any order and cut.

    queries (n, d) and base (m, d): float with unit rows; base_ids: int64 (m,), row ids that no other block holds;
    query_ids: int64 (n,), the id each query must not find. Memory and errors: see nearest_neighbors.
    """
    check_unit_rows(queries, "queries")
    check_unit_rows(base, "base")
    if queries.shape[1] != base.shape[1] or best.row_ids.shape[1] < 1 or len(base_ids) != len(base):
        raise ValueError(
            f"neighbours need queries and base of one width, k of at least 1 and an id for each base row: "
            f"got {queries.shape}, {base.shape}, k = {best.row_ids.shape[1]}, {len(base_ids)} ids"
        )
    base = np.ascontiguousarray(base, np.float32)
    own = np.full(len(queries), -1, np.int64) if query_ids is None else query_ids
    merged = Neighbors(best.row_ids.copy(), best.similarity.copy())
    for start in range(0, len(queries), QUERY_ROWS):
        at = slice(start, start + QUERY_ROWS)
        x = np.ascontiguousarray(queries[at], np.float32)
        found = merge_queries(x, base, base_ids, Neighbors(best.row_ids[at], best.similarity[at]), own[at])
        merged.row_ids[at], merged.similarity[at] = found
    return merged


def merge_queries(x: np.ndarray, base: np.ndarray, base_ids: np.ndarray, best: Neighbors, own: np.ndarray) -> Neighbors:
    """``merge_block`` of float32 queries that fit in memory, inputs checked."""
    from curation import loops

    if len(x) == 0 or len(base) == 0:
        return best
    n_candidates = min(best.row_ids.shape[1] + SLACK, len(base))
    score, column = search(x, base, n_candidates)
    rows = np.repeat(np.arange(len(x)), n_candidates)
    similarity = loops.pair_dots(x, base, rows, column.ravel()).reshape(column.shape)
    merged = merge_candidates(best, base_ids[column], similarity, own)
    if n_candidates == len(base):
        return merged
    error = (x.shape[1] + 2) * UNIT_ROUNDOFF * 1.01  # bound of one product of unit rows in float32
    open_ = np.flatnonzero(~(score[:, -1] + 2 * error < merged.similarity[:, -1]))
    for at, pairs in recheck_pairs(x, base, open_, merged.similarity[:, -1] - 2 * error):
        exact = loops.pair_dots(x, base, at[pairs[0]], pairs[1])
        ids = base_ids[pairs[1]]
        keep = ids != own[at[pairs[0]]]
        found = best_pairs(pairs[0][keep], ids[keep], exact[keep], len(at), best.row_ids.shape[1])
        merged.row_ids[at], merged.similarity[at] = merge_candidates(
            Neighbors(best.row_ids[at], best.similarity[at]), found.row_ids, found.similarity, own[at]
        )
    return merged


def search(x: np.ndarray, base: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest float32 products of each query, best first, and their columns in base, int64 (n, k)."""
    import faiss

    score, column = faiss.knn(x, base, k, metric=faiss.METRIC_INNER_PRODUCT)
    return score, column


def merge_candidates(best: Neighbors, row_ids: np.ndarray, similarity: np.ndarray, own: np.ndarray) -> Neighbors:
    """The k best of ``best`` and candidates (n, c) that are not in it; those with the query's own id are left out."""
    k, itself = best.row_ids.shape[1], row_ids == own[:, None]
    ids = np.concatenate([best.row_ids, np.where(itself, -1, row_ids)], axis=1)
    values = np.concatenate([best.similarity, np.where(itself, np.float32(-np.inf), similarity)], axis=1)
    order = np.lexsort((ids, -values), axis=1)[:, :k]
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1))


def recheck_pairs(
    x: np.ndarray, base: np.ndarray, rows: np.ndarray, floor: np.ndarray
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Every pair that may reach the floor (n,) of its query, for a few of the given rows at a time.

    Yields those rows, and (position among them, column in base) of the pairs.
    """
    step = max(1, RECHECK_SCORES // len(base))
    for start in range(0, len(rows), step):
        at = rows[start : start + step]
        position, column = np.nonzero(x[at] @ base.T >= floor[at, None])
        yield at, (position, column)


def best_pairs(position: np.ndarray, row_ids: np.ndarray, similarity: np.ndarray, n: int, k: int) -> Neighbors:
    """The k best pairs of each position in [0, n), from a flat list of pairs."""
    found = Neighbors.none_yet(n, k)
    order = np.lexsort((row_ids, -similarity, position))
    position = position[order]
    rank = np.arange(len(order)) - np.searchsorted(position, position)
    top = rank < k
    found.row_ids[position[top], rank[top]] = row_ids[order[top]]
    found.similarity[position[top], rank[top]] = similarity[order[top]]
    return found
