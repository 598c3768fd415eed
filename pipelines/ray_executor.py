"""The executor on Ray, which is used here and in no other stage code.

Plain tasks for work without state, and an own pool of actors for work with a loaded model: one item in, one file
out, so an item of a lost worker is simply given to another. Results are consumed in item order.
"""

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, TypeVar

from curation.execute import Ref, fold, fold_groups, fold_tree
from pipelines.errors import TaskError, UserError
from pipelines.executor import WORK_ERRORS, Progress, Resources, quiet, short, task_error
from pipelines.numerics import numerics_hash, one_math_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECT_S = 5  # seconds until an address counts as dead
MAX_TRIES = 3  # of one item, when workers die under it
IN_FLIGHT = 4  # tasks a worker: enough that none waits, few enough that results do not pile up


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C until the block has ended: an exception in the middle of Ray's start crashes the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


def check_address(address: str) -> None:
    """Raise UserError unless something listens at ``host:port``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address must be host:port: got {address!r}", "a cluster is never searched for")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as e:
        raise UserError(
            f"no Ray cluster answers at {address}: {e}", "start one, or leave --address out for this machine"
        ) from e


class RemoteRef(Generic[Result]):
    """A value in Ray's object store."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def get(self) -> Result:
        """Bring the value here."""
        import ray

        value: Result = ray.get(self.ref)
        return value


def _prepare(tag: str, mixed: bool) -> None:
    """What a worker does before its first task."""
    one_math_thread()
    if tag != numerics_hash() and not mixed:
        raise UserError(
            "every worker must have the versions and the BLAS core of the driver: one has others",
            "make the machines alike, or set resources.mixed_machines: true and accept a tolerance",
        )


def _call(fn: Callable[..., Any], item: Any, setup: tuple[str, bool], names: tuple[str, ...], *values: Any) -> Any:
    """One task: ``fn(item, **shared)``. Shared values come as arguments, so Ray resolves their references."""
    _prepare(*setup)
    try:
        return fn(item, **dict(zip(names, values, strict=True)))
    except WORK_ERRORS as e:
        raise task_error(item, e) from e  # here, where the item is known


def _with_shared(fn: Callable[..., Any], refs: Mapping[str, RemoteRef[Any]]) -> Callable[[Any], Any]:
    """What a worker does with an item: ``fn(item, **shared)``, shared values read once."""
    return partial(fn, **{name: ref.get() for name, ref in refs.items()})


def _merge(merge: Callable[[Any, Any], Any], *results: Any) -> tuple[None, Any]:
    """One node of a reduction: nothing, which can be asked for without moving the value, and the value."""
    return None, fold(results, merge)


class _Worker:
    """An actor that holds what a step has loaded. It outlives the step: a process that has torch is worth keeping."""

    def __init__(self, setup: tuple[str, bool]) -> None:
        self.setup = setup
        self.make: Callable[[], Callable[[Any], Any]] | None = None
        self.work: Callable[[Any], Any] | None = None

    def load(self, make: Callable[[], Callable[[Any], Any]] | None) -> None:
        self.make, self.work = make, None  # made with the first item, so that a failure has somewhere to be told

    def do(self, item: Any) -> Any:
        try:
            if self.work is None:
                _prepare(*self.setup)
                assert self.make is not None, "load comes before do"
                self.work = self.make()
            return self.work(item)
        except WORK_ERRORS as e:
            raise task_error(item, e) from e


