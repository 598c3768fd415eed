"""Large arrays from a worker process to the process that started it, without the pipe between them.

The parent opens a piece of memory for each answer, the worker writes the arrays there, the parent maps them where they
lie. Such memory has no name in any folder: it is gone with the last process or array that holds it, whoever is killed
and when, and no limit on ``/dev/shm`` applies. Where the system has none (it is Linux's), answers are pickled whole.
"""

import math
import mmap
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_ALIGN = 64  # bytes; where arrays begin


class Placed(NamedTuple):
    """An array that lies in the memory."""

    start: int  # byte
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Parcel(NamedTuple):
    """An answer, with a ``Placed`` for each array that lies in the memory, or with the arrays themselves."""

    value: Any
    in_memory: bool


def open_memory() -> int | None:
    """A file descriptor of memory without a name; None where the system has no such thing."""
    return os.memfd_create("openlvd") if hasattr(os, "memfd_create") else None


def close_memory(memory: int | None) -> None:
    """Let go of the memory; arrays that lie in it stay."""
    if memory is not None:
        os.close(memory)


def path_of(memory: int | None) -> str | None:
    """Under what name a process below this one can open the memory, as long as this one holds it open."""
    return None if memory is None else f"/proc/{os.getpid()}/fd/{memory}"


def pack(value: Any, path: str | None) -> Parcel:
    """For the worker: write the arrays in ``value`` to the memory. Other processes see them when it returns.

    Arrays are looked for in tuples and dicts, and in those within.
    """
    try:
        file = None if path is None else open(path, "r+b", buffering=0)  # noqa: PTH123, SIM115
    except OSError:  # a system that hides processes from one another
        file = None
    if file is None:
        return Parcel(value, in_memory=False)
    end = 0

    def place(array: np.ndarray) -> Placed:
        nonlocal end
        start, whole = end, np.ascontiguousarray(array)
        file.seek(start)
        _write(file, whole.reshape(-1).view(np.uint8).data)
        end += _padded(whole.nbytes)
        return Placed(start, array.shape, array.dtype)

    with file:
        placed = _exchanged(value, np.ndarray, place)
        file.truncate(max(end, 1))
    return Parcel(placed, in_memory=True)


def unpack(parcel: Parcel, memory: int | None) -> Any:
    """For the parent: the value; its arrays may be written to, and hold the memory. ``memory`` may be closed then."""
    if memory is None or not parcel.in_memory:
        return parcel.value
    view = memoryview(mmap.mmap(memory, 0))

    def found(at: Placed) -> np.ndarray:
        n = math.prod(at.shape)
        return np.frombuffer(view, at.dtype, n, at.start).reshape(at.shape) if n else np.empty(at.shape, at.dtype)

    return _exchanged(parcel.value, Placed, found)


def _exchanged(value: Any, kind: type, put: Callable[[Any], Any]) -> Any:
    """The value with all of a kind in its tuples and dicts exchanged."""
    if isinstance(value, kind):
        return put(value)
    if isinstance(value, dict):
        return {key: _exchanged(each, kind, put) for key, each in value.items()}
    if isinstance(value, tuple):
        parts = [_exchanged(each, kind, put) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _padded(length: int) -> int:
    return length + -length % _ALIGN


def _write(file: Any, view: memoryview) -> None:
    """All of it: the system takes at most 2 GB at a time."""
    while view:
        view = view[file.write(view) :]
