"""``pool``: what there is, looked at once, without exact copies, numbered for good.

Scan (a unit a task, or a piece of one), exact duplicates (a hash partition a task), numbered parts (a unit a task).
What the passes hand to one another lies in scratch files, so an interrupted pool goes on where it was.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.execute import Executor
from curation.listing import Listing, Root, join_listings, list_source
from curation.pool import (
    DUPLICATE_RECORD,
    KEY_RECORD,
    KEYS_PER_PARTITION,
    MEASURES,
    POOL_SCHEMA,
    REJECTED_SCHEMA,
    PoolConfig,
    find_duplicates,
    key_partition,
    key_records,
    part_sizes,
    scan_schema,
)
from curation.shuffle import read_shuffle, write_shuffle
from curation.sources import Unit, cut_unit, plan_units, read_unit, split_parquet
from curation.store import Entry, Location
from curation.tars import Record
from pipelines.errors import UserError
from pipelines.stage import FOUND, Inputs, Output, Stage, whole_files

BAD_REASONS = ("undecodable", "too_large")  # images that are broken, not merely unwanted
SCAN_BATCH = 1024  # rows of Python values at a time before they become Arrow
SCAN_ROWS = 4096  # images of one scan task, about, where units are few
MANY_UNITS = 1024  # as many units are work enough for everybody, and are not cut into pieces for the scan


class Task(NamedTuple):
    """A unit, or a piece of one, and its place among all that are scanned."""

    number: int
    unit: Unit


def look(config: PoolConfig) -> tuple[Sequence[Entry], Listing]:
    """List the sources; each must be another and have something."""
    sources = [Location(source).resolved() for source in config.sources]
    places = [os.path.realpath(source.uri) if source.is_local else source.uri.rstrip("/") for source in sources]
    again = [source for i, source in enumerate(sources) if places[i] in places[:i]]
    if again:
        raise UserError(f"pool.source must name every source once: got {again[0]} twice", "leave one of them out")
    try:
        listings = [list_source(source) for source in sources]
    except ValueError as e:
        raise UserError(
            str(e), "a source is a folder of images, .tar and .parquet files, one such file, or a .txt list of some"
        ) from e
    for source, listing in zip(config.sources, listings, strict=True):
        if not listing.entries:
            raise UserError(
                f"{source} must hold images, tars or Parquet files: got none",
                "hidden files and metadata (.json, .txt, ...) are not images; links to folders are not followed",
            )
    listing = join_listings(listings)
    return [*listing.entries, *listing.sides], listing


def run(config: PoolConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``part-*`` (kept rows) and ``rejected-*`` (the others, with the reason)."""
    listing: Listing = inputs[FOUND]
    tasks, first_scan = _tasks(config, listing, executor)
    n_units = len(first_scan) - 1
    scans = out.scratch("scan")
    made = {entry.name for entry in scans.list()} if scans.is_folder() else set()
    todo = [task for task in tasks if part_name(task.number) not in made]
    look_at = partial(scan, config=config, root=listing.root, out=scans, notes=out.scratch("decoding"))
    for _ in executor.map(look_at, todo):
        pass
    n_kept = mark_duplicates(first_scan, out, executor)
    first_part, sizes = part_sizes(n_kept, config.part_rows)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    names = [
        [part_name(i, "rejected"), *(part_name(p) for p in range(first_part[i], first_part[i + 1]))]
        for i in range(n_units)
    ]
    items = [(i, int(first_part[i]), int(starts[first_part[i]])) for i in range(n_units)]
    number = partial(write_unit, out=out.location, scratch=out.scratch(""), n_partitions=partitions(out),
                     part_rows=config.part_rows)  # fmt: skip
    out.make(number, items, names, shared={"first_scan": first_scan})
    counts = {"rows": 0, "kept": 0, "dropped": 0, "bad": 0, **add_counts(file.counts for file in out.files)}
    counts["ignored_files"] = listing.ignored
    check_counts(config, counts, out)
    return counts


def _tasks(config: PoolConfig, listing: Listing, executor: Executor) -> tuple[list[Task], np.ndarray]:
    """What is scanned, and int64 (units + 1,): unit ``i`` is the tasks ``first[i]`` to ``first[i + 1]``."""
    split = partial(split_parquet, root=listing.root, part_rows=config.part_rows)
    units = [unit for some in executor.map(split, plan_units(listing, config.part_rows)) for unit in some]
    pieces = [[unit] for unit in units]
    if len(units) < MANY_UNITS:
        pieces = list(executor.map(partial(cut_unit, root=listing.root, rows=SCAN_ROWS), units))
    first = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
    return [Task(i, piece) for i, piece in enumerate(chain.from_iterable(pieces))], first


