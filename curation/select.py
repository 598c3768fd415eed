"""The config of ``select``; the expression itself is evaluated by an embedded SQL engine."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which rows go on. The pool itself never drops what one may want to tune."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    where: str  # SQL expression over the columns of the pool, such as "width >= 224 and format = 'jpeg'": row_id,
    # source, member, offset, n_bytes (or bytes), key, format, width, height, label, caption, metadata, and the pool's
    # measures (entropy, blur, brightness, phash) and the scores, if there are any
    scores: tuple[str, ...] = ()  # score steps over embeddings of the pool: where knows their columns, null for rows
    # that they do not cover; null counts as false

    def __post_init__(self) -> None:
        if not self.where.strip():
            raise ValueError("select.where must be an expression over columns: got an empty string")
