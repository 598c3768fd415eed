import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d

from training.augment import (
    CROP,
    N_GLOBAL,
    AugmentConfig,
    Crops,
    crop_box,
    crop_rng,
    draw_crops,
    make_crops,
    mild_ranges,
    multi_crop,
    normalise,
)

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


@pytest.mark.parametrize(("h", "w", "side"), [(64, 64, 16), (97, 230, 32), (20, 9, 48), (1, 7, 8), (300, 5, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_pillows_bicubic_with_antialias_to_a_rounding(h, w, side, flip):
    """Also of parts, whose pixels at the edge take from beyond it. Grays: Pillow clips between the directions."""
    source, config = image(h, w) // 3 + 80, changed(global_scale=(0.2, 0.9), aspect=(0.5, 2), hflip=float(flip))
    for number in range(5):
        drawn = draw_crops(w, h, config, 0, crop_rng(0, 0, number))
        expected = Image.fromarray(source).resize((side, side), Image.Resampling.BICUBIC, box=drawn[0]["box"].tolist())
        made = make_crops(source, drawn, (side, side)).globals[0]
        difference = np.abs(np.asarray(expected)[:, :: -1 if flip else 1].astype(int) - made)
        assert difference.max() <= 1  # Pillow rounds between the directions
        assert difference.mean() < 0.3


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


def by_hand(**fields):
    """What is drawn for two globals of 32 px, given by hand; what is not named is left out."""
    drawn = np.zeros(N_GLOBAL, CROP)
    drawn["box"], drawn["order"], drawn["threshold"] = (0, 0, 32, 32), -1, 256
    for name, value in fields.items():
        drawn[name] = value
    return drawn


def done(source, **fields):
    return make_crops(source, by_hand(**fields), (32, 32)).globals[0]


def gray_of(x):
    return (x @ [0.299, 0.587, 0.114])[..., None]


def brighter(x, amount):
    return x * amount


def contrasted(x, amount):
    return gray_of(x).mean() * (1 - amount) + x * amount


def saturated(x, amount):
    return gray_of(x) * (1 - amount) + x * amount


def turned(x, amount):
    out = np.empty_like(x)
    for at in np.ndindex(*x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(x[at] / 255))
        out[at] = np.multiply(colorsys.hsv_to_rgb((h + amount) % 1, s, v), 255)
    return out


CHANGES = (brighter, contrasted, saturated, turned)


@pytest.mark.parametrize("change", range(4))
@pytest.mark.parametrize("amount", [-0.37, 0.5, 0.08, -1.4])
def test_each_change_of_colour_is_its_formula(change, amount):
    source = image()
    source[:4] = source[:4, :, :1]  # gray pixels have no hue
    source[4], source[5] = 0, 255
    amount = max(amount, -0.5) if change == 3 else abs(amount)
    expected = CHANGES[change](source.astype(float), amount).clip(0, 255)
    made = done(source, order=[change, -1, -1, -1], amount=amount)
    assert np.abs(made - expected).max() <= 0.501


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, -1, 3, 1)])
def test_changes_come_in_the_order_drawn(order):
    amounts, source = (1.3, 0.7, 1.2, 0.09), image(seed=3)
    expected = source.astype(float)
    for change in order:
        expected = CHANGES[change](expected, amounts[change]).clip(0, 255) if change >= 0 else expected
    assert np.abs(done(source, order=order, amount=amounts) - expected).max() <= 0.502


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 4), (0.9, 4), (2.0, 4), (7.0, 14), (30.0, 60)])
def test_blur_is_a_gaussian_cut_off_and_mirrored_at_the_border(sigma, radius):
    source = image(seed=5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    expected = source.astype(float)
    for axis in (0, 1):
        expected = correlate1d(expected, taps / taps.sum(), axis, mode="mirror")
    assert np.abs(done(source, sigma=sigma, radius=radius) - expected).max() <= 0.501


def test_the_released_blur_has_nine_taps():
    drawn = draw_crops(32, 32, changed(blur=(1, 1, 1), blur_sigma=(0.1, 2)), 4, crop_rng(0, 0, 0))
    assert drawn["radius"].tolist() == [4] * 6
    assert 0.1 <= drawn["sigma"].min() < drawn["sigma"].max() <= 2


def test_gray_blur_and_inverting_come_last_and_in_this_order():
    source, taps = image(seed=7), np.exp(-0.5 * np.arange(-4, 5) ** 2)
    expected = gray_of((source.astype(float) * 1.2).clip(0, 255)).repeat(3, 2)
    for axis in (0, 1):
        expected = correlate1d(expected, taps / taps.sum(), axis, mode="mirror")
    expected = np.where(expected < 99.5, expected, 255 - expected)
    made = done(source, order=[0, -1, -1, -1], amount=1.2, gray=True, sigma=1, radius=4, threshold=100)
    assert np.abs(made - expected)[np.abs(expected - 99.5) > 0.1].max() <= 0.502


def test_what_is_drawn_for_one_thing_does_not_move_another():
    full, plain = (draw_crops(300, 200, c, 8, crop_rng(0, 0, 5)) for c in (AugmentConfig(), AugmentConfig(jitter=0)))
    for name in CROP.names:
        if name != "order":
            np.testing.assert_array_equal(full[name], plain[name])
    assert (plain["order"] == -1).all()
    rng, other = crop_rng(0, 0, 5), crop_rng(0, 0, 5)
    draw_crops(1, 4000, PLAIN, 3, rng)
    draw_crops(300, 200, AugmentConfig(), 3, other)
    assert rng.random() == other.random()


def test_what_is_drawn_follows_the_config():
    drawn = np.concatenate([draw_crops(300, 200, AugmentConfig(), 8, crop_rng(0, 0, i)) for i in range(300)])
    first, second, local = (drawn.reshape(-1, 10)[:, part].reshape(-1) for part in ([0], [1], slice(2, None)))
    for share, expected in (
        ((drawn["order"][:, 0] >= 0).mean(), 0.8), (drawn["gray"].mean(), 0.2), (drawn["flip"].mean(), 0.5),
        ((first["radius"] > 0).mean(), 0), ((second["radius"] > 0).mean(), 0.9), ((local["radius"] > 0).mean(), 0.5),
        ((first["threshold"] < 256).mean(), 0), ((second["threshold"] < 256).mean(), 0.2),
        ((local["threshold"] < 256).mean(), 0),
    ):  # fmt: skip
        assert share == pytest.approx(expected, abs=0.08 if 0 < expected < 1 else 0)
    orders = {tuple(order) for order in drawn["order"].tolist()}
    assert len(orders) == 24 + 1
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3), (-1, -1, -1, -1)}
    for i, strength in enumerate((0.4, 0.4, 0.2, 0.1)):
        away = drawn["amount"][:, i] - (i < 3)
        assert -strength <= away.min() < -0.95 * strength
        assert 0.95 * strength < away.max() <= strength


