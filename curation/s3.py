"""Requests to S3. Every answer is checked, what may come right is asked again, and the rest is one clear error.

A request is asked at most ``AWS_MAX_ATTEMPTS`` times (``TRIES`` if that is not set). The pauses between double from
FIRST_WAIT_S up to MOST_WAIT_S, each shortened by a random share of up to a half. Asked again is after
- no answer: no connection, one that breaks, one that is silent for ``OPENLVD_S3_TIMEOUT_S`` (``TIMEOUT_S``);
- a part of an answer: a body shorter than its head says, XML that ends early, a head without what must be in it, a
  checksum that differs. A read goes on behind what has come, if the object is still the same;
- an answer that it may come right: the statuses and codes in AGAIN_STATUS and AGAIN_CODES.
Everything else is told at once, as a disk would tell it: FileNotFoundError, PermissionError, ``Conflict``, OSError.

What was asked for may have been done although its answer was lost. Reads, lists, deletes, pieces of an upload and
writes without a condition may be done twice. The other writes put a token into the metadata of the object, so that it
is known for our own when the second request finds it there.

botocore's own repetitions are switched off. They end where a body begins; they share a budget among threads, which a
short outage uses up; and botocore takes a listing of which only the head came for an empty one.
"""

import io
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

TRIES = 10  # of one request
FIRST_WAIT_S, MOST_WAIT_S = 0.1, 20.0  # between two tries
TIMEOUT_S = 30.0  # without a byte
CONNECT_S = 10.0  # until there is a connection, if TIMEOUT_S is not less
REQUESTS = 16  # of one process at a time
PIECE_BYTES = 8 << 20  # of one request of an upload or a download; S3 takes 5 MiB to 5 GiB
MOST_PIECES = 10_000  # of one upload, by the rules of S3
PIECES_AT_A_TIME = 4  # of one object; those that go up are in memory
PAGE_KEYS = 1000  # of one request of a listing, by the rules of S3
CHUNK_BYTES = 1 << 20  # of a body, as it is read
WORDS = 500  # characters of what an error says: some hold a whole answer
AGAIN_STATUS = (408, 409, 429, 500, 502, 503, 504)  # 409: another conditional write is under way
AGAIN_CODES = (
    "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestThrottled", "BandwidthLimitExceeded",
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
)  # fmt: skip
TOKEN = "openlvd-write"  # in the metadata of an object: of the one write that made it

T = TypeVar("T")
Answer = Mapping[str, Any]


class Conflict(Exception):
    """A conditional write found another object than it was to replace, or one where none was to be."""


class Place(Protocol):
    """An object, or all whose keys begin with its key."""

    @property
    def uri(self) -> str:
        """``s3://bucket/key``."""

    @property
    def bucket(self) -> str:
        """The bucket."""

    @property
    def key(self) -> str:
        """The key."""


class _PartialAnswer(Exception):
    """An answer of which something is missing."""


@lru_cache(maxsize=1)
def client() -> Any:
    """The S3 client of this process; endpoint and credentials come from the environment."""
    import boto3
    from botocore.config import Config

    silence = _number("OPENLVD_S3_TIMEOUT_S", TIMEOUT_S)
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # see the head of this file
        connect_timeout=min(CONNECT_S, silence),
        read_timeout=silence,
        max_pool_connections=REQUESTS,
    )
    return boto3.session.Session().client("s3", config=config)


def _number(name: str, default: float) -> float:
    """A positive number from the environment. Raises ValueError."""
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{name} must be a positive number: got {text!r}")
    return value


