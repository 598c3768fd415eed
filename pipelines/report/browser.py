"""The clusters of a hierarchy from the top down: which of them have pictures, and what is in them.

A bounded number of each, whatever the hierarchy: a page is one file.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from curation.artifact import Artifact, pool_of, read_table
from curation.execute import on_worker
from curation.hierarchy import Groups
from curation.sampling import level_sums
from pipelines.report.run import Run, best_of
from pipelines.report.thumbnails import make_thumbs
from pipelines.stages.cluster import labels_of_level

N_CHILDREN = 3  # clusters that a cluster shows of those in it: the largest, a middle one, the smallest
MAX_BELOW = 150  # clusters with pictures below the top level, of a hierarchy
N_IMAGES_BELOW = 7  # images of each of these, at most


class Member(NamedTuple):
    """One image of a cluster."""

    luck: float
    row_id: int
    chosen: bool  # by the last sample of this hierarchy


class Shown(NamedTuple):
    """A cluster with pictures."""

    level: int
    cluster: int
    above: int  # which of the shown clusters it is in; -1 at the top
    sizes: tuple[int, ...]  # images before, and of each sample
    n_inside: int  # clusters of the level below that have images


class Plan(NamedTuple):
    """What is shown of a hierarchy."""

    top: np.ndarray  # int64 (1 + samples, n_top): sizes of the top-level clusters, the largest before sampling first
    shown: list[Shown]  # a cluster comes after the one it is in


class Sizes(NamedTuple):
    """How many images are where."""

    levels: list[np.ndarray]  # int64 (1 + samples, k_t) of each level
    children: list[Groups]  # the clusters of each level by the one they are in

    def inside(self, level: int, cluster: int) -> np.ndarray:
        """int64 (m,): the clusters of the level below that are in a cluster and have images."""
        if level == 0:
            return np.empty(0, np.int64)
        rows, offsets = self.children[level - 1]
        found = rows[offsets[cluster] : offsets[cluster + 1]]
        filled: np.ndarray = found[self.levels[level - 1][0, found] > 0]
        return filled

    def falling(self, level: int, clusters: np.ndarray) -> np.ndarray:
        """Clusters of a level from the largest to the smallest, ties to the lower number."""
        order: np.ndarray = clusters[np.lexsort((clusters, -self.levels[level][0, clusters]))]
        return order

    def spread(self, level: int, clusters: np.ndarray, n: int) -> list[int]:
        """At most ``n`` clusters of a level, from the largest to the smallest of those given."""
        order = self.falling(level, clusters)
        found: list[int] = order[some_places(len(order), n)].tolist()
        return found

    def shown(self, level: int, cluster: int, above: int) -> Shown:
        """A cluster as it is shown."""
        images = tuple(self.levels[level][:, cluster].tolist())
        return Shown(level, cluster, above, images, len(self.inside(level, cluster)))


def some_places(length: int, n: int) -> np.ndarray:
    """At most ``n`` places from the first to the last of a list."""
    return np.unique(np.linspace(0, length - 1, min(length, n)).astype(int))


def plan(sizes: np.ndarray, tree: Artifact, n_levels: int, n_shown: int) -> Plan:
    """Which clusters have pictures: ``n_shown`` of the top level, from the largest to the smallest, and below some of
    them, again from the largest to the smallest, one way down to the finest level.

    sizes: int64 (1 + samples, n_leaves). Below a cluster some of those in it are shown, and of these the largest is
    gone into. Holds the sizes of all clusters.
    """
    upper = [labels_of_level(tree, t) for t in range(1, n_levels)]
    sums = [level_sums(some, upper) for some in sizes]
    known = Sizes([np.stack([levels[t] for levels, _ in sums]) for t in range(n_levels)], sums[0][1])
    top = n_levels - 1
    everything = np.arange(known.levels[top].shape[1])
    shown = [known.shown(top, cluster, -1) for cluster in known.spread(top, everything, n_shown)]
    for root in some_places(len(shown), MAX_BELOW // max(N_CHILDREN * top, 1)).tolist():
        shown += way_down(known, shown[root], root, len(shown))
    return Plan(known.levels[top][:, known.falling(top, everything)], shown)


def way_down(known: Sizes, above: Shown, at: int, first: int) -> list[Shown]:
    """Some clusters of every level below a cluster that is shown at place ``at``, to stand from place ``first`` on."""
    found: list[Shown] = []
    for level in range(above.level - 1, -1, -1):
        inside = known.spread(level, known.inside(above.level, above.cluster), N_CHILDREN)
        found += [known.shown(level, cluster, at) for cluster in inside]
        if not inside:
            break
        at = first + len(found) - len(inside)  # the largest
        above = found[-len(inside)]
    return found


def sheets(run: Run, tree: Artifact, sample: Artifact | None, shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """The shown clusters of the top level, each with images drawn from it, those in the sample marked, and the shown
    clusters in it."""
    most = run.config.n_images
    n_images = [most if some.above < 0 else min(most, N_IMAGES_BELOW) for some in shown]
    paths = on_worker(run.executor, partial(leaf_paths, tree=tree, n_levels=len(tree.facts["n_clusters"])), {})
    draw = partial(draw_members, tree=tree, sample=sample, shown=shown, n_images=n_images, seed=run.config.seed)
    members: list[list[Member]] = [[] for _ in shown]
    for some in run.executor.map(draw, range(len(tree.parts)), shared={"paths": paths}):
        for at, more in some.items():
            members[at] = best_of(members[at] + more, n_images[at], lambda m: (m.luck, m.row_id))
    thumbs = make_thumbs(run.pool(tree), [m.row_id for some in members for m in some], run.executor)
    nodes: list[dict[str, Any]] = [
        {"level": which.level, "cluster": which.cluster, "size": which.sizes[0], "inside": which.n_inside,
         "after": which.sizes[-1] if sample else None, "children": list[Any](),
         "images": [{"thumb": thumbs[m.row_id], "chosen": m.chosen} for m in sorted(some, key=lambda m: not m.chosen)]}
        for which, some in zip(shown, members, strict=True)
    ]  # fmt: skip
    for node, which in zip(nodes, shown, strict=True):
        if which.above >= 0:
            nodes[which.above]["children"].append(node)
    return [node for node, which in zip(nodes, shown, strict=True) if which.above < 0]


def leaf_paths(tree: Artifact, n_levels: int) -> list[np.ndarray]:
    """Of every level: the cluster that each level-0 cluster is in, int32 (n_leaves,)."""
    paths = [np.arange(tree.facts["n_clusters"][0], dtype=np.int32)]
    for t in range(1, n_levels):
        paths.append(labels_of_level(tree, t)[paths[-1]])
    return paths


def draw_members(
    index: int,
    tree: Artifact,
    sample: Artifact | None,
    shown: Sequence[Shown],
    n_images: Sequence[int],
    seed: int,
    paths: Sequence[np.ndarray],
) -> Mapping[int, list[Member]]:
    """At most ``n_images[i]`` rows of a part from each shown cluster i that it has rows of, by luck."""
    table = read_table(tree.part(index), ["row", "label"])
    leaves = table["label"].to_numpy()
    row_id = table["row"].to_numpy() + pool_of(tree).starts[index]
    chosen = np.zeros(len(leaves), bool)
    if sample is not None:
        chosen = read_table(sample.part(index), ["kept"])["kept"].to_numpy()
    luck = np.random.default_rng([seed, index]).random(len(leaves))
    clusters = {level: paths[level][leaves] for level in {which.level for which in shown}}
    found = {}
    for i, which in enumerate(shown):
        rows = np.flatnonzero(clusters[which.level] == which.cluster)
        if len(rows):
            rows = rows[np.argsort(luck[rows], kind="stable")[: n_images[i]]]
            found[i] = [Member(float(luck[r]), int(row_id[r]), bool(chosen[r])) for r in rows]
    return found