def scan(task: Task, config: PoolConfig, root: Root, out: Location, notes: Location) -> None:
    """Look at every record of a unit: one row each, with a key and header facts, or with a reason."""
    from embedding.decode import BadImage
    from embedding.measures import scan_image
    from pipelines.isolation import decoding

    schema = scan_schema(config.measures)
    measures = [name for name in schema.names if name in MEASURES]
    limits = (config.max_pixels, config.min_side, config.max_aspect_ratio)

    def looked_at(record: Record) -> tuple[object, ...]:
        """The values of the schema, in its order."""
        data, key, n_bytes = record.data, None, None
        found: dict[str, Any] | BadImage = BadImage(record.reason or "undecodable", record.detail)
        if data is not None:
            key, n_bytes = hashlib.sha256(data).hexdigest(), len(data)
            found = call(scan_image, data, *limits, config.measures)
        facts, why = ({}, (found.reason, found.detail)) if isinstance(found, BadImage) else (found, (None, None))
        seen = (n_bytes, key, facts.get("format"), facts.get("width"), facts.get("height"))
        said = (record.label, record.caption, record.metadata)
        return (*record[:3], *seen, *said, *why, *map(facts.get, measures))

    records = read_unit(root, task.unit, config.image_column, config.label_column)
    with decoding(notes / part_name(task.number)) as call:
        table = rows_to_table(map(looked_at, records), schema)
    write_table(out / part_name(task.number), table)


