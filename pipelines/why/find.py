"""Which image of a run is meant: by its key, a piece of the key, its path, or a file with its bytes.

A file of a pool is one task: it filters its own rows and sends back a few, so nothing here grows with the pool.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.artifact import Artifact, read_table
from curation.execute import Executor
from curation.listing import source_root
from curation.store import Location, RangeFile, file_sha256
from pipelines.errors import UserError
from pipelines.rows import place_in_parts

MIN_PREFIX = 6  # hex digits of a key that may stand for it
KEY_DIGITS = 64
MAX_MATCHES = 20  # rows that one file sends back
MAX_REFUSED = 1000  # refused rows of a pool, such as the copies of one image
MAX_NAMES = 20_000  # names that the nearest are looked for among, when there is no such image
MAX_FILES = 64  # files that they are taken from
N_CLOSE = 3  # names in a hint


@dataclass(frozen=True)
class Image:
    """A row of a pool, or one that the pool refused."""

    step: str  # the pool's
    pool: Artifact
    values: Mapping[str, Any]  # columns of the pool, or of its refused files
    part: int | None = None  # None: refused
    row: int | None = None  # within the part
    copies: tuple[str, ...] = ()  # names of refused files with the same bytes

    @property
    def key(self) -> str | None:
        """The sha256 of its bytes; None where a container broke off."""
        key: str | None = self.values["key"]
        return key

    @property
    def name(self) -> str:
        """``source``, or ``source/member`` in a container."""
        return name_of(self.values)


class Found(NamedTuple):
    """An image that was asked for, and the one that its bytes went on as."""

    image: Image
    kept: Image | None = None  # the copy that stayed, when the image is an exact duplicate
    note: str = ""  # what else is to say of the question


class Question(NamedTuple):
    """What rows of one pool are wanted: any of these."""

    names: tuple[str, ...] = ()  # relative to the pool's source
    keys: tuple[str, ...] = ()
    prefix: str = ""  # of a key


def name_of(values: Mapping[str, Any]) -> str:
    """``source``, with the member of a container, or its row in a Parquet file that gives no names."""
    inside = values["member"] if values["member"] is not None else values.get("offset")
    return values["source"] if inside is None else f"{values['source']}/{inside}"


def rows_where(location: Location, condition: pc.Expression, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a Parquet file for which ``condition`` holds; row groups that cannot have any are not read."""
    source = str(location.path) if location.is_local else pa.PythonFile(RangeFile(location), mode="r")
    wanted = None if columns is None else list(columns)
    return pq.read_table(source, columns=wanted, filters=condition, use_threads=False)


def find_images(pools: Mapping[str, Artifact], asked: str, executor: Executor) -> list[Found]:
    """Every image of the pools that ``asked`` means, in the order of the pools. Raises UserError for none.

    ``asked`` is a key or at least 6 digits of one, a path (relative to the pool's source, or of a file below it,
    or container/member), or any existing file, which is known by its bytes.
    """
    digest = sha256_of(asked)
    prefix = asked.lower() if is_prefix(asked) and not digest else ""
    names = {name: names_below(pool, asked) for name, pool in pools.items()}
    hits = {
        name: search(name, pool, Question(names[name], (digest,) if digest else (), prefix), executor)
        for name, pool in pools.items()
    }
    named = {name: [hit for hit in some if is_named(hit, names[name])] for name, some in hits.items()}
    for name, some in named.items():
        check_one_image(name, some, names[name])
    if any(named.values()):  # the same bytes may have other names, here and in other pools
        keys = tuple(sorted({hit.key for some in named.values() for hit in some if hit.key} | {digest} - {""}))
        hits = {name: search(name, pool, Question(keys=keys), executor) for name, pool in pools.items()}
    else:
        check_prefix(asked, {hit.key or "" for some in hits.values() for hit in some})
    found = [one for name in pools for one in of_pool(hits[name], named[name], digest)]
    if not found:
        raise not_found(pools, asked, executor)
    return found


