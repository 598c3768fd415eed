from dataclasses import replace

import numpy as np
import pytest
import torch

from training.augment import normalise
from training.config import HeadConfig
from training.encoder import Encoder, make_optimizer, parameter_rules
from training.losses import effective_rank, koleo_loss, sinkhorn_knopp
from training.train_step import StepSettings, TrainState, step_draws, step_masks, train_step

CPU = torch.device("cpu")


def crops(config, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((2, config.image_size), (config.n_local, config.local_size))
    return [torch.from_numpy(rng.integers(0, 256, (n, config.batch, s, s, 3), dtype=np.uint8)) for n, s in sizes]


def at(step, **options):
    settings = {"lr": 1e-3, "teacher_temperature": 0.05, "momentum": 0.9, "weight_decay": 0.04}
    return StepSettings(step, **{**settings, **options})


def logits(encoder, views, masks=None, hide=False):
    """CLS tokens, logits of them, and logits of the masked patches."""
    out = encoder(views, masks.hidden_CP if hide else None, masks and masks.rows_M)
    patches = None if masks is None else out.patch_unit_Md @ encoder.patch_head.weight().T
    return out.cls_ND, out.unit_Nd @ encoder.head.weight().T, patches


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
            expected = 0.9 * before[k] + 0.1 * after["s" + k[1:]]
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
        _, cls, patches = logits(state.teacher, [normalise(images[0].flatten(0, 1))], masks)
    t = torch.softmax(patches / 0.05, -1)  # the centre of the first step is 0
    metrics = train_step(state, *images, soft, at(0))
    assert metrics.ibot_teacher_entropy == pytest.approx(-(t * t.log()).sum(1).mean().item(), rel=1e-4)
    torch.testing.assert_close(state.centre_K, 0.1 * cls.mean(0))
    torch.testing.assert_close(state.ibot_centre_K, 0.1 * patches.mean(0))
    state = TrainState(sink, CPU)
    train_step(state, *crops(sink), sink, at(0))
    assert state.centre_K.abs().max() == state.ibot_centre_K.abs().max() == 0


@pytest.mark.parametrize("head", ["head", "ibot_head"])
def test_the_last_layer_stands_still_while_frozen(tiny, head):
    state = TrainState(tiny, CPU)
    before = everything(state)
    train_step(state, *crops(tiny), tiny, at(0, last_layer_frozen=True))
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
        teacher_cls, z_teacher, z_patch = logits(state.teacher, views[:1], masks)
        student_cls, z_student, z_student_patch = logits(state.student, views, masks, hide=True)
    t, t_patch = sinkhorn_knopp(z_teacher, 0.05), sinkhorn_knopp(z_patch, 0.05)
    z_crops, t_crops = z_student.view(4, config.batch, -1), t.view(2, config.batch, -1)
    dino = torch.stack([cross_entropy(t_crops[g], z_crops[s]).mean() for s in range(4) for g in range(2) if s != g])
    crop = masks.rows_M // 16  # 4 x 4 patches a crop
    ce = cross_entropy(t_patch, z_student_patch)
    ibot = sum(ce[crop == c].mean() for c in crop.unique()) / (2 * config.batch)
    koleo = koleo_loss(student_cls[:8]) + koleo_loss(student_cls[8:16])  # each global crop with its own alone
    mean = torch.softmax(z_teacher / 0.05, -1).mean(0)
    metrics = train_step(state, globals_, locals_, config, at(0))
    assert metrics.dino_loss == pytest.approx(dino.mean().item(), rel=1e-5)
    assert metrics.ibot_loss == pytest.approx(ibot.item(), rel=1e-5)
    assert metrics.koleo_loss == pytest.approx(koleo.item(), rel=1e-5)
    assert metrics.loss == pytest.approx(metrics.dino_loss + 0.7 * metrics.ibot_loss + 0.3 * metrics.koleo_loss)
    assert metrics.teacher_entropy == pytest.approx(-torch.special.xlogy(t, t).sum(1).mean().item(), rel=1e-4)
    expected = -torch.special.xlogy(t_patch, t_patch).sum(1).mean().item()
    assert metrics.ibot_teacher_entropy == pytest.approx(expected, rel=1e-4)
    assert metrics.usage_perplexity == pytest.approx((-(mean * mean.log()).sum()).exp().item(), rel=1e-4)
    cosine = torch.cosine_similarity(teacher_cls[:8], teacher_cls[8:]).mean().item()
    assert metrics.crop_similarity == pytest.approx(cosine, rel=1e-5)
    assert metrics.rank == pytest.approx(effective_rank(teacher_cls[:8]).item(), rel=1e-4)
    assert metrics.lr == 1e-3


def test_a_uniform_student_loses_ln_k_and_half_of_ln_k(tiny):
    state = TrainState(tiny, CPU)
    with torch.no_grad():
        state.student.head.prototypes.zero_()
        state.student.ibot_head.prototypes.zero_()
    metrics = train_step(state, *crops(tiny), tiny, at(0))
    assert metrics.dino_loss == pytest.approx(np.log(tiny.head.prototypes), rel=1e-5)
    assert metrics.ibot_loss == pytest.approx(np.log(tiny.ibot_head.prototypes) / 2, rel=1e-5)


def test_the_student_sees_masked_crops_once_the_teacher_whole_ones_and_the_heads_hidden_patches_alone(tiny):
    state, masks, seen = TrainState(tiny, CPU), step_masks(tiny, 3, CPU), []
    for who, encoder in (("teacher", state.teacher), ("student", state.student)):
        real = encoder.backbone.forward_views
        encoder.backbone.forward_views = lambda *args, who=who, real=real: seen.append((who, *args)) or real(*args)
        head = encoder.ibot_head.mlp
        head.register_forward_pre_hook(lambda _, args, who=who: seen.append((f"{who} ibot_head", *args)))
    train_step(state, *crops(tiny), tiny, at(3))
    assert [call[0] for call in seen] == ["teacher", "teacher ibot_head", "student", "student ibot_head"]
    assert [len(view) for view in seen[0][1]] == [16]
    assert [len(view) for view in seen[2][1]] == [16, 16]
    assert seen[0][2] == [None]
    assert torch.equal(seen[2][2][0], masks.hidden_CP) and seen[2][2][1] is None  # locals are whole
    with torch.no_grad():
        patches = TrainState(tiny, CPU).teacher.backbone(seen[0][1][0]).patches
    torch.testing.assert_close(seen[1][1], patches[masks.hidden_CP])  # row by row, crop by crop
    assert len(seen[3][1]) == len(masks.rows_M)


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
    unread = {"mask_ratio": (0.2, 0.3), "ibot_head": HeadConfig(prototypes=5)}
    state, other = TrainState(off, CPU), TrainState(replace(off, **unread), CPU)
    whole = TrainState(tiny, CPU)
    assert not [name for name in everything(state) if "ibot_head" in name]
    assert len(state.ibot_centre_K) == 0
    for name, value in everything(state).items():  # the rest starts as it does with iBOT
        assert name == "ibot_centre" or torch.equal(value, everything(whole)[name])
    metrics = train_step(state, *crops(off), off, at(0))
    assert metrics.loss == metrics.dino_loss
    assert np.isnan([metrics.ibot_loss, metrics.koleo_loss, metrics.ibot_teacher_entropy]).all()
    train_step(other, *crops(off), replace(off, **unread), at(0))
    assert equal_bits(everything(state), everything(other))
    koleo = train_step(TrainState(off, CPU), *crops(off), replace(off, koleo_weight=0.5), at(0))
    assert koleo.loss == pytest.approx(koleo.dino_loss + 0.5 * koleo.koleo_loss)
    assert np.isnan(koleo.ibot_loss)


def test_every_parameter_is_in_one_group_with_its_rule(tiny):
    config = replace(tiny, layer_decay=0.5, weight_decay=0.1)
    encoder = Encoder(config)
    optimizer = make_optimizer(encoder, config)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())
    of = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert of["backbone.blocks.0.qkv.weight"]["rule"].lr_multiplier == 0.25
    assert of["backbone.blocks.0.qkv.weight"]["weight_decay"] == 0.1
    assert of["backbone.blocks.0.qkv.bias"]["weight_decay"] == of["backbone.cls_token"]["weight_decay"] == 0
    assert of["head.prototypes"]["rule"].last_layer
    assert of["ibot_head.prototypes"]["rule"].last_layer
    assert of["ibot_head.mlp.0.bias"]["weight_decay"] == 0
    assert of["ibot_head.mlp.0.bias"]["rule"].lr_multiplier == 1
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
    config = replace(tiny, vit=replace(tiny.vit, **{field: {"drop_path": 0.4, "rope_rescale": 2.0}[field]}))

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


