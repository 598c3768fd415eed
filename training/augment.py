"""Multi-crop: from one uint8 image to its global and local crops, each draw from a keyed generator.

Crops stay uint8 until ``normalise``, which runs on the batch where the model is: a quarter of the bytes to move.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
N_GLOBAL = 2  # global crops an image
_TRIES = 10  # shapes drawn before the centre of the image is taken


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges of the crops. The defaults are those of the released DINOv2 and DINOv3 models, for sources of 224 px.

    The papers name blur probabilities of 1, .1 and .5; the released code applied 0, .9 and .5, and so do we. Sources
    of 8-32 px and runs of minutes need larger crops (``global_scale`` from .85, ``local_scale`` from .6, ``aspect``
    within .85-1.18), no or little blur, and often no colour jitter; images whose mirror image means something else
    (digits, text) need ``hflip`` 0.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)  # share of the image's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the part cut out
    hflip: float = 0.5  # probability
    jitter: float = 0.8  # probability of the four colour changes below, in an order drawn at random
    brightness: float = 0.4  # factor from [1 - b, 1 + b]
    contrast: float = 0.4  # same
    saturation: float = 0.2  # same
    hue: float = 0.1  # turn from [-h, h], 1 is the full circle
    grayscale: float = 0.2  # probability
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)  # probability for first global, other globals, locals
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop
    solarize: float = 0.2  # probability, of the globals after the first
    solarize_threshold: int = 128  # values from here on are inverted
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD  # same

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        for name in ("hflip", "jitter", "grayscale", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.augment.{name} must be in [0, 1]: got {getattr(self, name)}")
        if not all(0 <= p <= 1 for p in self.blur) or len(self.blur) != 3:
            raise ValueError(f"train.augment.blur must be three probabilities: got {self.blur}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"train.augment.{name} must be 0 < low <= high <= 1: got {low}, {high}")
        for name in ("aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"train.augment.{name} must be 0 < low <= high: got {low}, {high}")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"train.augment.{name} must be in [0, {most}]: got {getattr(self, name)}")
        if not 0 <= self.solarize_threshold <= 256:
            raise ValueError(f"train.augment.solarize_threshold must be in [0, 256]: got {self.solarize_threshold}")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"train.augment.std must be positive: got {self.std}")


class Crops(NamedTuple):
    """The crops of one image: uint8, height x width x RGB."""

    globals: np.ndarray  # (n_global, global_size, global_size, 3)
    locals: np.ndarray  # (n_local, local_size, local_size, 3)


def crop_rng(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The generator of one sample's crops: a pure function of the key, whoever draws."""
    return np.random.default_rng([seed, epoch, number, 1])  # the 1 keeps it apart from the order's generators


def multi_crop(
    image: np.ndarray, config: AugmentConfig, sizes: tuple[int, int], n_local: int, rng: np.random.Generator
) -> Crops:
    """Cut, resize and change the crops of one image: two global ones, then ``n_local`` local ones.

    image: uint8 (h, w, 3), any size from 1 x 1. sizes: sides of global and local crops in pixels. Bicubic with
    antialias (Pillow). 0.1 ms for 2 crops of 32 px and 4 of 16 px from 32 px without changes of colour.
    """
    source = Image.fromarray(image)
    out_g = np.empty((N_GLOBAL, sizes[0], sizes[0], 3), np.uint8)
    out_l = np.empty((n_local, sizes[1], sizes[1], 3), np.uint8)
    for i in range(N_GLOBAL):
        out_g[i] = _crop(source, config, sizes[0], min(i, 1), rng)
    for i in range(n_local):
        out_l[i] = _crop(source, config, sizes[1], 2, rng)
    return Crops(out_g, out_l)


def crop_box(
    width: int, height: int, scale: tuple[float, float], aspect: tuple[float, float], draws: list[float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a part of random area and shape, in whole pixels inside the image.

    The area is uniform in ``scale`` times the image's, the logarithm of width / height uniform in ``aspect``.
    ``draws``: 2 * 10 + 2 numbers in [0, 1), two a try and two for the place. When ten tries do not fit (very long
    images) it is the largest centred part of an allowed shape.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for i in range(0, 2 * _TRIES, 2):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[i])
        ratio = math.exp(low + (high - low) * draws[i + 1])
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            x, y = int(draws[-2] * (width - w + 1)), int(draws[-1] * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, max(1, round(height * aspect[1]))), min(height, max(1, round(width / aspect[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _crop(source: Image.Image, config: AugmentConfig, size: int, view: int, rng: np.random.Generator) -> np.ndarray:
    """One crop; view 0 first global, 1 other globals, 2 local. The number of draws is the same whatever comes out."""
    scale = config.local_scale if view == 2 else config.global_scale
    draws = rng.random(2 * _TRIES + 15).tolist()
    box = crop_box(source.width, source.height, scale, config.aspect, draws[: 2 * _TRIES + 2])
    flip, jitter, gray, blur, sigma, solarize, *colour = draws[2 * _TRIES + 2 :]
    crop = source.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip < config.hflip:
        crop = ImageOps.mirror(crop)
    if jitter < config.jitter:
        crop = _jitter(crop, config, colour)
    if gray < config.grayscale:
        crop = crop.convert("L").convert("RGB")
    if blur < config.blur[view]:
        low, high = config.blur_sigma
        crop = crop.filter(ImageFilter.GaussianBlur(low + (high - low) * sigma))
    if view == 1 and solarize < config.solarize:
        crop = ImageOps.solarize(crop, config.solarize_threshold)
    return np.asarray(crop)


def _jitter(crop: Image.Image, config: AugmentConfig, draws: list[float]) -> Image.Image:
    """Change brightness, contrast, saturation and hue; draws: 4 strengths, 3 for the order."""
    order = [0, 1, 2, 3]
    for i, u in zip((3, 2, 1), draws[4:], strict=True):  # Fisher-Yates
        j = int(u * (i + 1))
        order[i], order[j] = order[j], order[i]
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    strength = (config.brightness, config.contrast, config.saturation)
    for i in order:
        amount = 2 * draws[i] - 1
        if i < 3 and strength[i] > 0:
            crop = enhance[i](crop).enhance(1 + strength[i] * amount)
        elif i == 3 and config.hue > 0:
            hue, saturation, value = crop.convert("HSV").split()
            turned = (np.asarray(hue).astype(np.int16) + round(255 * config.hue * amount)).astype(np.uint8)
            crop = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    return crop


def normalise(
    crops: "Tensor", mean: tuple[float, float, float] = IMAGENET_MEAN, std: tuple[float, float, float] = IMAGENET_STD
) -> "Tensor":
    """uint8 (..., h, w, 3) to float32 (..., 3, h, w): value / 255, minus mean, over std, per channel."""
    import torch  # here: the loader's workers do without

    scale = torch.tensor([1 / (255 * s) for s in std], device=crops.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=crops.device)
    return (crops.float() * scale + shift).movedim(-1, -3).contiguous()
