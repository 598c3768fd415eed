"""Connected components of near-duplicate edges, by union-find, at once or part by part."""

from collections.abc import Iterable

import numpy as np


def connected_components(edges: np.ndarray, n_rows: int) -> np.ndarray:
    """Component of each row, int64 (n_rows,): the smallest row id in it; a row without edges is its own component.

    edges: int (m, 2) row ids in [0, n_rows), in any order; direction, repeats and loops do not matter. Holds the
    result, 8 bytes a row, and nothing else. Raises ValueError for other shapes and for ids out of range.
    """
    return join_forests([edges], n_rows)


def join_forests(forests: Iterable[np.ndarray], n_rows: int) -> np.ndarray:
    """``connected_components`` of the edges (or forests) of many parts, read one after the other.

    The order of the parts does not matter. Holds 8 bytes a row and one part's edges: at scale this is the one task
    with reserved memory that follows ``part_forest`` on the workers.
    """
    from curation import loops

    parent = np.arange(n_rows, dtype=np.int64)
    for edges in forests:
        check_edges(edges)
        if len(edges) and edges.max() >= n_rows:
            raise ValueError(f"edges must join rows in [0, {n_rows}): got row {edges.max()}")
        loops.link(parent, edges[:, 0], edges[:, 1], 0)
    loops.flatten(parent)
    return parent


def part_forest(edges: np.ndarray) -> np.ndarray:
    """Edges int (m, 2) reduced to a spanning forest with the same components, int64 (f, 2), f <= m.

    Each edge joins a row to the smallest row of its component; sorted by row, so equal components give equal bytes.
    Only rows that edges touch count: at most about 80 bytes an edge, and 16 bytes a touched row in the result.
    Raises ValueError for other shapes and for negative ids.
    """
    return spanning_forest([edges])


def merge_forests(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spanning forest int64 (f, 2) of two forests: the ``merge`` of ``executor.reduce(part_forest, ...)``.

    Holds both, the result (each 16 bytes a touched row) and a workspace: 17 bytes for each row between the lowest
    and the highest touched one, or about 80 bytes an edge where touched rows are sparse. ``join_forests`` takes less
    when most rows are touched.
    """
    return spanning_forest([a, b])


def spanning_forest(edge_lists: list[np.ndarray]) -> np.ndarray:
    """One star to the smallest row for each component of all edges together."""
    from curation import loops

    for edges in edge_lists:
        check_edges(edges)
    edge_lists = [edges for edges in edge_lists if len(edges)]
    if not edge_lists:
        return np.empty((0, 2), np.int64)
    low = min(int(edges.min()) for edges in edge_lists)
    span = max(int(edges.max()) for edges in edge_lists) - low + 1
    if span <= 4 * sum(map(len, edge_lists)):  # dense: a parent for every row of the span takes less than a sort
        parent = np.arange(span)
        for edges in edge_lists:
            loops.link(parent, edges[:, 0], edges[:, 1], low)
        loops.flatten(parent)
        rows = np.flatnonzero(parent != np.arange(span))
        return np.stack([rows + low, parent[rows] + low], axis=1)
    touched = np.unique(np.concatenate(edge_lists))
    parent = np.arange(len(touched))
    for edges in edge_lists:
        loops.link(parent, np.searchsorted(touched, edges[:, 0]), np.searchsorted(touched, edges[:, 1]), 0)
    loops.flatten(parent)
    rows = np.flatnonzero(parent != np.arange(len(touched)))
    return np.stack([touched[rows], touched[parent[rows]]], axis=1).astype(np.int64)


def check_edges(edges: np.ndarray) -> None:
    """Raise ValueError unless ``edges`` is int (m, 2) without negative ids."""
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
        raise ValueError(f"edges must be an integer array (m, 2): got {edges.dtype} {edges.shape}")
    if len(edges) and edges.min() < 0:
        raise ValueError(f"edges must join rows from 0 on: got row {edges.min()}")
