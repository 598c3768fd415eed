"""Where images come from: folders, tars (WebDataset too) and Parquet with image bytes, read unit by unit.

A unit is what one task reads: a slice of a file listing, one tar, a run of Parquet row groups. Units stand in the
order of the sorted listing and records in the order of the unit, so a row's position is the same in every run.
The kind of a file is told by its suffix only where a container is meant (``.tar``, ``.parquet``); whether
something is an image is told later, by its bytes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.store import Entry, Location, RangeFile
from curation.tars import (
    CAPTION_COLUMNS,
    METADATA_SUFFIXES,
    Record,
    json_text,
    parent_folder,
    read_tar,
    text_of,
    utf8_text,
)

ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # bytes in them have no offset
ROOT_FILE = "run.json"  # what a run writes at its root: below such a folder are its own files, no images to look at
COALESCE_GAP = 1 << 18  # bytes between two ranges of one object that are cheaper read than asked for apart
COALESCE_BYTES = 1 << 26  # of one such request, unless one image is larger


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
    entries: list[Entry]  # candidates, sorted by name
    ignored: int  # hidden files, metadata, and what runs wrote


def list_source(source: Location) -> Listing:
    """List a folder, a prefix, or a single tar, Parquet or image file.

    Folders below it that are the root of a run are ignored with all that is in them. Raises FileNotFoundError when
    there is nothing of that name; ValueError for a name that is no UTF-8, a compressed archive, or a source that is
    itself the root of a run. O(files) names are held here: pools of more than some 10^7 images are kept in tars or
    Parquet, of which a listing is short.
    """
    root = source_root(source)
    if root == source:
        entries = source.list()
    elif source.exists():
        entries = [source.entry()]
    else:
        raise FileNotFoundError(f"no folder or file {source}")
    runs = tuple(_roots_of_runs(root, entries))
    if "" in runs:
        raise ValueError(f"{source} must not be the root of a run, where its own files are: it holds {ROOT_FILE}")
    wanted = [entry for entry in entries if _is_candidate(entry.name) and not entry.name.startswith(runs)]
    packed = [entry.name for entry in wanted if entry.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if packed and len(packed) == len(wanted):  # a stray one among images is one undecodable file
        raise ValueError(
            f"compressed archives must be unpacked to .tar or to files: {len(packed)} in {source}, first {packed[0]}"
        )
    odd = [entry.name for entry in wanted if utf8_text(entry.name) != entry.name]
    if odd:
        raise ValueError(f"file names must be UTF-8: {len(odd)} below {source} are not, first {odd[0]!r}")
    return Listing(root, wanted, len(entries) - len(wanted))


def source_root(source: Location) -> Location:
    """What the names in a pool are relative to: the source, or the folder of a source that is one file."""
    return source if source.is_folder() else source.parent


def _roots_of_runs(root: Location, entries: Sequence[Entry]) -> Iterator[str]:
    """The folders, as ``a/b/``, that hold a ``run.json`` with the steps of a run; "" is the root itself."""
    for entry in entries:
        folder, _, name = entry.name.rpartition("/")
        if name == ROOT_FILE:
            noted = json.loads(json_text((root / entry.name).read()) or "null")
            if isinstance(noted, dict) and "steps" in noted:
                yield folder + "/" if folder else ""


def _is_candidate(name: str) -> bool:
    hidden = any(piece.startswith(".") or piece == "__MACOSX" for piece in name.split("/"))
    return not hidden and Path(name).suffix.lower() not in METADATA_SUFFIXES


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
    """A Parquet file as runs of row groups with about ``part_rows`` rows each; other units as they are."""
    if unit.kind != "parquet":
        return [unit]
    with _open_parquet(root / unit.names[0]) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    runs: list[Unit] = []
    first = first_row = rows = 0
    for group, size in enumerate(sizes):
        if rows and rows + size > part_rows:
            runs.append(unit._replace(first=first, stop=group, first_row=first_row))
            first, first_row, rows = group, first_row + rows, 0
        rows += size
    return [*runs, unit._replace(first=first, stop=len(sizes), first_row=first_row)]


def read_unit(root: Location, unit: Unit, image_column: str, label_column: str) -> Iterator[Record]:
    """The records of a unit in order, one image's bytes in memory at a time (a row group's for Parquet).

    Raises ValueError when a Parquet file has no column of image bytes.
    """
    if unit.kind == "files":
        for name in unit.names:
            yield Record(name, None, None, (root / name).read(), parent_folder(name))
    elif unit.kind == "tar":
        with (root / unit.names[0]).local_copy() as path:
            yield from read_tar(path, unit.names[0], label_column)
    else:
        with _open_parquet(root / unit.names[0]) as file:
            yield from _read_row_groups(file, unit, image_column, label_column)


@contextmanager
def _open_parquet(location: Location) -> Iterator[pq.ParquetFile]:
    """Footer and row groups are read where they are: a unit is a few of them, and fetches no more from S3."""
    try:
        file = pq.ParquetFile(location.path if location.is_local else pa.PythonFile(RangeFile(location), mode="r"))
    except pa.ArrowInvalid as e:
        raise ValueError(f"{location} must be a Parquet file: {e}") from e
    with file:
        yield file


def _read_row_groups(file: pq.ParquetFile, unit: Unit, image_column: str, label_column: str) -> Iterator[Record]:
    names = file.schema_arrow.names
    if image_column not in names:
        raise ValueError(
            f"{unit.names[0]} must have a column {image_column!r} with image bytes: it has {', '.join(names)}"
        )
    row = unit.first_row
    for group in range(unit.first, unit.stop):
        table = file.read_row_group(group)
        paths, images = _image_cells(table[image_column])
        others = [name for name in names if name != image_column]
        for i, values in enumerate(table.select(others).to_pylist() if others else [{}] * table.num_rows):
            data = images[i].as_py()
            yield Record(
                unit.names[0],
                paths[i].as_py() if paths is not None else None,
                row,
                data if data is not None else b"",
                text_of(values.get(label_column)),
                next((text_of(values[name]) for name in CAPTION_COLUMNS if values.get(name)), None),
                json.dumps(values, sort_keys=True, default=str) if values else None,
            )
            row += 1


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
            name = rows["source"][i].as_py()
            raise ValueError(f"{root / name} must hold the image that the pool saw: its bytes have changed since")
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
                f"{root / name} must hold the image that the pool saw: it had {length} bytes and has {len(data)}"
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
        location = root / sources[start]
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
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        loaded, images = -1, pa.chunked_array([], pa.binary())
        for row in wanted:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            if group >= len(sizes):
                raise ValueError(f"{location} must have row {row}: it has {starts[-1]} rows")
            if group != loaded:
                table = file.read_row_group(group, columns=[image_column])
                loaded, images = group, _image_cells(table[image_column])[1]
            yield images[row - int(starts[group])].as_py() or b""
