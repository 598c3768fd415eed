"""Which references each dropped component has images of, counted from the labels that ``connect`` left.

touched/<range>    TOUCH of the images of a range, shuffled to the ranges of the smallest rows of their components
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from curation.execute import Executor
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import (
    SIZE,
    RowRange,
    range_at,
    raw_name,
    raw_names,
    read_pairs,
    starts_of,
)

# A component, by its smallest row, that has an image of a reference.
TOUCH = np.dtype([("root", "<i8"), ("reference", "<i4")])


class Touched(NamedTuple):
    """The dropped components that have an image of one reference."""

    components: int
    rows: int  # of the pool, in all of them
    largest: int  # rows of the largest


def count_touched(
    folder: Location, ranges: Sequence[RowRange], firsts: np.ndarray, executor: Executor
) -> list[Touched]:
    """What the components touch, of each reference, when ``count_components`` has counted them.

    firsts: int64 (m,), ascending: the first image of each reference; rows of the pool stand before all of them. A task
    holds 8 bytes a row of its range and 16 bytes a component and reference in it; the driver three numbers a reference
    and range at a time.
    """
    send = partial(send_touched, folder=folder, firsts=firsts)
    make_aside(send, ranges, raw_names(ranges), folder / "touched", executor, {"starts": starts_of(ranges)})
    total = np.zeros((len(firsts), 3), np.int64)
    add = partial(add_touched, folder=folder, n_ranges=len(ranges), n_references=len(firsts))
    for found in executor.map(add, ranges):
        total[:, :2] += found[:, :2]
        total[:, 2] = np.maximum(total[:, 2], found[:, 2])
    return [Touched(*map(int, counts)) for counts in total]


def send_touched(rows: RowRange, folder: Location, firsts: np.ndarray, starts: np.ndarray) -> None:
    """What the images of a range are in: every component and reference once."""
    pairs = read_pairs(folder / "labels" / raw_name(rows.number))
    pairs = pairs[pairs[:, 0] >= firsts[0]]  # never the smallest of a component, which is a row of the pool
    touches = np.empty(len(pairs), TOUCH)
    touches["root"], touches["reference"] = pairs[:, 1], np.searchsorted(firsts, pairs[:, 0], side="right") - 1
    touches = np.unique(touches)
    write_shuffle(folder / "touched" / raw_name(rows.number), touches, range_at(starts, touches["root"]), len(starts))


def add_touched(rows: RowRange, folder: Location, n_ranges: int, n_references: int) -> np.ndarray:
    """int64 (m, 3): components, rows, and rows of the largest, of those whose smallest row is in a range."""
    members = np.ones(rows.stop - rows.start, np.int64)  # itself
    touches = [np.zeros(0, TOUCH)]
    for number in range(n_ranges):
        sizes = read_shuffle(folder / "sizes" / raw_name(number), SIZE, rows.number)
        members[sizes["root"] - rows.start] += sizes["rows"]  # each root once in a file
        touches.append(read_shuffle(folder / "touched" / raw_name(number), TOUCH, rows.number))
    touched = np.unique(np.concatenate(touches))
    sizes_of = members[touched["root"] - rows.start]
    found = np.zeros((n_references, 3), np.int64)
    np.add.at(found[:, 0], touched["reference"], 1)
    np.add.at(found[:, 1], touched["reference"], sizes_of)
    np.maximum.at(found[:, 2], touched["reference"], sizes_of)
    return found
