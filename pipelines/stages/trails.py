"""Where a k-means run stands, and what it knows of the rows, in files of scratch: a folder a run."""

import io
from dataclasses import dataclass

import numpy as np

from curation.execute import CPU, Device
from curation.kmeans import NO_TRAIL, State, Trail
from curation.nearest import Bounds
from curation.store import Location

TAG_BYTES = 32  # that bounds begin with


@dataclass(frozen=True)
class FileMemory:
    """Bounds of a part in a file: their tag, then 8 bytes a row."""

    location: Location

    def load(self) -> tuple[bytes, Bounds] | None:
        """As ``Memory``."""
        if not self.location.exists():
            return None
        data = self.location.read()
        labels, lower = np.frombuffer(data, "<i4", offset=TAG_BYTES).reshape(2, -1)
        return data[:TAG_BYTES], Bounds(labels, lower.view("<f4"))

    def save(self, tag: bytes, bounds: Bounds) -> None:
        """As ``Memory``."""
        self.location.write(tag + bounds.labels.astype("<i4").tobytes() + bounds.lower.astype("<f4").tobytes())


@dataclass(frozen=True)
class FileTrail:
    """A run in a folder."""

    folder: Location

    def memory(self, part: int) -> FileMemory:
        """As ``Trail``."""
        return FileMemory(self.folder / f"bounds-{part:07d}")

    def load(self) -> State | None:
        """As ``Trail``."""
        at = self.folder / "state.npz"
        if not at.exists():
            return None
        with np.load(io.BytesIO(at.read()), allow_pickle=False) as held:
            before = held["before"] if held["n_done"] else None
            return State(held["centroids"], before, int(held["n_done"]), float(held["objective"]), bool(held["done"]))

    def save(self, state: State) -> None:
        """As ``Trail``."""
        data = io.BytesIO()
        before = state.centroids[:0] if state.before is None else state.before
        np.savez(data, **state._replace(before=before)._asdict())
        (self.folder / "state.npz").write(data.getvalue())


def place_for_labels(folder: Location, device: Device) -> Trail:
    """Where a device leaves the labels of rows for those who write them; a CPU, which writes them itself, nowhere."""
    return NO_TRAIL if device.name == CPU.name else FileTrail(folder)


@dataclass(frozen=True)
class FileLevel:
    """The runs of a level, a folder each."""

    folder: Location

    def run(self, number: int) -> FileTrail:
        """As ``LevelTrail``."""
        return FileTrail(self.folder / f"run-{number:04d}")
