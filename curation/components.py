"""Connected components of near-duplicate edges: at once, part by part, or over row ranges.

A component is known by its smallest row, so the answer depends on no order. Where one task may hold a parent for
every row, it takes 4 bytes a row, 8 beyond 2**32 rows (``join_forests``). Where none may, rounds of large and small
stars pull every edge towards the smallest row of its component until no edge moves (Kiveris et al., "Connected
Components in MapReduce and Beyond", 2014): every edge is known at the range of its ends; a task first takes the lowest
neighbour of each row of its range (``lower``), then moves its edges block by block (``large_star``, ``small_star``).
A chain of n rows takes about log2(n) rounds, because each round doubles how far a row sees.
"""

from collections.abc import Iterable

import numpy as np


def connected_components(edges: np.ndarray, n_rows: int) -> np.ndarray:
    """Component of each row, int64 (n_rows,): the smallest row id in it; a row without edges is its own component.

    edges: int (m, 2) row ids in [0, n_rows), in any order; direction, repeats and loops do not matter. Holds at most
    16 bytes a row, the result among them, and no copy of the edges. Raises ValueError for other shapes and for ids
    out of range.
    """
    return join_forests([edges], n_rows).astype(np.int64)


def join_forests(forests: Iterable[np.ndarray], n_rows: int) -> np.ndarray:
    """``connected_components`` of the edges (or forests) of many parts, read one after the other.

    Returns uint32 (n_rows,), int64 beyond 2**32 rows. The order of the parts does not matter. Holds the result and
    one part's edges: at scale this is the one task with reserved memory that follows ``part_forest`` on the workers.
    """
    from curation import loops

    parent = all_rows(n_rows)
    for edges in forests:
        check_edges(edges)
        bad = loops.link(parent, edges[:, 0], edges[:, 1], 0)
        if bad >= 0:
            check_not_negative(edges[bad])
            raise ValueError(f"edges must join rows in [0, {n_rows}): got row {edges[bad].max()}")
    loops.flatten(parent)
    return parent


def part_forest(edges: np.ndarray) -> np.ndarray:
    """Edges int (m, 2) reduced to a spanning forest with the same components, int64 (f, 2), f <= m.

    Each edge joins a row to the smallest row of its component; sorted by row, so equal components give equal bytes.
    Only rows that edges touch count: at most about 100 bytes an edge, and 16 bytes a touched row in the result.
    Raises ValueError for other shapes and for negative ids.
    """
    return spanning_forest([edges])


def merge_forests(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spanning forest int64 (f, 2) of two forests: the ``merge`` of ``executor.reduce(part_forest, ...)``.

    The same for any order and any grouping of forests. Holds both, the result (each 16 bytes a touched row) and a
    workspace: 9 bytes for each row between the lowest and the highest touched one, 17 beyond 2**32 of them, or about
    100 bytes an edge where touched rows are sparse. ``join_forests`` takes less when most rows are touched.
    """
    return spanning_forest([a, b])


def spanning_forest(edge_lists: list[np.ndarray]) -> np.ndarray:
    """One star to the smallest row for each component of all edges together."""
    from curation import loops

    for edges in edge_lists:
        check_edges(edges)
        check_not_negative(edges)
    edge_lists = [edges for edges in edge_lists if len(edges)]
    if not edge_lists:
        return np.empty((0, 2), np.int64)
    low = min(int(edges.min()) for edges in edge_lists)
    span = max(int(edges.max()) for edges in edge_lists) - low + 1
    if span <= 8 * sum(map(len, edge_lists)):  # dense: a parent for every row of the span takes less than a sort
        parent = all_rows(span)
        for edges in edge_lists:
            loops.link(parent, edges[:, 0], edges[:, 1], low)
        return stars(parent) + low
    touched, at = np.unique(np.concatenate([edges.ravel() for edges in edge_lists]), return_inverse=True)
    parent = all_rows(len(touched))
    loops.link(parent, at[::2], at[1::2], 0)
    forest: np.ndarray = touched.astype(np.int64)[stars(parent)]
    return forest


def all_rows(n_rows: int) -> np.ndarray:
    """Every row its own parent: uint32 (n_rows,), int64 beyond 2**32 rows."""
    return np.arange(n_rows, dtype=np.uint32 if n_rows <= 1 << 32 else np.int64)


def distinct(ids: np.ndarray) -> np.ndarray:
    """``np.unique``: (n,), ascending, each once. That hashes, and takes fifty times as long where ids are many."""
    ids = np.sort(ids, axis=None)
    first = np.ones(len(ids), bool)
    np.not_equal(ids[1:], ids[:-1], out=first[1:])
    return ids[first]


def stars(parent: np.ndarray) -> np.ndarray:
    """int64 (f, 2): every row that is no root beside its root, of the parents that ``loops.link`` leaves."""
    from curation import loops

    loops.flatten(parent)
    rows = np.flatnonzero(parent != all_rows(len(parent)))
    return np.stack([rows, parent[rows].astype(np.int64)], axis=1)


def lower(minima: np.ndarray, edges: np.ndarray, start: int) -> None:
    """Lower the entry of every first end to the other end, in place: ``minima[u - start]`` of edges (u, v).

    minima int64 (n,) of the rows from ``start`` on, at first the rows themselves; edges int64 (m, 2).
    """
    from curation import loops

    loops.lower(minima, edges[:, 0], edges[:, 1], start)


def large_star(edges: np.ndarray, minima: np.ndarray, start: int) -> tuple[np.ndarray, int]:
    """Every larger neighbour of a row goes to the row's lowest neighbour, or to itself if that is lower.

    edges: int64 (m, 2) with the first end in the range, each edge of the graph from both of its ends. minima: int64
    (n,) of the range, after ``lower`` of all of its edges. Returns (larger, smaller) int64 (f, 2), f <= m, a forest,
    and how many edges moved. With the large stars of all other ranges and blocks the components are the same.
    """
    edges = edges[edges[:, 1] > edges[:, 0]]
    lowest = minima[edges[:, 0] - start]
    moved = int(np.count_nonzero(lowest != edges[:, 0]))
    return part_forest(np.stack([edges[:, 1], lowest], axis=1)), moved


def small_star(edges: np.ndarray, minima: np.ndarray, start: int) -> tuple[np.ndarray, int]:
    """A row and its smaller neighbours go to the lowest of them.

    As ``large_star``, but of each edge only the larger end counts; others are left out.
    """
    edges = edges[edges[:, 1] < edges[:, 0]]
    lowest = minima[edges[:, 0] - start]
    moves = edges[:, 1] != lowest
    return part_forest(np.stack([np.where(moves, edges[:, 1], edges[:, 0]), lowest], axis=1)), int(moves.sum())


def check_edges(edges: np.ndarray) -> None:
    """Raise ValueError unless ``edges`` is int (m, 2)."""
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
        raise ValueError(f"edges must be an integer array (m, 2): got {edges.dtype} {edges.shape}")


def check_not_negative(edges: np.ndarray) -> None:
    """Raise ValueError for a row below 0."""
    if edges.size and edges.min() < 0:
        raise ValueError(f"edges must join rows from 0 on: got row {edges.min()}")
