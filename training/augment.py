"""Multi-crop: from one uint8 image to its global and local crops, each draw from a keyed generator.

Crops stay uint8 until ``normalise``, which runs on the batch where the model is: a quarter of the bytes to move.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
N_GLOBAL = 2  # global crops an image
_TRIES = 10  # shapes drawn before the centre of the image is taken


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges of the crops. The defaults are those of the released DINOv2 and DINOv3 models, for sources of 224 px.

    The papers name blur probabilities of 1, .1 and .5; the released code applied 0, .9 and .5, and so do we. Small
    sources need milder ranges: ``mild_ranges``. Images whose mirror image means something else (digits, text) need
    ``hflip`` 0.

    A crop is what Pillow's ``resize(box=...)`` makes of the part: near its edges the filter reaches beyond it, by its
    support, where the image goes on. torchvision cuts the part out first, and sees none of that.
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
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop; cut off at twice the upper one: 9 taps
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


def mild_ranges(side: int) -> dict[str, Any]:
    """Fields of ``AugmentConfig`` that suit sources whose shorter side is ``side`` pixels; others keep their default.

    Nothing from 96 px on. Below, a local crop of 5 % is a few pixels and a blur takes all there is: larger crops, no
    blur, half the changes of colour. Below 32 px nearly the whole picture, and no changes of colour. Whether pictures
    may be mirrored does not depend on their size.
    """
    if side >= 96:
        return {}
    if side >= 32:
        crops = {"global_scale": (0.5, 1.0), "local_scale": (0.2, 0.5)}
        colour = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.05}
    else:
        crops = {"global_scale": (0.85, 1.0), "local_scale": (0.6, 0.85), "aspect": (0.85, 1.18)}
        colour = {"jitter": 0.0, "solarize": 0.0}
    return {**crops, **colour, "blur": (0.0, 0.0, 0.0)}


# What was drawn for one crop; ``make_crops`` and ``training.augment_torch`` do it to pixels.
CROP = np.dtype(
    [
        ("box", "i4", 4),  # left, top, right, bottom: pixels of the image
        ("flip", "?"),  # left and right change places
        ("order", "i1", 4),  # of the changes: 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 none
        ("amount", "f4", 4),  # of change i: three factors, and the turn as a share of the full circle
        ("gray", "?"),
        ("sigma", "f4"),  # of the blur, pixels of the crop
        ("radius", "i2"),  # pixels of the crop at which it is cut off; 0: no blur
        ("threshold", "i2"),  # values from here on are inverted; 256: none
    ]
)


class Crops(NamedTuple):
    """The crops of one image: uint8, height x width x RGB."""

    globals: np.ndarray  # (n_global, global_size, global_size, 3)
    locals: np.ndarray  # (n_local, local_size, local_size, 3)


def crop_rng(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The generator of one sample's crops: a pure function of the key, whoever draws."""
    return np.random.default_rng([seed, epoch, number, 1])  # the 1 keeps it apart from the order's generators


def draw_crops(width: int, height: int, config: AugmentConfig, n_local: int, rng: np.random.Generator) -> np.ndarray:
    """What is done to an image of this size: records of ``CROP``, two global crops, then ``n_local`` local ones.

    The numbers taken from ``rng`` are the same whatever comes out of them.
    """
    drawn = np.zeros(N_GLOBAL + n_local, CROP)
    draws = rng.random((len(drawn), 2 * _TRIES + 15)).tolist()
    for i in range(len(drawn)):
        _draw(drawn[i], width, height, config, view=min(i, 1) if i < N_GLOBAL else 2, draws=draws[i])
    return drawn


def make_crops(image: np.ndarray, drawn: np.ndarray, sizes: tuple[int, int], out: Crops | None = None) -> Crops:
    """The crops of an image, uint8 (h, w, 3), as ``draw_crops`` has drawn them; sizes: of globals and locals, pixels.

    out: where to write them, each crop contiguous; None: to new arrays.
    The reference of ``training.augment_torch``: float32 from the resize to the last step, rounded once. Memory: 30
    bytes a pixel of a crop, and 12 * size for every column of the image.
    """
    if out is None:
        counts = N_GLOBAL, len(drawn) - N_GLOBAL
        out = Crops(*(np.empty((n, side, side, 3), np.uint8) for n, side in zip(counts, sizes, strict=True)))
    image = np.ascontiguousarray(image)
    for crop, record in zip((*out.globals, *out.locals), drawn, strict=True):
        _make_crop(image, record, crop)
    return out