def sha256_of(asked: str) -> str:
    """The key of an existing file, "" when there is none."""
    try:
        location = Location(asked)
        if location.is_local:
            return file_sha256(location.path.expanduser()) if location.path.expanduser().is_file() else ""
        if not location.key or not location.exists():
            return ""
        with location.local_copy() as path:
            return file_sha256(path)
    except (ValueError, OSError):  # no location, or a name that no file can have
        return ""


def is_prefix(asked: str) -> bool:
    """Whether this may be a key or the beginning of one."""
    return MIN_PREFIX <= len(asked) <= KEY_DIGITS and not set(asked.lower()) - set("0123456789abcdef")


def names_below(pool: Artifact, asked: str) -> tuple[str, ...]:
    """What the image may be called in this pool: the name itself, and its path below one of the pool's sources."""
    sources = pool.outside("source")
    found = [names_in(source, asked) for source in sources]
    names = found[0] if len(sources) == 1 else {f"{i}/{name}" for i, some in enumerate(found) for name in some}
    return tuple(sorted(name for name in names | {asked} if name and is_text(name)))


def names_in(source: Location, asked: str) -> set[str]:
    """What the image may be called in one source."""
    roots = {source.uri.rstrip("/"), source_root(source).uri.rstrip("/")}
    places = {asked}
    if source.is_local:
        here = os.path.expanduser(asked)  # noqa: PTH111  (a name is not always a path)
        places |= {os.path.abspath(here), os.path.realpath(here)} if "\0" not in here else set()  # noqa: PTH100
        roots |= {os.path.realpath(root) for root in roots}
    names = {asked, os.path.normpath(asked)} if asked else set()
    return names | {place[len(root) + 1 :] for place in places for root in roots if place.startswith(root + "/")}


def is_text(name: str) -> bool:
    """Whether a table can hold it: a name on the command line may be no UTF-8."""
    return name.encode("utf-8", "replace").decode() == name


def search(step: str, pool: Artifact, question: Question, executor: Executor) -> list[Image]:
    """The rows of a pool, then the first MAX_REFUSED refused ones, that the question means; MAX_MATCHES a file."""
    names = [file.name for file in pool.files if file.rows and file.name.startswith(("part-", "rejected-"))]
    work = partial(search_file, folder=pool.location, question=question)
    found: list[Image] = []
    refused: list[Image] = []
    for some in executor.map(work, names):
        for values in some:
            if "row_id" in values:
                found.append(Image(step, pool, values, *place_in_parts(values["row_id"], pool)))
            elif len(refused) < MAX_REFUSED:
                refused.append(Image(step, pool, values))
    return found + refused


def search_file(name: str, folder: Location, question: Question) -> list[dict[str, Any]]:
    """The wanted rows of one file."""
    refused = name.startswith("rejected-")
    conditions = [condition for one in question.names for condition in named_conditions(one, refused)]
    if question.keys:
        conditions.append(pc.field("key").isin(list(question.keys)))
    if question.prefix:
        conditions.append(pc.starts_with(pc.field("key"), question.prefix))
    if not conditions:
        return []
    condition = conditions[0]
    for other in conditions[1:]:
        condition |= other
    found: list[dict[str, Any]] = rows_where(folder / name, condition).slice(0, MAX_MATCHES).to_pylist()
    return found


def named_conditions(name: str, refused: bool) -> Iterable[pc.Expression]:
    """The rows with this source, or with every cut of it into a container and what is inside."""
    yield pc.field("source") == name
    at = name.find("/")
    while at >= 0:
        container, inside = name[:at], name[at + 1 :]
        yield (pc.field("source") == container) & (pc.field("member") == inside)
        if inside.isdecimal() and inside.isascii() and len(inside) < 19 and not refused:  # a row without a name
            nameless = pc.field("member").is_null() & (pc.field("offset") == int(inside))
            yield (pc.field("source") == container) & nameless
        at = name.find("/", at + 1)


