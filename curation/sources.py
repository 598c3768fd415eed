"""Where images come from: folders, tars (WebDataset too) and Parquet with image bytes, read unit by unit.

A unit is what one task reads: a slice of a file listing, one tar, a run of Parquet row groups. Units stand in the
order of the sorted listing and records in the order of the unit, so a row's position is the same in every run.
The kind of a file is told by its suffix only where a container is meant (``.tar``, ``.parquet``); whether
something is an image is told later, by its bytes.

What cannot be read (a file that is gone, that may not be read, or is no tar or Parquet file though it is called one)
is a record without data, so that it is counted and listed. Where the reading itself fails, as when a connection
breaks, an error is raised: another try may give the bytes.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.store import Entry, Location, RangeFile
from curation.tars import (
    CAPTION_COLUMNS,
    MAX_FILE_BYTES,
    METADATA_SUFFIXES,
    Record,
    is_hidden,
    json_text,
    parent_folder,
    read_tar,
    text_of,
    too_long,
    utf8_text,
)

ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # bytes in them have no offset
WILDCARD = re.compile(r"(\*\*/?|[*?]|\[[^]/]+\])")
ROOT_FILE = "run.json"  # what a run writes at its root: below such a folder are its own files, no images to look at
COALESCE_GAP = 1 << 18  # bytes between two ranges of one object that are cheaper read than asked for apart
COALESCE_BYTES = 1 << 26  # of one such request, unless one image is larger
ENCODED = "./"  # begins a name that is no UTF-8, then percent-encoded; no name of a listing on a disk begins so
_ILL_NAMES = (errno.ELOOP, errno.ENAMETOOLONG)
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError)
_DETAIL_CHARS = 200


class Unit(NamedTuple):
    """What one scan task reads."""

    kind: str  # "files", "tar" or "parquet"
    names: tuple[str, ...]  # relative to the source root; one name unless the kind is "files"
    first: int = 0  # first row group, for "parquet"
    stop: int = 0  # one after the last row group
    first_row: int = 0  # rows of the file before the first row group


class Listing(NamedTuple):
    """What was found below a source, before anything was read."""

    root: Location
    entries: list[Entry]  # candidates, in the order of their names
    ignored: int  # hidden files, metadata, what runs wrote, links to folders, pipes and the like


def list_source(source: Location) -> Listing:
    """List a folder, a prefix, a single tar, Parquet or image file, or what fits a pattern (``split_pattern``).

    Folders below it that are the root of a run are ignored with all that is in them. Links to files are read, those
    that lead nowhere or round are entries that cannot be read, links to folders are ignored: they may lead round, or
    anywhere. Names are UTF-8; a name on a disk that is none has its bytes percent-encoded behind ``./``
    (``./caf%E9.jpg``), see ``file_at``. Raises FileNotFoundError when there is nothing of that name; ValueError for
    nothing but compressed archives, or a source that is itself the root of a run. O(files) names are held here: pools
    of more than some 10^7 images are kept in tars or Parquet, of which a listing is short.
    """
    root, entries, n_others = _look_below(source)
    runs = tuple(_roots_of_runs(root, entries))
    if "" in runs:
        raise ValueError(f"{source} must not be the root of a run, where its own files are: it holds {ROOT_FILE}")
    pattern = split_pattern(source)[1]
    if pattern:  # after the look for runs, whose shards may fit it
        entries = [entry for entry in entries if re.fullmatch(pattern, entry.name, re.DOTALL)]
        if not entries:
            raise FileNotFoundError(f"no file that fits {source}")
    wanted = [entry for entry in entries if _is_candidate(entry.name) and not entry.name.startswith(runs)]
    packed = [entry.name for entry in wanted if entry.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if packed and len(packed) == len(wanted):  # a stray one among images is one undecodable file
        raise ValueError(
            f"compressed archives must be unpacked to .tar or to files: {len(packed)} in {source}, first {packed[0]}"
        )
    named = [entry._replace(name=_utf8_name(entry.name)) for entry in wanted]
    return Listing(root, named, len(entries) - len(wanted) + n_others)


def _look_below(source: Location) -> tuple[Location, list[Entry], int]:
    """The folder that names are relative to, what is below it, sorted, and how much of it is neither file nor folder.

    What cannot be looked at has an empty stamp, so that its digest changes when it can.
    """
    root, pattern = split_pattern(source)
    if not pattern and root != source:
        if source.is_local and source.exists() and not source.path.is_file():
            raise ValueError(f"{source} must be a folder or a file: it is a pipe, a socket or a device")
        if not source.exists():
            raise FileNotFoundError(f"no folder or file {source}")
        return root, [source.entry()], 0
    if not root.is_folder():
        raise FileNotFoundError(f"no file that fits {source}")
    found = root.below()
    entries = sorted([*found.files, *(Entry(name, 0, "") for name in found.lost)])
    return root, entries, 0 if pattern else found.n_others


def _utf8_name(name: str) -> str:
    return name if utf8_text(name) == name else ENCODED + quote(os.fsencode(name))


def file_at(root: Location, source: str) -> Location:
    """The file that a pool calls ``source``: below its root, by a name that may be no UTF-8 (see ``list_source``)."""
    if root.is_local and source.startswith(ENCODED):
        return root / os.fsdecode(unquote_to_bytes(source.removeprefix(ENCODED)))
    return root / source


def source_root(source: Location) -> Location:
    """What the names in a pool are relative to: the source, or the folder of a file or of a pattern."""
    return split_pattern(source)[0]


def split_pattern(source: Location) -> tuple[Location, str]:
    """The folder that a source is in, and the regular expression of the names meant; "" without a wildcard.

    ``*`` and ``?`` stand for characters of one name, ``**`` for any folders too, ``[ab]`` for one of some characters.
    What is there by that very name is no pattern, so folders may have brackets in their names.
    """
    if source.is_folder():
        return source, ""
    pieces = source.uri.split("/")
    wild = (i for i, piece in enumerate(pieces) if WILDCARD.search(piece))
    first = next((i for i in wild if not Location("/".join(pieces[: i + 1])).is_folder()), None)
    if first is None or source.exists():
        return source.parent, ""
    folder = Location("/".join(pieces[:first]) or ("/" if source.uri.startswith("/") else "."))
    expression = "".join(map(_as_expression, WILDCARD.split("/".join(pieces[first:]))))
    try:
        re.compile(expression)
    except re.error as e:
        raise ValueError(f"a pattern must be one of *, ?, ** and [...] among text: got {source} ({e})") from e
    return folder, expression


def _as_expression(piece: str) -> str:
    """One wildcard, or the text between two, as a regular expression."""
    if piece.startswith("[") and len(piece) > 1:
        return piece.replace("\\", r"\\").replace("[!", "[^", 1)
    return {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))


def _roots_of_runs(root: Location, entries: Sequence[Entry]) -> Iterator[str]:
    """The folders, as ``a/b/``, that hold a ``run.json`` with the steps of a run; "" is the root itself."""
    for entry in entries:
        folder, _, name = entry.name.rpartition("/")
        if name == ROOT_FILE:
            try:
                data = (root / entry.name).read()
            except OSError as e:
                why_lost(root, e)  # the images beside it are no less images
                continue
            noted = json.loads(json_text(data) or "null")
            if isinstance(noted, dict) and "steps" in noted:
                yield folder + "/" if folder else ""


def _is_candidate(name: str) -> bool:
    return not any(map(is_hidden, name.split("/"))) and Path(name).suffix.lower() not in METADATA_SUFFIXES


def plan_units(listing: Listing, part_rows: int) -> list[Unit]:
    """Cut a listing into units of at most ``part_rows`` loose files, whole tars, and whole Parquet files.

    ``split_parquet`` cuts the last kind further, on a worker, because that needs the file's footer.
    """
    units: list[Unit] = []
    loose: list[str] = []

    def flush() -> None:
        if loose:
            units.append(Unit("files", tuple(loose)))
            loose.clear()

    for entry in listing.entries:
        suffix = Path(entry.name).suffix.lower()
        if suffix in (".tar", ".parquet"):
            flush()
            units.append(Unit(suffix[1:], (entry.name,)))
        else:
            loose.append(entry.name)
            if len(loose) == part_rows:
                flush()
    flush()
    return units


def split_parquet(unit: Unit, root: Location, part_rows: int) -> list[Unit]:
    """A Parquet file as runs of row groups with about ``part_rows`` rows each; other units as they are.

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
    first = first_row = rows = 0
    for group, size in enumerate(sizes):
        if rows and rows + size > part_rows:
            runs.append(unit._replace(first=first, stop=group, first_row=first_row))
            first, first_row, rows = group, first_row + rows, 0
        rows += size
    return [*runs, unit._replace(first=first, stop=len(sizes), first_row=first_row)]


