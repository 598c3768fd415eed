"""Cells of a k-NN join: a coarse quantizer, how cells become tasks, and how many cells of a row must be looked at.

Every row lies in the ``nprobe`` cells whose centroids are most similar to it, and is compared with all rows that lie
there too: a pair is found when its rows share a cell. So both ends probe, and far fewer cells are enough than when a
row is stored in its nearest cell alone.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from curation.signatures import Limits

ROWS_PER_CELL = 512  # nlist is the rows over this, as a power of two ...
MIN_CELLS, MAX_CELLS = 64, 65_536  # ... in this range, but at most a cell for MIN_ROWS_PER_CELL rows
MIN_ROWS_PER_CELL = 8
SAMPLE_PER_CELL = 32  # rows the quantizer is trained on ...
SAMPLE_BYTES = 1 << 30  # ... as far as they fit in here as float32
TRAIN_ITERATIONS = 4  # of k-means: more make cells no better at keeping similar rows together
DOUBT = 0.05  # that the recall of all pairs is lower than what is concluded from the sampled ones
MAX_NPROBE = 256  # cells of a row: beyond, a row meets about as many rows as in an exact search
GROUP_ROWS = 1 << 20  # rows that one task scans, in whole cells
SLICE_ROWS = 1 << 17  # rows that keep lists at the same time, unless their lists hold more than ...
SLICE_PAIRS = 1 << 25  # ... so many pairs, 8 bytes each; a cell of more than GROUP_ROWS is cut into tasks for one slice
CHUNK_PAIRS = 1 << 21  # of what is found at a time: 90 bytes each while they become records


class Piece(NamedTuple):
    """What one task scans: cells [first, last), or of one large cell a slice of rows from ``begin`` on against all.

    The rows of a cell count from 0 in the order of the parts.
    """

    number: int
    first: int
    last: int
    begin: int | None = None


def sample_rows(n_rows: int, width: int, nlist: int) -> int:
    """How many rows the quantizer is trained on."""
    return min(n_rows, max(nlist, min(SAMPLE_PER_CELL * nlist, SAMPLE_BYTES // (4 * width))))


def cells_for(n_rows: int) -> int:
    """How many cells a pool has when nothing is said: a power of two, 1 at least."""
    most = min(MAX_CELLS, n_rows // MIN_ROWS_PER_CELL)
    wanted = max(MIN_CELLS, n_rows // ROWS_PER_CELL)
    return int(1 << max(0, min(round(math.log2(wanted)), most.bit_length() - 1)))


def train_centroids(sample: np.ndarray, nlist: int, seed: int) -> np.ndarray:
    """Unit centroids float32 (nlist, d) of unit rows float32 (n, d), n at least nlist, by spherical k-means of FAISS.

    One math thread must be set: the sums depend on their number. Holds the sample and 8 bytes a row of it.
    """
    import faiss

    if len(sample) < nlist:
        raise ValueError(f"{nlist} cells need at least as many rows: got {len(sample)}")
    trained = faiss.Kmeans(
        sample.shape[1],
        nlist,
        niter=TRAIN_ITERATIONS,
        spherical=True,
        seed=seed % (1 << 31),
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )
    trained.train(np.ascontiguousarray(sample, np.float32))
    return np.asarray(trained.centroids, np.float32)


def nearest_cells(x: np.ndarray, centroids: np.ndarray, n: int) -> np.ndarray:
    """int32 (rows, n): the n cells most similar to each row float32, the nearest first, n at most the cells.

    The bits depend on how rows are cut into blocks and on threads, so the caller holds both constant.
    """
    import faiss

    cells: np.ndarray = faiss.knn(x, centroids, n, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return cells.astype(np.int32)


def slice_rows(most: int) -> int:
    """Rows that keep lists of ``most`` pairs at the same time."""
    return max(1, min(SLICE_ROWS, SLICE_PAIRS // most))


def plan_pieces(sizes: np.ndarray, n_slice: int) -> list[Piece]:
    """Tasks of at most GROUP_ROWS rows each, from the rows of every cell, int64 (nlist,), and those of a slice."""
    pieces: list[Piece] = []
    first, n = 0, 0
    for cell, size in enumerate(sizes.tolist()):
        if n and n + size > GROUP_ROWS:
            pieces.append(Piece(len(pieces), first, cell))
            first, n = cell, 0
        n += size
        if size > GROUP_ROWS:
            begins = range(0, size, n_slice)
            pieces += [Piece(len(pieces) + i, cell, cell + 1, begin) for i, begin in enumerate(begins)]
            first, n = cell + 1, 0
    if n:
        pieces.append(Piece(len(pieces), first, len(sizes)))
    return pieces


def allowed_misses(n_pairs: int, min_recall: float) -> int:
    """Of so many sampled pairs, the most that may be missed if a recall of ``min_recall`` is to be sure; -1 for none.

    Sure is 95 %: the one-sided bound of Clopper and Pearson, "The use of confidence or fiducial limits" (1934).
    """
    from scipy.stats import binom

    misses = int(binom.ppf(DOUBT, n_pairs, 1 - min_recall))
    return misses if binom.cdf(misses, n_pairs, 1 - min_recall) <= DOUBT else misses - 1


def needed_nprobe(needed: np.ndarray, n_misses: int) -> int | None:
    """The lowest nprobe at which all pairs but so many are found; None when there is none.

    needed: int (n,), at how many cells each pair shares one, 0 for never.
    """
    wanted, found = len(needed) - n_misses, np.sort(needed[needed > 0])
    if wanted > len(found):
        return None
    return int(found[wanted - 1]) if wanted > 0 else 1


def recall_at(needed: np.ndarray, nprobe: int) -> float | None:
    """The share of pairs that share a cell among so many; None without pairs."""
    return float(np.mean((needed > 0) & (needed <= nprobe))) if len(needed) else None


class Rows(NamedTuple):
    """Some rows of a cell."""

    ids: np.ndarray  # int64 (n,)
    signatures: np.ndarray  # uint64 (n, 16)

    @staticmethod
    def concatenate(some: Iterable["Rows"]) -> "Rows":
        """One after the other; one or more."""
        return Rows(*(np.concatenate(columns) for columns in zip(*some, strict=True)))

    def split(self, row_id: int) -> tuple["Rows", "Rows"]:
        """Those before a row, and the others."""
        before = self.ids < row_id
        if before.all() or not before.any():
            none = Rows(self.ids[:0], self.signatures[:0])
            return (none, self) if not before.any() else (self, none)
        return Rows(self.ids[before], self.signatures[before]), Rows(self.ids[~before], self.signatures[~before])

    def slices(self, n_rows: int) -> Iterator["Rows"]:
        """At most so many at a time."""
        for start in range(0, len(self.ids), n_rows):
            at = slice(start, start + n_rows)
            yield Rows(self.ids[at], self.signatures[at])


Near = tuple[np.ndarray, np.ndarray, np.ndarray]  # (query id, row id, distance), int64 (m,) each, by query


def near_in_cell(queries: Rows, base: Iterable[Rows], limits: Limits, most: int) -> Iterator[Near]:
    """The rows of a cell whose signatures are near those of the queries, at most ``most`` of each: the nearest, ties
    to the lowest id.

    ``base`` are all rows of the cell, some at a time; where they are ``queries`` itself each pair is tested once.
    Yields the pairs of some queries after those of others. Holds 8 * most bytes a query, 64 a row of what ``base``
    yields, and 40 for each of CHUNK_PAIRS.
    """
    from curation import loops_bits

    heap, filled = np.empty((len(queries.ids), most), np.int64), np.zeros(len(queries.ids), np.int64)
    for rows in base:
        blocks = loops_bits.signs_in_lanes(rows.signatures)
        loops_bits.scan(*queries, *rows, blocks, limits.array(), rows is queries, heap, filled)
    n = max(1, CHUNK_PAIRS // most)
    for start in range(0, len(heap), n):
        at = slice(start, start + n)
        keys = heap[at][np.arange(most) < filled[at, None]]
        row_ids, distances = keys & ((1 << loops_bits.ROW_BITS) - 1), keys >> loops_bits.ROW_BITS
        yield np.repeat(queries.ids[at], filled[at]), row_ids, distances
