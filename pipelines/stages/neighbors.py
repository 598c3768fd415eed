"""``neighbors``: the edges of the exact cosine k-NN graph at or above a similarity, of all rows or within clusters."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table, write_table
from curation.embeddings import EmbeddingsPart, embedding_parts
from curation.execute import Executor
from curation.neighbors import Neighbors, NeighborsConfig, merge_block, nearest_neighbors
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage

GROUP_ROWS = 65_536  # rows that are searched by one task within clusters, on average
Item = TypeVar("Item", bound=tuple[Any, ...])
Base = Sequence[tuple[int, EmbeddingsPart]]  # position of a part's first row in its pool, and the part


def run(config: NeighborsConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write row, near_row and similarity of every edge, strongest first for each row."""
    embeddings: Artifact = inputs["embeddings"]
    out.facts["backbone"] = embeddings.facts["backbone"]
    if "hierarchy" in inputs:
        return edges_within_clusters(config, embeddings, inputs["hierarchy"], out, executor)
    base = based_parts(embeddings)
    items = [(i, start, part) for i, (start, part) in enumerate(base)]
    out.make(
        partial(edges_of_part, config=config, out=out.location),
        items,
        [[part_name(i)] for i, _, _ in items],
        shared={"base": base},
    )
    return add_counts(file.counts for file in out.files)


def based_parts(embeddings: Artifact) -> Base:
    """The parts of an embeddings artifact with the positions of their pool parts."""
    starts = pool_of(embeddings).starts
    return [(int(starts[i]), part) for i, part in enumerate(embedding_parts(embeddings))]


def nearest_in_base(queries: np.ndarray, base: Base, k: int, query_ids: np.ndarray | None = None) -> Neighbors:
    """The k nearest rows of a whole artifact, one part of it in memory at a time. Ids are positions in its pool."""
    best = Neighbors.none_yet(len(queries), k)
    for start, part in base:
        rows, x = part.read()
        if len(rows):
            best = merge_block(queries, x, rows + np.int64(start), best, query_ids)
    return best


def edges_of_part(
    item: tuple[int, int, EmbeddingsPart], config: NeighborsConfig, out: Location, base: Base
) -> FileInfo:
    """The edges that start in one part; a row is never its own neighbour."""
    index, start, part = item
    rows, x = part.read()
    best = nearest_in_base(x, base, config.n_neighbors, rows + np.int64(start))
    near = (best.row_ids >= 0) & (best.similarity >= np.float32(config.min_similarity))
    rows_of_edges = np.repeat(rows, near.sum(axis=1))
    return write_edges(out / part_name(index), len(rows), rows_of_edges, best.row_ids[near], best.similarity[near])


def write_edges(
    location: Location, n_rows: int, row: np.ndarray, near_row: np.ndarray, similarity: np.ndarray
) -> FileInfo:
    """One part: edges by row, the strongest first."""
    table = pa.table(
        {"row": pa.array(row, pa.int32()), "near_row": pa.array(near_row), "similarity": pa.array(similarity)}
    )
    counts = {"rows": n_rows, "kept": n_rows, "dropped": 0, "bad": 0, "edges": table.num_rows}
    return write_table(location, table, counts)


