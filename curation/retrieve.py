"""Images near trusted seed images: DINOv2's retrieval (section 3 and appendix A.4 of arXiv 2304.07193).

There are one or several *seed pools*. An image of the pool that one of them asks for is *retrieved*.

``sample``: every seed image asks for its ``n_neighbors`` most similar images, ties to the lower row id. ``nominal`` is
n_neighbors * seed images; images that several seed images ask for are one image, so fewer are retrieved.

``cluster``: a seed image lies in the cluster with the nearest centroid. A cluster with more than ``min_hits`` images of
one seed pool qualifies for that seed pool and gives it ``per_cluster`` images, or all it has if they are fewer. Sizes
count the images that may be retrieved. ``nominal`` is per_cluster * qualifying clusters, as in the paper's Table 15.
DataComp's ``image_based`` filter is ``min_hits: 0`` with ``per_cluster`` and ``max_rows`` left out.

``max_rows`` caps the images of each seed pool. In mode ``cluster`` its clusters share the cap as evenly as their sizes
allow (``curation.sampling``). What is cut is decided by ``pick``: the lowest luck stays (``random``: a hash of seed and
row id), or the nearest (``closest``: the highest similarity, or the smallest distance to the centroid), ties to the
lower row id. An image's luck is the same for every seed pool: seed pools that draw from one cluster draw the same
images first, and adding a seed pool changes nothing for the others.

``target`` is shared by a *draft*. Seed pools take turns: the one with the fewest images in the set so far, ties to the
first listed, takes its next best image by ``pick`` that is not in the set. An image counts for every seed pool that
retrieved it. A seed pool without images left drops out. So a seed pool with images left over has at least as many in
the set as any other had when that one took its last, and seed pools without common images get ``equal_shares``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from curation.sampling import PICKS, child_luck, ragged_shares, segment_sums, split_mix

MODES = ("sample", "cluster")
MAX_SEED_POOLS = 62  # they are bits of an int64
LUCK_KEY = 3  # beside the seed: no other stage hashes with it
NOTHING, EVERYTHING = np.iinfo(np.uint64).min, np.iinfo(np.uint64).max  # keys of cuts that leave none, and all

# What images of one seed pool hit: a row of the pool, or one of its clusters.
HIT = np.dtype(
    [
        ("pool", "<i4"),  # index of the seed pool
        ("target", "<i8"),  # row id, or cluster
        ("hits", "<i8"),  # seed images
        ("near_row", "<i8"),  # the nearest of them, its position in its pool
        ("gap", "<f4"),  # how far that one is: minus the similarity, or its squared distance to the centroid
    ]
)
# A row of a part that a seed pool may have.
CLAIM = np.dtype(
    [
        ("row", "<i4"),  # in the part
        ("pool", "<i4"),
        ("pair", "<i4"),  # where its quota stands in ``Pairs``
        ("hits", "<i8"),
        ("near_row", "<i8"),
        ("gap", "<f4"),
        ("value", "<f4"),  # what ``closest`` goes by, lowest first
    ]
)
# A row on its way to the task that finds the cuts of its group.
MEMBER = np.dtype([("group", "<i4"), ("key", "<u8"), ("row_id", "<i8")])
# The last row that a pair draws.
CUT = np.dtype([("pair", "<i4"), ("key", "<u8"), ("row_id", "<i8")])
# A row of a part that was drafted, and by whom.
DRAFTED = np.dtype([("row", "<i4"), ("pool", "<i4")])


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """Which images near the seed images are retrieved, and how many. See the module's docstring."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    mode: str  # "sample": near single seed images; "cluster": from the clusters that seed images lie in
    seeds: tuple[str, ...]  # embed steps of trusted pools; row i of facts and bit i of seed_pools is the i-th
    n_neighbors: int | None = None  # sample: rows each seed image asks for; left out: 4
    min_hits: int | None = None  # cluster: more seed images than this must lie in it; left out: 3
    per_cluster: int | None = None  # cluster: rows of each; left out: all
    level: int | None = None  # cluster: of the hierarchy; left out: 0, the finest
    max_rows: int | None = None  # cap for each seed pool; left out: none
    pick: str = "random"  # or "closest": what stays where a cap, a cluster or the target cuts
    target: int | None = None  # images in all, shared fairly by the seed pools; left out: everything retrieved
    seed: int = 0  # of the images drawn where more qualify than are asked for

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"retrieve.mode must be 'sample' or 'cluster': got {self.mode!r}")
        if self.pick not in PICKS:
            raise ValueError(f"retrieve.pick must be 'random' or 'closest': got {self.pick!r}")
        if not 1 <= len(self.seeds) <= MAX_SEED_POOLS:
            raise ValueError(f"retrieve.seeds must name 1 to {MAX_SEED_POOLS} steps: got {len(self.seeds)}")
        least = {"n_neighbors": 1, "min_hits": 0, "per_cluster": 1, "level": 0, "max_rows": 1, "target": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"retrieve.{name} must be at least {low}: got {value}")

    @property
    def k(self) -> int:
        """Rows each seed image asks for."""
        return 4 if self.n_neighbors is None else self.n_neighbors

    @property
    def most_hits_without(self) -> int:
        """The most seed images a cluster may have without qualifying."""
        return 3 if self.min_hits is None else self.min_hits

    @property
    def cluster_level(self) -> int:
        """The level of the hierarchy whose clusters qualify."""
        return self.level or 0


