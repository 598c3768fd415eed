"""The pool: which images there are, numbered for good. Config, schemas and the kernels of its three passes.

*Scan* looks at every record of a unit; *exact duplicates* are found by hash partition; *numbered parts* are the
kept rows of a unit, at most ``part_rows`` each. ``key`` is the sha256 of the image's bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact
from curation.listing import Root, root_of

KEYS_PER_PARTITION = 1 << 22  # rows of one hash partition: 40 bytes each, so a task holds some 700 MB

SCAN_SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "member": pa.string(),
        "offset": pa.int64(),
        "n_bytes": pa.int64(),
        "key": pa.string(),
        "format": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.string(),
        "caption": pa.string(),
        "metadata": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
    }
)
POOL_SCHEMA = pa.schema(
    [pa.field("row_id", pa.int64()), *(f for f in SCAN_SCHEMA if f.name not in ("reason", "detail"))]
)
# Further columns, which a scan reckons from the pixels when it is asked to: see embedding/measures.py.
MEASURES = {"entropy": pa.float32(), "blur": pa.float32(), "brightness": pa.float32(), "phash": pa.string()}
REJECTED_SCHEMA = pa.schema(
    [
        *(SCAN_SCHEMA.field(n) for n in ("source", "member", "key", "reason", "detail")),
        pa.field("duplicate_of", pa.string()),  # "source" or "source/member" of the image that stayed
    ]
)

# One kept row on its way to the hash partition of its key: who it is and where it stands.
KEY_RECORD = np.dtype([("key", "V32"), ("unit", "<i4"), ("row", "<i4")])
# A row that has the bytes of an earlier one.
DUPLICATE_RECORD = np.dtype([("row", "<i4"), ("first_unit", "<i4"), ("first_row", "<i4")])


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Where a pool comes from, and what can never be used. What one may want to tune is a ``select`` step."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    source: str | tuple[str, ...]  # folder, S3 prefix, tar, Parquet or image file, pattern such as crawl/**/part-*.tar,
    # or .txt file with a path a line, relative to its folder; or a list of several sources
    min_side: int = 1  # pixels, the shorter side
    max_aspect_ratio: float = 100.0  # longer side over shorter side
    max_pixels: int = 178_956_970  # width * height, checked from the header before decoding
    max_bad_fraction: float = 0.05  # share of undecodable and too large images at which the step stops
    part_rows: int = 65_536  # rows of a part at most; also files read by one task
    image_column: str = "image"  # of Parquet sources: bytes, or a struct with bytes; image means jpg, png, ... too
    label_column: str = "label"  # of Parquet and JSON metadata; other files have their parent folder's name
    measures: tuple[str, ...] = ()  # columns reckoned from the pixels, for select.where: any of entropy (bits, 0..8),
    # blur (variance of the Laplacian, low: blurred), brightness (mean luma, 0..255), phash (64-bit DCT hash, 16 hex
    # digits); the four together take longer than decoding, which a scan does anyway

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources in order."""
        return (self.source,) if isinstance(self.source, str) else self.source

    def __post_init__(self) -> None:
        if not self.sources or not all(self.sources):
            raise ValueError(f"pool.source must name at least one source, each by a path: got {self.source!r}")
        for name in ("min_side", "max_pixels", "part_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"pool.{name} must be at least 1: got {getattr(self, name)}")
        if not self.max_aspect_ratio >= 1:
            raise ValueError(f"pool.max_aspect_ratio must be at least 1: got {self.max_aspect_ratio}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"pool.max_bad_fraction must be in [0, 1]: got {self.max_bad_fraction}")
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown:
            raise ValueError(f"pool.measures must be of {', '.join(MEASURES)}: got {unknown[0]!r}")
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"pool.measures must name each once: got {', '.join(self.measures)}")


def scan_schema(measures: Sequence[str]) -> pa.Schema:
    """SCAN_SCHEMA, and behind it the measures that are asked for, in the order of MEASURES."""
    return pa.schema([*SCAN_SCHEMA, *((name, kind) for name, kind in MEASURES.items() if name in measures)])


def key_records(keys: pa.Array, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """(KEY_RECORD (n,), rows (n,)) of the rows whose key is not null: ``keys`` are hex sha256 of a unit's rows."""
    rows = np.flatnonzero(keys.is_valid().to_numpy(zero_copy_only=False))
    records = np.zeros(len(rows), KEY_RECORD)
    hexes = "".join(keys.take(pa.array(rows)).to_pylist())
    records["key"] = np.frombuffer(bytes.fromhex(hexes), "V32")
    records["unit"], records["row"] = unit, rows
    return records, rows


def key_partition(records: np.ndarray, n_partitions: int) -> np.ndarray:
    """int64 (n,): the hash partition of each key, from its first eight bytes."""
    head = records["key"].copy().view(np.uint8).reshape(-1, 32)[:, :8].copy().view("<u8")[:, 0]
    return (head % np.uint64(n_partitions)).astype(np.int64)


def find_duplicates(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key an earlier position has, among KEY_RECORDs in any order.

    Returns (DUPLICATE_RECORD (m,), unit int64 (m,)), the unit being that of the duplicate. The lowest
    (unit, row) of a key stays. O(n log n), about four times the records in memory.
    """
    words = records["key"].copy().view("<u8").reshape(-1, 4)
    order = np.lexsort((records["row"], records["unit"], *words.T))
    ordered = words[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))][~new]
    again = order[~new]
    found = np.zeros(len(again), DUPLICATE_RECORD)
    found["row"] = records["row"][again]
    found["first_unit"], found["first_row"] = records["unit"][first], records["row"][first]
    return found, records["unit"][again].astype(np.int64)


def part_sizes(n_kept: np.ndarray, part_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """How units become parts: int64 (unit,) first part of each unit, int64 (part,) rows of each part.

    A unit with more than ``part_rows`` kept rows gives several parts, one without kept rows gives none.
    """
    n_parts = -(-n_kept // part_rows)
    first = np.concatenate([[0], np.cumsum(n_parts)]).astype(np.int64)
    unit = np.repeat(np.arange(len(n_kept)), n_parts)
    within = np.arange(first[-1]) - first[unit]
    return first, np.minimum(part_rows, n_kept[unit] - within * part_rows).astype(np.int64)


def source_of_part(pool: Artifact, index: int) -> tuple[Root, str]:
    """What the names in a part of a pool are relative to, and the column of images if it was made from Parquet."""
    member, _ = pool.member(index)
    return root_of(member.outside("source")), str(member.manifest["config"]["image_column"])
