"""The images of a tar, each with what the members of its WebDataset key say about it.

Member names are data, never paths; a tar that breaks off is told, not skipped. Links, folders, devices and what
systems leave beside files (``._a.jpg``) are no images.
"""

import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# Files that stand beside images and never are one; they are counted as ignored.
METADATA_SUFFIXES = frozenset(
    f".{name}" for name in "json jsonl txt csv tsv md rst xml yaml yml html cls npy npz log sha256 index py".split()
)
SIDE_SUFFIXES = frozenset((".txt", ".json", ".cls"))  # of them, what says something of the image of their name
CAPTION_COLUMNS = ("caption", "text")
MAX_FILE_BYTES = 1 << 31  # of an image: no more is read into memory; 12 bytes a pixel of the largest we decode
_SYSTEM_FILES = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"))  # in lower case
_ZEROS_AT_A_TIME = 1 << 20  # bytes, whole blocks
_READ_AHEAD = 1 << 20  # bytes of a tar asked for at a time
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # first bytes


# The header of a regular file, or of the pax header of the next member, whose numbers are octal digits: name, size,
# checksum, type, prefix. That is what nearly all tars are made of; others are left to tarfile.
_PLAIN_HEADER = re.compile(
    rb"(.{100})(?:[0-7]{6}[0-7 ][\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}([0x])"
    rb".{172}(?:[0-7]{6}[0-7 ][\0 ]|\0{8}){2}(.{155}).{12}",
    re.DOTALL,
)
_CHECKSUM = slice(148, 156)
_PAX_TIME = re.compile(rb"([0-9]+) [acm]time=[0-9.]+\n")


class Member(NamedTuple):
    """What a header of a tar says."""

    name: str
    offset: int  # of its bytes
    size: int
    next: int  # offset of the next header
    is_regular: bool = True  # a file, sparse or not
    is_sparse: bool = False


class Record(NamedTuple):
    """One candidate image. ``data`` is None where the container broke off, and ``detail`` says how."""

    source: str  # file, relative to the source root
    member: str | None  # name inside a tar or a Parquet file
    offset: int | None  # of the bytes in a tar; row number in a Parquet file; None for a file of its own
    data: bytes | None
    label: str | None = None
    caption: str | None = None
    metadata: str | None = None  # JSON
    detail: str = ""
    reason: str = ""  # why there is no data, when the container says it; "undecodable" otherwise


def parent_folder(name: str) -> str | None:
    """The folder that a file is in, its label when nothing else says one; None without a folder."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return None if folder in ("", ".", "..") else folder


def is_hidden(piece: str) -> bool:
    """Whether a file or folder of this name, one piece of a path, is no content: dot files, what systems put there."""
    return (piece.startswith(".") and piece not in (".", "..")) or piece.lower() in _SYSTEM_FILES


def too_long(n_bytes: int) -> str:
    """What is wrong with a file of this size, in words; empty when nothing is."""
    return f"{n_bytes} bytes, more than {MAX_FILE_BYTES}" if n_bytes > MAX_FILE_BYTES else ""


def read_tar(path: Path, source: str, label_column: str) -> Iterator[Record]:
    """The images of a tar, each with what the members of the same WebDataset key say about it.

    Member names are data, never paths. A tar that breaks off ends with a record without data; tars one after the
    other in one file are read to the last.
    """
    images: list[Record] = []
    side: dict[str, bytes] = {}
    last_key, broken = "", ""
    try:
        for member, data in _tar_members(path):
            key, suffix = split_key(member.name)
            if key != last_key:
                yield from with_side(images, side, label_column)
                images, side, last_key = [], {}, key
            if f".{suffix.rpartition('.')[2]}".lower() in METADATA_SUFFIXES:
                side[suffix.lower()] = data or b""
            else:
                detail = "" if data is not None else too_long(member.size) or "a sparse member of a tar"
                name = utf8_text(member.name)
                images.append(Record(source, name, member.offset, data, parent_folder(name), detail=detail))
    except tarfile.TarError as e:
        broken = utf8_text(str(e))
    yield from with_side(images, side, label_column)
    if broken:
        yield Record(source, None, None, None, detail=broken)


def split_key(name: str) -> tuple[str, str]:
    """``("a/0001", "seg.png")`` for ``a/0001.seg.png``: WebDataset's rule, at the first dot of the last piece."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _tar_members(path: Path) -> Iterator[tuple[Member, bytes | None]]:
    """Regular members with their bytes, None for a sparse or overlong one. Raises tarfile.TarError at a break."""
    for member, file in tar_members(path):
        file.seek(member.offset)
        whole = not member.is_sparse and not too_long(member.size)
        yield member, file.read(member.size) if whole else None


