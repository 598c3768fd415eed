"""Where bytes live: one small set of operations on a local path or on S3, chosen by the URI alone.

Reading is by whole object or by range; writing is always a finished local file that gets its final name in one
rename or one upload, so no reader ever sees a short object. Endpoint and credentials of S3 come from the environment
(``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...). What fails there and may come right is asked again, see
``curation.s3``; what does not come right is an OSError after that.
"""

import hashlib
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from curation import s3
from curation.s3 import REQUESTS as S3_REQUESTS
from curation.s3 import Conflict, client

__all__ = ["S3_REQUESTS", "SIDE_PREFIX", "Below", "Conflict", "Entry", "Location", "RangeFile", "client", "file_sha256"]

SIDE_PREFIX = ".side-"  # names of unfinished files: never listed, swept when a step starts


class Entry(NamedTuple):
    """One file or object below a location."""

    name: str  # relative to the location, with "/"
    size: int  # bytes
    stamp: str  # changes when the content does: ETag on S3, mtime in ns on a disk


class Below(NamedTuple):
    """What is below a location."""

    files: list[Entry]  # finished files, sorted by name (by code point, the same on every system)
    lost: list[str]  # names that cannot be looked at: links that lead nowhere or round, folders that may not be read
    n_others: int  # links to folders (not followed: they may lead round, or anywhere), pipes, sockets, devices


