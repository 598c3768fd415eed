"""One run at a time on a root. The lock saves work, never correctness: every write is whole or absent anyway."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from curation.store import Conflict, Location
from pipelines.errors import UserError

BEAT_S = 15  # between signs of life of a run on S3
STALE_S = 90  # without a sign of life a run on S3 is taken for dead


@contextmanager
def lock_root(root: Location, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a root. Raises UserError when another run holds it."""
    with _local_lock(root) if root.is_local else _s3_lock(root, say):
        yield


def _busy(root: Location, holder: str) -> UserError:
    return UserError(f"another run works on {root}: {holder}", "wait for it, or give this one another --root")


@contextmanager
def _local_lock(root: Location) -> Iterator[None]:
    """``flock``: the kernel lets go when the holder dies, however it dies."""
    root.path.mkdir(parents=True, exist_ok=True)
    with (root.path / ".lock").open("a+") as file:
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
    lock = root / ".lock"
    _take(root, lock, say)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            lock.write(_beat())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        lock.delete()


def _beat() -> bytes:
    return json.dumps({"holder": _holder(), "time": time.time()}).encode()


def _take(root: Location, lock: Location, say: Callable[[str], None]) -> None:
    for _ in range(2):
        try:
            lock.write_new(_beat())
            return
        except Conflict:
            try:
                held = json.loads(lock.read())
            except FileNotFoundError:
                continue  # let go in between
            age = time.time() - held["time"]
            if age < STALE_S:
                since = datetime.fromtimestamp(held["time"], UTC).isoformat(timespec="seconds")
                raise _busy(root, f"{held['holder']}, alive at {since}") from None
            say(f"taking over {root} from {held['holder']}, silent for {age:.0f} s")
            lock.delete()
    raise _busy(root, "it came first")
