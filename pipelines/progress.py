"""Progress on stderr: a live line for people at a terminal, one line a step for a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from pipelines.executor import Progress

SAY_EVERY_S = 30  # between lines about a running step where there is no terminal


class StepProgress:
    """Shows the step that is running: items done, rate, time left. Use as a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
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
        task = self._task = self._bar.add_task(f"{name} ({stage})", total=None, rate="")
        started = said = time.monotonic()

        def update(done: int, total: int, unit: str = "", words: str = "") -> None:
            nonlocal said
            now = time.monotonic()
            rate = done / max(now - started, 1e-6)
            speed = f"{rate:.3g} {unit}".strip() + "/s"
            self._bar.update(task, completed=done, total=total, rate=", ".join(filter(None, [speed, words])))
            if self._bar.disable and now - said > SAY_EVERY_S:
                said = now
                told = [f"{total:,} {unit}".strip(), speed, f"{(total - done) / rate:.0f} s left", words]
                self.say(f"{name} ({stage}) {done:,} of {', '.join(filter(None, told))}")

        return update

    def stop(self) -> None:
        """No step is running."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
