"""Shuffle files: one file a task, records sorted by destination, with an offset table; readers read ranges.

Layout, little endian: int64 n_destinations, int64 offsets (n_destinations + 1,) in records, then the records. One
file a writer and one range read a (writer, reader) pair: never writers x readers objects.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from curation.store import Location


def write_shuffle(location: Location, records: np.ndarray, destination: np.ndarray, n_destinations: int) -> None:
    """Write ``records`` (n,) of a structured or plain dtype, grouped by ``destination`` int (n,), order kept.

    Raises ValueError when a record has no destination, or one out of range.
    """
    if len(records) != len(destination):
        raise ValueError(f"every record must have a destination: got {len(records)} and {len(destination)}")
    if len(destination) and not 0 <= destination.min() <= destination.max() < n_destinations:
        raise ValueError(f"destinations must be in [0, {n_destinations}): got {destination.min()}..{destination.max()}")
    offsets = np.zeros(n_destinations + 1, "<i8")
    np.cumsum(np.bincount(destination, minlength=n_destinations), out=offsets[1:])
    ordered = records[np.argsort(destination, kind="stable")]
    head = np.array([n_destinations], "<i8").tobytes() + offsets.tobytes()
    location.write(head + ordered.tobytes())


def write_groups(location: Location, groups: Iterable[np.ndarray], n_destinations: int) -> None:
    """Write records that come grouped: group k, of any length, is for destination k. Holds one group at a time.

    Raises ValueError unless there are ``n_destinations`` groups.
    """
    offsets = [0]
    with location.side_file() as side, side.open("wb") as file:
        file.seek(8 * (n_destinations + 2))
        for group in groups:
            file.write(group.tobytes())
            offsets.append(offsets[-1] + len(group))
        if len(offsets) != n_destinations + 1:
            raise ValueError(f"every destination must have a group: got {len(offsets) - 1} for {n_destinations}")
        file.seek(0)
        file.write(np.array([n_destinations, *offsets], "<i8").tobytes())


class Bounds(NamedTuple):
    """Where the records of some consecutive destinations are in a file."""

    head: int  # bytes before the first record
    at: np.ndarray  # int64 (n + 1,), in records: those of the k-th of them are [at[k], at[k + 1])


def read_shuffle(location: Location, dtype: np.dtype, destination: int) -> np.ndarray:
    """The records for one destination, in the order they were written. Raises ValueError for one out of range."""
    bounds = read_bounds(location, destination, destination + 1)
    return read_range(location, dtype, bounds.head, *bounds.at.tolist())


def read_bounds(location: Location, first: int, last: int) -> Bounds:
    """Where the records of destinations [first, last) are. Raises ValueError for some out of range, or for none."""
    n_destinations = int(np.frombuffer(location.read(0, 8), "<i8")[0])
    if not 0 <= first < last <= n_destinations:
        which = f"destination {first}" if last == first + 1 else f"destinations {first} to {last - 1}"
        raise ValueError(f"{location} must have {which}: it has {n_destinations}")
    at = np.frombuffer(location.read(8 + 8 * first, 8 * (last - first + 1)), "<i8")
    return Bounds(8 + 8 * (n_destinations + 1), at)


def read_range(location: Location, dtype: np.dtype, head: int, begin: int, end: int) -> np.ndarray:
    """The records [begin, end) of a file, whosever they are."""
    return np.frombuffer(location.read(head + begin * dtype.itemsize, (end - begin) * dtype.itemsize), dtype)
