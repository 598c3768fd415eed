"""The config of ``evaluate``."""

from dataclasses import dataclass
from typing import ClassVar

from embedding.config import check_pooling


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Weighted k-NN classification of labelled images by frozen features (arXiv 2104.14294, section 4.2)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    backbone: str  # "pixels", "phash", a train step, a folder, or a name on the Hugging Face hub
    pooling: str = "cls"  # or "mean", "cls+mean", "gem": as in embed
    n_neighbors: int = 20  # that vote
    temperature: float = 0.07  # a neighbour's weight is exp(similarity / temperature)

    def __post_init__(self) -> None:
        if self.n_neighbors < 1:
            raise ValueError(f"evaluate.n_neighbors must be at least 1: got {self.n_neighbors}")
        if not self.temperature > 0:
            raise ValueError(f"evaluate.temperature must be above 0: got {self.temperature}")
        check_pooling(self.pooling, "evaluate.pooling")
