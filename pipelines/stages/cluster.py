"""``cluster``: hierarchical k-means over embeddings, level by level.

``part-*`` has the level-0 label of every row; ``centroids-<t>-*`` are the centroids of level t, an embeddings
artifact in parts, and ``labels-<t>-*`` the level-t cluster of each cluster of level t - 1, in the same parts. In
scratch, for every run of a level: where it stands after its last step, and bounds of every part.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, describe, part_name, read_table, write_table
from curation.coarse import CentroidGroups, CoarseTarget, n_agreeing
from curation.embeddings import EmbeddingsPart, covered_rows, embedding_parts, read_embeddings, write_embeddings
from curation.execute import Executor
from curation.hierarchy import ClusterConfig, fit_level
from curation.kmeans import Member, State, Step, SubsetRows, assign_member, step_shared
from curation.nearest import Bounds
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage

CENTROID_ROWS = 65_536  # centroids of one file
AGREEMENT_PARTS, AGREEMENT_ROWS = 16, 256  # parts, and rows of each, that tell how right a coarse assignment is
TAG_BYTES = 32  # that bounds begin with


class LabelTask(NamedTuple):
    """One part whose rows get their cluster."""

    name: str
    part: EmbeddingsPart


def run(config: ClusterConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Fit every level on what the level below left, and label that."""
    embeddings: Artifact = inputs["embeddings"]
    parts = embedding_parts(embeddings)
    n_rows = sum(part.n_rows for part in parts)
    if n_rows < config.n_clusters[0]:
        raise UserError(
            f"cluster.n_clusters must be at most the number of rows: got {config.n_clusters[0]} for {n_rows} rows",
            "ask for fewer clusters, or select less strictly",
        )
    sizes = config.resample_size or [None] * len(config.n_clusters)
    made: list[int] = []
    agreements: dict[int, float] = {}
    for t, (k, size) in enumerate(zip(config.n_clusters, sizes, strict=True)):
        centroids = level_parts(out, t)
        if not centroids:
            filled = [part for part in parts if part.n_rows]
            fitted = fit_level(
                filled,
                k,
                config.n_resamples,
                size,
                seed_key=(config.seed, t),
                executor=executor,
                how=config.lloyd,
                trail=FileLevel(out.scratch(f"level-{t}")),
            )
            centroids = write_centroids(out, t, fitted)
        prefix = "part" if t == 0 else f"labels-{t}"
        tasks = [LabelTask(part_name(i, prefix), part) for i, part in enumerate(parts)]
        work = partial(label_part, out=out.location)
        shared = step_shared(Step(load(centroids)), executor)
        out.make(work, tasks, [[task.name] for task in tasks], shared=shared)
        if "groups" in shared:
            agreements[t] = agreement(parts, shared, executor)
        made.append(sum(part.n_rows for part in centroids))
        parts = centroids
    out.files += describe_centroids(out, executor)
    out.facts |= {"n_clusters": made, "width": embeddings.facts["width"], "backbone": embeddings.facts["backbone"]}
    if agreements:
        out.facts["agreement"] = {str(level): value for level, value in agreements.items()}
    return {"rows": n_rows, "kept": n_rows, "dropped": 0, "bad": 0}


@dataclass(frozen=True)
class FileMemory:
    """Bounds of a part in a file: their tag, then 8 bytes a row."""

    location: Location

    def load(self, tag: bytes) -> Bounds | None:
        """As ``Memory``."""
        if not self.location.exists():
            return None
        data = self.location.read()
        if data[:TAG_BYTES] != tag:
            return None
        labels, lower = np.frombuffer(data, "<i4", offset=TAG_BYTES).reshape(2, -1)
        return Bounds(labels, lower.view("<f4"))

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


@dataclass(frozen=True)
class FileLevel:
    """The runs of a level, a folder each."""

    folder: Location

    def run(self, number: int) -> FileTrail:
        """As ``LevelTrail``."""
        return FileTrail(self.folder / f"run-{number:04d}")


def level_parts(out: Output, level: int) -> list[EmbeddingsPart]:
    """The centroids of a level as parts; none unless all are there, which the first file, written last, says."""
    names = [entry.name for entry in out.location.list() if entry.name.startswith(f"centroids-{level}-")]
    if part_name(0, f"centroids-{level}") not in names:
        return []
    parts, first = [], 0
    for name in names:
        n_rows = len(covered_rows(out.location / name))
        parts.append(EmbeddingsPart(out.location / name, n_rows, first, unit=False))
        first += n_rows
    return parts


def write_centroids(out: Output, level: int, centroids: np.ndarray) -> list[EmbeddingsPart]:
    """Write the centroids of a level in parts, float32, the first part last."""
    starts = range(0, len(centroids), CENTROID_ROWS)
    for i, start in reversed(list(enumerate(starts))):
        x = centroids[start : start + CENTROID_ROWS]
        write_embeddings(out.location / part_name(i, f"centroids-{level}"), np.arange(len(x)), x)
    return level_parts(out, level)


def describe_centroids(out: Output, executor: Executor) -> list[FileInfo]:
    """The files of all centroids, for the manifest."""
    names = [entry.name for entry in out.location.list() if entry.name.startswith("centroids-")]
    return list(executor.map(describe, [out.location / name for name in names]))


def load(parts: Sequence[EmbeddingsPart]) -> np.ndarray:
    """The centroids of a level, float32 (k, d)."""
    return np.concatenate([read_embeddings(part.location)[1] for part in parts])


def agreement(parts: Sequence[EmbeddingsPart], shared: Mapping[str, Any], executor: Executor) -> float:
    """The share of sampled rows that got the nearest of all centroids, where they were assigned through groups."""
    some = [part for part in parts if part.n_rows]
    some = some[:: -(-len(some) // AGREEMENT_PARTS)]
    counts = list(executor.map(agreeing_rows, some, {"groups": shared["groups"]}))
    return sum(same for same, _ in counts) / sum(n for _, n in counts)


def agreeing_rows(part: EmbeddingsPart, groups: CentroidGroups) -> tuple[int, int]:
    """How many of some rows of a part got the nearest centroid, and of how many."""
    rows = np.linspace(0, part.n_rows - 1, min(AGREEMENT_ROWS, part.n_rows)).astype(np.int64)
    x = np.concatenate(list(SubsetRows(part, rows).blocks()))
    return n_agreeing(x, CoarseTarget(groups)), len(x)


def label_part(task: LabelTask, out: Location, step: Step, groups: CentroidGroups | None = None) -> FileInfo:
    """The nearest centroid of every row of a part, and its squared distance."""
    labels, sq_distance = assign_member(Member(task.part), step, groups)
    table = pa.table(
        {
            "row": pa.array(covered_rows(task.part.location), pa.int32()),
            "label": pa.array(labels),
            "sq_distance": pa.array(sq_distance),
        }
    )
    return write_table(out / task.name, table)


def labels_of_level(tree: Artifact, level: int) -> np.ndarray:
    """The level-``level`` cluster of each cluster of the level below, int32 (k,), for levels from 1 on."""
    names = [file.name for file in tree.files if file.name.startswith(f"labels-{level}-")]
    return np.concatenate([read_table(tree.location / name, ["label"])["label"].to_numpy() for name in names])


STAGE = Stage(version=2, config=ClusterConfig, run=run, reads={"embeddings": ("embed",)})
