"""``neighbors``: the edges of the exact cosine k-NN graph at or above a similarity."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, write_table
from curation.embeddings import EmbeddingsPart, embedding_parts
from curation.execute import Executor
from curation.neighbors import Neighbors, NeighborsConfig, merge_block
from curation.store import Location
from pipelines.stage import Inputs, Output, Stage

Base = Sequence[tuple[int, EmbeddingsPart]]  # position of a part's first row in its pool, and the part


def run(config: NeighborsConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write row, near_row and similarity of every edge, strongest first for each row."""
    embeddings: Artifact = inputs["embeddings"]
    base = based_parts(embeddings)
    items = [(i, start, part) for i, (start, part) in enumerate(base)]
    out.make(
        partial(edges_of_part, config=config, out=out.location),
        items,
        [[part_name(i)] for i, _, _ in items],
        shared={"base": base},
    )
    out.facts["backbone"] = embeddings.facts["backbone"]
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
    table = pa.table(
        {
            "row": pa.array(np.repeat(rows, near.sum(axis=1)), pa.int32()),
            "near_row": pa.array(best.row_ids[near]),
            "similarity": pa.array(best.similarity[near]),
        }
    )
    counts = {"rows": len(rows), "kept": len(rows), "dropped": 0, "bad": 0, "edges": table.num_rows}
    return write_table(out / part_name(index), table, counts)


STAGE = Stage(
    version=1, config=NeighborsConfig, run=run, reads={"embeddings": ("embed",)}, through=("embeddings.pool",)
)
