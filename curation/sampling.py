"""Balanced sampling from a hierarchy of clusters, from the top down (Vo et al. 2024, arXiv 2405.15613).

A node shares its quota over its children as evenly as their sizes allow. Nothing here needs the rows' embeddings:
``leaf_quotas`` takes sizes and labels of clusters, ``draw_leaf`` the members of one leaf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from curation.hierarchy import Groups, Hierarchy, group_rows

PICKS = ("random", "closest")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How many images are drawn from the clusters, and how."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines/, no import here

    target: int  # images in the sample, copies counted
    pick: str = "random"  # or "closest": to the centroid; ties go to the lowest row id
    max_copies: int = 1  # times an image may be repeated to fill the target
    seed: int = 0  # of the draw, also of who gets what is left over

    def __post_init__(self) -> None:
        for name, least in (("target", 1), ("max_copies", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"sample.{name} must be at least {least}: got {getattr(self, name)}")
        if self.pick not in PICKS:
            raise ValueError(f"sample.pick must be 'random' or 'closest': got {self.pick!r}")


def sample_hierarchy(
    hierarchy: Hierarchy, target: int, rng: np.random.Generator, pick: str = "random", max_copies: int = 1
) -> np.ndarray:
    """Rows drawn so that every level is balanced: int64 (min(target, max_copies * n),), ascending, copies repeated.

    ``rng`` gives one seed; everything else is keyed by it (see ``leaf_quotas`` and ``draw_leaf``). In a leaf all rows
    are copied equally often, then the rest is drawn at random without replacement, or closest to the centroid first
    (ties: the lower row). Holds 16 bytes a row and the result. Raises ValueError for a negative target, no copies,
    an unknown pick, or "closest" without distances in level 0.
    """
    leaves = hierarchy.levels[0]
    if pick not in PICKS:
        raise ValueError(f"pick must be 'random' or 'closest': got {pick!r}")
    if pick == "closest" and leaves.sq_distance is None:
        raise ValueError("pick='closest' needs the distance of each row to its centroid: level 0 has no sq_distance")
    seed, n_leaves = int(rng.integers(2**32)), hierarchy.n_clusters[0]
    sizes = np.bincount(leaves.labels, minlength=n_leaves)
    quotas = leaf_quotas(sizes, [level.labels for level in hierarchy.levels[1:]], target, seed, max_copies)
    counts = row_counts(leaves.labels, quotas, seed, leaves.sq_distance if pick == "closest" else None)
    return np.repeat(np.arange(len(counts)), counts)


def row_counts(labels: np.ndarray, quotas: np.ndarray, seed: int, sq_distance: np.ndarray | None = None) -> np.ndarray:
    """How often each row is drawn, int32 (n,): every leaf gives its quota, by ``draw_leaf``.

    labels: int (n,), the leaf of each row; quotas: int64 (n_leaves,); sq_distance: float32 (n,), to draw the closest
    instead of random ones. A loop over the leaves that are cut; whole leaves need no draw. Holds, with the labels,
    16 bytes a row.
    """
    groups = group_rows(labels, len(quotas))
    copies, rest = np.divmod(quotas, np.maximum(np.diff(groups.offsets), 1))
    counts: np.ndarray = copies.astype(np.int32)[labels]
    for leaf in np.flatnonzero(rest).tolist():
        members = groups.rows[groups.offsets[leaf] : groups.offsets[leaf + 1]]
        distance = None if sq_distance is None else sq_distance[members]
        counts[draw_leaf(members, int(rest[leaf]), seed, leaf, distance)] += 1
    return counts


def draw_leaf(
    members: np.ndarray, quota: int, seed: int, leaf: int, sq_distance: np.ndarray | None = None
) -> np.ndarray:
    """Rows of one leaf, int64 (quota,), ascending: every member ``quota // n`` times, and some once more.

    members: int (n,) ascending row ids. Those once more are drawn by ``default_rng([seed, 0, leaf])`` without
    replacement or, with sq_distance (n,), are the closest (ties: the lower row). The draw depends on ``quota % n``
    only, so full copies can be made elsewhere. Raises ValueError for a quota of a leaf without members.
    """
    if quota and not len(members):
        raise ValueError(f"a leaf without members must have quota 0: got {quota} for leaf {leaf}")
    copies, rest = divmod(quota, max(len(members), 1))
    if sq_distance is not None:
        extra = np.argsort(sq_distance, kind="stable")[:rest]
    elif rest:
        extra = np.random.default_rng([seed, 0, leaf]).choice(len(members), rest, replace=False, shuffle=False)
    else:
        extra = np.empty(0, np.int64)
    counts = np.full(len(members), copies)
    counts[extra] += 1
    return np.repeat(members, counts).astype(np.int64, copy=False)


def leaf_quotas(
    sizes_of_leaves: np.ndarray, upper_labels: Sequence[np.ndarray], target: int, seed: int, max_copies: int = 1
) -> np.ndarray:
    """How many rows to draw from each leaf, int64 (n_leaves,), adding up to min(target, max_copies * rows).

    sizes_of_leaves: int (n_leaves,), rows of each level-0 cluster, 0 allowed; upper_labels: cluster of each leaf in
    level 1, of each level-1 cluster in level 2, and so on (none: the root holds the leaves). Node i of level t draws by
    (seed, t, i), see ``child_luck``; the root is node 0 of level ``n_levels``. Holds about 60 bytes for each cluster of
    a level and 24 for each cluster of all levels. Raises ValueError for a negative target, negative sizes, fractions
    or no copies.
    """
    sizes = [whole_numbers(sizes_of_leaves, "sizes")]
    n_nodes = [len(labels) for labels in upper_labels[1:]]  # of each upper level, empty clusters too
    if upper_labels:
        n_nodes.append(int(upper_labels[-1].max(initial=0)) + 1)
    children = [group_rows(labels, n) for labels, n in zip(upper_labels, n_nodes, strict=True)]
    for below in children:
        sizes.append(segment_sums(sizes[-1][below.rows], below.offsets))
    children.append(Groups(np.arange(len(sizes[-1])), np.array([0, len(sizes[-1])])))  # of the root
    quotas = whole_numbers([target], "target")
    for t in range(len(children), 0, -1):  # nodes of level t share among the clusters of level t - 1
        rows, offsets = children[t - 1]
        shares = np.empty(len(rows), np.int64)
        luck = child_luck(seed, t, offsets)
        shares[rows] = ragged_shares(sizes[t - 1][rows], offsets, quotas, luck, max_copies)
        quotas = shares
    return quotas


def child_luck(seed: int, level: int, offsets: np.ndarray) -> np.ndarray:
    """A random number uint64 (m,) for each child of the nodes of a level, a hash of (seed, level, node, child).

    Node i has the children ``offsets[i]:offsets[i + 1]`` (see Groups), counted within the node: so neither other nodes
    nor children that come after change a child's number. Holds 40 bytes a child.
    """
    key = np.random.SeedSequence([seed, level]).generate_state(1, np.uint64)
    counts = np.diff(offsets)
    nodes = split_mix(key + np.arange(len(counts), dtype=np.uint64))
    child = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return split_mix(np.repeat(nodes, counts) + child.astype(np.uint64))


def split_mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of each counter, uint64 (n,) to uint64 (n,): one to one, every bit of x moves every bit of the result.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def whole_numbers(values: ArrayLike, name: str) -> np.ndarray:
    """``values`` as int64. Floats must be whole: raises ValueError naming the first that is not."""
    given = np.asarray(values)
    if given.dtype.kind == "f":
        bad = ~((np.abs(given) < 2.0**63) & (np.floor(given) == given))
        if bad.any():
            raise ValueError(f"{name} must be whole numbers: {bad.sum()} of {bad.size} are not, first {given[bad][0]}")
    elif given.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers: got {given.dtype}")
    return given.astype(np.int64)


def equal_shares(sizes: np.ndarray, target: int, rng: np.random.Generator, max_copies: int = 1) -> np.ndarray:
    """Shares int64 (m,) of ``target`` as equal as sizes allow: the max-min fair split, in whole rows.

    sizes: int (m,), 0 allowed; a share is at most ``max_copies * size``. With the cut x, the largest integer for which
    sum(min(x, cap)) <= target, everybody gets min(x, cap); the remainder goes as +1 to children above the cut, chosen
    at random without replacement. Adds up to min(target, sum of caps). Raises ValueError for a negative target,
    negative sizes, fractions or no copies.
    """
    sizes = whole_numbers(sizes, "sizes")
    targets = whole_numbers([target], "target")
    return ragged_shares(sizes, np.array([0, len(sizes)]), targets, rng.random(len(sizes)), max_copies)


def ragged_shares(
    sizes: np.ndarray, offsets: np.ndarray, targets: np.ndarray, luck: np.ndarray, max_copies: int = 1
) -> np.ndarray:
    """``equal_shares`` of many groups at once: group g shares ``targets[g]`` over its slice of sizes (see Groups).

    sizes: int (m,); offsets: int64 (n_groups + 1,); targets: int (n_groups,); luck (m,): of the children above the cut
    those with the lowest get one more, ties to the first. Returns int64 (m,). Holds about 50 bytes a child.
    """
    if max_copies < 1 or targets.min(initial=0) < 0 or sizes.min(initial=0) < 0:
        raise ValueError(
            f"shares need sizes and a target from 0 on and at least one copy: got sizes from {sizes.min(initial=0)}, "
            f"target {targets.min(initial=0)}, max_copies {max_copies}"
        )
    caps = sizes.astype(np.int64) * max_copies
    group = np.repeat(np.arange(len(targets)), np.diff(offsets))
    shares: np.ndarray = np.minimum(caps, water_level(caps, offsets, targets)[group])
    left = np.minimum(targets, segment_sums(caps, offsets)) - segment_sums(shares, offsets)
    above = np.flatnonzero((caps > shares) & (left[group] > 0))
    above = above[np.lexsort((luck[above], group[above]))]  # the lowest of each group first
    rank = np.arange(len(above)) - np.searchsorted(group[above], group[above])
    shares[above[rank < left[group[above]]]] += 1
    return shares


def water_level(caps: np.ndarray, offsets: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The largest integer x of each group, int64 (n_groups,), with sum(min(x, caps)) <= target; at most its top cap.

    One bisection for all groups at once, as many rounds as the largest cap has bits.
    """
    counts = np.diff(offsets)
    group = np.repeat(np.arange(len(counts)), counts)
    high = np.zeros(len(counts), np.int64)
    high[counts > 0] = np.maximum.reduceat(caps, offsets[:-1][counts > 0]) if len(caps) else 0
    low: np.ndarray = np.minimum(targets // np.maximum(counts, 1), high)  # nobody gets less than an even split
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = segment_sums(np.minimum(caps, middle[group]), offsets) <= targets
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each slice ``values[offsets[g]:offsets[g + 1]]``, int64 (n_groups,), 0 for an empty one."""
    sums = np.zeros(len(offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):  # reduceat gives an empty slice its next value, so only full ones are handed to it
        sums[filled] = np.add.reduceat(values, offsets[filled], dtype=np.int64)
    return sums