def ask(at: Place, once: Callable[[], T]) -> T:
    """What ``once`` returns, called again as the head of this file says. Raises what a disk would raise."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.httpsession import URLLib3SSLError  # of a body, where botocore does not make it its own
    from botocore.parsers import ResponseParserError

    most = max(1, int(_number("AWS_MAX_ATTEMPTS", TRIES)))
    for tries in range(1, most + 1):
        try:
            return once()
        except (BotoCoreError, ClientError, ResponseParserError, URLLib3SSLError, _PartialAnswer) as e:
            if tries == most or not _may_come_right(e):
                raise _as_on_disk(at, e, tries) from e
        time.sleep(min(MOST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1))
    raise AssertionError("the last try returns or raises")


def _may_come_right(error: Exception) -> bool:
    from botocore import exceptions
    from botocore.httpsession import URLLib3SSLError
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.ClientError):
        return _status(error) in AGAIN_STATUS or error.response.get("Error", {}).get("Code") in AGAIN_CODES
    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE" not in str(error).upper()  # a wrong one stays wrong
    passing = (
        exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError,
        exceptions.ChecksumError, exceptions.FlexibleChecksumError, exceptions.CredentialRetrievalError,
        ResponseParserError, URLLib3SSLError, _PartialAnswer,
    )  # fmt: skip
    return isinstance(error, passing)


def _status(error: Any) -> int:
    """The HTTP status of botocore's ClientError."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _as_on_disk(at: Place, error: Exception, tries: int) -> Exception:
    """What S3 answered, or that it did not, as the error that a disk gives, with the place in it."""
    from botocore.exceptions import ClientError

    words = " ".join(str(error).replace(" (reached max retries: 0)", "").split())[:WORDS]  # botocore's own
    words += f" (asked {tries} times)" if tries > 1 else ""
    if not isinstance(error, ClientError):
        return OSError(f"S3 failed at {at.uri}: {words}")
    status = _status(error)
    if status == 404:
        return FileNotFoundError(f"no object {at.uri}: {words}")
    if status in (409, 412):
        return Conflict(at.uri)
    return (PermissionError if status in (401, 403) else OSError)(f"S3 refused {at.uri}: {words}")


def _whole(answer: Answer, *fields: str) -> Answer:
    """An answer that has these fields. Raises ``_PartialAnswer``."""
    missing = [field for field in fields if field not in answer]
    if missing:
        raise _PartialAnswer(f"an answer without {' and '.join(missing)}")
    return answer


def _etag(answer: Answer) -> str:
    """The ETag of an answer, without its quotes. Raises ``_PartialAnswer``."""
    etag = str(_whole(answer, "ETag")["ETag"])
    if etag.count('"') == 1:
        raise _PartialAnswer(f"an answer with half an ETag, {etag}")
    return etag.strip('"')


def head(at: Place) -> tuple[int, str] | None:
    """(bytes, ETag) of an object; None when there is none."""
    try:
        answer = ask(at, lambda: _look(at)) if at.key else None
    except FileNotFoundError:
        return None
    return None if answer is None else (int(answer["ContentLength"]), _etag(answer))


def _look(at: Place) -> Answer:
    answer: Answer = client().head_object(Bucket=at.bucket, Key=at.key)
    _etag(answer)
    return _whole(answer, "ContentLength")


def read(at: Place, offset: int = 0, length: int | None = None) -> bytes:
    """All bytes of an object, or ``length`` from ``offset``, fewer at the end. Raises FileNotFoundError."""
    if length == 0:
        return b""
    out = io.BytesIO()  # its value is no copy of it
    ask(at, _Range(at, out, offset, length).fetch)
    return out.getvalue()


def download(at: Place, path: Path) -> None:
    """Copy an object to a local file. Raises FileNotFoundError, or OSError when it changes meanwhile."""
    with path.open("wb") as out:
        first = _Range(at, out, 0, PIECE_BYTES)
        ask(at, first.fetch)

    def piece(start: int) -> None:
        with path.open("r+b") as out:
            out.seek(start)
            ask(at, _Range(at, out, start, PIECE_BYTES, first.etag).fetch)

    try:
        with ThreadPoolExecutor(PIECES_AT_A_TIME) as threads:
            for _ in threads.map(piece, range(PIECE_BYTES, first.size, PIECE_BYTES)):
                pass
    except Conflict as e:
        raise OSError(f"{at.uri} must not change while it is read: it did") from e


