"""The decoder ``scaled`` keeps the rules of the full one, and its pictures are those of a full decode, nearly."""

import io

import numpy as np
import pytest
from PIL import Image

from embedding.decode import BadImage, decode_reduced, decode_rgb
from embedding.fast_decode import Reduced, at_centres
from embedding.preprocess import PIXELS_LEAST_SIDE, Preprocess, pixel_descriptor

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "scale": 1.0}


def scene(height, width, seed=0, detail=40):
    """Waves of many lengths, the shortest of ``detail`` pixels, and one bright corner: nothing in it is symmetric."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    out = np.zeros((height, width, 3))
    for _ in range(12):
        fy, fx = rng.normal(size=2) * rng.uniform(0.2, 1) / detail
        out += np.sin(2 * np.pi * (y * fy + x * fx) + rng.uniform(0, 6))[:, :, None] * rng.uniform(-1, 1, 3)
    out = 127 + 35 * out
    out[: height // 3, : width // 4] += 60
    return out.clip(0, 255).astype("u1")


def encode(image, fmt="JPEG", **options):
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, fmt, **options)
    return out.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def difference(data, prepare):
    """Mean difference of the crop to that of a full decode."""
    reduced = decode_reduced(data, prepare.least_side)
    full = prepare.cropped(decode_rgb(data))
    assert full.shape == prepare.cropped(reduced).shape == (prepare.side, prepare.side, 3)
    return np.abs(prepare.cropped(reduced).astype(int) - full).mean()


@pytest.mark.parametrize(
    ("least_side", "scale"),
    [(None, 1), (401, 1), (400, 1), (200, 2), (201, 1), (101, 2), (100, 4), (80, 8), (81, 4), (1, 8)],
)
def test_no_more_is_left_out_than_the_size_allows(least_side, scale):
    """800 pixels: at 1/2 and 1/4 twice the size must be left, at 1/8 a quarter more than it."""
    reduced = decode_reduced(encode(scene(800, 1001)), least_side)
    assert reduced.pixels.shape == (-(-800 // scale), -(-1001 // scale), 3)
    assert (reduced.width, reduced.height) == (1001, 800)
    assert reduced.region == (0, 0, 1001 / scale, 800 / scale)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_formats_are_decoded_whole(fmt):
    data = encode(scene(160, 203), fmt)
    reduced = decode_reduced(data, 4)
    np.testing.assert_array_equal(reduced.pixels, decode_rgb(data))
    assert reduced.region == (0, 0, 203, 160)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [24, 30, 60])  # 1/8, 1/4, 1/2
def test_upright_and_in_its_place_at_every_scale(orientation, size):
    """Sizes that are no multiple of 8: the last pixel stands for less than one, wherever it is turned to."""
    data = encode(scene(241, 323), exif=turned(orientation), quality=95)
    prepare = Preprocess(size=size, crop=size)
    reduced, full = decode_reduced(data, size), decode_rgb(data)
    assert reduced.pixels.shape != full.shape == (reduced.height, reduced.width, 3)
    assert difference(data, prepare) < 1
    shifted = reduced._replace(region=(0, 0, *reduced.pixels.shape[1::-1]))
    assert np.abs(prepare.cropped(shifted).astype(int) - prepare.cropped(full)).mean() > 2


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB", "YCbCr"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_whatever_its_colours(mode, options):
    data = encode(Image.fromarray(scene(320, 400)).convert(mode), quality=95, **options)
    reduced = decode_reduced(data, 24)
    assert reduced.pixels.shape == ((320, 400, 3) if mode == "CMYK" else (40, 50, 3))  # CMYK is rare: whole
    assert difference(data, Preprocess(size=24, crop=24)) < 0.8


def test_several_jpegs_in_one_file():
    data = encode(scene(320, 400), "MPO", save_all=True, append_images=[Image.fromarray(scene(320, 400, 1))])
    assert decode_reduced(data, 24).pixels.shape == (40, 50, 3)
    assert difference(data, Preprocess(size=24, crop=24)) < 0.8


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_what_is_bad_whole_is_bad_reduced(options):
    data = encode(scene(160, 203, detail=6), quality=95, **options)
    for cut in range(0, len(data), 211):
        for file in (data[:cut], data[:cut] + bytes(len(data) - cut), data[:cut] + b"<html>504 timeout</html>" * 900):
            whole, reduced = decode_rgb(file), decode_reduced(file, 8)
            assert isinstance(whole, BadImage) == isinstance(reduced, BadImage), cut
            if isinstance(whole, BadImage):
                assert reduced == whole
    assert decode_reduced(data, 8, max_pixels=160 * 203 - 1) == BadImage("too_large", "203x160 > 32479 pixels")
    assert decode_reduced(b"", 8) == decode_rgb(b"")


def test_damaged_files_never_raise():
    data = encode(scene(160, 203, detail=6), quality=95, exif=turned(6))
    kinds = set()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        file = bytearray(data)
        for i in rng.integers(len(file) if seed % 2 else 700, size=3):
            file[i] ^= 1 << int(rng.integers(8))
        reduced = decode_reduced(bytes(file), 8, max_pixels=4_000_000)
        kinds.add(type(reduced))
        assert isinstance(reduced, BadImage) == isinstance(decode_rgb(bytes(file), 4_000_000), BadImage)
        if isinstance(reduced, Reduced):
            left, top, right, bottom = reduced.region
            height, width = reduced.pixels.shape[:2]
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
    assert kinds == {BadImage, Reduced}


@pytest.mark.parametrize("keep_aspect", [True, False])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "box", "nearest"])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (64, 64), (50, 31)])
def test_resizing_the_crop_alone_is_resizing_all_and_cropping(shape, resample, keep_aspect):
    prepare = Preprocess(size=72, crop=64, resample=resample, keep_aspect=keep_aspect, **PLAIN)
    image = scene(*shape, detail=5)
    reduced = Reduced(image, shape[1], shape[0], (0, 0, shape[1], shape[0]))
    assert np.abs(prepare(reduced) - prepare(image)).max() <= 2  # the weights of a filter are rounded
    assert np.abs(prepare(reduced) - prepare(image)).mean() < 0.15


@pytest.mark.parametrize("resample", ["box", "nearest"])
def test_filters_that_jump_are_given_whole_pictures(resample):
    prepare = Preprocess(size=8, crop=8, resample=resample)
    data = encode(scene(241, 323))
    np.testing.assert_array_equal(prepare(decode_reduced(data, prepare.least_side)), prepare(decode_rgb(data)))


def test_a_long_strip_takes_little_memory():
    strip = scene(2, 40_000, detail=3000)
    reduced = Reduced(strip, 40_000, 2, (0, 0, 40_000, 2))
    prepare = Preprocess(size=256, crop=224, **PLAIN)
    assert np.abs(prepare(reduced) - prepare(strip)).mean() < 0.1


def test_the_pixels_descriptor_of_a_reduced_picture():
    data = encode(scene(1200, 1600, detail=100), quality=95)
    reduced = decode_reduced(data, PIXELS_LEAST_SIDE)
    assert reduced.pixels.shape == (300, 400, 3)
    assert pixel_descriptor(reduced) @ pixel_descriptor(decode_rgb(data)) > 0.9995


def test_means_of_blocks_become_values_at_their_centres():
    """Of a parabola exactly: its mean over a block of 8 lies 8 ** 2 / 24 times its bend above the centre."""
    centres = np.arange(4, 8 * 6, 8)
    bend = 0.31  # the second derivative in each direction
    values = bend / 2 * ((centres[:, None] - 20) ** 2 + (centres[None] - 30) ** 2)
    means = np.repeat((values + 2 * bend * 64 / 24).round()[:, :, None], 3, 2).astype("u1")
    inner = np.s_[1:-1, 1:-1]
    assert np.abs(means[inner][:, :, 0] - values[inner]).min() > 1
    assert np.abs(at_centres(means, 8)[inner][:, :, 0] - values[inner]).max() <= 1.2  # both are rounded
    np.testing.assert_array_equal(at_centres(means, 4), means)
