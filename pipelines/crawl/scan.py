"""Reads the files of a URL table, and tells of every row what its URL alone decides. Every engine reads with this."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.artifact import FileInfo, part_name, write_table
from curation.store import Location
from curation.urls import is_public, normal_urls, parents
from pipelines.crawl.rules import AT, DOMAIN, KEY, PART, REASON, URL, CrawlConfig

BATCH_ROWS = 16_384  # rows in memory at a time, where one is done with after the other
FILE_BITS = 23  # a row's place is (number of its file, number in the file) in one int64
ROW_BITS = 40
PLAIN_TYPES = (pa.types.is_boolean, pa.types.is_signed_integer, pa.types.is_float32, pa.types.is_float64,
               pa.types.is_string, pa.types.is_binary, pa.types.is_date32)  # fmt: skip
SAME_AS = {  # types that become one that every engine has, without loss
    pa.null(): pa.string(), pa.large_string(): pa.string(), pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(), pa.binary_view(): pa.binary(), pa.float16(): pa.float32(),
    pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(),
}  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """What every worker knows of a table: its files in order, its columns, and the rules about URLs."""

    config: CrawlConfig
    files: tuple[str, ...]  # URIs
    schema: pa.Schema  # of the columns that are carried along
    blocked: frozenset[str] = field(default_factory=frozenset)  # domains, with all below them

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are carried along."""
        return list(self.schema.names)

    @property
    def row_schema(self) -> pa.Schema:
        """Of what ``read_rows`` gives: the columns, a row's domain, place and normal URL, and why it is dropped."""
        own = [(DOMAIN, pa.string()), (AT, pa.int64()), (URL, pa.string()), (REASON, pa.string())]
        return pa.schema([*self.schema, *(pa.field(name, kind) for name, kind in own)])

    @property
    def result_schema(self) -> pa.Schema:
        """Of a part of the result."""
        return pa.schema([*self.schema, pa.field(DOMAIN, pa.string()), pa.field(KEY, pa.string())])


def table_schema(config: CrawlConfig, found: pa.Schema) -> pa.Schema:
    """The columns to carry along, in types that every engine has. Raises ValueError for what cannot be one."""
    needed = [name for name in (config.url, config.domain) if name]
    missing = [name for name in (*needed, *config.columns) if name not in found.names]
    if missing:
        raise ValueError(f"a table must have column {missing[0]}: got {', '.join(found.names)}")
    wanted = {*needed, config.width, config.height, *config.columns} if config.columns else set(found.names)
    fields = [one for one in found if one.name in wanted - {DOMAIN, KEY}]  # those are made anew
    lower = [one.name.lower() for one in fields]
    twice = [name for name in lower if lower.count(name) > 1 or name in (AT, URL, REASON, PART, DOMAIN, KEY)]
    if twice:
        raise ValueError(f"columns must differ in more than upper case, and not be called crawl_...: got {twice[0]}")
    kinds = {one.name: _plain_type(one) for one in fields}
    for name in needed:
        if kinds[name] != pa.string():
            raise ValueError(f"column {name} must be text: got {found.field(name).type}")
    for name in (config.width, config.height):
        if name in kinds and not (pa.types.is_integer(kinds[name]) or pa.types.is_floating(kinds[name])):
            raise ValueError(f"column {name} must be a number of pixels: got {found.field(name).type}")
    return pa.schema(list(kinds.items()))


def _plain_type(one: pa.Field) -> pa.DataType:
    kind = one.type.value_type if pa.types.is_dictionary(one.type) else one.type
    kind = SAME_AS.get(kind, kind)
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if not any(is_kind(kind) for is_kind in PLAIN_TYPES):
        raise ValueError(f"column {one.name} must be text, numbers, dates or bytes: got {kind}; name others in columns")
    return kind


def read_schema(location: Location) -> pa.Schema:
    """The columns of a file. Raises ValueError when it is no Parquet."""
    with location.local_copy() as path:
        try:
            return pq.read_schema(path)
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{location} must be a Parquet file: {_first_line(e)}") from e


