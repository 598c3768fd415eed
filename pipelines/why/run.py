"""A run as its story needs it: where an image stands in each step, what other images are called, and where they are.

What has to be counted is counted part by part by the executor; only totals and a few rows come back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pyarrow.compute as pc

from curation.artifact import Artifact, pool_of
from curation.execute import Executor
from curation.listing import LIST_SUFFIX, file_at, is_list, source_root, split_number, split_pattern
from curation.store import Location
from pipelines.rows import place_in_parts
from pipelines.why.find import Image, name_of, rows_where

N_SHOWN = 3  # other images that a step names


@dataclass(frozen=True)
class Run:
    """The finished steps of a run, in the order of the recipe."""

    steps: Mapping[str, Artifact]
    executor: Executor
    _pools: dict[str, Artifact] = field(default_factory=dict)  # found along the inputs once, for that reads manifests

    def pool(self, artifact: Artifact) -> Artifact:
        """The pool whose rows an artifact describes. Raises ValueError."""
        uri = artifact.location.uri
        if uri not in self._pools:
            self._pools[uri] = pool_of(artifact)
        return self._pools[uri]

    def name(self, artifact: Artifact) -> str:
        """The step that made an artifact."""
        names = (name for name, step in self.steps.items() if step.location.uri == artifact.location.uri)
        return next(names, artifact.location.parent.name)


class Told(NamedTuple):
    """What became of an image in one step."""

    outcome: str  # one word
    text: str  # why, in one line
    facts: dict[str, Any]  # the same for a machine
    details: list[str]  # further lines


class Seat(NamedTuple):
    """Where an image stands in a pool, or in a union that its pool is in."""

    part: int
    row: int  # within the part
    position: int  # among all rows


def seats(image: Image, pool: Artifact) -> list[Seat]:
    """Where the image stands in a pool: nowhere if that is another or refused it, in a union perhaps several times."""
    if image.part is None or image.row is None:
        return []
    firsts = [first for leaf, first in leaves(pool) if leaf.location.uri == image.pool.location.uri]
    places = [first + image.part for first in firsts]
    return [Seat(part, image.row, int(pool.starts[part]) + image.row) for part in places]


def leaves(pool: Artifact, first: int = 0) -> Iterator[tuple[Artifact, int]]:
    """The pools that a union is made of, each with the number of its first part there; a pool is its own."""
    if not pool.members:
        yield pool, first
    for member in pool.members:
        yield from leaves(member, first)
        first += len(member.parts)


def row_of(location: Location, row: int) -> Iterator[dict[str, Any]]:
    """What a row-aligned part file says of one row, if it covers it."""
    yield from rows_where(location, pc.field("row") == row).to_pylist()


def decisions(run: Run, step: Artifact, image: Image) -> Iterator[tuple[Seat, dict[str, Any]]]:
    """What a row-aligned artifact says of an image, with the image's place in its pool."""
    for seat in seats(image, run.pool(step)):
        for values in row_of(step.part(seat.part), seat.row):
            yield seat, values


def picture(run: Run, pool: Artifact, position: int) -> dict[str, Any]:
    """Another image, and where its bytes are now: ``pool row_id key name path``, in a container also ``inside``.

    ``position`` and ``row_id`` count in ``pool``, which may be a union of the pool that is named.
    """
    part, row = place_in_parts(position, pool)
    owner, own_part = pool.member(part)
    own_row = row + int(owner.starts[own_part])
    columns = ["source", "member", "offset", "key"]
    values = rows_where(pool.part(part), pc.field("row_id") == own_row, columns).to_pylist()[0]
    facts = {"pool": run.name(owner), "row_id": position, "key": values["key"], "name": name_of(values)}
    return facts | place_of(pool, part, values)


def place_of(pool: Artifact, part: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """``path`` of the file that holds an image, and its place ``inside`` if that is a container.

    ``gone``: the file is no longer on this machine's disk.
    """
    sources = pool.member(part)[0].outside("source")
    number, name = split_number(values["source"]) if len(sources) > 1 else (0, values["source"])
    source = sources[number]
    root, pattern = (source_root(source), "") if is_list(source) else split_pattern(source)
    if not pattern and root != source and source.name != name and not source.name.lower().endswith(LIST_SUFFIX):
        root = source  # a folder that is gone looks like a file, but a file would be called like it
    location = file_at(root, name)
    place: dict[str, Any] = {"path": str(location)}
    if inside := {key: values[key] for key in ("member", "offset") if values.get(key) is not None}:
        place["inside"] = inside
    if location.is_local and not location.exists():
        place["gone"] = True
    return place


def place_text(place: Mapping[str, Any]) -> str:
    """Where to find a picture: a path, for a container with the member and where it starts (a row of a table)."""
    inside, gone = place.get("inside"), ", which is no longer there" if place.get("gone") else ""
    if not inside:
        return f"{place['path']}{gone}"
    unit = "row" if place["path"].lower().endswith(".parquet") else "byte"
    words = [inside["member"]] if "member" in inside else []
    words += [f"{unit} {inside['offset']}"] if "offset" in inside else []
    return f"{place['path']} ({', '.join(words)}){gone}"


def picture_text(shown: Mapping[str, Any]) -> str:
    """A picture in one line."""
    return f"{place_text(shown)} (key {shown['key'][:12]})"


def counted(n: int, one: str, several: str | None = None) -> str:
    """``1 image``, ``2 images``."""
    return f"{n:,} {one if n == 1 else several or one + 's'}"


def count_rows(run: Run, step: Artifact, column: str, value: int) -> dict[int, int]:
    """How many rows of each part have a value."""
    parts = range(len(step.parts))
    work = partial(count_in_part, step=step, column=column, value=value)
    return dict(zip(parts, run.executor.map(work, parts), strict=True))


def count_in_part(index: int, step: Artifact, column: str, value: int) -> int:
    """Rows of one part with a value."""
    return int(rows_where(step.part(index), pc.field(column) == value, [column]).num_rows)


def matching_rows(run: Run, step: Artifact, condition: pc.Expression) -> tuple[int, list[int]]:
    """How many rows of a row-aligned artifact meet a condition, and the positions of the first N_SHOWN."""
    starts, total, first = run.pool(step).starts, 0, list[int]()
    matching = run.executor.map(partial(match_in_part, step=step, condition=condition), range(len(step.parts)))
    for index, (n, rows) in enumerate(matching):
        total += n
        first += [int(starts[index]) + row for row in rows[: N_SHOWN - len(first)]]
    return total, first


def match_in_part(index: int, step: Artifact, condition: pc.Expression) -> tuple[int, list[int]]:
    """How many rows of one part meet a condition, and the first N_SHOWN."""
    rows = rows_where(step.part(index), condition, ["row"])["row"]
    return len(rows), rows.slice(0, N_SHOWN).to_pylist()
