"""The config of ``embed``; it imports no torch, so that a command line can read a recipe fast."""

from dataclasses import dataclass
from typing import ClassVar

from embedding.decode import MAX_PIXELS

MODEL_FREE = ("pixels", "phash")  # backbones without weights: see ``embedding.preprocess`` and ``embedding.phash``
BUNDLED = ("openlvd-tiny",)  # small encoders that come with the package, folders below ``embedding/weights``
POOLINGS = ("cls", "mean", "cls+mean", "gem")
DECODERS = ("full", "scaled")
PRECISIONS = ("float32", "bfloat16", "float16")


def check_pooling(pooling: str, name: str) -> None:
    """Raise ValueError unless there is such a pooling."""
    if pooling not in POOLINGS:
        raise ValueError(f"{name} must be one of {POOLINGS}: got {pooling!r}")


def check_precision(precision: str, name: str) -> None:
    """Raise ValueError unless there is such a precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"{name} must be one of {PRECISIONS}: got {precision!r}")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What makes a unit vector of an image."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # read by pipelines/, no import here

    backbone: str  # "pixels", "phash", a folder, a TorchScript file, or a name on the Hugging Face hub
    pooling: str = "cls"  # of CLIP and SigLIP: their image embedding; or "mean" or "gem" of the patch tokens,
    # "cls+mean": both, one behind the other; TorchScript files pool by themselves
    precision: str = "float32"  # of a network's products; "bfloat16" and "float16" give other vectors, on GPUs faster
    decoder: str = "full"  # or "scaled": a JPEG much larger than needed at 1/2 to 1/8; faster, and other last digits
    max_pixels: int = MAX_PIXELS  # larger images are bad: "too_large"
    max_bad_fraction: float = 0.05  # share of images that do not decode at which the step stops

    def __post_init__(self) -> None:
        if not self.backbone:
            raise ValueError("embed.backbone must be 'pixels', 'phash', a folder or a Hugging Face name: got ''")
        check_pooling(self.pooling, "embed.pooling")
        check_precision(self.precision, "embed.precision")
        if self.decoder not in DECODERS:
            raise ValueError(f"embed.decoder must be one of {DECODERS}: got {self.decoder!r}")
        if self.max_pixels < 1:
            raise ValueError(f"embed.max_pixels must be at least 1: got {self.max_pixels}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"embed.max_bad_fraction must be in [0, 1]: got {self.max_bad_fraction}")
