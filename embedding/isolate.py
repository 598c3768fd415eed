"""Decoders that crash or hang: such a file costs one attempt at its part, then it is a bad image.

``guarded(False)`` calls in this process, which ends when a call takes too long: a process in which foreign code hangs
can do nothing else, and a signal without a handler ends it whatever that code holds. ``guarded(True)``, for what was
in work when a process ended, calls in a process of its own; there the file that crashes or hangs is found and becomes
a ``BadImage``, the same one however it came to that. ``Processes`` calls in many: of the work on an image a fifth holds
Python's lock, so that threads decode no faster than some four cores.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from queue import LifoQueue
from threading import Lock, get_ident
from typing import Any
from weakref import finalize

from embedding.decode import QUIET_PILLOW, BadImage

DECODE_SECONDS = 60  # of one image; the largest allowed takes a few
_KILLED = 3  # times that a process ends by a signal from outside before it is an error
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # not what crashing code gets
_ERRORS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)

Call = Callable[..., Any]  # call(fn, data, *args): fn(data, *args), or a BadImage; fn is a function of a module, or a
# partial one


@contextmanager
def guarded(isolated: bool) -> Iterator[Call]:
    """What to call decoders through, in one thread or several; see the module."""
    if not isolated:
        with QUIET_PILLOW:
            yield _watched
        return
    apart = Isolated()
    try:
        yield apart
    finally:
        apart.close()


def _watched(fn: Callable[..., Any], data: bytes, *args: Any) -> Any:
    with _WATCH:
        return fn(data, *args)


class Watch:
    """Ends the process by SIGALRM when a thread is in the block for too long.

    If somebody else handles that signal (a test runner), nothing is watched. Costs a few microseconds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = Lock()
        self._began: dict[int, float] = {}  # thread -> when, the oldest first

    def __enter__(self) -> None:
        with self._lock:
            self._began[get_ident()] = time.monotonic()
            if len(self._began) == 1:
                self._set_alarm()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            oldest = next(iter(self._began))
            del self._began[get_ident()]
            if oldest == get_ident():
                self._set_alarm()

    def _set_alarm(self) -> None:
        """At the end of the oldest block's time, or none."""
        if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            return
        left = 0.0
        if self._began:
            left = max(1e-3, next(iter(self._began.values())) + self._seconds - time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, left)


_WATCH = Watch(DECODE_SECONDS)


class Isolated:
    """Calls in a process of its own, one after the other, also from several threads.

    A file is bad when it ends a fresh process, so that it does not pay for what others have spoilt. ``fn``, arguments
    and results travel by pickle, between processes of one program.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = DECODE_SECONDS if seconds is None else seconds
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, fn: Callable[..., Any], data: bytes, *args: Any) -> Any:
        """``fn(data, *args)``; a BadImage when that crashes or hangs.

        Raises RuntimeError for what ``fn`` raises, and when the process cannot live.
        """
        with self._lock:
            killed = 0
            while True:
                fresh = self._process is None
                pipe = self._pipe if self._pipe and not fresh else self._start()
                try:
                    pipe.send((fn, data, args))
                    value, error = pipe.recv()
                except (EOFError, OSError):
                    number = self._end()
                    killed += number in _OUTSIDE
                    if killed == _KILLED:
                        raise RuntimeError(
                            f"the process that decodes was killed {killed} times (out of memory?)"
                        ) from None
                    if fresh and number not in _OUTSIDE:
                        return self._verdict(number)
                    continue
                if error is not None:
                    raise RuntimeError(error)
                return value

    def _verdict(self, number: int) -> BadImage:
        if number == signal.SIGALRM:
            return BadImage("undecodable", f"the decoder hung: more than {self._seconds:g} s")
        return BadImage("undecodable", "the decoder crashed")

    def _start(self) -> Connection:
        here, there = Pipe()
        code = f"from embedding.isolate import serve; serve({there.fileno()}, {self._seconds})"
        path = os.pathsep.join(place for place in sys.path if place)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[there.fileno()],
        )
        self._pipe = here
        there.close()
        try:
            here.recv()
        except (EOFError, OSError):
            self._end()
            raise RuntimeError("the process that decodes could not start") from None
        return here

    def _end(self) -> int:
        """Collect the process, which is at its end. Returns the signal that ended it. Raises RuntimeError if none."""
        process, pipe = self._process, self._pipe
        assert process is not None and pipe is not None, "it was started"
        self._process = self._pipe = None
        pipe.close()
        if (code := process.wait()) >= 0:
            raise RuntimeError(f"the process that decodes ended with code {code}")
        return -code

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.wait()
            self._process = self._pipe = None


class Processes:
    """Calls in up to ``n`` processes, as ``Isolated`` does, by as many threads at a time; more threads wait.

    The processes start as they are needed, with the modules of what they call, and end with ``close`` or when this
    object does.
    """

    def __init__(self, n: int) -> None:
        all_of_them = [Isolated() for _ in range(n)]
        self._free: LifoQueue[Isolated] = LifoQueue()  # so that no more start than are in use
        for one in all_of_them:
            self._free.put(one)
        self.close = finalize(self, _close, all_of_them)

    def __call__(self, fn: Callable[..., Any], data: bytes, *args: Any) -> Any:
        """As ``Isolated``."""
        one = self._free.get()
        try:
            return one(fn, data, *args)
        finally:
            self._free.put(one)


def _close(some: list[Isolated]) -> None:
    for one in some:
        one.close()


def serve(fd: int, seconds: float) -> None:
    """Do what comes over the connection, until it ends: the other side of ``Isolated``."""
    pipe = Connection(fd)
    watch = Watch(seconds)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program; this ends with it
    pipe.send("ready")
    while True:
        try:
            fn, data, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            with watch:
                answer: tuple[Any, str | None] = fn(data, *args), None
        except _ERRORS as e:
            answer = None, f"{type(e).__name__}: {e}"
        with suppress(OSError):  # nobody waits any more
            pipe.send(answer)
