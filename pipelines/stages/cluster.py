"""``cluster``: hierarchical k-means over embeddings, level by level.

``part-*`` has the level-0 label of every row; ``centroids-<t>-*`` are the centroids of level t, an embeddings
artifact in parts, and ``labels-<t>-*`` the level-t cluster of each cluster of level t - 1, in the same parts.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, describe, part_name, read_table, write_table
from curation.embeddings import EmbeddingsPart, covered_rows, embedding_parts, read_embeddings, write_embeddings
from curation.execute import Executor
from curation.hierarchy import ClusterConfig, fit_level
from curation.kmeans import assign_part
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage

CENTROID_ROWS = 65_536  # centroids of one file


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
    for t, (k, size) in enumerate(zip(config.n_clusters, sizes, strict=True)):
        centroids = level_parts(out, t)
        if not centroids:
            filled = [part for part in parts if part.n_rows]
            fitted = fit_level(
                filled, k, config.n_resamples, size, seed_key=(config.seed, t), executor=executor, n_iter=config.n_iter
            )
            centroids = write_centroids(out, t, fitted)
        prefix = "part" if t == 0 else f"labels-{t}"
        tasks = [LabelTask(part_name(i, prefix), part) for i, part in enumerate(parts)]
        work = partial(label_part, out=out.location)
        out.make(work, tasks, [[task.name] for task in tasks], shared={"centroids": load(centroids)})
        made.append(sum(part.n_rows for part in centroids))
        parts = centroids
    out.files += describe_centroids(out, executor)
    out.facts |= {"n_clusters": made, "width": embeddings.facts["width"], "backbone": embeddings.facts["backbone"]}
    return {"rows": n_rows, "kept": n_rows, "dropped": 0, "bad": 0}


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


def label_part(task: LabelTask, out: Location, centroids: np.ndarray) -> FileInfo:
    """The nearest centroid of every row of a part, and its squared distance."""
    labels, sq_distance = assign_part(task.part, centroids)
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


STAGE = Stage(version=1, config=ClusterConfig, run=run, reads={"embeddings": ("embed",)})