def read_unit(root: Location, unit: Unit, image_column: str, label_column: str) -> Iterator[Record]:
    """The records of a unit in order, one image's bytes in memory at a time (a row group's for Parquet)."""
    for name in unit.names:
        location = file_at(root, name)
        try:
            if unit.kind == "files":
                data = _read_file(location)
                detail = "" if data is not None else too_long(location.entry().size)
                yield Record(name, None, None, data, parent_folder(name), detail=detail)
            elif unit.kind == "tar":
                with location.local_copy() as path:
                    yield from read_tar(path, name, label_column)
            else:
                with _open_parquet(location) as file:
                    yield from _read_row_groups(file, unit, image_column, label_column)
        except SpoiltParquet as e:
            yield Record(name, None, None, None, detail=f"must be a Parquet file: {e}")
        except OSError as e:
            yield Record(name, None, None, None, detail=why_lost(location, e))


def _read_file(location: Location) -> bytes | None:
    """The bytes of a file, None of one that is longer than any image."""
    if location.is_local and location.path.stat().st_size > MAX_FILE_BYTES:
        return None
    data = location.read() if location.is_local else location.read(0, MAX_FILE_BYTES + 1)
    return data if len(data) <= MAX_FILE_BYTES else None


def why_lost(location: Location, error: OSError) -> str:
    """Why a listed file cannot be read, in words without its place. Raises the error when another try may go well.

    On S3 that is also a refusal: it is about who asks, not about the object.
    """
    if isinstance(error, FileNotFoundError):
        return "cannot be read: it is gone, or a link that leads nowhere"
    local = isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)) or error.errno in _ILL_NAMES
    if not location.is_local or not local:
        raise error
    return f"cannot be read: {os.strerror(error.errno or 0)}"


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
            self.names: list[str] = self._file.schema_arrow.names
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
    if image_column not in file.names:
        words = f"must have a column {image_column!r} (image_column) with image bytes: it has {', '.join(file.names)}"
        yield Record(name, None, None, None, detail=utf8_text(words))
        return
    for group in range(unit.first, unit.stop):
        size = file.group_sizes[group]
        try:
            records = _records_of(file.group(group), name, row, image_column, label_column)
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

    def record(i: int) -> Record:
        values = {field: cells[i] for field, cells in others}
        return Record(
            name,
            text_of(members[i]),
            row + i,
            images[i].as_py() or b"",
            text_of(values.get(label_column)),
            next((text_of(values[field]) for field in CAPTION_COLUMNS if values.get(field)), None),
            json.dumps(values, sort_keys=True, default=str) if values else None,
        )

    return map(record, range(table.num_rows))


