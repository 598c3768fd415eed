"""Multi-crop in batches on any device: what ``training.augment.make_crops`` does to one image, as tensor operations.

Images of several sizes are laid on a canvas of zeros. A resize is two products with the weights of every crop, which
hold the part that is cut out and the flip; what was drawn for a crop decides which operations it passes through. The
result differs from the reference by rounding: at most one of 255 in few pixels.

Letters of shapes: N images, C crops of an image, M crops together, Y and X pixels of a crop, H and W of the canvas.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from training.augment import N_GLOBAL, gaussian

_CANVAS = 2**24  # pixels resized at a time, unless one image has more
_STEP = 64  # sides of canvases are multiples of this, so that memory is used again
_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601


@torch.no_grad()
def batched_crops(
    pixels: np.ndarray | Tensor,
    sizes: np.ndarray,
    drawn: np.ndarray,
    sides: tuple[int, int],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The crops of a batch: uint8 (crop, image, height, width, RGB) on ``device``, globals and locals.

    pixels, sizes, drawn: the fields of ``training.loader.Pictures``; sides: of globals and locals in pixels. Computed
    in float32, also within autocast. Memory: 12 bytes a pixel of the canvas, which has 2**24 pixels or those of the
    largest image; for each crop on it some 24 bytes * side of the crop * sides of the canvas, and 60 bytes a pixel.
    """
    device = torch.device(device)
    flat = torch.as_tensor(pixels).to(device, non_blocking=True)
    starts = np.cumsum(sizes.prod(axis=1) * 3) - sizes.prod(axis=1) * 3
    groups = ((0, N_GLOBAL, sides[0]), (N_GLOBAL, len(drawn), sides[1]))
    out = [
        torch.empty((end - first, len(sizes), side, side, 3), dtype=torch.uint8, device=device)
        for first, end, side in groups
    ]
    with torch.autocast(device.type, enabled=False), _whole_float32():
        for images in _batches(sizes):
            canvas_NHcW = _canvas(flat, starts[images], sizes[images])
            at = torch.from_numpy(images).to(device)
            for made, (first, end, side) in zip(out, groups, strict=True):
                if end > first:
                    made[:, at] = _crops(canvas_NHcW, sizes[images], drawn[first:end, images], side)
    return out[0], out[1]


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Products of pixels and weights in float32, not in TF32: a weight of 10 bits would shift what is rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _batches(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Images that share a canvas, those of similar sizes together."""
    order = np.lexsort((sizes[:, 1], sizes[:, 0]))
    padded = sizes[order] + -sizes[order] % _STEP
    first = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or (i - first + 1) * padded[first : i + 1].max(axis=0).prod() > _CANVAS:
            yield order[first:i]
            first = i


def _canvas(flat: Tensor, starts: np.ndarray, sizes: np.ndarray) -> Tensor:
    """The images as float32 (N, H, channel, W), zero beyond their sizes."""
    height, width = (sizes.max(axis=0) + -sizes.max(axis=0) % _STEP).tolist()
    canvas = torch.zeros((len(sizes), height, 3, width), device=flat.device)
    for i, (start, (h, w)) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        canvas[i, :h, :, :w] = flat[start : start + h * w * 3].view(h, w, 3).transpose(1, 2)
    return canvas


def _crops(canvas_NHcW: Tensor, sizes: np.ndarray, drawn_CN: np.ndarray, side: int) -> Tensor:
    """Crops of one side: uint8 (C, N, Y, X, channel)."""
    n_crops, n_images = drawn_CN.shape
    drawn_M = np.ascontiguousarray(drawn_CN.T).reshape(-1)  # image by image
    box, lengths = drawn_M["box"].astype(np.int64), np.repeat(sizes, n_crops, axis=0)
    no_flip = np.zeros_like(drawn_M["flip"])
    _, height, _, width = canvas_NHcW.shape
    device = canvas_NHcW.device
    down_MYH = _weights(box[:, 1], box[:, 3], lengths[:, 0], no_flip, side, height, device)
    across_MXW = _weights(box[:, 0], box[:, 2], lengths[:, 1], drawn_M["flip"], side, width, device)
    half = torch.bmm(down_MYH.view(n_images, n_crops * side, -1), canvas_NHcW.flatten(2))
    x_MYcX = torch.bmm(half.view(len(drawn_M), side * 3, -1), across_MXW.transpose(1, 2)).view(-1, side, 3, side)
    x_MYcX = _rounded(_changed(x_MYcX.clamp_(0, 255), drawn_M), drawn_M["threshold"])
    return x_MYcX.view(n_images, n_crops, side, 3, side).permute(1, 0, 2, 4, 3)


def _weights(
    start_M: np.ndarray,
    stop_M: np.ndarray,
    length_M: np.ndarray,
    flip_M: np.ndarray,
    side: int,
    line: int,
    device: torch.device,
) -> Tensor:
    """Bicubic weights of the pixels of a line for those of a crop, by Pillow's formula: float32 (M, side, line)."""
    scale_M1 = ((stop_M - start_M) / side)[:, None]
    wide_M1 = np.maximum(scale_M1, 1.0)
    centre_MX = start_M[:, None] + (np.arange(side) + 0.5) * scale_M1
    centre_MX[flip_M] = centre_MX[flip_M, ::-1]
    low_MX = np.maximum(centre_MX - 2 * wide_M1 + 0.5, 0).astype(np.int64)
    high_MX = np.minimum(centre_MX + 2 * wide_M1 + 0.5, length_M[:, None]).astype(np.int64)
    whole_MX = np.floor(centre_MX)  # apart, so that float32 is exact enough far from the border
    low, high, whole, rest, wide = (
        torch.from_numpy(a.astype(np.float32)).to(device)[:, :, None]
        for a in (low_MX, high_MX, whole_MX, centre_MX - whole_MX, wide_M1)
    )
    place = torch.arange(line, dtype=torch.float32, device=device)
    weights = _cubic(((place - whole) + (0.5 - rest)) / wide)
    weights *= (place >= low) & (place < high)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _cubic(x: Tensor) -> Tensor:
    """The bicubic kernel of Pillow, a = -1/2."""
    x = x.abs_()
    near = ((1.5 * x).sub_(2.5)).mul_(x).mul_(x).add_(1)
    far = (((-0.5 * x).add_(2.5)).mul_(x).sub_(4)).mul_(x).add_(2)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _changed(x_MYcX: Tensor, drawn_M: np.ndarray) -> Tensor:
    """The changes of colour in the order drawn, gray, and blur, each of the crops that were to have it; in place."""
    for place in range(4):
        for change, apply in enumerate(_CHANGES):
            _to_some(x_MYcX, drawn_M["order"][:, place] == change, apply, drawn_M["amount"][:, change])
    _to_some(x_MYcX, drawn_M["gray"], _saturation, np.zeros(len(drawn_M), np.float32))
    most = int(drawn_M["radius"].max())
    taps = np.zeros((len(drawn_M), most + 1), np.float32)
    for i in np.flatnonzero(drawn_M["radius"]).tolist():
        radius = int(drawn_M["radius"][i])
        taps[i, : radius + 1] = gaussian(float(drawn_M["sigma"][i]), radius)
    _to_some(x_MYcX, drawn_M["radius"] > 0, _blur, taps)
    return x_MYcX


def _to_some(
    x_MYcX: Tensor, chosen_M: np.ndarray, apply: Callable[[Tensor, Tensor], Tensor], amount_M: np.ndarray
) -> None:
    """Apply an operation to some of the crops, each with its own amount."""
    at = np.flatnonzero(chosen_M)
    if len(at):
        index = torch.from_numpy(at).to(x_MYcX.device)
        amount = torch.from_numpy(np.ascontiguousarray(amount_M[at])).to(x_MYcX.device)
        x_MYcX.index_copy_(0, index, apply(x_MYcX.index_select(0, index), amount))


def _gray(x_MYcX: Tensor) -> Tensor:
    r, g, b = x_MYcX.unbind(dim=2)
    return (_GRAY[0] * r + _GRAY[1] * g + _GRAY[2] * b).unsqueeze(2)


def _brightness(x_MYcX: Tensor, factor_M: Tensor) -> Tensor:
    return x_MYcX.mul_(factor_M.view(-1, 1, 1, 1)).clamp_(max=255)


def _contrast(x_MYcX: Tensor, factor_M: Tensor) -> Tensor:
    mean = _gray(x_MYcX).mean(dim=(1, 2, 3), keepdim=True)
    return ((x_MYcX - mean).mul_(factor_M.view(-1, 1, 1, 1))).add_(mean).clamp_(0, 255)


def _saturation(x_MYcX: Tensor, factor_M: Tensor) -> Tensor:
    gray = _gray(x_MYcX)
    return ((x_MYcX - gray).mul_(factor_M.view(-1, 1, 1, 1))).add_(gray).clamp_(0, 255)


def _hue(x_MYcX: Tensor, turn_M: Tensor) -> Tensor:
    """The hue turned by a share of the full circle; value and saturation in HSV stay."""
    r, g, b = x_MYcX.unbind(dim=2)
    value = x_MYcX.amax(dim=2)
    chroma = value - x_MYcX.amin(dim=2)
    per = 1 / torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == r, (g - b) * per, torch.where(value == g, 2 + (b - r) * per, 4 + (r - g) * per))
    hue += 6 * turn_M.view(-1, 1, 1)
    parts = []
    for least in (5, 3, 1):  # where red, green and blue are least by chroma, in sixths of the circle
        k = (hue + least).remainder_(6)
        parts.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(parts, dim=2)


