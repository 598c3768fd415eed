"""One step: teacher, targets, student, gradients, and a teacher that follows; or a skipped one, without a trace.

The images of a step may go through in micro-batches, in several processes. The teacher sees all of them first, and of
it only bottleneck vectors are kept; targets are balanced over the whole step; then the student goes through. What is
drawn at random is drawn for one group of images at a time, by its number in the step, and micro-batches and processes
hold whole groups: so neither changes more than the rounding of sums.

Legend: ``G`` global crops, ``L`` local crops, ``S`` = G + L, ``B`` images of this process, ``b`` of a micro-batch,
``K`` prototypes, ``C`` = G * b crops with ``P`` patches each, ``M`` masked patches of all of them, ``D`` width,
``h w`` pixels.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedding.vit import Draws, ViT
from training.augment import N_GLOBAL, normalise
from training.config import TrainConfig
from training.encoder import Encoder, Outputs, ema_update, make_optimizer
from training.losses import effective_rank, koleo_loss, usage_perplexity
from training.masks import block_masks, mask_rng, patch_weights
from training.prototype_loss import (
    PrototypeLoss,
    Targets,
    dino_prototype_loss,
    ibot_prototype_loss,
    mean_logits,
    mean_softmax,
    sinkhorn_offset,
)
from training.world import World, share

_SCALES, _KEPT = 6, 7  # the last word of the keys of these generators keeps them apart from all others of a run
RANK_EVERY = 50  # steps between effective ranks


class Masks(NamedTuple):
    """The hidden patches of the global crops of some images."""

    hidden_CP: Tensor  # bool
    rows_M: Tensor  # int64, ascending: the hidden ones among the C * P patches
    weight_M: Tensor  # float32, see ``patch_weights``


class TrainState:
    """All that a step changes: student, teacher, optimizer, centres."""

    def __init__(self, config: TrainConfig, device: torch.device, world: World | None = None) -> None:
        """Initial state; the teacher starts as the student. Raises ValueError when a process has no whole groups."""
        self.device, self.world = device, world or World()
        self.n_images = share(config.batch, self.world, "train.batch")  # of this process, each step
        pieces(self.n_images, None, config)
        self.student = Encoder(config).to(device).train()
        self.teacher = Encoder(config).to(device).eval().requires_grad_(False)
        self.centre_K = torch.zeros(config.head.prototypes, device=device)
        n_ibot = config.patch_head.prototypes if config.ibot_weight else 0
        self.ibot_centre_K = torch.zeros(n_ibot, device=device)  # empty without iBOT
        self.optimizer = make_optimizer(self.student, config)
        self.forward: nn.Module = self.student  # with gradients that are summed over processes
        if self.world.size > 1:
            ids = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.student, device_ids=ids, gradient_as_bucket_view=True)


class StepSettings(NamedTuple):
    """What a schedule sets for one step."""

    step: int
    lr: float  # effective
    teacher_temperature: float
    momentum: float  # of the teacher
    weight_decay: float
    last_layer_frozen: bool = False
    backbone_frozen: bool = False


class StepMetrics(NamedTuple):
    """What one step measured; ``skipped`` 1 when its update was left out."""

    loss: float  # nats, the weighted sum of the three below
    dino_loss: float  # nats; ln K: nothing is learnt
    ibot_loss: float  # nats, divided by masked and other crops alike; nan: off
    koleo_loss: float  # nats, sum over the global crops; nan: off
    teacher_entropy: float  # nats, mean over the targets of DINO; ln K: they say nothing
    ibot_teacher_entropy: float  # nats, mean over the targets of iBOT; nan: off
    usage_perplexity: float  # prototypes used by the teacher's softmax, centred, not balanced, 1..K; near 1: collapse
    crop_similarity: float  # cosine of the teacher's CLS tokens of the two global crops, mean; 1: it sees no crop
    rank: float  # effective rank of the teacher's CLS tokens of first crops; nan in steps without
    grad_norm: float  # of all parameters, before clipping
    lr: float
    skipped: float


def train_step(
    state: TrainState,
    globals_GBhw3: Tensor,
    locals_LBhw3: Tensor,
    config: TrainConfig,
    settings: StepSettings,
    micro_batch: int | None = None,
) -> StepMetrics:
    """One step on uint8 crops (crop, image, height, width, RGB); ``state`` is changed in place.

    micro_batch: images at a time, None: all of this process. A loss or gradient norm that is not finite in any process
    skips the step in all: student, teacher, optimizer and centres keep their bits, and ``skipped`` is 1. Holds the
    activations of a micro-batch, the bottleneck vectors of all, and some chunks of logits. Raises ValueError unless a
    micro-batch holds whole groups.
    """
    parts = pieces(globals_GBhw3.shape[1], micro_batch, config)
    first = state.world.rank * state.n_images
    masks = [step_masks(config, settings.step, state.device, (first + i, first + j)) for i, j in parts]
    autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    with torch.no_grad(), autocast:
        teacher = [
            state.teacher([_view(globals_GBhw3[:, i:j], config, state.device)], rows_M=mask and mask.rows_M)
            for (i, j), mask in zip(parts, masks, strict=True)
        ]
    targets = [_targets(state, teacher, head, config, settings) for head in _heads(config)]
    state.optimizer.zero_grad(set_to_none=True)
    losses = []
    for n, (i, j) in enumerate(parts):
        views = [_view(x[:, i:j], config, state.device) for x in (globals_GBhw3, locals_LBhw3) if len(x)]
        draws = step_draws(config, state.student.backbone, settings.step, (first + i, first + j))
        mask = masks[n]
        wait = isinstance(state.forward, DistributedDataParallel) and n < len(parts) - 1
        with state.forward.no_sync() if wait else nullcontext():  # type: ignore[operator]
            with autocast:
                student = state.forward(views, mask and mask.hidden_CP, mask and mask.rows_M, draws[: len(views)])
            some = _losses(state, student, [each[n] for each in targets], mask, config)
            (some.total / len(parts)).backward()  # type: ignore[no-untyped-call]
        losses.append(some)
    norm = _clip(state.student, config)
    metrics = _metrics(state, losses, teacher, norm, config, settings)
    if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
        _update(state, teacher, config, settings)
        return metrics
    state.optimizer.zero_grad(set_to_none=True)
    return metrics._replace(skipped=1.0)


def step_masks(
    config: TrainConfig, step: int, device: torch.device, images: tuple[int, int] | None = None
) -> Masks | None:
    """The masks of some images of one step, all when None: a pure function of config and step. None without iBOT."""
    if not config.ibot_weight:
        return None
    side, group = config.image_size // config.vit.patch_size, config.images_a_group
    start, stop = images or (0, config.batch)
    drawn = [
        block_masks(N_GLOBAL * group, side, side, mask_rng(config.seed, step, number),
                    probability=config.mask_probability, ratio=config.mask_ratio).reshape(N_GLOBAL, group, -1)
        for number in range(start // group, stop // group)
    ]  # fmt: skip
    hidden_CP = np.concatenate(drawn, axis=1).reshape(N_GLOBAL * (stop - start), -1)
    arrays = (hidden_CP, np.flatnonzero(hidden_CP), patch_weights(hidden_CP))
    return Masks(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def step_draws(config: TrainConfig, backbone: ViT, step: int, images: tuple[int, int]) -> list[Draws]:
    """What the student draws for the global and the local crops of some images of one step, on the CPU's generators."""
    group, n = config.images_a_group, images[1] - images[0]
    scales = _generator(config.seed, step, 0, _SCALES)
    out = []
    for view, n_crops in enumerate((N_GLOBAL, config.n_local)):
        parts = []
        for at in range(0, n, group):
            kept = backbone.draw_kept(
                n_crops * group, _generator(config.seed, step, 2 * ((images[0] + at) // group) + view, _KEPT)
            )
            if kept is not None:  # crop after crop of the group, to crop after crop of all images
                parts.append(kept // group * n + at + kept % group)
        kept = torch.cat(parts, dim=-1).to(next(backbone.parameters()).device) if parts else None
        out.append(Draws(kept, backbone.draw_scales(scales)))
    return out


def _generator(*key: int) -> torch.Generator:
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(word) % 2**63)


def pieces(n: int, micro_batch: int | None, config: TrainConfig) -> list[tuple[int, int]]:
    """First and last + 1 image of each micro-batch."""
    size = micro_batch or n
    if n % size or size % config.images_a_group:
        raise ValueError(
            f"a process or micro-batch must be a part of the {n} images of a process, in whole groups of train.group "
            f"({config.images_a_group}): got {size}; a smaller train.group allows it, and changes what is drawn"
        )
    return [(i, i + size) for i in range(0, n, size)]


class _Losses(NamedTuple):
    """Of one micro-batch."""

    total: Tensor
    dino: PrototypeLoss
    ibot: PrototypeLoss | None
    koleo: Tensor | None


class _Head(NamedTuple):
    """Where the parts of one of the two objectives are."""

    patches: bool

    def of(self, encoder: Encoder) -> Tensor:
        """The prototypes."""
        return (encoder.patch_head if self.patches else encoder.head).weight()

    def units(self, outputs: Outputs) -> Tensor:
        """The bottleneck vectors. Raises ValueError when there are none."""
        units = outputs.patch_unit_Md if self.patches else outputs.unit_Nd
        if units is None:
            raise ValueError("an encoder must be asked for patches to give some")
        return units

    def centre(self, state: TrainState) -> Tensor:
        """The running centre."""
        return state.ibot_centre_K if self.patches else state.centre_K


def _heads(config: TrainConfig) -> list[_Head]:
    return [_Head(False), _Head(True)] if config.ibot_weight else [_Head(False)]


def _view(crops_Cbhw3: Tensor, config: TrainConfig, device: torch.device) -> Tensor:
    """Float images (C * b, 3, h, w) on the device."""
    crops = crops_Cbhw3.to(device, non_blocking=True).flatten(0, 1)
    return normalise(crops, config.augment.mean, config.augment.std)


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


@torch.no_grad()
def _targets(
    state: TrainState, teacher: Sequence[Outputs], head: _Head, config: TrainConfig, settings: StepSettings
) -> list[Targets]:
    """The targets of each micro-batch, balanced over all of them and over all processes."""
    weight_Kd, temperature = head.of(state.teacher), settings.teacher_temperature
    units = [head.units(outputs).float() for outputs in teacher]
    if config.centering == "softmax":
        offset_K = -head.centre(state) / temperature
    else:
        every_Nd = units[0] if len(units) == 1 else torch.cat(units)
        offset_K = sinkhorn_offset(
            every_Nd, weight_Kd, temperature, config.sinkhorn_iterations, state.world, _dtype(config)
        )
    return [Targets(unit_Nd, weight_Kd, offset_K, temperature) for unit_Nd in units]


def _losses(
    state: TrainState, student: Outputs, targets: Sequence[Targets], mask: Masks | None, config: TrainConfig
) -> _Losses:
    """The three losses of a micro-batch, those that are on, and their weighted sum."""
    n_crops, dtype, temperature = len(targets[0].unit_Nd), _dtype(config), config.student_temperature
    unit_SBd = student.unit_Nd.view(-1, n_crops // N_GLOBAL, student.unit_Nd.shape[1])
    dino = dino_prototype_loss(unit_SBd, state.student.head.weight(), targets[0], temperature, dtype)
    total, ibot, koleo = dino.loss, None, None
    if mask is not None and student.patch_unit_Md is not None:
        weight_Kd = state.student.patch_head.weight()
        ibot = ibot_prototype_loss(
            student.patch_unit_Md, weight_Kd, targets[1], mask.weight_M, n_crops, temperature, dtype
        )
        total = total + config.ibot_weight * ibot.loss
    if config.koleo_weight:
        group = config.koleo_group or config.images_a_group
        crops = student.cls_ND[:n_crops].chunk(N_GLOBAL)[: config.koleo_crops]
        koleo = torch.stack([koleo_loss(cls, group) for cls in crops]).sum()
        total = total + config.koleo_weight * koleo
    return _Losses(total, dino, ibot, koleo)


@torch.no_grad()
def _metrics(
    state: TrainState,
    losses: Sequence[_Losses],
    teacher: Sequence[Outputs],
    norm: Tensor,
    config: TrainConfig,
    settings: StepSettings,
) -> StepMetrics:
    """As numbers, in one transfer from the device; means over micro-batches and processes."""
    cls_GBD = torch.cat([out.cls_ND.float().view(N_GLOBAL, -1, out.cls_ND.shape[1]) for out in teacher], dim=1)
    ranked = settings.step % RANK_EVERY == 0
    off = norm.new_tensor(math.nan)

    def mean(values: Iterable[Tensor | None]) -> Tensor:
        some = [value for value in values if value is not None]
        return torch.stack(some).mean().detach() if some else off

    measured = {
        "loss": mean(some.total for some in losses),
        "dino_loss": mean(some.dino.loss for some in losses),
        "ibot_loss": mean(some.ibot and some.ibot.loss for some in losses),
        "koleo_loss": mean(some.koleo for some in losses),
        "teacher_entropy": mean(some.dino.entropy for some in losses),
        "ibot_teacher_entropy": mean(some.ibot and some.ibot.entropy for some in losses),
        "crop_similarity": torch.cosine_similarity(cls_GBD[0], cls_GBD[1], dim=-1).mean(),
        "rank": effective_rank(state.world.cat(cls_GBD[0])) if ranked else off,
    }
    values = state.world.mean(torch.stack(list(measured.values())))
    units_Nd = torch.cat([out.unit_Nd.float() for out in teacher])
    centred = config.centering == "softmax"  # before balancing, which is no part of what the teacher says
    offset_K = -state.centre_K / settings.teacher_temperature if centred else torch.zeros_like(state.centre_K)
    weight_Kd = state.teacher.head.weight()
    used_K = mean_softmax(units_Nd, weight_Kd, offset_K, settings.teacher_temperature, state.world, _dtype(config))
    numbers = torch.cat([values, torch.stack([usage_perplexity(used_K[None]), norm])]).tolist()
    named = dict(zip([*measured, "usage_perplexity", "grad_norm"], numbers, strict=True))
    return StepMetrics(**named, lr=settings.lr, skipped=0.0)


def _clip(student: Encoder, config: TrainConfig) -> Tensor:
    """Scale gradients to a norm of at most ``clip_norm``, module by module; the norm of all of them before."""
    parts = [[p] for p in student.parameters()] if config.clip == "parameter" else [
        list(module.parameters()) for module in student.children()
    ]  # fmt: skip
    norms = [nn.utils.clip_grad_norm_(part, config.clip_norm) for part in parts]
    return torch.stack(norms).square().sum().sqrt()


def _update(state: TrainState, teacher: Sequence[Outputs], config: TrainConfig, settings: StepSettings) -> None:
    """Move the student by its gradients, the teacher after it, and the centres."""
    for group in state.optimizer.param_groups:
        rule = group["rule"]
        still = settings.last_layer_frozen if rule.last_layer else settings.backbone_frozen and group["backbone"]
        group["lr"] = 0.0 if still else settings.lr * rule.lr_multiplier
        group["weight_decay"] = settings.weight_decay if rule.decayed else 0.0
    state.optimizer.step()
    if config.centering == "softmax":  # by the teacher whose logits these are
        for head in _heads(config):
            units_Nd = torch.cat([head.units(outputs) for outputs in teacher])
            now_K = mean_logits(units_Nd, head.of(state.teacher), state.world)
            centre_K = head.centre(state)
            centre_K.mul_(config.centre_momentum).add_(now_K, alpha=1 - config.centre_momentum)
    ema_update(state.teacher, state.student, settings.momentum)
