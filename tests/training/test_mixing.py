"""The draws of a mix against their definition, slot by slot."""

import math

import numpy as np
import pytest

from curation.mix import MixSpec
from training.mixing import BLOCK, Mixing, block_counts, systematic_counts


def random_spec(rng):
    n = int(rng.integers(1, 6))
    alone, together = (rng.random(n) * (rng.random(n) < 0.7) for _ in range(2))
    if not together.any():
        together[int(rng.integers(n))] = 1
    alone *= rng.random() / max(alone.sum(), 1e-9)
    return MixSpec(tuple("abcdef"[:n]), tuple(alone.tolist()), tuple((together / together.sum()).tolist()))


def by_definition(spec, batch, seed, step):
    """The component of each slot before the slots are shuffled, one slot at a time."""
    block, within = divmod(step, BLOCK)
    kind, offset = np.random.default_rng([seed, block, 0, 0, 2]).random((BLOCK, 2))[within]
    for component, end in enumerate(np.cumsum(spec.homogeneous)):
        if kind < end:
            return [component] * batch
    ends = np.cumsum(spec.heterogeneous)
    return [int(np.flatnonzero((slot + offset) / batch < ends)[0]) for slot in range(batch)]


@pytest.mark.parametrize("seed", range(12))
def test_every_step_is_the_documented_rule(seed):
    rng = np.random.default_rng(seed)
    spec, batch = random_spec(rng), int(rng.integers(1, 40))
    mixing = Mixing(spec, batch, seed)
    drawn = np.zeros(len(spec.components), np.int64)
    for step in range(60):
        slots = np.array(by_definition(spec, batch, seed, step))
        order = np.random.default_rng([seed, step, 0, 0, 5]).permutation(batch)
        component, draw = mixing.step(step)
        assert component.tolist() == slots[order].tolist()
        for c in range(len(drawn)):  # the next draws of each component, each once
            assert sorted(draw[component == c].tolist()) == list(range(drawn[c], drawn[c] + (slots == c).sum()))
            drawn[c] += (slots == c).sum()
        assert mixing.before(step + 1).tolist() == drawn.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_a_heterogeneous_batch_has_its_ratios_but_for_rounding(seed):
    rng = np.random.default_rng(seed)
    spec, batch = random_spec(rng), int(rng.integers(1, 500))
    counts = block_counts(spec, batch, seed, 0)
    assert (counts.sum(axis=1) == batch).all() and (counts >= 0).all()
    mixed = counts[(counts == batch).sum(axis=1) == 0]
    for c, ratio in enumerate(spec.heterogeneous):
        wanted = batch * ratio
        assert set(np.unique(mixed[:, c])) <= {math.floor(wanted - 1e-9), math.ceil(wanted + 1e-9), round(wanted)}


def test_the_expectation_is_exact():
    """Over offsets spread evenly the mean is batch * ratio, to the spacing of the offsets."""
    ratios, batch, n = np.array([0.123, 0.0, 0.55, 0.327]), 7, 100_000
    counts = systematic_counts(ratios, batch, (np.arange(n) + 0.5) / n)
    np.testing.assert_allclose(counts.mean(axis=0), batch * ratios, atol=2 / n)
    assert systematic_counts(np.array([0.25, 0.75]), 8, np.array([0.0, 0.5, 0.999])).tolist() == [[2, 6]] * 3


def test_ten_percent_of_the_steps_are_of_one_component():
    """Binomial: within 5 standard deviations, and the same step draws one of two by their shares."""
    spec, n_blocks = MixSpec(("in1k", "x", "y"), (0.1, 0.0, 0.05), (0.0, 0.7, 0.3)), 25
    counts = np.concatenate([block_counts(spec, 64, 0, block) for block in range(n_blocks)])
    n = len(counts)
    for c, share in ((0, 0.1), (2, 0.05)):
        assert abs((counts[:, c] == 64).sum() - n * share) < 5 * math.sqrt(n * share * (1 - share))
    assert set(counts[:, 0]) == {0, 64}  # alone or not at all
    assert not (counts[:, 1] == 64).any()
    whole = Mixing(spec, 64, 0).before(n)
    assert whole.tolist() == counts.sum(axis=0).tolist()
    expected = 64 * n * (np.array([0.1, 0, 0.05]) + 0.85 * np.array([0, 0.7, 0.3]))
    np.testing.assert_allclose(whole, expected, rtol=0.05)


def test_without_ratios_every_batch_is_of_one_component():
    spec = MixSpec(("a", "b", "c"), (0.3, 0.7 - 1e-7, 0.0), (0.0, 0.0, 0.0))
    counts = block_counts(spec, 5, 1, 0)
    assert (counts.max(axis=1) == 5).all() and not counts[:, 2].any()
    assert 0 < (counts[:, 0] == 5).mean() < 0.5


def test_a_step_is_the_same_whatever_was_asked_before():
    spec = MixSpec(("a", "b", "c"), (0.1, 0.0, 0.0), (0.0, 0.7, 0.3))
    steps = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK]
    forward = Mixing(spec, 9, 4)
    drawn = {step: forward.step(step) for step in steps}
    backward = Mixing(spec, 9, 4)
    for step in reversed(steps):
        for some in (Mixing(spec, 9, 4), backward):
            for a, b in zip(drawn[step], some.step(step), strict=True):
                np.testing.assert_array_equal(a, b)


def test_draws_go_on_across_blocks():
    spec = MixSpec(("a", "b"), (0.5, 0.0), (0.0, 1.0))
    mixing = Mixing(spec, 3, 0)
    seen = [mixing.step(step) for step in range(BLOCK - 3, BLOCK + 3)]
    for c in range(2):
        draws = np.sort(np.concatenate([draw[component == c] for component, draw in seen]))
        first = mixing.before(BLOCK - 3)[c]
        assert draws.tolist() == list(range(first, first + len(draws)))


def test_seeds_differ_and_slots_are_shuffled():
    spec = MixSpec(("a", "b"), (0.0, 0.0), (0.5, 0.5))
    steps = [[Mixing(spec, 16, seed).step(step).component.tolist() for step in range(8)] for seed in range(2)]
    assert steps[0] != steps[1]
    assert len({tuple(slots) for slots in steps[0]}) == 8
