"""Which image is seen when: a pure function of the shard index and a seed.

A shard set is a folder with, for shard i, an index ``part-{i:07d}.parquet`` and beside it the WebDataset tar
``shard-{i:07d}.tar``; or the index says where else its tar is. Samples are numbered through the whole run: number =
step * batch + slot, epoch = number // N, position = number % N, where N is the sum of all counts. In each epoch the
shards are permuted, cut into groups of ``n_open``, and the samples of a group are permuted together. So the state of a
reader is one integer, the step.

With a ``mix.json`` there are several components, each with an endless order of its own, from its own counts; which of
them a slot shows, and how far that is, ``training.mixing`` says. Draw d of component c of C has number d * C + c.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.artifact import Artifact, part_name
from curation.listing import Root, file_at, root_of
from curation.mix import MixSpec, read_mix
from curation.shards import TarFacts, digest_of_ends, shard_name, tar_facts
from curation.store import Location, RangeFile
from training.mixing import Mixing

_READERS = 16  # requests at a time when totals or samples come over a network
_TARS = 4096  # whose places a process remembers
_SHARDS, _ROWS = 3, 4  # the last word of the key of a component's generators keeps them apart from all others of a run

Item = TypeVar("Item")
Result = TypeVar("Result")


class ShardChangedError(ValueError):
    """A tar is not the one that was indexed."""


class ShardGoneError(FileNotFoundError):
    """A tar that was indexed is not there."""


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
        raise FileNotFoundError(f"no shard index {part_name(0)} in {shards}; `openlvd index` makes one of tars")
    return ids


def read_index(shards: Location, shard: int, columns: Sequence[str]) -> pa.Table:
    """Columns of the index of one shard.

    Raises FileNotFoundError, or ValueError for a column that is not there, or a count that is too low: at least 1, in
    a component of a mix 0.
    """
    name = part_name(shard)
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


def shard_totals(
    shards: Location, shard_ids: np.ndarray, mix: MixSpec | None = None, root: Root | None = None
) -> np.ndarray:
    """Samples an epoch of each shard, int64 (n_shards,), of a mix (n_shards, n_components): the sums of its counts.

    Reads every index file once, and looks at every tar: a run does not begin when one is gone, or is not the one that
    was indexed, or breaks off. On S3 that is two requests a tar, of tars of others four, 16 at a time. ``root``: as
    ``locate_tar``. Raises ShardGoneError, ShardChangedError.
    """
    columns = ["count"] if mix is None else mix.columns

    def total(shard: int) -> list[int]:
        table = read_index(shards, shard, [*columns, "offset", "length"])
        tar, facts = _tar_of(shards, shard, tar_facts(table.schema.metadata), root)
        ends = table["offset"].to_numpy() + table["length"].to_numpy()
        _check_tar(tar, facts, int(ends.max(initial=0)))
        return [int(table[column].to_numpy().sum(dtype=np.int64)) for column in columns]

    with ThreadPoolExecutor(_READERS) as pool:
        totals = np.fromiter(pool.map(total, shard_ids.tolist()), np.dtype((np.int64, len(columns))), len(shard_ids))
    return totals[:, 0].copy() if mix is None else totals


def read_images(shards: Location, samples: Sequence[Sample], root: Root | None = None) -> list[bytes]:
    """The encoded bytes of each sample, short or empty where the shard is.

    From local tars one after the other, from tars on S3 several requests at a time. ``root``, errors: as
    ``locate_tar``.
    """
    tars = locate_tars(shards, samples, root)
    remote = iter(read_remote(tars, samples))
    return [_read_image(tars, s) if tars[s.shard].is_local else next(remote) for s in samples]


def read_remote(tars: Mapping[int, Location], samples: Sequence[Sample]) -> list[bytes]:
    """The bytes of those samples whose tar is on S3, in their order, 16 requests at a time. Raises ShardGoneError.

    tars: as ``locate_tars`` gives.
    """
    return _in_threads(partial(_read_image, tars), [sample for sample in samples if not tars[sample.shard].is_local])


def _read_image(tars: Mapping[int, Location], sample: Sample) -> bytes:
    tar = tars[sample.shard]
    with shard_there(tar):
        return tar.read(sample.offset, sample.length)


def _in_threads(fn: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    if len(items) < 2:
        return list(map(fn, items))
    with ThreadPoolExecutor(min(_READERS, len(items))) as pool:
        return list(pool.map(fn, items))


def locate_tars(shards: Location, samples: Sequence[Sample], root: Root | None = None) -> dict[int, Location]:
    """Where the tar of each shard of these samples is, by shard. ``root``, errors: as ``locate_tar``.

    Each is looked at by one thread, before those that read its images.
    """
    ids = sorted({sample.shard for sample in samples})
    tars = [locate_tar(shards, shard, root) for shard in ids[:1]]  # where one is, all are but for odd lists
    local = shards.is_local and all(tar.is_local for tar in tars)
    find = partial(_locate, shards, root)
    tars += map(find, ids[1:]) if local else _in_threads(find, ids[1:])
    return dict(zip(ids, tars, strict=True))


def _locate(shards: Location, root: Root | None, shard: int) -> Location:
    return locate_tar(shards, shard, root)


@lru_cache(maxsize=_TARS)
def locate_tar(shards: Location, shard: int, root: Root | None = None) -> Location:
    """Where the tar of a shard is: beside its index, or, where the index names a tar, below ``root``.

    ``root``: where the source of the tars is now; None takes what the manifest beside the index says. A tar that the
    index names is looked at, once a process: by its size and both ends, see ``curation.shards.digest_of_ends``. Raises
    ShardGoneError, ShardChangedError.
    """
    file = str(shards / part_name(shard)) if shards.is_local else RangeFile(shards / part_name(shard))
    with pq.ParquetFile(file) as index:
        tar, facts = _tar_of(shards, shard, tar_facts(index.metadata.metadata), root)
    if facts is not None:
        _check_tar(tar, facts, 0)
    return tar


def _tar_of(
    shards: Location, shard: int, facts: TarFacts | None, root: Root | None
) -> tuple[Location, TarFacts | None]:
    if facts is None:
        return shards / shard_name(shard), None
    return file_at(root or _root_of(shards), facts.name), facts


@lru_cache(maxsize=1)
def _root_of(shards: Location) -> Root:
    return root_of(Artifact(shards).outside("source"))


def _check_tar(tar: Location, facts: TarFacts | None, end: int) -> None:
    """Raise unless a tar is there, is the one that was indexed, and not shorter than the ``end`` of its last image."""
    with shard_there(tar):
        size = tar.entry().size
        ends = digest_of_ends(tar.read, size) if facts is not None and size == facts.size else ""
    if facts is not None and size != facts.size:
        raise ShardChangedError(f"{_must(tar)}: it had {facts.size} bytes and has {size}")
    if facts is not None and ends != facts.ends:
        raise ShardChangedError(f"{_must(tar)}: it has other bytes at its ends, in the same size")
    if size < end:
        raise ShardChangedError(f"{_must(tar)}: it breaks off at {size} bytes, and the last image ends at {end}")


@contextmanager
def shard_there(tar: Location) -> Iterator[None]:
    """A block that opens or reads a tar. Raises ShardGoneError when it is not there, or no more."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ShardGoneError(f"{_must(tar)}: it is gone") from e


def _must(tar: Location) -> str:
    return f"{tar} must be the shard that its index is of"
