"""A backbone as a function from prepared images to vectors: on which device, in which precision, and without waiting.

Needs torch, Pillow and numpy alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from embedding.fast_decode import Reduced
from embedding.flops import gpu_clock, vit_flops
from embedding.pooling import POOLERS, Features
from embedding.preprocess import Preprocess
from embedding.vit import ViT

_FULL = 64  # images: the batches of a compiled network are filled up to multiples, each height is compiled anew

Inputs = npt.NDArray[Any]  # (n, ...): what ``prepare`` makes of n images
Rows = npt.NDArray[np.float32]


class Begun(NamedTuple):
    """Vectors that a device may still be working on."""

    rows: Callable[[], Rows]  # waits for them, float32 (n, width)
    seconds: Callable[[], float]  # that the device took for them; to be asked for when they are there


Begin = Callable[[Inputs], Begun]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A function from images to float32 vectors, and what it is made of."""

    width: int  # of a vector
    identity: dict[str, Any]  # JSON values; equal when the vectors are equal, wherever the weights lie
    prepare: Callable[[npt.NDArray[np.uint8] | Reduced], Inputs]  # an image to an input; of a network uint8 RGB
    # (side, side, 3): it normalises by itself, so that a quarter of the bytes travels
    forward: Callable[[Inputs], Rows]  # inputs (n, ...) to vectors (n, width)
    device: str = "cpu"  # where forward works; inputs for "cuda" come faster from pinned memory
    patches: Callable[[Inputs], Rows] | None = None  # inputs (n, ...) to patch tokens (n, h, w, d) as a picture shows
    # them, without CLS and registers, whatever the pooling; None: shows none
    least_side: int | None = None  # pixels that ``prepare`` makes of a shorter side, for ``decode_reduced``; None: only
    # whole images will do
    begin: Begin | None = None  # ``forward`` without waiting for a GPU; None: it works where it is called
    flops: int | None = None  # of the products for one image, see ``embedding.flops``; None: not known
    vit: ViT | None = None  # the network itself, for what looks inside; None: another than the ViT of this project
    preprocess: Preprocess | None = None  # what ``prepare`` does; None: it makes no input of a network

    def embed(self, images: Sequence[npt.NDArray[np.uint8]]) -> Rows:
        """Vectors float32 (n, width), not normalised, of uint8 RGB images (h, w, 3), in one batch."""
        if not images:
            return np.zeros((0, self.width), np.float32)
        return self.forward(np.stack([self.prepare(image) for image in images]))

    def begun(self, inputs: Inputs) -> Begun:
        """Begin ``forward`` of inputs (n, ...); n may be 0."""
        if len(inputs) and self.begin is not None:
            return self.begin(inputs)
        return done_at_once(lambda: self.forward(inputs) if len(inputs) else np.zeros((0, self.width), np.float32))


class Running(NamedTuple):
    """How a network is run."""

    device: str
    precision: str  # of its products; what is added up and what comes out is float32
    compiled: bool


def vit_backbone(vit: ViT, identity: dict[str, Any], preprocess: Preprocess, pooling: str, how: Running) -> Backbone:
    """The backbone that runs a ViT of this project, which is moved to the device as float32.

    Compiled are the blocks, one for all of them: a minute less than the whole. Raises ValueError as
    ``network_backbone``.
    """
    vit.float().to(how.device).eval().requires_grad_(False)

    def features(images: Tensor) -> Features:
        tokens = vit(images)
        return Features(tokens.cls, tokens.patches)

    flops = vit_flops(vit.config, preprocess.side)
    backbone = network_backbone(features, identity, preprocess, pooling, how, flops)
    if how.compiled:
        for block in vit.blocks:
            block.compile()
    return replace(backbone, vit=vit)


