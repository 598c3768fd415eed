"""What a step leaves behind: part files, and a manifest that is written last and makes them an artifact.

    <root>/<step>/<fingerprint>/part-0000000.parquet ... manifest.json

The manifest says what was made (stage, version, config, inputs, counts) and lists every file with its rows, bytes
and checksum. Times and hosts are kept out of it, in ``run.jsonl``, so equal work gives an equal manifest.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.store import Location, file_sha256

FORMAT = 1  # of the manifest and the part files
MAX_LISTED_FILES = 10_000  # beyond this the list of files is a Parquet file beside the manifest
MANIFEST = "manifest.json"
UNION = "union"  # the stage whose artifact is a list of others
FORMS = {"assign": "cluster", "index": "shards"}  # stages whose artifact has another's form, and is used as that
METADATA_KEY = b"openlvd"

Counts = dict[str, int]
Where = str | Sequence[str]  # the place of one thing, or the places of several


class FileInfo(NamedTuple):
    """One file of an artifact."""

    name: str
    rows: int
    bytes: int
    sha256: str
    counts: Counts  # what the step counted while it wrote this file


@dataclass(frozen=True)
class Artifact:
    """The folder of one step at one fingerprint, finished or being made.

    Only the location travels to workers; the manifest is read where it is needed. A union has no parts of its own:
    its ``parts``, ``starts`` and ``part`` are those of its members, so whatever reads an artifact reads a union.
    """

    location: Location
    moved: Mapping[str, Where] = field(default_factory=dict)  # where outside sources are now, if not where they were;
    # those of an input stand under its name and a dot

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"location": self.location, "moved": dict(self.moved)}
        if "manifest" in self.__dict__:  # spares every task the reading of it
            state |= {"members": self.members, "_ends": self._ends}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return (self.location / MANIFEST).exists()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The parsed manifest. Raises ValueError when the step has not finished or was made by another format."""
        try:
            manifest: dict[str, Any] = json.loads((self.location / MANIFEST).read())
        except FileNotFoundError as e:
            raise ValueError(f"{self.location} is not finished: it has no {MANIFEST}") from e
        except ValueError as e:
            raise ValueError(f"{self.location / MANIFEST} must be JSON: {e}") from e
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise ValueError(f"{self.location} must have format {FORMAT}: got {found}")
        return manifest

    @cached_property
    def files(self) -> list[FileInfo]:
        """Every file, sorted by name."""
        if "files_in" in self.manifest:
            table = read_table(self.location / self.manifest["files_in"])
            return [FileInfo(**{**row, "counts": json.loads(row["counts"])}) for row in table.to_pylist()]
        return [FileInfo(**row) for row in self.manifest["files"]]

    @cached_property
    def members(self) -> list["Artifact"]:
        """What a union is made of, in order; empty for everything else."""
        if not self.is_complete() or self.manifest.get("stage") != UNION:
            return []
        return [self._made_from(f"members.{name}") for name in self.manifest["config"]["members"]]

    @cached_property
    def parts(self) -> list[FileInfo]:
        """The files ``part-*.parquet`` in order; of a union those of its members, one member after the other."""
        if self.members:
            return [part for member in self.members for part in member.parts]
        return [file for file in self.files if file.name.startswith("part-")]

    @property
    def stage(self) -> str:
        """The kind of step that made it."""
        return str(self.manifest["stage"])

    @property
    def kind(self) -> str:
        """What it may be used as: the kind of step that made it, or whose form it has, or of a union's members."""
        return self.members[0].kind if self.members else FORMS.get(self.stage, self.stage)

    @property
    def digest(self) -> str:
        """A hash over the checksums of all files: equal exactly when the content is."""
        return str(self.manifest["digest"])

    @property
    def counts(self) -> Counts:
        """What the step counted."""
        return dict(self.manifest["counts"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the step says about its content, such as the width and backbone of embeddings."""
        return dict(self.manifest["facts"])

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 (n_parts + 1,): row ``r`` of part ``i`` has position ``starts[i] + r``."""
        starts = np.zeros(len(self.parts) + 1, np.int64)
        np.cumsum([part.rows for part in self.parts], out=starts[1:])
        return starts

    def part(self, index: int, prefix: str = "part") -> Location:
        """Where part ``index``, or what stands beside it under another prefix, is or will be."""
        member, own_index = self.member(index)
        return member.location / part_name(own_index, prefix)

    def member(self, index: int) -> tuple["Artifact", int]:
        """The artifact that holds part ``index``, and its number there: a member of a union, or this one."""
        if not self.members:
            return self, index
        which = bisect_right(self._ends, index)
        return self.members[which].member(index - (self._ends[which - 1] if which else 0))

    @cached_property
    def _ends(self) -> list[int]:
        """How many parts a union has up to and with each member."""
        return list(accumulate(len(member.parts) for member in self.members))

    def outside(self, name: str) -> tuple[Location, ...]:
        """The outside sources that a field of the config names, one or several, where they are now."""
        at: Where = self.moved.get(name) or self.manifest["locations"][name]
        return tuple(map(Location, [at] if isinstance(at, str) else at))

    def input(self, name: str) -> "Artifact":
        """The artifact that this one was made from. Raises KeyError when there is no such input."""
        return self._made_from(name)

    def _made_from(self, name: str) -> "Artifact":
        entry = self.manifest["inputs"][name]
        moved = {key.removeprefix(f"{name}."): at for key, at in self.moved.items() if key.startswith(f"{name}.")}
        path = str(entry["path"])
        base = self.location if path.startswith("./") else self.location.parent.parent
        found = Artifact(at_path(base, path.removeprefix("./")), moved)
        if found.digest != entry["digest"]:
            raise ValueError(
                f"{found.location} must have the content {self.location} was made from: its digest differs"
            )
        return found

    def has_input(self, name: str) -> bool:
        """Whether it was made from an input of this name."""
        return name in self.manifest["inputs"]


def at_path(root: Location, path: str) -> Location:
    """What a manifest or a run means by a path: below its root, or anywhere when it is absolute or a URI."""
    return Location(path) if "://" in path or path.startswith("/") else root / path


def part_name(index: int, prefix: str = "part") -> str:
    """``part-0000012.parquet`` for 12."""
    return f"{prefix}-{index:07d}.parquet"


def write_table(location: Location, table: pa.Table, counts: Counts | None = None, compress: bool = True) -> FileInfo:
    """Write one Parquet file, whole or not at all; ``counts`` are kept in it, so that a resumed step finds them.

    Equal values give equal bytes: how the table is cut into chunks does not show.
    """
    schema_metadata = {**(table.schema.metadata or {}), METADATA_KEY: json.dumps(counts or {}).encode()}
    with location.side_file() as side:
        pq.write_table(
            table.replace_schema_metadata(schema_metadata),
            side,
            compression="zstd" if compress else "none",
            use_dictionary=compress,
            write_statistics=compress,
        )
        return FileInfo(location.name, table.num_rows, side.stat().st_size, file_sha256(side), counts or {})


def read_table(location: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, or some of its columns. Raises FileNotFoundError."""
    source = str(location.path) if location.is_local else pa.BufferReader(location.read())
    with pq.ParquetFile(source) as file:
        return file.read(columns=None if columns is None else list(columns))


def describe(location: Location) -> FileInfo:
    """What ``write_table`` returned for a file that is already there; other files have no rows and no counts."""
    with location.local_copy() as path:
        size, digest = path.stat().st_size, file_sha256(path)
        if not location.name.endswith(".parquet"):
            return FileInfo(location.name, 0, size, digest, {})
        with pq.ParquetFile(path) as file:
            counts = json.loads((file.metadata.metadata or {}).get(METADATA_KEY, b"{}"))
            return FileInfo(location.name, file.metadata.num_rows, size, digest, counts)


def by_name(file: FileInfo) -> str:
    """The order of files in an artifact."""
    return file.name


def content_digest(files: Iterable[FileInfo]) -> str:
    """A hash over names and checksums."""
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=by_name))
    return hashlib.sha256(lines.encode()).hexdigest()


def add_counts(counts: Iterable[Counts]) -> Counts:
    """Key by key sums, keys in order of first appearance."""
    total: Counts = {}
    for some in counts:
        for name, value in some.items():
            total[name] = total.get(name, 0) + value
    return total


def finish(location: Location, files: Sequence[FileInfo], head: Mapping[str, Any]) -> Artifact:
    """Write the manifest, which makes the artifact. ``head`` is everything in it but the list of files."""
    files = sorted(files, key=by_name)
    manifest: dict[str, Any] = {"format": FORMAT, **head, "digest": content_digest(files)}
    if len(files) > MAX_LISTED_FILES:
        rows = [{**file._asdict(), "counts": json.dumps(file.counts)} for file in files]
        write_table(location / "parts.parquet", pa.Table.from_pylist(rows))
        manifest["files_in"] = "parts.parquet"
    else:
        manifest["files"] = [file._asdict() for file in files]
    (location / MANIFEST).write((json.dumps(manifest, indent=1) + "\n").encode())
    return Artifact(location)


def pool_of(artifact: Artifact) -> Artifact:
    """The pool whose rows an artifact describes, found along its inputs. Raises ValueError."""
    if artifact.kind == "pool":
        return artifact
    for name in ("pool", "embeddings", "neighbors", "hierarchy", "selection"):
        if artifact.has_input(name):
            return pool_of(artifact.input(name))
    raise ValueError(f"{artifact.location} must describe the rows of a pool: a {artifact.stage} artifact does not")
