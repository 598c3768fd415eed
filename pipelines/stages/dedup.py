"""``dedup``: one image of every connected component of near-duplicates."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.components import merge_forests, part_forest
from curation.dedup import Best, DedupConfig, best_rows, histogram_text, merge_best, strongest_edge
from curation.embeddings import covered_rows
from curation.execute import Executor, on_worker
from curation.selection import write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, part_span

Touched = tuple[np.ndarray, np.ndarray]  # rows with an edge, ascending, and the smallest row of their component
Span = tuple[int, int, int]  # part, position of its first row in the pool, rows


class Components(NamedTuple):
    """The rows that have an edge, and what became of them. int64 (m,) each, ascending by row."""

    row_id: np.ndarray
    component: np.ndarray  # the smallest row id in it
    representative: np.ndarray  # the row that stays


def run(config: DedupConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept, representative, and the near row and its similarity of every row."""
    near: Artifact = inputs["neighbors"]
    embeddings, pool = near.input("embeddings"), pool_of(near)
    spans = part_span(pool)
    forest = executor.reduce(partial(forest_of_part, near=near), spans, merge_forests)
    touched = on_worker(executor, members, {"forest": forest})
    best = executor.reduce(
        partial(best_of_part, pool=pool, keep=config.keep), spans, merge_best, shared={"touched": touched}
    )
    components = on_worker(executor, join, {"touched": touched, "best": best})
    names = [[part_name(index)] for index, _, _ in spans]
    write = partial(write_part, near=near, embeddings=embeddings, out=out.location)
    out.make(write, spans, names, shared={"components": components})
    counts = add_counts(file.counts for file in out.files)
    check_drop(config.max_drop_fraction, counts, near, [part.name for part in near.parts])
    return counts


def forest_of_part(span: Span, near: Artifact) -> np.ndarray:
    """The spanning forest of a part's edges, int64 (f, 2)."""
    index, start, _ = span
    edges = read_table(near.part(index), ["row", "near_row"])
    return part_forest(np.stack([edges["row"].to_numpy() + np.int64(start), edges["near_row"].to_numpy()], axis=1))


def members(forest: np.ndarray) -> Touched:
    """(row_id, component) of every row that has an edge, ascending: the roots stand for themselves."""
    roots = np.unique(forest[:, 1])
    row_id = np.concatenate([roots, forest[:, 0]])
    component = np.concatenate([roots, forest[:, 1]])
    order = np.argsort(row_id, kind="stable")
    return row_id[order], component[order]


def best_of_part(span: Span, pool: Artifact, keep: str, touched: Touched) -> Best:
    """The best row of each component among a part's rows."""
    index, start, n_rows = span
    row_id, component = touched
    begin, end = np.searchsorted(row_id, [start, start + n_rows])
    mine = row_id[begin:end]
    if keep == "first" or not len(mine):
        return best_rows(component[begin:end], np.zeros(len(mine), np.int64), mine)
    size = read_table(pool.part(index), ["width", "height"])
    pixels = size["width"].to_numpy().astype(np.int64) * size["height"].to_numpy()
    return best_rows(component[begin:end], pixels[mine - start], mine)


def join(touched: Touched, best: Best) -> Components:
    """Every row with an edge beside its representative."""
    row_id, component = touched
    return Components(row_id, component, best.row_id[np.searchsorted(best.component, component)])


def write_part(span: Span, near: Artifact, embeddings: Artifact, out: Location, components: Components) -> FileInfo:
    """The decision on every row of a part that was embedded."""
    index, start, _ = span
    rows = covered_rows(embeddings.part(index))
    row_id = rows + np.int64(start)
    representative = row_id.copy()
    begin, end = np.searchsorted(components.row_id, [start, start + (int(rows[-1]) + 1 if len(rows) else 0)])
    representative[np.searchsorted(rows, components.row_id[begin:end] - start)] = components.representative[begin:end]
    edges = read_table(near.part(index))
    near_row, similarity = nearest(rows, edges)
    return write_selection(
        out / part_name(index),
        rows,
        representative == row_id,
        representative=pa.array(representative),
        near_row=near_row,
        similarity=similarity,
    )


def nearest(rows: np.ndarray, edges: pa.Table) -> tuple[pa.Array, pa.Array]:
    """The strongest edge of every row, null where it has none: (near_row int64, similarity float32)."""
    with_edge, first = strongest_edge(edges["row"].to_numpy(), edges["similarity"].to_numpy())
    at = np.searchsorted(rows, with_edge)
    none = np.ones(len(rows), bool)
    none[at] = False
    near_row, similarity = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.float32)
    near_row[at], similarity[at] = edges["near_row"].to_numpy()[first], edges["similarity"].to_numpy()[first]
    return pa.array(near_row, mask=none), pa.array(similarity, mask=none)


def check_drop(most: float, counts: Counts, seen: Artifact, names: Sequence[str]) -> None:
    """Stop a step that drops more than its config allows, with the similarities in the first files it saw."""
    if counts["dropped"] <= most * counts["rows"]:
        return
    columns = [read_table(seen.location / name, ["similarity"])["similarity"] for name in names[:100]]
    raise UserError(
        f"at most {most:.3g} of the rows may be dropped (max_drop_fraction): got {counts['dropped']} of "
        f"{counts['rows']}; similarities {histogram_text(np.concatenate([c.drop_null().to_numpy() for c in columns]))}",
        "raise min_similarity: a threshold belongs to a descriptor; or raise max_drop_fraction if this is meant",
    )


STAGE = Stage(
    version=1,
    config=DedupConfig,
    run=run,
    reads={"neighbors": ("neighbors",)},
    through=("neighbors.embeddings", "neighbors.embeddings.pool"),
)