@dataclass(frozen=True)
class Location:
    """A folder, file, prefix or object, named by its URI: a local path or ``s3://bucket/key``."""

    uri: str

    def __post_init__(self) -> None:
        if not self.uri:
            raise ValueError("a location must be a path or s3://bucket/key: got an empty string")
        if "://" in self.uri and not self.uri.startswith("s3://"):
            raise ValueError(f"a location must be a path or s3://bucket/key: got {self.uri}")
        if not self.is_local and not self.bucket:
            raise ValueError(f"a location on S3 must be s3://bucket/key: got {self.uri}")

    def __truediv__(self, name: str) -> "Location":
        return Location(self.uri.rstrip("/") + "/" + name) if name else self

    def __str__(self) -> str:
        return self.uri

    @property
    def is_local(self) -> bool:
        """True for a path on this machine."""
        return not self.uri.startswith("s3://")

    @property
    def name(self) -> str:
        """The last piece of the path."""
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        """The location above; a bucket is its own parent."""
        above, slash, _ = self.uri.rstrip("/").rpartition("/")
        if not self.is_local and not self.key:
            return self
        return Location(above or slash or ".")

    @property
    def path(self) -> Path:
        """The local path; meaningless on S3."""
        return Path(self.uri)

    @property
    def bucket(self) -> str:
        """The bucket on S3."""
        return self.uri[5:].partition("/")[0]

    @property
    def key(self) -> str:
        """The key on S3."""
        return self.uri[5:].partition("/")[2].rstrip("/")

    def resolved(self) -> "Location":
        """The same place with an absolute path, so that it means the same to every worker."""
        return Location(str(self.path.expanduser().absolute())) if self.is_local else self

    def exists(self) -> bool:
        """Whether there is a file or object of exactly this name (a local folder counts, an S3 prefix does not)."""
        if self.is_local:
            return self.path.exists()
        return s3.head(self) is not None

    def is_folder(self) -> bool:
        """A local directory, or an S3 prefix with something below it."""
        if self.is_local:
            return self.path.is_dir()
        return s3.is_prefix(self, _prefix(self))

    def entry(self) -> Entry:
        """Size and stamp of this file or object. Raises FileNotFoundError."""
        if self.is_local:
            facts = self.path.stat()
            return Entry(self.name, facts.st_size, str(facts.st_mtime_ns))
        found = s3.head(self)
        if found is None:
            raise FileNotFoundError(f"no object {self.uri}")
        return Entry(self.name, *found)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """All bytes, or ``length`` bytes from ``offset``, fewer at the end. Raises FileNotFoundError."""
        if self.is_local:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read() if length is None else file.read(length)
        return s3.read(self, offset, length)

    def list(self) -> list[Entry]:
        """Every finished file below, sorted by name (by code point, the same on every system)."""
        return self.below().files

    def below(self) -> Below:
        """Every finished file below, and what is there and is none. What vanishes meanwhile is not there.

        Raises OSError when this very folder cannot be read.
        """
        found = self._walk() if self.is_local else Below(list(self._objects()), [], 0)
        finished = [e for e in found.files if not e.name.rpartition("/")[2].startswith(SIDE_PREFIX)]
        return Below(sorted(finished), sorted(found.lost), found.n_others)

    def _walk(self) -> Below:
        root = str(self.path)
        files: list[Entry] = []
        lost: list[str] = []
        n_others = 0

        def name_of(full: str) -> str:
            return os.path.relpath(full, root).replace(os.sep, "/")

        def closed(error: OSError) -> None:
            if error.filename != root and not isinstance(error, FileNotFoundError):
                lost.append(name_of(error.filename))
            elif not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        # os.path: no Path objects for millions of names
        for folder, folders, names in os.walk(root, onerror=closed, followlinks=False):
            n_others += sum(os.path.islink(os.path.join(folder, name)) for name in folders)  # noqa: PTH114, PTH118
            for full in (os.path.join(folder, name) for name in names):  # noqa: PTH118
                try:
                    facts = os.stat(full)  # noqa: PTH116
                except OSError as e:
                    if not isinstance(e, FileNotFoundError) or os.path.islink(full):  # noqa: PTH114
                        lost.append(name_of(full))
                    continue
                if stat.S_ISREG(facts.st_mode):
                    files.append(Entry(name_of(full), facts.st_size, str(facts.st_mtime_ns)))
                else:
                    n_others += 1
        return Below(files, lost, n_others)

    def _objects(self) -> Iterator[Entry]:
        prefix = _prefix(self)
        for item in (item for page in s3.pages(self, prefix) for item in page):
            if not item["Key"].endswith("/"):  # what some tools put there for a folder
                yield Entry(item["Key"][len(prefix) :], int(item["Size"]), item["ETag"].strip('"'))

    def write(self, data: bytes) -> None:
        """Put ``data`` here, whole or not at all."""
        with self.side_file() as side:
            side.write_bytes(data)

    def write_new(self, data: bytes) -> None:
        """Put ``data`` here only if nothing is here yet. Raises ``Conflict``, but not because of this very write."""
        if self.is_local:
            with self.side_file(publish=False) as side:
                side.write_bytes(data)
                _sync(side)
                try:
                    os.link(side, self.path)
                except FileExistsError as e:
                    raise Conflict(self.uri) from e
            return
        s3.put_if(self, data, IfNoneMatch="*")

    def write_over(self, data: bytes, stamp: str) -> str:
        """Replace the object on S3 that has this stamp; returns the new one's.

        Raises ``Conflict`` when it has another, FileNotFoundError when it is gone. A disk has no such operation.
        """
        return s3.put_if(self, data, IfMatch=f'"{stamp}"')

    @contextmanager
    def side_file(self, publish: bool = True) -> Iterator[Path]:
        """A local path to write; when the block ends well it gets its final name, otherwise it vanishes."""
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = self.path.parent if self.is_local else Path(tempfile.gettempdir())
        side = folder / f"{SIDE_PREFIX}{uuid.uuid4().hex}"
        try:
            yield side
            if publish:
                self.publish(side)
        finally:
            side.unlink(missing_ok=True)

    def publish(self, side: Path) -> None:
        """Give the finished local file its final name here, in one rename or one upload."""
        if self.is_local:
            _sync(side)
            side.replace(self.path)
        else:
            s3.upload(self, side)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """A local path with the content of this file: itself, or a temporary download."""
        if self.is_local:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            copy = Path(folder) / "copy"
            s3.download(self, copy)
            yield copy

    def delete(self) -> None:
        """Remove this file, or this folder and everything below. Nothing there is fine."""
        if self.is_local:
            if self.path.is_dir() and not self.path.is_symlink():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
            return
        if self.key:
            s3.delete_one(self)
        for page in s3.pages(self, _prefix(self)):  # as many as one request deletes
            s3.delete(self, [item["Key"] for item in page])

    def sweep(self) -> None:
        """Remove what a killed writer left unfinished below: files, or the pieces of an upload, which nobody sees but
        somebody pays for. To clear those takes a right of its own, and a store may not know them: then they stay."""
        if not self.is_local:
            with suppress(OSError):
                s3.abort_uploads(self, _prefix(self))
        elif self.path.is_dir():
            for side in self.path.rglob(f"{SIDE_PREFIX}*"):
                side.unlink(missing_ok=True)


class RangeFile(io.RawIOBase):
    """A file to read from at any place, for formats that say where things are; each read is one request on S3."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._size, self._at = location.entry().size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to an offset from the start, from here, or from the end."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """Where the next read starts."""
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """The next ``size`` bytes, fewer at the end."""
        left = max(self._size - self._at, 0)
        data = self._location.read(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def file_sha256(path: Path) -> str:
    """The sha256 of a local file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(side: Path) -> None:
    with side.open("rb") as file:
        os.fsync(file.fileno())


def _prefix(location: Location) -> str:
    return location.key + "/" if location.key else ""