def _one_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if table.column_names.count(name) > 1:
        raise ValueError(f"must have one column {name!r}: it has {table.column_names.count(name)}")
    return table[name]


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Cells as Python values; None for one that is none, such as text that is no UTF-8, as for odd JSON in a tar."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, ArithmeticError):
        values = [_plain_cell(cell) for cell in column]
    return values


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


def read_checked(root: Location, rows: pa.Table, image_column: str = "image") -> Iterator[bytes]:
    """``read_images``, each image compared with its key. Raises ValueError when one is not what the pool saw."""
    keys = rows["key"].to_pylist()
    for i, data in enumerate(read_images(root, rows, image_column)):
        if hashlib.sha256(data).hexdigest() != keys[i]:
            at = file_at(root, rows["source"][i].as_py())
            raise ValueError(f"{at} must hold the image that the pool saw: its bytes have changed since")
        yield data


def read_images(root: Location, rows: pa.Table, image_column: str = "image") -> Iterator[bytes]:
    """The original bytes of pool rows (columns source, offset, n_bytes), in order.

    Rows of one container are read together: tars by ranges, Parquet by row group. Raises ValueError when an image
    is not as long as the pool saw it.
    """
    sources, lengths = rows["source"].to_pylist(), rows["n_bytes"].to_pylist()
    found = _read_runs(root, sources, rows["offset"].to_pylist(), lengths, image_column)
    for name, length, data in zip(sources, lengths, found, strict=True):
        if len(data) != length:
            raise ValueError(
                f"{file_at(root, name)} must hold the image that the pool saw: "
                f"it had {length} bytes and has {len(data)}"
            )
        yield data


