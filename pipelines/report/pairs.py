"""What the page says of near copies and of leaks: dropped images, each beside the one that it was dropped for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact, pool_of, read_table
from pipelines.report import drawings
from pipelines.report.groups import group_charts, retracted_text, rule_text, search_text, shape_text
from pipelines.report.run import Run, best_of
from pipelines.report.thumbnails import make_thumbs
from pipelines.rows import by_part, vectors_of_part
from pipelines.stages.certificate import read_certificates

N_BINS = 24  # of the histogram of similarities


class Pair(NamedTuple):
    """A dropped row and the row that it was dropped for."""

    row_id: int
    near: int  # in the same pool, or in the reference
    similarity: float  # of the dropped row's strongest edge, or to the reference row
    luck: float  # drawn


class Pairs(NamedTuple):
    """What one or more parts have dropped."""

    histogram: np.ndarray  # int64 (N_BINS,), from the threshold to 1
    strongest: list[Pair]
    weakest: list[Pair]
    lucky: list[Pair]


def duplicates(run: Run) -> list[dict[str, Any]]:
    """Every dedup step: what was dropped beside what stayed."""
    found = []
    for name, step in run.of("dedup").items():
        near = step.input("neighbors")
        pool, low = run.pool(step), near.manifest["config"]["min_similarity"]
        pairs = gather_pairs(run, step, "representative", low)
        groups = groups_of(pairs)
        shown = [pair for _, some in groups for pair in some]
        thumbs = make_thumbs(pool, [i for pair in shown for i in (pair.row_id, pair.near)], run.executor)
        cosine = cosines(run, near.input("embeddings"), pool, shown)
        found.append({
            "name": name, "counts": step.counts, "min_similarity": low, "backbone": near.facts["backbone"]["name"],
            "rule": rule_text(step.manifest["config"]), "shape": shape_text(step.facts),
            "search": search_text(near.facts), "retracted": retracted_text(step.counts),
            "charts": [histogram(pairs.histogram, low, "strongest similarity"), *group_charts(step.facts)],
            "groups": [
                (title, [{"left": thumbs[p.near], "right": thumbs[p.row_id], "similarity": cosine[p.row_id],
                          "edge": p.similarity} for p in some])
                for title, some in groups
            ],
        })  # fmt: skip
    return found


def leaks(run: Run) -> list[dict[str, Any]]:
    """Every decontaminate step: of each reference what is certified, and dropped images beside its own."""
    found = []
    for name, step in run.of("decontaminate").items():
        pool, config, low = run.pool(step), step.manifest["config"], step.manifest["config"]["min_similarity"]
        joined = gather_pairs(run, step, "through", low) if config["mode"] == "component" else None
        found.append({
            "name": name, "counts": step.counts, "min_similarity": low, "mode": config["mode"],
            "backbone": step.input("embeddings").facts["backbone"]["name"],
            "hops": step.facts.get("hops", {}), "largest": step.facts.get("largest_component", 0),
            "references": [leaks_of(run, step, index, known)
                           for index, known in enumerate(read_certificates(step).values())],
            "joined": [] if joined is None else picture_pairs(run, groups_of(joined), pool, pool),
        })  # fmt: skip
    return found


def leaks_of(run: Run, step: Artifact, index: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """One reference: its certificate, the charts of it, and the dropped images that are nearest to it."""
    low, pool = known["min_similarity"], run.pool(step)
    reference = run.pool(step.input(f"reference.{known['reference']}"))
    pairs = gather_pairs(run, step, "near_row", low, index)
    groups = picture_pairs(run, groups_of(pairs), reference, pool)
    charts = [certified(known), histogram(pairs.histogram, low, "similarity to the nearest reference image")]
    return {"certificate": known, "pool": run.name(reference), "charts": charts, "groups": groups}


def certified(known: Mapping[str, Any]) -> Any:
    """How near the pool came to each reference image, from the first bin with one on."""
    counts = known["histogram"]
    first = next((i for i, n in enumerate(counts) if n), 0)
    low = first / len(counts)
    what = "best similarity of each reference image in the pool"
    alt = f"Histogram of the {what}: {sum(counts)} images of {known['reference']}, from {low:g} to 1"
    ticks = [f"{low:g}", f"{(low + 1) / 2:g}", "1"]
    return drawings.bar_chart([("before", counts[first:])], ticks, what, alt) if any(counts) else ""


def picture_pairs(
    run: Run, groups: Sequence[tuple[str, list[Pair]]], near_pool: Artifact, pool: Artifact
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Thumbnails for the pairs of some groups: left the near image, right the dropped one."""
    shown = [pair for _, some in groups for pair in some]
    mine = make_thumbs(pool, [pair.row_id for pair in shown], run.executor)
    theirs = make_thumbs(near_pool, [pair.near for pair in shown], run.executor)
    return [
        (title, [{"left": theirs[p.near], "right": mine[p.row_id], "similarity": p.similarity, "edge": p.similarity}
                 for p in some])
        for title, some in groups
    ]  # fmt: skip


