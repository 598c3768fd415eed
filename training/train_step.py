"""One step: student forward, targets, gradients, and a teacher that follows; or a skipped one, without a trace.

Legend: ``G`` global crops, ``L`` local crops, ``S`` = G + L, ``B`` images, ``K`` prototypes, ``C`` = G * B crops with
``P`` patches each, ``M`` masked patches of all of them, ``D`` width, ``h w`` pixels.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embedding.vit import ViT
from training.augment import N_GLOBAL, normalise
from training.config import TrainConfig
from training.heads import DinoHead
from training.losses import (
    centred_softmax,
    dino_loss,
    entropy,
    ibot_loss,
    koleo_loss,
    next_centre,
    sinkhorn_knopp,
    usage_perplexity,
)
from training.masks import block_masks, mask_rng, patch_weights
from training.schedules import ParamRule, backbone_rule, head_rule


class Masks(NamedTuple):
    """The hidden patches of a step's global crops."""

    hidden_CP: Tensor  # bool
    rows_M: Tensor  # int64, ascending: the hidden ones among the C * P patches
    weight_M: Tensor  # float32, see ``patch_weights``


class Outputs(NamedTuple):
    """What an encoder makes of N images."""

    cls_ND: Tensor  # after the final norm
    logits_NK: Tensor  # of the DINO head
    patch_logits_MK: Tensor | None  # of the iBOT head, at the patches asked for; None: none were


class Encoder(nn.Module):
    """A backbone, its DINO head and, unless ``ibot_weight`` is 0, its iBOT head; student and teacher are one each."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.backbone = ViT(config.vit(), seed=config.seed)
        self.head = DinoHead(
            config.width,
            config.n_prototypes,
            hidden=config.head_hidden,
            bottleneck=config.head_bottleneck,
            normalised=config.head_normalised,
            seed=config.seed + 1,
        )
        self.ibot_head = (
            DinoHead(
                config.width,
                config.ibot_prototypes,
                hidden=config.ibot_hidden,
                bottleneck=config.ibot_bottleneck,
                normalised=config.head_normalised,
                seed=config.seed + 2,
            )
            if config.ibot_weight
            else None
        )
        if config.init_gain is not None:
            self._set_gain(config.init_gain)

    @torch.no_grad()
    def _set_gain(self, gain: float) -> None:
        """Scale the matrices of blocks and heads, which start at a deviation of .02, to gain / sqrt(inputs)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.endswith(".prototypes"):
                parameter.mul_(gain / math.sqrt(parameter.shape[1]) / 0.02)

    def forward(
        self,
        views: Sequence[Tensor],
        masks: Masks | None = None,
        *,
        hide: bool = False,
        generator: torch.Generator | None = None,
    ) -> Outputs:
        """Float images (n_i, 3, h_i, w_i), in order; views of one size go through in one forward.

        masks: the patches of the first view that go through the iBOT head, and no others. With ``hide`` they give way
        to the mask token before the first block: so for the student, while the teacher sees the whole crop.
        """
        runs: list[list[Tensor]] = []
        for view in views:
            if runs and runs[-1][0].shape[1:] == view.shape[1:]:
                runs[-1].append(view)
            else:
                runs.append([view])
        tokens = []
        for i, run in enumerate(runs):
            images = torch.cat(run)
            hidden = _rows_added(masks.hidden_CP, len(images)) if masks is not None and hide and i == 0 else None
            tokens.append(self.backbone(images, hidden, generator=generator))
        cls_ND = torch.cat([t.cls for t in tokens])
        patch_logits = None
        if masks is not None and self.ibot_head is not None:
            patch_logits = self.ibot_head(tokens[0].patches.flatten(0, 1).index_select(0, masks.rows_M))
        return Outputs(cls_ND, self.head(cls_ND), patch_logits)


def _rows_added(hidden_CP: Tensor, n: int) -> Tensor:
    """bool (n, P): local crops as large as global ones run behind them, and have nothing hidden."""
    return F.pad(hidden_CP, (0, 0, 0, n - len(hidden_CP)))


class TrainState:
    """All that a step changes: student, teacher, optimizer, centres."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Initial state; the teacher starts as the student."""
        self.device = device
        self.student = Encoder(config).to(device).train()
        self.teacher = Encoder(config).to(device).eval().requires_grad_(False)
        self.centre_K = torch.zeros(config.n_prototypes, device=device)
        n_ibot = config.ibot_prototypes if config.ibot_weight else 0
        self.ibot_centre_K = torch.zeros(n_ibot, device=device)  # empty without iBOT
        self.optimizer = make_optimizer(self.student, config)