def rows_to_table(rows: Iterator[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    """Rows, values in the order of the schema, as a table, a batch of Python values at a time."""
    batches = []
    while some := list(islice(rows, SCAN_BATCH)):
        columns = zip(schema.types, zip(*some, strict=True), strict=True)
        batches.append(pa.record_batch([pa.array(values, kind) for kind, values in columns], schema=schema))
    return pa.Table.from_batches(batches, schema)


def partitions(out: Output) -> int:
    """How many hash partitions: noted by the first pass over the keys."""
    return int(out.scratch("n_partitions").read())


def mark_duplicates(first_scan: np.ndarray, out: Output, executor: Executor) -> np.ndarray:
    """Find the rows whose bytes an earlier row has. Returns the number of kept rows of each unit, int64."""
    scratch, n_units, scans = out.scratch(""), len(first_scan) - 1, {"first_scan": first_scan}
    n_good = np.array(list(executor.map(partial(count_good, scratch=scratch), range(n_units), scans)), np.int64)
    n_partitions = max(1, -(-int(n_good.sum()) // KEYS_PER_PARTITION))
    out.scratch("n_partitions").write(str(n_partitions).encode())
    for _ in executor.map(partial(spread_keys, scratch=scratch, n_partitions=n_partitions), range(n_units), scans):
        pass
    find = partial(duplicates_of_partition, scratch=scratch, n_units=n_units)
    n_again = executor.reduce(find, range(n_partitions), np.add)
    n_kept: np.ndarray = n_good - n_again.get()
    return n_kept


def read_scan(scratch: Location, unit: int, first_scan: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a unit as they were scanned, or some columns of them."""
    pieces = range(first_scan[unit], first_scan[unit + 1])
    tables = [read_table(scratch / "scan" / part_name(piece), columns) for piece in pieces]
    return pa.concat_tables(tables).combine_chunks()


def count_good(unit: int, scratch: Location, first_scan: np.ndarray) -> int:
    """Rows of a unit that nothing is wrong with."""
    return int(read_scan(scratch, unit, first_scan, ["reason"])["reason"].null_count)


def spread_keys(unit: int, scratch: Location, n_partitions: int, first_scan: np.ndarray) -> None:
    """Send the keys of a unit's good rows to their hash partitions."""
    scanned = read_scan(scratch, unit, first_scan, ["key", "reason"])
    good_keys = pc.if_else(scanned["reason"].is_null(), scanned["key"], None).combine_chunks()
    records, _ = key_records(good_keys, unit)
    write_shuffle(scratch / "keys" / f"{unit}", records, key_partition(records, n_partitions), n_partitions)


def duplicates_of_partition(partition: int, scratch: Location, n_units: int) -> np.ndarray:
    """Find the duplicates of a hash partition and send them back to their units. Returns their number by unit."""
    records = np.concatenate([read_shuffle(scratch / "keys" / f"{u}", KEY_RECORD, partition) for u in range(n_units)])
    found, unit = find_duplicates(records)
    write_shuffle(scratch / "duplicates" / f"{partition}", found, unit, n_units)
    n_again: np.ndarray = np.bincount(unit, minlength=n_units)
    return n_again


def write_unit(
    item: tuple[int, int, int],
    out: Location,
    scratch: Location,
    n_partitions: int,
    part_rows: int,
    first_scan: np.ndarray,
) -> list[FileInfo]:
    """Write the kept rows of a unit as numbered parts, and its rejected rows."""
    unit, first_part, row_id = item
    scanned = read_scan(scratch, unit, first_scan)
    again = np.concatenate(
        [read_shuffle(scratch / "duplicates" / f"{p}", DUPLICATE_RECORD, unit) for p in range(n_partitions)]
    )
    rejected = reject_duplicates(scanned, again, names_of_first(again, scratch, first_scan))
    files = [write_rejected(out / part_name(unit, "rejected"), rejected)]
    kept = scanned.filter(pc.is_null(rejected["reason"]))
    columns = [*POOL_SCHEMA.names, *(name for name in scanned.column_names if name in MEASURES)]
    for k, start in enumerate(range(0, kept.num_rows, part_rows)):
        location = out / part_name(first_part + k)
        if whole := whole_files(out, [location.name]):
            files += whole
            continue
        rows = kept.slice(start, part_rows)
        ids = pa.array(np.arange(row_id + start, row_id + start + rows.num_rows))
        table = rows.append_column("row_id", ids).select(columns)
        counts = {"rows": rows.num_rows, "kept": rows.num_rows}
        files.append(write_table(location, table, counts))
    return files


def names_of_first(again: np.ndarray, scratch: Location, first_scan: np.ndarray) -> pa.ChunkedArray:
    """What the image that stayed is called, for every DUPLICATE_RECORD: one unit's names in memory at a time."""
    order = np.argsort(again["first_unit"], kind="stable")
    units, starts = np.unique(again["first_unit"][order], return_index=True)
    names = []
    for unit, rows in zip(units.tolist(), np.split(again["first_row"][order], starts)[1:], strict=True):
        first = read_scan(scratch, unit, first_scan, ["source", "member"]).take(pa.array(rows))
        names += pc.binary_join_element_wise(first["source"], first["member"], "/", null_handling="skip").chunks
    return pa.chunked_array(names, pa.string()).take(pa.array(np.argsort(order)))


def reject_duplicates(scanned: pa.Table, again: np.ndarray, first: pa.ChunkedArray) -> pa.Table:
    """The scanned rows with reason ``exact_duplicate`` where ``again`` (DUPLICATE_RECORD) says so, of ``first``."""
    at = np.full(scanned.num_rows, -1)
    at[again["row"]] = np.arange(len(again))
    mask = at >= 0
    table = scanned.append_column("duplicate_of", first.take(pa.array(at, mask=~mask)))
    for name, text in (("reason", "exact_duplicate"), ("detail", "same bytes as the kept image of this key")):
        column = pc.if_else(pa.array(mask), pa.scalar(text), scanned[name])
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def write_rejected(location: Location, table: pa.Table) -> FileInfo:
    """Write the rows that have a reason, counted by reason."""
    rejected = table.filter(pc.is_valid(table["reason"])).select(REJECTED_SCHEMA.names)
    reasons = rejected["reason"].value_counts().to_pylist()
    by_reason = {str(entry["values"]): int(entry["counts"]) for entry in reasons}
    bad = sum(by_reason.get(reason, 0) for reason in BAD_REASONS)
    counts = {"rows": rejected.num_rows, "dropped": rejected.num_rows - bad, "bad": bad}
    return write_table(location, rejected, counts | dict(sorted(by_reason.items())))


def check_counts(config: PoolConfig, counts: Counts, out: Output) -> None:
    """Stop when too many images are bad, or none is left."""
    check_bad(config.max_bad_fraction, counts, out)
    if counts["kept"] == 0:
        raise UserError(
            f"a pool must keep at least one image: got none of {counts['rows']}",
            "see the reasons in the rejected-*.parquet files; min_side and max_aspect_ratio may be too strict",
        )


def check_bad(most: float, counts: Counts, out: Output, reasons: Sequence[str] = BAD_REASONS) -> None:
    """Stop a step when more than a share ``most`` of its images are bad, with the first in its ``rejected-*``.

    reasons: those in there that count as bad.
    """
    if counts["bad"] <= most * counts["rows"]:
        return
    rejected = sorted(file.name for file in out.files if file.name.startswith("rejected-") and file.rows)
    examples: list[str] = []
    for name in rejected[:20]:
        table = read_table(out.location / name, ["source", "reason", "detail"])
        bad = table.filter(pc.is_in(table["reason"], pa.array(reasons))).slice(0, 3)
        examples += [f"{row['source']} ({row['detail']})" for row in bad.to_pylist()]
    raise UserError(
        f"at most {most:.3g} of the images may be bad (max_bad_fraction): "
        f"got {counts['bad']} of {counts['rows']}, first {'; '.join(examples[:3])}",
        "look at the files named; raise max_bad_fraction if such a share is expected",
    )


STAGE = Stage(version=4, config=PoolConfig, run=run, locations=("source",), look=look)