def gather_pairs(run: Run, step: Artifact, column: str, low: float, reference: int | None = None) -> Pairs:
    """The shown pairs of a step; of one ``reference``, by its index, the dropped rows that are nearest to it."""
    n = run.config.n_pairs
    work = partial(part_pairs, step=step, column=column, low=low, n=n, seed=run.config.seed, reference=reference)
    total = Pairs(np.zeros(N_BINS, np.int64), [], [], [])
    for pairs in run.executor.map(work, range(len(step.parts))):
        total = merge_pairs(total, pairs, n)
    return total


def part_pairs(
    index: int, step: Artifact, column: str, low: float, n: int, seed: int, reference: int | None = None
) -> Pairs:
    """The dropped rows of one part: the n most and least similar and n drawn ones.

    ``column`` says which row each was dropped for; of ``through``, which joins images to a component, the similarity is
    that of the join, and the rows are those that are not near a reference image themselves.
    """
    table = read_table(step.part(index))
    table = table.filter(pc.invert(table["kept"]))
    if reference is not None:
        table = table.filter(pc.equal(table["reference"], reference))
    if "hops" in table.column_names:
        table = table.filter(pc.greater(table["hops"], 1) if column == "through" else pc.equal(table["hops"], 1))
    luck = np.random.default_rng([seed, index]).random(table.num_rows)
    similarity = table["through_similarity" if column == "through" else "similarity"].to_numpy()
    row_id = table["row"].to_numpy() + pool_of(step).starts[index]
    near = table[column].to_numpy()
    orders = [np.lexsort((row_id, key))[:n] for key in (-similarity, similarity, luck)]
    picks = [[Pair(int(row_id[i]), int(near[i]), float(similarity[i]), float(luck[i])) for i in o] for o in orders]
    return Pairs(count_bins(similarity, low), *picks)


def count_bins(similarity: np.ndarray, low: float) -> np.ndarray:
    """int64 (N_BINS,): how many similarities, float32 (n,) from the threshold on, are in each bin up to 1.

    float64, because near 1 float32 has fewer values than there are bins; from the threshold as the kernels know it,
    a float32, to 1, which rounding may pass, so that every row is in a bin.
    """
    low = float(np.float32(low))
    return np.histogram(np.minimum(similarity.astype(np.float64), 1.0), N_BINS, (low, 1.0))[0]


def merge_pairs(a: Pairs, b: Pairs, n: int) -> Pairs:
    """The pairs of both, cut to n of a kind."""
    return Pairs(
        a.histogram + b.histogram,
        best_of(a.strongest + b.strongest, n, lambda p: (-p.similarity, p.row_id)),
        best_of(a.weakest + b.weakest, n, lambda p: (p.similarity, p.row_id)),
        best_of(a.lucky + b.lucky, n, lambda p: (p.luck, p.row_id)),
    )


def groups_of(pairs: Pairs) -> list[tuple[str, list[Pair]]]:
    """Headings and their pairs, each pair once."""
    seen: set[int] = set()
    groups = []
    for title, some in (
        ("Least similar", pairs.weakest),
        ("Drawn at random", pairs.lucky),
        ("Most similar", pairs.strongest),
    ):
        fresh = [pair for pair in some if pair.row_id not in seen]
        seen |= {pair.row_id for pair in fresh}
        if fresh:
            groups.append((title, fresh))
    return groups


def histogram(counts: np.ndarray, low: float, what: str) -> Any:
    """How similar the dropped images were."""
    ticks = [f"{low:g}", f"{(low + 1) / 2:g}", "1"]
    alt = f"Histogram of the {what} of {counts.sum()} dropped images, from {low:g} to 1"
    return drawings.bar_chart([("after", counts.tolist())], ticks, what, alt) if counts.sum() else ""


def cosines(run: Run, embeddings: Artifact, pool: Artifact, pairs: Sequence[Pair]) -> dict[int, float]:
    """The similarity of each dropped row to its representative; the edge that dropped it may be to another row."""
    wanted = np.unique(np.array([i for pair in pairs for i in (pair.row_id, pair.near)], np.int64))
    work = partial(vectors_of_part, embeddings=embeddings)
    vectors: list[np.ndarray] = list(run.executor.map(work, list(by_part(wanted, pool))))
    x = dict(zip(wanted.tolist(), np.concatenate(vectors) if vectors else [], strict=True))
    return {pair.row_id: float(x[pair.row_id] @ x[pair.near]) for pair in pairs}
