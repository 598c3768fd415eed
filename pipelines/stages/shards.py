"""``shards``: the selected images as WebDataset tars, shuffled twice, original bytes."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.copies import apply_changes, change_dtype, counted_keys, merge_copies, record_dtype
from curation.execute import Executor
from curation.images import Images, Part, open_images
from curation.mix import MIX_FILE, MixSpec, component_facts, read_columns, read_mix, write_mix
from curation.pool import KEYS_PER_PARTITION, POOL_SCHEMA, key_partition, source_of_part
from curation.selection import selected_rows
from curation.shards import (
    ShardsConfig,
    index_schema,
    mixed_order,
    plan_groups,
    shard_bounds,
    shard_name,
)
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from curation.tar_writer import BLOCK, TarWriter, lay_out
from pipelines.errors import UserError
from pipelines.rows import unchanged_images
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, whole_files

Result = TypeVar("Result")
N_THREADS = 4  # shards of a group written at a time: some are hashed while others wait for the disk
# What is read of a pool. Texts are large: those of a group, or of a shard, can have more than 2^31 bytes.
ROW_SCHEMA = pa.schema(
    [
        pa.field(field.name, pa.large_string() if field.type == pa.string() else field.type)
        for field in POOL_SCHEMA
        if field.name != "row_id"
    ]
)


class Group(NamedTuple):
    """Parts whose rows are shuffled together, and the shards they become."""

    number: int
    parts: tuple[int, ...]
    n_rows: int
    first_shard: int


class Source(NamedTuple):
    """Where a task finds the images, and what it is to leave out."""

    pool: Artifact
    selection: Artifact | None
    spec: MixSpec | None  # of a selection that is a mix
    copies: Location | None  # of a union: the shuffled keys of its selected rows, and what becomes of those with copies
    n_partitions: int  # of these

    @property
    def n_counts(self) -> int:
        """How many counts a row has: how often it is seen, and of a mix how often in each component."""
        return 1 + (len(self.spec.components) if self.spec else 0)


def run(config: ShardsConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``shard-*.tar`` and their index ``part-*.parquet``, of a mix also its ``mix.json``."""
    pool: Artifact = inputs["pool"]
    selection: Artifact | None = inputs.get("selection")
    if selection is None:
        n_selected = [part.rows for part in pool.parts]
    else:
        n_selected = [part.counts["kept"] for part in selection.parts]
    if not sum(n_selected):
        raise UserError("shards needs at least one selected image: got none", "loosen the selection above it")
    spec = None if selection is None else read_mix(selection.location)
    n_partitions = -(-sum(n_selected) // KEYS_PER_PARTITION)
    source = Source(pool, selection, spec, out.scratch("copies") if pool.members else None, n_partitions)
    n_kept = without_copies(source, n_selected, executor) if pool.members else n_selected
    groups = number_groups(plan_groups(n_kept, config.mix_rows, config.seed), n_kept, config.shard_rows)
    shards = [range(g.first_shard, g.first_shard + len(shard_bounds(g.n_rows, config.shard_rows)) - 1) for g in groups]
    names = [[name for i in ids for name in (shard_name(i), part_name(i))] for ids in shards]
    out.make(partial(write_group, config=config, source=source, out=out.location), groups, names)
    if spec is not None:
        out.make(partial(write_mix, spec=spec, out=out.location), [MIX_FILE], [[MIX_FILE]])
    return count_rows(n_selected, n_kept, source, out)


def count_rows(n_selected: list[int], n_kept: list[int], source: Source, out: Output) -> Counts:
    """The counts of the step; what each component of a mix has goes into the facts."""
    indexes = [file for file in out.files if file.name.startswith("part-")]
    counts = add_counts(file.counts for file in indexes)
    if source.spec is not None:
        out.facts["components"], counts = component_facts(source.spec.components, counts)
    dropped = sum(n_selected) - sum(n_kept)
    counts = {"rows": sum(n_selected), **counts, "dropped": dropped, "bad": 0, "shards": len(indexes)}
    return counts if source.copies is None else {**counts, "duplicates": dropped}


def without_copies(source: Source, n_selected: list[int], executor: Executor) -> list[int]:
    """Find the selected rows whose bytes an earlier one has. Returns how many rows of each part stay."""
    n_parts = len(n_selected)
    for _ in executor.map(partial(spread_keys, source=source), range(n_parts)):
        pass
    find = partial(copies_of_partition, source=source, n_parts=n_parts)
    n_dropped = executor.reduce(find, range(source.n_partitions), np.add).get()
    left: list[int] = (np.array(n_selected, np.int64) - n_dropped).tolist()
    return left


def spread_keys(part: int, source: Source) -> None:
    """Send the keys of a part's selected rows, with their counts, to their hash partitions."""
    rows, counts = counted_rows(source, part)
    keys = read_table(source.pool.part(part), ["key"])["key"].combine_chunks().take(pa.array(rows))
    records = counted_keys(keys, part, rows, counts)
    to = key_partition(records, source.n_partitions)
    write_shuffle(copies_at(source, "keys", part), records, to, source.n_partitions)


def copies_of_partition(partition: int, source: Source, n_parts: int) -> np.ndarray:
    """Send what becomes of the copies of a hash partition back to their parts. Returns how many each part drops."""
    dtype = record_dtype(source.n_counts)
    records = np.concatenate([read_shuffle(copies_at(source, "keys", p), dtype, partition) for p in range(n_parts)])
    changes, part = merge_copies(records)
    write_shuffle(copies_at(source, "changes", partition), changes, part, n_parts)
    n_dropped: np.ndarray = np.bincount(part[changes["counts"][:, 0] == 0], minlength=n_parts)
    return n_dropped


def copies_at(source: Source, kind: str, index: int) -> Location:
    """The shuffle file of a part (``keys``) or of a hash partition (``changes``)."""
    if source.copies is None:
        raise ValueError("copies are looked for in a union of pools only")
    return source.copies / kind / str(index)


def counted_rows(source: Source, part: int) -> tuple[np.ndarray, np.ndarray]:
    """The selected rows of a part, int32 (n,), and their counts, int32 (n, n_counts)."""
    chosen = selected_rows(source.pool, source.selection, part)
    counts = chosen.counts.reshape(-1, 1)
    if source.spec is not None and source.selection is not None:
        counts = np.concatenate([counts, read_columns(source.selection.part(part), source.spec.columns)], axis=1)
    return chosen.rows, counts


def rows_of_part(source: Source, part: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a part that go into shards: as ``counted_rows``, without the copies of earlier rows."""
    rows, counts = counted_rows(source, part)
    if source.copies is None:
        return rows, counts
    files = [copies_at(source, "changes", partition) for partition in range(source.n_partitions)]
    changes = [read_shuffle(file, change_dtype(source.n_counts), part) for file in files]
    return apply_changes(rows, counts, np.concatenate(changes))


def number_groups(groups: list[list[int]], n_selected: list[int], shard_rows: int) -> list[Group]:
    """Give every group its first shard."""
    numbered: list[Group] = []
    first_shard = 0
    for index, parts in enumerate(groups):
        n_rows = sum(n_selected[part] for part in parts)
        numbered.append(Group(index, tuple(parts), n_rows, first_shard))
        first_shard += len(shard_bounds(n_rows, shard_rows)) - 1
    return numbered


def write_group(group: Group, config: ShardsConfig, source: Source, out: Location) -> list[FileInfo]:
    """Write a group's images in mixed order.

    In memory are its rows without images and a piece of a tar for each of ``N_THREADS``. Images that cannot be read
    in any order at full speed (small ones, Parquet, S3) are first copied to a local scratch file, which holds one
    group's bytes. Raises UserError when an image is not the one that the pool saw.
    """
    parts = in_threads(partial(part_rows, source), group.parts)
    rows = pa.concat_tables([part.rows for part in parts]).combine_chunks()
    order = mixed_order(rows.num_rows, config.seed, group.number)
    bounds = shard_bounds(rows.num_rows, config.shard_rows)
    numbers = range(group.first_shard, group.first_shard + len(bounds) - 1)
    with unchanged_images(), open_images(parts) as images:
        write = partial(write_shard, rows=rows, images=images, out=out, spec=source.spec)
        files = in_threads(write, numbers, np.split(order, bounds[1:-1]))
    return [file for some in files for file in some]


def in_threads(fn: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """``fn`` of all items, ``N_THREADS`` at a time. When one fails no other is begun; those begun are waited for."""
    with ThreadPoolExecutor(N_THREADS) as threads:
        return list(threads.map(fn, *items))


def part_rows(source: Source, part: int) -> Part:
    """The rows of a part that go into shards, with how often they are seen."""
    rows, counts = rows_of_part(source, part)
    table = read_table(source.pool.part(part), ROW_SCHEMA.names).take(pa.array(rows)).cast(ROW_SCHEMA)
    row_id = pa.array(rows + source.pool.starts[part])  # in a union another than in the member
    table = table.append_column("row_id", row_id)
    for name, column in zip(["count", *(source.spec.columns if source.spec else ())], counts.T, strict=True):
        table = table.append_column(name, pa.array(column, pa.int32()))
    return Part(*source_of_part(source.pool, part), table)


def write_shard(
    index: int, mine: np.ndarray, rows: pa.Table, images: Images, out: Location, spec: MixSpec | None
) -> list[FileInfo]:
    """One tar and, once that is whole, its index. ``mine`` are its rows, int64, in their order."""
    if whole := whole_files(out, [shard_name(index), part_name(index)]):
        return whole
    samples = rows.take(pa.array(mine))
    layout = lay_out(samples)
    location = out / shard_name(index)
    with location.side_file() as side, TarWriter(side) as tar:
        buffer = np.empty(layout.largest_piece(), np.uint8)
        for first, stop in layout.pieces():
            piece = buffer[: layout.n_bytes(first, stop)]
            at = layout.fill(first, stop, piece)
            images.read(mine[first:stop], piece.data, at)
            tar.put(piece.data)
    info = FileInfo(location.name, 0, tar.size, tar.sha256(), {})
    places = {"offset": pa.array(layout.images * BLOCK), "length": pa.array(layout.lengths)}
    schema = index_schema(spec.columns if spec else ())
    table = pa.table([places[name] if name in places else samples[name] for name in schema.names], schema.names)
    return [info, write_table(out / part_name(index), table.cast(schema), count_samples(samples, spec))]


def count_samples(samples: pa.Table, spec: MixSpec | None) -> Counts:
    """The counts of a shard."""
    counts = {"kept": samples.num_rows, "seen_per_epoch": int(samples["count"].to_numpy().sum(dtype=np.int64))}
    for name, column in zip(spec.components, spec.columns, strict=True) if spec else ():
        times = samples[column].to_numpy()
        counts[f"rows:{name}"] = int((times > 0).sum())
        counts[f"samples:{name}"] = int(times.sum(dtype=np.int64))
    return counts


STAGE = Stage(
    version=1,
    config=ShardsConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
)
