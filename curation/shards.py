"""WebDataset shards: original bytes and a JSON beside each, in plain tars, with an index for exact random access.

A sample is ``<key>.<extension>``, ``<key>.json`` and, with a caption, ``<key>.txt``. The index of shard i,
``part-<i>.parquet``, says where each image's bytes are, and how often it is to be seen (``count``); it is written
after the tar, so an index means a whole tar. Shards of a mix have a ``mix.json`` beside them. Headers have no times or
owners: equal input gives equal bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

BLOCK = 512  # bytes, the unit of a tar
RECORD = 10_240  # bytes, a tar's length is a multiple of this
COPY = 1 << 20  # bytes written at a time

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the image's bytes in the tar
        pa.field("length", pa.int64(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("width", pa.int32(), nullable=False),  # pixels; 0: not known
        pa.field("height", pa.int32(), nullable=False),
        pa.field("count", pa.int32(), nullable=False),  # times an epoch, at least 1
    ]
)
EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"}  # others are their format's name


def index_schema(columns: Sequence[str] = ()) -> pa.Schema:
    """The columns of an index: the usual ones, then of a mix how often an image is seen in each component, 0: never."""
    return pa.schema([*INDEX_SCHEMA, *(pa.field(name, pa.int32(), nullable=False) for name in columns)])


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How images are mixed and cut into shards."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    shard_rows: int = 1000  # images of a shard at most
    mix_rows: int = 16_000  # images that are shuffled together at least, where the pool has them
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        for name in ("shard_rows", "mix_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"shards.{name} must be at least 1: got {getattr(self, name)}")


def plan_groups(n_selected: Sequence[int], mix_rows: int, seed: int) -> list[list[int]]:
    """Parts in seeded random order, in groups of at least ``mix_rows`` selected rows (the last may have fewer).

    The first half of the double shuffle; parts without selected rows are left out.
    """
    groups: list[list[int]] = [[]]
    size = 0
    for part in np.random.default_rng([seed, len(n_selected)]).permutation(len(n_selected)).tolist():
        if not n_selected[part]:
            continue
        if size >= mix_rows:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += n_selected[part]
    return groups if groups[0] else []


def shard_bounds(n_rows: int, shard_rows: int) -> np.ndarray:
    """int64 (n_shards + 1,): a group's rows cut evenly into the fewest shards of at most ``shard_rows``."""
    n_shards = -(-n_rows // shard_rows)
    return np.arange(n_shards + 1, dtype=np.int64) * n_rows // max(n_shards, 1)


def mixed_order(n_rows: int, seed: int, group: int) -> np.ndarray:
    """int64 (n_rows,): the second half of the double shuffle, within a group."""
    return np.random.default_rng([seed, group, n_rows]).permutation(n_rows)


def sample_json(row: Mapping[str, Any]) -> bytes:
    """What travels beside an image: where it came from and what was said of it. ``row`` is a pool row."""
    fields = {name: row[name] for name in ("key", "source", "member", "format", "width", "height", "label", "caption")}
    if row["metadata"]:
        fields["metadata"] = json.loads(row["metadata"])
    return json.dumps(fields, sort_keys=True).encode()


def tar_header(name: str, size: int) -> bytes:
    """A ustar header of a regular file: mode 644, no owner, no time. ``name`` ASCII of at most 100 bytes."""
    raw = name.encode("ascii")
    if len(raw) > 100:
        raise ValueError(f"a member's name must be at most 100 bytes: got {len(raw)} in {name}")
    numbers = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0
    head = raw.ljust(100, b"\0") + numbers + b" " * 8 + b"0" + b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


class TarWriter:
    """Writes a tar to a local path and hashes it on the way. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=COPY)
        self._hash = hashlib.sha256()
        self.size = 0  # bytes so far

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._put(b"\0" * (2 * BLOCK + -(self.size + 2 * BLOCK) % RECORD))
        self._file.close()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def add(self, name: str, data: bytes) -> int:
        """Append a member. Returns the offset of its bytes."""
        if len(data) >= 8**11:
            raise ValueError(f"a member must be smaller than 8 GiB: got {len(data)} bytes in {name}")
        self._put(tar_header(name, len(data)))
        offset = self.size
        self._put(data)
        self._put(b"\0" * (-len(data) % BLOCK))
        return offset

    def sha256(self) -> str:
        """The checksum of everything written; call it after the context has ended."""
        return self._hash.hexdigest()


def write_sample(tar: TarWriter, row: Mapping[str, Any], data: bytes) -> int:
    """Append the members of one sample. Returns the offset of the image's bytes."""
    key = row["key"]
    offset = tar.add(f"{key}.{EXTENSIONS.get(row['format'], row['format'])}", data)
    tar.add(f"{key}.json", sample_json(row))
    if row["caption"]:
        tar.add(f"{key}.txt", row["caption"].encode())
    return offset
