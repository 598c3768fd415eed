"""How many rows are dropped for one another: sizes of groups, and how tight they are, over row ranges.

A group is a row and all that were dropped for it: with rule ``component`` a component, or what ``max_chain`` made of
it. Its tightness is the lowest similarity of its rows to that row. ``groups/<range>`` in scratch holds what a range
knows of groups, shuffled to the range of the row that they were dropped for.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from curation.dedup import N_SIZES, TIGHT_BINS, Group, count_sizes, count_tightness, merge_groups
from curation.execute import Executor
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.stage import make_aside
from pipelines.stages.connect import RowRange, range_at, raw_name, raw_names, starts_of
from pipelines.stages.rank import decided_rows

GROUP = np.dtype([("row", "<i8"), ("dropped", "<i8"), ("lowest", "<f4")])


def measure_groups(
    decided: Location, folder: Location, ranges: Sequence[RowRange], executor: Executor
) -> dict[str, Any]:
    """Facts on the groups: see ``facts_of``."""
    if not ranges:
        return facts_of(np.zeros(N_SIZES, np.int64), 0, np.zeros(TIGHT_BINS, np.int64), 1.0)
    starts, n = starts_of(ranges), len(ranges)
    send = partial(send_groups, decided=decided, folder=folder)
    make_aside(send, ranges, raw_names(ranges), folder, executor, {"starts": starts})
    found = list(executor.map(partial(sizes_of_range, folder=folder, n_ranges=n), ranges))
    low = min(lowest for _, _, lowest in found)
    tight = sum(executor.map(partial(tightness_of_range, folder=folder, n_ranges=n, low=low), ranges))
    return facts_of(sum(sizes for sizes, _, _ in found), max(largest for _, largest, _ in found), tight, low)


def facts_of(sizes: Any, largest: int, tight: Any, low: float) -> dict[str, Any]:
    """What the manifest says: ``sizes`` [from, to, groups]; the tightness in bins of one width from ``low`` to 1."""
    last = int(np.flatnonzero(sizes)[-1]) if sizes.any() else -1
    bins = [[2 ** (k - 1) + 1, 2**k, int(sizes[k])] for k in range(1, last + 1)]
    return {
        "groups": {
            "n": int(sizes.sum()), "largest": largest, "sizes": bins,
            "tightness": {"n": int(tight.sum()), "low": low, "bins": tight.tolist()},
        }
    }  # fmt: skip


def send_groups(rows: RowRange, decided: Location, folder: Location, starts: np.ndarray) -> None:
    """What the dropped rows of a range say of their groups."""
    found = merge_groups(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    for span in rows.spans:
        some = decided_rows(span, decided)
        gone = np.flatnonzero(some["representative"] != np.arange(span[1], span[1] + span[2]))
        mine = some["representative"][gone], np.ones(len(gone), np.int64), some["similarity"][gone]
        found = merge_groups(*(np.concatenate(both) for both in zip(found, mine, strict=True)))
    records = np.empty(len(found.row_id), GROUP)
    records["row"], records["dropped"], records["lowest"] = found
    write_shuffle(folder / raw_name(rows.number), records, range_at(starts, found.row_id), len(starts))


def groups_of_range(rows: RowRange, folder: Location, n_ranges: int) -> Group:
    """The groups of the rows of a range."""
    found = [read_shuffle(folder / raw_name(number), GROUP, rows.number) for number in range(n_ranges)]
    records = np.concatenate(found)
    return merge_groups(*(np.ascontiguousarray(records[name]) for name in GROUP.names or ()))


def sizes_of_range(rows: RowRange, folder: Location, n_ranges: int) -> tuple[np.ndarray, int, float]:
    """(groups by size, rows of the largest, the lowest similarity or 1) of the groups of a range."""
    groups = groups_of_range(rows, folder, n_ranges)
    known = groups.lowest[~np.isnan(groups.lowest)]
    largest = int(groups.n_dropped.max(initial=-1)) + 1
    return count_sizes(groups.n_dropped + 1), largest, float(known.min(initial=1.0))


def tightness_of_range(rows: RowRange, folder: Location, n_ranges: int, low: float) -> np.ndarray:
    """int64 (TIGHT_BINS,): the groups of a range by tightness."""
    return count_tightness(groups_of_range(rows, folder, n_ranges).lowest, low)
