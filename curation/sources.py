"""Where images come from: folders, tars (WebDataset too) and Parquet with image bytes, read unit by unit.

A unit is what one task reads: a slice of a file listing, one tar, a run of Parquet row groups. Units stand in the
order of the sorted listing and records in the order of the unit, so a row's position is the same in every run.
The kind of a file is told by its suffix only where a container is meant (``.tar``, ``.parquet``); whether
something is an image is told later, by its bytes.

What cannot be read (a file that is gone, that may not be read, or is no tar or Parquet file though it is called one)
is a record without data, so that it is counted and listed. Where the reading itself fails, as when a connection
breaks, an error is raised: another try may give the bytes.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.listing import CONTAINER_SUFFIXES, Listing, Root, file_at, name_in_source, stem, suffix, why_lost
from curation.store import S3_REQUESTS, Entry, Location, RangeFile
from curation.tars import (
    CAPTION_COLUMNS,
    MAX_FILE_BYTES,
    Record,
    bytes_text,
    parent_folder,
    read_tar,
    text_of,
    to_json,
    too_long,
    utf8_text,
    with_side,
)

ANY_COLUMN = "image"  # the name of an image column that is looked for under other names too
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "img_bytes", "image_data", "bytes")
NOT_DOWNLOADED = "not_downloaded"  # why a row has no image: img2dataset could not fetch it
COALESCE_GAP = 1 << 18  # bytes between two ranges of one object that are cheaper read than asked for apart
COALESCE_BYTES = 1 << 26  # of one such request, unless one image is larger
AHEAD_BYTES = 1 << 28  # asked for on S3 and not used yet
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError)
_DETAIL_CHARS = 200
_CELLS_AT_A_TIME = 16

T = TypeVar("T")


class Unit(NamedTuple):
    """What one scan task reads."""

    kind: str  # "files", "tar" or "parquet"
    names: tuple[str, ...]  # relative to the source root; one name unless the kind is "files"
    first: int = 0  # first row group, for "parquet"
    stop: int = 0  # one after the last row group
    first_row: int = 0  # rows of the file before the first row group
    sizes: tuple[int, ...] = ()  # bytes of each file, for "files"
    sides: tuple[str, ...] = ()  # captions and metadata of files, see ``Listing``


def plan_units(listing: Listing, part_rows: int) -> list[Unit]:
    """Cut a listing into units of at most ``part_rows`` loose files, whole tars, and whole Parquet files.

    ``split_parquet`` cuts the last kind further, on a worker, because that needs the file's footer.
    """
    units: list[Unit] = []
    loose: list[Entry] = []
    beside = _by_stem([entry.name for entry in listing.sides])

    def flush() -> None:
        if loose:
            names, sizes, _ = zip(*loose, strict=True)
            units.append(Unit("files", names, sizes=sizes, sides=_sides_of(names, beside)))
            loose.clear()

    for entry in listing.entries:
        kind = suffix(entry.name)
        if kind in CONTAINER_SUFFIXES:
            flush()
            units.append(Unit(kind[1:], (entry.name,)))
        else:
            loose.append(entry)
            if len(loose) == part_rows:
                flush()
    flush()
    return units


def cut_unit(unit: Unit, root: Root, rows: int) -> list[Unit]:
    """A unit in pieces of about ``rows`` images that together have its records; a tar is one piece."""
    if unit.kind != "files":
        return split_parquet(unit, root, rows)
    beside = _by_stem(unit.sides)
    slices = [slice(at, at + rows) for at in range(0, len(unit.names), rows)]
    return [
        unit._replace(names=unit.names[s], sizes=unit.sizes[s], sides=_sides_of(unit.names[s], beside)) for s in slices
    ]


def _sides_of(names: Sequence[str], beside: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(side for name in names for side in beside.get(stem(name), ())))


def _by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stem(name), []).append(name)
    return found


def split_parquet(unit: Unit, root: Root, part_rows: int) -> list[Unit]:
    """A Parquet file, or a run of its row groups, as runs with about ``part_rows`` rows each; other units as they are.

    A file that cannot be read is one run without row groups: reading it will say what is wrong.
    """
    if unit.kind != "parquet":
        return [unit]
    location = file_at(root, unit.names[0])
    try:
        with _open_parquet(location) as file:
            sizes = file.group_sizes
    except SpoiltParquet:
        return [unit]
    except OSError as e:
        why_lost(location, e)
        return [unit]
    runs: list[Unit] = []
    first, stop, first_row, rows = unit.first, unit.stop or len(sizes), unit.first_row, 0
    for group in range(first, stop):
        if rows and rows + sizes[group] > part_rows:
            runs.append(unit._replace(first=first, stop=group, first_row=first_row))
            first, first_row, rows = group, first_row + rows, 0
        rows += sizes[group]
    return [*runs, unit._replace(first=first, stop=stop, first_row=first_row)]


def read_unit(root: Root, unit: Unit, image_column: str, label_column: str) -> Iterator[Record]:
    """The records of a unit in order, one image's bytes in memory at a time (a row group's for Parquet).

    Files on S3 are asked for ahead, see ``ahead``.
    """
    if unit.kind == "files":
        beside = _by_stem(unit.sides)
        reads = (partial(_loose_file, root, name, beside.get(stem(name), ()), label_column) for name in unit.names)
        yield from (read() for read in reads) if root.is_local else ahead(reads, unit.sizes)
        return
    [name] = unit.names
    location = file_at(root, name)
    try:
        if unit.kind == "tar":
            with location.local_copy() as path:
                yield from read_tar(path, name, label_column)
        else:
            with _open_parquet(location) as file:
                yield from _read_row_groups(file, unit, image_column, label_column)
    except SpoiltParquet as e:
        yield Record(name, None, None, None, detail=f"must be a Parquet file: {e}")
    except OSError as e:
        yield Record(name, None, None, None, detail=why_lost(location, e))


def ahead(reads: Iterable[Callable[[], T]], sizes: Iterable[int]) -> Iterator[T]:
    """What ``reads`` give, in order, several at a time: S3_REQUESTS, of together AHEAD_BYTES unless one is larger.

    ``sizes`` are the bytes that each will have in memory. An error is raised in its turn.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    with ThreadPoolExecutor(S3_REQUESTS) as threads:
        try:
            for read, size in zip(reads, sizes, strict=True):
                while waiting and (len(waiting) >= S3_REQUESTS or size + sum(n for n, _ in waiting) > AHEAD_BYTES):
                    yield waiting.popleft()[1].result()
                waiting.append((size, threads.submit(read)))
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()


