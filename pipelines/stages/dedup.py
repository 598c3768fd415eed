"""``dedup``: one image of every group of near-duplicates, by the rule of the config."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.components import spanning_forest
from curation.dedup import DedupConfig, histogram_text, strongest_edge
from curation.embeddings import covered_rows
from curation.execute import Executor
from curation.selection import write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, Step, make_aside, part_span
from pipelines.stages.connect import RowRange, Span, connect, part_ranges, raw_name, starts_of, write_pairs
from pipelines.stages.elect import elect
from pipelines.stages.groups import measure_groups
from pipelines.stages.likeness import look_at_components
from pipelines.stages.rank import Job, Scores, decided_rows, edge_groups, edges_of_part, origins_of, scores_of_range
from pipelines.stages.ranked import drop_by_rank


def check(name: str, config: DedupConfig, inputs: Mapping[str, Step]) -> None:
    """What ``keep`` needs, and only that. Raises UserError before anything runs."""
    check_inputs(name, config, inputs)


def check_inputs(name: str, config: DedupConfig, inputs: Inputs) -> None:
    """Raise UserError unless a hierarchy or scores are given when ``keep`` needs them and only then."""
    needs = {"hierarchy": (("farthest", "closest"), "a cluster step"), "scores": (("score",), "a score step")}
    for key, (words, step) in needs.items():
        if config.keep in words and key not in inputs:
            what = "a hierarchy" if key == "hierarchy" else key
            raise UserError(f"{name}.keep {config.keep} needs {what}: got none", f"add {key}: and {step}")
        if config.keep not in words and key in inputs:
            raise UserError(
                f"{name}.{key} is for keep {' or '.join(words)}: got it with {config.keep}",
                "leave it out, or change keep",
            )


def run(config: DedupConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept, representative, and a near row and its similarity, of every row.

    ``representative``: the row that it was dropped for, or itself. ``near_row``: its strongest edge, null without one;
    but of what goes by rank the representative.

    With ``known``, an artifact of this kind for the first members of a union: also bool ``retracted``, rows that it
    kept and that go now. What it kept and what is kept now, without what is retracted, is what is kept now.
    """
    near: Artifact = inputs["neighbors"]
    embeddings, pool = near.input("embeddings"), pool_of(near)
    spans = part_span(pool)
    ranges = part_ranges(spans)
    scores = scores_for(config, inputs, pool, embeddings)
    known = inputs.get("known")
    if known is not None:
        check_known(known, embeddings)
    job = Job(near, embeddings, out.location)
    decided, share = job.aside("decided"), 1.0
    if config.rule == "component":
        elect_of_components(job, scores, spans, ranges, executor)
        starts = starts_of(ranges)
        decided, share = look_at_components(job, config.max_chain, scores, spans, starts, executor)
    else:
        drop_by_rank(config.rule, job, scores, spans, ranges, decided, executor)
    write = partial(write_part, job=job, decided=decided, by_rank=config.rule != "component", known=known)
    out.make(write, spans, [[part_name(index)] for index, _, _ in spans])
    counts = add_counts(file.counts for file in out.files)
    check_drop(config.max_drop_fraction, counts, near, [part.name for part in near.parts])
    out.facts |= measure_groups(decided, job.aside("groups"), ranges, executor)
    out.facts["groups"]["tightness"]["share"] = share
    return counts


def check_known(known: Artifact, embeddings: Artifact) -> None:
    """Raise UserError unless decisions are about the rows that come first."""
    before = [(part.rows, part.sha256) for part in known.input("neighbors").input("embeddings").parts]
    if [(part.rows, part.sha256) for part in embeddings.parts[: len(before)]] != before:
        raise UserError(
            "dedup.known must be of the first members of the union behind dedup.neighbors: it is of other vectors",
            "put the embeddings behind known first in the union",
        )