class RayExecutor:
    """Tasks and actors on Ray: in processes of this machine (``address="local"``) or on a named cluster."""

    def __init__(self, resources: Resources, address: str = "local", progress: Progress = quiet) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        one_math_thread()
        import ray

        self.resources = resources
        self.progress = progress
        local = address == "local"
        if not local:
            check_address(address)
        with interrupts_held():
            ray.init(
                address=address,  # always said: without it Ray joins whatever cluster it finds
                num_cpus=(resources.workers or os.cpu_count()) if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
        self.n_workers = resources.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._setup = (numerics_hash(), resources.mixed_machines)
        self._pools: dict[float, _Pool] = {}
        self._task = ray.remote(num_cpus=1, max_retries=MAX_TRIES)(_call)
        self._merge = ray.remote(num_cpus=1, max_retries=MAX_TRIES, num_returns=2)(_merge)

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        import ray

        ray.shutdown()

    def _shared(self, shared: Mapping[str, Any] | None) -> tuple[tuple[str, ...], list[Any]]:
        """Names, and one stored object for each value."""
        import ray

        values = [value.ref if isinstance(value, RemoteRef) else ray.put(value) for value in (shared or {}).values()]
        return tuple(shared or {}), values

    def map(
        self, fn: Callable[..., Result], items: Sequence[Item], shared: Mapping[str, Any] | None = None, gpus: float = 0
    ) -> Iterator[Result]:
        """As the contract says: a bounded number of tasks at a time."""
        names, values = self._shared(shared)
        if gpus:
            refs = {name: RemoteRef[Any](value) for name, value in zip(names, values, strict=True)}
            yield from self.map_workers(partial(_with_shared, fn, refs), items, gpus)
            return
        waiting: deque[tuple[Item, Any]] = deque()
        done = 0
        try:
            for item in items:
                waiting.append((item, self._task.remote(fn, item, self._setup, names, *values)))
                if len(waiting) >= IN_FLIGHT * self.n_workers:
                    yield self._next(waiting)
                    done += 1
                    self.progress(done, len(items))
            while waiting:
                yield self._next(waiting)
                done += 1
                self.progress(done, len(items))
        finally:
            _cancel([ref for _, ref in waiting])

    def _next(self, waiting: deque[tuple[Item, Any]]) -> Any:
        item, ref = waiting.popleft()
        return _get(item, ref)

    def map_workers(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], gpus: float = 0
    ) -> Iterator[Result]:
        """As the contract says: an item whose worker died is given to a new one, at most three times."""
        if gpus not in self._pools:
            self._pools[gpus] = _Pool(self._setup, gpus)
        pool = self._pools[gpus]
        pool.load(make, min(self._most_workers(gpus), len(items)))
        try:
            for done, result in enumerate(pool.run(items), 1):
                self.progress(done, len(items))
                yield result
            pool.unload()
        finally:
            if pool.is_busy():  # something failed, or nobody wants the rest
                self._pools.pop(gpus).close()

    def _most_workers(self, gpus: float) -> int:
        """How many workers can be placed at a time. Raises UserError when it is none."""
        import ray

        if not gpus:
            return self.n_workers
        there = ray.cluster_resources().get("GPU", 0)
        if there < gpus:
            raise UserError(
                f"resources.gpus must be at most the cluster's: got {gpus:g}, it has {there:g}",
                "set resources.gpus: 0 to work on CPUs",
            )
        return min(self.n_workers, int(there / gpus))

    def reduce(
        self,
        fn: Callable[..., Result],
        items: Sequence[Item],
        merge: Callable[[Result, Result], Result],
        shared: Mapping[str, Any] | None = None,
        fan_in: int = 16,
        gpus: float = 0,
    ) -> Ref[Result]:
        """As the contract says: the leaves of a few groups at a time, and merged as soon as there are ``fan_in``, so
        that a handful of results a tree level are there at once."""
        import ray

        if not items:
            raise ValueError("reduce needs at least one item: got none")
        if gpus:
            return RemoteRef(ray.put(fold_tree(self.map(fn, items, shared, gpus), merge, fan_in)))
        names, values = self._shared(shared)
        running: deque[tuple[int, Any]] = deque()  # leaves begun when a group was whole, and what tells it is merged
        begun = 0

        def leaves() -> Iterator[Any]:
            nonlocal begun
            for item in items:
                begun += 1
                yield self._task.remote(fn, item, self._setup, names, *values)

        def fold_group(nodes: Sequence[Any]) -> Any:
            told, value = self._merge.remote(merge, *nodes)
            running.append((begun, told))
            if len(running) * fan_in >= IN_FLIGHT * self.n_workers + fan_in:
                self._finish_group(running, len(items))
            return value

        root = fold_groups(leaves(), fold_group, fan_in)
        if len(items) == 1:  # merged with nothing: what failed is told here
            root = fold_group([root])
        while running:
            self._finish_group(running, len(items))
        return RemoteRef(root)

    def _finish_group(self, running: deque[tuple[int, Any]], total: int) -> None:
        done, told = running.popleft()
        _get("the merging of results", told)
        self.progress(done, total)


def _get(item: Any, ref: Any) -> Any:
    """The value of a task; what it raised, or a ``TaskError`` that names its item."""
    import ray

    try:
        return _get_or_lost(item, ref)
    except ray.exceptions.RayError as e:
        raise lost(item, e) from e


