"""The loops of multi-crop over pixels, compiled by numba: one crop at a time, planes of float32, values 0 to 255.

``training.augment`` imports this module where it makes crops, because importing numba takes a second. Planes are held
turned, (3, x, y): so both passes of a resize run along memory. No sum depends on the width of a vector register.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

_TOP = np.float32(255)
_HALF = np.float32(0.5)
_ZERO, _ONE, _TWO, _FOUR, _SIX = (np.float32(i) for i in (0, 1, 2, 4, 6))
_RED, _GREEN, _BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)  # of gray, ITU-R 601
_TAPS = 4  # rows added at a time


def compiled(loop: F) -> F:
    """As ``curation.loops.compiled``; dividing by zero does not raise, so that loops with a division use vectors."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(loop))
    except RuntimeError:  # a read-only installation: compiling again takes seconds a process
        return cast(F, numba.njit(nogil=True, error_model="numpy")(loop))


@compiled
def _cubic(x: float) -> float:
    """The bicubic kernel of Pillow, a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


@compiled
def bicubic_weights(start: int, stop: int, length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels make each of ``size`` pixels of the part start..stop of a line of ``length``, and their weights.

    Pillow's formula: the kernel is widened when the part shrinks, and reaches beyond the part, not beyond the line.
    Returns the first pixels, int64 (size,), and float32 (size, taps), rows of sum 1; taps a multiple of 4, the last
    may be zeros beyond the line.
    """
    scale = (stop - start) / size
    wide = max(scale, 1.0)
    taps = int(np.ceil(4 * wide)) + 1
    taps += -taps % _TAPS
    first, weights = np.empty(size, np.int64), np.zeros((size, taps), np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        low, high = max(0, int(centre - 2 * wide + 0.5)), min(length, int(centre + 2 * wide + 0.5))
        total = 0.0
        for j in range(low, high):
            total += _cubic((j + 0.5 - centre) / wide)
        for j in range(low, high):
            weights[i, j - low] = _cubic((j + 0.5 - centre) / wide) / total
        first[i] = low
    return first, weights


@compiled
def _add_rows(source: np.ndarray, first: int, weights: np.ndarray, out: np.ndarray) -> None:
    """``out`` becomes the weighted sum of rows of ``source`` from ``first`` on. Rows beyond the last have weight 0."""
    last = len(source) - 1
    for k in range(0, len(weights), _TAPS):
        a, b = source[min(first + k, last)], source[min(first + k + 1, last)]
        c, d = source[min(first + k + 2, last)], source[min(first + k + 3, last)]
        wa, wb, wc, wd = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        if k == 0:
            for j in range(len(out)):
                out[j] = (wa * np.float32(a[j]) + wb * np.float32(b[j])) + (
                    wc * np.float32(c[j]) + wd * np.float32(d[j])
                )
        else:
            for j in range(len(out)):
                out[j] += (wa * np.float32(a[j]) + wb * np.float32(b[j])) + (
                    wc * np.float32(c[j]) + wd * np.float32(d[j])
                )


@compiled
def resized(image: np.ndarray, left: int, top: int, right: int, bottom: int, flip: bool, size: int) -> np.ndarray:
    """A part of an image, uint8 (h, w, 3), as float32 (3, size, size), by x and y."""
    height, width = image.shape[:2]
    first_x, weights_x = bicubic_weights(left, right, width, size)
    first_y, weights_y = bicubic_weights(top, bottom, height, size)
    first = first_x[0]
    n = min(width, first_x[size - 1] + weights_x.shape[1]) - first  # columns needed
    rows = image.reshape(height, width * 3)[:, 3 * first : 3 * (first + n)]
    turned = np.empty((3, n, size), np.float32)
    row = np.empty(3 * n, np.float32)
    for y in range(size):
        _add_rows(rows, first_y[y], weights_y[y], row)
        for x in range(n):
            turned[0, x, y], turned[1, x, y], turned[2, x, y] = row[3 * x], row[3 * x + 1], row[3 * x + 2]
    out = np.empty((3, size, size), np.float32)
    for c in range(3):
        for x in range(size):
            to = out[c, size - 1 - x if flip else x]
            _add_rows(turned[c], first_x[x] - first, weights_x[x], to)
            for y in range(size):
                to[y] = min(max(to[y], _ZERO), _TOP)
    return out


@compiled
def change_brightness(x: np.ndarray, factor: np.float32) -> None:
    """Values (3, n) times ``factor``, in place."""
    for c in range(3):
        for i in range(x.shape[1]):
            x[c, i] = min(x[c, i] * factor, _TOP)


@compiled
def mean_gray(x: np.ndarray, lanes: int) -> np.float32:
    """The mean of the gray of (3, n), n a multiple of ``lanes``: lanes are added apart, then to one another."""
    sums = np.zeros(lanes, np.float32)
    for start in range(0, x.shape[1], lanes):
        r, g, b = x[0, start : start + lanes], x[1, start : start + lanes], x[2, start : start + lanes]
        for i in range(lanes):
            sums[i] += _RED * r[i] + _GREEN * g[i] + _BLUE * b[i]
    total = 0.0
    for i in range(lanes):
        total += sums[i]
    return np.float32(total / x.shape[1])


@compiled
def change_contrast(x: np.ndarray, factor: np.float32, mean: np.float32) -> None:
    """Values (3, n) ``factor`` times as far from ``mean``, in place."""
    for c in range(3):
        for i in range(x.shape[1]):
            x[c, i] = min(max(mean + factor * (x[c, i] - mean), _ZERO), _TOP)


@compiled
def change_saturation(x: np.ndarray, factor: np.float32) -> None:
    """Values (3, n) ``factor`` times as far from the gray of their pixel, in place; 0 gives gray."""
    for i in range(x.shape[1]):
        r, g, b = x[0, i], x[1, i], x[2, i]
        gray = _RED * r + _GREEN * g + _BLUE * b
        x[0, i] = min(max(gray + factor * (r - gray), _ZERO), _TOP)
        x[1, i] = min(max(gray + factor * (g - gray), _ZERO), _TOP)
        x[2, i] = min(max(gray + factor * (b - gray), _ZERO), _TOP)


@compiled
def _part(k: np.float32, value: np.float32, chroma: np.float32) -> np.float32:
    """One channel of a colour whose hue is ``k``, from 0 to 12, counted from where this channel is least by chroma."""
    k = k - _SIX if k >= _SIX else k
    return value - chroma * max(min(k, _FOUR - k, _ONE), _ZERO)


@compiled
def change_hue(x: np.ndarray, turn: np.float32) -> None:
    """The hue of (3, n) turned by ``turn`` of a full circle, in place; value and saturation in HSV stay."""
    for i in range(x.shape[1]):
        r, g, b = x[0, i], x[1, i], x[2, i]
        value = max(r, g, b)
        chroma = value - min(r, g, b)
        per = _ONE / (chroma if chroma > _ZERO else _ONE)
        hue = (g - b) * per if value == r else (_TWO + (b - r) * per if value == g else _FOUR + (r - g) * per)
        hue += _SIX * turn
        hue = hue + _SIX if hue < _ZERO else hue
        hue = hue - _SIX if hue >= _SIX else hue
        x[0, i] = _part(hue + np.float32(5), value, chroma)
        x[1, i] = _part(hue + np.float32(3), value, chroma)
        x[2, i] = _part(hue + np.float32(1), value, chroma)


@compiled
def _mirrored(radius: int, length: int) -> np.ndarray:
    """Places of -radius..length + radius - 1 on a line mirrored at its first and last pixel, which are not repeated."""
    places = np.empty(length + 2 * radius, np.int64)
    around = max(2 * length - 2, 1)
    for i in range(len(places)):
        place = abs(i - radius) % around
        places[i] = min(place, around - place) if length > 1 else 0
    return places


@compiled
def _add_sides(rows: np.ndarray, places: np.ndarray, i: int, weights: np.ndarray, out: np.ndarray) -> None:
    """``out`` becomes the weighted sum of the row at ``places[i]`` and of those on both sides of it."""
    middle, weight = rows[places[i]], weights[0]
    for j in range(len(out)):
        out[j] = weight * middle[j]
    for k in range(1, len(weights)):
        before, after, weight = rows[places[i - k]], rows[places[i + k]], weights[k]
        for j in range(len(out)):
            out[j] += weight * (before[j] + after[j])


@compiled
def blur(x: np.ndarray, weights: np.ndarray) -> None:
    """Planes (3, size, size) blurred in both directions, in place; beyond the border the picture is mirrored.

    weights: float32 (radius + 1,), of the middle and of one side.
    """
    size, radius = x.shape[1], len(weights) - 1
    places = _mirrored(radius, size)
    half, turned = np.empty((size, size), np.float32), np.empty((size, size), np.float32)
    for c in range(3):
        for i in range(size):
            _add_sides(x[c], places, radius + i, weights, half[i])
        _turn(half, turned)
        for i in range(size):
            _add_sides(turned, places, radius + i, weights, half[i])
        _turn(half, x[c])


@compiled
def _turn(x: np.ndarray, out: np.ndarray) -> None:
    """``out`` becomes the transpose of a square."""
    for i in range(len(x)):
        for j in range(len(x)):
            out[j, i] = x[i, j]


@compiled
def to_bytes(x: np.ndarray, threshold: int, out: np.ndarray) -> None:
    """Planes (3, x, y) rounded to uint8 (y, x, 3); values from ``threshold`` on are inverted."""
    size = x.shape[1]
    plane = np.empty((3, size, size), np.uint8)
    for c in range(3):
        for i in range(size):
            to = plane[c, i]
            for j in range(size):
                value = np.uint8(x[c, i, j] + _HALF)
                to[j] = np.uint8(255) - value if value >= threshold else value
    for j in range(size):
        for i in range(size):
            out[j, i, 0], out[j, i, 1], out[j, i, 2] = plane[0, i, j], plane[1, i, j], plane[2, i, j]
