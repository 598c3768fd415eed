"""Which image is seen when: a pure function of the shard index and a seed.

A shard set is a folder with, for shard i, a WebDataset tar ``shard-{i:07d}.tar`` and its index
``part-{i:07d}.parquet``. Samples are numbered through the whole run: number = step * batch + slot, epoch = number // N,
position = number % N, where N is the sum of all counts. In each epoch the shards are permuted, cut into groups of
``n_open``, and the samples of a group are permuted together. So the state of a reader is one integer, the step.
"""

import io
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.shards import INDEX_SCHEMA
from curation.store import Location

_IMAGES = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "gif": "gif", "bmp": "bmp", "tif": "tiff",
           "tiff": "tiff", "ppm": "ppm"}  # fmt: skip
_READERS = 16  # requests at a time when totals or samples come over a network


class Sample(NamedTuple):
    """One image of the stream and where its bytes are."""

    shard: int
    offset: int  # bytes into the tar
    length: int  # bytes
    key: str
    epoch: int
    number: int  # through the whole run


class _Epoch(NamedTuple):
    order: np.ndarray  # int64 (n_shards,): positions in ``shard_ids``
    ends: np.ndarray  # int64 (n_groups,): samples of the epoch up to and with group g


class _Group(NamedTuple):
    shard: np.ndarray  # int32 (n_rows,)
    offset: np.ndarray  # int64 (n_rows,)
    length: np.ndarray  # int64 (n_rows,)
    key: pa.ChunkedArray
    order: np.ndarray  # int64 (samples,): row of each sample


class Stream:
    """The endless order of samples of a shard set; two with the same index and seed agree on every number.

    Memory: 16 bytes a shard, and the index rows of two groups of open shards.
    """

    def __init__(
        self, shards: Location, *, batch: int, seed: int = 0, n_open: int = 16, totals: np.ndarray | None = None
    ) -> None:
        """``totals``: samples an epoch of each shard, int64 (n_shards,), as ``shard_totals`` gives; None reads them.

        Raises FileNotFoundError when there is no index, ValueError when the shards hold no sample.
        """
        self.shards, self.batch_size, self.seed, self.n_open = shards, batch, seed, n_open
        self.shard_ids = list_shards(shards)
        self.totals = shard_totals(shards, self.shard_ids) if totals is None else totals
        if len(self.totals) != len(self.shard_ids):
            raise ValueError(f"totals must be given for {len(self.shard_ids)} shards: got {len(self.totals)}")
        self.n_samples = int(self.totals.sum())
        if self.n_samples == 0:
            raise ValueError(f"the shards must hold at least one sample: got none in {shards}")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._group = lru_cache(maxsize=2)(self._make_group)

    def batch(self, step: int) -> list[Sample]:
        """The samples of one step, slot by slot."""
        return [self.sample(step * self.batch_size + slot) for slot in range(self.batch_size)]

    def sample(self, number: int) -> Sample:
        """The sample of this number, from 0, without end."""
        epoch, position = divmod(number, self.n_samples)
        ends = self._epoch(epoch).ends
        group = int(np.searchsorted(ends, position, side="right"))
        rows = self._group(epoch, group)
        row = rows.order[position - (ends[group - 1] if group else 0)]
        key = rows.key[row].as_py()
        return Sample(int(rows.shard[row]), int(rows.offset[row]), int(rows.length[row]), key, epoch, number)

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard_ids))
        starts = np.arange(0, len(order), self.n_open)
        return _Epoch(order, np.cumsum(np.add.reduceat(self.totals[order], starts)))

    def _make_group(self, epoch: int, group: int) -> _Group:
        ids = self.shard_ids[self._epoch(epoch).order[group * self.n_open : (group + 1) * self.n_open]]
        tables = [read_index(self.shards, int(i), ("key", "offset", "length", "count")) for i in ids]
        table = pa.concat_tables(tables)
        rows = np.repeat(np.arange(len(table)), table["count"].to_numpy())
        rng = np.random.default_rng([self.seed, epoch, group])
        return _Group(
            np.repeat(ids.astype(np.int32), [len(t) for t in tables]),
            table["offset"].to_numpy(),
            table["length"].to_numpy(),
            table["key"],
            rows[rng.permutation(len(rows))],
        )


