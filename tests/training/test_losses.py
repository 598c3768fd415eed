import math

import numpy as np
import pytest
import torch

from training.losses import (
    centred_softmax,
    dino_loss,
    effective_rank,
    entropy,
    ibot_loss,
    koleo_loss,
    next_centre,
    sinkhorn_knopp,
    usage_perplexity,
)
from training.masks import block_masks, mask_rng, patch_weights
from training.probes import rankme


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype("f4"))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sinkhorn_matrix_form(z, temperature, n_iter, dtype="f8"):
    """The published algorithm, in float64 and with a whole matrix."""
    q = np.exp(z.numpy().astype(dtype) / temperature).T
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


LN_K = [(4096, 8.317766), (8192, 9.010913), (65536, 11.090355), (98304, 11.495820), (131072, 11.783502),
        (262144, 12.476649)]  # fmt: skip


@pytest.mark.parametrize(("k", "ln_k"), LN_K, ids=[f"6.2 ln {k}" for k, _ in LN_K])
def test_a_uniform_student_loses_ln_k_for_any_target(k, ln_k):
    target = normal(2, 1, k).softmax(-1)
    assert dino_loss(torch.zeros(3, 1, k), target).item() == pytest.approx(ln_k, abs=2e-5)
    one_masked_crop_of_one = ibot_loss(torch.zeros(2, k), target[:, 0], torch.full((2,), 0.5), 1)
    assert one_masked_crop_of_one.item() == pytest.approx(ln_k, abs=2e-5)


def test_the_total_of_a_uniform_student_with_half_of_its_crops_masked():
    k, hidden = 65536, np.array([[True, True, True], [False, False, False]])
    target = normal(3, k).softmax(-1)
    ibot = ibot_loss(torch.zeros(3, k), target, torch.from_numpy(patch_weights(hidden)), len(hidden))
    total = dino_loss(torch.zeros(2, 1, k), target[:2, None]) + ibot
    assert total.item() == pytest.approx(16.635532, abs=2e-5)


def test_every_share_of_the_loss_of_a_uniform_student():
    """Of 2 global and 8 local crops and 65536 prototypes: what DINOv2 writes in its log, iBOT's half of its half."""
    k = 65536
    target = normal(2, 1, k).softmax(-1)
    of_globals = dino_loss(torch.zeros(2, 1, k), target).item() * 2 / 18
    total = dino_loss(torch.zeros(10, 1, k), target).item()
    assert of_globals == pytest.approx(1.232, abs=5e-4)
    assert total - of_globals == pytest.approx(9.858, abs=5e-4)
    ibot = ibot_loss(torch.zeros(2, k), target[:, 0], torch.full((2,), 0.5), 2).item()
    assert ibot / 2 == pytest.approx(2.773, abs=5e-4)


def ibot_by_hand(z, t, hidden, temperature):
    """The formula, crop by crop: every crop counts in the denominator, masked or not."""
    losses, first = [], 0
    for crop in hidden:
        n = crop.sum()
        log_p = np.log(softmax(z[first : first + n] / temperature))
        losses.append(-(t[first : first + n] * log_p).sum() / max(1, n))
        first += n
    return sum(losses) / len(hidden)


@pytest.mark.parametrize("seed", range(5))
def test_ibot_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_patches(seed):
    hidden = block_masks(10, 4, 4, mask_rng(0, seed), probability=0.5)
    z, t = normal(hidden.sum(), 9, seed=seed), normal(hidden.sum(), 9, seed=seed + 50).softmax(-1)
    loss = ibot_loss(z, t, torch.from_numpy(patch_weights(hidden)), 10, 0.2)
    assert loss.item() == pytest.approx(ibot_by_hand(z.numpy(), t.numpy(), hidden, 0.2), rel=1e-5)


def test_ibot_loss_is_at_least_the_entropy_and_its_gradient_the_difference():
    z, t = normal(5, 8).requires_grad_(), normal(5, 8, seed=1).softmax(-1).requires_grad_()
    weight = torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5])
    loss = ibot_loss(z, t, weight, 4)
    loss.backward()
    expected = (torch.softmax(z / 0.1, -1) - t) / 0.1 * weight[:, None] / 4
    torch.testing.assert_close(z.grad, expected.detach(), atol=1e-6, rtol=1e-5)
    assert t.grad is None
    least = (entropy(t.detach()) * weight).sum().item() / 4
    assert loss.item() > least
    same = (t.detach().log() * 0.1).requires_grad_()  # the student agrees with the teacher
    loss = ibot_loss(same, t, weight, 4)
    loss.backward()
    assert loss.item() == pytest.approx(least, rel=1e-6)
    assert same.grad.abs().max() < 1e-6


def test_ibot_loss_without_patches_is_zero():
    z = torch.zeros(0, 8, requires_grad=True)
    loss = ibot_loss(z, torch.zeros(0, 8), torch.zeros(0), 4)
    loss.backward()
    assert loss.item() == 0


def koleo_by_hand(x):
    x = x.astype("f8") / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    return -np.log(distance.min(axis=1)).mean()


@pytest.mark.parametrize("seed", range(5))
def test_koleo_is_the_mean_log_distance_to_the_nearest(seed):
    x = normal(20, 6, seed=seed)
    assert koleo_loss(x).item() == pytest.approx(koleo_by_hand(x.numpy()), rel=1e-5)
    assert koleo_loss(x[:2]).item() == pytest.approx(koleo_by_hand(x[:2].numpy()), rel=1e-5)


