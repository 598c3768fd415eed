"""``dedup``: one image of every group of near-duplicates, by the rule of the config."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.components import merge_forests, part_forest
from curation.dedup import (
    Best,
    DedupConfig,
    Dropped,
    best_rows,
    distance_scores,
    histogram_text,
    merge_best,
    merge_dropped,
    near_earlier,
    strongest_edge,
)
from curation.embeddings import covered_rows
from curation.execute import Executor, on_worker
from curation.selection import write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, Step, part_span

Touched = tuple[np.ndarray, np.ndarray]  # rows with an edge, ascending, and the smallest row of their component
Span = tuple[int, int, int]  # part, position of its first row in the pool, rows


class Components(NamedTuple):
    """The rows that have an edge, and what became of them. int64 (m,) each, ascending by row."""

    row_id: np.ndarray
    component: np.ndarray  # the smallest row id in it
    representative: np.ndarray  # the row that stays for it; by rule semdedup the nearest earlier one


def check(name: str, config: DedupConfig, inputs: Mapping[str, Step]) -> None:
    """A hierarchy where ``keep`` needs one, and only there. Raises UserError before anything runs."""
    check_hierarchy(name, config, "hierarchy" in inputs)


def check_hierarchy(name: str, config: DedupConfig, given: bool) -> None:
    """Raise UserError unless a hierarchy is given when ``keep`` needs distances and only then."""
    needed = config.keep in ("farthest", "closest")
    if needed and not given:
        raise UserError(f"{name}.keep {config.keep} needs a hierarchy: got none", "add hierarchy: and a cluster step")
    if given and not needed:
        raise UserError(
            f"{name}.hierarchy is for keep farthest or closest: got it with {config.keep}",
            "leave it out, or change keep",
        )


def run(config: DedupConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept, representative, and the near row and its similarity of every row."""
    near: Artifact = inputs["neighbors"]
    embeddings, pool = near.input("embeddings"), pool_of(near)
    spans = part_span(pool)
    scores = Scores(config.keep, pool, embeddings, tree_for(config, inputs.get("hierarchy"), embeddings))
    forest = executor.reduce(partial(forest_of_part, near=near), spans, merge_forests)
    touched = on_worker(executor, members, {"forest": forest})
    if config.rule == "component":
        best = executor.reduce(partial(best_of_part, scores=scores), spans, merge_best, shared={"touched": touched})
        components = on_worker(executor, join, {"touched": touched, "best": best})
    else:
        ranks = executor.reduce(partial(scores_of_part, scores=scores), spans, concatenate, shared={"touched": touched})
        work = partial(dropped_of_part, near=near)
        dropped = executor.reduce(work, spans, merge_dropped, shared={"touched": touched, "ranks": ranks})
        components = on_worker(executor, join_dropped, {"touched": touched, "dropped": dropped})
    names = [[part_name(index)] for index, _, _ in spans]
    write = partial(write_part, near=near, embeddings=embeddings, out=out.location)
    out.make(write, spans, names, shared={"components": components})
    counts = add_counts(file.counts for file in out.files)
    check_drop(config.max_drop_fraction, counts, near, [part.name for part in near.parts])
    return counts


class Scores(NamedTuple):
    """Where the rank of a row is to be read."""

    keep: str
    pool: Artifact
    embeddings: Artifact
    tree: Artifact | None


def tree_for(config: DedupConfig, tree: Artifact | None, embeddings: Artifact) -> Artifact | None:
    """The hierarchy, given when ``keep`` needs distances and only then. Raises UserError."""
    check_hierarchy("dedup", config, tree is not None)
    if tree is not None and tree.input("embeddings").digest != embeddings.digest:
        raise UserError(
            "dedup.hierarchy must be of the embeddings behind dedup.neighbors: it was made from others",
            "cluster the embeddings that neighbors reads",
        )
    return tree


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


def best_of_part(span: Span, scores: Scores, touched: Touched) -> Best:
    """The best row of each component among a part's rows."""
    row_id, component = touched
    begin, end = np.searchsorted(row_id, [span[1], span[1] + span[2]])
    return best_rows(component[begin:end], score_rows(span, scores, row_id[begin:end]), row_id[begin:end])


def scores_of_part(span: Span, scores: Scores, touched: Touched) -> np.ndarray:
    """The scores of a part's rows that have an edge, int64."""
    begin, end = np.searchsorted(touched[0], [span[1], span[1] + span[2]])
    return score_rows(span, scores, touched[0][begin:end])


def score_rows(span: Span, scores: Scores, mine: np.ndarray) -> np.ndarray:
    """int64 (n,), the higher the rather kept, of some row ids of a part."""
    index, start, _ = span
    if scores.keep == "first" or not len(mine):
        return np.zeros(len(mine), np.int64)
    if scores.tree is not None:
        rows = covered_rows(scores.embeddings.part(index))
        distance = read_table(scores.tree.part(index), ["sq_distance"])["sq_distance"].to_numpy()
        return distance_scores(distance[np.searchsorted(rows, mine - start)], scores.keep == "farthest")
    size = read_table(scores.pool.part(index), ["width", "height"])
    pixels = size["width"].to_numpy().astype(np.int64) * size["height"].to_numpy()
    some: np.ndarray = pixels[mine - start]
    return some


def concatenate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One part's values after the other's, for ``executor.reduce``."""
    return np.concatenate([a, b])


def dropped_of_part(span: Span, near: Artifact, touched: Touched, ranks: np.ndarray) -> Dropped:
    """The rows that a part's edges drop, of this part and of others."""
    index, start, _ = span
    edges = read_table(near.part(index))
    pairs = np.stack([edges["row"].to_numpy() + np.int64(start), edges["near_row"].to_numpy()], axis=1)
    return near_earlier(pairs, edges["similarity"].to_numpy(), touched[0], ranks)


def join_dropped(touched: Touched, dropped: Dropped) -> Components:
    """Every row with an edge beside itself, or beside the earlier row it is nearest to."""
    row_id, component = touched
    representative = row_id.copy()
    representative[np.searchsorted(row_id, dropped.row_id)] = dropped.near_row
    return Components(row_id, component, representative)


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


def check_drop(most: float, counts: Counts, seen: Artifact, names: Sequence[str], also: str = "") -> None:
    """Stop a step that drops more than its config allows, with the similarities in the first files it saw.

    ``also`` is what the step has to say of those it drops, put behind their number.
    """
    if counts["dropped"] <= most * counts["rows"]:
        return
    columns = [read_table(seen.location / name, ["similarity"])["similarity"] for name in names[:100]]
    similarity = np.concatenate([column.drop_null().to_numpy() for column in columns])
    raise UserError(
        f"at most {most:.3g} of the rows may be dropped (max_drop_fraction): got {counts['dropped']} of "
        f"{counts['rows']}{also}; similarities {histogram_text(similarity)}",
        "raise min_similarity: a threshold belongs to a descriptor; or raise max_drop_fraction if this is meant",
    )


STAGE = Stage(
    version=1,
    config=DedupConfig,
    run=run,
    reads={"neighbors": ("neighbors",)},
    optional={"hierarchy": ("cluster",)},
    through=("neighbors.embeddings", "neighbors.embeddings.pool", "hierarchy.embeddings"),
    check=check,
)
