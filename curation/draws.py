"""Which rows of each cluster a sample has: draws over rows that are read block by block, in order.

A cluster draws its rows by (seed, level, cluster) and by how many of its rows came before, so neither blocks nor
workers nor other clusters show. Random draws are selection sampling (Knuth, The Art of Computer Programming 2, section
3.4.2, algorithm S): the next row of a cluster is drawn with probability rows to be drawn / rows left, which gives every
subset the same chance in one pass that holds 24 bytes a cluster. The closest rows of a cluster are those below a cut:
one pass gathers distances to find it, 4 bytes for each row of a cluster of which some are drawn and some are not.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

DRAW_KEY, THIN_KEY = 1, 3  # beside seed and level: no other draw is keyed so
RANGE_ROWS = 1 << 29  # distances that are gathered at a time, and those of one cluster more
NOTHING = np.empty(0, np.float32)


class Block(NamedTuple):
    """Some rows in order."""

    labels: np.ndarray  # int32 (n,), the cluster that each row is drawn from
    sq_distance: np.ndarray = NOTHING  # float32 (n,), to the centroid: to draw the closest
    groups: np.ndarray = NOTHING  # int32 (n,), what is capped, such as a source; below 0: never too many


Read = Callable[[], Iterable[Block]]  # gives the same blocks every time


def draw_rows(
    read: Read,
    sizes: np.ndarray,
    quotas: np.ndarray,
    seed: int,
    *,
    level: int = 0,
    pick: str = "random",
    max_copies: int = 1,
    replace: bool = False,
) -> Iterator[np.ndarray]:
    """How often each row is drawn, a uint (n,) for each block; every cluster gives its quota.

    sizes and quotas: int64 (k,), rows of each cluster and how many of them are drawn, copies counted, at most
    ``max_copies`` times its rows. All rows of a cluster are copied equally often, then the rest is drawn at random
    without replacement, or closest first (ties: the earlier row). With ``replace`` (of random draws) a row stands
    ``max_copies`` times in its cluster and the quota is drawn from all of these: with many copies that is drawing with
    replacement. A pass over the blocks, two for ``closest``. Holds, beside a block, 48 bytes a cluster, for ``closest``
    also 4 bytes for each row of up to RANGE_ROWS. The counts have the smallest type that holds ``max_copies``.
    """
    from curation import loops_sampling as loops

    dtype = np.min_scalar_type(max_copies)
    if pick == "closest":
        whole, rest = np.divmod(quotas, np.maximum(sizes, 1))
        cut, ties = closest_cuts(read, sizes, rest)
        for block in read():
            counts = np.zeros(len(block.labels), dtype)
            loops.draw_closest(block.labels, block.sq_distance, whole, cut, ties, counts)
            yield counts
        return
    urns = row_urns(sizes, quotas, max_copies if replace else 1)
    key = draw_key(seed, level, DRAW_KEY)
    for block in read():
        counts = np.zeros(len(block.labels), dtype)
        loops.draw_random(block.labels, urns, max_copies if replace else 1, key, counts)
        yield counts


def cluster_sizes(labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """Rows of each cluster, int64 (n_clusters,). labels: int (n,) below n_clusters. Unlike ``numpy.bincount`` this
    makes no wider copy of the labels."""
    from curation import loops_sampling as loops

    sizes = np.zeros(n_clusters, np.int64)
    loops.add_rows(sizes, labels)
    return sizes


def draw_key(seed: int, level: int, what: int) -> np.uint64:
    """What the draws of all clusters of a level are keyed by, beside the cluster."""
    key: np.uint64 = np.random.SeedSequence([seed, level, what]).generate_state(1, np.uint64)[0]
    return key


def row_urns(sizes: np.ndarray, quotas: np.ndarray, tickets: int) -> np.ndarray:
    """int64 (k, 3) as ``loops_sampling.draw_random`` takes it: copies of every row, tickets left, tickets to draw."""
    urns = np.empty((len(sizes), 3), np.int64)
    urns[:, 1] = sizes * tickets
    if tickets == 1:
        np.divmod(quotas, np.maximum(sizes, 1), out=(urns[:, 0], urns[:, 2]))
    else:
        urns[:, 0], urns[:, 2] = 0, quotas
    return urns


def closest_cuts(read: Read, sizes: np.ndarray, need: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Up to what distance the ``need`` closest rows of each cluster lie: float32 (k,), and how many of the rows at that
    distance are among them, int64 (k,).

    sizes, need: int64 (k,), need below sizes. -inf and 0 where none is needed. A pass over the blocks for each
    RANGE_ROWS rows of clusters that need some.
    """
    from curation import loops_sampling as loops

    cut, ties = np.full(len(sizes), -np.inf, np.float32), np.zeros(len(sizes), np.int64)
    ends = np.cumsum(np.where(need > 0, sizes, 0))
    first = 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + RANGE_ROWS, side="right")))
        own = slice(first, last)
        offsets = np.concatenate([[before], ends[own]]) - before
        cursor = np.where(need[own] > 0, offsets[:-1], -1)
        values = np.empty(offsets[-1], np.float32)
        if len(values):
            for block in read():
                loops.place(block.labels, block.sq_distance, first, cursor, values)
            loops.find_cuts(values, offsets, need[own], cut[own], ties[own])
        first = last
    return cut, ties