class _Range:
    """Bytes of one object on their way into a file. ``fetch`` may be called again after a break: it goes on from there.

    An object that has changed by then is begun anew, unless ``etag`` says which one is meant.
    """

    def __init__(self, at: Place, out: BinaryIO, offset: int, length: int | None, etag: str = "") -> None:
        self.at, self.out, self.pinned, self.etag = at, out, bool(etag), etag
        self.first, self.stop = offset, None if length is None else offset + length
        self.begin = out.tell()  # of the file, where the first byte goes
        self.n = 0  # bytes that have come
        self.size = 0  # of the object, once something has come

    def fetch(self) -> None:
        """One request, for what has not come yet."""
        body, n_left = self._body()
        while n_left:
            chunk = body.read(min(n_left, CHUNK_BYTES))
            if not chunk:
                raise _PartialAnswer(f"a body that ends {n_left} bytes early")
            self.out.write(chunk)
            self.n += len(chunk)
            n_left -= len(chunk)
        if body is not None:
            self._check_end(body)

    def _check_end(self, body: Any) -> None:
        """Read nothing more; where there is a checksum it is compared now, and what does not fit is no beginning."""
        from botocore.exceptions import ChecksumError, FlexibleChecksumError

        try:
            body.read()
        except (ChecksumError, FlexibleChecksumError):
            self._start_anew()
            raise

    def _body(self) -> tuple[Any, int]:
        """The body of one answer, and how many bytes of it are to come."""
        from botocore.exceptions import ClientError

        first = self.first + self.n
        ranged = bool(first) or self.stop is not None
        extra = {"Range": f"bytes={first}-{'' if self.stop is None else self.stop - 1}"} if ranged else {}
        if self.etag:
            extra["IfMatch"] = f'"{self.etag}"'
        try:
            answer = client().get_object(Bucket=self.at.bucket, Key=self.at.key, **extra)
        except ClientError as e:
            if _status(e) == 416:  # a range that starts at or after the end
                return None, 0
            if _status(e) == 412 and not self.pinned:
                self._start_anew()
                raise _PartialAnswer("an object that changed while it was read") from e
            raise
        n_bytes, self.size = self._lengths(answer, first, ranged)
        self.etag = _etag(answer)
        return answer["Body"], n_bytes

    def _lengths(self, answer: Answer, first: int, ranged: bool) -> tuple[int, int]:
        """(bytes of the body, bytes of the object), as the head says and as they must be."""
        n_bytes = int(_whole(answer, "ContentLength")["ContentLength"])
        if not ranged:
            return n_bytes, n_bytes
        said = str(_whole(answer, "ContentRange")["ContentRange"])
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", said)
        begin, last, size = map(int, found.groups()) if found else (-1, -1, -1)
        stop = size if self.stop is None else min(self.stop, size)
        if (begin, last + 1, n_bytes) != (first, stop, stop - first):
            raise _PartialAnswer(f"{n_bytes} bytes that are {said}, for bytes {first} to {self.stop or 'the end'}")
        return n_bytes, size

    def _start_anew(self) -> None:
        self.n = 0
        self.out.seek(self.begin)
        if not self.pinned:  # then this range is all there is in the file, and may get shorter
            self.etag = ""
            self.out.truncate()


def pages(at: Place, prefix: str) -> Iterator[list[Any]]:
    """All objects whose keys begin with ``prefix``, a page at a time (``Key``, ``Size``, ``ETag``)."""
    after: str | None = ""
    while after is not None:
        objects, after = ask(at, partial(_page, at, prefix, PAGE_KEYS, after))
        yield objects


def _page(at: Place, prefix: str, n_keys: int, after: str = "") -> tuple[list[Any], str | None]:
    """Some objects, and what to ask for the next ones; None at the end."""
    extra = {"ContinuationToken": after} if after else {}
    page = client().list_objects_v2(Bucket=at.bucket, Prefix=prefix, MaxKeys=n_keys, **extra)
    _whole(page, "Name", *["NextContinuationToken"] if page.get("IsTruncated") else [])
    return page.get("Contents", []), page["NextContinuationToken"] if page.get("IsTruncated") else None


def is_prefix(at: Place, prefix: str) -> bool:
    """Whether there is an object whose key begins so."""
    return bool(ask(at, lambda: _page(at, prefix, 1))[0])


def put(at: Place, data: bytes) -> None:
    """Write an object in one request."""
    ask(at, lambda: _etag(client().put_object(Bucket=at.bucket, Key=at.key, Body=data)))


def put_if(at: Place, data: bytes, **condition: str) -> str:
    """Write an object if ``IfMatch`` or ``IfNoneMatch`` holds; returns its ETag. Raises ``Conflict`` if it does not,
    FileNotFoundError when the object to be replaced is gone."""
    from botocore.exceptions import ClientError

    token = uuid.uuid4().hex

    def once() -> str:
        try:
            written = client().put_object(Bucket=at.bucket, Key=at.key, Body=data, Metadata={TOKEN: token}, **condition)
        except ClientError as e:
            mine = _made_by(token, at) if _status(e) == 412 else None
            if mine is None:
                raise
            return mine
        return _etag(written)

    return ask(at, once)


