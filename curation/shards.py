"""WebDataset shards: original bytes and a JSON beside each, in plain tars, with an index for exact random access.

A sample is ``<key>.<extension>``, ``<key>.json`` and, with a caption, ``<key>.txt``. The index of shard i,
``part-<i>.parquet``, says where each image's bytes are, and how often it is to be seen (``count``); it is written
after the tar, so an index means a whole tar. Shards of a mix have a ``mix.json`` beside them. Headers have no times or
owners: equal input gives equal bytes.

Tars that came without an index get one in place, and stay where they are: part i then names its tar (``TarFacts``).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

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

TAR_KEY = b"openlvd.tar"  # in the schema metadata of the index of a tar that is not beside it
_END_BYTES = 1 << 16  # of a tar, at each end, by which it is known again


class TarFacts(NamedTuple):
    """Which tar an index is of, and what it was like then."""

    name: str  # relative to the source that the manifest of the index names
    size: int  # bytes
    ends: str  # ``digest_of_ends``: a time or an ETag would change with a copy, and with them the bytes of the index


def digest_of_ends(read: Callable[[int, int], bytes], size: int) -> str:
    """The sha256 of the first and last 64 KiB of a tar of ``size`` bytes, in hex; ``read(offset, length)`` reads it.

    Two reads, one where they meet. A tar that was packed again differs there: in the headers (names, sizes, times) or
    in the images. What is changed in place and farther in, size kept, is not seen.
    """
    if size <= 2 * _END_BYTES:
        return hashlib.sha256(read(0, size)).hexdigest()
    return hashlib.sha256(read(0, _END_BYTES) + read(size - _END_BYTES, _END_BYTES)).hexdigest()


def with_tar(table: pa.Table, tar: TarFacts) -> pa.Table:
    """An index that says which tar it is of."""
    metadata = {**(table.schema.metadata or {}), TAR_KEY: json.dumps(tar._asdict()).encode()}
    return table.replace_schema_metadata(metadata)


def tar_facts(metadata: Mapping[bytes, bytes] | None) -> TarFacts | None:
    """The tar that the schema metadata of an index name; None when it lies beside the index."""
    said = (metadata or {}).get(TAR_KEY)
    return None if said is None else TarFacts(**json.loads(said))


def shard_name(index: int) -> str:
    """``shard-0000012.tar`` for 12."""
    return f"shard-{index:07d}.tar"


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
