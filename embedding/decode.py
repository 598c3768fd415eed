"""Image files to pixels. A bad file is a value, not an exception.

Formats are told by their first bytes and are a fixed list: those whose decoders are plain libraries. (Pillow
would hand an EPS to Ghostscript, which runs it, and shows a cut JPEG 2000 half gray.) Colour profiles are not applied.
What a few bytes claim is not believed: a picture that they cannot hold, or a JPEG of more scans than anybody makes,
is refused before it is decoded.
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
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from embedding.fast_decode import Reduced, at_centres, covered, shrink

T = TypeVar("T")
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
# More pixels than a byte of the file can hold. PNG: deflate packs 1032 bytes into one, a pixel has at least a bit.
# JPEG: a block of 8 x 8 has at least a bit.
_PIXELS_A_BYTE = {"PNG": 8 * 1032, "JPEG": 8 * 64}
_MAX_SCANS = 500  # of a JPEG: each is a pass over the whole picture; encoders write some ten
_SIDEWAYS = (5, 6, 7, 8)  # orientations of EXIF in which rows and columns change places
_PLAIN_MODES = ("RGB", "L")  # of Pillow, in which pixels are as ``to_rgb8`` gives them or copies of that
_PNG_NEEDED = (b"tRNS", b"eXIf")  # chunks that change the picture though a decoder may leave them out


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

    16-bit and float pixels are scaled to 8 bits (see ``to_rgb8``), transparency is laid on white, so is what a GIF's
    first frame leaves open. A file cut off before the end of that frame is undecodable. The size is checked in the
    header: an image above ``max_pixels`` costs no memory, one below about 10 bytes a pixel, 20 with transparency or
    deep pixels.
    """
    decoded = _decode(data, max_pixels, _picture)
    return decoded if isinstance(decoded, BadImage) else decoded.pixels


def decode_reduced(data: bytes, least_side: int | None, max_pixels: int = MAX_PIXELS) -> Reduced | BadImage:
    """As ``decode_rgb``; a JPEG so large that it is to be shrunk anyway is decoded at 1/2, 1/4 or 1/8.

    least_side: pixels that the shorter side is to be resized to. None: never at less than its size. The same files are
    bad, for the same reasons.
    """
    return _decode(data, max_pixels, _picture, least_side)


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFacts | BadImage:
    """Format and upright size of an image that ``decode_rgb`` decodes to its last pixel. Memory as there, or less."""
    return _decode(data, max_pixels, _facts)


def inspect_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[ImageFacts, npt.NDArray[np.uint8]] | BadImage:
    """As ``inspect_image``, with the picture that ``decode_rgb`` gives."""
    return _decode(data, max_pixels, _facts_and_pixels)


