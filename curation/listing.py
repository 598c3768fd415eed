"""What there is at the sources of a pool, before anything is read: the names of files, and where they are.

A source is a folder or an S3 prefix, one file of images, a pattern, or a text file that lists files. The names in a
pool are relative to its source; where there are several sources they begin with the number of theirs, as ``1/a.jpg``,
so that no name says where things lie and images may be moved.
"""

import errno
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from curation.store import S3_REQUESTS, Entry, Location
from curation.tars import METADATA_SUFFIXES, SIDE_SUFFIXES, is_hidden, json_text, utf8_text

ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")  # bytes in them have no offset
CONTAINER_SUFFIXES = (".tar", ".parquet")
LIST_SUFFIX = ".txt"  # of a text file that lists files, a path a line
STATS_SUFFIX = "_stats.json"  # what img2dataset writes beside each shard
WILDCARD = re.compile(r"(\*\*/?|[*?]|\[[^]/]+\])")
ROOT_FILE = "run.json"  # what a run writes at its root: below such a folder are its own files, no images to look at
ENCODED = "./"  # begins a name that is no UTF-8, then percent-encoded; no name of a listing on a disk begins so
_HEAD_BYTES = 1 << 16  # of a list, in which its first line is
_ILL_NAMES = (errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Roots:
    """What the names in a pool of several sources are relative to: ``1/a.jpg`` is ``a.jpg`` below the second."""

    members: tuple[Location, ...]

    @property
    def is_local(self) -> bool:
        """Whether all are on a disk."""
        return all(member.is_local for member in self.members)


Root = Location | Roots


class Listing(NamedTuple):
    """What was found below a source, before anything was read."""

    root: Root
    entries: list[Entry]  # candidates, in the order of their names; of several sources one after the other
    ignored: int  # hidden files, metadata, what runs wrote, links to folders, pipes and the like
    sides: Sequence[Entry] = ()  # captions and metadata of candidates: files beside them with their name but the suffix


def list_source(source: Location) -> Listing:
    """List a folder, a prefix, a tar, Parquet or image file, a list of files, or what fits a pattern.

    See ``split_pattern`` and ``is_list``. Folders below it that are the root of a run are ignored with all that is in
    them. Links to files are read, those that lead nowhere or round are entries that cannot be read, links to folders
    are ignored: they may lead round, or anywhere. Names are UTF-8; a name on a disk that is none has its bytes
    percent-encoded behind ``./`` (``./caf%E9.jpg``), see ``file_at``. Raises FileNotFoundError when there is nothing of
    that name; ValueError for nothing but compressed archives, a list with lines that name no file, or a source that is
    itself the root of a run. O(files) names are held here: pools of more than some 10^7 images are kept in tars or
    Parquet, of which a listing is short.
    """
    listed = is_list(source)
    root, found, n_others = _look_up(source) if listed else _look_below(source)
    runs = () if listed else tuple(_roots_of_runs(root, found))
    if "" in runs:
        raise ValueError(f"{source} must not be the root of a run, where its own files are: it holds {ROOT_FILE}")
    pattern = "" if listed else split_pattern(source)[1]
    fits = re.compile(pattern or ".*", re.DOTALL).fullmatch
    entries = [entry for entry in found if fits(entry.name)]  # after the look for runs, whose shards may fit it
    if pattern and not entries:
        raise FileNotFoundError(f"no file that fits {source}")
    tables = _tables_of_img2dataset(found)
    content = [e for e in entries if _is_content(e.name, listed) and not e.name.startswith(runs)]
    wanted = [entry for entry in content if suffix(entry.name) not in METADATA_SUFFIXES and entry.name not in tables]
    packed = [entry.name for entry in wanted if entry.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if packed and len(packed) == len(wanted):  # a stray one among images is one undecodable file
        raise ValueError(
            f"compressed archives must be unpacked to .tar or to files: {len(packed)} in {source}, first {packed[0]}"
        )
    sides = _sides(found, wanted)
    ignored = len(entries) - len(wanted) - sum(fits(entry.name) is not None for entry in sides) + n_others
    return Listing(root, _with_utf8_names(wanted), ignored, _with_utf8_names(sides))


def join_listings(listings: Sequence[Listing]) -> Listing:
    """The listing of several sources; of one it is that."""
    if len(listings) == 1:
        return listings[0]
    roots = [listing.root for listing in listings if isinstance(listing.root, Location)]
    entries = [_numbered(i, entry) for i, listing in enumerate(listings) for entry in listing.entries]
    sides = [_numbered(i, entry) for i, listing in enumerate(listings) for entry in listing.sides]
    return Listing(Roots(tuple(roots)), entries, sum(listing.ignored for listing in listings), sides)


def _numbered(number: int, entry: Entry) -> Entry:
    return entry._replace(name=f"{number}/{entry.name}")


def split_number(name: str) -> tuple[int, str]:
    """(number of the source, name in it) of a name in a pool of several sources."""
    number, _, rest = name.partition("/")
    return int(number), rest


def name_in_source(root: Root, name: str) -> str:
    """A name in a pool without the number of its source."""
    return split_number(name)[1] if isinstance(root, Roots) else name


def file_at(root: Root, source: str) -> Location:
    """The file that a pool calls ``source``: below its root, by a name that may be no UTF-8 (see ``list_source``)."""
    if isinstance(root, Roots):
        number, name = split_number(source)
        return file_at(root.members[number], name)
    if root.is_local and source.startswith(ENCODED):
        return root / os.fsdecode(unquote_to_bytes(source.removeprefix(ENCODED)))
    return root / source


def root_of(sources: Sequence[Location]) -> Root:
    """What the names in a pool of these sources are relative to."""
    roots = tuple(map(source_root, sources))
    return roots[0] if len(roots) == 1 else Roots(roots)


def source_root(source: Location) -> Location:
    """What the names of one source are relative to: itself, the folder of a file or of a pattern, see ``is_list``."""
    if not is_list(source):
        return split_pattern(source)[0]
    return _root_of_list(source, next(iter(_lines(source.read(0, _HEAD_BYTES)).values()), ""))


def is_list(source: Location) -> bool:
    """Whether a source is a text file that lists files, a path a line: one whose name ends in ``.txt``.

    Its lines are relative to the folder it is in, or all absolute, or all objects of one bucket (``s3://bucket/...``);
    names are then relative to that folder, to ``/`` or to the bucket.
    """
    return source.name.lower().endswith(LIST_SUFFIX) and source.exists() and not source.is_folder()


def _lines(data: bytes) -> dict[int, str]:
    """The lines of a list that are not blank, by their number from 1."""
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    return {i: os.fsdecode(line) for i, line in enumerate(lines, 1) if line.strip()}


def _root_of_list(source: Location, line: str) -> Location:
    """What the names of a list are relative to that has this line."""
    if line.startswith("s3://"):
        return Location(f"s3://{line[5:].partition('/')[0]}")
    return Location("/") if line.startswith("/") else source.parent


def _look_up(source: Location) -> tuple[Location, list[Entry], int]:
    """The folder that the names of a list are relative to, what it names, sorted, each file once, and 0.

    Raises ValueError for a line that names no file, or lines of several places.
    """
    lines = _lines(source.read())
    root = _root_of_list(source, next(iter(lines.values()), ""))
    numbers: dict[str, int] = {}
    for number, line in lines.items():
        name = _listed_name(line)
        if _root_of_list(source, line) != root or name in ("", ".", "..") or name.startswith("../"):
            raise ValueError(
                f"{source} must hold paths below its folder, absolute paths, or objects of one bucket: "
                f"line {number} is {utf8_text(line)}"
            )
        numbers.setdefault(name, number)
    with ThreadPoolExecutor(1 if root.is_local else S3_REQUESTS) as threads:
        looked = threads.map(lambda name: _entry_of(root, name), numbers)
        found = dict(zip(numbers, looked, strict=True))
    missing = [name for name, entry in found.items() if entry is None]
    if missing:
        raise ValueError(
            f"{source} must list files that are there: got {len(missing)} of {len(found)} that are not, "
            f"first {utf8_text(missing[0])} in line {numbers[missing[0]]}"
        )
    return root, sorted(entry for entry in found.values() if entry is not None), 0


def _listed_name(line: str) -> str:
    """What a list calls a file, relative to its root. Keys on S3 are taken as they are."""
    if line.startswith("s3://"):
        return line[5:].partition("/")[2]
    return posixpath.normpath(line).lstrip("/")


def _entry_of(root: Location, name: str) -> Entry | None:
    """What a list names; None when it is no file. What cannot be looked at has an empty stamp."""
    location = root / name
    try:
        if location.is_local and not location.path.is_file():
            location.path.stat()  # says why, unless it is there and something else
            return None
        return location.entry()._replace(name=name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        why_lost(location, e)
        return Entry(name, 0, "")


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


def _with_utf8_names(entries: Sequence[Entry]) -> list[Entry]:
    return [entry if utf8_text(entry.name) == entry.name else _encoded(entry) for entry in entries]


def _encoded(entry: Entry) -> Entry:
    return entry._replace(name=ENCODED + quote(os.fsencode(entry.name)))


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


def _is_content(name: str, listed: bool) -> bool:
    """Whether a file is meant at all: hidden ones are when a list names them."""
    return listed or not any(map(is_hidden, name.split("/")))


def suffix(name: str) -> str:
    """The suffix of a file with its dot, in lower case; a name that only begins or ends with a dot has none."""
    base = name.rpartition("/")[2]
    at = base.rfind(".")
    return base[at:].lower() if 0 < at < len(base) - 1 else ""


def stem(name: str) -> str:
    """A name without its suffix: what an image shares with the files that hold its caption and metadata."""
    return posixpath.splitext(name)[0]


def _sides(found: Sequence[Entry], wanted: Sequence[Entry]) -> list[Entry]:
    """The captions and metadata of loose files, such as ``a.txt`` and ``a.json`` of ``a.jpg``."""
    maybe = [entry for entry in found if suffix(entry.name) in SIDE_SUFFIXES]
    if not maybe:
        return []
    stems = {stem(entry.name) for entry in wanted if suffix(entry.name) not in CONTAINER_SUFFIXES}
    return [entry for entry in maybe if stem(entry.name) in stems]


def _tables_of_img2dataset(found: Sequence[Entry]) -> set[str]:
    """The Parquet files in which img2dataset says what it did, while the images are in a tar or a folder beside them.

    It leaves ``00000_stats.json`` beside all it writes. Where there is only ``00000.parquet`` the images are in that.
    """
    stems = {e.name.removesuffix(STATS_SUFFIX) for e in found if e.name.endswith(STATS_SUFFIX)}
    if not stems:
        return set()
    tars = {e.name.removesuffix(".tar") for e in found if e.name.endswith(".tar")}
    folders = {e.name.rpartition("/")[0] for e in found}
    return {f"{name}.parquet" for name in stems & (tars | folders)}


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