class StepSettings(NamedTuple):
    """What a schedule sets for one step."""

    step: int
    lr: float  # effective
    teacher_temperature: float
    last_layer_frozen: bool


class StepMetrics(NamedTuple):
    """What one step measured; ``skipped`` 1 when its update was left out."""

    loss: float  # nats, the weighted sum of the three below
    dino_loss: float  # nats; ln K: nothing is learnt
    ibot_loss: float  # nats, divided by masked and other crops alike; nan: off
    koleo_loss: float  # nats, sum over the global crops; nan: off
    teacher_entropy: float  # nats, mean over the targets of DINO; ln K: they say nothing
    ibot_teacher_entropy: float  # nats, mean over the targets of iBOT; nan: off
    usage_perplexity: float  # prototypes used by the teacher's softmax before balancing, 1..K; near 1: collapse
    grad_norm: float  # of all parameters, before clipping
    lr: float
    skipped: float


def parameter_rules(student: Encoder, config: TrainConfig) -> dict[str, ParamRule]:
    """How each parameter of the student moves, by its name."""
    rules = {}
    for name, p in student.named_parameters():
        module, _, rest = name.partition(".")
        rules[name] = (
            head_rule(rest, tuple(p.shape))
            if module in ("head", "ibot_head")
            else backbone_rule(
                rest,
                tuple(p.shape),
                config.depth,
                layer_decay=config.layer_decay,
                patch_embed_lr=config.patch_embed_lr,
                decay_tokens=config.decay_tokens,
            )
        )
    return rules


