"""Parts of rows, as kernels read them: block after block, several times, with or without weights."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from curation.execute import Ref

BLOCK_ROWS = 4096  # rows of a part meet a kernel in blocks of this height; part of the stage version


class Rows(Protocol):
    """A part: rows that can be read several times, block after block. Must be picklable to leave the process.

    A part may have ``weights`` too, see ``weights_of``; without them every row counts once.
    """

    @property
    def n_rows(self) -> int:
        """Rows in all blocks together."""
        ...

    def blocks(self) -> Iterator[np.ndarray]:
        """float32 (BLOCK_ROWS, d) arrays, the last one shorter; no blocks when there are no rows."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """The rows of an array (n, d) as a part."""

    x: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the array."""
        return len(self.x)

    def blocks(self) -> Iterator[np.ndarray]:
        """Slices of the array, converted to float32 where they are not."""
        for start in range(0, len(self.x), BLOCK_ROWS):
            yield np.ascontiguousarray(self.x[start : start + BLOCK_ROWS], np.float32)


@dataclass(frozen=True)
class SubsetRows:
    """The given rows of another part, as a part. rows: ascending int64, counted inside the part."""

    part: Rows
    rows: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the subset."""
        return len(self.rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """Read the whole part once, two blocks in memory, and cut what is picked into full blocks again."""
        return full_blocks(self._picked()) if len(self.rows) else iter(())

    @property
    def weights(self) -> np.ndarray | None:
        """Those of the picked rows."""
        weights = weights_of(self.part)
        return None if weights is None else weights[self.rows]

    def _picked(self) -> Iterator[np.ndarray]:
        start = 0
        for block in self.part.blocks():
            low, high = np.searchsorted(self.rows, (start, start + len(block)))
            yield block[self.rows[low:high] - start]
            start += len(block)


@dataclass(frozen=True)
class WeightedRows:
    """A part whose rows count as often as their weights say. These are looked up where the rows are read."""

    part: Rows
    all_weights: Ref[np.ndarray]  # int64, at least 0, of the rows of all parts; a row of weight 0 moves nothing
    first: int  # position of the first row of the part among them

    @property
    def n_rows(self) -> int:
        """Rows of the part."""
        return self.part.n_rows

    def blocks(self) -> Iterator[np.ndarray]:
        """Those of the part."""
        return self.part.blocks()

    @property
    def weights(self) -> np.ndarray:
        """int64 (n_rows,)."""
        return self.all_weights.get()[self.first : self.first + self.n_rows]


def weighted(parts: Sequence[Rows], weights: Ref[np.ndarray]) -> list[WeightedRows]:
    """The parts with weights int64, at least 0, one for every row of all parts in their order."""
    firsts = itertools.accumulate((part.n_rows for part in parts), initial=0)
    return [WeightedRows(part, weights, first) for part, first in zip(parts, firsts, strict=False)]


def weights_of(part: Rows) -> np.ndarray | None:
    """How often each row of a part counts, int64 (n_rows,); None: once."""
    weights: np.ndarray | None = getattr(part, "weights", None)
    return weights


def full_blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cut pieces (at most BLOCK_ROWS rows each) into blocks of BLOCK_ROWS rows, the last one shorter."""
    held: list[np.ndarray] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= BLOCK_ROWS:
            rows = np.concatenate(held)
            yield rows[:BLOCK_ROWS]
            held = [rows[BLOCK_ROWS:]]
    rest = np.concatenate(held) if held else np.empty(0)
    if len(rest):
        yield rest
