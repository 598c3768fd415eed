from dataclasses import replace

import numpy as np
import pytest
import torch

import training.augment_torch as module
from training.augment import AugmentConfig, crop_rng, draw_crops, make_crops
from training.augment_torch import batched_crops

PLAIN = AugmentConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)
STILL = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
SIDES = (32, 14)
SIZES = [(50, 70), (33, 21), (120, 90), (64, 64), (1, 1), (7, 200), (200, 3), (32, 32)]
MOST_MEAN = 0.01  # of 255; both round the same numbers of float32, added in another order


def images(sizes=SIZES):
    """Noise in blocks of some pixels, so that colours have room to move."""
    rng = np.random.default_rng(1)
    blocks = [rng.integers(0, 256, (-(-h // 3), -(-w // 4), 3), np.uint8) for h, w in sizes]
    return [b.repeat(3, 0).repeat(4, 1)[:h, :w].copy() for b, (h, w) in zip(blocks, sizes, strict=True)]


def both(config, sources, n_local=3, sides=SIDES):
    """The crops of the reference and of the batch, each (crop, image, height, width, RGB)."""
    drawn = [draw_crops(x.shape[1], x.shape[0], config, n_local, crop_rng(0, 0, i)) for i, x in enumerate(sources)]
    crops = [make_crops(x, d, sides) for x, d in zip(sources, drawn, strict=True)]
    expected = [np.stack(part, axis=1) for part in zip(*crops, strict=True)]
    sizes = np.array([x.shape[:2] for x in sources])
    made = batched_crops(np.concatenate([x.reshape(-1) for x in sources]), sizes, np.stack(drawn, axis=1), sides)
    return expected, made


def assert_close(expected, made):
    for a, b in zip(expected, made, strict=True):
        assert b.dtype == torch.uint8
        assert b.shape == a.shape
        if a.size:
            difference = np.abs(a.astype(int) - b.numpy())
            assert difference.max() <= 1
            assert difference.mean() <= MOST_MEAN


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, hflip=1.0),
        *(replace(PLAIN, **{**STILL, name: 0.4}, jitter=1.0) for name in STILL),
        replace(PLAIN, jitter=1.0),
        replace(PLAIN, grayscale=0.5),
        replace(PLAIN, blur=(1, 0.5, 0.5)),
        replace(PLAIN, blur=(1, 1, 1), blur_sigma=(3, 9)),
        replace(PLAIN, solarize=0.5),
        replace(PLAIN, solarize=1.0, solarize_threshold=0),
        AugmentConfig(),
        AugmentConfig(blur=(1, 0.1, 0.5)),
    ],
)
def test_batches_are_the_reference_to_a_rounding(config):
    assert_close(*both(config, images()))


def test_crops_larger_than_the_image_and_no_locals():
    assert_close(*both(AugmentConfig(), images([(9, 14), (30, 8)]), n_local=0, sides=(48, 8)))


def test_images_of_many_canvases_come_back_in_their_order(monkeypatch):
    sources = images()
    expected, made = both(AugmentConfig(), sources)
    monkeypatch.setattr(module, "_CANVAS", 128 * 128)
    groups = [part.tolist() for part in module._batches(np.array(SIZES))]
    assert len(groups) > 2
    for group in groups:
        canvas = np.ceil(np.array(SIZES)[group].max(axis=0) / 64).prod() * 64 * 64
        assert len(group) == 1 or canvas * len(group) <= 128 * 128
    assert sorted(i for group in groups for i in group) == list(range(len(SIZES)))
    again = both(AugmentConfig(), sources)[1]
    assert_close(expected, again)
    for a, b in zip(made, again, strict=True):
        assert (a != b).float().mean() < 1e-3


def test_places_far_from_the_border_are_exact():
    """On a line so long that float32 has few bits left for parts of a pixel."""
    source = images([(9, 600_000)])[0]
    drawn = draw_crops(source.shape[1], source.shape[0], PLAIN, 0, crop_rng(0, 0, 0))
    drawn["box"] = 599_900, 0, 599_913, 9
    expected = make_crops(source, drawn, (64, 64)).globals
    made = batched_crops(source.reshape(-1), np.array([source.shape[:2]]), drawn[:, None], (64, 64))[0]
    assert np.abs(expected.astype(int) - made.numpy()[:, 0]).max() <= 1
    assert (expected != made.numpy()[:, 0]).mean() < MOST_MEAN


def test_autocast_changes_nothing():
    sources = images()[:3]
    plain = both(AugmentConfig(), sources)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = both(AugmentConfig(), sources)[1]
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_torch_and_numpy_are_enough(run_python):
    code = """
        import sys
        for name in ("numba", "scipy", "pyarrow", "boto3", "sklearn"):
            sys.modules[name] = None
        import numpy as np
        from training.augment import AugmentConfig, crop_rng, draw_crops
        from training.augment_torch import batched_crops
        drawn = draw_crops(8, 8, AugmentConfig(), 1, crop_rng(0, 0, 0))[:, None]
        print(batched_crops(np.zeros(192, np.uint8), np.array([[8, 8]]), drawn, (8, 4))[0].shape)
    """
    out, err = run_python(code).communicate(timeout=60)
    assert out.strip() == "torch.Size([2, 1, 8, 8, 3])", err