def list_shards(shards: Location) -> np.ndarray:
    """Numbers of the shards that have an index, ascending, int64. Raises FileNotFoundError when there are none."""
    names = (re.fullmatch(r"part-(\d{7,})\.parquet", entry.name) for entry in shards.list())
    ids = np.array(sorted(int(name[1]) for name in names if name), np.int64)
    if len(ids) == 0:
        raise FileNotFoundError(
            f"no shard index part-0000000.parquet in {shards}; training.stream.build_index makes one from a tar"
        )
    return ids


def read_index(shards: Location, shard: int, columns: Sequence[str]) -> pa.Table:
    """Columns of the index of one shard. Raises FileNotFoundError, or ValueError for a count below 1."""
    table = pq.read_table(io.BytesIO((shards / f"part-{shard:07d}.parquet").read()), columns=list(columns))
    counts = table["count"].to_numpy() if "count" in columns else np.ones(1)
    if len(counts) and counts.min() < 1:
        raise ValueError(f"counts must be at least 1: got {counts.min()} in part-{shard:07d}.parquet of {shards}")
    return table


def shard_totals(shards: Location, shard_ids: np.ndarray) -> np.ndarray:
    """Samples an epoch of each shard, int64: the sum of its counts. Reads every index file once."""

    def total(shard: int) -> int:
        return int(read_index(shards, shard, ("count",))["count"].to_numpy().sum(dtype=np.int64))

    with ThreadPoolExecutor(_READERS) as pool:
        return np.fromiter(pool.map(total, shard_ids.tolist()), np.int64, len(shard_ids))


def read_images(shards: Location, samples: Sequence[Sample]) -> list[bytes]:
    """The encoded bytes of each sample, short or empty where the shard is. Raises FileNotFoundError: no such shard."""
    read = partial(_read_image, shards)
    if shards.is_local or len(samples) < 2:
        return list(map(read, samples))
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, samples))


def _read_image(shards: Location, sample: Sample) -> bytes:
    return (shards / f"shard-{sample.shard:07d}.tar").read(sample.offset, sample.length)


def build_index(tar: Location, first_row: int = 0) -> pa.Table:
    """The index of a WebDataset tar that came without one, in one pass; counts are 1, row ids go up from ``first_row``.

    A sample is the run of members with one name up to the first dot after the last slash; its first image member is
    indexed, ``.cls`` is its label, samples without an image are left out. Member names are read, never used as paths.
    Memory: the index and one image; an object on S3 is downloaded to a temporary file. Raises tarfile.ReadError.
    """
    rows: list[dict[str, object]] = []
    key = None
    with tar.local_copy() as path, tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not member.isfile():
                continue
            if key != (folder, stem):
                key, label, row = (folder, stem), None, None
            extension = extension.lower()
            if extension == "cls":
                label = archive.extractfile(member).read().decode("utf-8", "replace").strip()  # type: ignore[union-attr]
            kind = _IMAGES.get(extension.rpartition(".")[2])
            if kind and row is None:
                width, height = _image_size(archive.extractfile(member))
                row = {"key": stem, "row_id": first_row + len(rows), "offset": member.offset_data, "count": 1,
                       "length": member.size, "format": kind, "width": width, "height": height}  # fmt: skip
                rows.append(row)
            if row is not None:
                row["label"] = label
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def _image_size(file: object) -> tuple[int, int]:
    """Width and height from the header, (0, 0) when there is none."""
    try:
        with Image.open(file) as image:  # type: ignore[arg-type]
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0
