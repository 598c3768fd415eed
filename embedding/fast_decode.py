"""JPEGs larger than needed, decoded smaller: the decoder ``scaled``.

A JPEG is blocks of 8 x 8 frequencies, so a decoder can give it at 1/2, 1/4 or 1/8 without making all its pixels.
What is left is resized as usual, from the very region that the whole picture covers: the last row and column of blocks
may stand for less than a pixel, and without that the picture would be shifted. Only the crop that a network sees is
made. The values differ a little from those of a full decode; ``tests/bench/bench_decode.py`` measures by how much.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageFilter

# How many times the size asked for the shorter side must have at each scale. At 1/2 and 1/4 pictures may be sharp at
# their own pixels, and frequencies cut off in every block need room. 1/8 is a mean of 64 pixels, of camera pictures.
_MARGIN = {8: 1.25, 4: 2.0, 2: 2.0}
_SCALED_MODES = ("RGB", "L")  # as Pillow opens a JPEG; CMYK is rare

# The means of 8 x 8 pixels back to values at their centres: v - v'' / 24, in both directions, is right to fourth order.
_TAPS = np.array([-1, 26, -1]) / 24
_POINTS = ImageFilter.Kernel((3, 3), np.outer(_TAPS, _TAPS).ravel().tolist(), scale=1)


class Reduced(NamedTuple):
    """A picture, perhaps smaller than it is stored, upright."""

    pixels: npt.NDArray[np.uint8]  # (h, w, 3) RGB
    width: int  # of the whole picture, pixels
    height: int
    region: tuple[float, float, float, float]  # left, top, right, bottom of what the picture covers, in ``pixels``

    def resized(
        self, size: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
    ) -> npt.NDArray[np.uint8]:
        """The box (left, top, right, bottom) of the picture resized to ``size`` (width, height): uint8 RGB.

        Equal to resizing all of it and cropping, within rounding.
        """
        left, top, right, bottom = self.region
        x, y = (right - left) / size[0], (bottom - top) / size[1]
        part = (left + box[0] * x, top + box[1] * y, min(right, left + box[2] * x), min(bottom, top + box[3] * y))
        shape = (box[2] - box[0], box[3] - box[1])
        return np.asarray(Image.fromarray(self.pixels).resize(shape, resample, box=part))


def shrink(image: ImageFile.ImageFile, least_side: int | None) -> int:
    """Have an opened image that is not loaded yet decoded at 1/n. Returns n: 1, 2, 4 or 8.

    least_side: pixels that the shorter side is to be resized to; None: n is 1. Other formats than JPEG give 1.
    """
    if least_side is None or image.format not in ("JPEG", "MPO") or image.mode not in _SCALED_MODES:
        return 1
    short = min(image.size)
    scale = next((n for n, margin in _MARGIN.items() if short >= n * margin * least_side), 1)
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))
    return scale


def at_centres(pixels: npt.NDArray[np.uint8], scale: int) -> npt.NDArray[np.uint8]:
    """Pixels (h, w, 3) decoded at 1/``scale`` as samples of the picture: at 1/8 they are means, and sharpened."""
    return np.asarray(Image.fromarray(pixels).filter(_POINTS)) if scale == 8 else pixels


def covered(
    shape: tuple[int, ...], size: tuple[int, int], scale: int, orientation: int
) -> tuple[float, float, float, float]:
    """The region of a picture in its upright pixels of a ``shape`` (h, w, ...).

    size: (width, height) as stored, before scaling; orientation: of EXIF. The pixel that is covered in part is the
    last one as stored.
    """
    height, width = shape[:2]
    wide, high = size[0] / scale, size[1] / scale
    if orientation in (5, 6, 7, 8):  # rows and columns change places
        wide, high = high, wide
    left = width - wide if orientation in (2, 3, 6, 7) else 0.0
    top = height - high if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + wide, top + high
