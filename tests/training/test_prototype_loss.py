"""The losses a chunk at a time against the same on whole logits, ``training.losses``, which is the oracle here."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import training.prototype_loss as module
from training.losses import centred_softmax, dino_loss, entropy, ibot_loss, sinkhorn_knopp
from training.prototype_loss import (
    Targets,
    dino_prototype_loss,
    ibot_prototype_loss,
    mean_logits,
    mean_softmax,
    sinkhorn_offset,
)
from training.world import World

ALONE = World()
D, K = 7, 23


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype("f4"))


def units(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


@pytest.fixture(params=[1, 97, 300, 2**21])
def chunk(request, monkeypatch):
    """Logits at a time: a row, some rows with a rest, all at once."""
    monkeypatch.setitem(module.CHUNK, "cpu", request.param)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", 97)


def make_targets(n, k=K, temperature=0.06, seed=5):
    unit, weight = units(n, D, seed=seed), units(k, D, seed=seed + 1)
    return Targets(unit, weight, 0.3 * normal(k, seed=seed + 2), temperature)


def probabilities(targets):
    """float64 (N, K), by the formula in the module's first lines."""
    z = targets.unit_Nd.double() @ targets.weight_Kd.double().T
    return torch.softmax(z / targets.temperature + targets.offset_K.double(), dim=-1)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("s", "g"), [(2, 2), (10, 2), (4, 2), (3, 1), (2, 1)])
def test_dino_is_the_loss_of_whole_logits_and_so_are_its_gradients(chunk, s, g):
    b, targets = 5, make_targets(g * 5)
    x, w = units(s, b, D).requires_grad_(), normal(K, D, seed=1).requires_grad_()
    found = dino_prototype_loss(x, w, targets, 0.1)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    z64, t = x64 @ w64.T, probabilities(targets).view(g, b, K)
    pairs = [-(t[j] * F.log_softmax(z64[i] / 0.1, -1)).sum(-1).mean() for i in range(s) for j in range(g) if i != j]
    expected = torch.stack(pairs).mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert found.loss.item() == pytest.approx(dino_loss((x @ w.T).detach(), t.float(), 0.1).item(), rel=2e-6)
    assert found.entropy.item() == pytest.approx(-(t * t.log()).sum(-1).mean().item(), rel=2e-6)
    for ours, theirs in zip(gradients(found.loss, x, w), gradients(expected, x64, w64), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6 * scale)


def masked_weights():
    """Nine patches of three of four crops."""
    return torch.tensor([1 / 4] * 4 + [1 / 3] * 3 + [1 / 2] * 2), 4


def test_ibot_is_the_loss_of_whole_logits_and_so_are_its_gradients(chunk):
    weight, n_crops = masked_weights()
    targets = make_targets(9)
    x, w = units(9, D).requires_grad_(), normal(K, D, seed=1).requires_grad_()
    found = ibot_prototype_loss(x, w, targets, weight, n_crops, 0.2)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    t = probabilities(targets)
    ce = -(t * F.log_softmax(x64 @ w64.T / 0.2, -1)).sum(-1)
    expected = (ce * weight.double()).sum() / n_crops
    assert found.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert found.loss.item() == pytest.approx(ibot_loss((x @ w.T).detach(), t.float(), weight, 4, 0.2).item(), rel=2e-6)
    assert found.entropy.item() == pytest.approx(-(t * t.log()).sum(-1).mean().item(), rel=2e-6)
    for ours, theirs in zip(gradients(found.loss, x, w), gradients(expected, x64, w64), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6 * scale)


def test_gradients_are_differences_of_the_loss(small_chunks):
    """Along drawn directions, without autograd on either side; float32 holds some 1e-3 of such a slope."""
    targets = make_targets(10)
    x, w = units(4, 5, D), normal(K, D, seed=1)

    def loss(x, w):
        return dino_prototype_loss(x, w, targets, 0.1).loss

    grad_x, grad_w = gradients(loss(x.requires_grad_(), w.requires_grad_()), x, w)
    x, w = x.detach(), w.detach()
    for seed in range(5):
        dx, dw, h = normal(*x.shape, seed=seed), normal(*w.shape, seed=seed + 50), 1e-3
        slope = (loss(x + h * dx, w + h * dw) - loss(x - h * dx, w - h * dw)).item() / (2 * h)
        expected = ((grad_x * dx).sum() + (grad_w * dw).sum()).item()
        assert slope == pytest.approx(expected, rel=5e-3, abs=2e-3)


def test_the_gradient_that_comes_in_is_passed_on_and_adds_up(small_chunks):
    targets = make_targets(10)
    x, w = units(4, 5, D).requires_grad_(), normal(K, D, seed=1).requires_grad_()
    once = gradients(dino_prototype_loss(x, w, targets, 0.1).loss, x, w)
    (3 * dino_prototype_loss(x, w, targets, 0.1).loss).backward()
    dino_prototype_loss(x, w, targets, 0.1).loss.backward()
    torch.testing.assert_close([x.grad, w.grad], [4 * g for g in once])


