"""Several processes of this machine that train together, started by one that waits for them.

``torchrun`` does the same for many machines; ``training.world`` reads what both of them set.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_ECHO = 3.0  # seconds for a process to say what went wrong, when others have said that one is gone
_GRACE = 10.0  # seconds for the others to end by themselves when one has failed
_OURS = ("builtins", "curation", "embedding", "training")  # whose errors are rebuilt from their message


class ProcessFailed(RuntimeError):
    """One of the processes that train together failed or was killed."""


class _Failure(NamedTuple):
    """How a process ended that failed."""

    text: str
    error: BaseException | None  # one of this package or of Python, which any process can rebuild

    @property
    def is_echo(self) -> bool:
        """Whether it may be that another process has gone, and no more."""
        return type(self.error) is RuntimeError or self.text.startswith("torch.distributed")


def in_processes(n: int, work: Callable[[], T]) -> T:
    """What ``work`` gives in the first of n new processes, each of which runs it with its rank set.

    ``work`` is pickled, and so is its result. When one fails the others are ended, and its error is raised here where
    it is one of this package or of Python; otherwise ProcessFailed with its last line. All end when this process does.
    """
    context = get_context("spawn")
    port = _free_port()
    pipes = [context.Pipe() for _ in range(n)]
    processes = [
        context.Process(target=_run, args=(work, rank, n, port, theirs), daemon=False)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        result: T = _first([ours for ours, _ in pipes])
        return result
    finally:
        for ours, _ in pipes:
            ours.close()
        _end(processes)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Give the processes a while to end by themselves, then end them."""
    deadline = time.monotonic() + _GRACE
    for process in processes:
        if process.pid is not None:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.terminate()
                process.join()


def _first(pipes: list[Connection]) -> Any:
    """The result of the first process when all are done. Raises as soon as one fails."""
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    while len(results) + len(failures) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures]
        told = connection.wait(waiting, _ECHO if failures else None)
        for ready in told:
            rank = pipes.index(ready)  # type: ignore[arg-type]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                ok, value = False, _Failure("it was killed (out of memory?)", None)
            if ok:
                results[rank] = value
                pipes[rank].send(None)  # tensors are taken from the memory of a process that lives
            else:
                failures[rank] = value
        if failures and (not told or not all(failure.is_echo for failure in failures.values())):
            break
    if failures:
        rank = min(failures, key=lambda rank: (failures[rank].is_echo, rank))
        text = f"all {len(pipes)} processes must live to the end: process {rank}: {failures[rank].text}"
        raise failures[rank].error or ProcessFailed(text)
    return results[0]


def _run(work: Callable[[], Any], rank: int, size: int, port: int, pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    done, result = False, None
    try:
        result, done = work(), True
    finally:
        if not done:  # told before this process ends and the others miss it
            error = sys.exc_info()[1]
            known = type(error).__module__.partition(".")[0] in _OURS
            last = traceback.format_exc().strip().splitlines()[-1]
            pipe.send((False, _Failure(last, error.with_traceback(None) if known and error else None)))
    pipe.send((True, result if rank == 0 else None))
    with suppress(EOFError):
        pipe.recv()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