_CHANGES = (_brightness, _contrast, _saturation, _hue)


def _blur(x_MYcX: Tensor, taps_Mk: Tensor) -> Tensor:
    """Blurred in both directions by taps for the middle and one side; beyond the border the picture is mirrored."""
    side, radius = x_MYcX.shape[1], taps_Mk.shape[1] - 1
    places = torch.from_numpy(np.pad(np.arange(side), radius, mode="reflect")).to(x_MYcX.device)
    for dim in (1, 3):
        wide = x_MYcX.index_select(dim, places)
        weight = taps_Mk.view(len(taps_Mk), -1, 1, 1, 1)
        x_MYcX = wide.narrow(dim, radius, side) * weight[:, 0]
        for k in range(1, radius + 1):
            x_MYcX += (wide.narrow(dim, radius - k, side) + wide.narrow(dim, radius + k, side)).mul_(weight[:, k])
    return x_MYcX


def _rounded(x_MYcX: Tensor, threshold_M: np.ndarray) -> Tensor:
    """As uint8; values from the threshold of a crop on are inverted."""
    rounded = x_MYcX.add_(0.5).to(torch.uint8)
    at = np.flatnonzero(threshold_M < 256)
    if len(at):
        index = torch.from_numpy(at).to(rounded.device)
        threshold = torch.from_numpy(threshold_M[at]).to(rounded.device).view(-1, 1, 1, 1)
        some = rounded.index_select(0, index)
        rounded.index_copy_(0, index, torch.where(some >= threshold, 255 - some, some))
    return rounded