class Planned(NamedTuple):
    """What a seed pool asks for, before images that are asked for twice count once."""

    mode: str
    n_seeds: int  # seed images
    clusters: int | None  # that qualify; None in mode sample
    nominal: int  # images
    capped: int  # images, at most max_rows


def plan_seed_pool(
    mode: str,
    n_seeds: int,
    *,
    n_neighbors: int = 4,
    n_clusters: int = 0,
    per_cluster: int | None = None,
    n_in_clusters: int = 0,
    max_rows: int | None = None,
) -> Planned:
    """The images one seed pool asks for: the arithmetic of DINOv2's Table 15.

    Mode ``sample`` reads ``n_neighbors``; mode ``cluster`` reads ``n_clusters``, those that qualify, and
    ``per_cluster`` or, where that is None, ``n_in_clusters``, the images in all of them together. Raises ValueError for
    another mode or a negative number.
    """
    numbers = (n_seeds, n_neighbors, n_clusters, per_cluster or 0, n_in_clusters, max_rows or 0)
    if mode not in MODES or min(numbers) < 0:
        raise ValueError(f"a plan needs mode 'sample' or 'cluster' and no negative number: got {mode!r}, {numbers}")
    if mode == "sample":
        nominal = n_neighbors * n_seeds
    else:
        nominal = n_in_clusters if per_cluster is None else per_cluster * n_clusters
    capped = nominal if max_rows is None else min(nominal, max_rows)
    return Planned(mode, n_seeds, None if mode == "sample" else n_clusters, nominal, capped)


def plan_total(planned: Iterable[Planned], as_is: Iterable[int] = ()) -> int:
    """Images of a whole data set: what its seed pools ask for, and those that are taken as they are."""
    return sum(plan.capped for plan in planned) + sum(as_is)