def _loose_file(root: Root, name: str, sides: Sequence[str], label_column: str) -> Record:
    location = file_at(root, name)
    try:
        data = _read_file(location)
        detail = "" if data is not None else too_long(location.entry().size)
    except OSError as e:
        return Record(name, None, None, None, detail=why_lost(location, e))
    record = Record(name, None, None, data, parent_folder(name_in_source(root, name)), detail=detail)
    return next(with_side([record], _read_sides(root, sides), label_column)) if sides else record


def _read_sides(root: Root, names: Sequence[str]) -> dict[str, bytes]:
    """What stands beside a file, by suffix without its dot. What cannot be read must not cost the image."""
    found = {}
    for name in names:
        location = file_at(root, name)
        try:
            found[Path(name).suffix[1:].lower()] = _read_file(location) or b""
        except OSError as e:
            why_lost(location, e)
    return found


def _read_file(location: Location) -> bytes | None:
    """The bytes of a file, None of one that is longer than any image."""
    if location.is_local:
        with open(location.uri, "rb", buffering=0) as file:  # noqa: PTH123 - no Path, no buffer for millions of files
            data = None if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES else file.readall()
    else:
        data = location.read(0, MAX_FILE_BYTES + 1)
    return data if data is not None and len(data) <= MAX_FILE_BYTES else None


class SpoiltParquet(ValueError):
    """A file, or a row group of it, is no Parquet; the words are the same wherever the file lies."""


class _Parquet:
    """A Parquet file of which every read tells bytes that are wrong from reading that fails."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._ranges = None if location.is_local else _Ranges(location)
        with self._told():
            self._source = self._readable()
            self._file = pq.ParquetFile(self._source)
            self.schema: pa.Schema = self._file.schema_arrow
            self.names: list[str] = self.schema.names
            metadata = self._file.metadata
            self.group_sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            if min(self.group_sizes, default=0) < 0:
                raise ValueError("a row group has less than no rows")

    def group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group. Raises SpoiltParquet."""
        with self._told():
            table = self._file.read_row_group(index, columns=columns)
            table.validate()
        if table.num_rows != self.group_sizes[index]:
            raise SpoiltParquet(f"row group {index} has {table.num_rows} rows, not {self.group_sizes[index]}")
        return table

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        if isinstance(self._source, pa.PythonFile):
            self._source.close()

    def _readable(self) -> Any:
        if self._ranges is not None:
            return pa.PythonFile(self._ranges, mode="r")
        path = self.location.path
        return path if utf8_text(str(path)) == str(path) else pa.PythonFile(path.open("rb"), mode="r")  # Arrow's rule

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except _ARROW_ERRORS as e:
            if self._ranges is not None and self._ranges.failed is not None:
                raise self._ranges.failed from e
            if isinstance(e, OSError) and e.errno is not None:  # Arrow's own have none
                raise
            raise SpoiltParquet(_words(e)) from e


