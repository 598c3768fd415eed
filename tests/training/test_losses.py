import math

import numpy as np
import pytest
import torch

from training.losses import centred_softmax, dino_loss, entropy, next_centre, sinkhorn_knopp, usage_perplexity


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype("f4"))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sinkhorn_matrix_form(z, temperature, n_iter):
    """The published algorithm, in float64 and with a whole matrix."""
    q = np.exp(z.numpy().astype("f8") / temperature).T
    q /= q.sum()
    for _ in range(n_iter):
        q /= q.sum(axis=1, keepdims=True) * len(q)
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_local", "n_global"), [(4, 2), (0, 2), (3, 1)])
def test_dino_loss_is_the_mean_over_pairs_of_crops(seed, n_local, n_global):
    z, t = normal(n_global + n_local, 6, 9, seed=seed), normal(n_global, 6, 9, seed=seed + 50).softmax(-1)
    pairs = [
        -(t[g].numpy() * np.log(softmax(z[s].numpy() / 0.1))).sum(-1).mean()
        for s in range(n_global + n_local)
        for g in range(n_global)
        if s != g
    ]
    assert dino_loss(z, t).item() == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize(("k", "ln_k"), [(4096, 8.317766), (8192, 9.010913), (65536, 11.090355)])
def test_a_uniform_student_loses_ln_k_for_any_target(k, ln_k):
    loss = dino_loss(torch.zeros(3, 2, k), normal(2, 2, k).softmax(-1))
    assert loss.item() == pytest.approx(ln_k, abs=2e-5)


def test_swapping_the_global_crops_changes_nothing():
    z, t = normal(5, 4, 8), normal(2, 4, 8, seed=1).softmax(-1)
    swapped = dino_loss(z[[1, 0, 2, 3, 4]], t[[1, 0]])
    assert swapped.item() == pytest.approx(dino_loss(z, t).item(), abs=1e-6)


def test_the_loss_is_at_least_the_entropy_of_the_targets_and_its_gradient_the_difference():
    z, t = normal(2, 1, 8).requires_grad_(), normal(2, 1, 8, seed=1).softmax(-1).requires_grad_()
    loss = dino_loss(z, t)
    loss.backward()
    expected = (torch.softmax(z / 0.1, -1) - t[[1, 0]]) / 0.1 / 2  # two pairs, one image
    torch.testing.assert_close(z.grad, expected.detach(), atol=1e-6, rtol=1e-5)
    assert t.grad is None
    assert loss.item() >= entropy(t.detach()[:, 0]).mean().item()


def test_losses_are_float32_for_half_inputs():
    z, t = normal(3, 2, 8).half(), normal(2, 2, 8).softmax(-1).half()
    assert dino_loss(z, t).dtype == torch.float32
    assert sinkhorn_knopp(z[0], 0.04).dtype == torch.float32
    assert centred_softmax(z[0], torch.zeros(8), 0.04).dtype == torch.float32
    assert next_centre(torch.zeros(8), z[0]).dtype == torch.float32


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"got \(3, 2, 8\) and \(2, 2, 9\)"):
        dino_loss(torch.zeros(3, 2, 8), torch.zeros(2, 2, 9))
    with pytest.raises(ValueError, match=r"S >= max\(2, G\)"):
        dino_loss(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="temperature > 0"):
        sinkhorn_knopp(torch.zeros(2, 2), 0)


TWO = [[1.0, 2.0], [1.0, 1.0]]
GOLDEN = {
    1: [[3 / 7, 4 / 7], [3 / 5, 2 / 5]],
    2: [[17 / 41, 24 / 41], [17 / 29, 12 / 29]],
    3: [[99 / 239, 140 / 239], [99 / 169, 70 / 169]],
}


@pytest.mark.parametrize("n_iter", [1, 2, 3])
def test_sinkhorn_golden_2x2(n_iter):
    out = sinkhorn_knopp(torch.tensor(TWO).log() * 0.05, 0.05, n_iter)
    torch.testing.assert_close(out, torch.tensor(GOLDEN[n_iter]), atol=1e-6, rtol=0)