def hit_records(pool: int, target: np.ndarray, near_row: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """HIT (m,) of seed images of one pool, each with what it hit: int (n,), int64 (n,) and float32 (n,)."""
    records = np.zeros(len(target), HIT)
    records["pool"], records["target"], records["hits"] = pool, target, 1
    records["near_row"], records["gap"] = near_row, gap
    return merge_hits(records)


def merge_hits(*hits: np.ndarray) -> np.ndarray:
    """One HIT of every (pool, target), by these ascending: hits added, the lowest gap, ties to the lower near_row.

    HIT (n,) arrays in any order and cut. Holds them three times.
    """
    records = np.concatenate(hits)
    records = records[np.lexsort((records["near_row"], records["gap"], records["target"], records["pool"]))]
    first = first_of_runs(records["pool"], records["target"])
    merged: np.ndarray = records[first]
    if len(first):
        merged["hits"] = np.add.reduceat(records["hits"], first)
    return merged


def first_of_runs(*columns: np.ndarray) -> np.ndarray:
    """int64 (m,): where a run of equal values begins in columns (n,) that are sorted together."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)


class Pairs(NamedTuple):
    """Every (seed pool, group) from which rows are drawn, by these ascending. A group is a cluster or, in mode sample,
    all that a seed pool asked for."""

    pool: np.ndarray  # int32 (p,)
    group: np.ndarray  # int32 (p,)
    size: np.ndarray  # int64 (p,), rows of the group
    quota: np.ndarray  # int64 (p,), rows drawn from it

    @property
    def is_cut(self) -> np.ndarray:
        """bool (p,): where some rows are drawn and some are not."""
        cut: np.ndarray = (self.quota > 0) & (self.quota < self.size)
        return cut


def share_pairs(pool: np.ndarray, group: np.ndarray, size: np.ndarray, n_pools: int, config: RetrieveConfig) -> Pairs:
    """The quota of every pair: at most ``per_cluster`` of its rows, and of a seed pool at most ``max_rows``.

    pool int (p,) ascending, group int (p,), size int (p,). The cap is shared as evenly as sizes allow; who gets one
    more is a hash of (seed, seed pool, place among its pairs). Holds about 90 bytes a pair.
    """
    caps = size.astype(np.int64) if config.per_cluster is None else np.minimum(size, config.per_cluster)
    offsets = np.searchsorted(pool, np.arange(n_pools + 1))
    sums = segment_sums(caps, offsets)
    targets = sums if config.max_rows is None else np.minimum(sums, config.max_rows)
    quota = ragged_shares(caps, offsets, targets, child_luck(config.seed, LUCK_KEY, offsets))
    return Pairs(pool.astype(np.int32), group.astype(np.int32), size.astype(np.int64), quota)


def order_keys(row_ids: np.ndarray, value: np.ndarray, pick: str, seed: int) -> np.ndarray:
    """uint64 (n,): the lowest are picked first, ties to the lower row id.

    row_ids int (n,); value float32 (n,), read by ``closest``: the lowest first. ``random`` hashes the row id.
    """
    if pick == "random":
        key = np.random.SeedSequence([seed, LUCK_KEY]).generate_state(1, np.uint64)
        return split_mix(row_ids.astype(np.uint64) + key)
    bits = (value + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ascending = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))  # floats in the order of their bits
    return ascending.astype(np.uint64)


def bucket_groups(pairs: Pairs, bucket_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups that are cut, int32 (m,) ascending, and the bucket of each, int64 (m,), ascending from 0.

    A bucket holds ``bucket_rows`` rows, and at most one group more.
    """
    group, at = np.unique(pairs.group[pairs.is_cut], return_index=True)
    size = pairs.size[pairs.is_cut][at]
    bucket = (np.cumsum(size) - size) // bucket_rows
    return group, np.unique(bucket, return_inverse=True)[1]


def find_cuts(members: np.ndarray, pairs: Pairs, which: np.ndarray) -> np.ndarray:
    """CUT (m,): the last row that each of the given pairs draws, by (key, row id).

    members: MEMBER (n,), all rows of their groups, once each, in any order; which: int (m,), pairs with a quota
    between 1 and the size of their group. Holds 44 bytes a member.
    """
    order = np.lexsort((members["row_id"], members["key"], members["group"]))
    begin = np.searchsorted(members["group"][order], pairs.group[which])
    last = order[begin + pairs.quota[which] - 1]
    cuts = np.empty(len(which), CUT)
    cuts["pair"], cuts["key"], cuts["row_id"] = which, members["key"][last], members["row_id"][last]
    return cuts


class Cuts(NamedTuple):
    """The last (key, row id) that each pair draws."""

    key: np.ndarray  # uint64 (p,)
    row_id: np.ndarray  # int64 (p,)

    @staticmethod
    def of(pairs: Pairs, found: np.ndarray) -> "Cuts":
        """The cut of every pair, from CUT (m,) of those that are cut; others draw all rows or none."""
        none = pairs.quota == 0
        key = np.where(none, np.uint64(NOTHING), np.uint64(EVERYTHING))
        row_id = np.where(none, -1, np.iinfo(np.int64).max)
        key[found["pair"]], row_id[found["pair"]] = found["key"], found["row_id"]
        return Cuts(key, row_id)

    def keep(self, pair: np.ndarray, key: np.ndarray, row_id: np.ndarray) -> np.ndarray:
        """bool (n,): which rows of the given pairs are drawn."""
        last = self.key[pair]
        kept: np.ndarray = (key < last) | ((key == last) & (row_id <= self.row_id[pair]))
        return kept


def cluster_claims(
    rows: np.ndarray, clusters: np.ndarray, distance: np.ndarray, pairs: Pairs, seen: np.ndarray
) -> np.ndarray:
    """CLAIM (m,) of rows int (n,) ascending in clusters int (n,), by (row, pool): one a pair of the row's cluster.

    distance: float32 (n,), to the centroid; seen: HIT (p,) of the pairs. Holds 8 bytes a pair and 80 a claim.
    """
    by_group = np.argsort(pairs.group, kind="stable")  # seed pools of a cluster stay in order
    group = pairs.group[by_group]
    begin, end = (np.searchsorted(group, clusters, side) for side in ("left", "right"))
    count = end - begin
    at = np.repeat(np.arange(len(rows)), count)
    nth = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    pair = by_group[begin[at] + nth]
    claims = np.empty(len(at), CLAIM)
    claims["row"], claims["value"] = rows[at], distance[at]
    claims["pool"], claims["pair"] = pairs.pool[pair], pair
    for name in ("hits", "near_row", "gap"):
        claims[name] = seen[name][pair]
    return claims


def row_claims(hits: np.ndarray, start: int) -> np.ndarray:
    """CLAIM (n,) by (row, pool) of HIT (n,) on rows of one part, whose first row has the id ``start``."""
    claims = np.empty(len(hits), CLAIM)
    claims["row"], claims["pair"], claims["value"] = hits["target"] - start, hits["pool"], hits["gap"]
    for name in ("pool", "hits", "near_row", "gap"):
        claims[name] = hits[name]
    return claims[np.lexsort((claims["pool"], claims["row"]))]


def draft(row: np.ndarray, pool: np.ndarray, key: np.ndarray, n_pools: int, target: int) -> np.ndarray:
    """Which seed pool drafted each row, int8 (n_rows,), -1 where none did: a fair choice of ``target`` rows.

    row: int64 (n,), claims by row, ascending from 0 without a gap; pool: int8 (n,), each once a row; key: uint64 (n,),
    the order of a pool's claims, lowest first, ties to the lower row. Turns: see the module's docstring. Holds, with
    its input, 45 bytes a claim and 9 a row.
    """
    from curation import loops

    first = first_of_runs(row)
    owner = np.full(len(first), -1, np.int8)
    if not len(first):
        return owner
    mask = np.bitwise_or.reduceat(np.int64(1) << pool.astype(np.int64), first)
    lists = row[np.lexsort((row, key, pool))]
    starts = np.zeros(n_pools + 1, np.int64)
    np.cumsum(np.bincount(pool, minlength=n_pools), out=starts[1:])
    loops.take_turns(lists, starts, mask, target, owner)
    return owner


class Verdict(NamedTuple):
    """What is known of the rows of a part."""

    retrieved: np.ndarray  # bool (n,)
    kept: np.ndarray  # bool (n,)
    seed_pools: np.ndarray  # int64 (n,), bit i: seed pool i retrieved it
    hits: np.ndarray  # int64 (n,), seed images of these pools
    seed: np.ndarray  # int32 (n,), the seed pool that owns it, -1 where not retrieved
    near_row: np.ndarray  # int64 (n,), the nearest image of that seed pool
    gap: np.ndarray  # float32 (n,), of that image


def judge(rows: np.ndarray, claims: np.ndarray, drafted: np.ndarray | None) -> Verdict:
    """The verdict on rows int (n,), ascending, from their CLAIMs by (row, pool).

    Without a draft every claimed row is kept. A row is owned by the seed pool that drafted it, else by the one with
    the smallest gap, ties to the first. drafted: DRAFTED (m,), by row. Holds 60 bytes a row and 150 a claim.
    """
    n = len(rows)
    verdict = Verdict(
        np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, np.int64), np.zeros(n, np.int64), np.full(n, -1, np.int32),
        np.zeros(n, np.int64), np.zeros(n, np.float32),
    )  # fmt: skip
    if not len(claims):
        return verdict
    first = first_of_runs(claims["row"])
    at = np.searchsorted(rows, claims["row"][first])
    verdict.retrieved[at] = True
    verdict.seed_pools[at] = np.bitwise_or.reduceat(np.int64(1) << claims["pool"].astype(np.int64), first)
    verdict.hits[at] = np.add.reduceat(claims["hits"], first)
    owner = np.lexsort((claims["pool"], claims["gap"], claims["row"]))[first]
    if drafted is None:
        verdict.kept[at] = True
    else:
        verdict.kept[np.searchsorted(rows, drafted["row"])] = True
        mine = np.searchsorted(place(claims), place(drafted))
        owner[np.searchsorted(claims["row"][first], drafted["row"])] = mine
    verdict.seed[at] = claims["pool"][owner]
    verdict.near_row[at], verdict.gap[at] = claims["near_row"][owner], claims["gap"][owner]
    return verdict


def place(records: np.ndarray) -> np.ndarray:
    """int64 (n,): one number for (row, pool), in their order."""
    number: np.ndarray = records["row"].astype(np.int64) * (MAX_SEED_POOLS + 1) + records["pool"]
    return number
