"""One step of DINO: student forward, targets, gradients, and a teacher that follows; or a skipped one, without a trace.

Legend: ``G`` global crops, ``L`` local crops, ``S`` = G + L, ``B`` images, ``K`` prototypes, ``h w`` pixels.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embedding.vit import ViT
from training.augment import normalise
from training.config import TrainConfig
from training.heads import DinoHead
from training.losses import centred_softmax, dino_loss, entropy, next_centre, sinkhorn_knopp, usage_perplexity
from training.schedules import ParamRule, backbone_rule, head_rule


class Encoder(nn.Module):
    """A backbone and its DINO head; student and teacher are one each."""

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
        if config.init_gain is not None:
            self._set_gain(config.init_gain)

    @torch.no_grad()
    def _set_gain(self, gain: float) -> None:
        """Scale the matrices of blocks and head, which start at a deviation of .02, to gain / sqrt(inputs)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and name != "head.prototypes":
                parameter.mul_(gain / math.sqrt(parameter.shape[1]) / 0.02)

    def forward(self, views: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Logits (N, K) of float images (n_i, 3, h_i, w_i), in order; views of one size go through in one forward."""
        runs: list[list[Tensor]] = []
        for view in views:
            if runs and runs[-1][0].shape[1:] == view.shape[1:]:
                runs[-1].append(view)
            else:
                runs.append([view])
        cls = [self.backbone(torch.cat(run), generator=generator).cls for run in runs]
        logits: Tensor = self.head(torch.cat(cls))
        return logits


class TrainState:
    """All that a step changes: student, teacher, optimizer, centre."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Initial state; the teacher starts as the student."""
        self.device = device
        self.student = Encoder(config).to(device).train()
        self.teacher = Encoder(config).to(device).eval().requires_grad_(False)
        self.centre_K = torch.zeros(config.n_prototypes, device=device)
        self.optimizer = make_optimizer(self.student, config)


class StepSettings(NamedTuple):
    """What a schedule sets for one step."""

    step: int
    lr: float  # effective
    teacher_temperature: float
    last_layer_frozen: bool


class StepMetrics(NamedTuple):
    """What one step measured; ``skipped`` 1 when its update was left out."""

    loss: float  # nats
    teacher_entropy: float  # nats, mean over the targets; ln K: they say nothing
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
            if module == "head"
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

    A loss or gradient norm that is not finite skips the step: student, teacher, optimizer and centre keep
    their bits, and ``skipped`` is 1. Holds the activations of S * B crops and three float32 arrays (S * B, K).
    """
    n_global, n_images = globals_GBhw3.shape[:2]
    views = [_view(crops, config, state.device) for crops in (globals_GBhw3, locals_LBhw3) if len(crops)]
    seed = (config.seed * 1_000_003 + settings.step) % 2**63
    generator = torch.Generator("cpu").manual_seed(seed)  # of drop_path and rope_rescale
    autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    with torch.no_grad(), autocast:
        teacher_NK = state.teacher(views[:1]).float()
    targets_NK = _targets(teacher_NK, state.centre_K, config, settings.teacher_temperature)
    with autocast:
        student_NK = state.student(views, generator)
    targets_GBK = targets_NK.view(n_global, n_images, -1)
    loss = dino_loss(student_NK.view(-1, n_images, config.n_prototypes), targets_GBK, config.student_temperature)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = _clip((state.student.backbone, state.student.head), config.clip_norm)
    metrics = StepMetrics(
        loss=loss.item(),
        teacher_entropy=entropy(targets_NK).mean().item(),
        usage_perplexity=usage_perplexity(torch.softmax(teacher_NK / settings.teacher_temperature, dim=-1)).item(),
        grad_norm=norm,
        lr=settings.lr,
        skipped=0.0,
    )
    if math.isfinite(metrics.loss) and math.isfinite(norm):
        _update(state, teacher_NK, config, settings)
        return metrics
    state.optimizer.zero_grad(set_to_none=True)
    return metrics._replace(skipped=1.0)


def _view(crops_CBhw3: Tensor, config: TrainConfig, device: torch.device) -> Tensor:
    """Float images (C * B, 3, h, w) on the device."""
    crops = crops_CBhw3.to(device, non_blocking=True).flatten(0, 1)
    return normalise(crops, config.augment.mean, config.augment.std)


def _targets(logits_NK: Tensor, centre_K: Tensor, config: TrainConfig, temperature: float) -> Tensor:
    if config.centering == "softmax":
        return centred_softmax(logits_NK, centre_K, temperature)
    return sinkhorn_knopp(logits_NK, temperature, config.sinkhorn_iterations)


def _clip(modules: Iterable[nn.Module], most: float) -> float:
    """Scale each module's gradients to a norm of at most ``most``; the norm of all of them before."""
    norms = [nn.utils.clip_grad_norm_(module.parameters(), most) for module in modules]
    return torch.stack(norms).square().sum().sqrt().item()


def _update(state: TrainState, teacher_NK: Tensor, config: TrainConfig, settings: StepSettings) -> None:
    """Move the student by its gradients, the teacher after it, and the centre."""
    for group in state.optimizer.param_groups:
        frozen = group["last_layer"] and settings.last_layer_frozen
        group["lr"] = 0.0 if frozen else settings.lr * group["lr_multiplier"]
    state.optimizer.step()
    ema_update(state.teacher, state.student, config.momentum)
    if config.centering == "softmax":
        state.centre_K = next_centre(state.centre_K, teacher_NK, config.centre_momentum)