def test_no_gradient_flows_into_the_targets(small_chunks):
    leaves = [tensor.requires_grad_() for tensor in make_targets(10)[:3]]
    x, w = units(4, 5, D).requires_grad_(), normal(K, D, seed=1).requires_grad_()
    found = dino_prototype_loss(x, w, Targets(*leaves, 0.06), 0.1)
    assert not found.entropy.requires_grad
    found.loss.backward()
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("n_iter", [1, 3, 20])
def test_sinkhorn_offset_gives_the_targets_of_sinkhorn_knopp(chunk, n_iter):
    unit, weight = units(31, D), units(K, D, seed=1)
    offset = sinkhorn_offset(unit, weight, 0.05, n_iter, ALONE)
    assert offset.dtype == torch.float32 and offset.shape == (K,)
    found = Targets(unit, weight, offset, 0.05).log_probabilities(slice(None), torch.float32).exp()
    torch.testing.assert_close(found, sinkhorn_knopp(unit @ weight.T, 0.05, n_iter), atol=2e-6, rtol=1e-5)


def test_sinkhorn_offset_is_finite_where_exp_is_not(small_chunks):
    unit, weight = units(31, D) * 3, units(K, D, seed=1) * 4
    assert (unit @ weight.T / 0.07).max() > 88.8  # where exp overflows float32
    offset = sinkhorn_offset(unit, weight, 0.07, 3, ALONE)
    found = Targets(unit, weight, offset, 0.07).log_probabilities(slice(None), torch.float32).exp()
    torch.testing.assert_close(found, sinkhorn_knopp(unit @ weight.T, 0.07), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.sum(1), torch.ones(31), atol=1e-5, rtol=0)


def test_a_centre_is_an_offset(chunk):
    unit, weight, centre = units(31, D), units(K, D, seed=1), 0.1 * normal(K, seed=2)
    targets = Targets(unit, weight, -centre / 0.05, 0.05)
    found = targets.log_probabilities(slice(3, 20), torch.float32).exp()
    torch.testing.assert_close(found, centred_softmax(unit[3:20] @ weight.T, centre, 0.05), atol=2e-6, rtol=1e-5)
    rows = torch.tensor([4, 4, 30])
    picked = targets.log_probabilities(rows, torch.float32).exp()
    torch.testing.assert_close(picked, centred_softmax(unit[rows] @ weight.T, centre, 0.05), atol=2e-6, rtol=1e-5)


def test_means_of_logits_and_of_their_softmax(chunk):
    unit, weight = units(31, D), normal(K, D, seed=1)
    torch.testing.assert_close(mean_logits(unit, weight, ALONE), (unit @ weight.T).mean(0))
    expected = torch.softmax(unit @ weight.T / 0.3, -1).mean(0)
    torch.testing.assert_close(mean_softmax(unit, weight, torch.zeros(len(weight)), 0.3, ALONE), expected)


def test_entropy_is_bounded_from_below_when_prototypes_outnumber_samples():
    """6.1: at balance no target is surer than ln(K / N)."""
    unit, weight = units(32, D), units(2048, D, seed=1)
    offset = sinkhorn_offset(unit, weight, 0.04, 30, ALONE)
    log_t = Targets(unit, weight, offset, 0.04).log_probabilities(slice(None), torch.float32)
    assert entropy(log_t.exp()).min() >= np.log(2048 / 32)


