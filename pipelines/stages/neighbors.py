"""``neighbors``: the edges of the cosine k-NN graph at or above a similarity, of all rows or within clusters.

Small pools are searched exactly, larger ones in cells (``pipelines.stages.join``); the facts say how, and with which
recall.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.embeddings import EmbeddingsPart
from curation.equal import digest_records, find_equal
from curation.execute import Executor
from curation.finders import finder_name
from curation.neighbors import Neighbors, NeighborsConfig, merge_block, nearest_neighbors
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, Step, Timed, make_aside
from pipelines.stages.connect import range_at, raw_name
from pipelines.stages.edges import (
    Distinct,
    EqualRows,
    KnownEdges,
    Part,
    count_distinct,
    device_of,
    edge_records,
    equal_edges,
    find_equal_rows,
    most_neighbors,
    part_names,
    parts_of,
    starts_of,
    strongest,
    write_edges,
)
from pipelines.stages.join import join_in_cells

EXACT_ROWS = 50_000  # up to here method auto searches exactly
GROUP_ROWS = 65_536  # rows that are searched by one task within clusters, on average


class Vectors(Protocol):
    """What can be searched: an embeddings part, or some of its rows."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """``rows`` int32 (n,) within a part of a pool, ascending, and ``x`` float32 (n, d) unit rows."""
        ...


Base = Sequence[tuple[int, Vectors]]  # position of a part's first row in its pool, and the part


def check(name: str, config: NeighborsConfig, inputs: Mapping[str, Step]) -> None:
    """Within clusters nothing is to be chosen, and nothing known. Raises UserError before anything runs."""
    check_method(name, config, "hierarchy" in inputs, "known" in inputs)
    if "known" in inputs and inputs["known"].config is not None:
        check_known_config(name, config, inputs["known"].config)


def check_known_config(name: str, config: NeighborsConfig, known: NeighborsConfig) -> None:
    """Raise UserError unless a search left all edges that are asked for."""
    if known.min_similarity > config.min_similarity or known.n_neighbors < config.n_neighbors:
        raise UserError(
            f"{name}.known must have n_neighbors {config.n_neighbors} or more from min_similarity "
            f"{config.min_similarity} or less: got {known.n_neighbors} from {known.min_similarity}",
            "leave known out, or ask for what it has",
        )


def known_edges(config: NeighborsConfig, known: Artifact, parts: Sequence[Part], embeddings: Artifact) -> KnownEdges:
    """The edges of an artifact whose embeddings come first in these. Raises UserError when they do not."""
    check_known_config("neighbors", config, NeighborsConfig(**known.manifest["config"]))
    if "method" not in known.facts:
        raise UserError("neighbors.known must be of this version: it was made by an older one", "run its step again")
    earlier = known.input("embeddings")
    before = [(part.rows, part.sha256) for part in earlier.parts]
    starts = pool_of(earlier).starts  # near rows are positions in a pool
    if [(part.rows, part.sha256) for part in embeddings.parts[: len(before)]] != before or not np.array_equal(
        pool_of(embeddings).starts[: len(starts)], starts
    ):
        raise UserError(
            "neighbors.known must be of the first members of neighbors.embeddings: it was made from other vectors",
            "put the embeddings behind known first in the union",
        )
    if known.facts["method"] == "clusters":
        raise UserError("neighbors.known must be of a search of all rows: it looked within clusters", "leave known out")
    return KnownEdges(known, len(before))


def check_method(name: str, config: NeighborsConfig, within: bool, known: bool) -> None:
    """Raise UserError for cells within clusters, and for known edges there."""
    if within and known:
        raise UserError(f"{name}.known is for a search of all rows: got it with a hierarchy", "leave one of them out")
    if within and config.method == "cells":
        raise UserError(
            f"{name}.method must be auto or exact with a hierarchy: got cells",
            "leave hierarchy out to look for neighbours across clusters too",
        )


def run(config: NeighborsConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write row, near_row, similarity and equal of every edge, strongest first for each row.

    ``equal``: near_row is the lowest of the rows that this row is equal to, and the row has no other edge; what is
    near that row is near this one. That row has an edge to the lowest of its copies, beside its ``n_neighbors``.

    With ``known``, an artifact of this kind for the first members of a union, only pairs with a row of a later member
    are looked for. The edges are those of a search of all rows: in an exact search byte for byte. Where lists are full
    (``full_lists`` counts them), new rows push edges between old ones out, as they do in a search of all rows.
    """
    embeddings: Artifact = inputs["embeddings"]
    out.facts["backbone"] = embeddings.facts["backbone"]
    out.log["search_gpus"] = device_of(executor).gpus  # of a task that searches
    check_method("neighbors", config, "hierarchy" in inputs, "known" in inputs)
    parts = parts_of(embeddings)
    if "hierarchy" in inputs:
        edges_within_clusters(config, parts, embeddings, inputs["hierarchy"], out, executor)
        return add_counts(file.counts for file in out.files)
    known = known_edges(config, inputs["known"], parts, embeddings) if "known" in inputs else None
    equal = find_equal_rows(parts, out.scratch(""), executor)
    sizes = list(executor.map(partial(count_distinct, equal=equal), parts))
    if config.method == "exact" or sum(sizes) <= (EXACT_ROWS if config.method == "auto" else 0):
        search_exactly(config, parts, equal, known, out, executor)
    else:
        join_in_cells(config, parts, equal, sizes, known, out, executor)
    return add_counts(file.counts for file in out.files)


