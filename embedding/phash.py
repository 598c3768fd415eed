"""The ``phash`` descriptor: 256 bits that say where a picture is light and dark, coarsely. It needs no network.

The hash follows PDQ, as Meta published it (https://github.com/facebook/ThreatExchange, hashing/hashing.pdf): luma,
a tent filter down to 64 x 64, the 16 x 16 lowest frequencies of a DCT without row and column 0, and a bit for each:
whether it is above their median. Two things differ, and so the bits of a photograph differ from PDQ's in 9 of 256 on
average:

- The tent is centred on its pixel, at every size. PDQ lays two boxes of a whole number of pixels over one another,
  which shifts a picture by up to an eighth of a pixel of the 64, and that hangs on its size: a copy at half the size
  then differs in 16 bits on average, here in 2.
- A picture without detail (``LEAST_SPREAD``) has 256 bits that are near no others; PDQ gives it any bits, or none.

A vector has +-1 / 16 for each bit, exact in float16. So the cosine of two is 1 - distance / 128, the distance being the
number of bits that differ, and distances up to r are a ``min_similarity`` of 1 - r / 128: 0.7578125 for PDQ's usual 31.
Unrelated pictures differ in 128 bits, give or take 8.

All bits are the same on every machine with one version of Pillow, which resizes in whole numbers; so are the sums of
the DCT.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedding.fast_decode import Reduced
from embedding.preprocess import check_rgb8

POINTS_SIDE = 64  # pixels of the square that is transformed
TERMS = 16  # frequencies in each direction, of 1 to 16 half waves
PHASH_WIDTH = TERMS * TERMS
PHASH_LEAST_SIDE = 2 * POINTS_SIDE  # as ``least_side``: of pictures decoded at 1/2 to 1/8 one bit changes on average
# Grey levels: half of the coefficients are at least so far from the median, or the picture has no detail. Rounding to
# bytes shifts a coefficient by .3 on average, which at a spread of 1 changes 16 bits. CIFAR-10 and 400 pictures of
# ImageNet have 2 and more, without exception.
LEAST_SPREAD = 1

_UNIT = 1 << 16  # of the cosines: sums over a picture stay below 2^52, whole numbers that float64 holds
_SCALE = POINTS_SIDE / 2 * _UNIT**2  # of a coefficient, against the orthonormal transform
_LOWER_MIDDLE = PHASH_WIDTH // 2 - 1  # of the sorted coefficients: 128 lie above it, unless some are equal


def phash_input(image: npt.NDArray[np.uint8] | Reduced) -> npt.NDArray[np.uint8]:
    """The luma of a picture, averaged under a tent, at 64 x 64 points: uint8 (64, 64). What ``phash_vectors`` takes.

    The points are the centres of a grid of 64 x 64 cells, a tent is as wide as a cell. image: uint8 RGB (h, w, 3), any
    size. Raises ValueError for another array. Memory: a byte a pixel.
    """
    if isinstance(image, Reduced):
        pixels, (left, top, right, bottom) = image.pixels, image.region
    else:
        check_rgb8(image)
        pixels, (left, top, right, bottom) = image, (0, 0, image.shape[1], image.shape[0])
    # Pillow's bilinear filter is a tent two steps wide: steps of half a cell, from the first centre on, every other one
    x, y = (right - left) / (4 * POINTS_SIDE), (bottom - top) / (4 * POINTS_SIDE)
    grey = Image.fromarray(pixels).convert("L")
    points = grey.resize(
        (2 * POINTS_SIDE - 1, 2 * POINTS_SIDE - 1),
        Image.Resampling.BILINEAR,
        box=(left + x, top + y, right - x, bottom - y),
    )
    return np.ascontiguousarray(np.asarray(points)[::2, ::2])


def phash_vectors(inputs: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32 (n, 256) unit rows of +-1 / 16, of pictures (n, 64, 64) as ``phash_input`` makes them; n may be 0."""
    return np.where(phash_bits(inputs), np.float32(1 / TERMS), np.float32(-1 / TERMS))


def phash_bits(inputs: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """bool (n, 256): the hash of each picture (n, 64, 64); the lowest frequency first, row by row.

    Of a picture without detail the SHA-256 of its points: it is a copy of those that are equal to it, and of no others.
    That is a picture of one tone, but also one of stripes or of a smooth sky, all of whose coefficients are noise.
    Memory: 40 kB a picture.
    """
    low = (_COSINES @ inputs.astype(np.float64) @ _COSINES.T).reshape(-1, PHASH_WIDTH)
    middle = _median(low)
    bits: npt.NDArray[np.bool_] = low > middle
    plain = np.flatnonzero(_median(np.abs(low - middle))[:, 0] < LEAST_SPREAD * _SCALE)
    for i in plain:
        digest = hashlib.sha256(np.ascontiguousarray(inputs[i]).tobytes()).digest()
        bits[i] = np.unpackbits(np.frombuffer(digest, np.uint8))
    return bits


def _median(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n, 1): the lower median of each row of x (n, 256)."""
    return np.partition(x, _LOWER_MIDDLE, axis=1)[:, _LOWER_MIDDLE, None]


def _cosines() -> npt.NDArray[np.float64]:
    """(TERMS, POINTS_SIDE): cos(pi k (2 i + 1) / 128) of k half waves, in whole units of 2^-16."""
    k, i = np.arange(1, TERMS + 1)[:, None], np.arange(POINTS_SIDE)
    cosines: npt.NDArray[np.float64] = np.rint(np.cos(np.pi * k * (2 * i + 1) / (2 * POINTS_SIDE)) * _UNIT)
    return cosines


_COSINES = _cosines()
