"""A backbone with its heads: student and teacher are one each, and the optimizer that moves the student."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embedding.vit import Draws, ViT
from training.config import HeadConfig, TrainConfig
from training.heads import DinoHead
from training.schedules import ParamRule, backbone_rule, head_rule


class Outputs(NamedTuple):
    """What an encoder makes of N crops."""

    cls_ND: Tensor  # after the final norm
    unit_Nd: Tensor  # bottleneck vectors of the CLS tokens
    patch_unit_Md: Tensor | None  # of the patches asked for; None: none were


class Encoder(nn.Module):
    """A backbone, its DINO head and its iBOT head, which may be the same one, or none when ``ibot_weight`` is 0."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.backbone = ViT(config.vit, seed=config.seed)
        self.head = _head(config.head, config, 1)
        own = config.ibot_head if config.ibot_weight else None
        self.ibot_head = None if own is None else _head(own, config, 2)
        if config.init_gain is not None:
            self._set_gain(config.init_gain)

    @property
    def patch_head(self) -> DinoHead:
        """The head that patches go through."""
        return self.head if self.ibot_head is None else self.ibot_head

    @torch.no_grad()
    def _set_gain(self, gain: float) -> None:
        """Scale the matrices of blocks and heads, which start at a deviation of .02, to gain / sqrt(inputs)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.endswith((".prototypes", ".lengths")):
                parameter.mul_(gain / math.sqrt(parameter.shape[1]) / 0.02)

    def forward(
        self,
        views: Sequence[Tensor],
        hidden_CP: Tensor | None = None,
        rows_M: Tensor | None = None,
        draws: Sequence[Draws] | None = None,
    ) -> Outputs:
        """Float images (n_i, 3, h_i, w_i) of several views, in one pass.

        hidden_CP: bool, the patches of the first view that give way to the mask token before the first block: so for
        the student, while the teacher sees whole crops. rows_M: those of its C * P patches that go through the patch
        head, and no others.
        """
        masks = [hidden_CP, *[None] * (len(views) - 1)]
        tokens = self.backbone.forward_views(views, masks, draws)
        cls_ND = torch.cat([t.cls for t in tokens])
        patches = None
        if rows_M is not None:
            patches = self.patch_head.bottleneck(tokens[0].patches.flatten(0, 1).index_select(0, rows_M))
        return Outputs(cls_ND, self.head.bottleneck(cls_ND), patches)


def _head(shape: HeadConfig, config: TrainConfig, number: int) -> DinoHead:
    return DinoHead(
        config.vit.width,
        shape.prototypes,
        hidden=shape.hidden,
        bottleneck=shape.bottleneck,
        norm=shape.norm,
        seed=config.seed + number,
    )


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
                config.vit.depth,
                layer_decay=config.layer_decay,
                patch_embed_lr=config.patch_embed_lr,
                decay_tokens=config.decay_tokens,
            )
        )
    return rules


def make_optimizer(student: Encoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, one group a rule; a group holds ``names`` and ``rule`` beside torch's keys."""
    by_rule: dict[tuple[ParamRule, bool], list[str]] = {}
    for name, rule in parameter_rules(student, config).items():
        by_rule.setdefault((rule, name.startswith("backbone.")), []).append(name)
    parameters = dict(student.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names], "names": names, "rule": rule, "backbone": backbone,
         "weight_decay": config.weight_decay if rule.decayed else 0.0}
        for (rule, backbone), names in by_rule.items()
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter, in place.

    Momentum 1 changes no bit, 0 copies. The modules must have the same parameters in the same order (ValueError
    otherwise); buffers are left alone.
    """
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise ValueError("teacher and student must have the same parameters: got other shapes")
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
