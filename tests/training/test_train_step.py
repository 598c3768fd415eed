from dataclasses import replace

import numpy as np
import pytest
import torch

from training.losses import sinkhorn_knopp
from training.train_step import Encoder, StepSettings, TrainState, make_optimizer, parameter_rules, train_step

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
    return {k: v.clone() for k, v in (out | {"centre": state.centre_K}).items()}


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
    assert not torch.equal(before["t.backbone.cls_token"], after["t.backbone.cls_token"])
    assert not torch.equal(before["t.head.prototypes"], after["t.head.prototypes"])


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_step_that_is_not_finite_leaves_every_bit(tiny, centering, where):
    config = replace(tiny, centering=centering)
    state = TrainState(config, CPU)
    train_step(state, *crops(config), config, at(0))
    if where == "weight":
        with torch.no_grad():
            state.student.head.prototypes[0, 0] = torch.nan
    else:
        hook = state.student.backbone.cls_token.register_hook(lambda g: g * torch.inf)
    before = everything(state)
    metrics = train_step(state, *crops(config, 1), config, at(1))
    after = everything(state)
    assert metrics.skipped == 1
    if where == "weight":
        before, after = ({k: v for k, v in d.items() if k != "s.head.prototypes"} for d in (before, after))
        assert np.isnan(metrics.loss)
    assert equal_bits(before, after)
    if where == "gradient":
        hook.remove()
        assert train_step(state, *crops(config, 1), config, at(1)).skipped == 0
        assert not equal_bits(before, everything(state))


def test_the_centre_moves_with_softmax_alone_and_after_its_use(tiny):
    soft, sink = replace(tiny, centering="softmax"), tiny
    state = TrainState(soft, CPU)
    train_step(state, *crops(soft), soft, at(0))
    assert state.centre_K.abs().max() > 0
    state = TrainState(sink, CPU)
    train_step(state, *crops(sink), sink, at(0))
    assert state.centre_K.abs().max() == 0


def test_the_last_layer_stands_still_while_frozen(tiny):
    state = TrainState(tiny, CPU)
    before = everything(state)
    train_step(state, *crops(tiny), tiny, at(0, frozen=True))
    after = everything(state)
    assert torch.equal(before["s.head.prototypes"], after["s.head.prototypes"])
    assert not torch.equal(before["s.head.mlp.4.weight"], after["s.head.mlp.4.weight"])
    train_step(state, *crops(tiny), tiny, at(1))
    assert not torch.equal(before["s.head.prototypes"], everything(state)["s.head.prototypes"])


def test_gradients_are_clipped_module_by_module(tiny):
    config = replace(tiny, clip_norm=1e-3)
    state = TrainState(config, CPU)
    metrics = train_step(state, *crops(config), config, at(0))
    for module in (state.student.backbone, state.student.head):
        norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert metrics.grad_norm > 2e-3  # before clipping


def test_metrics_are_what_they_say(tiny):
    state = TrainState(tiny, CPU)
    globals_, locals_ = crops(tiny)
    from training.augment import normalise

    with torch.no_grad():
        views = [normalise(x.flatten(0, 1)) for x in (globals_, locals_)]
        z_t, z_s = state.teacher(views[:1]), state.student(views)
    t = sinkhorn_knopp(z_t, 0.05)
    log_p = torch.log_softmax(z_s.view(4, tiny.batch, -1) / 0.1, -1)
    t_crops = t.view(2, tiny.batch, -1)
    pairs = [-(t_crops[g] * log_p[s]).sum(-1).mean() for s in range(4) for g in range(2) if s != g]
    mean = torch.softmax(z_t / 0.05, -1).mean(0)
    metrics = train_step(state, globals_, locals_, tiny, at(0))
    assert metrics.loss == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    assert metrics.teacher_entropy == pytest.approx(-(t * t.clamp(min=1e-30).log()).sum(1).mean().item(), rel=1e-4)
    assert metrics.usage_perplexity == pytest.approx((-(mean * mean.log()).sum()).exp().item(), rel=1e-4)
    assert metrics.lr == 1e-3


def test_crops_of_one_size_go_through_together(tiny):
    encoder, seen = Encoder(tiny), []
    encoder.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    a, b, c = torch.randn(4, 3, 32, 32), torch.randn(6, 3, 32, 32), torch.randn(2, 3, 16, 16)
    out = encoder([a, b, c])
    assert seen == [(10, 3, 32, 32), (2, 3, 16, 16)]
    torch.testing.assert_close(out[10:], encoder([c]), atol=1e-5, rtol=1e-4)
    assert out.shape == (12, tiny.n_prototypes)


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
    assert parameter_rules(encoder, config)["backbone.norm.weight"].lr_multiplier == 1


def test_init_gain_sets_the_deviation_of_matrices_alone(tiny):
    plain, scaled = Encoder(tiny), Encoder(replace(tiny, init_gain=0.8))
    for (name, p), q in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        if p.ndim == 2 and name != "head.prototypes":
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
