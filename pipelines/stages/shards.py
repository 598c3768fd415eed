"""``shards``: the selected images as WebDataset tars, shuffled twice, original bytes."""

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.execute import Executor
from curation.selection import read_selection
from curation.shards import (
    INDEX_SCHEMA,
    ShardsConfig,
    TarWriter,
    mixed_order,
    plan_groups,
    shard_bounds,
    write_sample,
)
from curation.sources import read_checked, source_root
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, whole_files


class Group(NamedTuple):
    """Parts whose rows are shuffled together, and the shards they become."""

    number: int
    parts: tuple[int, ...]
    n_rows: int
    first_shard: int


class Source(NamedTuple):
    """Where a task finds the images."""

    pool: Artifact
    selection: Artifact | None
    root: Location  # of the original files
    image_column: str


def shard_name(index: int) -> str:
    """``shard-0000012.tar`` for 12."""
    return f"shard-{index:07d}.tar"


def run(config: ShardsConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``shard-*.tar`` and their index ``part-*.parquet``."""
    pool: Artifact = inputs["pool"]
    selection: Artifact | None = inputs.get("selection")
    if selection is None:
        n_selected = [part.rows for part in pool.parts]
    else:
        n_selected = [part.counts["kept"] for part in selection.parts]
    groups = number_groups(plan_groups(n_selected, config.mix_rows, config.seed), n_selected, config.shard_rows)
    if not groups:
        raise UserError("shards needs at least one selected image: got none", "loosen the selection above it")
    source = Source(pool, selection, source_root(pool.outside("source")), image_column(pool))
    shards = [range(g.first_shard, g.first_shard + len(shard_bounds(g.n_rows, config.shard_rows)) - 1) for g in groups]
    names = [[name for i in ids for name in (shard_name(i), part_name(i))] for ids in shards]
    out.make(partial(write_group, config=config, source=source, out=out.location), groups, names)
    indexes = [file for file in out.files if file.name.startswith("part-")]
    counts = {"rows": sum(n_selected), **add_counts(file.counts for file in indexes)}
    return {**counts, "dropped": 0, "bad": 0, "shards": len(indexes)}


def image_column(pool: Artifact) -> str:
    """The column of image bytes, if the pool was made from Parquet."""
    return str(pool.manifest["config"]["image_column"])


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
    """Gather a group's images in a local scratch file, then write them in mixed order.

    The scratch file holds one group's bytes; in memory are its rows without images.
    """
    with tempfile.TemporaryFile(prefix="openlvd-") as scratch:
        rows, places = gather(group, source, scratch)
        order = mixed_order(len(rows), config.seed, group.number)
        bounds = shard_bounds(len(rows), config.shard_rows)
        files: list[FileInfo] = []
        for k in range(len(bounds) - 1):
            mine = order[bounds[k] : bounds[k + 1]]
            files += write_shard(group.first_shard + k, mine, rows, places, scratch, out)
    return files


def gather(group: Group, source: Source, scratch: BinaryIO) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Copy the images of a group one after the other. Returns their rows and int64 (n, 2) offset and length.

    Raises ValueError when an image is not the one that the pool saw.
    """
    rows: list[dict[str, Any]] = []
    places: list[tuple[int, int]] = []
    for row, data in images_of(group, source):
        places.append((scratch.tell(), len(data)))
        scratch.write(data)
        rows.append(row)
    return rows, np.array(places, np.int64).reshape(-1, 2)


def images_of(group: Group, source: Source) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The selected rows of a group, with how often they are seen, and their bytes."""
    for part in group.parts:
        table = read_table(source.pool.part(part))
        if source.selection is not None:
            chosen = read_selection(source.selection.part(part))
            table = table.take(pa.array(chosen.rows)).append_column("count", pa.array(chosen.counts, pa.int32()))
        else:
            table = table.append_column("count", pa.array(np.ones(table.num_rows, np.int32)))
        yield from zip(table.to_pylist(), read_checked(source.root, table, source.image_column), strict=True)


def write_shard(
    index: int, mine: np.ndarray, rows: list[dict[str, Any]], places: np.ndarray, scratch: BinaryIO, out: Location
) -> list[FileInfo]:
    """One tar and, once that is whole, its index."""
    if whole := whole_files(out, [shard_name(index), part_name(index)]):
        return whole
    entries: list[dict[str, Any]] = []
    location = out / shard_name(index)
    with location.side_file() as side, TarWriter(side) as tar:
        for i in mine.tolist():
            offset, length = places[i].tolist()
            scratch.seek(offset)
            at = write_sample(tar, rows[i], scratch.read(length))
            entries.append({**rows[i], "offset": at, "length": length})
    info = FileInfo(location.name, 0, tar.size, tar.sha256(), {})
    table = pa.Table.from_pylist(entries, INDEX_SCHEMA)
    counts = {"kept": len(entries), "seen_per_epoch": sum(entry["count"] for entry in entries)}
    return [info, write_table(out / part_name(index), table, counts)]


STAGE = Stage(
    version=1,
    config=ShardsConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
)
