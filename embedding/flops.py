"""What a forward costs, and what a device gives: the two numbers behind MFU, the share of a device that is used.

A FLOP is one multiplication or one addition, so a product of (m, k) and (k, n) takes 2 m k n. Products alone are
counted: norms, activations and softmax are below a hundredth of them, and limited by memory.
"""

import time
from collections.abc import Callable, Sequence

import torch

from embedding.vit_config import ViTConfig

PRODUCT_SIDES = (4096, 8192)  # large enough that a GPU is busy, small enough for 1 GB
_SECONDS = 0.05  # of products that are timed at a time, at least


def vit_flops(config: ViTConfig, side: int) -> int:
    """FLOPs of the products in one forward of one image of ``side`` x ``side`` pixels.

    With P patches, N = 1 + registers + P tokens of width D and a hidden width H: the patch embedding 2 P 3 p^2 D, and
    in every block queries, keys, values and their projection 2 N 4 D^2, the two products of attention 4 N^2 D, and the
    FFN 4 N D H (SwiGLU, of three matrices: 6 N D H). A backward takes twice as many.
    """
    n_patches = (side // config.patch_size) ** 2
    n, d = 1 + config.n_registers + n_patches, config.width
    matrices = 2 if config.ffn == "mlp" else 3
    block = 8 * n * d * d + 4 * n * n * d + 2 * matrices * n * d * config.ffn_hidden
    return 2 * n_patches * 3 * config.patch_size**2 * d + config.depth * block


def matmul_rate(device: str, sides: Sequence[int] = PRODUCT_SIDES, repeats: int = 3) -> float:
    """FLOP/s of square bfloat16 products on a device, the best of several sides and repeats: a measured peak.

    Takes under a second on a GPU. Holds three matrices of the largest side, 2 bytes a number. What a maker publishes is
    higher: it is reckoned at a clock that a busy device does not hold.
    """
    best = 0.0
    for side in sides:
        x, y, out = (torch.randn(side, side, device=device).bfloat16() for _ in range(3))

        def product(x: torch.Tensor = x, y: torch.Tensor = y, out: torch.Tensor = out) -> None:
            torch.mm(x, y, out=out)

        n = max(1, int(_SECONDS / seconds(product, 1, device)))
        best = max(best, *(2 * side**3 / seconds(product, n, device) for _ in range(repeats)))
    return best


def seconds(work: Callable[[], object], n: int, device: str) -> float:
    """Seconds of one call, measured over n calls after an untimed one; on a GPU by its own clock."""
    work()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(n):
            work()
        return (time.perf_counter() - start) / n
    begin, end = gpu_clock(), gpu_clock()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(n):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / n


def gpu_clock() -> torch.cuda.Event:
    """An event that a GPU passes and tells the time of; a thread that waits for it sleeps, and leaves its core."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