def read_rows(scan: Scan, index: int) -> Iterator[pa.RecordBatch]:
    """The rows of a file as ``scan.row_schema``. Raises ValueError when it is not what it should be."""
    location = Location(scan.files[index])
    first = index << ROW_BITS
    with location.local_copy() as path:
        try:
            with pq.ParquetFile(path) as file:
                names = [name for name in scan.columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(BATCH_ROWS, columns=names):
                    rows = _in_schema(batch, scan.schema)
                    rows.validate(full=True)  # text that is no UTF-8 is told here
                    yield judge_urls(scan, rows, first)
                    first += batch.num_rows
        except (pa.ArrowException, OSError) as e:
            raise ValueError(
                f"{location} must be a Parquet file with the columns of {scan.files[0]}: {_first_line(e)}"
            ) from e


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _in_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of a schema; one that the file lacks is null."""
    columns = [
        batch.column(one.name).cast(one.type, safe=not pa.types.is_timestamp(one.type))  # ns become us
        if one.name in batch.schema.names
        else pa.nulls(batch.num_rows, one.type)
        for one in schema
    ]
    return pa.record_batch(columns, schema=schema)


def judge_urls(scan: Scan, rows: pa.RecordBatch, first: int) -> pa.RecordBatch:
    """Rows with their domain, their place (``first`` is that of the first one), normal URL and reason."""
    config = scan.config
    urls, hosts, reasons = normal_urls(rows.column(config.url))
    allowed = pc.match_substring_regex(urls, f"^(?:{'|'.join(config.schemes)})://")
    reasons = pc.if_else(pc.fill_null(allowed, True), reasons, "scheme")
    reasons = pc.coalesce(reasons, _of_each(hosts, lambda host: _host_reason(scan, host)))
    domains = pc.replace_substring_regex(hosts, r"^www\.(.)", r"\1")
    if config.domain:
        given = pc.utf8_lower(pc.utf8_trim_whitespace(rows.column(config.domain)))
        domains = pc.coalesce(pc.if_else(pc.equal(given, ""), None, given), domains)
    at = pa.array(np.arange(first, first + rows.num_rows, dtype=np.int64))
    return pa.record_batch([*rows.columns, domains, at, urls, reasons], schema=scan.row_schema)


def _of_each(hosts: pa.Array, reason_of: object) -> pa.Array:
    """A reason for every row; of each host it is found once."""
    encoded = hosts.dictionary_encode()
    found = pa.array([reason_of(host) for host in encoded.dictionary.to_pylist()], pa.string())  # type: ignore[operator]
    return found.take(encoded.indices)


def _host_reason(scan: Scan, host: str) -> str | None:
    if not scan.config.private_hosts and not is_public(host):
        return "private_host"
    return "blocked" if any(domain in scan.blocked for domain in parents(host)) else None


def write_parts(batches: Iterable[pa.RecordBatch], out: Location, schema: pa.Schema) -> Iterator[FileInfo]:
    """Write the parts that stand one after the other in ``batches``, ordered within; one part in memory at a time."""
    pieces: list[pa.Table] = []
    part = -1
    for batch in batches:
        numbers = batch.column(PART).to_numpy()
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # a batch begins with a piece, of the same part or not
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            if pieces and numbers[start] != part:
                yield _write_part(pieces, part, out, schema)
                pieces = []
            part = int(numbers[start])
            pieces.append(pa.Table.from_batches([batch.slice(start, stop - start)]))
    if pieces:
        yield _write_part(pieces, part, out, schema)


def _write_part(pieces: list[pa.Table], part: int, out: Location, schema: pa.Schema) -> FileInfo:
    rows = pa.concat_tables(pieces).select(range(len(schema)))  # by place: their names are those of the query
    return write_table(out / part_name(part), rows.rename_columns(schema.names).cast(schema))
