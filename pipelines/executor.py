"""The executor that does everything in this process, and what it shares with the one on Ray."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from curation.execute import SerialExecutor
from curation.store import Location
from pipelines.errors import TaskError
from pipelines.numerics import one_math_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress(Protocol):
    """What is told how far a step is: items done, items in all, and maybe what they are and a few words on them."""

    def __call__(self, done: int, total: int, unit: str = "", words: str = "", /) -> None:
        """Show it."""


# What work on data can raise; other exceptions (a missing package, an interrupt) pass as they are.
WORK_ERRORS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Speed settings. None of them is in a fingerprint and none may change a byte.

    Of a training ``train_processes`` and ``micro_batch`` change the rounding of sums, and ``crops_on`` that of pixels.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    workers: int = 0  # tasks at a time; 0: one for every core
    gpus: float = 0.0  # of one worker with a model, and of one that looks for neighbours or centroids
    loader_workers: int = 1  # processes that decode and crop for the trainer; of a worker of embed those that decode
    # ahead, up to two as threads; 0: none, all in turn
    batch: int = 256  # images a forward of embed on a GPU; on a CPU it is fixed, for the sake of the same bytes
    compile: bool = False  # embed and train on a GPU: torch.compile of a ViT; a minute at the start, then faster
    checkpoint_every: int = 200  # trainer steps between checkpoints: what a kill can cost
    train_processes: int = 1  # of one machine that train together, each with a GPU of its own where there are any
    micro_batch: int | None = None  # images that each of them takes at a time; null: its share of the batch
    crops_on: str = "worker"  # the trainer's crops are cut and changed by the loader; or "device": where the model is
    mixed_machines: bool = False  # allow workers with other versions or cores: same bytes become a tolerance

    def __post_init__(self) -> None:
        for name in ("workers", "gpus", "loader_workers", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"resources.{name} must not be negative: got {getattr(self, name)}")
        if self.batch < 1:
            raise ValueError(f"resources.batch must be at least 1: got {self.batch}")
        if self.train_processes < 1:
            raise ValueError(f"resources.train_processes must be at least 1: got {self.train_processes}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"resources.micro_batch must be at least 1, or null: got {self.micro_batch}")
        if self.crops_on not in ("worker", "device"):
            raise ValueError(f"resources.crops_on must be 'worker' or 'device': got {self.crops_on!r}")


def quiet(done: int, total: int, unit: str = "", words: str = "") -> None:
    """Show no progress."""


@dataclass
class LocalExecutor(SerialExecutor):
    """Everything in this process: tests, small runs, debugging."""

    resources: Resources = field(default_factory=Resources)
    progress: Progress = quiet

    def __post_init__(self) -> None:
        one_math_thread()

    def map(
        self, fn: Callable[..., Result], items: Sequence[Item], shared: Mapping[str, Any] | None = None, gpus: float = 0
    ) -> Iterator[Result]:
        """As the contract says, with progress, and the item named when it fails."""
        yield from counted(named_failures(super().map(fn, items, shared, gpus), items), len(items), self.progress)

    def map_workers(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], gpus: float = 0
    ) -> Iterator[Result]:
        """As the contract says, with progress, and the item named when it fails."""
        yield from counted(named_failures(super().map_workers(make, items, gpus), items), len(items), self.progress)

    def close(self) -> None:
        """Nothing to give back."""


def counted(results: Iterator[Result], total: int, progress: Progress) -> Iterator[Result]:
    """Pass results on and say how many there were."""
    for done, result in enumerate(results, 1):
        progress(done, total)
        yield result


def named_failures(results: Iterator[Result], items: Sequence[Any]) -> Iterator[Result]:
    """Pass results on; an exception becomes a ``TaskError`` that names the item."""
    done = 0
    try:
        for result in results:
            done += 1
            yield result
    except WORK_ERRORS as e:
        raise task_error(items[min(done, len(items) - 1)], e) from e


def task_error(item: Any, cause: BaseException) -> TaskError:
    """The sentence for a task that failed for good."""
    return TaskError(f"at {short(item)}: {type(cause).__name__}: {cause}")


def short(item: Any) -> str:
    """An item in at most 120 characters: its number, if it is a part or starts with one."""
    first = item[0] if isinstance(item, tuple) and item else item
    if isinstance(first, int):
        return f"part {first}"
    text = str(item) if isinstance(item, Location) else repr(item)
    return text if len(text) <= 120 else text[:117] + "..."