def close(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


RANDOM = {"drop_path": 0.3, "rope_rescale": 2.0}  # of the vit, whatever else is drawn at random


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_micro_batches_have_the_meaning_of_the_whole_batch(tiny, centering):
    config = replace(tiny, batch=16, group=4, koleo_group=2, centering=centering, vit=replace(tiny.vit, **RANDOM))
    states = [TrainState(config, CPU) for _ in range(3)]
    for step in range(2):
        metrics = [
            train_step(state, *crops(config, step), config, at(step), micro)
            for state, micro in zip(states, (None, 8, 4), strict=True)
        ]
        for other in metrics[1:]:
            np.testing.assert_allclose(np.array(other), np.array(metrics[0]), rtol=2e-4)
    moments = {k: v for k, v in everything(states[0]).items() if not k.endswith("step")}
    for state in states[1:]:
        close(moments, everything(state), rtol=2e-3, atol=2e-5)


def test_a_micro_batch_of_parts_of_groups_is_refused(tiny):
    with pytest.raises(ValueError, match=r"in whole groups of train.group \(8\): got 4"):
        train_step(TrainState(tiny, CPU), *crops(tiny), tiny, at(0), 4)


def test_draws_of_some_images_are_those_of_the_whole_step(tiny):
    config = replace(tiny, batch=12, group=4, vit=replace(tiny.vit, **RANDOM))
    vit = TrainState(config, CPU).student.backbone
    whole, part = (step_draws(config, vit, 5, images) for images in ((0, 12), (4, 12)))
    for view, n_crops in enumerate((2, config.n_local)):
        assert whole[view].rope_scales == part[view].rope_scales
        taken = torch.zeros(2, 2, 2, n_crops * 12).scatter_(-1, whole[view].kept[None], 1)[0]
        some = torch.zeros(2, 2, 2, n_crops * 8).scatter_(-1, part[view].kept[None], 1)[0]
        assert torch.equal(taken.unflatten(-1, (n_crops, 12))[..., 4:], some.unflatten(-1, (n_crops, 8)))
        assert taken.unflatten(-1, (n_crops, 3, 4)).sum((2, 4)).unique().tolist() == [int(n_crops * 4 * 0.7 + 1e-6)]


def test_one_head_may_serve_cls_and_patches(tiny):
    config = replace(tiny, ibot_head=None)
    state = TrainState(config, CPU)
    assert state.student.ibot_head is None and len(state.ibot_centre_K) == config.head.prototypes
    metrics = train_step(state, *crops(config), config, at(0))
    assert metrics.ibot_loss > 0 and metrics.skipped == 0
    apart = TrainState(replace(tiny, ibot_head=tiny.head), CPU)
    apart.student.ibot_head.load_state_dict(apart.student.head.state_dict())
    apart.teacher.ibot_head.load_state_dict(apart.teacher.head.state_dict())
    assert train_step(apart, *crops(config), replace(tiny, ibot_head=tiny.head), at(0)).loss == metrics.loss


def test_koleo_of_the_papers_is_of_the_first_crop_alone(tiny):
    both, first = (
        train_step(TrainState(tiny, CPU), *crops(tiny), replace(tiny, koleo_crops=n), at(0)).koleo_loss for n in (2, 1)
    )
    state, masks = TrainState(tiny, CPU), step_masks(tiny, 0, CPU)
    cls = state.student([normalise(crops(tiny)[0].flatten(0, 1))], masks.hidden_CP).cls_ND
    assert first == pytest.approx(koleo_loss(cls[:8]).item(), rel=1e-5)
    assert both == pytest.approx((koleo_loss(cls[:8]) + koleo_loss(cls[8:])).item(), rel=1e-5)


def test_gradients_may_be_clipped_parameter_by_parameter(tiny):
    config = replace(tiny, clip_norm=1e-4, clip="parameter")
    state = TrainState(config, CPU)
    train_step(state, *crops(config), config, at(0))
    norms = [p.grad.norm().item() for p in state.student.parameters() if p.grad is not None]
    assert max(norms) == pytest.approx(1e-4, rel=1e-3)
    assert sum(abs(n - 1e-4) < 1e-7 for n in norms) > 5


def test_a_frozen_backbone_stands_still_while_heads_learn(tiny):
    state = TrainState(tiny, CPU)
    before = everything(state)
    train_step(state, *crops(tiny), tiny, at(0, backbone_frozen=True))
    after = everything(state)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("s.backbone."))
    assert not torch.equal(before["s.head.mlp.0.weight"], after["s.head.mlp.0.weight"])


