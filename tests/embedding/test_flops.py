"""What a forward costs, beside PyTorch's own count; what a device gives, beside a clock."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embedding import flops
from embedding.flops import matmul_rate, seconds, vit_flops
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

CONFIGS = {
    "mlp": ViTConfig(width=32, depth=2, heads=2, patch_size=8),
    "swiglu": ViTConfig(width=48, depth=3, heads=4, patch_size=8, ffn="swiglu", n_registers=0),
    "learned": ViTConfig(width=32, depth=1, heads=2, patch_size=16, position="learned", image_size=32, mlp_ratio=3.0),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", [32, 64])
def test_the_formula_counts_what_pytorch_counts(name, side):
    vit = ViT(CONFIGS[name]).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        vit(torch.zeros(3, 3, side, side))
    assert counted.get_total_flops() == 3 * vit_flops(CONFIGS[name], side)


def test_a_vit_l_takes_what_is_published():
    """61.6 GMACs at 224 pixels without registers: torchvision's figure for ViT-L/16 with its classifier."""
    large = ViTConfig(width=1024, depth=24, heads=16, n_registers=0)
    assert vit_flops(large, 224) / 2 == pytest.approx(61.55e9, rel=0.005)


def test_the_rate_is_that_of_the_best_side(monkeypatch):
    took = {8: 1e-6, 16: 4e-6}  # 2 side ** 3: 1.024 and 2.048 GFLOP/s
    asked = []

    def timed(work, n, device):
        work()
        side = next(x for x in took if x == work.__defaults__[0].shape[0])
        asked.append((side, n))
        return took[side]

    monkeypatch.setattr(flops, "seconds", timed)
    assert matmul_rate("cpu", (8, 16), repeats=2) == pytest.approx(2 * 16**3 / 4e-6)
    assert {side for side, _ in asked} == {8, 16}
    assert max(n for _, n in asked) == 50_000  # of 1 us each: 0.05 s


def test_seconds_are_those_of_one_call():
    calls = []

    def work():
        calls.append(time.sleep(0.01))

    assert 0.01 <= seconds(work, 3, "cpu") < 0.1
    assert len(calls) == 4  # the first is not timed
    assert matmul_rate("cpu", (32,), repeats=1) > 0
