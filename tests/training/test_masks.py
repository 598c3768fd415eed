import math
from fractions import Fraction

import numpy as np
import pytest

from training.augment import crop_rng
from training.masks import block_masks, mask_counts, mask_rng, patch_weights


def masks(n_crops=64, grid_h=14, grid_w=14, step=0, seed=0, **options):
    return block_masks(n_crops, grid_h, grid_w, mask_rng(seed, step), **{"probability": 0.5, **options})


@pytest.mark.parametrize(
    ("batch", "patches", "total"), [(64, 196, 3771), (16, 256, 1274), (32, 64, 615), (64, 16, 281)]
)
def test_published_totals(batch, patches, total):
    side = math.isqrt(patches)
    for step in range(3):
        out = masks(2 * batch, side, side, step)
        assert out.shape == (2 * batch, patches)
        assert out.dtype == bool
        assert out.sum() == total
        assert (out.sum(axis=1) > 0).sum() == batch


def exact_counts(n_crops, patches, probability, low, high):
    """The rule in fractions of whole numbers."""
    n = math.floor(n_crops * Fraction(probability))
    low, high = Fraction(low), Fraction(high)
    return [math.floor(patches * (low + (high - low) * (i + 1) / n)) for i in range(n)]


RULES = [("0.5", "0.1", "0.5"), ("1", "0", "0.3"), ("0.29", "0.7", "0.7"), ("0.5", "0", "0.99")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n_crops", "grid"), [(6, (4, 4)), (32, (7, 10)), (7, (1, 5)), (100, (10, 10)), (5, (2, 2))])
def test_every_masked_crop_has_its_exact_number_of_patches(n_crops, grid, rule):
    probability, low, high = map(float, rule)
    expected = exact_counts(n_crops, grid[0] * grid[1], *rule)
    np.testing.assert_array_equal(mask_counts(n_crops, grid[0] * grid[1], probability, (low, high)), expected)
    for step in range(10):
        out = masks(n_crops, *grid, step, probability=probability, ratio=(low, high))
        np.testing.assert_array_equal(np.sort(out.sum(axis=1)), [0] * (n_crops - len(expected)) + expected)
        assert not out.all(axis=1).any()  # never a whole grid


def test_masks_are_blocks():
    """Neighbours are alike far more often than in masks of single patches."""

    def alike(grids):
        return np.mean([(g[1:] == g[:-1]).mean() + (g[:, 1:] == g[:, :-1]).mean() for g in grids]) / 2

    grids = masks(256, ratio=(0.3, 0.3)).reshape(-1, 14, 14)
    grids = grids[grids.any(axis=(1, 2))]
    rng = np.random.default_rng(0)
    single = np.stack([rng.permuted(g.ravel()).reshape(14, 14) for g in grids])
    assert alike(single) == pytest.approx(0.3**2 + 0.7**2, abs=0.02)
    assert alike(grids) > 0.75


def test_every_patch_and_every_crop_has_its_turn():
    drawn = np.stack([masks(16, step=step) for step in range(300)])
    of_patch = drawn.mean(axis=(0, 1)).reshape(14, 14)
    assert of_patch.min() > 0.1 * of_patch.mean()  # corners, which few rectangles reach
    for alike in (of_patch[::-1], of_patch[:, ::-1], of_patch.T):  # no side and no direction is preferred
        np.testing.assert_allclose(of_patch, alike, atol=0.03)
    counts = drawn.sum(axis=2)
    np.testing.assert_allclose((counts > 0).mean(axis=0), 0.5, atol=0.12)  # which crops are masked
    np.testing.assert_allclose(counts.mean(axis=0), counts.mean(), rtol=0.3)  # and how much of them


def test_masks_are_a_pure_function_of_seed_and_step():
    np.testing.assert_array_equal(masks(step=3), masks(step=3))
    assert not np.array_equal(masks(step=3), masks(step=4))
    assert not np.array_equal(masks(step=3), masks(step=3, seed=1))


def test_the_generator_is_no_other_s():
    ours = mask_rng(5, 7).random()
    others = [np.random.default_rng(key).random() for key in ([5], [5, 7], [5, 7, 0], [5, 7, 1], [5, 7, 2])]
    assert ours not in [*others, *(crop_rng(5, 7, number).random() for number in range(3))]


def test_each_masked_crop_weighs_one():
    out = masks(32, 7, 7)
    weights, crop = patch_weights(out), np.flatnonzero(out) // out.shape[1]
    assert weights.dtype == np.float32
    assert weights.sum() == pytest.approx(16, rel=1e-6)
    of_crop = np.bincount(crop, weights, minlength=32)
    np.testing.assert_allclose(of_crop, out.any(axis=1), rtol=1e-6)
    first = crop[0]
    half = out.copy()
    half[first, np.flatnonzero(out[first])[::2]] = False
    weights, crop = patch_weights(half), np.flatnonzero(half) // out.shape[1]
    np.testing.assert_allclose(np.bincount(crop, weights, minlength=32), of_crop, rtol=1e-6)


def test_nothing_to_mask_gives_empty_masks():
    assert not masks(8, probability=0.0).any()
    assert not masks(8, 2, 2, ratio=(0.1, 0.2)).any()
    assert len(patch_weights(masks(8, probability=0.0))) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probability": 1.5}, "got 1.5 and"),
        ({"ratio": (0.5, 0.2)}, r"\(0.5, 0.2\)"),
        ({"ratio": (0.5, 1.0)}, "high < 1"),
    ],
)
def test_rules_that_cannot_be_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        masks(8, **options)


def test_masks_need_no_torch(run_python):
    process = run_python("import sys, training.masks; assert 'torch' not in sys.modules")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
