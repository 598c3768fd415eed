"""Image files to pixels. A bad file is a value, not an exception.

Formats are told by their first bytes and are a fixed list: those whose decoders are plain libraries. (Pillow
would hand an EPS to Ghostscript, which runs it, and shows a cut JPEG 2000 half gray.) Colour profiles are not applied.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MAX_PIXELS = 178_956_970  # a twelfth of 2 ** 31: half a gibibyte of RGB

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # names in Pillow
# What Pillow's readers are known to raise on damaged files, besides the OSError and SyntaxError they mean to.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    AssertionError,
    struct.error,
    zlib.error,
)
_DETAIL_CHARS = 200


@dataclass(frozen=True)
class BadImage:
    """Why an image cannot be used."""

    reason: str  # "undecodable", "too_large", "too_small" or "aspect_ratio": few words, to be counted
    detail: str  # what was found; the same for the same bytes


@dataclass(frozen=True)
class ImageFacts:
    """What the bytes of a whole, decodable image say."""

    format: str  # "jpeg", "png", "webp", "gif", "bmp", "tiff", "avif" or "ppm"
    width: int  # pixels, upright
    height: int


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8] | BadImage:
    """Decode one image to uint8 (h, w, 3) RGB, upright by its EXIF orientation; the first frame of several.

    16-bit and float pixels are scaled to 8 bits (see ``to_rgb8``), transparency is laid on white. A file cut off
    before the end of that frame is undecodable. The size is checked in the header: an image above ``max_pixels`` costs
    no memory, one below about 10 bytes a pixel, 20 with transparency or deep pixels.
    """
    decoded = _decode(data, max_pixels)
    return decoded if isinstance(decoded, BadImage) else decoded[1]


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFacts | BadImage:
    """Format and upright size of an image that decodes to its last pixel. Memory as ``decode_rgb``."""
    decoded = _decode(data, max_pixels)
    if isinstance(decoded, BadImage):
        return decoded
    name, pixels = decoded
    return ImageFacts(name, width=pixels.shape[1], height=pixels.shape[0])


def check_size(facts: ImageFacts, min_side: int, max_aspect_ratio: float) -> BadImage | None:
    """What is wrong with the size, if anything: the shorter side (pixels) first, then longer / shorter."""
    short, long = sorted((facts.width, facts.height))
    if short < min_side:
        return BadImage("too_small", f"{facts.width}x{facts.height}: a side is below {min_side} pixels")
    if long > max_aspect_ratio * short:
        return BadImage("aspect_ratio", f"{facts.width}x{facts.height}: above {max_aspect_ratio:g} to 1")
    return None


def _decode(data: bytes, max_pixels: int) -> tuple[str, npt.NDArray[np.uint8]] | BadImage:
    try:
        with _QUIET_PILLOW, _open(data) as image:
            if image.width * image.height > max_pixels:  # from the header, before decoding
                return BadImage("too_large", f"{image.width}x{image.height} > {max_pixels} pixels")
            name = "jpeg" if image.format == "MPO" else str(image.format).lower()  # MPO: several JPEGs in one file
            image.load()
            pixels = _upright(to_rgb8(image), _orientation(image))
    except Image.DecompressionBombError as e:  # Pillow's own limit, from the header too
        return BadImage("too_large", str(e))
    except _DECODER_ERRORS as e:
        words = f"{type(e).__name__}: {e}".encode("ascii", "backslashreplace").decode()
        return BadImage("undecodable", words[:_DETAIL_CHARS])
    return (name, pixels) if pixels.size else BadImage("undecodable", f"no pixels: {pixels.shape}")


def _open(data: bytes) -> Image.Image:
    """The image with its header read. Not ``Image.open``: its limit and warning depend on a global variable."""
    for accept, factory in _readers():
        if accept(data[:16]) is True:
            image: Image.Image = factory(io.BytesIO(data), "")
            return image
    raise OSError(f"no known image format starts with {data[:12]!r}" if data else "empty file")


@cache
def _readers() -> tuple[tuple[Callable[[bytes], Any], Callable[..., Image.Image]], ...]:
    Image.init()
    found = (Image.OPEN[name] for name in _FORMATS if name in Image.OPEN)
    return tuple((accept, factory) for factory, accept in found if accept is not None)


def to_rgb8(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A loaded Pillow image as uint8 (h, w, 3), whatever its mode.

    Integers of 16 bits are divided by 257. Wider ones too if they fit 16 bits; floats are scaled from the first
    of [0, 1], [0, 255], [0, 65535] that holds them. Other ranges are stretched from their minimum to
    their maximum, what is not finite becomes 0.
    """
    if image.mode.startswith("I") or image.mode == "F":
        deep = np.asarray(image)
        gray = _to_8bit(deep)
        if isinstance(key := image.info.get("transparency"), int):
            gray[deep == key] = 255
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = _with_8bit_transparency(image).convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8bit(x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = x.astype(np.float32 if x.dtype.itemsize <= 2 else np.float64)
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    tops = (1.0, 255.0, 65535.0) if x.dtype.kind == "f" else (65535.0,)
    top = next((t for t in tops if low >= 0 and high <= t), None)
    if top is None:
        values, top = values - low, high - low
    scaled: npt.NDArray[np.uint8] = np.floor(values * (255 / top if top else 0) + 0.5).astype(np.uint8)
    return scaled


def _with_8bit_transparency(image: Image.Image) -> Image.Image:
    """The colour key of a PNG with 16 bits a channel, in the 8 bits that Pillow keeps of each channel."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(v >> 8 for v in key)
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; an unreadable EXIF block leaves the picture as it is stored."""
    try:
        value = image.getexif().get(0x0112, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _upright(x: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    if orientation in (5, 6, 7, 8):  # rows and columns change places
        x = x.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        x = x[:, ::-1]
    if orientation in (3, 4, 7, 8):
        x = x[::-1]
    return np.ascontiguousarray(x)


class _QuietPillow:
    """Pillow's warnings are silent while a thread decodes; after the last one the filters are as before.

    ``warnings.catch_warnings`` alone would, in threads, put back the filters of another thread.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(kind, error, trace)


_QUIET_PILLOW = _QuietPillow()
