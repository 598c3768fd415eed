"""Balanced sampling from a hierarchy of clusters, from the top down (Vo et al. 2024, arXiv 2405.15613).

A node shares its quota over its children as evenly as their sizes allow. Nothing here needs the rows' embeddings:
``leaf_quotas`` takes sizes and labels of clusters. Which rows of a cluster are drawn is in ``curation.draws``.

Besides this ``mode: tree`` there are flat ones to compare it with. ``level``: the clusters of one level share the
target as evenly as their sizes allow, whatever is above and below them. ``uniform``: all rows are one cluster.
``inverse_frequency``: the rows of a level are drawn one after the other with weights 1 / size of their cluster; see
``frequency_quotas``.

``max_per_source`` or ``max_per_label`` caps what the sample has of each source, or of each label (rows without one
are never too many), copies counted. What the shares alone would give stays as it is where no cap is exceeded. Of a
source that has more, as many as the cap says stay, at random among what was drawn, and its other rows are out; then
the target is shared again, where a cluster has at least what stays in it. That repeats until no source has too many,
so a source is never above the cap, one that was above it has exactly the cap, and the target is filled by others as
long as there are any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from curation.hierarchy import Groups, Hierarchy, group_rows

PICKS = ("random", "closest")
MODES = ("tree", "uniform", "level", "inverse_frequency")
FREQUENCY_KEY = 2  # beside the seed: no other draw is keyed so


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How many images are drawn from the clusters, and how. See the module's docstring."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines/, no import here

    target: int  # images in the sample, copies counted
    mode: str = "tree"  # balanced from the top down; "uniform", "level", "inverse_frequency": flat, for comparison
    level: int | None = None  # of modes level and inverse_frequency; left out: 0, the finest
    pick: str = "random"  # or "closest": to the centroid of its level-0 cluster; ties go to the lowest row id
    max_copies: int = 1  # times an image may be repeated to fill the target
    max_per_source: int | None = None  # images of one source, copies counted: of a pool of a union, or where a pool
    # has several sources of one of these; left out: no cap
    max_per_label: int | None = None  # the same of one label of the pool; at most one of the two is given
    seed: int = 0  # of the draw, also of who gets what is left over

    def __post_init__(self) -> None:
        least = {"target": 1, "max_copies": 1, "seed": 0, "level": 0, "max_per_source": 1, "max_per_label": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"sample.{name} must be at least {low}: got {value}")
        if self.pick not in PICKS:
            raise ValueError(f"sample.pick must be 'random' or 'closest': got {self.pick!r}")
        if self.mode not in MODES:
            raise ValueError(f"sample.mode must be one of {', '.join(MODES)}: got {self.mode!r}")

    @property
    def cap(self) -> int | None:
        """The most images of one source or label."""
        return self.max_per_label if self.max_per_source is None else self.max_per_source


def sample_hierarchy(
    hierarchy: Hierarchy, target: int, rng: np.random.Generator, pick: str = "random", max_copies: int = 1
) -> np.ndarray:
    """Rows drawn so that every level is balanced: int64 (min(target, max_copies * n),), ascending, copies repeated.

    ``rng`` gives one seed; everything else is keyed by it (see ``leaf_quotas`` and ``curation.draws``). In a leaf all
    rows are copied equally often, then the rest is drawn at random without replacement, or closest to the centroid
    first (ties: the lower row). Holds a byte a row for up to 255 copies, 4 more for ``closest``, 80 a cluster, and the
    result. Raises ValueError for a negative target, no copies, an unknown pick, or "closest" without distances in
    level 0.
    """
    from curation.draws import Block, cluster_sizes, draw_rows

    leaves = hierarchy.levels[0]
    if pick not in PICKS:
        raise ValueError(f"pick must be 'random' or 'closest': got {pick!r}")
    block = Block(leaves.labels)
    if pick == "closest":
        if leaves.sq_distance is None:
            raise ValueError(
                "pick='closest' needs the distance of each row to its centroid: level 0 has no sq_distance"
            )
        block = Block(leaves.labels, leaves.sq_distance)
    seed, n_leaves = int(rng.integers(2**32)), hierarchy.n_clusters[0]
    sizes = cluster_sizes(leaves.labels, n_leaves)
    quotas = leaf_quotas(sizes, [level.labels for level in hierarchy.levels[1:]], target, seed, max_copies)
    [counts] = draw_rows(lambda: [block], sizes, quotas, seed, pick=pick, max_copies=max_copies)
    return np.repeat(np.arange(len(counts)), counts)


def leaf_quotas(
    sizes_of_leaves: np.ndarray,
    upper_labels: Sequence[np.ndarray],
    target: int,
    seed: int,
    max_copies: int = 1,
    held: np.ndarray | None = None,
) -> np.ndarray:
    """How many rows to draw from each leaf, int64 (n_leaves,), adding up to min(target, max_copies * rows).

    sizes_of_leaves: int (n_leaves,), rows of each level-0 cluster, 0 allowed; upper_labels: cluster of each leaf in
    level 1, of each level-1 cluster in level 2, and so on (none: the root holds the leaves). held: int64 (n_leaves,),
    images of each leaf that are in the sample already and come on top of its rows; a leaf has at least those. Node i of
    level t draws by (seed, t, i), see ``child_luck``; the root is node 0 of level ``n_levels``. Holds about 60 bytes
    for each cluster of a level and 24 for each cluster of all levels. Raises ValueError for a negative target, negative
    sizes, fractions or no copies.
    """
    sizes, children = level_sums(whole_numbers(sizes_of_leaves, "sizes"), upper_labels)
    floors = None if held is None else level_sums(held, upper_labels)[0]
    quotas = whole_numbers([target], "target")
    for t in range(len(children), 0, -1):  # nodes of level t share among the clusters of level t - 1
        rows, offsets = children[t - 1]
        shares = np.empty(len(rows), np.int64)
        luck = child_luck(seed, t, offsets)
        floor = None if floors is None else floors[t - 1][rows]
        shares[rows] = ragged_shares(sizes[t - 1][rows], offsets, quotas, luck, max_copies, floor)
        quotas = shares
    return quotas


def level_sums(of_leaves: np.ndarray, upper_labels: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[Groups]]:
    """What the clusters of every level hold, int64 (k_t,) from the leaves up, and the children of their nodes.

    Groups t are the clusters of level t by their node in level t + 1; the last one is the root with all of the top.
    """
    sums = [of_leaves]
    n_nodes = [len(labels) for labels in upper_labels[1:]]  # of each upper level, empty clusters too
    if upper_labels:
        n_nodes.append(int(upper_labels[-1].max(initial=0)) + 1)
    children = [group_rows(labels, n) for labels, n in zip(upper_labels, n_nodes, strict=True)]
    for below in children:
        sums.append(segment_sums(sums[-1][below.rows], below.offsets))
    children.append(Groups(np.arange(len(sums[-1])), np.array([0, len(sums[-1])])))  # of the root
    return sums, children


def frequency_quotas(sizes: np.ndarray, target: int, seed: int, max_copies: int = 1) -> np.ndarray:
    """How many rows to draw from each cluster with weights 1 / its size: int64 (k,), adding up to min(target, room).

    sizes: int (k,), 0 allowed. One draw after the other hits a cluster, all equally likely among those with room, which
    is ``max_copies`` times their rows; so this is random where equal shares are not. Draws that find no room are made
    again among the others. Holds 40 bytes a cluster. Raises ValueError as ``equal_shares``.
    """
    room = whole_numbers(sizes, "sizes") * max_copies
    left = min(int(whole_numbers([target], "target")[0]), int(room.sum()))
    if max_copies < 1 or left < 0 or room.min(initial=0) < 0:
        raise ValueError(
            f"quotas need sizes and a target from 0 on and at least one copy: got sizes from {sizes.min(initial=0)}, "
            f"target {target}, max_copies {max_copies}"
        )
    rng = np.random.default_rng([seed, 0, FREQUENCY_KEY])
    quotas = np.zeros(len(room), np.int64)
    while left:
        inside = np.flatnonzero(room > quotas)
        hits = rng.multinomial(left, np.full(len(inside), 1 / len(inside)))
        hits = np.minimum(hits, room[inside] - quotas[inside])
        quotas[inside] += hits
        left -= int(hits.sum())
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
    sizes: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray,
    luck: np.ndarray,
    max_copies: int = 1,
    floors: np.ndarray | None = None,
) -> np.ndarray:
    """``equal_shares`` of many groups at once: group g shares ``targets[g]`` over its slice of sizes (see Groups).

    sizes: int (m,); offsets: int64 (n_groups + 1,); targets: int (n_groups,); luck (m,): of the children at the cut
    those with the lowest get one more, ties to the first. floors: int64 (m,), what a child has at least, beside its
    size; a group's add up to at most its target. Returns int64 (m,). Holds about 50 bytes a child.
    """
    if max_copies < 1 or targets.min(initial=0) < 0 or sizes.min(initial=0) < 0:
        raise ValueError(
            f"shares need sizes and a target from 0 on and at least one copy: got sizes from {sizes.min(initial=0)}, "
            f"target {targets.min(initial=0)}, max_copies {max_copies}"
        )
    caps = sizes.astype(np.int64) * max_copies + (0 if floors is None else floors)
    group = np.repeat(np.arange(len(targets)), np.diff(offsets))
    level = water_level(caps, offsets, targets, floors)[group]
    shares: np.ndarray = np.minimum(caps, level if floors is None else np.maximum(level, floors))
    left = np.minimum(targets, segment_sums(caps, offsets)) - segment_sums(shares, offsets)
    above = np.flatnonzero((caps > shares) & (shares == level) & (left[group] > 0))
    above = above[np.lexsort((luck[above], group[above]))]  # the lowest of each group first
    rank = np.arange(len(above)) - np.searchsorted(group[above], group[above])
    shares[above[rank < left[group[above]]]] += 1
    return shares


def water_level(
    caps: np.ndarray, offsets: np.ndarray, targets: np.ndarray, floors: np.ndarray | None = None
) -> np.ndarray:
    """The largest integer x of each group, int64 (n_groups,), with sum(min(max(x, floors), caps)) <= target; at most
    its top cap.

    One bisection for all groups at once, as many rounds as the largest cap has bits.
    """
    counts = np.diff(offsets)
    group = np.repeat(np.arange(len(counts)), counts)
    high = np.zeros(len(counts), np.int64)
    high[counts > 0] = np.maximum.reduceat(caps, offsets[:-1][counts > 0]) if len(caps) else 0
    low: np.ndarray = np.minimum(targets // np.maximum(counts, 1), high)  # nobody gets less than an even split
    if floors is not None:
        low[:] = 0  # but others may have more
    while (low < high).any():
        middle = (low + high + 1) // 2
        even = middle[group] if floors is None else np.maximum(middle[group], floors)
        fits = segment_sums(np.minimum(caps, even), offsets) <= targets
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each slice ``values[offsets[g]:offsets[g + 1]]``, int64 (n_groups,), 0 for an empty one."""
    sums = np.zeros(len(offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):  # reduceat gives an empty slice its next value, so only full ones are handed to it
        sums[filled] = np.add.reduceat(values, offsets[filled], dtype=np.int64)
    return sums