def tar_members(path: Path, read_ahead: int = _READ_AHEAD) -> Iterator[tuple[Member, BinaryIO]]:
    """Regular, not hidden members of a tar, each with the open tar, to read any of its bytes from.

    read_ahead: bytes asked for at a time; few where most of a tar is passed over. Tars one after the other in one file
    are read to the last. Raises tarfile.TarError where a tar breaks off, is compressed, or is none.
    """
    n_read = 0
    try:
        with path.open("rb", read_ahead) as file, _Headers(path) as heads:
            if is_compressed(file.read(6)):
                raise tarfile.ReadError("it is compressed")
            start: int | None = 0
            while start is not None:
                for member in _members_from(file, heads, start):
                    yield member, file
                    n_read += 1
                start = _next_tar(file, heads.end)
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as e:  # tarfile lets some pass for bad headers
        raise tarfile.ReadError(f"tar breaks off after {n_read} members: {e}") from e


def is_compressed(head: bytes) -> bool:
    """Whether the first 6 bytes of a file are those of an archive in which bytes have no offset."""
    return head.startswith(_COMPRESSED)


def _members_from(file: BinaryIO, heads: "_Headers", start: int) -> Iterator[Member]:
    """The regular, not hidden members of the tar that starts here; leaves where it ends in ``heads.end``.

    Plain headers are read here, some five times as fast as by tarfile; it reads all others, and tells what is wrong.
    """
    length = os.fstat(heads.fileno()).st_size
    by_tarfile = _ByTarfile(heads, length)
    at = start
    while True:
        plain = None if by_tarfile.has_defaults else _plain_member(file, at)
        member = plain or by_tarfile.member(at)
        if member is None:
            heads.end = at
            return
        at = member.next
        end = member.offset + (member.size if member.is_regular and not member.is_sparse else 0)
        if not member.offset <= min(end, at) or max(end, at - tarfile.BLOCKSIZE) > length:
            raise tarfile.ReadError(f"member {member.name!r} needs bytes that the file does not have")
        *folders, name = member.name.split("/")
        if member.is_regular and not is_hidden(name) and "__MACOSX" not in folders:
            yield member


def _plain_member(file: BinaryIO, at: int) -> Member | None:
    """The regular file whose header is at an offset; None if that is not so plain."""
    file.seek(at)
    fields = _plain_fields(file.read(tarfile.BLOCKSIZE))
    if fields is not None and fields[2] == b"x":
        if not _says_times(file.read(tarfile.BLOCKSIZE), fields[1]):
            return None
        at += 2 * tarfile.BLOCKSIZE
        fields = _plain_fields(file.read(tarfile.BLOCKSIZE))
    if fields is None or fields[2] != b"0":
        return None
    name, size, _ = fields
    offset = at + tarfile.BLOCKSIZE
    return Member(name, offset, size, offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)


def _plain_fields(head: bytes) -> tuple[str, int, bytes] | None:
    """Name, size in bytes and type of a plain header whose checksum is right."""
    match = _PLAIN_HEADER.fullmatch(head)
    if match is None:
        return None
    name, size, checksum, kind, prefix = match.groups()
    blanks = 8 * ord(" ")  # stand for the checksum in what it sums
    if sum(head.translate(None, b"\0")) - sum(head[_CHECKSUM]) + blanks != int(checksum, 8):
        return None
    path = name.partition(b"\0")[0]
    if prefix[0]:
        path = prefix.partition(b"\0")[0] + b"/" + path
    return os.fsdecode(path), int(size, 8), kind


def _says_times(block: bytes, size: int) -> bool:
    """Whether a pax header of one block, ``size`` bytes of it used, says nothing but times, as webdataset's do."""
    at = 0
    while at < size <= tarfile.BLOCKSIZE:
        record = _PAX_TIME.match(block, at)
        if record is None or len(record[0]) != int(record[1]):
            return False
        at = record.end()
    return 0 < at == size and not block[size:].strip(b"\0")


