"""What pixels say of a picture by themselves: how much is in it, how sharp and bright it is, what it looks like.

The measures are functions of one grey picture, uint8 (h, w), see ``to_grey``. Sums are of whole numbers, so their bits
are the same on every machine; Pillow's conversion and resampling, whole numbers too, could change with its version.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedding.decode import BadImage, check_size, inspect_image, inspect_pixels
from embedding.preprocess import check_rgb8

Grey = npt.NDArray[np.uint8]

BLUR_SIDE = 256  # pixels: a picture whose shorter side is longer is shrunk to this before its sharpness is told
PHASH_SIDE = 32  # pixels of the square that is transformed
PHASH_TERMS = 8  # frequencies kept in each direction: 8 x 8 bits


def scan_image(
    data: bytes, max_pixels: int, min_side: int, max_aspect_ratio: float, names: Sequence[str] = ()
) -> dict[str, Any] | BadImage:
    """What a pool notes of a file: ``format``, ``width`` and ``height`` (pixels, upright), and the measures ``names``.

    The file is decoded once, to its last pixel. One that does not decode, or is of a size that is not wanted (see
    ``check_size``), is a BadImage and is not measured. Memory as ``decode_rgb`` and ``measure``.
    """
    inspected = inspect_pixels(data, max_pixels) if names else inspect_image(data, max_pixels)
    if isinstance(inspected, BadImage):
        return inspected
    facts, pixels = inspected if isinstance(inspected, tuple) else (inspected, None)
    wrong = check_size(facts, min_side, max_aspect_ratio)
    if wrong is not None:
        return wrong
    return vars(facts) | (measure(pixels, names) if pixels is not None else {})


def measure(pixels: npt.NDArray[np.uint8], names: Sequence[str]) -> dict[str, float | str]:
    """The measures of one picture, uint8 (h, w, 3) RGB, upright, by name: those of ``MEASURE`` that are asked for.

    Memory: 2 bytes a pixel beside the picture. Nothing is done when nothing is asked for. Raises ValueError for other
    pixels.
    """
    if not names:
        return {}
    check_rgb8(pixels)
    grey = to_grey(pixels)
    return {name: MEASURE[name](grey) for name in names}


def to_grey(pixels: npt.NDArray[np.uint8]) -> Grey:
    """Luma of ITU-R 601-2, uint8 (h, w): .299 R + .587 G + .114 B, as Pillow's mode L rounds it."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def entropy(grey: Grey) -> float:
    """Bits, 0..8: -sum of p log2 p over the shares p of the 256 levels. Low: a flat picture, such as a placeholder."""
    counts = [n for n in Image.fromarray(grey).histogram() if n]
    return max(0.0, math.fsum(-n / grey.size * math.log2(n / grey.size) for n in counts))  # one level: not -0.0


def brightness(grey: Grey) -> float:
    """Mean luma, 0 (black) .. 255 (white)."""
    return sum(level * n for level, n in enumerate(Image.fromarray(grey).histogram())) / grey.size


def blur(grey: Grey) -> float:
    """Variance of the Laplacian: low means blurred. About 100 is a usual border, flat pictures have 0.

    The Laplacian is up + down + left + right - 4 x centre, mirrored at the border as ``cv2.Laplacian`` does it; the
    variance is that of all its pixels. A picture whose shorter side is above ``BLUR_SIDE`` is shrunk to it first,
    by Pillow's Lanczos filter, which keeps edges: so one threshold fits all sizes, and sharpness is told at about the
    size at which a picture is trained on. Smaller pictures are taken as they are.
    """
    short = min(grey.shape)
    if short > BLUR_SIDE:
        height, width = ((n * BLUR_SIDE + short // 2) // short for n in grey.shape)
        grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.LANCZOS))
    x = np.pad(grey.astype(np.int16), 1, mode="reflect")
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]  # within +-1020
    total = int(laplacian.sum(dtype=np.int64))
    squares = int(np.square(laplacian, dtype=np.int32).sum(dtype=np.int64))
    n = laplacian.size
    return (n * squares - total * total) / n**2


def phash(grey: Grey) -> str:
    """The 64-bit DCT hash (pHash, as ``imagehash.phash`` reckons it), 16 hex digits: alike pictures differ in few bits.

    The picture is resized to 32 x 32 (Lanczos), transformed by a DCT-II in both directions, and of its 8 x 8 lowest
    frequencies each gives a bit: 1 if it is above the median of the 64. Bits stand row by row, the lowest vertical
    frequency first, within a row the lowest horizontal one, the first bit the highest of the first digit. The cosines
    are whole numbers of 1 / 2^20, so equal terms tie in the same way everywhere.
    Re-encoding, rescaling, brightness and contrast change few bits, usually up to 8; unrelated pictures differ in about
    32. The hash is of the upright picture (EXIF orientation applied): a turned, mirrored or cropped copy has another.
    """
    small = Image.fromarray(grey).resize((PHASH_SIDE, PHASH_SIDE), Image.Resampling.LANCZOS)
    low = (_COSINES @ np.asarray(small).astype(np.int64) @ _COSINES.T).ravel()
    middle = np.sort(low)[low.size // 2 - 1 : low.size // 2 + 1].sum()
    return np.packbits(2 * low > middle).tobytes().hex()


def _cosines() -> npt.NDArray[np.int64]:
    """(PHASH_TERMS, PHASH_SIDE): cos(pi k (2 i + 1) / 64) in units of 2^-20; sums over a picture stay below 2^58."""
    k, i = np.arange(PHASH_TERMS)[:, None], np.arange(PHASH_SIDE)
    angles = np.pi * k * (2 * i + 1) / (2 * PHASH_SIDE)
    cosines: npt.NDArray[np.int64] = np.rint(np.cos(angles) * (1 << 20)).astype(np.int64)
    return cosines


_COSINES = _cosines()
MEASURE: dict[str, Callable[[Grey], float | str]] = {
    "entropy": entropy,
    "blur": blur,
    "brightness": brightness,
    "phash": phash,
}
