"""Pixels to the input of a network, and the ``pixels`` descriptor, which needs no network.

Resizing is Pillow's, with antialiasing and integer arithmetic: the same bits on every machine and for any
number of threads.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedding.decode import BadImage
from embedding.fast_decode import Reduced

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXELS_WIDTH = 768  # 16 * 16 * 3
PIXELS_LEAST_SIDE = 128  # as ``least_side``: so that each of the 16 is a mean of some 10 pixels or more

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
_WITH_EDGES = ("nearest", "box")  # filters that jump: which pixels they take hangs on the last bit of a position
_MAX_STRIP = 32  # longer side over shorter side; what lies beyond is far outside every centre crop


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, centre crop, scale and normalise: uint8 (h, w, 3) to float32 (3, s, s)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    size: int = 256  # pixels: the shorter side after resizing, or both sides without keep_aspect
    keep_aspect: bool = True  # False: the image is squeezed into a square
    crop: int | None = 224  # pixels, side of the centre crop; None (without keep_aspect alone): no crop
    resample: str = "bicubic"  # or "bilinear", "lanczos", "box", "nearest"
    scale: float = 1 / 255  # times the uint8 value, before mean and std
    mean: tuple[float, float, float] = IMAGENET_MEAN  # RGB
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1 or (self.crop is not None and not 1 <= self.crop <= self.size):
            raise ValueError(f"preprocess.crop must be in [1, size]: got crop {self.crop}, size {self.size}")
        if self.crop is None and self.keep_aspect:
            raise ValueError("preprocess.crop must be given with keep_aspect: got null, images would differ in shape")
        if self.resample not in _RESAMPLE:
            raise ValueError(f"preprocess.resample must be one of {sorted(_RESAMPLE)}: got {self.resample!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(f"preprocess.mean and std must be 3 numbers, std above 0: got {self.mean}, {self.std}")

    @property
    def side(self) -> int:
        """Height and width of the output, pixels."""
        return self.size if self.crop is None else self.crop

    @property
    def least_side(self) -> int | None:
        """What the shorter side of an image is resized to, for ``decode_reduced``; None: only whole images will do."""
        return None if self.resample in _WITH_EDGES else self.size

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """What each of the 256 bytes becomes in each channel, float32 (3, 256): a look-up instead of arithmetic."""
        return _normalised(self.scale, tuple(self.mean), tuple(self.std))

    def __call__(self, image: npt.NDArray[np.uint8] | Reduced) -> npt.NDArray[np.float32]:
        """Float32 (3, side, side) of a uint8 RGB image (h, w, 3). Raises ValueError for another array.

        Of a ``Reduced`` image only what the crop shows is resized: equal within rounding. An array that is longer than
        32 times its width loses its ends first. So memory stays O(input + size ** 2).
        """
        pixels = self.cropped(image)
        out = np.empty((3, self.side, self.side), np.float32)
        for channel, values in enumerate(self.values):
            np.take(values, pixels[:, :, channel], out=out[channel], mode="clip")  # a byte is always in range
        return out

    def cropped(self, image: npt.NDArray[np.uint8] | Reduced) -> npt.NDArray[np.uint8]:
        """Resized and cropped, uint8 (side, side, 3): what is then normalised."""
        if isinstance(image, Reduced) and self.resample in _WITH_EDGES:
            image = image.pixels  # decoded whole, since there is no ``least_side``
        if isinstance(image, Reduced):
            size = self._resized_size((image.height, image.width))
            left, top = self._corner(*size)
            box = (left, top, left + self.side, top + self.side)
            return image.resized(size, box, _RESAMPLE[self.resample])
        check_rgb8(image)
        if self.keep_aspect:
            image = _without_far_ends(image)
        resized = Image.fromarray(image).resize(self._resized_size(image.shape), _RESAMPLE[self.resample])
        left, top = self._corner(resized.width, resized.height)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))

    def _corner(self, width: int, height: int) -> tuple[int, int]:
        return (width - self.side) // 2, (height - self.side) // 2

    def _resized_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Pillow's (width, height) after resizing."""
        height, width = shape[:2]
        if not self.keep_aspect:
            return self.size, self.size
        if width <= height:
            return self.size, int(self.size * height / width)
        return int(self.size * width / height), self.size


