"""Block masks of iBOT: which patches of the student's global crops are hidden. numpy alone.

Legend: ``C`` crops, of which ``n`` are masked, ``P`` = H * W patches of a grid ``H x W``, row-major.
"""

import math

import numpy as np

_TRIES = 10  # rectangles in a row that may not fit before a crop is completed patch by patch
_LEAST_AREA = 4.0  # patches of a rectangle, before rounding, while so many are left to mask
_MOST_SHARE = 0.5  # of the grid, in one rectangle
_ASPECT = 0.3  # height / width is in .3..1/.3, uniform in its logarithm


def mask_rng(seed: int, step: int, group: int = 0) -> np.random.Generator:
    """The generator of the masks of one group of a step's images: a pure function of the key, whoever draws."""
    return np.random.default_rng([seed, step, group, 2])  # four words, the last apart from those of order and crops


def mask_counts(n_crops: int, n_patches: int, probability: float, ratio: tuple[float, float]) -> np.ndarray:
    """Masked patches of each masked crop, ascending, int64 (n,); n = floor(n_crops * probability).

    ``ratio`` is cut at n + 1 even edges e; entry i is floor(n_patches * e[i + 1]). It depends on no draw, so every step
    of a run masks equally many patches. Raises ValueError unless probability is in [0, 1] and 0 <= low <= high < 1.
    """
    low, high = ratio
    if not 0 <= probability <= 1 or not 0 <= low <= high < 1:
        raise ValueError(
            f"masks need a probability in [0, 1] and a ratio 0 <= low <= high < 1: got {probability} and {ratio}"
        )
    slack = 1e-6  # a product that is whole but for its rounding counts as whole
    n = math.floor(n_crops * probability + slack)
    return np.floor(n_patches * np.linspace(low, high, n + 1)[1:] + slack).astype(np.int64)


def block_masks(
    n_crops: int,
    grid_h: int,
    grid_w: int,
    rng: np.random.Generator,
    *,
    probability: float,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> np.ndarray:
    """Masks of a batch of crops, True where a patch is hidden: bool (n_crops, grid_h * grid_w).

    ``mask_counts`` says how many crops are masked and how many patches of each, exactly; which crops they are is drawn.
    A crop is filled with rectangles until none of ten in a row fits into what is left, then with single patches. A
    rectangle is smaller than the grid on both sides, and no crop is hidden wholly. All crops are drawn at once, in
    some 20 to 60 rounds; holds a few bytes a patch. Raises ValueError as ``mask_counts``.
    """
    n_patches = grid_h * grid_w
    counts_n = mask_counts(n_crops, n_patches, probability, ratio)
    masks_nP = _complete(_rectangles(counts_n, grid_h, grid_w, rng), counts_n, rng)
    out_CP = np.zeros((n_crops, n_patches), bool)
    out_CP[rng.permutation(n_crops)[: len(counts_n)]] = masks_nP
    return out_CP


def patch_weights(mask_CP: np.ndarray) -> np.ndarray:
    """Weight of each masked patch in the loss, in the order of ``np.flatnonzero(mask_CP)``: float32 (M,).

    1 over the masked patches of its crop, so that each masked crop weighs 1 however much of it is hidden.
    """
    counts_C = mask_CP.sum(axis=1)
    return np.repeat(1 / np.maximum(counts_C, 1), counts_C).astype(np.float32)


def _rectangles(counts_n: np.ndarray, grid_h: int, grid_w: int, rng: np.random.Generator) -> np.ndarray:
    """Unions of rectangles with at most ``counts_n`` patches each, bool (n, H, W); one try a crop in each round."""
    masks_nHW = np.zeros((len(counts_n), grid_h, grid_w), bool)
    failed_n = np.zeros(len(counts_n), np.int64)  # tries in a row
    left_n = counts_n.copy()
    while (rows := np.flatnonzero((left_n > 0) & (failed_n < _TRIES))).size:
        tries_nHW = _draw_rectangles(left_n[rows], grid_h, grid_w, rng) & ~masks_nHW[rows]
        new_n = tries_nHW.sum(axis=(1, 2))
        fits_n = (new_n > 0) & (new_n <= left_n[rows])
        masks_nHW[rows[fits_n]] |= tries_nHW[fits_n]
        left_n[rows[fits_n]] -= new_n[fits_n]
        failed_n[rows] = np.where(fits_n, 0, failed_n[rows] + 1)
    return masks_nHW


def _draw_rectangles(left_n: np.ndarray, grid_h: int, grid_w: int, rng: np.random.Generator) -> np.ndarray:
    """One rectangle a crop, bool (n, H, W); empty where the one drawn is as high or as wide as the grid."""
    area_u, aspect_u, y_u, x_u = rng.random((4, len(left_n)))
    most_n = np.minimum(left_n, _MOST_SHARE * grid_h * grid_w)
    area_n = _LEAST_AREA + area_u * (most_n - _LEAST_AREA)
    aspect_n = _ASPECT ** (1 - 2 * aspect_u)
    h_n, w_n = np.rint(np.sqrt(area_n * aspect_n)), np.rint(np.sqrt(area_n / aspect_n))
    small_n = (h_n < grid_h) & (w_n < grid_w)
    top_n, side_n = np.floor(y_u * (grid_h - h_n + 1)), np.floor(x_u * (grid_w - w_n + 1))
    y, x = np.arange(grid_h), np.arange(grid_w)
    rows_nH = (y >= top_n[:, None]) & (y < (top_n + h_n)[:, None]) & small_n[:, None]
    columns_nW = (x >= side_n[:, None]) & (x < (side_n + w_n)[:, None])
    out_nHW: np.ndarray = rows_nH[:, :, None] & columns_nW[:, None, :]
    return out_nHW


def _complete(masks_nHW: np.ndarray, counts_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add single patches at random until crop i has ``counts_n[i]``: bool (n, P)."""
    masks_nP = masks_nHW.reshape(len(counts_n), masks_nHW.shape[1] * masks_nHW.shape[2])
    order_nP = np.argsort(np.where(masks_nP, -1.0, rng.random(masks_nP.shape)), axis=1, kind="stable")
    out_nP = np.zeros_like(masks_nP)
    np.put_along_axis(out_nP, order_nP, np.arange(masks_nP.shape[1]) < counts_n[:, None], axis=1)
    return out_nP
