from dataclasses import replace

import numpy as np
import pytest
import torch

from training.augment import normalise
from training.losses import koleo_loss, sinkhorn_knopp
from training.train_step import (
    Encoder,
    StepSettings,
    TrainState,
    make_optimizer,
    parameter_rules,
    step_masks,
    train_step,
)

CPU = torch.device("cpu")


def crops(config, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((2, config.image_size), (config.n_local, config.local_size))
    return [torch.from_numpy(rng.integers(0, 256, (n, config.batch, s, s, 3), dtype=np.uint8)) for n, s in sizes]


def at(step, lr=1e-3, frozen=False):
    return StepSettings(step, lr, 0.05, frozen)


def everything(state):
    """Copies of all tensors a step may change."""
    out = {f"s.{k}": v for k, v in state.student.state_dict().items()}
    out |= {f"t.{k}": v for k, v in state.teacher.state_dict().items()}
    for i, moments in enumerate(state.optimizer.state.values()):
        out |= {f"o.{i}.{k}": v for k, v in moments.items()}
    out |= {"centre": state.centre_K, "ibot_centre": state.ibot_centre_K}
    return {k: v.clone() for k, v in out.items()}


def equal_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_teacher_starts_as_the_student_and_follows_by_the_formula(tiny):
    state = TrainState(tiny, CPU)
    before = everything(state)
    assert all(torch.equal(before[k], before["s" + k[1:]]) for k in before if k.startswith("t."))
    train_step(state, *crops(tiny), tiny, at(0))
    after = everything(state)
    for k in before:
        if k.startswith("t."):
            expected = tiny.momentum * before[k] + (1 - tiny.momentum) * after["s" + k[1:]]
            torch.testing.assert_close(after[k], expected)
    for name in ("backbone.cls_token", "backbone.mask_token", "head.prototypes", "ibot_head.prototypes"):
        assert not torch.equal(before[f"t.{name}"], after[f"t.{name}"])


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("where", ["head.prototypes", "ibot_head.prototypes", "gradient"])
def test_a_step_that_is_not_finite_leaves_every_bit(tiny, centering, where):
    config = replace(tiny, centering=centering)
    state = TrainState(config, CPU)
    train_step(state, *crops(config), config, at(0))
    if where != "gradient":
        with torch.no_grad():
            state.student.get_parameter(where)[0, 0] = torch.nan
    else:
        hook = state.student.backbone.cls_token.register_hook(lambda g: g * torch.inf)
    before = everything(state)
    metrics = train_step(state, *crops(config, 1), config, at(1))
    after = everything(state)
    assert metrics.skipped == 1
    if where != "gradient":
        before, after = ({k: v for k, v in d.items() if k != f"s.{where}"} for d in (before, after))
        assert np.isnan(metrics.loss)
        assert np.isnan(metrics.dino_loss if where == "head.prototypes" else metrics.ibot_loss)
    assert equal_bits(before, after)
    if where == "gradient":
        hook.remove()
        assert train_step(state, *crops(config, 1), config, at(1)).skipped == 0
        assert not equal_bits(before, everything(state))


def test_the_centres_move_with_softmax_alone_and_after_their_use(tiny):
    soft, sink = replace(tiny, centering="softmax"), tiny
    state, masks = TrainState(soft, CPU), step_masks(soft, 0, CPU)
    images = crops(soft)
    with torch.no_grad():
        teacher = state.teacher([normalise(images[0].flatten(0, 1))], masks)
    t = torch.softmax(teacher.patch_logits_MK / 0.05, -1)  # the centre of the first step is 0
    metrics = train_step(state, *images, soft, at(0))
    assert metrics.ibot_teacher_entropy == pytest.approx(-(t * t.log()).sum(1).mean().item(), rel=1e-4)
    torch.testing.assert_close(state.centre_K, 0.1 * teacher.logits_NK.mean(0))
    torch.testing.assert_close(state.ibot_centre_K, 0.1 * teacher.patch_logits_MK.mean(0))
    state = TrainState(sink, CPU)
    train_step(state, *crops(sink), sink, at(0))
    assert state.centre_K.abs().max() == state.ibot_centre_K.abs().max() == 0


@pytest.mark.parametrize("head", ["head", "ibot_head"])
def test_the_last_layer_stands_still_while_frozen(tiny, head):
    state = TrainState(tiny, CPU)
    before = everything(state)
    train_step(state, *crops(tiny), tiny, at(0, frozen=True))
    after = everything(state)
    assert torch.equal(before[f"s.{head}.prototypes"], after[f"s.{head}.prototypes"])
    assert not torch.equal(before[f"s.{head}.mlp.4.weight"], after[f"s.{head}.mlp.4.weight"])
    train_step(state, *crops(tiny), tiny, at(1))
    assert not torch.equal(before[f"s.{head}.prototypes"], everything(state)[f"s.{head}.prototypes"])


def test_gradients_are_clipped_module_by_module(tiny):
    config = replace(tiny, clip_norm=1e-3)
    state = TrainState(config, CPU)
    metrics = train_step(state, *crops(config), config, at(0))
    for module in (state.student.backbone, state.student.head, state.student.ibot_head):
        norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert metrics.grad_norm > 3e-3  # before clipping


def cross_entropy(t, z):
    return -(t * torch.log_softmax(z / 0.1, -1)).sum(-1)


def test_metrics_are_what_they_say(tiny):
    config = replace(tiny, ibot_weight=0.7, koleo_weight=0.3)
    state, masks = TrainState(config, CPU), step_masks(config, 0, CPU)
    globals_, locals_ = crops(config)
    with torch.no_grad():
        views = [normalise(x.flatten(0, 1)) for x in (globals_, locals_)]
        teacher, student = state.teacher(views[:1], masks), state.student(views, masks, hide=True)
    t, t_patch = sinkhorn_knopp(teacher.logits_NK, 0.05), sinkhorn_knopp(teacher.patch_logits_MK, 0.05)
    z_crops, t_crops = student.logits_NK.view(4, config.batch, -1), t.view(2, config.batch, -1)
    dino = torch.stack([cross_entropy(t_crops[g], z_crops[s]).mean() for s in range(4) for g in range(2) if s != g])
    crop = masks.rows_M // 16  # 4 x 4 patches a crop
    ce = cross_entropy(t_patch, student.patch_logits_MK)
    ibot = sum(ce[crop == c].mean() for c in crop.unique()) / (2 * config.batch)
    koleo = koleo_loss(student.cls_ND[:8]) + koleo_loss(student.cls_ND[8:16])  # each global crop with its own alone
    mean = torch.softmax(teacher.logits_NK / 0.05, -1).mean(0)
    metrics = train_step(state, globals_, locals_, config, at(0))
    assert metrics.dino_loss == pytest.approx(dino.mean().item(), rel=1e-5)
    assert metrics.ibot_loss == pytest.approx(ibot.item(), rel=1e-5)
    assert metrics.koleo_loss == pytest.approx(koleo.item(), rel=1e-5)
    assert metrics.loss == pytest.approx(metrics.dino_loss + 0.7 * metrics.ibot_loss + 0.3 * metrics.koleo_loss)
    assert metrics.teacher_entropy == pytest.approx(-torch.special.xlogy(t, t).sum(1).mean().item(), rel=1e-4)
    expected = -torch.special.xlogy(t_patch, t_patch).sum(1).mean().item()
    assert metrics.ibot_teacher_entropy == pytest.approx(expected, rel=1e-4)
    assert metrics.usage_perplexity == pytest.approx((-(mean * mean.log()).sum()).exp().item(), rel=1e-4)
    assert metrics.lr == 1e-3


def test_a_uniform_student_loses_ln_k_and_half_of_ln_k(tiny):
    state = TrainState(tiny, CPU)
    with torch.no_grad():
        state.student.head.prototypes.zero_()
        state.student.ibot_head.prototypes.zero_()
    metrics = train_step(state, *crops(tiny), tiny, at(0))
    assert metrics.dino_loss == pytest.approx(np.log(tiny.n_prototypes), rel=1e-5)
    assert metrics.ibot_loss == pytest.approx(np.log(tiny.ibot_prototypes) / 2, rel=1e-5)


def test_the_student_sees_masked_crops_once_the_teacher_whole_ones_and_the_heads_hidden_patches_alone(tiny):
    state, masks, seen = TrainState(tiny, CPU), step_masks(tiny, 3, CPU), []
    for who, encoder in (("teacher", state.teacher), ("student", state.student)):
        for part in ("backbone", "ibot_head"):
            name = f"{who} {part}"
            encoder.get_submodule(part).register_forward_pre_hook(lambda _, args, name=name: seen.append((name, *args)))
    train_step(state, *crops(tiny), tiny, at(3))
    assert [(call[0], len(call[1])) for call in seen] == [
        ("teacher backbone", 16), ("teacher ibot_head", len(masks.rows_M)), ("student backbone", 16),
        ("student backbone", 16), ("student ibot_head", len(masks.rows_M)),
    ]  # fmt: skip
    assert seen[0][2] is seen[3][2] is None  # the teacher's globals and the student's locals
    assert torch.equal(seen[2][2], masks.hidden_CP)
    with torch.no_grad():
        patches = TrainState(tiny, CPU).teacher.backbone(seen[0][1]).patches
    torch.testing.assert_close(seen[1][1], patches[masks.hidden_CP])  # row by row, crop by crop


def test_masks_are_keyed_by_seed_and_step(tiny):
    def hidden(step, seed=0):
        return step_masks(replace(tiny, seed=seed), step, CPU).hidden_CP

    assert torch.equal(hidden(5), hidden(5))
    assert not torch.equal(hidden(5), hidden(6))
    assert not torch.equal(hidden(5), hidden(5, seed=1))
    masks = step_masks(tiny, 5, CPU)
    assert masks.hidden_CP.shape == (16, 16)
    assert torch.equal(masks.rows_M, masks.hidden_CP.flatten().nonzero()[:, 0])
    assert masks.weight_M.sum() == pytest.approx(8)


def test_a_part_of_weight_zero_is_left_out(tiny):
    off = replace(tiny, ibot_weight=0.0, koleo_weight=0.0)
    state, other = TrainState(off, CPU), TrainState(replace(off, mask_ratio=(0.2, 0.3), ibot_prototypes=5), CPU)
    whole = TrainState(tiny, CPU)
    assert not [name for name in everything(state) if "ibot_head" in name]
    assert len(state.ibot_centre_K) == 0
    for name, value in everything(state).items():  # the rest starts as it does with iBOT
        assert name == "ibot_centre" or torch.equal(value, everything(whole)[name])
    metrics = train_step(state, *crops(off), off, at(0))
    assert metrics.loss == metrics.dino_loss
    assert np.isnan([metrics.ibot_loss, metrics.koleo_loss, metrics.ibot_teacher_entropy]).all()
    train_step(other, *crops(off), replace(off, mask_ratio=(0.2, 0.3), ibot_prototypes=5), at(0))
    assert equal_bits(everything(state), everything(other))
    koleo = train_step(TrainState(off, CPU), *crops(off), replace(off, koleo_weight=0.5), at(0))
    assert koleo.loss == pytest.approx(koleo.dino_loss + 0.5 * koleo.koleo_loss)
    assert np.isnan(koleo.ibot_loss)


def test_crops_of_one_size_go_through_together(tiny):
    encoder, seen = Encoder(tiny), []
    encoder.backbone.register_forward_pre_hook(lambda _, args: seen.append(args))
    a, b, c = torch.randn(4, 3, 32, 32), torch.randn(6, 3, 32, 32), torch.randn(2, 3, 16, 16)
    out = encoder([a, b, c])
    assert [call[0].shape for call in seen] == [(10, 3, 32, 32), (2, 3, 16, 16)]
    torch.testing.assert_close(out.logits_NK[10:], encoder([c]).logits_NK, atol=1e-5, rtol=1e-4)
    assert out.logits_NK.shape == (12, tiny.n_prototypes)
    assert out.cls_ND.shape == (12, tiny.width)
    assert out.patch_logits_MK is None
    seen.clear()
    masks = step_masks(replace(tiny, batch=2), 0, CPU)
    out = encoder([a, b, c], masks, hide=True)
    assert torch.equal(seen[0][1][:4], masks.hidden_CP)
    assert not seen[0][1][4:].any()
    assert seen[1][1] is None
    torch.testing.assert_close(out.patch_logits_MK, encoder([a], masks, hide=True).patch_logits_MK)


def test_every_parameter_is_in_one_group_with_its_rule(tiny):
    config = replace(tiny, layer_decay=0.5, weight_decay=0.1)
    encoder = Encoder(config)
    optimizer = make_optimizer(encoder, config)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())
    of = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert of["backbone.blocks.0.qkv.weight"]["lr_multiplier"] == 0.25
    assert of["backbone.blocks.0.qkv.weight"]["weight_decay"] == 0.1
    assert of["backbone.blocks.0.qkv.bias"]["weight_decay"] == of["backbone.cls_token"]["weight_decay"] == 0
    assert of["head.prototypes"]["last_layer"]
    assert of["ibot_head.prototypes"]["last_layer"]
    assert of["ibot_head.mlp.0.bias"]["weight_decay"] == 0
    assert of["ibot_head.mlp.0.bias"]["lr_multiplier"] == 1
    assert parameter_rules(encoder, config)["backbone.norm.weight"].lr_multiplier == 1


def test_init_gain_sets_the_deviation_of_matrices_alone(tiny):
    plain, scaled = Encoder(tiny), Encoder(replace(tiny, init_gain=0.8))
    for (name, p), q in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        if p.ndim == 2 and not name.endswith("prototypes"):
            assert q.std().item() == pytest.approx(0.8 / p.shape[1] ** 0.5, rel=0.1)
        else:
            assert torch.equal(p, q)


@pytest.mark.parametrize("field", ["drop_path", "rope_rescale"])
def test_random_parts_of_the_model_are_keyed_by_step(tiny, field):
    config = replace(tiny, **{field: {"drop_path": 0.4, "rope_rescale": 2.0}[field]})

    def loss(step):
        return train_step(TrainState(config, CPU), *crops(config), config, at(step)).loss

    assert loss(3) == loss(3)
    assert loss(3) != loss(4)


def test_without_local_crops_and_in_bfloat16(tiny):
    config = replace(tiny, n_local=0, precision="bfloat16")
    state = TrainState(config, CPU)
    metrics = train_step(state, *crops(config), config, at(0))
    assert np.isfinite(metrics.loss)
    assert metrics.skipped == 0
    assert {p.dtype for p in state.student.parameters()} == {torch.float32}