@cache
def _normalised(
    scale: float, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    scaled = (np.arange(256) * scale).astype(np.float32)
    table: npt.NDArray[np.float32] = (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    return table


def check_rgb8(image: npt.NDArray[Any]) -> None:
    """Raise ValueError unless ``image`` is uint8 (h, w, 3) with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be uint8 (h, w, 3): got {image.dtype} {image.shape}")


def _without_far_ends(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = image.shape[:2]
    longest = _MAX_STRIP * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return np.ascontiguousarray(image[top : top + longest, left : left + longest])


def read_hf_preprocess(folder: str | Path) -> Preprocess:
    """The preprocessing in ``preprocessor_config.json`` of a Hugging Face folder.

    Resizing comes before scaling and works on bytes, as in transformers without torchvision. Raises
    ValueError when the file or a key is absent: a guessed mean or size would give other vectors unnoticed.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(
            f"a Hugging Face backbone must come with its preprocessing: no {path.name} in {folder}; "
            f"write one with size, crop_size, image_mean, image_std and resample"
        )
    try:
        return _hf_preprocess(json.loads(path.read_text("utf-8")), path)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise ValueError(f"{path} must be a JSON object as transformers writes it: {e}") from e


def _hf_preprocess(config: dict[str, Any], path: Path) -> Preprocess:
    if config.get("do_resize") is False:
        raise ValueError(f"{path}: do_resize must be true: got false, images would differ in shape")
    crop = None
    if config.get("do_center_crop", config.get("crop_size") is not None):
        crop = _square(_value(config, "crop_size", path), "crop_size", path)
    size, keep_aspect = _resize_rule(_value(config, "size", path), crop, path)
    normalize = config.get("do_normalize") is not False
    return Preprocess(
        size=size,
        keep_aspect=keep_aspect,
        crop=crop,
        resample=_resample_name(_value(config, "resample", path), path),
        scale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale") is not False else 1.0,
        mean=tuple(_value(config, "image_mean", path)) if normalize else (0.0, 0.0, 0.0),
        std=tuple(_value(config, "image_std", path)) if normalize else (1.0, 1.0, 1.0),
    )


def write_hf_preprocess(folder: str | Path, preprocess: Preprocess) -> None:
    """Write ``preprocessor_config.json``, from which ``read_hf_preprocess`` and transformers read the same."""
    size, crop = preprocess.size, preprocess.crop
    config = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if preprocess.keep_aspect else {"height": size, "width": size},
        "resample": int(_RESAMPLE[preprocess.resample]),
        "do_center_crop": crop is not None,
        "crop_size": None if crop is None else {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": preprocess.scale,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    aside = Path(folder) / ".aside"
    aside.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    aside.replace(Path(folder) / "preprocessor_config.json")


def _value(config: dict[str, Any], key: str, path: Path) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{path} must give {key}: it is absent")
    return config[key]


def _resize_rule(size: Any, crop: int | None, path: Path) -> tuple[int, bool]:
    """(pixels, keep_aspect). A bare number is the shorter side when a crop follows, else both sides."""
    if isinstance(size, int):
        return size, crop is not None
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"]), True
    return _square(size, "size", path), False


def _square(size: Any, key: str, path: Path) -> int:
    if isinstance(size, int):
        return size
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"{path}: {key} must be a square or, for size, shortest_edge: got {size}")
    return int(size["height"])


def _resample_name(code: int, path: Path) -> str:
    for name, member in _RESAMPLE.items():
        if member == code:
            return name
    raise ValueError(f"{path}: resample must be one of {sorted(map(int, _RESAMPLE.values()))}: got {code}")


def pixel_descriptor(image: npt.NDArray[np.uint8] | Reduced) -> npt.NDArray[np.float32]:
    """The image as 16 x 16 RGB averages without their mean: a float32 unit vector (768,), row-major RGB.

    A crude descriptor of layout and colour: enough to find near copies, and for tests. When all
    768 values are equal (a gray image of one tone) there is no direction: it is the first axis by rule, so that such
    images are copies of one another. image: uint8 (h, w, 3), any size. Raises ValueError for another array.
    """
    if isinstance(image, Reduced):
        tiny = image.resized((16, 16), (0, 0, 16, 16), Image.Resampling.BOX)
    else:
        check_rgb8(image)
        tiny = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX))
    small = tiny.ravel().astype(np.float64)
    small -= small.mean()
    norm = float(np.linalg.norm(small))
    if norm < 1e-6:
        norm = small[0] = 1.0
    return (small / norm).astype(np.float32)


def decode_prepared(
    data: bytes,
    prepare: Callable[[npt.NDArray[np.uint8] | Reduced], npt.NDArray[Any]],
    decode: Callable[[bytes], npt.NDArray[np.uint8] | Reduced | BadImage],
) -> npt.NDArray[Any] | BadImage:
    """``prepare`` of the picture that ``decode`` makes of a file; a bad image as it is.

    A function of a module without torch, so that a process that decodes is small.
    """
    picture = decode(data)
    return picture if isinstance(picture, BadImage) else prepare(picture)