class _ByTarfile:
    """Members of a tar by tarfile, which is opened when there is one to read."""

    def __init__(self, heads: "_Headers", length: int) -> None:
        self._heads, self._length = heads, length
        self._tar: tarfile.TarFile | None = None

    @property
    def has_defaults(self) -> bool:
        """Whether a header has said something of all members that follow."""
        return self._tar is not None and bool(self._tar.pax_headers)

    def member(self, at: int) -> Member | None:
        """The member whose header is at an offset, None where the tar ends. Raises tarfile.TarError."""
        if self._tar is None:
            if at > self._length:
                raise tarfile.ReadError("unexpected end of data")
            self._heads.seek(at)
            self._tar = tarfile.open(fileobj=self._heads, mode="r:")  # noqa: SIM115 - it has nothing to close
        else:
            self._tar.offset = at
        found = self._tar.next()
        self._tar.members = []  # type: ignore[attr-defined]  # else it keeps every header it has seen
        if found is None:
            return None
        return Member(found.name, found.offset_data, found.size, self._tar.offset, found.isreg(), found.issparse())


class _Headers(io.FileIO):
    """A file for tarfile to read headers from: it asks for as many bytes as a spoilt one claims."""

    end = 0  # where the tar read last ends

    def read(self, size: int | None = -1, /) -> bytes:
        """At most what is left, nothing for a negative size."""
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(min(max(size or 0, 0), max(left, 0)))


def _next_tar(file: BinaryIO, end: int) -> int | None:
    """Where the next tar in the same file starts, if zeros are not all that follows.

    Raises unless a block of zeros, the end of a tar, is at ``end``: tarfile takes a spoilt header for the end.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the file ends before the end mark")
    if block.strip(b"\0"):
        raise tarfile.ReadError("a member's header is spoilt")
    at, zeros = end + tarfile.BLOCKSIZE, bytes(_ZEROS_AT_A_TIME)
    while data := file.read(_ZEROS_AT_A_TIME):
        if not zeros.startswith(data):
            n_zeros = len(data) - len(data.lstrip(b"\0"))
            return at + n_zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(data)
    return None


def with_side(images: Iterable[Record], side: Mapping[str, bytes], label_column: str) -> Iterator[Record]:
    """The images of one key with the label (else their own), caption and metadata that stand beside them.

    ``side`` are files by their suffix, without its dot: ``txt``, ``json`` and ``cls``.
    """
    if not side:
        yield from images
        return
    caption = side["txt"].decode("utf-8", "replace") if "txt" in side else None
    metadata = json_text(side.get("json"))
    fields = json.loads(metadata) if metadata else {}
    label = text_of(fields.get(label_column)) if isinstance(fields, dict) else None
    if label is None and "cls" in side:
        label = side["cls"].decode("utf-8", "replace").strip()
    if caption is None and isinstance(fields, dict):
        caption = next((text_of(fields[name]) for name in CAPTION_COLUMNS if fields.get(name)), None)
    for image in images:
        yield image._replace(label=image.label if label is None else label, caption=caption, metadata=metadata)


def json_text(data: bytes | None) -> str | None:
    """JSON as text, or None where it is none: metadata that does not parse must not cost the image."""
    try:
        return to_json(json.loads(data)) if data else None
    except (ValueError, RecursionError):
        return None


def to_json(value: Any) -> str:
    """A value as JSON, keys sorted: what JSON has no form for is text, no number is null, bytes are text or null."""
    try:
        return _ENCODER.encode(value)
    except ValueError:  # rare: only then is every value looked at
        return json.dumps(_without_nan(value), sort_keys=True, default=_plain)


def _plain(value: object) -> str | None:
    return bytes_text(value) if isinstance(value, bytes) else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ENCODER = json.JSONEncoder(sort_keys=True, default=_plain, allow_nan=False)


def bytes_text(value: bytes | None) -> str | None:
    """Bytes as text, None where they are none."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def text_of(value: object) -> str | None:
    """A metadata value as text: strings as they are, others as JSON, None and NaN as None."""
    if type(value) is int:  # as most labels are: its JSON, sooner
        return str(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return utf8_text(value if isinstance(value, str) else to_json(value))


def utf8_text(text: str) -> str:
    """Text that a table can hold: half surrogates, of names that are no UTF-8 or of JSON, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
