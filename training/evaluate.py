"""The config of ``evaluate``."""

import math
from dataclasses import dataclass
from typing import ClassVar

from embedding.config import check_pooling
from training.probes import STRENGTHS


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Classification of labelled images by frozen features: weighted k-NN (arXiv 2104.14294, section 4.2), and
    logistic regression, see ``training.probes.fit_probe``."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    backbone: str  # "pixels", "phash", a train step, a folder, or a name on the Hugging Face hub
    pooling: str = "cls"  # or "mean", "cls+mean", "gem": as in embed
    n_neighbors: int = 20  # that vote
    temperature: float = 0.07  # a neighbour's weight is exp(similarity / temperature)
    linear: bool = True  # a linear probe too; on many rows of many classes it takes far longer than k-NN
    linear_rows: int = 100_000  # of the bank that it is fitted on, drawn by seed when there are more. One task holds
    # linear_rows * (8 * width + 16 * classes) bytes: 2.5 GB of 1024 channels and 1,000 classes
    linear_strengths: tuple[float, ...] = STRENGTHS  # of regularisation, of which a held-out tenth of the rows chooses:
    # what half the squared norm of the weights counts beside the sum of the log losses, 1 / C in scikit-learn
    seed: int = 0  # of the rows drawn and held out

    def __post_init__(self) -> None:
        if self.n_neighbors < 1:
            raise ValueError(f"evaluate.n_neighbors must be at least 1: got {self.n_neighbors}")
        if not self.temperature > 0:
            raise ValueError(f"evaluate.temperature must be above 0: got {self.temperature}")
        check_pooling(self.pooling, "evaluate.pooling")
        if self.linear_rows < 2:
            raise ValueError(f"evaluate.linear_rows must be at least 2: got {self.linear_rows}")
        if not self.linear_strengths or not all(0 < s < math.inf for s in self.linear_strengths):
            raise ValueError(
                f"evaluate.linear_strengths must be one or more numbers above 0: got {self.linear_strengths}"
            )
