"""Cross-entropy against K prototypes without holding all logits: the losses of DINO and iBOT, a chunk at a time.

A logit is the product of a bottleneck vector of a few hundred channels and a prototype, so the vectors are kept and
logits are made where they are needed: N x K numbers never lie in memory, and accumulated micro-batches can be balanced
together. The values are those of ``training.losses`` but for rounding.

The teacher's targets are softmax(z / temperature + offset) for both rules: a running centre c has the offset
-c / temperature; Sinkhorn-Knopp in its vector form is t = exp(z / temperature + a_k + d_n), and its last step, which
gives every sample mass 1, makes of exp(... + d_n) just that softmax, with the offset a.

Legend: ``N`` samples, ``S`` student crops, ``G`` teacher crops, ``B`` images (or patches), ``K`` prototypes, ``d``
channels of the bottleneck.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.world import World

CHUNK = {"cpu": 2**21, "cuda": 2**26}  # logits at a time; 8 MB fit a cache, a GPU is busy with 256 MB


class Targets(NamedTuple):
    """The teacher's targets of N samples, not made yet."""

    unit_Nd: Tensor  # bottleneck vectors, of length 1
    weight_Kd: Tensor  # prototypes, as the head uses them
    offset_K: Tensor  # float32
    temperature: float

    def log_probabilities(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Of some samples, float32 (n, K); products in ``dtype``."""
        z_nK = _logits(self.unit_Nd[rows], self.weight_Kd, dtype)
        return torch.log_softmax(z_nK.div_(self.temperature).add_(self.offset_K), dim=-1)


class PrototypeLoss(NamedTuple):
    """A loss and what was seen on the way, float32 scalars."""

    loss: Tensor  # nats
    entropy: Tensor  # nats, mean over the targets; no gradient


@torch.no_grad()
def sinkhorn_offset(
    unit_Nd: Tensor,
    weight_Kd: Tensor,
    temperature: float,
    n_iter: int,
    world: World,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The offset float32 (K,) with which targets use all prototypes equally, over the samples of all processes.

    See ``training.losses.sinkhorn_knopp``, which it equals in log space. Makes the logits ``n_iter`` times; holds one
    chunk of them. Raises ValueError when temperature or n_iter is not positive.
    """
    if temperature <= 0 or n_iter < 1:
        raise ValueError(f"sinkhorn_offset needs temperature > 0 and n_iter >= 1: got {temperature} and {n_iter}")
    log_k, log_n = math.log(len(weight_Kd)), math.log(max(1, world.total(len(unit_Nd))))
    a_K, weight_Kd = torch.zeros(len(weight_Kd), device=unit_Nd.device), weight_Kd.to(dtype)
    for iteration in range(n_iter):
        mass_K = torch.full_like(a_K, -torch.inf)  # log of what each prototype has
        for rows in _slices(len(unit_Nd), len(weight_Kd), unit_Nd.device):
            x_nK = _logits(unit_Nd[rows], weight_Kd, dtype).div_(temperature)
            if iteration:
                x_nK -= (torch.logsumexp(x_nK + a_K, dim=1) + log_n)[:, None]
            mass_K = torch.logaddexp(mass_K, torch.logsumexp(x_nK, dim=0))
        a_K = -world.logsumexp(mass_K) - log_k
    return a_K


@torch.no_grad()
def mean_logits(unit_Nd: Tensor, weight_Kd: Tensor, world: World) -> Tensor:
    """The mean logit of each prototype over the samples of all processes, float32 (K,): a product of means."""
    total_d = world.sum(unit_Nd.float().sum(dim=0))
    return weight_Kd.float() @ (total_d / max(1, world.total(len(unit_Nd))))


@torch.no_grad()
def mean_softmax(
    unit_Nd: Tensor,
    weight_Kd: Tensor,
    offset_K: Tensor,
    temperature: float,
    world: World,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """How much each prototype is used: mean of softmax(z / temperature + offset), float32 (K,)."""
    used_K, weight_Kd = torch.zeros(len(weight_Kd), device=unit_Nd.device), weight_Kd.to(dtype)
    for rows in _slices(len(unit_Nd), len(weight_Kd), unit_Nd.device):
        x_nK = _logits(unit_Nd[rows], weight_Kd, dtype).div_(temperature).add_(offset_K)
        used_K += torch.softmax(x_nK, dim=-1).sum(dim=0)
    return world.sum(used_K) / max(1, world.total(len(unit_Nd)))


def dino_prototype_loss(
    unit_SBd: Tensor, weight_Kd: Tensor, targets: Targets, temperature: float, dtype: torch.dtype = torch.float32
) -> PrototypeLoss:
    """``losses.dino_loss`` of bottleneck vectors: every student crop against every other teacher crop.

    unit_SBd, weight_Kd: of the student, with gradients; targets: of the G * B teacher crops, crop by crop, of which the
    student's first G are the same. The gradients are made with the loss, chunk by chunk, so that nothing is made twice:
    one product of the teacher's logits and three of the student's. Holds some five chunks and a gradient of both.
    Raises ValueError when the shapes do not fit.
    """
    s, b = unit_SBd.shape[:2]
    g = len(targets.unit_Nd) // max(1, b)
    if len(targets.unit_Nd) != g * b or s < max(2, g) or g < 1:
        raise ValueError(
            f"dino_prototype_loss needs (S, B, d) and targets of G * B samples with S >= max(2, G): "
            f"got {tuple(unit_SBd.shape)} and {len(targets.unit_Nd)} samples"
        )
    pair_SG = 1 - torch.eye(s, g, device=unit_SBd.device)
    pair_SG /= s * g - g
    weight_B = torch.full((b,), 1 / b, device=unit_SBd.device)
    return _run(unit_SBd, weight_Kd, targets, pair_SG, weight_B, temperature, dtype)


def ibot_prototype_loss(
    unit_Md: Tensor,
    weight_Kd: Tensor,
    targets: Targets,
    weight_M: Tensor,
    n_crops: int,
    temperature: float,
    dtype: torch.dtype = torch.float32,
) -> PrototypeLoss:
    """``losses.ibot_loss`` of bottleneck vectors: the student at each masked patch against the teacher there.

    weight_M: 1 over the masked patches of the patch's crop; n_crops: what the weighted sum is divided by. Otherwise as
    ``dino_prototype_loss``.
    """
    if unit_Md.shape[:1] != weight_M.shape or len(targets.unit_Nd) != len(unit_Md) or n_crops < 1:
        raise ValueError(
            f"ibot_prototype_loss needs (M, d), targets of M samples, weights (M,) and n_crops >= 1: "
            f"got {tuple(unit_Md.shape)}, {len(targets.unit_Nd)} samples, {tuple(weight_M.shape)} and {n_crops}"
        )
    pair_11 = torch.ones(1, 1, device=unit_Md.device)
    return _run(unit_Md[None], weight_Kd, targets, pair_11, weight_M.float() / n_crops, temperature, dtype)


def _run(
    unit_SBd: Tensor,
    weight_Kd: Tensor,
    targets: Targets,
    pair_SG: Tensor,
    weight_B: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> PrototypeLoss:
    # Inside a Function autocast would cast again what is cast here already.
    with torch.autocast(unit_SBd.device.type, enabled=False):
        args = (unit_SBd.float(), weight_Kd.float(), targets, pair_SG, weight_B, temperature, dtype)
        loss, entropy = _CrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
    return PrototypeLoss(loss, entropy)


class _CrossEntropy(torch.autograd.Function):
    """sum_b weight_b sum_sg pair_sg CE(t_gb, s_sb), whose gradients come with it."""

    @staticmethod
    def forward(
        ctx: Any,
        unit_SBd: Tensor,
        weight_Kd: Tensor,
        targets: Targets,
        pair_SG: Tensor,
        weight_B: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        (s, b, d), g = unit_SBd.shape, pair_SG.shape[1]
        rows_GB = torch.arange(g * b, device=unit_SBd.device).view(g, b)
        grad_x, grad_w = torch.empty_like(unit_SBd), torch.zeros_like(weight_Kd)
        w16, loss, entropy = weight_Kd.to(dtype), unit_SBd.new_zeros(()), unit_SBd.new_zeros(())
        mass_S1 = pair_SG.sum(dim=1)[:, None]
        targets = targets._replace(weight_Kd=targets.weight_Kd.to(dtype))
        for chunk in _slices(b, s * len(weight_Kd), unit_SBd.device):
            log_t = targets.log_probabilities(rows_GB[:, chunk].flatten(), dtype)
            t_GbK = log_t.exp()
            entropy -= (t_GbK * log_t).sum()
            q_SbK = (pair_SG @ t_GbK.view(g, -1)).view(s, -1, len(weight_Kd))
            x_nd = unit_SBd[:, chunk].reshape(-1, d).to(dtype)
            z_SbK = F.linear(x_nd, w16).float().div_(temperature).view(q_SbK.shape)
            lse_Sb = torch.logsumexp(z_SbK, dim=-1)
            ce_Sb = mass_S1 * lse_Sb - (q_SbK * z_SbK).sum(dim=-1)
            loss += (ce_Sb * weight_B[chunk]).sum()
            # d CE / d z = (mass softmax(z) - q) / temperature
            slope = z_SbK.sub_(lse_Sb[..., None]).exp_().mul_(mass_S1[..., None]).sub_(q_SbK)
            slope.mul_((weight_B[chunk] / temperature)[:, None])
            slope_nK = slope.flatten(0, 1).to(dtype)
            grad_x[:, chunk] = (slope_nK @ w16).float().view(s, -1, d)
            grad_w += slope_nK.T @ x_nd
        ctx.save_for_backward(grad_x, grad_w)
        entropy = entropy / max(1, g * b)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grads[0], grad_w * grads[0], None, None, None, None, None


def _logits(unit_nd: Tensor, weight_Kd: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 (n, K), products in ``dtype``; a tensor of its own, to be changed in place."""
    z_nK = F.linear(unit_nd.to(dtype), weight_Kd.to(dtype))
    return z_nK if z_nK.dtype == torch.float32 else z_nK.float()


def _slices(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """0..n in pieces of some ``CHUNK`` / width rows."""
    step = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // width)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))