def edges_within_clusters(
    config: NeighborsConfig, embeddings: Artifact, tree: Artifact, out: Output, executor: Executor
) -> Counts:
    """Pairs of rows of one level-0 cluster alone: linear in rows, blind to pairs across a border.

    Rows are sent to groups of clusters, searched there, and the edges sent back to their parts: two shuffles of one
    file a task. A worker holds the rows of one group, about ``GROUP_ROWS`` unless clusters are very uneven.
    """
    if tree.input("embeddings").digest != embeddings.digest:
        raise UserError(
            "neighbors.hierarchy must be of neighbors.embeddings: it was made from others",
            "cluster the same embeddings, or leave hierarchy out",
        )
    parts = based_parts(embeddings)
    n_groups = max(1, -(-sum(part.n_rows for _, part in parts) // GROUP_ROWS))
    cells = Cells(tree, int(tree.facts["n_clusters"][0]), n_groups, int(embeddings.facts["width"]), out.scratch(""))
    spread = [(i, start, part) for i, (start, part) in enumerate(parts)]
    for done in (
        executor.map(partial(send_rows, cells=cells), missing(spread, cells.scratch / "rows")),
        executor.map(
            partial(search_group, config=config, cells=cells, starts=pool_of(embeddings).starts, n_parts=len(parts)),
            missing([(g,) for g in range(n_groups)], cells.scratch / "edges"),
        ),
    ):
        for _ in done:
            pass
    work = partial(gather_edges, cells=cells, out=out.location)
    out.make(work, spread, [[part_name(i)] for i, _, _ in spread])
    return add_counts(file.counts for file in out.files)


class Cells(NamedTuple):
    """What the tasks of a search within clusters share."""

    tree: Artifact
    n_clusters: int
    n_groups: int
    width: int
    scratch: Location

    @property
    def record(self) -> np.dtype:
        """One row on its way to its group."""
        return np.dtype([("row_id", "<i8"), ("label", "<i4"), ("x", "<f4", (self.width,))])


EDGE_RECORD = np.dtype([("row_id", "<i8"), ("near_row", "<i8"), ("similarity", "<f4")])


def missing(items: Sequence[Item], folder: Location) -> list[Item]:
    """The items, numbered by their first value, whose shuffle file is not there yet."""
    there = {entry.name for entry in folder.list()} if folder.is_folder() else set()
    return [item for item in items if str(item[0]) not in there]


def send_rows(item: tuple[int, int, EmbeddingsPart], cells: Cells) -> None:
    """Send the unit rows of a part to the groups of their clusters."""
    index, start, part = item
    rows, x = part.read()
    records = np.empty(len(rows), cells.record)
    records["row_id"], records["x"] = rows + np.int64(start), x
    records["label"] = read_table(cells.tree.part(index), ["label"])["label"].to_numpy()
    group = records["label"].astype(np.int64) * cells.n_groups // cells.n_clusters
    write_shuffle(cells.scratch / "rows" / str(index), records, group, cells.n_groups)


def search_group(item: tuple[int], config: NeighborsConfig, cells: Cells, starts: np.ndarray, n_parts: int) -> None:
    """Find the edges inside every cluster of a group and send them to the parts of their rows."""
    (group,) = item
    found = [read_shuffle(cells.scratch / "rows" / str(part), cells.record, group) for part in range(n_parts)]
    records = np.concatenate(found)
    records = records[np.argsort(records["label"], kind="stable")]  # in a cluster rows stay in ascending order
    bounds = np.flatnonzero(np.r_[True, np.diff(records["label"]) != 0, True]) if len(records) else np.zeros(1, int)
    edges = [np.zeros(0, EDGE_RECORD)]
    for begin, end in pairwise(bounds.tolist()):
        edges.append(edges_of_cluster(records[begin:end], config))
    sent = np.concatenate(edges)
    destination = np.searchsorted(starts, sent["row_id"], side="right") - 1
    write_shuffle(cells.scratch / "edges" / str(group), sent, destination, n_parts)


def edges_of_cluster(records: np.ndarray, config: NeighborsConfig) -> np.ndarray:
    """EDGE_RECORD (m,): the k nearest rows of every row among those of its cluster."""
    x = np.ascontiguousarray(records["x"])
    best = nearest_neighbors(x, x, config.n_neighbors, np.arange(len(x)))
    near = (best.row_ids >= 0) & (best.similarity >= np.float32(config.min_similarity))
    edges = np.empty(int(near.sum()), EDGE_RECORD)
    edges["row_id"] = np.repeat(records["row_id"], near.sum(axis=1))
    edges["near_row"], edges["similarity"] = records["row_id"][best.row_ids[near]], best.similarity[near]
    return edges


def gather_edges(item: tuple[int, int, EmbeddingsPart], cells: Cells, out: Location) -> FileInfo:
    """Write the edges of a part's rows, by row; every row has its edges from one group, in order."""
    index, start, part = item
    found = [read_shuffle(cells.scratch / "edges" / str(g), EDGE_RECORD, index) for g in range(cells.n_groups)]
    edges = np.concatenate(found)
    edges = edges[np.argsort(edges["row_id"], kind="stable")]
    row = (edges["row_id"] - start).astype(np.int32)
    return write_edges(out / part_name(index), part.n_rows, row, edges["near_row"], edges["similarity"])


STAGE = Stage(
    version=1,
    config=NeighborsConfig,
    run=run,
    reads={"embeddings": ("embed",)},
    optional={"hierarchy": ("cluster",)},
    through=("embeddings.pool", "hierarchy.embeddings"),
)
