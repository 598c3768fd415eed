"""The config of ``decontaminate``: DINOv2's relative deduplication, by direct neighbours.

An image is dropped when it is itself near an image to stay away from (``direct``), not when it is near one that is.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """How near to a reference image is too near."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    min_similarity: float  # cosine; belongs to the descriptor, so it has no default
    max_drop_fraction: float = 0.5  # share of rows; more means the threshold does not fit the descriptor

    def __post_init__(self) -> None:
        if not 0 < self.min_similarity <= 1:
            raise ValueError(f"decontaminate.min_similarity must be in (0, 1]: got {self.min_similarity}")
        if not 0 < self.max_drop_fraction <= 1:
            raise ValueError(f"decontaminate.max_drop_fraction must be in (0, 1]: got {self.max_drop_fraction}")