def network_backbone(
    features: Callable[[Tensor], Features],
    identity: dict[str, Any],
    preprocess: Preprocess,
    pooling: str,
    how: Running,
    flops: int | None = None,
) -> Backbone:
    """The backbone that pools ``features``, of float32 images (B, 3, side, side) on the device.

    flops: of one image. Raises ValueError when the network takes no images of that side.
    """
    pool = POOLERS[pooling]

    def grid(images: Tensor) -> Tensor:
        x_BPD = features(images).patches
        assert x_BPD is not None, "the first image had them"
        side = math.isqrt(x_BPD.shape[1])  # images are squares, so the patches are
        return x_BPD.view(len(x_BPD), side, side, -1)

    with torch.inference_mode():  # one image, for the width and for what does not fit
        try:
            found = features(torch.zeros(1, 3, preprocess.side, preprocess.side, device=how.device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as e:
            raise ValueError(f"{identity['name']} must take images of {preprocess.side} pixels: {e}") from e
        width = pool(found).shape[1]
    patches = None if found.patches is None else waiting(begin_with(grid, preprocess, how))
    begin = begin_with(lambda images: pool(features(images)), preprocess, how)
    return prepared_backbone(width, identity, preprocess, how, begin, patches, flops)


def prepared_backbone(
    width: int,
    identity: dict[str, Any],
    preprocess: Preprocess,
    how: Running,
    begin: Begin,
    patches: Callable[[Inputs], Rows] | None = None,
    flops: int | None = None,
) -> Backbone:
    """A backbone of images as ``preprocess`` crops them."""
    return Backbone(
        width,
        identity,
        preprocess.cropped,
        waiting(begin),
        how.device,
        patches,
        least_side=preprocess.least_side,
        begin=begin,
        flops=flops,
        preprocess=preprocess,
    )


def waiting(begin: Begin) -> Callable[[Inputs], Rows]:
    """As ``begin``, but wait for the rows and give them."""
    return lambda inputs: begin(inputs).rows()


def begin_with(computed: Callable[[Tensor], Tensor], preprocess: Preprocess, how: Running) -> Begin:
    """How to begin ``computed``, of float32 images (B, 3, side, side), on inputs uint8 (n, side, side, 3).

    The bytes are normalised on the device, by the same look-up as ``preprocess`` does it: the same bits everywhere. A
    GPU copies them from pinned memory, and its rows into pinned memory, while this thread goes on.
    """
    dtype, reduced = getattr(torch, how.precision), how.precision != "float32"
    values_3V = torch.from_numpy(preprocess.values.copy()).to(how.device)
    height = 0  # of the batches of a compiled network

    def compute(inputs: Inputs) -> Tensor:
        nonlocal height
        n = len(inputs)
        pixels_BHW3 = torch.from_numpy(inputs).to(how.device, non_blocking=True)
        if how.compiled:
            height = max(height, -(-n // _FULL) * _FULL)
            pixels_BHW3 = F.pad(pixels_BHW3, (0, 0, 0, 0, 0, 0, 0, height - n))
        with torch.inference_mode(), torch.autocast(how.device, dtype, enabled=reduced):
            images_B3HW = torch.stack([values_3V[c].take(pixels_BHW3[..., c].long()) for c in range(3)], dim=1)
            return computed(images_B3HW)[:n].float()

    def begin(inputs: Inputs) -> Begun:
        if how.device == "cpu":
            return done_at_once(lambda: compute(inputs).numpy())
        return _on_gpu(compute, inputs)

    return begin


def done_at_once(work: Callable[[], Rows]) -> Begun:
    """What ``work`` gives, and the time it took."""
    start = time.perf_counter()
    rows = work()
    took = time.perf_counter() - start
    return Begun(lambda: rows, lambda: took)


def _on_gpu(compute: Callable[[Inputs], Tensor], inputs: Inputs) -> Begun:
    start, end = gpu_clock(), gpu_clock()
    start.record()
    rows = compute(inputs)
    here = torch.empty(rows.shape, pin_memory=True)
    here.copy_(rows, non_blocking=True)
    end.record()

    def wait(held: Inputs = inputs) -> Rows:  # the GPU may not have copied the inputs before
        end.synchronize()
        return here.numpy()

    return Begun(wait, lambda: float(start.elapsed_time(end)) / 1e3)


def too_large(batch: int, error: torch.OutOfMemoryError) -> str:
    """The sentence for a batch of that many images that does not fit a GPU."""
    return f"{batch} images at a time must fit the memory of the GPU: {str(error).partition('. ')[0]}"
