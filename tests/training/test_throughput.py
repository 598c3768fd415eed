from dataclasses import replace

import pytest

from embedding.flops import vit_flops
from embedding.vit_config import ViTConfig
from training.config import HeadConfig, TrainConfig
from training.throughput import Timing, train_flops

SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def recipe(size, drop_path):
    """Crops and heads of the released recipes, without registers, whose tokens the published figures leave out."""
    width, depth, heads = SHAPES[size]
    vit = ViTConfig(width=width, depth=depth, heads=heads, patch_size=16, n_registers=0, drop_path=drop_path)
    return TrainConfig(vit=vit, head=HeadConfig(prototypes=65536), ibot_head=HeadConfig(prototypes=65536))


@pytest.mark.parametrize(("size", "drop_path", "teraflop"), [("S", 0.1, 0.115), ("B", 0.1, 0.410), ("L", 0.3, 1.155)])
def test_published_flops_of_an_image(size, drop_path, teraflop):
    assert train_flops(recipe(size, drop_path)) / 1e12 == pytest.approx(teraflop, rel=0.02)


def test_flops_by_hand(tiny):
    """tiny: 2 globals of 4 x 4 patches, 2 locals of 2 x 2; per image 3.5 masked patches; see ``vit_flops``."""
    seen, local = vit_flops(tiny.vit, 32), vit_flops(tiny.vit, 16)
    head, patch = 2 * (32 * 64 + 64 * 64 + 64 * 32 + 32 * 64), 2 * (32 * 40 + 40 * 40 + 40 * 24 + 24 * 48)
    masked = sum(int(16 * (0.1 + 0.4 * (i + 1) / 8) + 1e-6) for i in range(8)) / 8
    # a forward of the teacher, a forward and a backward (of two) of the student
    expected = 2 * seen + 3 * (2 * seen + 2 * local) + head * (2 + 3 * 4) + patch * (1 + 3) * masked
    assert train_flops(tiny) == pytest.approx(expected, rel=1e-9)
    off = replace(tiny, ibot_weight=0.0)
    assert train_flops(tiny) - train_flops(off) == pytest.approx(4 * patch * masked)
    dropped = replace(tiny, vit=replace(tiny.vit, drop_path=0.5))
    assert train_flops(tiny) - train_flops(dropped) == pytest.approx(3 * (seen + local))


def test_flops_of_an_image_do_not_hang_on_the_batch_or_its_groups(tiny):
    bigger = replace(tiny, batch=64, group=8)
    assert train_flops(bigger) == train_flops(tiny)


def timing(seconds, waited, images, steps):
    out = Timing()
    out.seconds, out.wait_seconds, out.images, out.steps = seconds, waited, images, steps
    return out


def test_rates_are_of_what_was_added():
    now = timing(10.0, 4.0, 300, 30)
    recent = now.since(timing(6.0, 3.0, 100, 10))
    assert (recent.seconds, recent.wait_seconds, recent.images, recent.steps) == (4.0, 1.0, 200, 20)
    assert recent.images_per_second == 50
    assert recent.wait_share == 0.25
    copy = now.copy()
    now.images = 0
    assert copy.images == 300


def test_no_time_gives_no_rate():
    assert Timing().images_per_second == Timing().wait_share == 0
