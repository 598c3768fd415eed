"""The losses of DINO, iBOT and KoLeo, the teacher's targets, and what tells a collapse; float32 whatever comes in.

The cross-entropies are written here on logits, as the papers have them; ``training.prototype_loss`` has the same values
without all the logits at once, and is what the trainer runs.

Legend: ``S`` student crops, ``G`` global crops, ``B`` images, ``K`` prototypes, ``N`` samples (usually G * B), ``M``
masked patches, ``D`` width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-8  # of a distance in KoLeo
_DUPLICATE = 1e-4  # distance of unit rows below which two images count as the same


def dino_loss(student_SBK: Tensor, teacher_GBK: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy of every student crop against every other teacher crop, in nats (arXiv 2104.14294, eq. 2-3).

    student_SBK: logits; teacher_GBK: probabilities over K, no gradient flows into them; the first G student crops
    are the teacher's own, and a crop is never compared with itself. Returns a float32 scalar. Holds one float32
    copy of student_SBK. Raises ValueError when B or K differ or no pair of crops is left.
    """
    n_student, n_global = len(student_SBK), len(teacher_GBK)
    if student_SBK.shape[1:] != teacher_GBK.shape[1:] or n_student < max(2, n_global) or n_global < 1:
        raise ValueError(
            f"dino_loss needs logits (S, B, K) and targets (G, B, K) with S >= max(2, G): "
            f"got {tuple(student_SBK.shape)} and {tuple(teacher_GBK.shape)}"
        )
    log_p_SBK = F.log_softmax(student_SBK.float() / temperature, dim=-1)
    ce_SG = -torch.einsum("sbk,gbk->sg", log_p_SBK, teacher_GBK.detach().float()) / student_SBK.shape[1]
    same_SG = torch.eye(n_student, n_global, dtype=torch.bool, device=ce_SG.device)
    return ce_SG.masked_fill(same_SG, 0).sum() / (ce_SG.numel() - n_global)


