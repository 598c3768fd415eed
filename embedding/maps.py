"""What patch tokens show, as pictures: their principal components in colours, and where the CLS token looks.

Legend: B images, N tokens, P patches, A attention heads, E width of a head.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh
from torch import Tensor

from embedding.network import Backbone
from embedding.vit import Tokens, ViT, rope_tables, rotate

_CLIPPED = (2.0, 98.0)  # per cent: what of a component lies outside has the colour of the end
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to bright, evenly spaced

Pictures = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]


class PatchMaps(NamedTuple):
    """Images as a network sees them, and what it says of their patches."""

    pixels: Pictures  # (n, side, side, 3), RGB
    patches: Values  # (n, h, w, D), after the final norm
    attention: Values | None  # (n, heads, h, w), see ``cls_attention``; None: another network than the own ViT


def patch_maps(backbone: Backbone, images: Sequence[Pictures]) -> PatchMaps | None:
    """The patches of uint8 RGB images (h, w, 3) in one batch; None when the backbone shows none.

    Images have the side that the encoder was trained for; twice that, and so four times the patches, in a ViT of this
    project with rotary positions, which take any grid.
    """
    if backbone.vit is None or backbone.preprocess is None:
        if backbone.patches is None:
            return None
        pixels = np.stack([backbone.prepare(image) for image in images])
        return PatchMaps(pixels, backbone.patches(pixels), None)
    vit, preprocess = backbone.vit, backbone.preprocess
    if vit.config.position == "rope":
        crop = None if preprocess.crop is None else 2 * preprocess.crop
        preprocess = replace(preprocess, size=2 * preprocess.size, crop=crop)
    pixels = np.stack([preprocess.cropped(image) for image in images])
    inputs = torch.from_numpy(np.stack([preprocess(image) for image in images])).to(backbone.device)
    with torch.inference_mode():
        tokens, attention_BAHW = _tokens_and_attention(vit, inputs)
    patches_BHWD = tokens.patches.float().reshape(len(images), *attention_BAHW.shape[2:], -1)
    return PatchMaps(pixels, patches_BHWD.cpu().numpy(), attention_BAHW.cpu().numpy())


def cls_attention(vit: ViT, images: Tensor) -> Tensor:
    """How much the CLS token attends to each patch in the last block: float32 (B, A, h, w).

    images: (B, 3, H, W), as ``vit`` takes them. The softmax, in float32, is over all tokens, so the values of a head
    sum to 1 less what CLS and registers have. Raises ValueError for a ViT in training mode.
    """
    return _tokens_and_attention(vit, images)[1]


def _tokens_and_attention(vit: ViT, images: Tensor) -> tuple[Tokens, Tensor]:
    if vit.training:
        raise ValueError("attention must be asked of a ViT in evaluation mode: got one in training")
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    qkv = vit.blocks[-1].get_submodule("qkv")
    hook = qkv.register_forward_hook(keep)
    try:
        tokens = vit(images)
    finally:
        hook.remove()
    p = vit.config.patch_size
    return tokens, _attention(vit, seen[0], len(images), (images.shape[2] // p, images.shape[3] // p))


def _attention(vit: ViT, qkv: Tensor, n_images: int, grid: tuple[int, int]) -> Tensor:
    """``cls_attention`` from the output of the last block's qkv, whose rows are [q | k | v]."""
    config = vit.config
    n_prefix, head_width = 1 + config.n_registers, config.width // config.heads
    q_BNAE, k_BNAE, _ = qkv.reshape(n_images, -1, 3, config.heads, head_width).float().unbind(2)
    q_BAE, k_BANE = q_BNAE[:, 0], k_BNAE.transpose(1, 2)
    if config.position == "rope":  # which turns CLS by nothing
        k_BANE = rotate(k_BANE, rope_tables(grid, head_width, n_prefix, config.rope_base, device=str(qkv.device)))
    score_BAN = torch.einsum("bae,bane->ban", q_BAE, k_BANE) / head_width**0.5
    share_BAP: Tensor = score_BAN.softmax(dim=-1)[:, :, n_prefix:]
    return share_BAP.reshape(n_images, config.heads, *grid)


def pca_rgb(patches: Values) -> Pictures:
    """Patches (n, h, w, D) in colours: uint8 (n, h, w, 3).

    Red, green and blue are the first three principal components of the patches of all images together, so one colour
    means one thing in all of them. The sign of a component is such that its largest entry is positive (the first of
    equals); it is scaled so that the middle 96 per cent of its values fill 0..255. Where there are fewer than three
    components, the others are 0. float64 inside: holds 16 bytes for each of n * h * w * D, and 8 * D ** 2. Raises
    ValueError for values that are not finite.
    """
    n, h, w, d = patches.shape
    x = patches.reshape(-1, d).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"patches must be finite: {int((~np.isfinite(x)).sum())} of {x.size} values are not")
    x -= x.mean(axis=0)
    k = min(3, d)
    _, axes = eigh(x.T @ x, subset_by_index=(d - k, d - 1))
    axes = axes[:, ::-1]  # the largest first
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(k)] < 0, -1, 1)
    out = np.zeros((len(x), 3), np.uint8)
    out[:, :k] = _to_bytes(x @ axes, _CLIPPED)
    return out.reshape(n, h, w, 3)


def _to_bytes(x: npt.NDArray[np.float64], clipped: tuple[float, float]) -> Pictures:
    """Each column of x (m, k) from its lower percentile, 0, to its upper one, 255; a constant column is 0."""
    low, high = np.percentile(x, clipped, axis=0)
    span = high - low
    flat = ~(span > 1e-9 * np.abs(x).max(initial=0))  # what is left of rounding is no component
    scaled = np.where(flat, 0, (x - low) / np.where(flat, 1, span))
    return _rounded(255 * scaled.clip(0, 1))


def heat_rgb(attention: Values) -> Pictures:
    """The mean over heads of attention (n, heads, h, w) in colours: uint8 (n, h, w, 3).

    Black is no attention; the brightest is the patch of an image that gets most.
    """
    mean = attention.mean(axis=1, dtype=np.float64)
    share = mean / mean.max(axis=(1, 2), keepdims=True)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, [colour[c] for colour in _HEAT]) for c in range(3)]
    return _rounded(np.stack(channels, axis=-1))


def _rounded(x: npt.NDArray[np.float64]) -> Pictures:
    out: Pictures = np.rint(x).astype(np.uint8)
    return out
