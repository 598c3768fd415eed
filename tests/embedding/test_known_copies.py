"""Every transform does to a picture what its name says, and hangs on (seed, row) alone."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

from embedding import known_copies as module
from embedding.decode import BadImage, decode_rgb
from embedding.known_copies import TRANSFORMS, CalibrateConfig, known_copies

MAX_PIXELS = 10**7


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0][40:340, 100:500])  # 400 x 300


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def copies_of(image: Image.Image, row: int = 0, seed: int = 0) -> dict[str, Image.Image]:
    files = known_copies(encoded(image), seed, row, MAX_PIXELS)
    assert not isinstance(files, BadImage)
    return {name: Image.open(io.BytesIO(data)) for name, data in zip(TRANSFORMS, files, strict=True)}


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of the pixels, in units of 1/255."""
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())


@pytest.mark.parametrize("row", range(8))
def test_sizes_and_formats(photo, row):
    found = copies_of(photo, row)
    assert {name: copy.format for name, copy in found.items() if copy.format != "JPEG"} == {"webp": "WEBP"}
    sizes = {name: copy.size for name, copy in found.items()}
    for name in ("jpeg", "webp", "blur", "overlay", "flip", "light", "colour"):
        assert sizes.pop(name) == (400, 300)
    wide, high = sizes.pop("crop_aspect")
    assert sorted([wide / 400, high / 300])[1] == 1 and 0.59 < min(wide / 400, high / 300) < 0.76
    assert sizes == {"crop": (335, 251), "half": (200, 150), "larger": (600, 450), "caption": (400, 350)}


@pytest.mark.parametrize("row", range(8))
def test_pictures_are_changed_as_their_names_say(photo, row):
    found = copies_of(photo, row)
    mirrored = Image.fromarray(np.asarray(photo)[:, ::-1])
    assert difference(found["flip"], mirrored) < 4 < difference(found["flip"], photo)
    for name, most in (("jpeg", 8), ("webp", 5)):
        assert 0 < difference(found[name], photo) < most, name
    filtered = [gaussian_filter(np.asarray(photo), (sigma, sigma, 0)) for sigma in np.linspace(2, 4, 9)]
    assert min(difference(found["blur"], Image.fromarray(x)) for x in filtered) < 2
    assert difference(found["half"], photo.reduce(2)) < 5
    assert difference(found["larger"].resize(photo.size), photo) < 4
    assert 12 < difference(found["light"], photo) < 90
    band = found["caption"]
    pictures = [band.crop((0, top, 400, top + 300)) for top in (0, 50)]
    assert min(difference(picture, photo) for picture in pictures) < 4
    changed = (np.abs(np.asarray(found["overlay"], int) - np.asarray(photo)).max(axis=2) > 40).mean()
    assert 0.02 < changed < 0.17


@pytest.mark.parametrize("name", ["crop", "crop_aspect"])
def test_crops_are_pieces_of_the_picture(photo, name):
    small, places = photo.resize((80, 60)), set()
    for row in range(4):
        piece = copies_of(small, row)[name]
        found = [
            (difference(small.crop((x, y, x + piece.width, y + piece.height)), piece), x, y)
            for x in range(small.width - piece.width + 1)
            for y in range(small.height - piece.height + 1)
        ]
        closest = min(found)
        assert closest[0] < 9
        places.add(closest[1:])
    assert len(places) > 1


def test_colours_become_grey_or_shift(photo):
    pixels = [np.asarray(copies_of(photo, row)["colour"].convert("RGB"), int) for row in range(12)]
    is_grey = [bool((np.ptp(x, axis=2) == 0).all()) for x in pixels]
    assert 2 <= sum(is_grey) <= 10
    base = np.asarray(photo, float).reshape(-1, 3)
    for x in (x for x, grey in zip(pixels, is_grey, strict=True) if not grey):
        gains = [np.median(x.reshape(-1, 3)[:, c] / np.maximum(base[:, c], 1)) for c in range(3)]
        assert 0.7 < min(gains) <= max(gains) < 1.3


def test_copies_hang_on_seed_and_row_alone(photo):
    data = encoded(photo)
    first = known_copies(data, 3, 2**40, MAX_PIXELS)
    assert first == known_copies(data, 3, 2**40, MAX_PIXELS)
    fixed = {"jpeg", "webp", "half", "larger", "flip"}
    for other in (known_copies(data, 4, 2**40, MAX_PIXELS), known_copies(data, 3, 1, MAX_PIXELS)):
        same = {name for name, a, b in zip(TRANSFORMS, first, other, strict=True) if a == b}
        assert fixed <= same < set(TRANSFORMS) and len(same - fixed) <= 2  # light and colour have few outcomes


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (8, 8)])
def test_the_smallest_pictures_have_copies_too(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    for data in known_copies(encoded(image), 0, 0, MAX_PIXELS):
        assert not isinstance(decode_rgb(data), BadImage)


def test_a_large_picture_is_shrunk_first(photo, monkeypatch):
    monkeypatch.setattr(module, "MOST_SIDE", 200)
    sizes = {name: copy.size for name, copy in copies_of(photo).items()}
    assert (sizes["flip"], sizes["larger"], sizes["half"]) == ((200, 150), (300, 225), (100, 75))


def test_a_bad_picture_is_bad(photo):
    assert known_copies(encoded(photo)[:500], 0, 0, MAX_PIXELS).reason == "undecodable"
    assert known_copies(encoded(photo), 0, 0, 1000).reason == "too_large"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": ""}, "calibrate.backbone must be 'pixels', 'phash', a folder or a Hugging Face name: got ''"),
        ({"pooling": "max"}, "calibrate.pooling must be one of .*: got 'max'"),
        ({"precision": "int8"}, "calibrate.precision must be one of .*: got 'int8'"),
        ({"decoder": "fast"}, "calibrate.decoder must be one of .*: got 'fast'"),
        ({"n_images": 1}, "calibrate.n_images must be at least 2: got 1"),
        ({"min_precision": 0.0}, r"calibrate.min_precision must be in \(0, 1\]: got 0.0"),
        ({"min_precision": float("nan")}, r"calibrate.min_precision must be in \(0, 1\]: got nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        replace(CalibrateConfig(backbone="pixels"), **values)