def based_parts(embeddings: Artifact) -> list[tuple[int, EmbeddingsPart]]:
    """The parts of an embeddings artifact with the positions of their pool parts."""
    return [(part.start, part.vectors) for part in parts_of(embeddings)]


def nearest_in_base(
    queries: np.ndarray, base: Base, k: int, query_ids: np.ndarray | None = None, device: str = "cpu"
) -> Neighbors:
    """The k nearest rows of a whole artifact, one part of it in memory at a time. Ids are positions in its pool."""
    best = Neighbors.none_yet(len(queries), k)
    for start, part in base:
        rows, x = part.read()
        if len(rows):
            best = merge_block(queries, x, rows + np.int64(start), best, query_ids, device)
    return best


def search_exactly(
    config: NeighborsConfig, parts: Sequence[Part], equal: EqualRows, known: KnownEdges | None, out: Output,
    executor: Executor,
) -> None:  # fmt: skip
    """Every row against every row, but for pairs that are known."""
    out.facts["method"] = "exact"
    device = device_of(executor)
    base = [(part.start, Distinct(part, equal)) for part in parts]
    k = most_neighbors(config, parts)
    work = partial(edges_of_part, config=config, k=k, equal=equal, known=known, out=out.location, device=device.name)
    out.make(work, parts, [[part_name(part.number)] for part in parts], shared={"base": base}, gpus=device.gpus)


def edges_of_part(
    part: Part, config: NeighborsConfig, k: int, equal: EqualRows, known: KnownEdges | None, out: Location,
    device: str, base: Base,
) -> Timed:  # fmt: skip
    """The edges that start in one part; a row is never its own neighbour. The log counts rows by who looked for it."""
    rows, x = Distinct(part, equal).read()
    if known is not None and part.number < known.n_parts:
        base = base[known.n_parts :]
    best = nearest_in_base(x, base, k, rows + np.int64(part.start), device)
    near = (best.row_ids >= 0) & (best.similarity >= np.float32(config.min_similarity))
    edges = edge_records(np.repeat(rows, near.sum(axis=1)), best.row_ids[near], best.similarity[near])
    alike = equal.of(part)
    if known is not None:
        edges = strongest(np.concatenate([edges, known.of(part, config, alike)]), k)
    found = np.concatenate([edges, equal_edges(part, alike)])
    file = write_edges(out / part_name(part.number), part.vectors.n_rows, found, k)
    return Timed([file], {f"rows_by_{finder_name(device)}": len(rows)})


