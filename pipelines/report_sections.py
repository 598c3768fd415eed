"""The parts of the page that show images: each reads its steps part by part and keeps a bounded number of rows."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Artifact, pool_of, read_table
from curation.embeddings import embedding_parts
from curation.selection import read_selection
from curation.sources import source_root
from pipelines import drawings
from pipelines.report_run import Run, best_of, step_inputs
from pipelines.stage import SELECTIONS
from pipelines.stages.cluster import labels_of_level
from pipelines.thumbnails import make_thumbs, rejected_thumb

N_BINS = 24  # of the histogram of similarities
N_BARS = 120  # clusters with a bar of their own; more are drawn as that many quantiles
MAX_LABELS = 10_000  # different labels of a pool; more are names, not classes


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


class Member(NamedTuple):
    """One image of a cluster."""

    luck: float
    row_id: int
    chosen: bool  # by the last sample of this hierarchy


def part_pairs(index: int, step: Artifact, column: str, low: float, n: int, seed: int) -> Pairs:
    """The dropped rows of one part: the n most and least similar and n drawn ones.

    ``column`` says which row each was dropped for; of ``through``, which joins images to a component, the similarity is
    that of the join, and the rows are those that are not near a reference image themselves.
    """
    table = read_table(step.part(index))
    table = table.filter(pc.invert(table["kept"]))
    if "hops" in table.column_names:
        table = table.filter(pc.greater(table["hops"], 1) if column == "through" else pc.equal(table["hops"], 1))
    luck = np.random.default_rng([seed, index]).random(table.num_rows)
    similarity = table["through_similarity" if column == "through" else "similarity"].to_numpy()
    row_id = table["row"].to_numpy() + step_starts(step)[index]
    near = table[column].to_numpy()
    orders = [np.lexsort((row_id, key))[:n] for key in (-similarity, similarity, luck)]
    picks = [[Pair(int(row_id[i]), int(near[i]), float(similarity[i]), float(luck[i])) for i in o] for o in orders]
    return Pairs(np.histogram(similarity, N_BINS, (low, 1.0))[0], *picks)


def step_starts(step: Artifact) -> np.ndarray:
    """The position of the first row of each part of the pool behind a selection."""
    return pool_of(step).starts


def merge_pairs(a: Pairs, b: Pairs, n: int) -> Pairs:
    """The pairs of both, cut to n of a kind."""
    return Pairs(
        a.histogram + b.histogram,
        best_of(a.strongest + b.strongest, n, lambda p: (-p.similarity, p.row_id)),
        best_of(a.weakest + b.weakest, n, lambda p: (p.similarity, p.row_id)),
        best_of(a.lucky + b.lucky, n, lambda p: (p.luck, p.row_id)),
    )


def gather_pairs(run: Run, step: Artifact, column: str, low: float) -> Pairs:
    """The shown pairs of a step."""
    n = run.config.n_pairs
    work = partial(part_pairs, step=step, column=column, low=low, n=n, seed=run.config.seed)
    total = Pairs(np.zeros(N_BINS, np.int64), [], [], [])
    for pairs in run.executor.map(work, range(len(step.parts))):
        total = merge_pairs(total, pairs, n)
    return total


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
            "keep": step.manifest["config"]["keep"],
            "histogram": histogram(pairs.histogram, low, "strongest similarity"),
            "groups": [
                (title, [{"left": thumbs[p.near], "right": thumbs[p.row_id], "similarity": cosine[p.row_id],
                          "edge": p.similarity} for p in some])
                for title, some in groups
            ],
        })  # fmt: skip
    return found


def leaks(run: Run) -> list[dict[str, Any]]:
    """Every decontaminate step: what was dropped beside the reference image, or beside what joins it to one."""
    found = []
    for name, step in run.of("decontaminate").items():
        pool, reference = run.pool(step), run.pool(step.input("reference"))
        config, low = step.manifest["config"], step.manifest["config"]["min_similarity"]
        pairs = gather_pairs(run, step, "near_row", low)
        groups = picture_pairs(run, groups_of(pairs), reference, pool)
        if config["mode"] == "component":
            joined = groups_of(gather_pairs(run, step, "through", low))
            groups += [(f"Joined through the left one: {title.lower()}", some)
                       for title, some in picture_pairs(run, joined, pool, pool)]  # fmt: skip
        found.append({
            "name": name, "counts": step.counts, "reference": run.name(reference), "min_similarity": low,
            "backbone": step.input("embeddings").facts["backbone"]["name"], "mode": config["mode"],
            "hops": step.facts.get("hops", {}), "largest": step.facts.get("largest_component", 0),
            "histogram": histogram(pairs.histogram, low, "similarity to the nearest reference image"),
            "groups": groups,
        })  # fmt: skip
    return found


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


def histogram(counts: np.ndarray, low: float, what: str) -> Any:
    """How similar the dropped images were."""
    ticks = [f"{low:g}", f"{(low + 1) / 2:g}", "1"]
    alt = f"Histogram of the {what} of {counts.sum()} dropped images, from {low:g} to 1"
    return drawings.bar_chart([("after", counts.tolist())], ticks, what, alt) if counts.sum() else ""


def cosines(run: Run, embeddings: Artifact, pool: Artifact, pairs: Sequence[Pair]) -> dict[int, float]:
    """The similarity of each dropped row to its representative; the edge that dropped it may be to another row."""
    wanted = np.unique(np.array([i for pair in pairs for i in (pair.row_id, pair.near)], np.int64))
    part = np.searchsorted(pool.starts, wanted, side="right") - 1
    items = [(int(p), wanted[part == p] - pool.starts[p]) for p in np.unique(part)]
    vectors: list[np.ndarray] = list(run.executor.map(partial(vectors_of_part, embeddings=embeddings), items))
    x = dict(zip(wanted.tolist(), np.concatenate(vectors) if vectors else [], strict=True))
    return {pair.row_id: float(x[pair.row_id] @ x[pair.near]) for pair in pairs}


def vectors_of_part(item: tuple[int, np.ndarray], embeddings: Artifact) -> np.ndarray:
    """float64 (n, d): some rows of one part."""
    index, wanted = item
    rows, x = embedding_parts(embeddings)[index].read()
    return x[np.searchsorted(rows, wanted)].astype(np.float64)


def rejected(run: Run) -> list[dict[str, Any]]:
    """Every pool that refused files: how many for which reason, with examples."""
    found = []
    for name, pool in run.of("pool").items():
        files = [file for file in pool.files if file.name.startswith("rejected-") and file.rows]
        reasons = Counter[str]()
        for file in files:
            reasons.update({key: n for key, n in file.counts.items() if key not in ("rows", "dropped", "bad")})
        groups = [
            (
                reason,
                n,
                rejected_examples(pool, [f.name for f in files if reason in f.counts], reason, run.config.n_rejected),
            )
            for reason, n in reasons.most_common()
        ]
        if groups:
            found.append({"name": name, "counts": pool.counts, "groups": groups})
    return found


def rejected_examples(pool: Artifact, names: Iterable[str], reason: str, n: int) -> list[dict[str, Any]]:
    """The first ``n`` files with a reason, in the order of the source; reads no more parts than that takes."""
    root = source_root(pool.outside("source"))
    rows: list[dict[str, Any]] = []
    for name in names:
        if len(rows) >= n:
            break
        table = read_table(pool.location / name)
        rows += table.filter(pc.equal(table["reason"], reason)).slice(0, n - len(rows)).to_pylist()
    return [
        {"uri": rejected_thumb(root, row["source"], row["member"]) if reason != "undecodable" else "",
         "name": f"{row['source']}/{row['member']}" if row["member"] else row["source"], "detail": rejected_detail(row)}
        for row in rows
    ]  # fmt: skip


def rejected_detail(row: Mapping[str, Any]) -> str:
    """Why a file was refused, in words; of a copy, what it is a copy of."""
    return f"same bytes as {row['duplicate_of']}" if row["duplicate_of"] else row["detail"] or ""


def clusters(run: Run) -> list[dict[str, Any]]:
    """Every hierarchy: sizes of its top-level clusters before and after sampling, and a contact sheet of each."""
    found = []
    for name, tree in run.of("cluster").items():
        samples = run.reading(tree, "hierarchy", "sample")
        n_clusters: list[int] = tree.facts["n_clusters"]
        top = np.arange(n_clusters[0])
        for level in range(1, len(n_clusters)):
            top = labels_of_level(tree, level)[top]
        n_top = n_clusters[-1]
        sizes = np.zeros((1 + len(samples), n_top), np.int64)
        count = partial(cluster_sizes, tree=tree, samples=list(samples.values()), top=top, n_top=n_top)
        for some in run.executor.map(count, range(len(tree.parts))):
            sizes += some
        order = np.lexsort((np.arange(n_top), -sizes[0]))
        shown = order[np.unique(np.linspace(0, n_top - 1, min(n_top, run.config.n_clusters)).astype(int))]
        last = list(samples.values())[-1] if samples else None
        found.append({
            "name": name, "n_clusters": n_clusters, "backbone": backbone_of(tree), "sample": ["", *samples][-1],
            "charts": size_charts(sizes[:, order], list(samples)), "n_shown": len(shown),
            "sheets": sheets(run, tree, last, top, shown, sizes),
        })  # fmt: skip
    return found


def backbone_of(tree: Artifact) -> str:
    """The train step or the name behind the vectors of a hierarchy."""
    embeddings = tree.input("embeddings")
    return step_inputs(embeddings).get("backbone") or str(tree.facts["backbone"]["name"])


def cluster_sizes(index: int, tree: Artifact, samples: Sequence[Artifact], top: np.ndarray, n_top: int) -> np.ndarray:
    """int64 (1 + samples, n_top): images of a part in each top-level cluster, then those of each sample."""
    labels = top[read_table(tree.part(index), ["label"])["label"].to_numpy()]
    kept = [read_table(sample.part(index), ["kept"])["kept"].to_numpy() for sample in samples]
    sizes = [np.bincount(some, minlength=n_top) for some in (labels, *(labels[mask] for mask in kept))]
    return np.stack(sizes).astype(np.int64)


def size_charts(sizes: np.ndarray, samples: Sequence[str]) -> list[tuple[str, Any]]:
    """Clusters from the largest down, before and after each sample."""
    n_top = sizes.shape[1]
    at = np.unique(np.linspace(0, n_top - 1, min(n_top, N_BARS)).astype(int))
    charts = []
    for k, name in enumerate(samples or [""]):
        series = [("before", sizes[0, at].tolist())] + ([("after", sizes[k + 1, at].tolist())] if name else [])
        alt = f"Images of each of {n_top} top-level clusters, largest first" + (
            f", before and after {name}" if name else ""
        )
        charts.append((name, drawings.bar_chart(series, ["1", str(n_top)], "top-level cluster, largest first", alt)))
    return charts


def sheets(
    run: Run, tree: Artifact, sample: Artifact | None, top: np.ndarray, shown: np.ndarray, sizes: np.ndarray
) -> list[dict[str, Any]]:
    """Images drawn from each shown cluster, those in the sample marked."""
    n = run.config.n_images
    draw = partial(draw_members, tree=tree, sample=sample, top=top, shown=shown, n=n, seed=run.config.seed)
    members: dict[int, list[Member]] = {cluster: [] for cluster in shown.tolist()}
    for some in run.executor.map(draw, range(len(tree.parts))):
        for cluster, more in some.items():
            members[cluster] = best_of(members[cluster] + more, n, lambda m: (m.luck, m.row_id))
    rows = [member.row_id for some in members.values() for member in some]
    thumbs = make_thumbs(run.pool(tree), rows, run.executor)
    return [
        {"cluster": cluster, "size": int(sizes[0, cluster]), "after": int(sizes[-1, cluster]) if sample else None,
         "images": [{"thumb": thumbs[m.row_id], "chosen": m.chosen} for m in sorted(some, key=lambda m: not m.chosen)]}
        for cluster, some in members.items()
    ]  # fmt: skip


def draw_members(
    index: int, tree: Artifact, sample: Artifact | None, top: np.ndarray, shown: np.ndarray, n: int, seed: int
) -> Mapping[int, list[Member]]:
    """At most ``n`` rows of a part from each shown cluster, by luck."""
    table = read_table(tree.part(index), ["row", "label"])
    labels = top[table["label"].to_numpy()]
    row_id = table["row"].to_numpy() + step_starts(tree)[index]
    chosen = np.zeros(len(labels), bool)
    if sample is not None:
        chosen = read_table(sample.part(index), ["kept"])["kept"].to_numpy()
    luck = np.random.default_rng([seed, index]).random(len(labels))
    found = {}
    for cluster in np.intersect1d(labels, shown).tolist():
        rows = np.flatnonzero(labels == cluster)
        rows = rows[np.argsort(luck[rows], kind="stable")[:n]]
        found[cluster] = [Member(float(luck[i]), int(row_id[i]), bool(chosen[i])) for i in rows]
    return found


def classes(run: Run) -> list[dict[str, Any]]:
    """Every pool with labels and a selection: its classes at first, after each selection, and how even they are."""
    labels = read_table(run.labels, ["source", "label"]) if run.labels else None
    found = []
    for name, pool in run.of("pool").items():
        chain = [step for step in run.of(*SELECTIONS).items() if run.pool(step[1]) == pool]
        if not chain:
            continue
        counted = [(name, count_labels(run, pool, None, labels))]
        counted += [(step, count_labels(run, pool, selection, labels)) for step, selection in chain]
        if len(counted[0][1]) < 2 or len(counted[0][1]) > MAX_LABELS:
            continue
        first, last = counted[0][1], counted[-1][1]
        shown = [label for label, _ in sorted(first.items(), key=lambda item: (-item[1], item[0]))][
            : run.config.n_classes
        ]
        found.append({
            "name": name, "last": counted[-1][0], "n_classes": len(first),
            "rows": [{"step": step, **balance(counts)} for step, counts in counted],
            "bars": [{"label": label, "before": first[label], "after": last[label]} for label in shown],
            "most": max([*first.values(), *last.values()]),
        })  # fmt: skip
    return found


def count_labels(run: Run, pool: Artifact, selection: Artifact | None, labels: pa.Table | None) -> Counter[str]:
    """Images of every class."""
    work = partial(labels_of_part, pool=pool, selection=selection)
    total = Counter[str]()
    for some in run.executor.map(work, range(len(pool.parts)), shared={"labels": labels}):
        total.update(some)
    return total


def labels_of_part(index: int, pool: Artifact, selection: Artifact | None, labels: pa.Table | None) -> dict[str, int]:
    """Images of every class in one part; an image without a class is left out."""
    table = read_table(pool.part(index), ["source", "label"])
    column = table["label"]
    if labels is not None:
        at = pc.index_in(table["source"], value_set=labels["source"])
        column = pc.coalesce(labels["label"].combine_chunks().take(at.combine_chunks()), column.combine_chunks())
    if selection is not None:
        column = column.take(pa.array(read_selection(selection.part(index)).rows))
    counted = column.drop_null().value_counts().to_pylist()
    return {str(entry["values"]): int(entry["counts"]) for entry in counted}


def balance(counts: Mapping[str, int]) -> dict[str, Any]:
    """How even classes are: the number of even classes with the same entropy, and the largest to the smallest."""
    n = np.array([count for count in counts.values() if count], np.float64)
    p = n / max(n.sum(), 1)
    return {
        "images": int(n.sum()),
        "classes": len(n),
        "effective": float(np.exp(-(p * np.log(p)).sum())) if len(n) else 0.0,
        "ratio": float(n.max() / n.min()) if len(n) else 0.0,
    }
