import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from training.augment import AugmentConfig, crop_box, crop_rng, multi_crop, normalise

PLAIN = AugmentConfig(
    global_scale=(1, 1), local_scale=(1, 1), aspect=(1, 1), hflip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0
)


def image(h=32, w=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def changed(**fields):
    return replace(PLAIN, **fields)


def test_whole_image_at_its_own_size_is_the_image():
    source = image()
    crops = multi_crop(source, PLAIN, (32, 32), 3, crop_rng(0, 0, 0))
    assert crops.globals.shape == (2, 32, 32, 3)
    assert crops.locals.shape == (3, 32, 32, 3)
    for crop in (*crops.globals, *crops.locals):
        np.testing.assert_array_equal(crop, source)


def test_a_crop_is_pillows_bicubic_with_antialias():
    source = image(64, 64)
    expected = Image.fromarray(source).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(multi_crop(source, PLAIN, (16, 16), 0, crop_rng(0, 0, 0)).globals[0], expected)


@pytest.mark.parametrize(("h", "w"), [(300, 200), (97, 640), (32, 32)])
def test_boxes_keep_to_the_ranges_of_area_and_aspect(h, w):
    rng, areas = np.random.default_rng(0), []
    for _ in range(2000):
        x0, y0, x1, y1 = crop_box(w, h, (0.2, 0.5), (3 / 4, 4 / 3), rng.random(22).tolist())
        assert 0 <= x0 < x1 <= w
        assert 0 <= y0 < y1 <= h
        bw, bh = x1 - x0, y1 - y0
        areas.append(bw * bh / (w * h))
        assert (bw - 0.5) / (bh + 0.5) <= 4 / 3  # up to rounding
        assert (bw + 0.5) / (bh - 0.5) >= 3 / 4
    if w / h < 4:
        slack = (0.5 / math.sqrt(0.2 * w * h)) * 2.5
        assert 0.2 * (1 - slack) <= min(areas) < 0.23
        assert 0.47 < max(areas) <= 0.5 * (1 + slack)


def test_a_long_strip_gives_its_largest_centred_part():
    assert crop_box(400, 10, (0.9, 1), (3 / 4, 4 / 3), [0.5] * 22) == (193, 0, 206, 10)
    assert crop_box(1, 1, (0.05, 0.1), (3 / 4, 4 / 3), [0.0] * 22) == (0, 0, 1, 1)


def test_places_reach_every_corner():
    ends = [crop_box(100, 50, (0.5, 0.5), (1, 1), [0.5] * 20 + [x, y]) for x in (0, 1 - 1e-9) for y in (0, 1 - 1e-9)]
    assert {(b[0], b[1]) for b in ends} == {(0, 0), (50, 0), (0, 0), (50, 0)}
    assert {b[2] for b in ends} == {50, 100}


def test_probabilities_of_one_and_their_effects():
    source = image()
    flipped = multi_crop(source, changed(hflip=1.0), (32, 32), 0, crop_rng(0, 0, 0)).globals[0]
    np.testing.assert_array_equal(flipped, source[:, ::-1])
    gray = multi_crop(source, changed(grayscale=1.0), (32, 32), 0, crop_rng(0, 0, 0)).globals[0]
    assert (gray == gray[..., :1]).all()
    crops = multi_crop(source, changed(solarize=1.0), (32, 32), 1, crop_rng(0, 0, 0))
    np.testing.assert_array_equal(crops.globals[1], np.where(source < 128, source, 255 - source))
    np.testing.assert_array_equal(crops.globals[0], source)  # never the first global, never a local
    np.testing.assert_array_equal(crops.locals[0], source)


def test_blur_is_for_the_view_it_names():
    source = image()
    crops = multi_crop(source, changed(blur=(0, 1, 0), blur_sigma=(2, 2)), (32, 32), 1, crop_rng(0, 0, 0))
    np.testing.assert_array_equal(crops.globals[0], source)
    np.testing.assert_array_equal(crops.locals[0], source)
    assert crops.globals[1].std() < source.std() / 3


def test_the_released_probabilities_are_the_default():
    assert AugmentConfig().blur == (0.0, 0.9, 0.5)


def test_shares_of_changed_crops_follow_the_probabilities():
    source, config = image(8, 8), changed(hflip=0.3)
    crops = [multi_crop(source, config, (8, 8), 0, crop_rng(0, 0, i)).globals[0] for i in range(2000)]
    assert np.mean([(c == source[:, ::-1]).all() for c in crops]) == pytest.approx(0.3, abs=0.04)


def test_jitter_off_and_strengths_of_zero_leave_pixels_alone():
    source = image()
    still = changed(jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    np.testing.assert_array_equal(multi_crop(source, still, (32, 32), 0, crop_rng(0, 0, 0)).globals[0], source)
    bright = changed(jitter=1.0, brightness=0.4, contrast=0, saturation=0, hue=0)
    factors = [
        multi_crop(np.full((4, 4, 3), 100, np.uint8), bright, (4, 4), 0, crop_rng(0, 0, i)).globals[0].mean() / 100
        for i in range(500)
    ]
    assert 0.6 - 1e-6 <= min(factors) < 0.63
    assert 1.37 < max(factors) <= 1.4
    hue = changed(jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0.5)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    turned = multi_crop(red, hue, (4, 4), 0, crop_rng(0, 0, 1)).globals[0]
    assert turned.max(axis=-1).min() >= 198  # value stays, colour turns
    assert not (turned == red).all()


def test_same_key_same_crops_other_key_others():
    source, config = image(), AugmentConfig()
    a, b, c, d = (
        multi_crop(source, config, (32, 16), 4, crop_rng(*key)) for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 3))
    )
    np.testing.assert_array_equal(a.globals, b.globals)
    np.testing.assert_array_equal(a.locals, b.locals)
    assert not np.array_equal(a.globals, c.globals)
    assert not np.array_equal(a.globals, d.globals)


def test_crops_of_one_pixel_and_of_strips():
    for shape in ((1, 1), (1, 500), (500, 1), (3, 2)):
        crops = multi_crop(image(*shape), AugmentConfig(), (32, 16), 2, crop_rng(0, 0, 0))
        assert crops.globals.shape == (2, 32, 32, 3)


def test_normalise_is_undone_by_its_formula():
    source = image()
    out = normalise(torch.from_numpy(source)[None])
    assert out.shape == (1, 3, 32, 32)
    assert out.dtype == torch.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    back = (out[0].permute(1, 2, 0).numpy() * std + mean) * 255
    np.testing.assert_allclose(back, source, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hflip": 1.5}, r"train.augment.hflip must be in \[0, 1\]: got 1.5"),
        ({"local_scale": (0.5, 0.2)}, "train.augment.local_scale must be 0 < low <= high <= 1: got 0.5, 0.2"),
        ({"blur": (0, 2, 0)}, "train.augment.blur must be three probabilities"),
        ({"hue": 0.6}, r"train.augment.hue must be in \[0, 0.5\]: got 0.6"),
        ({"std": (0, 1, 1)}, "train.augment.std must be positive"),
        ({"solarize_threshold": 300}, "train.augment.solarize_threshold"),
        ({"aspect": (0, 1)}, "train.augment.aspect"),
    ],
)
def test_bad_ranges_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**fields)
