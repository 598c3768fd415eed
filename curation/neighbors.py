"""Cosine neighbours of unit rows: the config of ``neighbors``, and the exact search of one block in another.
Float32 products find candidates (``curation.finders``), float64 sums decide.

The similarity of a pair is the float64 sum of float32 products, rounded to float32. It is the same in both
directions, wherever the rows stand, however the base is cut and on whatever device, so thresholds and ties mean the
same everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from curation.checks import check_unit_rows
from curation.finders import FaissOnCpu, Finder, finder_in

QUERY_ROWS = 4096  # queries searched at once
SLACK = 16  # candidates beyond k: where the last one is clearly worse than the k-th, nothing can be missing
RECHECK_SCORES = 2**21  # scores held at once where it is not
UNIT_ROUNDOFF = 2.0**-24  # of float32
METHODS = ("auto", "exact", "cells")


@dataclass(frozen=True, kw_only=True)
class NeighborsConfig:
    """How many neighbours of each image are kept, from which similarity on, and how they are looked for."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines/, no import here

    n_neighbors: int = 64  # of each row, at most, beside an equal one
    min_similarity: float  # cosine; no default, because a threshold belongs to a descriptor
    method: str = "auto"  # "exact": every row against every row; "cells": against those that share a cell of a coarse
    # quantizer with it; "auto": exact up to 50,000 rows
    nlist: int = 0  # cells; 0: one for about 512 rows, between 64 and 65,536
    nprobe: int | str = "auto"  # cells that each row lies in; "auto": as few as reach min_recall
    min_recall: float = 0.99  # of the edges of sampled rows, compared with an exact search; below it the step fails
    recall_queries: int = 2000  # rows that recall is measured on
    seed: int = 0  # of the quantizer, the signatures and the sampled rows

    def __post_init__(self) -> None:
        for name in ("n_neighbors", "recall_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"neighbors.{name} must be at least 1: got {getattr(self, name)}")
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"neighbors.min_similarity must be in (0, 1]: got {self.min_similarity}")
        if self.method not in METHODS:
            raise ValueError(f"neighbors.method must be one of {', '.join(METHODS)}: got {self.method!r}")
        if self.nlist < 0:
            raise ValueError(f"neighbors.nlist must not be negative: got {self.nlist}")
        if self.nprobe != "auto" and (isinstance(self.nprobe, str) or self.nprobe < 1):
            raise ValueError(f"neighbors.nprobe must be 'auto' or at least 1: got {self.nprobe!r}")
        if not 0 < self.min_recall <= 1:
            raise ValueError(f"neighbors.min_recall must be in (0, 1]: got {self.min_recall}")
        if self.seed < 0:
            raise ValueError(f"neighbors.seed must not be negative: got {self.seed}")


class Neighbors(NamedTuple):
    """The nearest rows of each query, by (similarity descending, row id ascending)."""

    row_ids: np.ndarray  # int64 (n, k), -1 where there are fewer than k
    similarity: np.ndarray  # float32 (n, k), cosine, -inf where there are fewer than k

    @staticmethod
    def none_yet(n_queries: int, k: int) -> "Neighbors":
        """The running result before the first block."""
        return Neighbors(np.full((n_queries, k), -1, np.int64), np.full((n_queries, k), -np.inf, np.float32))


def nearest_neighbors(
    queries: np.ndarray, base: np.ndarray, k: int, query_ids: np.ndarray | None = None, device: str = "cpu"
) -> Neighbors:
    """The k rows of base most similar to each query, exactly: row_ids int64 (n, k) and similarity float32 (n, k).

    queries (n, d) and base (m, d): float with unit rows. A row id is the position in base; with ``query_ids`` int64
    (n,) the base row of that id is never a neighbour of its query. Order, ties and padding: see Neighbors. ``device``:
    "cpu" or "cuda", the result is the same. Holds (k + 16) * 60 bytes for each of 4,096 queries and, where ties at the
    k-th place are rechecked, 8 MiB of scores and 60 bytes for each of them that ties: 130 MB when all do; a GPU, see
    ``finders.TorchFinder``.
    Raises ValueError if rows are not unit, widths differ, k < 1 or there is no such device; ArithmeticError if products
    are not what float32 gives.
    """
    return merge_block(queries, base, np.arange(len(base)), Neighbors.none_yet(len(queries), k), query_ids, device)


