"""``dedup``: one image of every group of near-duplicates, by the rule of the config."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.components import distinct, spanning_forest
from curation.dedup import (
    DedupConfig,
    Dropped,
    distance_scores,
    histogram_text,
    merge_dropped,
    near_earlier,
    strongest_edge,
)
from curation.embeddings import covered_rows
from curation.execute import Executor, Ref
from curation.selection import write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SCRATCH, Inputs, Output, Stage, Step, make_aside, part_span
from pipelines.stages.connect import RowRange, Span, connect, part_ranges, raw_name, starts_of, write_pairs
from pipelines.stages.elect import elect, representatives_of

GROUP_EDGES = 1 << 22  # edges that become one spanning forest, unless one part has more: 100 bytes each while they do


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
    names = [[part_name(index)] for index, _, _ in spans]
    job = Job(near, embeddings, out.location)
    if config.rule == "component":
        ranges = part_ranges(spans)
        stay_by_component(job, scores, spans, ranges, executor)
        out.make(partial(write_elected, job=job), spans, names, shared={"starts": starts_of(ranges)})
    else:
        dropped = drop_near_earlier(job, scores, spans, executor)
        out.make(partial(write_not_dropped, job=job), spans, names, shared={"dropped": dropped})
    counts = add_counts(file.counts for file in out.files)
    check_drop(config.max_drop_fraction, counts, near, [part.name for part in near.parts])
    return counts


class Job(NamedTuple):
    """What tasks read, and where they write."""

    near: Artifact
    embeddings: Artifact
    out: Location

    def aside(self, folder: str) -> Location:
        """A folder of scratch files."""
        return self.out / SCRATCH / folder


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


def stay_by_component(
    job: Job, scores: Scores, spans: Sequence[Span], ranges: Sequence[RowRange], executor: Executor
) -> None:
    """Leave the row that stays for every row in scratch: see ``elect``."""
    forests, groups = job.aside("forests"), edge_groups(spans, [part.rows for part in job.near.parts])
    names = [raw_name(i) for i in range(len(groups))]
    make_aside(partial(forest_of_group, job=job), list(enumerate(groups)), names, forests, executor)
    connect(job.aside("components"), [forests / name for name in names], ranges, executor)
    elect(job.aside("components"), ranges, partial(scores_of_range, scores=scores), executor)


def edge_groups(spans: Sequence[Span], n_edges: Sequence[int]) -> list[list[Span]]:
    """Consecutive parts with at most GROUP_EDGES edges together, or one part: many parts have few edges each."""
    groups: list[list[Span]] = []
    size = 0
    for span, n in zip(spans, n_edges, strict=True):
        if not groups or size + n > GROUP_EDGES:
            groups.append([])
            size = 0
        groups[-1].append(span)
        size += n
    return groups


def forest_of_group(item: tuple[int, Sequence[Span]], job: Job) -> None:
    """The spanning forest of the edges of some parts."""
    number, spans = item
    write_pairs(job.aside("forests") / raw_name(number), spanning_forest([edges_of_part(span, job) for span in spans]))


def edges_of_part(span: Span, job: Job) -> np.ndarray:
    """The edges that start in a part, int64 (m, 2)."""
    index, start, _ = span
    edges = read_table(job.near.part(index), ["row", "near_row"])
    return np.stack([edges["row"].to_numpy() + np.int64(start), edges["near_row"].to_numpy()], axis=1)


def scores_of_range(rows: RowRange, row_ids: np.ndarray, scores: Scores) -> np.ndarray:
    """int64 (n,): the scores of some rows of a range, ascending."""
    at = np.searchsorted(row_ids, [rows.start, *(start + n for _, start, n in rows.spans)])
    found = [score_rows(span, scores, row_ids[i:j]) for span, i, j in zip(rows.spans, at, at[1:], strict=False)]
    return np.concatenate(found)


def drop_near_earlier(job: Job, scores: Scores, spans: Sequence[Span], executor: Executor) -> Ref[Dropped]:
    """What rule ``semdedup`` drops. On a worker: 8 bytes for each row with an edge and for its score, 20 for each that
    is dropped."""
    touched = executor.reduce(partial(touched_by_part, job=job), spans, distinct_of_both)
    ranks = executor.reduce(partial(scores_of_part, scores=scores), spans, concatenate, shared={"touched": touched})
    work = partial(dropped_of_part, job=job)
    return executor.reduce(work, spans, merge_dropped, shared={"touched": touched, "ranks": ranks})


def touched_by_part(span: Span, job: Job) -> np.ndarray:
    """Rows at either end of a part's edges, int64, ascending, each once."""
    return distinct(edges_of_part(span, job))


def distinct_of_both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rows of two lists, for ``executor.reduce``."""
    return distinct(np.concatenate([a, b]))


def scores_of_part(span: Span, scores: Scores, touched: np.ndarray) -> np.ndarray:
    """The scores of a part's rows that have an edge, int64."""
    begin, end = np.searchsorted(touched, [span[1], span[1] + span[2]])
    return score_rows(span, scores, touched[begin:end])


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


def dropped_of_part(span: Span, job: Job, touched: np.ndarray, ranks: np.ndarray) -> Dropped:
    """The rows that a part's edges drop, of this part and of others."""
    similarity = read_table(job.near.part(span[0]), ["similarity"])["similarity"].to_numpy()
    return near_earlier(edges_of_part(span, job), similarity, touched, ranks)


def write_elected(span: Span, job: Job, starts: np.ndarray) -> FileInfo:
    """The decision on every row of a part that was embedded: one of every component stays."""
    return write_part(span, job, representatives_of(span, job.aside("components"), starts))


def write_not_dropped(span: Span, job: Job, dropped: Dropped) -> FileInfo:
    """The decision on every row of a part that was embedded: a row stays, or the nearest earlier one is named."""
    _, start, n_rows = span
    representative = np.arange(start, start + n_rows)
    begin, end = np.searchsorted(dropped.row_id, [start, start + n_rows])
    representative[dropped.row_id[begin:end] - start] = dropped.near_row[begin:end]
    return write_part(span, job, representative)


def write_part(span: Span, job: Job, representative: np.ndarray) -> FileInfo:
    """The decision on every row of a part that was embedded, from the row that stays for each row of it."""
    index, start, _ = span
    rows = covered_rows(job.embeddings.part(index))
    edges = read_table(job.near.part(index))
    near_row, similarity = nearest(rows, edges)
    return write_selection(
        job.out / part_name(index),
        rows,
        representative[rows] == rows + np.int64(start),
        representative=pa.array(representative[rows]),
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
