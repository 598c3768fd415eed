"""One run at a time on a root. The lock saves work, never correctness: every write is whole or absent anyway."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from curation.store import Conflict, Location
from pipelines.errors import UserError

BEAT_S = 15.0  # between signs of life of a run on S3
STALE_S = 90.0  # without a sign of life a run on S3 is taken for dead
LOOKS = 5  # a beat, at a lock whose holder may be dead


@contextmanager
def lock_root(root: Location, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a root. Raises UserError when another run holds it, or when it cannot be written to.

    On S3 nobody tells that a holder died, so this waits for its next sign of life: at most ``BEAT_S`` when it lives,
    ``STALE_S`` when it does not.
    """
    with _local_lock(root) if root.is_local else _s3_lock(root, say):
        yield


def _busy(root: Location, holder: str) -> UserError:
    return UserError(f"another run works on {root}: {holder}", "wait for it, or give this one another --root")


@contextmanager
def _usable(root: Location) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        hint = "a root is a folder that can be made and written to, or a prefix of a bucket that exists"
        raise UserError(f"cannot use {root} as a root: {e.strerror or e}", hint) from e


@contextmanager
def _local_lock(root: Location) -> Iterator[None]:
    """``flock``: the kernel lets go when the holder dies, however it dies."""
    with ExitStack() as stack:
        with _usable(root):
            root.path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((root.path / ".lock").open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                file.seek(0)
                raise _busy(root, file.read().strip()) from e
            file.truncate(0)
            file.write(_holder())
            file.flush()
        yield


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def _s3_lock(root: Location, say: Callable[[str], None]) -> Iterator[None]:
    """A conditional PUT, renewed by a thread; taken over when its holder gave no sign for ``STALE_S``."""
    with _usable(root):
        held = _take(root, say)
    stop = threading.Event()

    def beat() -> None:
        last, told = time.monotonic(), False
        while not stop.wait(BEAT_S):
            try:
                held.renew()
                last, told = time.monotonic(), False
            except (Conflict, FileNotFoundError):
                say(f"another run took {root} over while this one gave no sign of life")
                return
            except OSError as e:
                if not told and time.monotonic() - last > STALE_S:
                    say(f"no sign of life could be written to {root} for {STALE_S:g} s: {e}")
                    told = True  # a run that outlives this keeps its lock, if nobody has taken it

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        held.release()


class _Beat(NamedTuple):
    """A sign of life: what a lock on S3 says."""

    holder: str
    time: float  # seconds since the epoch
    token: str  # of one run, unlike any other's

    @staticmethod
    def now(token: str) -> bytes:
        """One of this moment, as it is written."""
        return json.dumps(_Beat(_holder(), time.time(), token)._asdict()).encode()

    @staticmethod
    def parse(data: bytes) -> "_Beat":
        """What stands there; something damaged is the sign of nobody, long ago."""
        try:
            found = json.loads(data)
            return _Beat(str(found["holder"]), float(found["time"]), str(found.get("token", "")))
        except (ValueError, TypeError, KeyError):
            return _Beat("a lock that cannot be read", 0.0, "")


@dataclass
class _Held:
    """Our lock on S3. Every write says which stamp it replaces, so that it never replaces another run's."""

    lock: Location
    token: str
    stamp: str

    def renew(self) -> None:
        """Give a sign of life. Raises ``Conflict`` or FileNotFoundError when the lock is no longer ours."""
        try:
            self.stamp = self.lock.write_over(_Beat.now(self.token), self.stamp)
        except Conflict:  # also when our last write arrived and its answer did not
            stamp, found = _look(self.lock)
            if found.token != self.token:
                raise
            self.stamp = stamp

    def release(self) -> None:
        """Delete the lock if it is ours: a renewed one is taken over by nobody. What fails here gets stale."""
        try:
            self.renew()
            self.lock.delete()
        except (Conflict, OSError):
            return


def _look(lock: Location) -> tuple[str, _Beat]:
    """The stamp first: what is written in between makes it an old one, which no conditional write replaces."""
    return lock.entry().stamp, _Beat.parse(lock.read())


def _take(root: Location, say: Callable[[str], None]) -> _Held:
    lock, token = root / ".lock", uuid.uuid4().hex
    for _ in range(3):  # somebody may let go, or be faster, in between
        with suppress(Conflict):
            lock.write_new(_Beat.now(token))
        try:
            stamp, found = _look(lock)
            if found.token != token:
                _wait_until_stale(root, stamp, found, say)
                stamp = lock.write_over(_Beat.now(token), stamp)
                silent = f", silent for {time.time() - found.time:.0f} s" if found.time else ""
                say(f"taking over {root} from {found.holder}{silent}")
            return _Held(lock, token, stamp)
        except (Conflict, FileNotFoundError):
            continue
    raise _busy(root, "it came first")


def _wait_until_stale(root: Location, stamp: str, found: _Beat, say: Callable[[str], None]) -> None:
    """Return when a holder has given no sign for ``STALE_S``. Raises UserError at a sign, FileNotFoundError when it
    lets go. Clocks may differ: what the sign says is believed, but no longer than ``STALE_S`` of waiting."""
    left = min(STALE_S - (time.time() - found.time), STALE_S)
    if left <= 0:
        return
    say(f"{root} is held by {found.holder}: waiting for its next sign of life, at most {left:.0f} s")
    end = time.monotonic() + left
    while time.monotonic() < end:
        time.sleep(min(BEAT_S / LOOKS, left))
        if (root / ".lock").entry().stamp != stamp:
            since = datetime.fromtimestamp(_look(root / ".lock")[1].time, UTC).isoformat(timespec="seconds")
            raise _busy(root, f"{found.holder}, alive at {since}")
