"""What the page says of a hierarchy: how large its clusters are, and what is in them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from curation.artifact import Artifact, pool_of, read_table
from pipelines.report import drawings
from pipelines.report.run import Run, best_of, step_inputs
from pipelines.report.thumbnails import make_thumbs
from pipelines.stages.cluster import labels_of_level

N_BARS = 120  # clusters with a bar of their own; more are drawn as that many quantiles


class Member(NamedTuple):
    """One image of a cluster."""

    luck: float
    row_id: int
    chosen: bool  # by the last sample of this hierarchy


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
    row_id = table["row"].to_numpy() + pool_of(tree).starts[index]
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