@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_bfloat16_products_are_near(small_chunks, kind):
    x, w = units(4, 10, D).requires_grad_(), units(K, D, seed=1).requires_grad_()
    weight, targets = torch.full((40,), 0.1), make_targets(20 if kind == "dino" else 40, temperature=0.1)

    def run(dtype):
        if kind == "dino":
            found = dino_prototype_loss(x, w, targets, 0.1, dtype)
        else:
            found = ibot_prototype_loss(x.flatten(0, 1), w, targets, weight, 4, 0.1, dtype)
        return found, gradients(found.loss, x, w)

    (exact, exact_grads), (near, near_grads) = run(torch.float32), run(torch.bfloat16)
    assert near.loss.dtype == near.entropy.dtype == torch.float32
    assert near.loss.item() == pytest.approx(exact.loss.item(), rel=5e-3)
    assert near.loss.item() != exact.loss.item()
    assert near.entropy.item() == pytest.approx(exact.entropy.item(), rel=5e-3)
    for ours, theirs in zip(near_grads, exact_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    offset = sinkhorn_offset(targets.unit_Nd, w.detach(), 0.05, 3, ALONE, torch.bfloat16)
    exact_offset = sinkhorn_offset(targets.unit_Nd, w.detach(), 0.05, 3, ALONE)
    assert 0 < (offset - exact_offset).abs().max() < 0.1  # a logit of 1 is off by up to 2 ** -9 / .05


def test_autocast_around_it_changes_nothing(small_chunks):
    targets = make_targets(10)
    x, w = units(4, 5, D).requires_grad_(), normal(K, D, seed=1).requires_grad_()
    plain = dino_prototype_loss(x, w, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = dino_prototype_loss(x, w, targets, 0.1)
    assert torch.equal(plain.loss, inside.loss)
    for ours, theirs in zip(gradients(plain.loss, x, w), gradients(inside.loss, x, w), strict=True):
        assert torch.equal(ours, theirs)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes, copies and views of parameters left out."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.numel = {x.shape for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return out


def largest(kind, n):
    """The largest tensor of a loss of n images or patches and 512 prototypes, with its gradients."""
    d, k = 4, 512
    x = units(2, n, d).requires_grad_() if kind == "dino" else units(n, d).requires_grad_()
    w = units(k, d, seed=1).requires_grad_()
    targets = Targets(units(2 * n if kind == "dino" else n, d), units(k, d), torch.zeros(k), 0.1)
    with Largest(w, w.T, x, targets.unit_Nd) as seen:
        if kind == "offset":
            sinkhorn_offset(targets.unit_Nd, targets.weight_Kd, 0.1, 3, ALONE)
        elif kind == "softmax":
            mean_softmax(targets.unit_Nd, targets.weight_Kd, targets.offset_K, 0.1, ALONE)
        elif kind == "logits":
            mean_logits(targets.unit_Nd, targets.weight_Kd, ALONE)
        elif kind == "dino":
            dino_prototype_loss(x, w, targets, 0.1).loss.backward()
        else:
            ibot_prototype_loss(x, w, targets, torch.full((n,), 1 / n), 1, 0.1).loss.backward()
    return seen.numel


@pytest.mark.parametrize("kind", ["dino", "ibot", "offset", "softmax", "logits"])
def test_no_tensor_grows_with_samples_times_prototypes(monkeypatch, kind):
    monkeypatch.setitem(module.CHUNK, "cpu", 4096)
    few, many = largest(kind, 100), largest(kind, 400)
    assert few == many <= 4096  # of 51,200 and 204,800 logits, or twice as many


def test_a_unit_that_is_not_finite_shows_in_the_loss(small_chunks):
    weight, n_crops = masked_weights()
    for bad in (torch.nan, torch.inf):
        x = units(4, 5, D)
        x[2, 1, 0] = bad
        assert dino_prototype_loss(x, normal(K, D), make_targets(10), 0.1).loss.isnan()
        x = units(9, D)
        x[3, 0] = bad
        assert ibot_prototype_loss(x, normal(K, D), make_targets(9), weight, n_crops, 0.1).loss.isnan()
        targets = make_targets(10)
        targets.unit_Nd[9, 0] = bad
        assert dino_prototype_loss(units(4, 5, D), normal(K, D), targets, 0.1).loss.isnan()
        assert sinkhorn_offset(targets.unit_Nd, targets.weight_Kd, 0.05, 3, ALONE).isnan().any()


def test_targets_of_no_mass_at_all_give_a_finite_entropy():
    """exp of a logit far below the largest is 0, and 0 ln 0 is 0."""
    targets = Targets(units(10, D) * 100, units(K, D, seed=1) * 100, torch.zeros(K), 0.01)
    found = dino_prototype_loss(units(2, 5, D), units(K, D), targets, 0.1)
    assert found.loss.isfinite() and 0 <= found.entropy < 1e-3


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"S >= max\(2, G\): got \(4, 5, 7\) and 11 samples"):
        dino_prototype_loss(units(4, 5, D), units(K, D), make_targets(11), 0.1)
    with pytest.raises(ValueError, match=r"got \(1, 5, 7\) and 5 samples"):
        dino_prototype_loss(units(1, 5, D), units(K, D), make_targets(5), 0.1)
    with pytest.raises(ValueError, match=r"got \(4, 5, 7\) and 0 samples"):
        dino_prototype_loss(units(4, 5, D), units(K, D), make_targets(0), 0.1)
    with pytest.raises(ValueError, match=r"got \(9, 7\), 8 samples, \(9,\) and 4"):
        ibot_prototype_loss(units(9, D), units(K, D), make_targets(8), masked_weights()[0], 4, 0.1)
    with pytest.raises(ValueError, match=r"got \(8, 7\), 8 samples, \(9,\) and 4"):
        ibot_prototype_loss(units(8, D), units(K, D), make_targets(8), masked_weights()[0], 4, 0.1)
    with pytest.raises(ValueError, match="n_crops >= 1"):
        ibot_prototype_loss(units(9, D), units(K, D), make_targets(9), masked_weights()[0], 0, 0.1)
    for temperature, n_iter in ((0, 3), (0.05, 0)):
        with pytest.raises(ValueError, match=f"n_iter >= 1: got {temperature} and {n_iter}"):
            sinkhorn_offset(units(5, D), units(K, D), temperature, n_iter, ALONE)


def test_no_patches_lose_nothing():
    x, w = torch.zeros(0, D, requires_grad=True), units(K, D).requires_grad_()
    found = ibot_prototype_loss(x, w, make_targets(0), torch.zeros(0), 4, 0.1)
    found.loss.backward()
    assert found.loss.item() == found.entropy.item() == 0
    assert (w.grad == 0).all()