class _Ranges(RangeFile):
    """Remembers what went wrong in reading: Arrow tells it like wrong bytes."""

    failed: OSError | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """As RangeFile."""
        try:
            return super().read(size)
        except OSError as e:
            self.failed = e
            raise


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()[:_DETAIL_CHARS]


@contextmanager
def _open_parquet(location: Location) -> Iterator[_Parquet]:
    """Footer and row groups are read where they are: a unit is a few of them, and fetches no more from S3."""
    file = _Parquet(location)
    try:
        yield file
    finally:
        file.close()


def _read_row_groups(file: _Parquet, unit: Unit, image_column: str, label_column: str) -> Iterator[Record]:
    """Rows of a run of row groups; a group that cannot be read is one record without data."""
    name, row = unit.names[0], unit.first_row
    column = _image_column(file.schema, image_column)
    if column is None:
        words = f"must have a column {image_column!r} (image_column) with image bytes: it has {', '.join(file.names)}"
        yield Record(name, None, None, None, detail=utf8_text(words))
        return
    for group in range(unit.first, unit.stop):
        size = file.group_sizes[group]
        try:
            records = _records_of(file.group(group), name, row, column, label_column)
        except ValueError as e:
            records = iter([Record(name, None, None, None, detail=f"rows {row} to {row + size - 1}: {e}")])
        yield from records
        row += size


def _records_of(table: pa.Table, name: str, row: int, image_column: str, label_column: str) -> Iterator[Record]:
    """The rows of a table, the first of which is ``row``. Raises ValueError for a column that holds no images."""
    paths, images = _image_cells(_one_column(table, image_column))
    members = [None] * table.num_rows if paths is None else _plain(paths)
    others = [(field, _plain(column)) for field, column in zip(table.column_names, table.columns, strict=True)
              if field != image_column]  # fmt: skip

    def record(i: int, data: bytes | None) -> Record:
        values = {field: cells[i] for field, cells in others}
        lost = "" if data is not None else _why_not_downloaded(values)
        return Record(
            name,
            text_of(members[i]),
            row + i,
            None if lost else data or b"",
            text_of(values.get(label_column)),
            next((text_of(values[field]) for field in CAPTION_COLUMNS if values.get(field)), None),
            to_json(values) if values else None,
            detail=lost,
            reason=NOT_DOWNLOADED if lost else "",
        )

    return map(record, count(), _cells(images))


def _cells(column: pa.ChunkedArray) -> Iterator[Any]:
    """The cells as Python values, a few at a time: all images of a row group may be much, one by one is slow."""
    for start in range(0, len(column), _CELLS_AT_A_TIME):
        yield from column.slice(start, _CELLS_AT_A_TIME).to_pylist()


def _why_not_downloaded(values: Mapping[str, Any]) -> str:
    """What img2dataset says of a row without an image, "" when it says nothing."""
    status = values.get("status")
    if not isinstance(status, str) or status in ("", "success"):
        return ""
    return utf8_text(str(values.get("error_message") or status))[:_DETAIL_CHARS]


def _image_column(schema: pa.Schema, wanted: str) -> str | None:
    """The column of images: ``wanted``; if that is ``image`` and not there, the first of IMAGE_COLUMNS with bytes."""
    if wanted in schema.names or wanted != ANY_COLUMN:
        return wanted if wanted in schema.names else None
    fields = [schema.field(schema.get_field_index(name)) for name in IMAGE_COLUMNS if schema.names.count(name) == 1]
    return next((field.name for field in fields if _holds_images(field.type)), None)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return names.count("bytes") == 1 and _is_binary(kind.field(names.index("bytes")).type)
    return _is_binary(kind)


def _one_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if table.column_names.count(name) > 1:
        raise ValueError(f"must have one column {name!r}: it has {table.column_names.count(name)}")
    return table[name]


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Cells as Python values; None for one that is none, such as text that is no UTF-8, as for odd JSON in a tar.

    Bytes are text, as some writers of Parquet leave it, or None: another image is no metadata.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, ArithmeticError):
        values = [_plain_cell(cell) for cell in column]
    return [bytes_text(value) for value in values] if _is_binary(column.type) else values


def _plain_cell(cell: pa.Scalar) -> Any:
    for value in (cell, cell.cast(pa.string()) if pa.types.is_temporal(cell.type) else cell):
        with suppress(ValueError, ArithmeticError):  # a time that Python cannot tell is told as text
            return value.as_py()
    return None


def _image_cells(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray]:
    """(paths, bytes) of an image column: binary, or Hugging Face's struct of bytes and path."""
    cells: dict[str, pa.ChunkedArray] = {"bytes": column}
    if pa.types.is_struct(column.type):
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        cells = dict(zip(names, column.flatten(), strict=True))
    if "bytes" not in cells or not _is_binary(cells["bytes"].type):
        raise ValueError(f"an image column must be binary or a struct with binary 'bytes': got {column.type}")
    return cells.get("path"), cells["bytes"]


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(check(kind.value_type if types.is_dictionary(kind) else kind) for check in checks)