def _get_or_lost(item: Any, ref: Any) -> Any:
    """As ``_get``, but the loss of the worker is left to the caller."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        cause = e.cause if e.cause is not None else e
        raise (cause if isinstance(cause, UserError | TaskError) else task_error(item, cause)) from e


def lost(item: Any, cause: BaseException) -> TaskError:
    """The sentence for a worker that died under an item; of Ray's many lines the first."""
    words = str(cause).strip().splitlines() or ["it died"]
    return TaskError(f"at {short(item)}: its worker was lost {MAX_TRIES} times (out of memory?): {words[0]}")


def _cancel(refs: list[Any]) -> None:
    import ray

    for ref in refs:
        with suppress(ray.exceptions.RayError):
            ray.cancel(ref)


class _Pool:
    """Actors with a model each, two items in flight, dead ones replaced.

    They hold no CPU in Ray's books, or idle ones would keep tasks from running: steps come one after the other.
    """

    def __init__(self, setup: tuple[str, bool], gpus: float) -> None:
        import ray

        self._actor: Any = ray.remote(num_cpus=0, num_gpus=gpus, scheduling_strategy="SPREAD")(_Worker)
        self._setup = setup
        self._make: Callable[[], Any] | None = None
        self._idle: list[Any] = []  # actors beyond those that this step needs
        self.actors: list[Any] = []
        self.busy: dict[Any, tuple[int, int]] = {}  # task -> (item, actor)

    def load(self, make: Callable[[], Any], size: int) -> None:
        """Have ``size`` actors load what a step needs."""
        self._make = make
        actors = self.actors + self._idle
        self.actors, self._idle = actors[:size], actors[size:]
        for actor in self.actors:
            actor.load.remote(make)
        self.actors += [self._new() for _ in range(size - len(self.actors))]

    def unload(self) -> None:
        """Let the models go."""
        for actor in self.actors:
            actor.load.remote(None)

    def is_busy(self) -> bool:
        """Whether an actor still has an item."""
        return bool(self.busy)

    def _new(self) -> Any:
        actor = self._actor.remote(self._setup)
        actor.load.remote(self._make)
        return actor

    def run(self, items: Sequence[Any]) -> Iterator[Any]:
        """Results in the order of the items."""
        import ray

        todo = deque(range(len(items)))
        tries = [0] * len(items)
        busy = self.busy
        ready: dict[int, Any] = {}
        n_next = 0
        while n_next < len(items):
            self._fill(todo, items, tries, n_next)
            ref = ray.wait(list(busy), num_returns=1)[0][0]
            i, actor = busy[ref]
            try:
                ready[i] = _get_or_lost(items[i], ref)
                del busy[ref]
            except ray.exceptions.RayActorError:
                ready |= self._replace(actor, todo, items, tries)
            while n_next in ready:
                yield ready.pop(n_next)
                n_next += 1

    def _fill(self, todo: deque[int], items: Sequence[Any], tries: list[int], n_next: int) -> None:
        """Hand out items, the lowest first, at most two an actor and not far ahead of the next result.

        Nothing goes behind an item that has lost a worker: a worker that dies takes the result before with it when that
        is still on its way, and who is to blame on the last try must be certain.
        """
        load = [0] * len(self.actors)
        for i, actor in self.busy.values():
            load[actor] += 1 if tries[i] == 1 else 2
        while todo and min(load) < 2 and todo[0] < n_next + 2 * IN_FLIGHT * len(self.actors):
            actor, i = load.index(min(load)), todo.popleft()
            tries[i] += 1
            self.busy[self.actors[actor].do.remote(items[i])] = (i, actor)
            load[actor] += 1 if tries[i] == 1 else 2

    def _replace(self, actor: int, todo: deque[int], items: Sequence[Any], tries: list[int]) -> dict[int, Any]:
        """Start a new actor; what the old one held goes back, in order. Returns what it had done.

        The first that it had not done was in work when it died. The others waited: that was no try of theirs.
        """
        import ray

        done: dict[int, Any] = {}
        back: list[int] = []
        for ref in [ref for ref, (_, owner) in self.busy.items() if owner == actor]:  # as they were handed out
            i, _ = self.busy.pop(ref)
            try:
                done[i] = _get_or_lost(items[i], ref)
            except ray.exceptions.RayActorError as e:
                if not back and tries[i] >= MAX_TRIES:
                    raise lost(items[i], e) from e
                tries[i] -= bool(back)
                back.append(i)
        todo.extendleft(reversed(back))
        self.actors[actor] = self._new()
        return done

    def close(self) -> None:
        """End the actors, busy or not."""
        import ray

        for actor in self.actors + self._idle:
            ray.kill(actor)
        self.busy.clear()
