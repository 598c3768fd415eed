"""Schedules as plain arrays, one value a step, and what else sets how far a parameter moves."""

import math
import re
from dataclasses import dataclass

import numpy as np


def warmup_cosine(n_steps: int, warmup: int, peak: float, end: float, *, start: float = 0.0) -> np.ndarray:
    """Linear start -> peak over ``warmup`` steps, peak included, then a cosine towards ``end``, which is not reached.

    The schedule of DINO and DINOv2. float64 (n_steps,). Raises ValueError when warmup is not in 0..n_steps.
    """
    _check_lengths(n_steps, warmup)
    rest = n_steps - warmup
    return np.concatenate([np.linspace(start, peak, warmup), _cosine(peak, end, np.arange(rest) / max(rest, 1))])


def warmup_cosine_constant(
    n_steps: int, warmup: int, peak: float, end: float, *, start: float = 0.0, cosine: int | None = None
) -> np.ndarray:
    """Linear start -> peak (peak excluded), a cosine peak -> end over ``cosine`` steps (end included), then ``end``.

    The schedule of DINOv3; ``cosine`` None takes all steps left. float64 (n_steps,). Raises ValueError when the
    lengths do not fit.
    """
    length = n_steps - warmup if cosine is None else cosine
    _check_lengths(n_steps, warmup, length)
    x = np.linspace(0, 1, length) if length > 1 else np.zeros(length)
    rest = np.full(n_steps - warmup - length, end)
    return np.concatenate([np.linspace(start, peak, warmup, endpoint=False), _cosine(peak, end, x), rest])


def warmup_constant_cooldown(
    n_steps: int, warmup: int, cooldown: int, peak: float, end: float, *, start: float = 0.0
) -> np.ndarray:
    """Linear start -> peak (peak excluded), ``peak``, and in the last ``cooldown`` steps a cosine to ``end`` (reached).

    A run can be lengthened before its cool-down without a change of what came before. float64 (n_steps,). Raises
    ValueError when the lengths do not fit.
    """
    _check_lengths(n_steps, warmup, cooldown)
    ramp = np.linspace(start, peak, warmup, endpoint=False)
    fall = _cosine(peak, end, np.arange(1, cooldown + 1) / max(cooldown, 1))
    return np.concatenate([ramp, np.full(n_steps - warmup - cooldown, peak), fall])


def cosine_between(n_steps: int, start: float, end: float | None) -> np.ndarray:
    """Half a cosine from ``start`` towards ``end``, which is not reached; constant without one. float64 (n_steps,).

    The momentum of the teacher in DINO and DINOv2 (.992 to 1), and their weight decay (.04 to .4).
    """
    return _cosine(start, start if end is None else end, np.arange(n_steps) / max(n_steps, 1))


def _cosine(peak: float, end: float, x: np.ndarray) -> np.ndarray:
    """Half a cosine from peak at x = 0 to end at x = 1."""
    return end + 0.5 * (peak - end) * (1 + np.cos(math.pi * x))


def _check_lengths(n_steps: int, *lengths: int) -> None:
    """Raise ValueError unless the pieces are not negative and fit into n_steps."""
    if min(lengths) < 0 or sum(lengths) > n_steps:
        raise ValueError(f"pieces of a schedule must be >= 0 and fit into its {n_steps} steps: got {lengths}")


def sqrt_scaled_lr(base: float, batch: int, factor: float = 1.0) -> float:
    """The effective learning rate of a published one: factor * base * sqrt(batch / 1024).

    DINOv2's recipes have factor 1, DINOv3's a factor of 4 that their files do not show. Configs here hold
    the effective rate.
    """
    return factor * base * math.sqrt(batch / 1024)


@dataclass(frozen=True)
class ParamRule:
    """How one parameter moves."""

    lr_multiplier: float  # times the learning rate of the step
    decayed: bool  # whether weight decay applies
    last_layer: bool  # prototypes, which stand still during the first steps


_TOKENS = ("cls_token", "mask_token", "registers", "pos_embed")


def backbone_rule(
    name: str,
    shape: tuple[int, ...],
    depth: int,
    *,
    layer_decay: float = 1.0,
    patch_embed_lr: float = 1.0,
    decay_tokens: bool = False,
) -> ParamRule:
    """The rule of the ViT parameter ``name``.

    The multiplier is layer_decay ** (depth + 1 - id): id 0 for the patch embedding and the tokens, i + 1 for block i,
    depth + 1 for the final norm; the patch embedding's is multiplied by ``patch_embed_lr`` as well (DINOv2: .2).
    Biases, norms and LayerScale, all vectors, are never decayed. Tokens (CLS, registers, mask, position) are not
    either: decay would pull a learned input towards 0 for no gain; DINOv2 decays them, ``decay_tokens`` does as it did.
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    patch, token = name.startswith("patch_embed"), name.startswith(_TOKENS)
    layer = int(block[1]) + 1 if block else 0 if patch or token else depth + 1
    multiplier = layer_decay ** (depth + 1 - layer) * (patch_embed_lr if patch else 1.0)
    decayed = decay_tokens if token else len(shape) > 1
    return ParamRule(multiplier, decayed, last_layer=False)


def head_rule(name: str, shape: tuple[int, ...]) -> ParamRule:
    """The rule of the head parameter ``name``: full rate, no decay on vectors.

    The last layer is the prototypes, with their lengths where these are trained.
    """
    return ParamRule(1.0, len(shape) > 1, last_layer=name in ("prototypes", "lengths"))