def _made_by(token: str, at: Place) -> str | None:
    """The ETag of an object that the write with this token has made; None when it is another, or gone."""
    from botocore.exceptions import ClientError

    try:
        found = _look(at)
    except ClientError as e:
        if _status(e) == 404:
            return None
        raise
    return _etag(found) if found.get("Metadata", {}).get(TOKEN) == token else None


def upload(at: Place, path: Path) -> None:
    """Write a local file as an object, in one request or in pieces; nobody sees it before all of it is there."""
    size = path.stat().st_size
    if size <= PIECE_BYTES:
        put(at, path.read_bytes())
        return
    n_bytes = max(PIECE_BYTES, -(-size // MOST_PIECES))
    token = uuid.uuid4().hex
    target = {"Bucket": at.bucket, "Key": at.key}
    begun = ask(at, lambda: _whole(client().create_multipart_upload(**target, Metadata={TOKEN: token}), "UploadId"))
    target["UploadId"] = begun["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek((number - 1) * n_bytes)
            data = file.read(n_bytes)
        sent = ask(at, lambda: _whole(client().upload_part(**target, PartNumber=number, Body=data), "ETag"))
        return {"PartNumber": number, "ETag": sent["ETag"]}

    with ExitStack() as undo:
        undo.callback(_abort_once, target)
        with ThreadPoolExecutor(PIECES_AT_A_TIME) as threads:
            pieces = list(threads.map(send, range(1, -(-size // n_bytes) + 1)))
        ask(at, lambda: _complete(at, target, pieces, token))
        undo.pop_all()


def _complete(at: Place, target: Mapping[str, str], pieces: Sequence[Answer], token: str) -> None:
    """Make an object of pieces. A store may have done so, and know no such upload any more."""
    from botocore.exceptions import ClientError

    try:
        _etag(client().complete_multipart_upload(**target, MultipartUpload={"Parts": pieces}))
    except ClientError as e:
        if _status(e) != 404 or _made_by(token, at) is None:
            raise


def _abort_once(target: Mapping[str, str]) -> None:
    """Give an upload up that has failed already; what cannot be given up now is cleared away later."""
    from botocore.exceptions import BotoCoreError, ClientError

    with suppress(BotoCoreError, ClientError):
        client().abort_multipart_upload(**target)


def abort_uploads(at: Place, prefix: str) -> None:
    """Give up all uploads in pieces whose keys begin so. Raises PermissionError or OSError where that is not allowed
    or not known."""

    def begun() -> list[Answer]:
        found = client().get_paginator("list_multipart_uploads").paginate(Bucket=at.bucket, Prefix=prefix)
        return [upload for page in found for upload in _whole(page, "Bucket").get("Uploads", [])]

    for upload in ask(at, begun):
        target = {"Bucket": at.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        with suppress(FileNotFoundError):  # it has ended meanwhile
            ask(at, partial(client().abort_multipart_upload, **target))


def delete(at: Place, keys: Sequence[str]) -> None:
    """Remove at most PAGE_KEYS objects; those that are not there are fine. Raises OSError."""
    left = list(keys)

    def once() -> None:
        done = client().delete_objects(Bucket=at.bucket, Delete={"Objects": [{"Key": key} for key in left]})
        if "Deleted" not in done and "Errors" not in done:
            raise _PartialAnswer("an answer that does not say what was deleted")
        refused = done.get("Errors", [])
        lasting = [error for error in refused if error.get("Code") not in AGAIN_CODES]
        if lasting:
            raise OSError(f"S3 did not delete {len(lasting)} objects below {at.uri}, first {lasting[0]}")
        if refused:
            left[:] = [error["Key"] for error in refused]
            raise _PartialAnswer(f"{len(refused)} objects that were not deleted, first {refused[0]}")

    if left:
        ask(at, once)


def delete_one(at: Place) -> None:
    """Remove an object; one that is not there is fine."""
    ask(at, lambda: client().delete_object(Bucket=at.bucket, Key=at.key))
