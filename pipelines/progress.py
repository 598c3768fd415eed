"""Progress on stderr: a live line for people at a terminal, one line a step for a log."""

import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from pipelines.executor import Progress

SAY_EVERY_S = 30  # between lines about a running step where there is no terminal


class _Pace:
    """How fast a step is, from the first number that was told on: those before may be of a process that was stopped,
    and its start, such as the loading of a model, is no work on items."""

    def __init__(self) -> None:
        self._base: tuple[int, float] | None = None  # items, and when they were told

    def __call__(self, done: int, now: float) -> float | None:
        """Items a second, None as long as it is not known."""
        if self._base is None or done < self._base[0]:  # a step that goes on may tell first how far it once was
            self._base = done, now
        items, seconds = done - self._base[0], now - self._base[1]
        return items / seconds if items and seconds > 0 else None


def _clock(seconds: int) -> str:
    """``29:59:10``: hours, minutes, seconds."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class _Live(Bar):
    """A line with the numbers, whose bar gives way first, and the words below it, as many lines as they take."""

    def __init__(self, console: Console, disable: bool) -> None:
        whole = Column(no_wrap=True)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeElapsedColumn(table_column=whole),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=disable,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn, from above."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["words"]:
                yield Text(task.fields["words"], style="dim")


class StepProgress:
    """Shows the step that is running: items done, rate, time left. Use as a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self._bar = _Live(self.console, disable=quiet or not sys.stderr.isatty())
        self._task: TaskID | None = None
        self._quiet = quiet

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line for people."""
        if not self._quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def start(self, name: str, stage: str) -> Progress:
        """A new step; returns what is told how many of its items are done, what they are, and words to add."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        task = self._task = self._bar.add_task(f"{name} ({stage})", total=None, speed="", left="", words="")
        pace, said = _Pace(), time.monotonic()

        def update(done: int, total: int, unit: str = "", words: str = "") -> None:
            nonlocal said
            now = time.monotonic()
            rate = pace(done, now)
            speed = "" if rate is None else f"{rate:.3g} {unit}".strip() + "/s"
            seconds = None if rate is None else round((total - done) / rate)
            left = "" if seconds is None else f"{_clock(seconds)} left"
            self._bar.update(task, completed=done, total=total, speed=speed, left=left, words=words)
            if self._bar.disable and now - said > SAY_EVERY_S:
                said = now
                told = [f"{total:,} {unit}".strip(), speed, "" if seconds is None else f"{seconds} s left", words]
                self.say(f"{name} ({stage}) {done:,} of {', '.join(filter(None, told))}")

        return update

    def stop(self) -> None:
        """No step is running."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