def inspect_header(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFacts | BadImage:
    """Format and upright size as the header says, which is at the start of ``data``; no pixel is decoded.

    Of most files the first 16 KiB are enough. What it finds good may still be undecodable.
    """
    try:
        with QUIET_PILLOW, _open(data) as image:
            if image.width * image.height > max_pixels:
                return BadImage("too_large", f"{image.width}x{image.height} > {max_pixels} pixels")
            name = "jpeg" if image.format == "MPO" else str(image.format).lower()
            turned = "exif" in image.info and _orientation(image) in _SIDEWAYS
            width, height = image.size[::-1] if turned else image.size
            return ImageFacts(name, width, height)
    except Image.DecompressionBombError as e:  # Pillow's own limit, from the header too
        return BadImage("too_large", str(e))
    except _DECODER_ERRORS as e:
        bare = _needed_chunks(data) if data.startswith(b"\x89PNG") else data
        if len(bare) < len(data):  # as ``_decode``
            return inspect_header(bare, max_pixels)
        words = f"{type(e).__name__}: {e}".encode("ascii", "backslashreplace").decode()
        return BadImage("undecodable", words[:_DETAIL_CHARS])


def check_size(facts: ImageFacts, min_side: int, max_aspect_ratio: float) -> BadImage | None:
    """What is wrong with the size, if anything: the shorter side (pixels) first, then longer / shorter."""
    short, long = sorted((facts.width, facts.height))
    if short < min_side:
        return BadImage("too_small", f"{facts.width}x{facts.height}: a side is below {min_side} pixels")
    if long > max_aspect_ratio * short:
        return BadImage("aspect_ratio", f"{facts.width}x{facts.height}: above {max_aspect_ratio:g} to 1")
    return None


class _Loaded(NamedTuple):
    """An image that is decoded, still with Pillow."""

    image: ImageFile.ImageFile
    name: str  # of its format
    size: tuple[int, int]  # (width, height) as stored, before scaling
    scale: int  # decoded at 1 / this
    turn: int  # orientation of EXIF
    frame: tuple[int, ...] | None  # of a GIF: the box that its first frame paints


def _decode(
    data: bytes, max_pixels: int, take: Callable[[_Loaded], T | BadImage], least_side: int | None = None
) -> T | BadImage:
    """What ``take`` makes of the decoded image; what it raises is a bad image too."""
    decoded = _decode_as_is(data, max_pixels, take, least_side)
    if isinstance(decoded, BadImage) and data.startswith(b"\x89PNG") and decoded.reason == "undecodable":
        # Pillow refuses a picture for what stands beside it: a text bomb, a colour profile, a checksum of a comment.
        bare = _needed_chunks(data)
        again = _decode_as_is(bare, max_pixels, take, None) if len(bare) < len(data) else decoded
        return decoded if isinstance(again, BadImage) else again
    return decoded


def _decode_as_is(
    data: bytes, max_pixels: int, take: Callable[[_Loaded], T | BadImage], least_side: int | None
) -> T | BadImage:
    try:
        with QUIET_PILLOW, _open(data) as image:
            if image.width * image.height > max_pixels:  # from the header, before decoding
                return BadImage("too_large", f"{image.width}x{image.height} > {max_pixels} pixels")
            name = "jpeg" if image.format == "MPO" else str(image.format).lower()  # MPO: several JPEGs in one file
            _check_claims(data, name.upper(), image.width, image.height)
            frame = image.tile[0][1] if name == "gif" and image.tile else None
            size, scale = image.size, shrink(image, least_side)
            image.load()
            return take(_Loaded(image, name, size, scale, _orientation(image), frame))
    except Image.DecompressionBombError as e:  # Pillow's own limit, from the header too
        return BadImage("too_large", str(e))
    except _DECODER_ERRORS as e:
        words = f"{type(e).__name__}: {e}".encode("ascii", "backslashreplace").decode()
        return BadImage("undecodable", words[:_DETAIL_CHARS])


def _picture(loaded: _Loaded) -> Reduced | BadImage:
    image, _, size, scale, turn, frame = loaded
    pixels = _upright(at_centres(_on_white(to_rgb8(image), frame), scale), turn)
    if not pixels.size:
        return BadImage("undecodable", f"no pixels: {pixels.shape}")
    if scale == 1:
        height, width = pixels.shape[:2]
        return Reduced(pixels, width, height, (0, 0, width, height))
    width, height = size[::-1] if turn in _SIDEWAYS else size
    return Reduced(pixels, width, height, covered(pixels.shape, size, scale, turn))


def _facts_and_pixels(loaded: _Loaded) -> tuple[ImageFacts, npt.NDArray[np.uint8]] | BadImage:
    picture = _picture(loaded)
    if isinstance(picture, BadImage):
        return picture
    return ImageFacts(loaded.name, width=picture.width, height=picture.height), picture.pixels


def _facts(loaded: _Loaded) -> ImageFacts | BadImage:
    """The facts of an image that is decoded in full. Pixels are made where that may fail."""
    image = loaded.image
    if image.mode not in _PLAIN_MODES or "transparency" in image.info or not all(image.size):
        made = _facts_and_pixels(loaded)
        return made if isinstance(made, BadImage) else made[0]
    width, height = image.size[::-1] if loaded.turn in _SIDEWAYS else image.size
    return ImageFacts(loaded.name, width, height)


def _check_claims(data: bytes, kind: str, width: int, height: int) -> None:
    """Raise OSError when the bytes cannot be the whole picture that their header tells of."""
    if width * height > _PIXELS_A_BYTE.get(kind, width * height) * len(data):
        raise OSError(f"{len(data)} bytes cannot hold {width}x{height} pixels")
    if kind == "JPEG":
        first = _first_scan(data)
        end = data.find(b"\xff\xd9", first)
        if end < 0:  # Pillow lets some pass, and takes zeros or a web page after the cut for pixels
            raise OSError("image file is truncated (no end mark)")
        if (n_scans := data.count(b"\xff\xda", first, end)) > _MAX_SCANS:
            raise OSError(f"{n_scans} scans, more than {_MAX_SCANS}")


def _first_scan(data: bytes) -> int:
    """Where the first scan of a JPEG begins, behind the segments of its header and what is in them; else the end."""
    at = data.find(b"\xff", 2)
    while 0 <= at < len(data) - 3:
        marker = data[at + 1]
        if marker == 0xDA:
            return at
        if marker not in (0x00, 0x01, 0xFF) and not 0xD0 <= marker <= 0xD8:  # these have no length
            at += int.from_bytes(data[at + 2 : at + 4])
        at = data.find(b"\xff", at + (1 if marker == 0xFF else 2))
    return len(data)


def _needed_chunks(data: bytes) -> bytes:
    """A PNG without the chunks that a decoder may leave out, save those that change the picture."""
    kept, at = [data[:8]], 8
    while at < len(data):
        kind = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if not kind[:1].islower() or kind in _PNG_NEEDED:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _open(data: bytes) -> ImageFile.ImageFile:
    """The image with its header read. Not ``Image.open``: its limit and warning depend on a global variable."""
    for accept, factory in _readers():
        if accept(data[:16]) is True:
            image: ImageFile.ImageFile = factory(io.BytesIO(data), "")
            return image
    raise OSError(f"no known image format starts with {data[:12]!r}" if data else "empty file")


@cache
def _readers() -> tuple[tuple[Callable[[bytes], Any], Callable[..., ImageFile.ImageFile]], ...]:
    Image.init()
    found = (Image.OPEN[name] for name in _FORMATS if name in Image.OPEN)
    return tuple((accept, factory) for factory, accept in found if accept is not None)


def to_rgb8(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A loaded Pillow image as uint8 (h, w, 3), whatever its mode.

    Gray integers of 16 bits are divided by 257. Wider ones too if they fit 16 bits; floats are scaled from the first
    of [0, 1], [0, 255], [0, 65535] that holds them. Other ranges are stretched from their minimum to
    their maximum, what is not finite becomes 0. Of 16 bits a colour Pillow keeps the upper 8.
    """
    if image.mode.startswith("I") or image.mode == "F":
        deep = np.asarray(image)
        gray = _to_8bit(_as_stored(deep, image))
        if isinstance(key := image.info.get("transparency"), int):
            gray[deep == key] = 255
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = _with_8bit_transparency(image).convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _as_stored(x: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[Any]:
    """Gray numbers as a TIFF means them: Pillow does not look at how many of 16 bits are used, which end is white,
    or whether 32 bits have a sign."""
    tags = getattr(image, "tag_v2", {})
    bits, sign = (_first(tags.get(number, default)) for number, default in ((258, 16), (339, 1)))
    if image.mode == "I" and (bits, sign) == (32, 1):
        return x.view(np.uint32)
    if not image.mode.startswith("I;16") or sign != 1:
        return x
    top = 4095 if bits == 12 else 65535
    if tags.get(262) == 0:
        x = np.minimum(x, top) ^ np.uint16(top)  # 0 is white
    return x if top == 65535 else (x.astype(np.uint32) * 65535 // top).astype(np.uint16)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _on_white(x: npt.NDArray[np.uint8], frame: tuple[int, ...] | None) -> npt.NDArray[np.uint8]:
    """White outside the frame (left, top, right, bottom): nothing is painted there."""
    if frame is None or (frame[2] - frame[0], frame[3] - frame[1]) == x.shape[1::-1]:
        return x
    inside = np.s_[frame[1] : frame[3], frame[0] : frame[2]]
    white = np.full_like(x, 255)
    white[inside] = x[inside]
    return white


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
    if orientation in _SIDEWAYS:
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


QUIET_PILLOW = _QuietPillow()  # entered once for many images it costs each of them less
