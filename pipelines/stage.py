"""What a stage is to the engine: its config, what it reads, and a function that makes parts and counts.

    run(config, inputs, out, executor) -> counts

``inputs`` has the artifacts by name (those of a list as ``list.step``, see ``listed``) and, for a stage that reads from
outside, ``FOUND``: what its ``look`` listed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

from curation.artifact import Artifact, Counts, FileInfo, describe
from curation.execute import Executor
from curation.store import Entry, Location

Item = TypeVar("Item")
Inputs = Mapping[str, Any]
SCRATCH = "scratch"
SELECTIONS = ("select", "dedup", "decontaminate", "retrieve", "sample", "mix")  # their output says which rows go on
HEAD_COUNTS = ("rows", "kept", "dropped", "bad")  # what every step counts, in the order it is shown
FOUND = "(found)"  # among the inputs: what ``look`` made of its listing; no step can have this name


@dataclass(frozen=True)
class Step:
    """A named entry of a recipe: what to do, and with the output of which earlier steps."""

    name: str
    stage: str
    config: Any
    inputs: Mapping[str, str]  # input name -> step name; of a list "name.step" -> step
    kind: str = ""  # what its output can be used as: the stage, or whose form it has, or that of a union's members


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of step."""

    version: int  # raised when the bytes of its output change for equal input
    config: type  # a frozen dataclass
    run: Callable[[Any, Inputs, "Output", Executor], Counts]
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # input -> the stages it may come from
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # inputs that may be left out
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # config fields that name several steps
    step_or_value: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a step, or else a value of the config
    through: tuple[str, ...] = ()  # inputs of inputs that it reads too, such as "embeddings.pool", or "seeds.pool" of
    # every artifact of a list
    acts_as: str | None = None  # its output can be used as what this list holds
    reads_all: bool = False  # every earlier step is an input, under its own name
    locations: tuple[str, ...] = ()  # config fields that say where, not what: kept out of the fingerprint
    check: Callable[[str, Any, Mapping[str, "Step"]], None] | None = None  # of a step's name, config and inputs (name
    # -> step; its config is None where an artifact is named): raises UserError when the recipe is read
    has_presets: bool = False  # its settings may begin with those of a preset, see ``pipelines.recipe.with_presets``
    look: Callable[[Any], tuple[Sequence[Entry] | None, Any]] | None = None  # what is found outside, and ``found``


class Timed(NamedTuple):
    """The files of an item, and what is added up over items for the log of the run."""

    files: list[FileInfo]
    log: dict[str, float]


class Rows(NamedTuple):
    """What the items of a step hold."""

    unit: str  # such as "images"
    sizes: Sequence[int]  # how many of them every item has
    tell: Callable[[Mapping[str, float]], str]  # what the log says so far, in a few words


class Output:
    """The artifact of a step while it is made: where, and which files are whole."""

    def __init__(self, location: Location, executor: Executor) -> None:
        self.location = location
        self.files: list[FileInfo] = []
        self.facts: dict[str, Any] = {}
        self.log: dict[str, float] = {}  # times and rates: they go to the log of the run, not into the manifest
        self._executor = executor

    @property
    def artifact(self) -> Artifact:
        """The place in a form that travels to workers."""
        return Artifact(self.location)

    def scratch(self, name: str) -> Location:
        """A place for what the step needs on its way and nobody afterwards."""
        return self.location / SCRATCH / name

    def make(
        self,
        work: Callable[..., Any],
        items: Sequence[Item],
        names: Sequence[Sequence[str]],
        shared: Mapping[str, Any] | None = None,
        gpus: float = 0,
    ) -> None:
        """Have every item's files made, except those that an interrupted run left whole.

        ``work(item, **shared)`` writes the files ``names[i]``, the last of them last, and returns their ``FileInfo``,
        one or several, or a ``Timed``. gpus: of each call.
        """
        todo = self._missing(items, names)
        self._add(self._executor.map(work, todo, shared, gpus))

    def make_by_workers(
        self,
        make: Callable[[], Callable[[Item], Any]],
        items: Sequence[Item],
        names: Sequence[Sequence[str]],
        gpus: float = 0,
        rows: Rows | None = None,
    ) -> None:
        """As ``make``, by workers that load something first: ``make()`` gives what does an item.

        rows: what progress counts instead of items. An item may give a ``Timed``.
        """
        todo = self._missing(items, names)
        if rows is None:
            self._add(self._executor.map_workers(make, todo, gpus))
            return
        sizes = dict(zip(items, rows.sizes, strict=True))
        done = [0, *accumulate(max(sizes[item], 1) for item in todo)]  # what has no rows is work too
        with progress_held(self._executor) as show:
            for i, made in enumerate(self._executor.map_workers(make, todo, gpus), 1):
                self._add([made])
                show(done[i], done[-1], rows.unit, rows.tell(self.log))

    def _missing(self, items: Sequence[Item], names: Sequence[Sequence[str]]) -> list[Item]:
        """The items that are still to be done; the files of the others are described."""
        there = {entry.name for entry in self.location.list()} if self.location.is_folder() else set()
        whole = [all(name in there for name in some) for some in names]
        kept = [self.location / name for some, done in zip(names, whole, strict=True) if done for name in some]
        self._add(self._executor.map(describe, kept))
        return [item for item, done in zip(items, whole, strict=True) if not done]

    def _add(self, made: Iterable[Any]) -> None:
        for item in made:
            files = item
            if isinstance(item, Timed):
                files = item.files
                self.log |= {name: self.log.get(name, 0) + value for name, value in item.log.items()}
            self.files += [files] if isinstance(files, FileInfo) else files


@contextmanager
def progress_held(executor: Executor) -> Iterator[Callable[[int, int, str, str], None]]:
    """While the block runs the executor shows no progress; what is given shows it, as far as the executor could."""
    show = getattr(executor, "progress", None)
    if show is None:
        yield lambda done, total, unit, words: None
        return
    executor.progress = lambda done, total: None  # type: ignore[attr-defined]
    try:
        yield show
    finally:
        executor.progress = show  # type: ignore[attr-defined]


def listed(inputs: Inputs, name: str, names: Sequence[str]) -> list[Artifact]:
    """The artifacts of a list, in the order of the config's ``names``."""
    return [inputs[f"{name}.{step}"] for step in names]


def make_aside(
    work: Callable[..., None],
    items: Sequence[Item],
    names: Sequence[str],
    folder: Location,
    executor: Executor,
    shared: Mapping[str, Any] | None = None,
    gpus: float = 0,
) -> None:
    """Have every item's scratch file made, unless it is whole; what is there is not read, it may be large.

    ``work(item, **shared)`` writes the file ``names[i]`` of ``folder``. gpus: of each call.
    """
    there = {entry.name for entry in folder.list()} if folder.is_folder() else set()
    todo = [item for item, name in zip(items, names, strict=True) if name not in there]
    for _ in executor.map(work, todo, shared, gpus):
        pass


def whole_files(out: Location, names: Sequence[str]) -> list[FileInfo]:
    """The files of one part of an item, when an interrupted run left the last of them; otherwise none."""
    return [describe(out / name) for name in names] if (out / names[-1]).exists() else []


def part_span(artifact: Artifact) -> list[tuple[int, int, int]]:
    """(index, position of its first row, rows) of every part: what a task needs to know of a pool's part."""
    starts = artifact.starts
    return [(i, int(starts[i]), part.rows) for i, part in enumerate(artifact.parts)]