def polygon(n):
    angle = torch.arange(n) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize(
    ("rows", "value"),
    [
        (torch.eye(8), -0.346574),  # -ln(2) / 2
        (torch.tensor([[1.0, 2, 3], [-1, -2, -3]]), -math.log(2)),  # a pair of opposites: its own row is no neighbour
        (torch.tensor([[1.0, 0], [-1, 0]]), -math.log(2)),
        (torch.eye(16) - 1 / 16, -0.378843),  # simplex: -ln(2n / (n - 1)) / 2
        (polygon(3), -0.549306),  # -ln(2 sin(pi / n))
        (polygon(4), -0.346574),
        (polygon(8), 0.267400),
    ],
    ids=["6.2 orthonormal", "6.2 antipodal", "6.2 antipodal on axes", "6.2 simplex", "6.2 triangle", "6.2 square",
         "6.2 octagon"],
)  # fmt: skip
def test_koleo_golden(rows, value):
    assert koleo_loss(rows).item() == pytest.approx(value, abs=1e-6)


def test_koleo_knows_no_scale_rotation_or_order():
    x = normal(30, 5)
    expected, rotation = koleo_loss(x).item(), torch.linalg.qr(normal(5, 5, seed=1)).Q
    scale = torch.linspace(0.1, 10, 30)[:, None]
    for same in (x * scale, x @ rotation, x[torch.randperm(30)]):
        assert koleo_loss(same).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_of_copies_and_of_one_row_or_none_is_zero_with_a_zero_gradient(dtype):
    for rows in (torch.ones(6, 4), normal(1, 4), torch.ones(0, 4)):
        x = rows.to(dtype).requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        assert loss.item() == 0
        assert loss.dtype == torch.float32
        assert (x.grad == 0).all()


def test_a_pair_of_copies_adds_nothing_to_koleo():
    x = normal(10, 6)
    x[9] = x[8] * 2  # the same direction
    x.requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    others = x.detach()[:9].numpy()
    unit = others / np.linalg.norm(others, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert loss.item() == pytest.approx(-np.log(distance.min(axis=1)[:8]).sum() / 10, rel=1e-5)
    assert x.grad.abs().max() < 10  # not 3e4


def test_a_row_that_is_not_finite_shows_in_koleo():
    x = normal(4, 3)
    x[2, 1] = torch.nan
    assert koleo_loss(x).isnan()


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
    same = (t.detach()[[1, 0]].log() * 0.1).requires_grad_()  # each crop agrees with the teacher of the other
    loss = dino_loss(same, t)
    loss.backward()
    assert loss.item() == pytest.approx(entropy(t.detach()[:, 0]).mean().item(), rel=1e-6)
    assert same.grad.abs().max() < 1e-6


def test_losses_are_float32_for_half_inputs():
    z, t = normal(3, 2, 8).half(), normal(2, 2, 8).softmax(-1).half()
    assert dino_loss(z, t).dtype == torch.float32
    assert ibot_loss(z[0], t[0], torch.ones(2), 2).dtype == torch.float32
    assert koleo_loss(z[0]).dtype == torch.float32
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
    with pytest.raises(ValueError, match=r"got \(3, 8\), \(3, 8\), \(2,\) and 4"):
        ibot_loss(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(2), 4)
    with pytest.raises(ValueError, match=r"n_crops >= 1"):
        ibot_loss(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3), 0)


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
    np.testing.assert_allclose(out.numpy(), sinkhorn_matrix_form(z, 0.06, 3), atol=4e-7)
    assert 1.95 < out.sum(0).min() <= out.sum(0).max() < 2.03  # N / K is 2, reached in the limit
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
    torch.testing.assert_close(sinkhorn_knopp(z - z.max(), 0.05), out, atol=5e-6, rtol=0)
    shift = normal(12, seed=1) * 0.2  # of each prototype: the first scaling, which is of prototypes, takes it away
    torch.testing.assert_close(sinkhorn_knopp(z + shift, 0.05), out, atol=5e-6, rtol=0)
    np.testing.assert_allclose(sinkhorn_matrix_form(z + shift, 0.05, 3), sinkhorn_matrix_form(z, 0.05, 3), atol=1e-6)
    z = normal(20, 12)
    moved = sinkhorn_knopp(z - z.max(1, keepdim=True).values, 0.3) - sinkhorn_knopp(z, 0.3)
    assert moved.abs().max() > 1e-3  # why no sample's maximum is subtracted


def test_sinkhorn_is_finite_where_exp_is_not():
    z = normal(16, 8) * 3
    z[0, 0] = 7.0  # 7 / .07 = 100, exp overflows float32 from 88.7 on
    with np.errstate(all="ignore"):
        assert np.isnan(sinkhorn_matrix_form(z, 0.07, 3, "f4")).any()
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


@pytest.mark.parametrize(
    ("shape", "rank", "within"),
    [((1000, 64), 63.5, 0.3), ((1000, 384), 363, 2), ((5000, 384), 380, 1)],
    ids=["6.2 1000 x 64", "6.2 1000 x 384", "6.2 5000 x 384"],
)
def test_effective_rank_of_gaussians(shape, rank, within):
    x = normal(*shape)
    assert effective_rank(x).item() == pytest.approx(rank, abs=within)
    assert effective_rank(x).item() == pytest.approx(rankme(x.numpy()), rel=1e-5)


def test_effective_rank_of_one_direction_of_none_and_of_what_is_not_finite():
    one = normal(9, 1) * normal(1, 5, seed=1)
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.eye(7) * 3).item() == pytest.approx(7)
    for shape in ((3, 9), (9, 3)):
        assert 1 <= effective_rank(normal(*shape)).item() <= 3
    assert effective_rank(torch.zeros(4, 3)).isnan()
    for bad in (torch.nan, torch.inf):
        x = normal(4, 3)
        x[1, 1] = bad
        assert effective_rank(x).isnan()
    assert effective_rank(normal(20, 6).bfloat16()).dtype == torch.float32
