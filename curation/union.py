"""The config of ``union``: several pools, or their embeddings, as one, without a copy."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class UnionConfig:
    """What belongs together, and in which order."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    members: tuple[str, ...]  # steps: pools, or embeddings; row r of member m is row offset[m] + r of the union

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("union.members must name at least one step: got none")