def test_sinkhorn_golden_limit_and_2x3():
    limit = math.sqrt(2) / (1 + math.sqrt(2))
    assert sinkhorn_knopp(torch.tensor(TWO).log(), 1.0, 60)[0, 1].item() == pytest.approx(limit, abs=1e-6)
    out = sinkhorn_knopp(torch.tensor([[1.0, 2, 4], [4, 2, 1]]).log(), 1.0)
    torch.testing.assert_close(out, torch.tensor([[2 / 15, 1 / 3, 8 / 15], [8 / 15, 1 / 3, 2 / 15]]))


@pytest.mark.parametrize("seed", range(3))
def test_sinkhorn_vector_form_is_the_matrix_form(seed):
    z = normal(64, 32, seed=seed) * 0.06
    out = sinkhorn_knopp(z, 0.06)
    np.testing.assert_allclose(out.numpy(), sinkhorn_matrix_form(z, 0.06, 3), atol=2e-6)
    torch.testing.assert_close(out.sum(1), torch.ones(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(sinkhorn_knopp(z, 0.06, 40).sum(0), torch.full((32,), 2.0), atol=1e-4, rtol=0)


def test_sinkhorn_degenerate_inputs():
    torch.testing.assert_close(sinkhorn_knopp(torch.full((5, 7), 3.0), 0.04), torch.full((5, 7), 1 / 7))
    torch.testing.assert_close(sinkhorn_knopp(normal(1, 7), 0.04), torch.full((1, 7), 1 / 7))
    torch.testing.assert_close(sinkhorn_knopp(torch.eye(6) * 5, 0.04), torch.eye(6), atol=1e-6, rtol=0)


def test_sinkhorn_symmetries():
    z = normal(20, 12) * 0.1
    out, rows, cols = sinkhorn_knopp(z, 0.05), torch.randperm(20), torch.randperm(12)
    torch.testing.assert_close(sinkhorn_knopp(z[rows][:, cols], 0.05), out[rows][:, cols], atol=1e-6, rtol=0)
    torch.testing.assert_close(sinkhorn_knopp(z + 0.7, 0.05), out, atol=5e-6, rtol=0)
    z = normal(20, 12)
    moved = sinkhorn_knopp(z - z.max(1, keepdim=True).values, 0.3) - sinkhorn_knopp(z, 0.3)
    assert moved.abs().max() > 1e-3  # why no sample's maximum is subtracted


def test_sinkhorn_is_finite_where_exp_is_not():
    z = normal(16, 8) * 3
    z[0, 0] = 7.0  # 7 / .07 = 100, exp overflows float32 from 88.7 on
    out = sinkhorn_knopp(z, 0.07)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.sum(1), torch.ones(16), atol=1e-5, rtol=0)


def test_sinkhorn_entropy_bound_when_prototypes_outnumber_samples():
    z = normal(32, 2048) * 0.2
    assert entropy(sinkhorn_knopp(z, 0.04, 30)).min() >= math.log(2048 / 32)
    assert entropy(torch.softmax(z / 0.04, -1)).min() < math.log(2048 / 32)


def test_the_centre_follows_a_constant_and_leaves_the_old_one_alone():
    z = torch.tensor([[1.0, -2.0, 3.0], [3.0, -2.0, 1.0]])
    centre = start = torch.zeros(3)
    for n in range(1, 23):
        centre = next_centre(centre, z)
        torch.testing.assert_close(centre, (1 - 0.9**n) * z.mean(0), atol=1e-6, rtol=1e-5)
    assert (start == 0).all()
    assert centre[2].item() == pytest.approx(0.9015 * 2, abs=1e-3)


def test_centred_softmax_takes_the_centre_away():
    z, centre = normal(4, 6), normal(6, seed=3)
    expected = softmax((z.numpy() - centre.numpy()) / 0.07)
    np.testing.assert_allclose(centred_softmax(z, centre, 0.07).numpy(), expected, atol=1e-5)


def test_entropy_and_usage():
    assert entropy(torch.full((1, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.eye(4)).tolist() == [0, 0, 0, 0]
    assert usage_perplexity(torch.eye(4)).item() == pytest.approx(4)
    assert usage_perplexity(torch.eye(4)[[0, 0, 0]]).item() == pytest.approx(1)