def gaussian(sigma: float, radius: int) -> np.ndarray:
    """The middle and one side of a Gaussian cut off at ``radius``: float32 (radius + 1,); both sides sum to 1."""
    values = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    return np.array(values, np.float32) / np.float32(2 * sum(values) - values[0])


def _make_crop(image: np.ndarray, record: np.void, out: np.ndarray) -> None:
    """Write one crop to uint8 (size, size, 3)."""
    from training import loops_crops as loops  # here: numba takes a second to import, and is no part of a GPU's crops

    drawn: Any = record.item()
    box, flip, order, amount, gray, sigma, radius, threshold = drawn
    left, top, right, bottom = box.tolist()
    planes = loops.resized(image, left, top, right, bottom, flip, len(out))
    pixels = planes.reshape(3, -1)
    for change in order.tolist():
        if change == 0:
            loops.change_brightness(pixels, amount[0])
        elif change == 1:
            loops.change_contrast(pixels, amount[1], loops.mean_gray(pixels, len(out)))
        elif change == 2:
            loops.change_saturation(pixels, amount[2])
        elif change == 3:
            loops.change_hue(pixels, amount[3])
    if gray:
        loops.change_saturation(pixels, np.float32(0))
    if radius:
        loops.blur(planes, gaussian(sigma, radius))
    loops.to_bytes(planes, threshold, out)


def multi_crop(
    image: np.ndarray, config: AugmentConfig, sizes: tuple[int, int], n_local: int, rng: np.random.Generator
) -> Crops:
    """Cut, resize and change the crops of one image: two global ones, then ``n_local`` local ones.

    image: uint8 (h, w, 3), any size from 1 x 1. sizes: sides of global and local crops in pixels. Bicubic with
    antialias, by Pillow's formula.
    """
    height, width = image.shape[:2]
    return make_crops(image, draw_crops(width, height, config, n_local, rng), sizes)


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


def _draw(crop: np.void, width: int, height: int, config: AugmentConfig, view: int, draws: list[float]) -> None:
    """Fill in one record; view 0 first global, 1 other globals, 2 local."""
    scale = config.local_scale if view == 2 else config.global_scale
    flip, jitter, gray, blur, sigma, solarize, *colour = draws[2 * _TRIES + 2 :]
    crop["box"] = crop_box(width, height, scale, config.aspect, draws[: 2 * _TRIES + 2])
    crop["flip"] = flip < config.hflip
    crop["order"] = _order(config, colour[4:]) if jitter < config.jitter else -1
    b, c, s, h = (2 * u - 1 for u in colour[:4])
    crop["amount"] = 1 + config.brightness * b, 1 + config.contrast * c, 1 + config.saturation * s, config.hue * h
    crop["gray"] = gray < config.grayscale
    if blur < config.blur[view]:
        low, high = config.blur_sigma
        crop["sigma"], crop["radius"] = low + (high - low) * sigma, math.ceil(2 * high)
    crop["threshold"] = config.solarize_threshold if view == 1 and solarize < config.solarize else 256


def _order(config: AugmentConfig, draws: list[float]) -> list[int]:
    """The four changes of colour in random order from three draws; -1 for a change whose strength is 0."""
    order = [0, 1, 2, 3]
    for i, u in zip((3, 2, 1), draws, strict=True):  # Fisher-Yates
        j = int(u * (i + 1))
        order[i], order[j] = order[j], order[i]
    strength = (config.brightness, config.contrast, config.saturation, config.hue)
    return [i if strength[i] > 0 else -1 for i in order]


def normalise(
    crops: "Tensor", mean: tuple[float, float, float] = IMAGENET_MEAN, std: tuple[float, float, float] = IMAGENET_STD
) -> "Tensor":
    """uint8 (..., h, w, 3) to float32 (..., 3, h, w): value / 255, minus mean, over std, per channel."""
    import torch  # here: the loader's workers do without

    scale = torch.tensor([1 / (255 * s) for s in std], device=crops.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=crops.device)
    return (crops.float() * scale + shift).movedim(-1, -3).contiguous()
