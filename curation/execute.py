"""How work over parts is spread: the contract of an executor, and the one that runs in this process.

The executor that runs on Ray is in ``pipelines``; kernels see only this contract, so the code a test runs
serially is the code a cluster runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Value_co = TypeVar("Value_co", covariant=True)


class Ref(Protocol[Value_co]):
    """A value that may live on a worker. It can be handed on in ``shared`` without passing through the driver."""

    def get(self) -> Value_co:
        """Bring the value here."""
        ...


class Executor(Protocol):
    """Spreads calls over items. Results come in the order of the items, so sums are the same in every run.

    ``shared`` values are keyword arguments of every call, stored once and read once a node; a value may be a
    ``Ref``. Functions and items must be picklable: module-level functions and ``functools.partial`` of them.
    A call that fails for good raises here, with the item and the reason.
    """

    def map(
        self, fn: Callable[..., Result], items: Sequence[Item], shared: Mapping[str, Any] | None = None
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
    ) -> Ref[Result]:
        """``fn(item, **shared)`` of every item (at least one), merged on the workers.

        The tree is fixed by item index: ``fan_in`` neighbours are folded from the left, level by level, so the
        bits of a float sum depend neither on the number of workers nor on who was first.
        """
        ...


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
        self, fn: Callable[..., Result], items: Sequence[Item], shared: Mapping[str, Any] | None = None
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
    ) -> Here[Result]:
        """Folded over the same tree as on a cluster; holds at most ``fan_in`` results a tree level."""
        if not items:
            raise ValueError("reduce needs at least one item: got none")
        return Here(fold_tree(self.map(fn, items, shared), merge, fan_in))


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
    levels: list[list[Result]] = [[]]

    def push(level: int, result: Result) -> None:
        if level == len(levels):
            levels.append([])
        levels[level].append(result)
        if len(levels[level]) == fan_in:
            group, levels[level] = levels[level], []
            push(level + 1, fold(group, merge))

    for result in results:
        push(0, result)
    for level in range(len(levels)):  # what is left of each level goes up as one group, as on a cluster
        group, levels[level] = levels[level], []
        if group and any(levels[level + 1 :]):
            push(level + 1, fold(group, merge))
        elif group:
            return fold(group, merge)
    raise ValueError("nothing to fold")