def scores_for(config: DedupConfig, inputs: Inputs, pool: Artifact, embeddings: Artifact) -> Scores:
    """Where ``keep`` is to be read. Raises UserError when what is given is of other rows."""
    check_inputs("dedup", config, inputs)
    tree: Artifact | None = inputs.get("hierarchy")
    if tree is not None and tree.input("embeddings").digest != embeddings.digest:
        raise UserError(
            "dedup.hierarchy must be of the embeddings behind dedup.neighbors: it was made from others",
            "cluster the embeddings that neighbors reads",
        )
    scored: Artifact | None = inputs.get("scores")
    if scored is not None and pool_of(scored).digest != pool.digest:
        raise UserError(
            "dedup.scores must be of the pool behind dedup.neighbors: it is of another",
            "score embeddings of this pool; those of a union are a union of embeddings",
        )
    origins = tuple(origins_of(pool)) if config.keep == "source_priority" else ()
    return Scores(config.keep, pool, embeddings, tree, scored, origins)


def elect_of_components(
    job: Job, scores: Scores, spans: Sequence[Span], ranges: Sequence[RowRange], executor: Executor
) -> None:
    """Leave the row that stays of its component for every row in scratch: see ``elect``."""
    forests, groups = job.aside("forests"), edge_groups(spans, [part.rows for part in job.near.parts])
    names = [raw_name(i) for i in range(len(groups))]
    make_aside(partial(forest_of_group, job=job), list(enumerate(groups)), names, forests, executor)
    connect(job.aside("components"), [forests / name for name in names], ranges, executor)
    elect(job.aside("components"), ranges, partial(scores_of_range, scores=scores), executor)


def forest_of_group(item: tuple[int, Sequence[Span]], job: Job) -> None:
    """The spanning forest of the edges of some parts."""
    number, spans = item
    edges = [np.stack(edges_of_part(span, job)[:2], axis=1) for span in spans]
    write_pairs(job.aside("forests") / raw_name(number), spanning_forest(edges))


def write_part(span: Span, job: Job, decided: Location, by_rank: bool, known: Artifact | None) -> FileInfo:
    """The decision on every row of a part that was embedded."""
    index, start, _ = span
    rows = covered_rows(job.embeddings.part(index))
    made = decided_rows(span, decided)[rows]
    kept = made["representative"] == rows + np.int64(start)
    near_row, similarity, none = nearest(rows, read_table(job.near.part(index)))
    if by_rank:
        near_row[~kept], similarity[~kept], none[~kept] = (
            made["representative"][~kept],
            made["similarity"][~kept],
            False,
        )
    retracted = known_kept(known, index, len(rows)) & ~kept if known is not None else None
    return write_selection(
        job.out / part_name(index),
        rows,
        kept,
        None if retracted is None else {"retracted": int(retracted.sum())},
        **({} if retracted is None else {"retracted": pa.array(retracted)}),
        representative=pa.array(made["representative"]),
        near_row=pa.array(near_row, mask=none),
        similarity=pa.array(similarity, mask=none),
    )


def known_kept(known: Artifact, index: int, n_rows: int) -> np.ndarray:
    """bool (n,): which rows of a part earlier decisions kept; none of a part that they did not see."""
    if index >= len(known.parts):
        return np.zeros(n_rows, bool)
    kept: np.ndarray = read_table(known.part(index), ["kept"])["kept"].to_numpy()
    return kept


def nearest(rows: np.ndarray, edges: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strongest edge of every row: (near_row int64, similarity float32, whether there is none bool)."""
    with_edge, first = strongest_edge(edges["row"].to_numpy(), edges["similarity"].to_numpy())
    at = np.searchsorted(rows, with_edge)
    none = np.ones(len(rows), bool)
    none[at] = False
    near_row, similarity = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.float32)
    near_row[at], similarity[at] = edges["near_row"].to_numpy()[first], edges["similarity"].to_numpy()[first]
    return near_row, similarity, none


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
    version=2,
    config=DedupConfig,
    run=run,
    reads={"neighbors": ("neighbors",)},
    optional={"hierarchy": ("cluster",), "scores": ("score",), "known": ("dedup",)},
    through=(
        "neighbors.embeddings",
        "neighbors.embeddings.pool",
        "known.neighbors",
        "known.neighbors.embeddings",
        "hierarchy.embeddings",
        "scores.embeddings",
        "scores.embeddings.pool",
    ),
    check=check,
)
