"""What a run measures, for other programs while it runs: lines of JSON, and TensorBoard if it is installed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from curation.store import Location


class Log:
    """``metrics-{start:07d}.jsonl`` in a folder: a line every few steps, from the step that this process began with.

    A folder on S3 gets, when ``flush`` is called, a file with the lines since the last one, named by its first step.
    TensorBoard event files are written beside them into a local folder when the package ``tensorboard`` is installed.
    """

    def __init__(self, folder: Location, start: int) -> None:
        self.folder = folder
        self.file = folder / f"metrics-{start:07d}.jsonl"
        self._lines: list[str] = []
        self._board = _tensorboard(folder, start)
        if folder.is_local:
            folder.path.mkdir(parents=True, exist_ok=True)
            self.file.path.write_text("")

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of a step; numbers that are not finite become null."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        text = json.dumps(line) + "\n"
        if self.file.is_local:
            with self.file.path.open("a") as out:
                out.write(text)
        else:
            if not self._lines:
                self.file = self.folder / f"metrics-{step:07d}.jsonl"
            self._lines.append(text)
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Have on S3 what was added so far."""
        if self._lines:
            self.file.write("".join(self._lines).encode())
            self._lines.clear()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(folder: Location, start: int) -> Any:
    """A writer of event files; None on S3 or without the package."""
    if not folder.is_local:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(Path(folder.path)), purge_step=start)
