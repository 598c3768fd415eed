import numpy as np
import pytest
import torch

from training.encoder import ema_update
from training.schedules import (
    backbone_rule,
    head_rule,
    sqrt_scaled_lr,
    warmup_constant_cooldown,
    warmup_cosine,
    warmup_cosine_constant,
)


def test_old_style_golden():
    expected = [0, 0.3333, 0.6667, 1, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987]
    np.testing.assert_allclose(warmup_cosine(10, 4, 1, 0), expected, atol=5e-5)


def test_v2_style_golden():
    expected = [0, 0.25, 0.5, 0.75, 1, 0.904508, 0.654508, 0.345492, 0.095492, 0]
    np.testing.assert_allclose(warmup_cosine_constant(10, 4, 1, 0), expected, atol=1e-6)
    expected = [0, 0.5, 1, 0.75, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(warmup_cosine_constant(8, 2, 1, 0.5, cosine=3), expected, atol=1e-12)


def test_cooldown_reaches_its_end_and_a_longer_run_starts_alike():
    short, long = warmup_constant_cooldown(10, 2, 4, 1, 0.2), warmup_constant_cooldown(30, 2, 4, 1, 0.2)
    np.testing.assert_allclose(short, [0, 0.5, 1, 1, 1, 1, 0.882843, 0.6, 0.317157, 0.2], atol=1e-6)
    np.testing.assert_array_equal(short[:6], long[:6])
    np.testing.assert_array_equal(short[6:], long[26:])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_lengths(n):
    assert len(warmup_cosine(n, 0, 1, 0)) == len(warmup_cosine(n, n, 1, 0)) == n
    assert len(warmup_constant_cooldown(n, n, 0, 1, 0)) == len(warmup_constant_cooldown(n, 0, n, 1, 0)) == n
    assert len(warmup_cosine_constant(n, n, 1, 0)) == len(warmup_cosine_constant(n, 0, 1, 0, cosine=0)) == n


def test_pieces_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"its 10 steps: got \(6, 5\)"):
        warmup_constant_cooldown(10, 6, 5, 1, 0)


@pytest.mark.parametrize(
    ("base", "batch", "factor", "effective"),
    [(0.004, 2048, 1, 0.00565685), (2e-4, 3072, 1, 3.4641e-4), (1e-3, 2048, 4, 0.00565685), (5e-5, 4096, 4, 4e-4),
     (3e-5, 4096, 4, 2.4e-4), (1.25e-5, 4096, 4, 1e-4), (1.25e-5, 2048, 4, 7.0711e-5)],
)  # fmt: skip
def test_published_rates(base, batch, factor, effective):
    assert sqrt_scaled_lr(base, batch, factor) == pytest.approx(effective, rel=1e-5)


def linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(5, 3)


def test_ema_closed_form_and_ends():
    teacher, student = linear(0), linear(1)
    start = teacher.weight.detach().clone()
    for _ in range(20):
        ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9**20 * start + (1 - 0.9**20) * student.weight)
    before = teacher.weight.detach().clone()
    ema_update(teacher, student, 1.0)
    assert torch.equal(teacher.weight, before)
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


@pytest.mark.parametrize(("momentum", "steps"), [(0.992, 86), (0.994, 115), (0.996, 173), (0.999, 693)])
def test_ema_half_lives(momentum, steps):
    teacher, student = linear(0).double(), linear(1).double()
    start, left = teacher.weight.detach().clone(), []
    for _ in range(steps + 1):
        ema_update(teacher, student, momentum)
        left.append(((teacher.weight - student.weight) / (start - student.weight)).mean().item())
    assert min(range(steps + 1), key=lambda n: abs(left[n] - 0.5)) == steps - 1  # the update of that number


@pytest.mark.parametrize(
    ("name", "multiplier"),
    [("patch_embed.weight", 0.0508373), ("cls_token", 0.2541866), ("pos_embed", 0.2541866), ("registers", 0.2541866),
     ("blocks.0.qkv.weight", 0.2824295), ("blocks.11.ffn.fc1.weight", 0.9), ("norm.weight", 1)],
)  # fmt: skip
def test_layer_decay_golden(name, multiplier):
    rule = backbone_rule(name, (4, 4), 12, layer_decay=0.9, patch_embed_lr=0.2)
    assert rule.lr_multiplier == pytest.approx(multiplier, rel=1e-6)


def test_what_is_decayed():
    assert backbone_rule("blocks.3.qkv.weight", (4, 4), 12).decayed
    assert backbone_rule("patch_embed.weight", (4, 3, 2, 2), 12).decayed
    for name in ("blocks.3.qkv.bias", "blocks.3.norm1.weight", "blocks.3.ls1", "norm.bias"):
        assert not backbone_rule(name, (4,), 12).decayed
    assert not backbone_rule("cls_token", (1, 1, 4), 12).decayed
    assert backbone_rule("cls_token", (1, 1, 4), 12, decay_tokens=True).decayed
    assert head_rule("prototypes", (8, 4)).last_layer
    assert head_rule("prototypes", (8, 4)).lr_multiplier == head_rule("mlp.0.weight", (4, 4)).lr_multiplier == 1
    assert not head_rule("mlp.0.bias", (4,)).decayed
