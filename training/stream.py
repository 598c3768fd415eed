"""Which image is seen when: a pure function of the shard index and a seed.

A shard set is a folder with, for shard i, a WebDataset tar ``shard-{i:07d}.tar`` and its index
``part-{i:07d}.parquet``. Samples are numbered through the whole run: number = step * batch + slot, epoch = number // N,
position = number % N, where N is the sum of all counts. In each epoch the shards are permuted, cut into groups of
``n_open``, and the samples of a group are permuted together. So the state of a reader is one integer, the step.

With a ``mix.json`` there are several components, each with an endless order of its own, from its own counts; which of
them a slot shows, and how far that is, ``training.mixing`` says. Draw d of component c of C has number d * C + c.
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
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from curation.mix import MixSpec, read_mix
from curation.shards import INDEX_SCHEMA
from curation.store import Location
from training.mixing import Mixing

_IMAGES = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "gif": "gif", "bmp": "bmp", "tif": "tiff",
           "tiff": "tiff", "ppm": "ppm"}  # fmt: skip
_READERS = 16  # requests at a time when totals or samples come over a network
_SHARDS, _ROWS = 3, 4  # the last word of the key of a component's generators keeps them apart from all others of a run


class Sample(NamedTuple):
    """One image of the stream and where its bytes are."""

    shard: int
    offset: int  # bytes into the tar
    length: int  # bytes
    key: str
    epoch: int  # of its component
    number: int  # through the whole run; no two draws have the same
    component: int  # of the mix, 0 when there is none


class _Place(NamedTuple):
    shard: int
    offset: int
    length: int
    key: str
    epoch: int


class _Epoch(NamedTuple):
    order: np.ndarray  # int64 (n_shards,): positions in ``shard_ids``
    ends: np.ndarray  # int64 (n_groups,): samples of the epoch up to and with group g


class _Group(NamedTuple):
    shard: np.ndarray  # int32 (n_rows,)
    offset: np.ndarray  # int64 (n_rows,)
    length: np.ndarray  # int64 (n_rows,)
    key: pa.ChunkedArray
    order: np.ndarray  # int64 (samples,): row of each sample


class _Order:
    """The endless order of the samples of one component of a mix, or of all there are (``component`` None)."""

    def __init__(
        self,
        shards: Location,
        shard_ids: np.ndarray,
        totals: np.ndarray,
        seed: int,
        n_open: int,
        component: int | None = None,
        column: str = "count",
    ) -> None:
        self.shards, self.shard_ids, self.totals, self.seed, self.n_open = shards, shard_ids, totals, seed, n_open
        self.component, self.column = component, column
        self.n_samples = int(totals.sum())  # an epoch
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._group = lru_cache(maxsize=2)(self._make_group)
        self._index = lru_cache(maxsize=2 * n_open)(self._read_index)  # a small component is through an epoch soon

    def place(self, draw: int) -> _Place:
        """What the draw of this number shows, from 0, without end."""
        epoch, position = divmod(draw, self.n_samples)
        ends = self._epoch(epoch).ends
        group = int(np.searchsorted(ends, position, side="right"))
        rows = self._group(epoch, group)
        row = rows.order[position - (ends[group - 1] if group else 0)]
        key = rows.key[row].as_py()
        return _Place(int(rows.shard[row]), int(rows.offset[row]), int(rows.length[row]), key, epoch)

    def _shards_rng(self, epoch: int) -> np.random.Generator:
        if self.component is None:
            return np.random.default_rng([self.seed, epoch])
        return np.random.default_rng([self.seed, epoch, self.component, 0, _SHARDS])

    def _rows_rng(self, epoch: int, group: int) -> np.random.Generator:
        if self.component is None:
            return np.random.default_rng([self.seed, epoch, group])
        return np.random.default_rng([self.seed, epoch, self.component, group, _ROWS])

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = self._shards_rng(epoch).permutation(len(self.shard_ids))
        starts = np.arange(0, len(order), self.n_open)
        return _Epoch(order, np.cumsum(np.add.reduceat(self.totals[order], starts)))

    def _make_group(self, epoch: int, group: int) -> _Group:
        ids = self.shard_ids[self._epoch(epoch).order[group * self.n_open : (group + 1) * self.n_open]]
        tables = [self._index(int(i)) for i in ids]
        table = pa.concat_tables(tables)
        rows = np.repeat(np.arange(len(table)), table[self.column].to_numpy())
        return _Group(
            np.repeat(ids.astype(np.int32), [len(t) for t in tables]),
            table["offset"].to_numpy(),
            table["length"].to_numpy(),
            table["key"],
            rows[self._rows_rng(epoch, group).permutation(len(rows))],
        )

    def _read_index(self, shard: int) -> pa.Table:
        table = read_index(self.shards, shard, ("key", "offset", "length", self.column))
        return table.filter(pc.greater(table[self.column], 0))


class Stream:
    """The endless order of samples of a shard set; two with the same index and seed agree on every number.

    Memory: 16 bytes a shard, and the index rows of four groups of open shards; of a mix 24 bytes a shard and
    component, and the index rows of four groups of each component.
    """

    def __init__(
        self,
        shards: Location,
        *,
        batch: int,
        seed: int = 0,
        n_open: int = 16,
        totals: np.ndarray | None = None,
        mix: MixSpec | None = None,
    ) -> None:
        """``totals`` and ``mix``: as ``shard_totals`` and ``curation.mix.read_mix`` give; totals None reads both.

        Raises FileNotFoundError when there is no index, ValueError when the shards hold no sample, or none of a
        component of the mix.
        """
        self.shards, self.batch_size, self.seed, self.n_open = shards, batch, seed, n_open
        self.shard_ids = list_shards(shards)
        self.mix = (mix or read_mix(shards)) if totals is None else mix
        self.totals = shard_totals(shards, self.shard_ids, self.mix) if totals is None else totals
        n_components = len(self.mix.components) if self.mix else 1
        shape = (len(self.shard_ids), n_components) if self.mix else (len(self.shard_ids),)
        if self.totals.shape != shape:
            raise ValueError(f"totals must have the shape {shape}: got {self.totals.shape}")
        self.n_samples = int(self.totals.sum())  # an epoch; of a mix an epoch of each component
        if self.n_samples == 0:
            raise ValueError(f"the shards must hold at least one sample: got none in {shards}")
        self._mixing = Mixing(self.mix, batch, seed) if self.mix else None
        self._orders = [self._order(component) for component in range(n_components)]

    def _order(self, component: int) -> _Order:
        if self.mix is None:
            return _Order(self.shards, self.shard_ids, self.totals, self.seed, self.n_open)
        totals = self.totals[:, component]
        has = totals > 0  # other shards are no part of this order
        if not has.any():
            name = self.mix.components[component]
            raise ValueError(f"the shards must hold at least one sample of {name}: got none in {self.shards}")
        column = self.mix.columns[component]
        return _Order(self.shards, self.shard_ids[has], totals[has], self.seed, self.n_open, component, column)

    def batch(self, step: int) -> list[Sample]:
        """The samples of one step, slot by slot."""
        if self._mixing is None:
            return [self.sample(step * self.batch_size + slot) for slot in range(self.batch_size)]
        component, draw = self._mixing.step(step)
        numbers = (draw * len(self._orders) + component).tolist()
        in_order = np.lexsort((draw, component)).tolist()  # each component's index is gone through once
        found = {slot: self.sample(numbers[slot]) for slot in in_order}
        return [found[slot] for slot in range(self.batch_size)]

    def sample(self, number: int) -> Sample:
        """The sample of this number, from 0, without end."""
        draw, component = divmod(number, len(self._orders))
        return Sample(*self._orders[component].place(draw), number, component)

    def after(self, sample: Sample) -> Sample:
        """The next sample of the same component."""
        return self.sample(sample.number + len(self._orders))


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
    """Columns of the index of one shard.

    Raises FileNotFoundError, or ValueError for a column that is not there, or a count that is too low: at least 1, in
    a component of a mix 0.
    """
    name = f"part-{shard:07d}.parquet"
    with pq.ParquetFile(io.BytesIO((shards / name).read())) as file:
        table = file.read(columns=list(columns))
    for column in columns:
        if column not in table.column_names:
            raise ValueError(f"an index must have the column {column}: got none in {name} of {shards}")
        least = 1 if column == "count" else 0
        lowest = table[column].to_numpy().min(initial=least) if column.startswith("count") else least
        if lowest < least:
            raise ValueError(f"counts must be at least {least}: got {lowest} in {name} of {shards}")
    return table


def shard_totals(shards: Location, shard_ids: np.ndarray, mix: MixSpec | None = None) -> np.ndarray:
    """Samples an epoch of each shard, int64 (n_shards,), of a mix (n_shards, n_components): the sums of its counts.

    Reads every index file once.
    """
    columns = ["count"] if mix is None else mix.columns

    def total(shard: int) -> list[int]:
        table = read_index(shards, shard, columns)
        return [int(table[column].to_numpy().sum(dtype=np.int64)) for column in columns]

    with ThreadPoolExecutor(_READERS) as pool:
        totals = np.fromiter(pool.map(total, shard_ids.tolist()), np.dtype((np.int64, len(columns))), len(shard_ids))
    return totals[:, 0].copy() if mix is None else totals


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