class ImageChanged(ValueError):
    """An image of a pool is not the one that the pool saw."""


def read_checked(root: Root, rows: pa.Table, image_column: str = "image") -> Iterator[bytes]:
    """``read_images``, each image compared with its key. Raises ImageChanged when one is not what the pool saw."""
    keys = rows["key"].to_pylist()
    for i, data in enumerate(read_images(root, rows, image_column)):
        if hashlib.sha256(data).hexdigest() != keys[i]:
            at = file_at(root, rows["source"][i].as_py())
            raise ImageChanged(f"{at} must hold the image that the pool saw: its bytes have changed since")
        yield data


def read_images(root: Root, rows: pa.Table, image_column: str = "image") -> Iterator[bytes]:
    """The original bytes of pool rows (columns source, offset, n_bytes), in order.

    Rows of one container are read together: tars by ranges, Parquet by row group. Raises ImageChanged when an image
    is not as long as the pool saw it, FileNotFoundError when its file is gone.
    """
    sources, lengths = rows["source"].to_pylist(), rows["n_bytes"].to_pylist()
    found = _read_runs(root, sources, rows["offset"].to_pylist(), lengths, image_column)
    for name, length, data in zip(sources, lengths, found, strict=True):
        if len(data) != length:
            raise ImageChanged(
                f"{file_at(root, name)} must hold the image that the pool saw: "
                f"it had {length} bytes and has {len(data)}"
            )
        yield data


def _read_runs(
    root: Root, sources: list[str], offsets: list[int], lengths: list[int], image_column: str
) -> Iterator[bytes]:
    """Images one after the other; neighbours with one source, and those that are files, are read together."""
    start = 0
    while start < len(sources):
        stop, loose = start + 1, offsets[start] is None
        while stop < len(sources) and (offsets[stop] is None if loose else sources[stop] == sources[start]):
            stop += 1
        location = file_at(root, sources[start])
        if loose:
            reads = (file_at(root, name).read for name in sources[start:stop])
            yield from (read() for read in reads) if root.is_local else ahead(reads, lengths[start:stop])
        elif sources[start].lower().endswith(".parquet"):
            yield from _read_parquet_rows(location, offsets[start:stop], image_column)
        else:
            yield from read_ranges(location, offsets[start:stop], lengths[start:stop])
        start = stop


def read_ranges(location: Location, offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    """Byte ranges of one file, in the order given.

    On S3 ranges that nearly touch are one request, and requests are made ahead (see ``ahead``).
    """
    if location.is_local:
        with location.path.open("rb") as file:
            for offset, length in zip(offsets, lengths, strict=True):
                file.seek(offset)
                yield file.read(length)
        return
    runs = _coalesced(offsets, lengths)
    reads = (partial(location.read, offset, size) for _, _, offset, size in runs)
    for (start, stop, first, _), data in zip(runs, ahead(reads, [size for *_, size in runs]), strict=True):
        for offset, length in zip(offsets[start:stop], lengths[start:stop], strict=True):
            yield data[offset - first : offset - first + length]


def _coalesced(offsets: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(first range, one after the last, offset, bytes) of requests for ranges that nearly touch."""
    runs = []
    start = 0
    while start < len(offsets):
        stop, end = start + 1, offsets[start] + lengths[start]
        while stop < len(offsets) and 0 <= offsets[stop] - end <= COALESCE_GAP:
            if offsets[stop] + lengths[stop] - offsets[start] > COALESCE_BYTES:
                break
            end = offsets[stop] + lengths[stop]
            stop += 1
        runs.append((start, stop, offsets[start], end - offsets[start]))
        start = stop
    return runs


def _read_parquet_rows(location: Location, wanted: Sequence[int], image_column: str) -> Iterator[bytes]:
    with _open_parquet(location) as file:
        starts = np.cumsum([0, *file.group_sizes])
        column = _image_column(file.schema, image_column)
        if column is None:
            raise ImageChanged(f"{location} must have the column {image_column!r} with the images that the pool saw")
        loaded, images = -1, pa.chunked_array([], pa.binary())
        for row in wanted:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            if group >= len(file.group_sizes):
                raise ImageChanged(f"{location} must have row {row}: it has {starts[-1]} rows")
            if group != loaded:
                try:
                    table = file.group(group, columns=[column])
                except SpoiltParquet as e:
                    raise ImageChanged(f"{location} must hold the images that the pool saw: {e}") from e
                loaded, images = group, _image_cells(table[column])[1]
            yield images[row - int(starts[group])].as_py() or b""