def _read_runs(
    root: Location, sources: list[str], offsets: list[int], lengths: list[int], image_column: str
) -> Iterator[bytes]:
    """Images one after the other; neighbours with one source are read together."""
    start = 0
    while start < len(sources):
        stop = start + 1
        while stop < len(sources) and sources[stop] == sources[start]:
            stop += 1
        location = file_at(root, sources[start])
        if offsets[start] is None:
            for _ in range(start, stop):
                yield location.read()
        elif sources[start].lower().endswith(".parquet"):
            yield from _read_parquet_rows(location, offsets[start:stop], image_column)
        else:
            yield from read_ranges(location, offsets[start:stop], lengths[start:stop])
        start = stop


def read_ranges(location: Location, offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    """Byte ranges of one file, in the order given; on S3 ranges that nearly touch are one request."""
    if location.is_local:
        with location.path.open("rb") as file:
            for offset, length in zip(offsets, lengths, strict=True):
                file.seek(offset)
                yield file.read(length)
        return
    start = 0
    while start < len(offsets):
        stop, end = start + 1, offsets[start] + lengths[start]
        while stop < len(offsets) and 0 <= offsets[stop] - end <= COALESCE_GAP:
            if offsets[stop] + lengths[stop] - offsets[start] > COALESCE_BYTES:
                break
            end = offsets[stop] + lengths[stop]
            stop += 1
        data = location.read(offsets[start], end - offsets[start])
        for offset, length in zip(offsets[start:stop], lengths[start:stop], strict=True):
            yield data[offset - offsets[start] : offset - offsets[start] + length]
        start = stop


def _read_parquet_rows(location: Location, wanted: Sequence[int], image_column: str) -> Iterator[bytes]:
    with _open_parquet(location) as file:
        starts = np.cumsum([0, *file.group_sizes])
        loaded, images = -1, pa.chunked_array([], pa.binary())
        for row in wanted:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            if group >= len(file.group_sizes):
                raise ValueError(f"{location} must have row {row}: it has {starts[-1]} rows")
            if group != loaded:
                try:
                    table = file.group(group, columns=[image_column])
                except SpoiltParquet as e:
                    raise ValueError(f"{location} must hold the images that the pool saw: {e}") from e
                loaded, images = group, _image_cells(table[image_column])[1]
            yield images[row - int(starts[group])].as_py() or b""