def edges_within_clusters(
    config: NeighborsConfig, parts: Sequence[Part], embeddings: Artifact, tree: Artifact, out: Output,
    executor: Executor,
) -> None:  # fmt: skip
    """Pairs of rows of one level-0 cluster alone: linear in rows, blind to pairs across a border.

    Rows are sent to groups of clusters, searched there, and the edges sent back to their parts: two shuffles of one
    file a task. A worker holds the rows of one group, about ``GROUP_ROWS`` unless clusters are very uneven.
    """
    if tree.input("embeddings").digest != embeddings.digest:
        raise UserError(
            "neighbors.hierarchy must be of neighbors.embeddings: it was made from others",
            "cluster the same embeddings, or leave hierarchy out",
        )
    out.facts["method"] = "clusters"
    n_groups = max(1, -(-sum(part.vectors.n_rows for part in parts) // GROUP_ROWS))
    cells = Cells(tree, int(tree.facts["n_clusters"][0]), n_groups, int(embeddings.facts["width"]), out.scratch(""))
    names, groups = part_names(parts), range(n_groups)
    make_aside(partial(send_rows, cells=cells), parts, names, cells.scratch / "rows", executor)
    device = device_of(executor)
    search = partial(search_group, config=config, cells=cells, starts=starts_of(parts), device=device.name)
    make_aside(search, groups, [raw_name(g) for g in groups], cells.scratch / "edges", executor, gpus=device.gpus)
    work = partial(gather_edges, cells=cells, k=config.n_neighbors, out=out.location)
    out.make(work, parts, [[part_name(part.number)] for part in parts])


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


SENT_EDGE = np.dtype([("row_id", "<i8"), ("near_row", "<i8"), ("similarity", "<f4"), ("equal", "?")])


def send_rows(part: Part, cells: Cells) -> None:
    """Send the unit rows of a part to the groups of their clusters."""
    rows, x = part.vectors.read()
    records = np.empty(len(rows), cells.record)
    records["row_id"], records["x"] = rows + np.int64(part.start), x
    records["label"] = read_table(cells.tree.part(part.number), ["label"])["label"].to_numpy()
    group = records["label"].astype(np.int64) * cells.n_groups // cells.n_clusters
    write_shuffle(cells.scratch / "rows" / raw_name(part.number), records, group, cells.n_groups)


def search_group(group: int, config: NeighborsConfig, cells: Cells, starts: np.ndarray, device: str) -> None:
    """Find the edges inside every cluster of a group and send them to the parts of their rows."""
    files = [cells.scratch / "rows" / raw_name(number) for number in range(len(starts))]
    records = np.concatenate([read_shuffle(file, cells.record, group) for file in files])
    records = records[np.argsort(records["label"], kind="stable")]  # in a cluster rows stay in ascending order
    bounds = np.flatnonzero(np.r_[True, np.diff(records["label"]) != 0, True]) if len(records) else np.zeros(1, int)
    edges = [np.zeros(0, SENT_EDGE)]
    for begin, end in pairwise(bounds.tolist()):
        edges.append(edges_of_cluster(records[begin:end], config, device))
    sent = np.concatenate(edges)
    write_shuffle(cells.scratch / "edges" / raw_name(group), sent, range_at(starts, sent["row_id"]), len(starts))


def edges_of_cluster(records: np.ndarray, config: NeighborsConfig, device: str) -> np.ndarray:
    """SENT_EDGE (m,): the k nearest rows of every row among those of its cluster, copies apart."""
    equal = find_equal(digest_records(records["x"], records["row_id"]))
    copies = equal["row_id"][equal["copy"]]
    records = records[~np.isin(records["row_id"], copies)]
    x = np.ascontiguousarray(records["x"])
    best = nearest_neighbors(x, x, config.n_neighbors, np.arange(len(x)), device)
    near = (best.row_ids >= 0) & (best.similarity >= np.float32(config.min_similarity))
    edges = np.zeros(int(near.sum()) + len(equal), SENT_EDGE)
    found, alike = edges[len(equal) :], edges[: len(equal)]
    found["row_id"] = np.repeat(records["row_id"], near.sum(axis=1))
    found["near_row"], found["similarity"] = records["row_id"][best.row_ids[near]], best.similarity[near]
    alike["row_id"], alike["near_row"], alike["similarity"] = equal["row_id"], equal["other"], 1
    alike["equal"] = equal["copy"]
    return edges


def gather_edges(part: Part, cells: Cells, k: int, out: Location) -> FileInfo:
    """Write the edges of a part's rows, by row; every row has its edges from one group."""
    files = [cells.scratch / "edges" / raw_name(group) for group in range(cells.n_groups)]
    sent = np.concatenate([read_shuffle(file, SENT_EDGE, part.number) for file in files])
    edges = edge_records(sent["row_id"] - part.start, sent["near_row"], sent["similarity"], sent["equal"])
    return write_edges(out / part_name(part.number), part.vectors.n_rows, edges, k)


STAGE = Stage(
    version=2,
    config=NeighborsConfig,
    run=run,
    reads={"embeddings": ("embed",)},
    optional={"hierarchy": ("cluster",), "known": ("neighbors",)},
    through=("embeddings.pool", "hierarchy.embeddings", "known.embeddings"),
    check=check,
)