def test_crops_go_where_they_are_wanted():
    source, config = image(50, 40), AugmentConfig()
    drawn = draw_crops(40, 50, config, 3, crop_rng(0, 0, 1))
    batch = Crops(np.zeros((2, 4, 32, 32, 3), np.uint8), np.zeros((3, 4, 16, 16, 3), np.uint8))
    made = make_crops(source, drawn, (32, 16))
    make_crops(source[:, ::-1][:, ::-1], drawn, (32, 16), out=Crops(batch.globals[:, 2], batch.locals[:, 2]))
    np.testing.assert_array_equal(batch.globals[:, 2], made.globals)
    np.testing.assert_array_equal(batch.locals[:, 2], made.locals)
    assert not batch.globals[:, [0, 1, 3]].any()


@pytest.mark.parametrize("side", [1, 8, 31, 32, 95, 96, 500])
def test_mild_ranges_are_milder_the_smaller_the_source(side):
    config, usual = AugmentConfig(**mild_ranges(side)), AugmentConfig()
    assert (config == usual) == (side >= 96)
    assert config.global_scale[0] >= usual.global_scale[0]
    assert config.local_scale[0] * side**2 >= min(3 * 3, 0.6 * side**2)  # some pixels to see
    assert (side >= 96) or config.blur == (0, 0, 0)
    assert all(getattr(config, n) <= getattr(usual, n) for n in ("jitter", "brightness", "contrast", "hue", "solarize"))
    assert config.hflip == usual.hflip


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