def make_optimizer(student: Encoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, one group a rule; a group holds ``names``, ``lr_multiplier`` and ``last_layer`` beside torch's keys."""
    by_rule: dict[ParamRule, list[str]] = {}
    for name, rule in parameter_rules(student, config).items():
        by_rule.setdefault(rule, []).append(name)
    parameters = dict(student.named_parameters())
    groups = [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "lr_multiplier": rule.lr_multiplier,
            "last_layer": rule.last_layer,
            "weight_decay": config.weight_decay if rule.decayed else 0.0,
        }
        for rule, names in by_rule.items()
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter, in place.

    Momentum 1 changes no bit, 0 copies. The modules must have the same parameters in the same order (ValueError
    otherwise); buffers are left alone.
    """
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs.to(ours.dtype), 1 - momentum)


def train_step(
    state: TrainState, globals_GBhw3: Tensor, locals_LBhw3: Tensor, config: TrainConfig, settings: StepSettings
) -> StepMetrics:
    """One step on uint8 crops (crop, image, height, width, RGB); ``state`` is changed in place.

    A loss or gradient norm that is not finite skips the step: student, teacher, optimizer and centres keep their
    bits, and ``skipped`` is 1. Holds the activations of S * B crops, three float32 arrays (S * B, K), and with iBOT
    six (M, K of the patches).
    """
    views = [_view(crops, config, state.device) for crops in (globals_GBhw3, locals_LBhw3) if len(crops)]
    masks = step_masks(config, settings.step, state.device) if config.ibot_weight else None
    seed = (config.seed * 1_000_003 + settings.step) % 2**63
    generator = torch.Generator("cpu").manual_seed(seed)  # of drop_path and rope_rescale
    autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    with torch.no_grad(), autocast:
        teacher = state.teacher(views[:1], masks)
    targets = _targets(teacher, state, config, settings.teacher_temperature)
    with autocast:
        student = state.student(views, masks, hide=True, generator=generator)
    losses = _losses(student, targets, masks, config)
    state.optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    norm = _clip(state.student.children(), config.clip_norm)
    metrics = _metrics(losses, targets, teacher, norm, settings)
    if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
        _update(state, teacher, config, settings)
        return metrics
    state.optimizer.zero_grad(set_to_none=True)
    return metrics._replace(skipped=1.0)


def step_masks(config: TrainConfig, step: int, device: torch.device) -> Masks:
    """The masks of one step: a pure function of config and step, whatever ran before."""
    side = config.image_size // config.patch_size
    hidden_CP = block_masks(
        N_GLOBAL * config.batch,
        side,
        side,
        mask_rng(config.seed, step),
        probability=config.mask_probability,
        ratio=config.mask_ratio,
    )
    arrays = (hidden_CP, np.flatnonzero(hidden_CP), patch_weights(hidden_CP))
    return Masks(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


class _Targets(NamedTuple):
    """Probabilities of the teacher, float32."""

    cls_NK: Tensor
    patch_MK: Tensor | None  # of iBOT


class _Losses(NamedTuple):
    """Float32 scalars."""

    total: Tensor
    dino: Tensor
    ibot: Tensor | None
    koleo: Tensor | None


def _view(crops_CBhw3: Tensor, config: TrainConfig, device: torch.device) -> Tensor:
    """Float images (C * B, 3, h, w) on the device."""
    crops = crops_CBhw3.to(device, non_blocking=True).flatten(0, 1)
    return normalise(crops, config.augment.mean, config.augment.std)


def _targets(teacher: Outputs, state: TrainState, config: TrainConfig, temperature: float) -> _Targets:
    """All global crops balanced together, and all masked patches together."""

    def balanced(logits_NK: Tensor, centre_K: Tensor) -> Tensor:
        if config.centering == "softmax":
            return centred_softmax(logits_NK, centre_K, temperature)
        return sinkhorn_knopp(logits_NK, temperature, config.sinkhorn_iterations)

    patches = teacher.patch_logits_MK
    return _Targets(
        balanced(teacher.logits_NK, state.centre_K),
        None if patches is None else balanced(patches, state.ibot_centre_K),
    )


def _losses(student: Outputs, targets: _Targets, masks: Masks | None, config: TrainConfig) -> _Losses:
    """The three losses, those that are on, and their weighted sum."""
    k, temperature, n_crops = config.n_prototypes, config.student_temperature, len(targets.cls_NK)
    student_SBK = student.logits_NK.view(-1, n_crops // N_GLOBAL, k)
    total = dino = dino_loss(student_SBK, targets.cls_NK.view(N_GLOBAL, -1, k), temperature)
    ibot = koleo = None
    if masks is not None and student.patch_logits_MK is not None and targets.patch_MK is not None:
        ibot = ibot_loss(student.patch_logits_MK, targets.patch_MK, masks.weight_M, n_crops, temperature)
        total = total + config.ibot_weight * ibot
    if config.koleo_weight:
        koleo = torch.stack([koleo_loss(cls) for cls in student.cls_ND[:n_crops].chunk(N_GLOBAL)]).sum()
        total = total + config.koleo_weight * koleo
    return _Losses(total, dino, ibot, koleo)


def _metrics(losses: _Losses, targets: _Targets, teacher: Outputs, norm: Tensor, settings: StepSettings) -> StepMetrics:
    """As numbers, in one transfer from the device."""
    softmax_NK = torch.softmax(teacher.logits_NK.float() / settings.teacher_temperature, dim=-1)
    measured = {
        "loss": losses.total,
        "dino_loss": losses.dino,
        "ibot_loss": losses.ibot,
        "koleo_loss": losses.koleo,
        "teacher_entropy": entropy(targets.cls_NK).mean(),
        "ibot_teacher_entropy": None if targets.patch_MK is None else entropy(targets.patch_MK).mean(),
        "usage_perplexity": usage_perplexity(softmax_NK),
        "grad_norm": norm,
    }
    off = norm.new_tensor(math.nan)
    values = torch.stack([off if value is None else value for value in measured.values()]).detach().tolist()
    return StepMetrics(**dict(zip(measured, values, strict=True)), lr=settings.lr, skipped=0.0)


def _clip(modules: Iterable[nn.Module], most: float) -> Tensor:
    """Scale each module's gradients to a norm of at most ``most``; the norm of all of them before."""
    norms = [nn.utils.clip_grad_norm_(module.parameters(), most) for module in modules]
    return torch.stack(norms).square().sum().sqrt()


def _update(state: TrainState, teacher: Outputs, config: TrainConfig, settings: StepSettings) -> None:
    """Move the student by its gradients, the teacher after it, and the centres."""
    for group in state.optimizer.param_groups:
        frozen = group["last_layer"] and settings.last_layer_frozen
        group["lr"] = 0.0 if frozen else settings.lr * group["lr_multiplier"]
    state.optimizer.step()
    ema_update(state.teacher, state.student, config.momentum)
    if config.centering == "softmax":
        state.centre_K = next_centre(state.centre_K, teacher.logits_NK, config.centre_momentum)
        if teacher.patch_logits_MK is not None:
            state.ibot_centre_K = next_centre(state.ibot_centre_K, teacher.patch_logits_MK, config.centre_momentum)