def test_decay_follows_its_schedule(tiny):
    decayed, free = (TrainState(tiny, CPU) for _ in range(2))
    train_step(decayed, *crops(tiny), tiny, at(0, weight_decay=0.5, lr=0.1))
    train_step(free, *crops(tiny), tiny, at(0, weight_decay=0.0, lr=0.1))
    start = TrainState(tiny, CPU).student
    for (name, a), b in zip(decayed.student.named_parameters(), free.student.parameters(), strict=True):
        lost = 0.05 if a.ndim in (2, 4) else 0  # matrices and the patch embedding alone
        torch.testing.assert_close(b - a, lost * start.get_parameter(name).detach(), rtol=1e-3, atol=1e-6)


def test_trained_lengths_of_prototypes_stand_still_with_them(tiny):
    config = replace(tiny, head=replace(tiny.head, norm="trained"))
    state = TrainState(config, CPU)
    before = everything(state)
    train_step(state, *crops(config), config, at(0, last_layer_frozen=True))
    for name in ("s.head.prototypes", "s.head.lengths", "s.ibot_head.prototypes"):
        assert torch.equal(before[name], everything(state)[name])
    train_step(state, *crops(config), config, at(1))
    assert not torch.equal(before["s.head.lengths"], everything(state)["s.head.lengths"])


def test_bfloat16_is_near_float32(tiny):
    gradients, measured = [], []
    for precision in ("float32", "bfloat16"):
        config = replace(tiny, precision=precision, init_gain=1.0)
        state = TrainState(config, CPU)
        measured.append(train_step(state, *crops(config), config, at(0)))
        gradients.append(torch.cat([p.grad.flatten() for p in state.student.parameters()]))
    for name in ("loss", "dino_loss", "ibot_loss", "koleo_loss", "teacher_entropy", "usage_perplexity"):
        assert getattr(measured[1], name) == pytest.approx(getattr(measured[0], name), rel=0.01), name
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


def test_gradients_are_of_the_mean_whatever_the_micro_batches(tiny):
    config = replace(tiny, batch=16, group=4, clip_norm=1e9)
    grads = []
    for micro in (None, 8, 4):
        state = TrainState(config, CPU)
        train_step(state, *crops(config), config, at(0), micro)
        grads.append(torch.cat([p.grad.flatten() for p in state.student.parameters()]))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-6)
