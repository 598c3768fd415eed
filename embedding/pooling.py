"""The tokens of an image to one vector."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GEM_POWER = 3
GEM_MIN = 1e-6  # a token's value is at least this before the power: a root needs values above 0


class Features(NamedTuple):
    """What a network says of a batch of images."""

    summary: Tensor | None  # (B, S): the CLS token, or what the model itself calls the image's vector
    patches: Tensor | None  # (B, P, D), row-major


def cls(features: Features) -> Tensor:
    """The summary (B, S). Raises ValueError when the model has none."""
    if features.summary is None:
        raise ValueError("pooling must be 'mean' or 'gem' with a model without a CLS token or a head: got 'cls'")
    return features.summary


def mean(features: Features) -> Tensor:
    """The mean of the patch tokens (B, D). Raises ValueError when the model shows none."""
    return _patches(features).mean(1)


def cls_and_mean(features: Features) -> Tensor:
    """[summary | mean of the patch tokens], (B, S + D), each as it is: neither is normalised before."""
    return torch.cat([cls(features), mean(features)], dim=1)


def gem(features: Features) -> Tensor:
    """Generalised mean of the patch tokens, (B, D): ((1 / P) sum over p of max(x_p, 1e-6) ** 3) ** (1 / 3).

    Reckoned channel by channel, in float32. P = 3 lies between the mean and the maximum.
    """
    x_BPD = _patches(features).float().clamp(min=GEM_MIN)
    return x_BPD.pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)


def _patches(features: Features) -> Tensor:
    if features.patches is None:
        raise ValueError("pooling must be 'cls' with a model that shows no patch tokens: got another")
    return features.patches


POOLERS: dict[str, Callable[[Features], Tensor]] = {"cls": cls, "mean": mean, "cls+mean": cls_and_mean, "gem": gem}
