"""Several processes of this machine that train together, started by one that waits for them.

``torchrun`` does the same for many machines; ``training.world`` reads what both of them set.
"""

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
_GRACE = 10.0  # seconds for the others to end by themselves when one has failed


class ProcessFailed(RuntimeError):
    """One of the processes that train together failed or was killed."""


def in_processes(n: int, work: Callable[[], T]) -> T:
    """What ``work`` gives in the first of n new processes, each of which runs it with its rank set.

    ``work`` is pickled, and so is its result. When one fails the others are ended. Raises ProcessFailed with the last
    line of its error; a process started so ends when this one does.
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
        for process in processes:
            process.join(0.0 if process.exitcode is not None else _GRACE)
            if process.is_alive():
                process.terminate()
                process.join()


def _first(receivers: list[Connection]) -> Any:
    """The result of the first process when all are done. Raises ProcessFailed as soon as one fails."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        for ready in connection.wait(waiting):
            rank = receivers.index(ready)  # type: ignore[arg-type]
            try:
                ok, value = receivers[rank].recv()
            except EOFError:
                ok, value = False, "it was killed (out of memory?)"
            if not ok:
                raise ProcessFailed(f"all {len(receivers)} processes must live to the end: process {rank}: {value}")
            results[rank] = value
            receivers[rank].send(None)  # tensors are taken from the memory of a process that lives
    return results[0]


def _run(work: Callable[[], Any], rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    done, result = False, None
    try:
        result, done = work(), True
    finally:
        last = traceback.format_exc().strip().splitlines()[-1]
        pipe.send((True, result if rank == 0 else None) if done else (False, last))
    with suppress(EOFError):
        pipe.recv()


def _free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
