"""First centroids of k-means over parts: seeds (``curation.seeding``) among the rows of a uniform sample."""

import itertools
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from curation.execute import Executor
from curation.rows import Rows, SubsetRows
from curation.seeding import seed_rows

SEED_ROWS_PER_CLUSTER, LEAST_SEED_ROWS = 32, 8  # rows the seeding sees for every cluster, if they fit and if not in ...
SEED_BYTES = 1 << 27  # ... so much, as float32
MIN_SEED_ROWS = 65_536  # that it sees in any case
SAMPLE_PIECES = 16  # that the sample is gathered in: to be one it would be copied once more


def seed_centroids(parts: Sequence[Rows], n_clusters: int, seed_key: tuple[int, ...], executor: Executor) -> np.ndarray:
    """First centroids float32 (k, d): see ``seed_rows``, on a uniform sample of the rows, see ``seed_sample``.

    The sample is gathered and used on a worker (rows * d * 8 bytes there); only the centroids come to the driver.
    Rows with weights are sampled as all others and keep them: a sum over the sample stands for one over all, but
    where a few rows have most of the weight it may miss them.
    """
    [width] = executor.map(width_of, [next(part for part in parts if part.n_rows)])
    n_wanted = seed_sample(n_clusters, width)
    counts = sample_counts([part.n_rows for part in parts], n_wanted, np.random.default_rng([*seed_key, 2, 0]))
    draws = [Draw(part, counts[i], (*seed_key, 0, i)) for i, part in enumerate(parts)]
    height = -(-len(draws) // SAMPLE_PIECES)
    pieces = [draws[start : start + height] for start in range(0, len(draws), height)]
    sample = {f"drawn_{i:02d}": executor.reduce(draw_rows, some, operator.add) for i, some in enumerate(pieces)}
    [centroids] = executor.map(partial(seeds_of_sample, n_clusters=n_clusters), [(*seed_key, 1, 0)], shared=sample)
    return centroids


def width_of(part: Rows) -> int:
    """Values of a row."""
    return int(next(part.blocks()).shape[1])


def seed_sample(n_clusters: int, width: int) -> int:
    """Rows that the seeding sees: SEED_ROWS_PER_CLUSTER for every cluster as far as SEED_BYTES hold them as float32,
    but LEAST_SEED_ROWS for every cluster and MIN_SEED_ROWS in all in any case."""
    wanted = min(SEED_ROWS_PER_CLUSTER * n_clusters, SEED_BYTES // (4 * width))
    return max(wanted, LEAST_SEED_ROWS * n_clusters, MIN_SEED_ROWS)


def sample_counts(sizes: Sequence[int], n_wanted: int, rng: np.random.Generator) -> list[int]:
    """How many rows to draw from each part, so that every row has the same chance and ``n_wanted`` are drawn.

    All rows if there are no more than wanted. The running share is rounded down from one random start, so a count
    is its part's share rounded up or down, and never above the part's rows. Python integers: no overflow.
    """
    total = sum(sizes)
    if total <= n_wanted:
        return list(sizes)
    start = int(rng.integers(total))
    ends = [(running * n_wanted + start) // total for running in itertools.accumulate(sizes, initial=0)]
    return [after - before for before, after in itertools.pairwise(ends)]


class Draw(NamedTuple):
    """How many rows of a part are drawn, and the key of its generator."""

    part: Rows
    n_wanted: int
    key: tuple[int, ...]


class Drawn(NamedTuple):
    """The rows drawn from one part."""

    blocks: list[np.ndarray]  # float32 (n, d)
    weights: np.ndarray | None  # int64, one a row; None: every row counts once


def draw_rows(draw: Draw) -> list[Drawn]:
    """The rows drawn from one part, uniform without replacement, in ascending order; a list of one, to be joined."""
    rng = np.random.default_rng(draw.key)
    rows = rng.choice(draw.part.n_rows, draw.n_wanted, replace=False, shuffle=False)
    drawn = SubsetRows(draw.part, np.sort(rows))
    return [Drawn(list(drawn.blocks()), drawn.weights)]


def seeds_of_sample(key: tuple[int, ...], n_clusters: int, **pieces: list[Drawn]) -> np.ndarray:
    """Centroids float32 (k, d) chosen from the rows of a sample, in pieces by name."""
    sample = [drawn for name in sorted(pieces) for drawn in pieces[name]]
    x = np.concatenate([block for drawn in sample for block in drawn.blocks])
    weights = [drawn.weights for drawn in sample if drawn.weights is not None]
    rng = np.random.default_rng(key)
    chosen: np.ndarray = x[seed_rows(x, n_clusters, rng, np.concatenate(weights) if weights else None)]
    return chosen