class Capped(NamedTuple):
    """A sample under a cap."""

    quotas: np.ndarray  # int64 (k,), images drawn from each cluster
    counts: list[np.ndarray]  # of each block uint (n,), how often each row is drawn


def draw_capped(
    read: Read,
    n_clusters: int,
    n_groups: int,
    cap: int,
    share: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int,
    *,
    level: int = 0,
    pick: str = "random",
    max_copies: int = 1,
) -> Capped:
    """``draw_rows`` with at most ``cap`` images of each group; see ``curation.sampling``.

    share(sizes, held) gives the quotas, int64 (k,), of clusters with rows to draw from and images that stay, int64
    (k,) both. A round reads the blocks three times, four for ``closest``, and closes at least one group; most samples
    take two or three rounds. Holds the counts, a byte a row for up to 255 copies, and what ``draw_rows`` holds.
    """
    from curation import loops_sampling as loops

    dtype = np.min_scalar_type(max_copies)
    counts = [np.zeros(len(block.labels), dtype) for block in read()]
    closed = np.zeros(n_groups + 1, bool)  # the last one is what groups below 0 find
    while True:
        sizes, held = np.zeros(n_clusters, np.int64), np.zeros(n_clusters, np.int64)
        for block, count in zip(open_rows(read, closed), counts, strict=True):
            count[block.labels >= 0] = 0
            loops.add_rows(sizes, block.labels)
        for block, count in zip(read(), counts, strict=True):
            loops.add_counts(held, block.labels, count)
        quotas = share(sizes, held)
        drawn = draw_rows(
            lambda: open_rows(read, closed), sizes, quotas - held, seed, level=level, pick=pick, max_copies=max_copies
        )
        per_group = np.zeros(n_groups, np.int64)
        for block, count, more in zip(read(), counts, drawn, strict=True):
            np.add(count, more, out=count)
            loops.add_counts(per_group, block.groups, count)
        over = per_group > cap  # none that was closed before: it has exactly the cap
        if not over.any():
            return Capped(quotas, counts)
        urns = np.zeros((n_groups, 3), np.int64)
        urns[over, 1], urns[over, 2] = per_group[over], cap
        for block, count in zip(read(), counts, strict=True):
            loops.thin(block.groups, count, urns, draw_key(seed, 0, THIN_KEY))
        closed[:-1] |= over


def open_rows(read: Read, closed: np.ndarray) -> Iterator[Block]:
    """The blocks, with label -1 for rows of closed groups."""
    for block in read():
        yield block._replace(labels=np.where(closed[block.groups], -1, block.labels).astype(np.int32))
