"""Where bytes live: one small set of operations on a local path or on S3, chosen by the URI alone.

Reading is by whole object or by range; writing is always a finished local file that gets its final name in one
rename or one upload, so no reader ever sees a short object. ``boto3`` is used here and nowhere else; endpoint and
credentials come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...).
"""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

HASH_CHUNK = 1 << 22
SIDE_PREFIX = ".side-"  # names of unfinished files: never listed, swept when a step starts


class Entry(NamedTuple):
    """One file or object below a location."""

    name: str  # relative to the location, with "/"
    size: int  # bytes
    stamp: str  # changes when the content does: ETag on S3, mtime in ns on a disk


class Conflict(Exception):
    """A conditional write found that the object is there already."""


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
        """The location above."""
        return Location(self.uri.rstrip("/").rpartition("/")[0] or "/")

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
        return _head(self) is not None

    def is_folder(self) -> bool:
        """A local directory, or an S3 prefix with something below it."""
        if self.is_local:
            return self.path.is_dir()
        return bool(client().list_objects_v2(Bucket=self.bucket, Prefix=_prefix(self), MaxKeys=1).get("KeyCount"))

    def entry(self) -> Entry:
        """Size and stamp of this file or object. Raises FileNotFoundError."""
        if self.is_local:
            stat = self.path.stat()
            return Entry(self.name, stat.st_size, str(stat.st_mtime_ns))
        head = _head(self)
        if head is None:
            raise FileNotFoundError(f"no object {self.uri}")
        return Entry(self.name, int(head["ContentLength"]), str(head["ETag"]).strip('"'))

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """All bytes, or ``length`` bytes from ``offset``. Raises FileNotFoundError."""
        if self.is_local:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read() if length is None else file.read(length)
        if length == 0:
            return b""
        end = "" if length is None else str(offset + length - 1)
        extra = {"Range": f"bytes={offset}-{end}"} if offset or length is not None else {}
        with _not_found(self):
            body: bytes = client().get_object(Bucket=self.bucket, Key=self.key, **extra)["Body"].read()
        return body

    def list(self) -> list[Entry]:
        """Every finished file below, sorted by name (by code point, the same on every system)."""
        return sorted(self._walk() if self.is_local else self._objects())

    def _walk(self) -> Iterator[Entry]:
        root = str(self.path)
        for folder, _, names in os.walk(root, followlinks=False):
            for name in names:
                full = os.path.join(folder, name)  # noqa: PTH118  (os.walk over millions of names: no Path objects)
                if not name.startswith(SIDE_PREFIX) and os.path.isfile(full):  # noqa: PTH113
                    stat = os.stat(full)  # noqa: PTH116
                    yield Entry(os.path.relpath(full, root).replace(os.sep, "/"), stat.st_size, str(stat.st_mtime_ns))

    def _objects(self) -> Iterator[Entry]:
        prefix = _prefix(self)
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield Entry(item["Key"][len(prefix) :], int(item["Size"]), item["ETag"].strip('"'))

    def write(self, data: bytes) -> None:
        """Put ``data`` here, whole or not at all."""
        with self.side_file() as side:
            side.write_bytes(data)

    def write_new(self, data: bytes) -> None:
        """Put ``data`` here only if nothing is here yet. Raises ``Conflict``."""
        if self.is_local:
            with self.side_file(publish=False) as side:
                side.write_bytes(data)
                try:
                    os.link(side, self.path)
                except FileExistsError as e:
                    raise Conflict(self.uri) from e
            return
        from botocore.exceptions import ClientError

        try:
            client().put_object(Bucket=self.bucket, Key=self.key, Body=data, IfNoneMatch="*")
        except ClientError as e:
            if e.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                raise Conflict(self.uri) from e
            raise

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
            with side.open("rb") as file:
                os.fsync(file.fileno())
            side.replace(self.path)
        else:
            client().upload_file(str(side), self.bucket, self.key)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """A local path with the content of this file: itself, or a temporary download."""
        if self.is_local:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder, _not_found(self):
            client().download_file(self.bucket, self.key, str(Path(folder) / "copy"))
            yield Path(folder) / "copy"

    def delete(self) -> None:
        """Remove this file, or this folder and everything below. Nothing there is fine."""
        if self.is_local:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
            return
        client().delete_object(Bucket=self.bucket, Key=self.key)
        names = [{"Key": f"{_prefix(self)}{entry.name}"} for entry in self._objects()]
        for start in range(0, len(names), 1000):  # the most that one request takes
            client().delete_objects(Bucket=self.bucket, Delete={"Objects": names[start : start + 1000], "Quiet": True})

    def sweep(self) -> None:
        """Remove the unfinished files that a killed writer left below. On S3 there are none."""
        if self.is_local and self.path.is_dir():
            for side in self.path.rglob(f"{SIDE_PREFIX}*"):
                side.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def client() -> Any:
    """The S3 client of this process: retries with back-off, endpoint from the environment."""
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": 8, "mode": "standard"}
    return boto3.session.Session().client("s3", config=Config(retries=retries, connect_timeout=20, read_timeout=60))


def file_sha256(path: Path) -> str:
    """The sha256 of a local file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prefix(location: Location) -> str:
    return location.key + "/" if location.key else ""


def _head(location: Location) -> Any:
    from botocore.exceptions import ClientError

    try:
        return client().head_object(Bucket=location.bucket, Key=location.key)
    except ClientError as e:
        if e.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return None
        raise


@contextmanager
def _not_found(location: Location) -> Iterator[None]:
    """Turn S3's answer for an absent object into the error that a disk gives."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as e:
        if e.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            raise FileNotFoundError(f"no object {location.uri}") from e
        raise
