"""Known copies of an image, made the way pictures come back on the web: to find out which threshold tells copies.

Each transform has a file of its own per image, encoded anew, so that decoding is part of what a descriptor must bear.
What is drawn at random hangs on (seed, row, transform) alone. Pillow makes them: another version of it may give other
bytes.
"""

import io
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from embedding.config import DECODERS, check_pooling, check_precision
from embedding.decode import BadImage, decode_rgb

MOST_SIDE = 4096  # pixels: a larger picture is shrunk to this first, which bounds the memory of its copies
N_LETTERS = 18  # of a text that is laid on a picture


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How many images are copied, and what is asked of the threshold that is suggested."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    backbone: str  # "pixels", "phash", a folder, a TorchScript file, or a name on the Hugging Face hub, as in embed
    pooling: str = "cls"  # as in embed
    precision: str = "float32"  # of a network's products, as in embed
    decoder: str = "full"  # as in embed
    n_images: int = 1000  # drawn at random; each is copied in a dozen ways, and every copy compared with all of them
    min_precision: float = 0.99  # of the suggested threshold: share of true pairs among the pairs that a pool of this
    # size would give if every image had one copy
    seed: int = 0  # of the draw and of the copies

    def __post_init__(self) -> None:
        if not self.backbone:
            raise ValueError("calibrate.backbone must be 'pixels', 'phash', a folder or a Hugging Face name: got ''")
        check_pooling(self.pooling, "calibrate.pooling")
        check_precision(self.precision, "calibrate.precision")
        if self.decoder not in DECODERS:
            raise ValueError(f"calibrate.decoder must be one of {DECODERS}: got {self.decoder!r}")
        if self.n_images < 2:
            raise ValueError(f"calibrate.n_images must be at least 2: got {self.n_images}")
        if not 0 < self.min_precision <= 1:
            raise ValueError(f"calibrate.min_precision must be in (0, 1]: got {self.min_precision}")


class Transform(NamedTuple):
    """What is done to the picture, and how it is saved."""

    change: Callable[[Image.Image, np.random.Generator], Image.Image]
    saved: Mapping[str, Any] = {"format": "JPEG", "quality": 90}


def known_copies(data: bytes, seed: int, row: int, max_pixels: int) -> list[bytes] | BadImage:
    """A file for each of ``TRANSFORMS``, in their order, of the picture in a file; a picture that is bad as it is.

    The same bytes for the same (data, seed, row). Holds the picture, shrunk to ``MOST_SIDE``, some six times.
    """
    pixels = decode_rgb(data, max_pixels)
    if isinstance(pixels, BadImage):
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)  # never enlarges
    copies = []
    for number, transform in enumerate(TRANSFORMS.values()):
        file = io.BytesIO()
        transform.change(image, np.random.default_rng([seed, row, number])).save(file, **transform.saved)
        copies.append(file.getvalue())
    return copies


def _as_it_is(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """70 % of the area at a random place, in the same aspect."""
    return _cut(image, 0.7**0.5, 0.7**0.5, rng)


def _crop_aspect(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of the two sides, drawn, cut to 60-75 %."""
    share = rng.uniform(0.6, 0.75)
    return _cut(image, share, 1, rng) if rng.random() < 0.5 else _cut(image, 1, share, rng)


def _cut(image: Image.Image, of_width: float, of_height: float, rng: np.random.Generator) -> Image.Image:
    width, height = _scaled(image, of_width, of_height)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _half(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.resize(_scaled(image, 0.5, 0.5), Image.Resampling.BICUBIC)


def _larger(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.resize(_scaled(image, 1.5, 1.5), Image.Resampling.BICUBIC)


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian, its deviation 0.5-1 % of the longer side."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.005, 0.01) * max(image.size)))


def _overlay(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A box of one colour with a text in it, 6-15 % of the area, at a random place."""
    width, height = _scaled(image, rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.25))
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    label = Image.new("RGB", (width, height), tuple(rng.integers(256, size=3).tolist()))
    laid = image.copy()
    laid.paste(_lettered(label, rng), (left, top))
    return laid


def _caption(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A white or black band with a text, a sixth of the height, below or above the whole picture."""
    _, height = _scaled(image, 1, 1 / 6)
    band = _lettered(Image.new("RGB", (image.width, height), str(rng.choice(["white", "black"]))), rng)
    both = [image, band] if rng.random() < 0.5 else [band, image]
    page = Image.new("RGB", (image.width, image.height + height))
    page.paste(both[0], (0, 0))
    page.paste(both[1], (0, both[0].height))
    return page


def _lettered(label: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Random letters across the middle of a label of one colour, light on dark or dark on light.

    Drawn with Pillow's bitmap font and stretched, which needs no FreeType.
    """
    text, font = "".join(rng.choice(list(string.ascii_letters + "   "), N_LETTERS)), ImageFont.load_default_imagefont()
    size = font.getbbox(text)[2:]
    letters = Image.new("L", (max(1, int(size[0])), max(1, int(size[1]))))
    ImageDraw.Draw(letters).text((0, 0), text, fill=255, font=font)
    width, height = _scaled(label, 0.9, 0.6)
    ink = "white" if label.convert("L").getpixel((0, 0)) < 128 else "black"  # type: ignore[operator]
    mask = letters.resize((width, height), Image.Resampling.BILINEAR)
    label.paste(ink, ((label.width - width) // 2, (label.height - height) // 2), mask)
    return label


def _flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image)


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness and contrast, each by a factor of 0.7 or 1.35."""
    brighter = ImageEnhance.Brightness(image).enhance(float(rng.choice([0.7, 1.35])))
    return ImageEnhance.Contrast(brighter).enhance(float(rng.choice([0.7, 1.35])))


def _colour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half of them grey, of the others each channel times 0.75-1.25."""
    if rng.random() < 0.5:
        return image.convert("L")
    bands = zip(image.split(), rng.uniform(0.75, 1.25, 3).tolist(), strict=True)
    return Image.merge("RGB", [band.point([min(255, round(v * gain)) for v in range(256)]) for band, gain in bands])


def _scaled(image: Image.Image, of_width: float, of_height: float) -> tuple[int, int]:
    return max(1, round(image.width * of_width)), max(1, round(image.height * of_height))


# Names as they stand in tables; the order is that of the copies and part of what seeds them.
TRANSFORMS: Mapping[str, Transform] = {
    "crop": Transform(_crop),
    "crop_aspect": Transform(_crop_aspect),
    "jpeg": Transform(_as_it_is, {"format": "JPEG", "quality": 30}),
    "webp": Transform(_as_it_is, {"format": "WEBP", "quality": 75}),
    "half": Transform(_half),
    "larger": Transform(_larger),
    "blur": Transform(_blur),
    "overlay": Transform(_overlay),
    "caption": Transform(_caption),
    "flip": Transform(_flip),
    "light": Transform(_light),
    "colour": Transform(_colour),
}
