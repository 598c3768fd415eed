"""What the page says of a hierarchy: how large its clusters are, what a sample made of them, and what is in them."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup

from curation.artifact import Artifact, read_table
from curation.execute import on_worker
from pipelines.report import drawings
from pipelines.report.browser import plan, sheets
from pipelines.report.drawings import Curve
from pipelines.report.run import Run, step_inputs

N_BARS = 120  # clusters with a bar of their own; more are drawn as that many quantiles
N_TASKS = 64  # that count clusters: each holds all of them, and reads its parts one after the other


def clusters(run: Run) -> list[dict[str, Any]]:
    """Every hierarchy: sizes of its clusters before and after sampling, and its clusters from the top down."""
    found = []
    for name, tree in run.of("cluster").items():
        samples = run.reading(tree, "hierarchy", "sample")
        n_clusters: list[int] = tree.facts["n_clusters"]
        ranges = np.array_split(np.arange(len(tree.parts)), min(N_TASKS, len(tree.parts)))
        count = partial(leaf_counts, tree=tree, samples=list(samples.values()), n_leaves=n_clusters[0])
        sizes = run.executor.reduce(count, [some.tolist() for some in ranges], np.add, fan_in=2)
        draw = partial(plan, tree=tree, n_levels=len(n_clusters), n_shown=run.config.n_clusters)
        planned = on_worker(run.executor, draw, {"sizes": sizes}).get()
        last = list(samples.values())[-1] if samples else None
        found.append({
            "name": name, "n_clusters": n_clusters, "backbone": backbone_of(tree), "sample": ["", *samples][-1],
            "made": how_made(tree.manifest["config"], tree.facts),
            "charts": size_charts(planned.top, list(samples)),
            "samples": [told for step, sample in samples.items() if (told := balance_of(step, sample))],
            "n_shown": sum(some.above < 0 for some in planned.shown),
            "sheets": sheets(run, tree, last, planned.shown),
        })  # fmt: skip
    return found


def backbone_of(tree: Artifact) -> str:
    """The train step or the name behind the vectors of a hierarchy."""
    embeddings = tree.input("embeddings")
    return step_inputs(embeddings).get("backbone") or str(tree.facts["backbone"]["name"])


def how_made(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """In sentences: which levels were made in two steps, and how often the nearest cluster was found where not all were
    looked at. Nothing where neither is so."""
    found = []
    for level, (k, n) in enumerate(zip(config["n_clusters"], config.get("n_splits") or (), strict=False)):
        if n > 1:
            first = f"a first k-means of {math.ceil(k / n):,} clusters"
            found.append(f"Level {level} was made in two steps: {first}, and then one in each of these.")
    for level, share in facts.get("agreement", {}).items():
        what = "images" if level == "0" else f"clusters of level {int(level) - 1}"
        found.append(agreement_text(share, what, f"{facts['n_clusters'][int(level)]:,} clusters of level {level}"))
    return " ".join(found)


def agreement_text(share: float, what: str, of: str) -> str:
    """How many of those that were sampled have the nearest cluster; rounded down, so that all are all."""
    if share == 1:
        return f"All sampled {what} have the nearest of all {of}."
    percent = math.floor(1000 * share) / 10
    return f"{percent:.1f} % of sampled {what} have the nearest of all {of}; the others a farther one."


def leaf_counts(parts: Sequence[int], tree: Artifact, samples: Sequence[Artifact], n_leaves: int) -> np.ndarray:
    """int64 (1 + samples, n_leaves): images of some parts in each level-0 cluster, then those of each sample."""
    sizes = np.zeros((1 + len(samples), n_leaves), np.int64)
    for index in parts:
        labels = read_table(tree.part(index), ["label"])["label"].to_numpy()
        np.add.at(sizes[0], labels, 1)
        for own, sample in zip(sizes[1:], samples, strict=True):
            np.add.at(own, labels[read_table(sample.part(index), ["kept"])["kept"].to_numpy()], 1)
    return sizes


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


def balance_of(name: str, sample: Artifact) -> dict[str, Any]:
    """How even the clusters of every level are before and after a sample; nothing where that was not counted."""
    levels = sample.facts.get("levels", [])
    if not levels:
        return {}
    charts = [balance_charts(t, level) for t, level in enumerate(levels) if level["clusters"] > 1]
    target, drawn = sample.facts["target"], sample.facts["drawn"]
    return {
        "name": name, "how": how_drawn(sample.manifest["config"]), "target": target, "drawn": drawn,
        "short": drawn < target, "levels": levels,
        "charts": [chart for some in charts for chart in some],
    }  # fmt: skip


def how_drawn(config: Mapping[str, Any]) -> str:
    """The way of a sample, in a sentence."""
    level = config.get("level") or 0
    text = {
        "tree": "Shared from the top down, every cluster as much as the others in it allow",
        "uniform": "Drawn from all images alike",
        "level": f"Shared by the clusters of level {level} alone",
        "inverse_frequency": f"Drawn with weights 1 / size of an image's cluster of level {level}",
    }[config.get("mode", "tree")]
    if config["pick"] == "closest":
        text += ", the closest to its centroid first"
    if config["max_copies"] > 1:
        text += f", an image at most {config['max_copies']} times"
    for key in ("source", "label"):
        if (cap := config.get(f"max_per_{key}")) is not None:
            text += f", at most {cap:,} images of a {key}"
    return f"{text}."


def balance_charts(level: int, told: Mapping[str, Any]) -> list[Markup]:
    """Sizes of the clusters of a level by rank, and how many clusters have which size."""
    ranks = np.array(told["ranks"])
    curves = [Curve(when, np.array(told[when]["at_ranks"]), when) for when in ("before", "after")]
    alt = f"Sizes of the {told['clusters']} clusters of level {level} by rank, before and after"
    series = [(when, [n for *_, n in told[when]["sizes"]]) for when in ("before", "after")]
    longest = max((told[when]["sizes"] for when in ("before", "after")), key=len)
    names = [str(high) if low == high else f"{low:,}-{high:,}" for low, high, _ in longest]
    words = [
        f"{when} " + ", ".join(f"{name} images: {n:,}" for name, n in zip(names, counts, strict=False))
        for when, counts in series
    ]
    ticks = names if len(names) < 3 else [names[0], names[len(names) // 2], names[-1]]
    bars = drawings.bar_chart(
        series, ticks, f"images of a cluster of level {level}", f"Clusters by size: {'; '.join(words)}"
    )
    return [drawings.rank_chart(ranks, curves, f"clusters of level {level}, the largest first", alt), bars]
