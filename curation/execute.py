"""How work over parts is spread: the contract of an executor, and the one that runs in this process.

The executor that runs on Ray is in ``pipelines``; kernels see only this contract, so the code a test runs
serially is the code a cluster runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Value_co = TypeVar("Value_co", covariant=True)


class Ref(Protocol[Value_co]):
    """A value that may live on a worker, and need not pass through the driver.

    It is handed on as a value of ``shared``, or inside an item: there the task calls ``get``, which reads a value
    once a node, as ``shared`` does.
    """

    def get(self) -> Value_co:
        """Bring the value here."""
        ...


class Executor(Protocol):
    """Spreads calls over items. Results come in the order of the items, so sums are the same in every run.

    ``shared`` values are keyword arguments of every call, stored once and read once a node; a value may be a
    ``Ref``. Functions and items must be picklable: module-level functions and ``functools.partial`` of them.
    A call that fails for good raises here, with the item and the reason.

    gpus: of each call, and a share of one may do. Such calls are made by the workers of ``map_workers``, which have the
    GPUs, so none must be under way while others begin.
    """

    def map(
        self, fn: Callable[..., Result], items: Sequence[Item], shared: Mapping[str, Any] | None = None, gpus: float = 0
    ) -> Iterator[Result]:
        """``fn(item, **shared)`` for every item."""
        ...

    def map_workers(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], gpus: float = 0
    ) -> Iterator[Result]:
        """Call ``make()`` once a worker (it loads a model), then what it returned for every item."""
        ...

    def reduce(
        self,
        fn: Callable[..., Result],
        items: Sequence[Item],
        merge: Callable[[Result, Result], Result],
        shared: Mapping[str, Any] | None = None,
        fan_in: int = 16,
        gpus: float = 0,
    ) -> Ref[Result]:
        """``fn(item, **shared)`` of every item (at least one), merged on the workers.

        The tree is fixed by item index: ``fan_in`` neighbours are folded from the left, level by level, so the
        bits of a float sum depend neither on the number of workers nor on who was first. With gpus the results come
        here one after the other and are merged here, so they must be small.
        """
        ...


class Device(NamedTuple):
    """Where calls do what a GPU may do."""

    name: str  # as torch names it; "cpu": without torch
    gpus: float  # of one call


CPU = Device("cpu", 0.0)


class Here(Generic[Result]):
    """A ``Ref`` to a value in this process."""

    def __init__(self, value: Result) -> None:
        self._value = value

    def get(self) -> Result:
        """The value."""
        return self._value


class SerialExecutor:
    """Everything in this process, one item after the other."""

    def map(
        self, fn: Callable[..., Result], items: Sequence[Item], shared: Mapping[str, Any] | None = None, gpus: float = 0
    ) -> Iterator[Result]:
        """``fn(item, **shared)`` for every item, lazily."""
        kwargs = local_values(shared)
        for item in items:
            yield fn(item, **kwargs)

    def map_workers(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], gpus: float = 0
    ) -> Iterator[Result]:
        """The worker is made at the first item."""
        if items:
            work = make()
            for item in items:
                yield work(item)

    def reduce(
        self,
        fn: Callable[..., Result],
        items: Sequence[Item],
        merge: Callable[[Result, Result], Result],
        shared: Mapping[str, Any] | None = None,
        fan_in: int = 16,
        gpus: float = 0,
    ) -> Here[Result]:
        """Folded over the same tree as on a cluster; holds at most ``fan_in`` results a tree level."""
        if not items:
            raise ValueError("reduce needs at least one item: got none")
        return Here(fold_tree(self.map(fn, items, shared, gpus), merge, fan_in))


def local_values(shared: Mapping[str, Any] | None) -> dict[str, Any]:
    """``shared`` with every ``Here`` replaced by its value."""
    return {name: value.get() if isinstance(value, Here) else value for name, value in (shared or {}).items()}


def fold(results: Iterable[Result], merge: Callable[[Result, Result], Result]) -> Result:
    """``merge`` from the left over one or more results."""
    rest = iter(results)
    total = next(rest)
    for result in rest:
        total = merge(total, result)
    return total


def fold_tree(results: Iterable[Result], merge: Callable[[Result, Result], Result], fan_in: int) -> Result:
    """Fold ``fan_in`` neighbours at a time, level by level, holding at most ``fan_in`` results of a level."""
    return fold_groups(results, partial(fold, merge=merge), fan_in)


def fold_groups(results: Iterable[Result], fold_group: Callable[[list[Result]], Result], fan_in: int) -> Result:
    """The tree of ``fold_tree``: every group of neighbours is folded as soon as it is whole; a single result is the
    root as it is."""
    if fan_in < 2:
        raise ValueError(f"fan_in must be at least 2: got {fan_in}")
    levels: list[list[Result]] = [[]]

    def push(level: int, result: Result) -> None:
        if level == len(levels):
            levels.append([])
        levels[level].append(result)
        if len(levels[level]) == fan_in:
            close(level)

    def close(level: int) -> None:
        group, levels[level] = levels[level], []
        push(level + 1, fold_group(group))

    for result in results:
        push(0, result)
    level = 0
    while any(levels[level + 1 :]):  # what is left of a level goes up as one group, as on a cluster
        if levels[level]:
            close(level)
        level += 1
    if not levels[level]:
        raise ValueError("nothing to fold")
    return fold_group(levels[level]) if len(levels[level]) > 1 else levels[level][0]


def on_worker(executor: Executor, fn: Callable[..., Result], shared: Mapping[str, Any]) -> Ref[Result]:
    """``fn(**shared)`` in one task; its value stays where it was made, so the driver never holds O(rows)."""
    return executor.reduce(partial(_without_item, fn), [None], _never_merged, shared=shared)


def stored(executor: Executor, value: Result) -> Ref[Result]:
    """The value where ``shared`` values lie, for what is no call of ``map`` or ``reduce`` but reads it too."""
    return on_worker(executor, _itself, {"value": value})


def _itself(value: Result) -> Result:
    return value


def _without_item(fn: Callable[..., Result], _: None, **shared: Any) -> Result:
    return fn(**shared)


def _never_merged(a: Any, b: Any) -> Any:
    raise AssertionError("one item has nothing to merge with")