def is_named(hit: Image, names: Sequence[str]) -> bool:
    """Whether a row was found by its name, not by its bytes."""
    return hit.name in names or hit.values["source"] in names


def check_one_image(step: str, named: Sequence[Image], names: Sequence[str]) -> None:
    """A container is many images. Raises UserError when it was named instead of one of them."""
    inside = [hit for hit in named if hit.name not in names]
    if inside:
        raise UserError(
            f"a path must be of one image: got {inside[0].values['source']} of {step}, which holds several",
            f"name one of them, for example {inside[0].name}",
        )


def check_prefix(asked: str, keys: set[str]) -> None:
    """Raise UserError when several keys start like this."""
    if len(keys) > 1:
        some = sorted(keys)
        more = "" if len(some) <= N_CLOSE else " and others"
        raise UserError(
            f"the beginning of a key must be that of one image: got {asked!r}, which "
            f"{', '.join(some[:N_CLOSE])}{more} start with",
            "give more digits of it",
        )


def of_pool(hits: Sequence[Image], named: Sequence[Image], digest: str) -> list[Found]:
    """The images of one pool: those that were named, else the one that stayed, else those that were refused."""
    kept = {hit.key: hit for hit in hits if hit.part is not None}
    refused = [hit for hit in hits if hit.part is None]
    for key, hit in kept.items():
        copies = tuple(copy.name for copy in refused if copy.key == key)
        kept[key] = Image(hit.step, hit.pool, hit.values, hit.part, hit.row, copies)
    found = []
    for hit in named or list(kept.values()) or refused:
        note = ""
        if digest and hit.key != digest:
            note = f"the file of this name now has other bytes, with the key {digest}"
        stayed = kept.get(hit.key)
        if hit.part is not None:
            found.append(Found(stayed or hit, None, note))
        else:
            found.append(Found(hit, stayed if hit.values["reason"] == "exact_duplicate" else None, note))
    return found


def not_found(pools: Mapping[str, Artifact], asked: str, executor: Executor) -> UserError:
    """The sentence for an image that no pool has, with the names nearest to it."""
    searched = ", ".join(f"{name} ({pool.counts['rows']:,} candidates)" for name, pool in pools.items())
    close = get_close_matches(
        asked, [n for pool in pools.values() for n in close_names(pool, asked, executor)], N_CLOSE
    )
    near = f"the nearest names are {', '.join(close)}; " if close else ""
    digits = f"a key needs at least {MIN_PREFIX} digits; " if is_prefix(asked.ljust(MIN_PREFIX, "0")) else ""
    return UserError(
        f"why needs a key or a path of an image of the run: got {asked!r}", f"{near}{digits}searched were {searched}"
    )


def close_names(pool: Artifact, asked: str, executor: Executor) -> list[str]:
    """Names like this one, among a bounded number of files and names of a pool."""
    names = [file.name for file in pool.files if file.rows and file.name.startswith(("part-", "rejected-"))]
    chosen = [names[i] for i in evenly(len(names), MAX_FILES).tolist()]
    most = MAX_NAMES // max(len(chosen), 1)
    work = partial(close_in_file, folder=pool.location, asked=asked, most=most)
    return [name for some in executor.map(work, chosen) for name in some]


def close_in_file(name: str, folder: Location, asked: str, most: int) -> list[str]:
    """The few names of one file that are nearest to ``asked``, among ``most`` at even distances."""
    table = read_table(folder / name, ["source", "member"])
    table = table.take(pa.array(evenly(table.num_rows, most)))
    return get_close_matches(asked, [name_of(row) for row in table.to_pylist()], N_CLOSE)


def evenly(n: int, most: int) -> np.ndarray:
    """int64 (min(n, most),): places among n at even distances."""
    return np.linspace(0, max(n - 1, 0), min(n, most)).astype(np.int64)