def ibot_loss(
    student_MK: Tensor, teacher_MK: Tensor, weight_M: Tensor, n_crops: int, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy of the student at masked patches against the teacher, in nats (arXiv 2304.07193, section 4).

    student_MK: logits where the student saw the mask token; teacher_MK: probabilities over K at the same patches of the
    crops as they are, no gradient flows into them; weight_M: 1 over the masked patches of the patch's crop. The
    weighted sum is divided by ``n_crops``, the crops without a mask counted too: with half the crops masked the value
    is half the mean over masked crops. Returns a float32 scalar, 0 without patches. Holds two float32 copies of
    student_MK. Raises ValueError when shapes differ or n_crops is not positive.
    """
    if student_MK.shape != teacher_MK.shape or weight_M.shape != student_MK.shape[:1] or n_crops < 1:
        raise ValueError(
            f"ibot_loss needs logits and targets (M, K), weights (M,) and n_crops >= 1: got {tuple(student_MK.shape)}, "
            f"{tuple(teacher_MK.shape)}, {tuple(weight_M.shape)} and {n_crops}"
        )
    log_p_MK = F.log_softmax(student_MK.float() / temperature, dim=-1)
    ce_M = -(teacher_MK.detach().float() * log_p_MK).sum(dim=-1)
    return (ce_M * weight_M).sum() / n_crops


def koleo_loss(cls_BD: Tensor, group: int | None = None) -> Tensor:
    """How near each image is to its nearest neighbour: -mean(ln distance) of unit rows, in nats (arXiv 1806.03198).

    cls_BD: features of one crop of each image, of any length; call it outside autocast. group: neighbours are sought
    among so many rows at a time, in order (DINOv3: 16); None: among all. Low when rows are spread evenly, never below
    -ln 2. A row whose neighbour is nearer than 1e-4 adds nothing: two copies of an image cannot be moved apart, and
    would give gradients of any size. Returns a float32 scalar, 0 for groups of fewer than 2 rows. Holds float32
    (B, group). Which neighbour is nearest takes no gradient. Raises ValueError unless B is a multiple of the group.
    """
    group = group or max(1, len(cls_BD))
    if len(cls_BD) % group:
        raise ValueError(f"koleo_loss needs a number of rows that is a multiple of the group ({group}): {len(cls_BD)}")
    unit_BD = F.normalize(cls_BD.float(), dim=-1)
    if group < 2:
        return unit_BD.sum() * 0
    unit_CGD = unit_BD.view(-1, group, unit_BD.shape[1])
    with torch.no_grad():
        similarity_CGG = unit_CGD @ unit_CGD.mT
        similarity_CGG.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # no number is below every similarity
        nearest_CG = similarity_CGG.argmax(dim=2)
        nearest_B = (nearest_CG + torch.arange(len(unit_CGD), device=cls_BD.device)[:, None] * group).flatten()
    distance_B = ((unit_BD - unit_BD[nearest_B]).square().sum(dim=-1) + _EPSILON**2).sqrt()
    return -torch.where(distance_B < _DUPLICATE, 1.0, distance_B).log().mean()


@torch.no_grad()
def sinkhorn_knopp(logits_NK: Tensor, temperature: float, n_iter: int = 3) -> Tensor:
    """Teacher targets that use all prototypes equally: float32 (N, K), each row sums to 1.

    Alternates the two scalings of the optimal-transport plan exp(z / temperature) (arXiv 2006.09882): prototypes to
    mass N / K, then samples to mass 1, the samples last. The scalings are two vectors in log space, log t = z /
    temperature + a_k + d_n, so logits of any finite size are safe. (To subtract each sample's largest logit would be
    no harmless alternative: it changes the result of few iterations.) Holds two float32 arrays (N, K). Logits that
    are not finite give targets that are not. Raises ValueError when temperature or n_iter is not positive.
    """
    if temperature <= 0 or n_iter < 1:
        raise ValueError(f"sinkhorn_knopp needs temperature > 0 and n_iter >= 1: got {temperature} and {n_iter}")
    n, k = logits_NK.shape
    x_NK = logits_NK.float() / temperature
    d_N = torch.zeros(n, device=x_NK.device)
    a_K = torch.zeros(k, device=x_NK.device)
    for _ in range(n_iter):
        a_K = -torch.logsumexp(x_NK + d_N[:, None], dim=0) - math.log(k)
        d_N = -torch.logsumexp(x_NK + a_K, dim=1) - math.log(n)
    return x_NK.add_(a_K).add_(d_N[:, None] + math.log(n)).exp_()


@torch.no_grad()
def centred_softmax(logits_NK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """Teacher targets softmax((z - centre) / temperature), float32 (N, K), rows sum to 1.

    centre_K: float32, the running mean of the logits of *earlier* steps, see ``next_centre``. Raises ValueError
    when temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"centred_softmax needs temperature > 0: got {temperature}")
    return F.softmax((logits_NK.float() - centre_K) / temperature, dim=-1)


@torch.no_grad()
def next_centre(centre_K: Tensor, logits_NK: Tensor, momentum: float = 0.9) -> Tensor:
    """The centre to use from the next step on: momentum * centre + (1 - momentum) * mean of these logits.

    A new float32 tensor (K,); the given one stays as it is, so a skipped step leaves no trace. On constant
    logits z and a centre that starts at 0 the centre of step n is (1 - momentum ** n) z.
    """
    return momentum * centre_K + (1 - momentum) * logits_NK.float().mean(dim=0)


def entropy(p_NK: Tensor) -> Tensor:
    """Entropy of each row of probabilities in nats, float32 (N,): 0 for one-hot, ln K for uniform."""
    out: Tensor = torch.special.entr(p_NK.float()).sum(dim=-1)
    return out


def usage_perplexity(p_NK: Tensor) -> Tensor:
    """How many prototypes the samples use between them: exp of the entropy of the mean target, in 1..K.

    Near 1: all samples fall on one prototype (one-hot collapse). A float32 scalar.
    """
    out: Tensor = entropy(p_NK.float().mean(dim=0)).exp()
    return out


@torch.no_grad()
def effective_rank(x_ND: Tensor) -> Tensor:
    """How many directions rows use: exp of the entropy of the singular values, 1..min(N, D) (RankMe, arXiv 2210.02885).

    A float32 scalar, nan when a row is not finite or all are 0. Alone it is no sign of health: KoLeo spreads features
    that get no better.
    """
    x_ND = x_ND.float()
    sigma = torch.linalg.svdvals(torch.nan_to_num(x_ND))
    rank = entropy((sigma / sigma.sum())[None])[0].exp()
    return torch.where(x_ND.isfinite().all(), rank, torch.nan)