def merge_block(
    queries: np.ndarray,
    base: np.ndarray,
    base_ids: np.ndarray,
    best: Neighbors,
    query_ids: np.ndarray | None = None,
    device: str = "cpu",
) -> Neighbors:
    """``best`` with the rows of one more block of base: blocks may come in any order and cut.

    queries (n, d) and base (m, d): float with unit rows; base_ids: int64 (m,), row ids that no other block holds;
    query_ids: int64 (n,), the id each query must not find. Device, memory and errors: see nearest_neighbors.
    """
    check_unit_rows(queries, "queries")
    check_unit_rows(base, "base")
    if queries.shape[1] != base.shape[1] or best.row_ids.shape[1] < 1 or len(base_ids) != len(base):
        raise ValueError(
            f"neighbours need queries and base of one width, k of at least 1 and an id for each base row: "
            f"got {queries.shape}, {base.shape}, k = {best.row_ids.shape[1]}, {len(base_ids)} ids"
        )
    merged = Neighbors(best.row_ids.copy(), best.similarity.copy())
    if len(queries) == 0 or len(base) == 0:
        return merged
    finder = finder_in(np.ascontiguousarray(base, np.float32), device)
    own = np.full(len(queries), -1, np.int64) if query_ids is None else query_ids
    for start in range(0, len(queries), QUERY_ROWS):
        at = slice(start, start + QUERY_ROWS)
        x = np.ascontiguousarray(queries[at], np.float32)
        found = merge_queries(x, finder, base_ids, Neighbors(best.row_ids[at], best.similarity[at]), own[at])
        merged.row_ids[at], merged.similarity[at] = found
    return merged


def merge_queries(x: np.ndarray, finder: Finder, base_ids: np.ndarray, best: Neighbors, own: np.ndarray) -> Neighbors:
    """``merge_block`` of float32 queries that fit in memory, inputs checked, none empty."""
    n_candidates = min(best.row_ids.shape[1] + SLACK, len(base_ids))
    score, column = finder.best(x, n_candidates)
    rows = np.repeat(np.arange(len(x)), n_candidates)
    similarity = finder.similarity(x, rows, column.ravel()).reshape(column.shape)
    error = (x.shape[1] + 2) * UNIT_ROUNDOFF * 1.01  # bound of one product of unit rows in float32
    check_products(score, similarity, error)
    merged = merge_candidates(best, base_ids[column], similarity, own)
    if n_candidates == len(base_ids):
        return merged
    open_ = np.flatnonzero(~(score[:, -1] + 2 * error < merged.similarity[:, -1]))
    for at, (position, near) in pairs_at_least(x, finder, len(base_ids), open_, merged.similarity[:, -1] - 2 * error):
        exact = finder.similarity(x, at[position], near)
        ids = base_ids[near]
        keep = ids != own[at[position]]
        found = best_pairs(position[keep], ids[keep], exact[keep], len(at), best.row_ids.shape[1])
        merged.row_ids[at], merged.similarity[at] = merge_candidates(
            Neighbors(best.row_ids[at], best.similarity[at]), found.row_ids, found.similarity, own[at]
        )
    return merged


def check_products(score: np.ndarray, similarity: np.ndarray, error: float) -> None:
    """Raise ArithmeticError unless the products of candidates keep the bound that the search rests on: a GPU may be set
    to multiply shorter numbers."""
    off = float(np.abs(score - similarity).max())
    if not off <= error:
        raise ArithmeticError(
            f"products of float32 rows must be right within {error:.2g}: got one {off:.2g} off; do not allow TF32"
        )


def merge_candidates(best: Neighbors, row_ids: np.ndarray, similarity: np.ndarray, own: np.ndarray) -> Neighbors:
    """The k best of ``best`` and candidates (n, c) that are not in it; those with the query's own id are left out."""
    k, itself = best.row_ids.shape[1], row_ids == own[:, None]
    ids = np.concatenate([best.row_ids, np.where(itself, -1, row_ids)], axis=1)
    values = np.concatenate([best.similarity, np.where(itself, np.float32(-np.inf), similarity)], axis=1)
    order = np.lexsort((ids, -values), axis=1)[:, :k]
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1))


Pairs = Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]


def recheck_pairs(x: np.ndarray, base: np.ndarray, rows: np.ndarray, floor: np.ndarray) -> Pairs:
    """Every pair that may reach the floor (n,) of its query, for a few of the given rows at a time.

    Yields those rows, and (position among them, column in base) of the pairs.
    """
    return pairs_at_least(x, FaissOnCpu(base), len(base), rows, floor)


def pairs_at_least(x: np.ndarray, finder: Finder, n_base: int, rows: np.ndarray, floor: np.ndarray) -> Pairs:
    """``recheck_pairs`` in the base of a finder."""
    step = max(1, RECHECK_SCORES // n_base)
    for start in range(0, len(rows), step):
        at = rows[start : start + step]
        yield at, finder.at_least(x[at], floor[at])


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
