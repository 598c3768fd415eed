"""Connected components over row ranges, in scratch files.

The caller leaves spanning forests in files (``write_pairs``), each of some of the edges, and says how the rows are cut
into ranges. ``connect`` makes of them

    labels/<range>            every row of the range that is not the smallest of its component, beside that row

Up to ONE_TASK_ROWS rows one task does it, in 4 bytes a row. Above, it takes rounds of two steps, a large and a small
star, until no edge moves (see ``curation.components``); the answer is the same:

    stars-<step>/<range>-...  edges of one block, shuffled to the ranges of their ends
    stars-<step>/<range>      the names of these files, and how many edges moved
    stars.json                the last step that is whole; the one before it is gone
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from curation.components import join_forests, large_star, lower, small_star
from curation.execute import Executor
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside

ONE_TASK_ROWS = 1 << 31  # up to here one task holds all rows: 8.6 GB
RANGE_ROWS = 1 << 20  # of a range, unless one part has more: 8 MB an array of int64, and at most some 100 MB in all
MOST_RANGES = 1 << 10  # or ranges get more rows: each task reads a piece of the file of every other
BLOCK_EDGES = 1 << 22  # edges that a task moves at a time, 100 bytes each while it does

EDGE = np.dtype(("<i8", (2,)))
SIZE = np.dtype([("root", "<i8"), ("rows", "<i8")])
Span = tuple[int, int, int]  # part, position of its first row in the pool, rows
Star = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, int]]


class Numbered(Protocol):
    """Something that has a number, and a scratch file under it."""

    @property
    def number(self) -> int:
        """From 0 on, no other has the same."""
        ...


class RowRange(NamedTuple):
    """Consecutive rows that one task holds."""

    number: int
    start: int
    stop: int
    spans: tuple[Span, ...] = ()  # the parts they are in


class Step(NamedTuple):
    """A step of the rounds that is whole."""

    number: int  # 0: the forests; odd: a large star; even: a small star
    moved: int  # edges
    still: bool  # whether the step before moved none
    files: list[str]


def rows_of_range(n_rows: int) -> int:
    """How many rows a range has, of so many."""
    return max(RANGE_ROWS, -(-n_rows // MOST_RANGES))


def part_ranges(spans: Sequence[Span]) -> list[RowRange]:
    """Consecutive parts with as many rows together as a range has, or one part."""
    groups: list[list[Span]] = []
    most = rows_of_range(sum(n_rows for _, _, n_rows in spans))
    for span in spans:
        if not groups or span[1] + span[2] - groups[-1][0][1] > most:
            groups.append([])
        groups[-1].append(span)
    ends = [sum(group[-1][1:]) for group in groups]
    return [RowRange(i, g[0][1], end, tuple(g)) for i, (g, end) in enumerate(zip(groups, ends, strict=True))]


def even_ranges(n_rows: int) -> list[RowRange]:
    """As many rows in each, the last with the rest."""
    step = rows_of_range(n_rows)
    starts = range(0, n_rows, step)
    return [RowRange(i, start, min(start + step, n_rows)) for i, start in enumerate(starts)]


def starts_of(ranges: Sequence[RowRange]) -> np.ndarray:
    """int64 (n,): where the ranges start."""
    return np.array([rows.start for rows in ranges], np.int64)


def range_at(starts: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """int64 (n,): the ranges, or parts, that rows are in, by where these start, ascending."""
    at: np.ndarray = np.searchsorted(starts, row_ids, side="right") - 1
    return at


def raw_name(index: int) -> str:
    """``0000012`` for 12: a scratch file that is no table."""
    return f"{index:07d}"


def raw_names(items: Sequence[Numbered]) -> list[str]:
    """The names of the scratch files of ranges, or of other items that have a number."""
    return [raw_name(item.number) for item in items]


def write_pairs(location: Location, pairs: np.ndarray) -> None:
    """Write pairs of rows, int (m, 2)."""
    location.write(pairs.astype("<i8", copy=False).tobytes())


def read_pairs(location: Location) -> np.ndarray:
    """int64 (m, 2): what ``write_pairs`` wrote."""
    return np.frombuffer(location.read(), EDGE)


def connect(folder: Location, forests: Sequence[Location], ranges: Sequence[RowRange], executor: Executor) -> None:
    """Leave the labels of every range in ``folder``, unless they are whole. Rows of no edge are in none."""
    if not ranges:
        return
    labels, names = folder / "labels", raw_names(ranges)
    if ranges[-1].stop <= ONE_TASK_ROWS:
        work = partial(label_all, labels=labels)
        make_aside(work, [tuple(ranges)], [names[-1]], labels, executor, {"forests": forests})  # the last one last
        return
    last = star_steps(folder, forests, ranges, executor)
    label = partial(label_range, folder=folder, step=last.number)
    make_aside(label, ranges, names, labels, executor, {"files": last.files})


def label_all(ranges: Sequence[RowRange], labels: Location, forests: Sequence[Location]) -> None:
    """The labels of all ranges, by one task that reads every forest once."""
    parent = join_forests(map(read_pairs, forests), ranges[-1].stop)
    for rows in ranges:
        some = parent[rows.start : rows.stop]
        lower_there = np.flatnonzero(some != np.arange(rows.start, rows.stop, dtype=some.dtype))
        pairs = np.stack([lower_there + rows.start, some[lower_there].astype(np.int64)], axis=1)
        write_pairs(labels / raw_name(rows.number), pairs)


def star_steps(folder: Location, forests: Sequence[Location], ranges: Sequence[RowRange], executor: Executor) -> Step:
    """Rounds until no edge moves, from the last step that is whole. Returns the last step.

    No edge moves when a large star moves none after a small star that moved none. The other order says less: the
    blocks of a large star may join rows that no edge of another block knows of.
    """
    starts, done = starts_of(ranges), last_step(folder)
    while done.number % 2 == 0 or done.moved or not done.still:
        number = done.number + 1
        out = stars_at(folder, number)
        if number == 0:
            items, names = list(enumerate(forests)), [raw_name(i) for i in range(len(forests))]
            make_aside(partial(send_forest, out=out), items, names, out, executor, {"starts": starts})
        else:
            names = raw_names(ranges)
            work = partial(pull_edges, folder=folder, step=number)
            make_aside(work, ranges, names, out, executor, {"starts": starts, "files": done.files})
        told = [json.loads((out / name).read()) for name in names]
        files = list(chain.from_iterable(task["files"] for task in told))
        done = Step(number, sum(task["moved"] for task in told), number > 1 and not done.moved, files)
        (folder / "stars.json").write(json.dumps(done._asdict()).encode())
        stars_at(folder, number - 1).delete()
    return done


def last_step(folder: Location) -> Step:
    """What an interrupted run has left."""
    there = folder / "stars.json"
    return Step(**json.loads(there.read())) if there.exists() else Step(-1, 0, False, [])


def stars_at(folder: Location, step: int) -> Location:
    """Where the edges are after a step."""
    return folder / f"stars-{step:04d}"


def send_forest(item: tuple[int, Location], out: Location, starts: np.ndarray) -> None:
    """The edges of one forest, to the ranges of both ends."""
    number, forest = item
    name = f"{raw_name(number)}-{raw_name(0)}"
    send_edges(out / name, read_pairs(forest), True, starts)
    (out / raw_name(number)).write(json.dumps({"files": [name], "moved": 0}).encode())


def send_edges(location: Location, edges: np.ndarray, both: bool, starts: np.ndarray) -> None:
    """Shuffle edges (larger, smaller) to the range of the larger end, or of both with that end first."""
    if both:
        edges = np.concatenate([edges, edges[:, ::-1]])
    write_shuffle(location, edges, range_at(starts, edges[:, 0]), len(starts))


def arrived(sources: Location, files: Sequence[str], number: int) -> Iterator[np.ndarray]:
    """int64 (m, 2): the edges sent to one range, at least BLOCK_EDGES at a time, as long as there are any."""
    waiting, n_waiting = list[np.ndarray](), 0
    for name in files:
        waiting.append(read_shuffle(sources / name, EDGE, number))
        n_waiting += len(waiting[-1])
        if n_waiting >= BLOCK_EDGES:
            yield np.concatenate(waiting)
            waiting, n_waiting = [], 0
    if n_waiting:
        yield np.concatenate(waiting)


def pull_edges(rows: RowRange, folder: Location, step: int, starts: np.ndarray, files: Sequence[str]) -> None:
    """One star of a range: the edges of the step before, towards lower rows."""
    sources, out = stars_at(folder, step - 1), stars_at(folder, step)
    large = step % 2 == 1
    star: Star = large_star if large else small_star
    minima = lowest_neighbours(rows, sources, files)
    names, moved = list[str](), 0
    for block, edges in enumerate(arrived(sources, files, rows.number)):
        pulled, n = star(edges, minima, rows.start)
        moved += n
        names.append(f"{raw_name(rows.number)}-{raw_name(block)}")
        send_edges(out / names[-1], pulled, not large, starts)  # a small star asks for smaller neighbours alone
    (out / raw_name(rows.number)).write(json.dumps({"files": names, "moved": moved}).encode())


def lowest_neighbours(rows: RowRange, sources: Location, files: Sequence[str]) -> np.ndarray:
    """int64 (n,): of each row of a range the lowest of its neighbours and itself."""
    minima = np.arange(rows.start, rows.stop)
    for edges in arrived(sources, files, rows.number):
        lower(minima, edges, rows.start)
    return minima


def label_range(rows: RowRange, folder: Location, step: int, files: Sequence[str]) -> None:
    """The labels of one range, when every row has an edge to the smallest of its component and to no other."""
    minima = lowest_neighbours(rows, stars_at(folder, step), files)
    ids = np.arange(rows.start, rows.stop)
    below = minima != ids
    write_pairs(folder / "labels" / raw_name(rows.number), np.stack([ids[below], minima[below]], axis=1))


def count_components(
    folder: Location, ranges: Sequence[RowRange], n_counted: int, executor: Executor
) -> tuple[int, int]:
    """(components, rows of the largest) from the labels in ``folder``, those without an edge left out.

    The first ``n_counted`` rows count; every component must have one of them. (0, 0) without edges.
    """
    starts = starts_of(ranges)
    send = partial(send_sizes, folder=folder, n_counted=n_counted)
    make_aside(send, ranges, raw_names(ranges), folder / "sizes", executor, {"starts": starts})
    found = list(executor.map(partial(add_sizes, folder=folder, n_ranges=len(ranges)), ranges))
    return sum(n for n, _ in found), max(largest for _, largest in found)


def send_sizes(rows: RowRange, folder: Location, n_counted: int, starts: np.ndarray) -> None:
    """How many rows of a range are in each component, its smallest left out, to the range of that one."""
    pairs = read_pairs(folder / "labels" / raw_name(rows.number))
    roots, at = np.unique(pairs[:, 1], return_inverse=True)
    sizes = np.empty(len(roots), SIZE)
    sizes["root"], sizes["rows"] = roots, np.bincount(at[pairs[:, 0] < n_counted], minlength=len(roots))
    write_shuffle(folder / "sizes" / raw_name(rows.number), sizes, range_at(starts, roots), len(starts))


def add_sizes(rows: RowRange, folder: Location, n_ranges: int) -> tuple[int, int]:
    """(components, rows of the largest) of those whose smallest row is in a range."""
    members = np.full(rows.stop - rows.start, -1, np.int64)
    for number in range(n_ranges):
        sizes = read_shuffle(folder / "sizes" / raw_name(number), SIZE, rows.number)
        at = sizes["root"] - rows.start  # each once
        members[at] = np.maximum(members[at], 0) + sizes["rows"]
    return int(np.count_nonzero(members >= 0)), int(members.max(initial=-1)) + 1
