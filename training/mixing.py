"""Which component of a mix each slot of each step shows: a pure function of the mix, the batch size and a seed.

Two uniform numbers decide a step. The first draws its kind: with the share of a component the whole batch is of it.
Otherwise the second is the offset of a systematic sample: slot k goes to the component whose range of the summed
ratios holds (k + offset) / batch. So a heterogeneous batch has batch * ratio images of each component, rounded down or
up, and exactly that many on average. Then the slots are shuffled.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from curation.mix import MixSpec

BLOCK = 4096  # steps whose numbers are drawn together; another value is another order
_STEPS, _SLOTS = 2, 5  # the last word of the key keeps these generators apart from all others of a run


class Draws(NamedTuple):
    """What the slots of a step show."""

    component: np.ndarray  # int64 (batch,)
    draw: np.ndarray  # int64 (batch,): samples of this component drawn before, through the whole run


class Mixing:
    """The draws of every step.

    The first step asked for sums over the blocks of 4096 steps before it. Memory: 8 bytes a component for each of
    them, and 64 kB a component.
    """

    def __init__(self, spec: MixSpec, batch: int, seed: int) -> None:
        self.spec, self.batch, self.seed = spec, batch, seed
        self._before = [np.zeros(len(spec.components), np.int64)]  # draws of each component before block b
        self._ends = lru_cache(maxsize=2)(self._make_ends)

    def step(self, step: int) -> Draws:
        """What the slots of a step show."""
        before, counts = self.before(step), self.before(step + 1) - self.before(step)
        component = np.repeat(np.arange(len(counts)), counts)
        draw = np.arange(self.batch) - np.repeat(np.cumsum(counts) - counts, counts) + before[component]
        order = np.random.default_rng([self.seed, step, 0, 0, _SLOTS]).permutation(self.batch)
        return Draws(component[order], draw[order])

    def before(self, step: int) -> np.ndarray:
        """Samples drawn of each component in all steps before this one, int64 (n_components,)."""
        block, within = divmod(step, BLOCK)
        while len(self._before) <= block:
            self._before.append(self._before[-1] + self._ends(len(self._before) - 1)[-1])
        before: np.ndarray = self._before[block].copy()
        if within:
            before += self._ends(block)[within - 1]
        return before

    def _make_ends(self, block: int) -> np.ndarray:
        """Samples of each component drawn in a block up to and with each of its steps, int64 (BLOCK, n_components)."""
        return np.cumsum(block_counts(self.spec, self.batch, self.seed, block), axis=0)


def block_counts(spec: MixSpec, batch: int, seed: int, block: int) -> np.ndarray:
    """Slots of each component in each step of a block, int64 (BLOCK, n_components); every row sums to ``batch``."""
    kind, offset = np.random.default_rng([seed, block, 0, 0, _STEPS]).random((BLOCK, 2)).T
    counts = systematic_counts(np.array(spec.heterogeneous), batch, offset)
    shares = np.array(spec.homogeneous)
    which = np.searchsorted(np.cumsum(shares), kind, side="right")
    if not any(spec.heterogeneous):  # the shares sum to 1 but for rounding
        which = np.minimum(which, np.flatnonzero(shares)[-1])
    alone = np.flatnonzero(which < len(shares))
    counts[alone] = 0
    counts[alone, which[alone]] = batch
    return counts


def systematic_counts(ratios: np.ndarray, batch: int, offset: np.ndarray) -> np.ndarray:
    """Slots of each component: the k in [0, batch) with (k + offset) / batch in its range of the summed ratios.

    ratios: float64 (n_components,), at least 0, summing to about 1, or all 0. offset: float64 (n,) in [0, 1). Returns
    int64 (n, n_components), rows summing to ``batch``; all 0 without ratios.
    """
    if not ratios.any():
        return np.zeros((len(offset), len(ratios)), np.int64)
    ends = np.ceil(batch * (np.cumsum(ratios) / ratios.sum()) - offset[:, None]).astype(np.int64)
    ends = np.clip(ends, 0, batch)
    ends[:, np.flatnonzero(ratios)[-1] :] = batch  # whatever the rounding
    return np.diff(ends, axis=1, prepend=0)
