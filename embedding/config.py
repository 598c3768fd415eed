"""The config of ``embed``; it imports no torch, so that a command line can read a recipe fast."""

from dataclasses import dataclass
from typing import ClassVar

from embedding.decode import MAX_PIXELS

POOLINGS = ("cls", "mean")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What makes a unit vector of an image."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    backbone: str  # "pixels", a folder, a TorchScript file, or a name on the Hugging Face hub
    pooling: str = "cls"  # or "mean": of the patch tokens; CLIP and TorchScript files pool by themselves
    max_pixels: int = MAX_PIXELS  # larger images are bad: "too_large"
    max_bad_fraction: float = 0.05  # share of images that do not decode at which the step stops

    def __post_init__(self) -> None:
        if not self.backbone:
            raise ValueError("embed.backbone must be 'pixels', a folder or a Hugging Face name: got ''")
        if self.pooling not in POOLINGS:
            raise ValueError(f"embed.pooling must be one of {POOLINGS}: got {self.pooling!r}")
        if self.max_pixels < 1:
            raise ValueError(f"embed.max_pixels must be at least 1: got {self.max_pixels}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"embed.max_bad_fraction must be in [0, 1]: got {self.max_bad_fraction}")
