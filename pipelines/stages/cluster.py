"""``cluster``: hierarchical k-means over embeddings, level by level.

``part-*`` has the level-0 label of every row; ``centroids-<t>-*`` are the centroids of level t, an embeddings
artifact in parts, and ``labels-<t>-*`` the level-t cluster of each cluster of level t - 1, in the same parts. In
scratch, for every run of a level: where it stands after its last step, and bounds of every part. With GPUs these
label all rows, there too, and tasks on CPUs add up and write.
"""

import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation import coarse
from curation.artifact import Artifact, Counts, FileInfo, describe, part_name, read_table, write_table
from curation.coarse import CentroidGroups
from curation.embeddings import EmbeddingsPart, covered_rows, embedding_parts, read_embeddings, write_embeddings
from curation.execute import CPU, Device, Executor, Ref
from curation.hierarchy import ClusterConfig, fit_level, rows_below
from curation.labelling import Member, Memory, Step, assign_member, step_shared, step_to
from curation.nearest import nearest_centroid
from curation.rows import Rows, SubsetRows, weighted, weights_of
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, Timed
from pipelines.stages.edges import device_of
from pipelines.stages.split import Job, Plan, job_of, labels_of_part, read_centroids, split_level
from pipelines.stages.trails import FileLevel, place_for_labels

CENTROID_ROWS = 65_536  # centroids of one file
N_COUNTS = 64  # tasks that count the rows of clusters: each holds a number for all of them
AGREEMENT_PARTS, AGREEMENT_ROWS = 16, 256  # parts, and rows of each, that tell how right a coarse assignment is


class LabelTask(NamedTuple):
    """One part whose rows get their cluster."""

    name: str
    part: EmbeddingsPart
    memory: Memory | None  # where a GPU leaves the labels

    @property
    def member(self) -> Member:
        """As k-means sees it."""
        return Member(self.part, self.memory)


def run(config: ClusterConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Fit every level on what the level below left, and label that."""
    embeddings: Artifact = inputs["embeddings"]
    device = device_of(executor)
    out.log["assign_gpus"] = device.gpus  # of a task that compares rows and centroids
    parts = embedding_parts(embeddings)
    n_rows = sum(part.n_rows for part in parts)
    if n_rows < config.n_clusters[0]:
        raise UserError(
            f"cluster.n_clusters must be at most the number of rows: got {config.n_clusters[0]} for {n_rows} rows",
            "ask for fewer clusters, or select less strictly",
        )
    made: list[int] = []
    agreements: dict[int, float] = {}
    weights: Ref[np.ndarray] | None = None  # of the rows of a level
    for t, n_splits in enumerate(config.splits):
        counted: Sequence[Rows] = parts if weights is None else weighted(parts, weights)
        prefix = "part" if t == 0 else f"labels-{t}"
        tasks = label_tasks(prefix, parts, out.scratch(f"labels-{t}"), device)
        if n_splits > 1:
            centroids = split_and_label(config, t, tasks, out, executor, device)
        else:
            centroids = fit_and_label(config, t, tasks, counted, out, executor, device)
        made.append(sum(part.n_rows for part in centroids))
        if n_splits > 1 or made[t] >= coarse.COARSE_FROM:
            agreements[t] = agreement(tasks, centroids, out.location, executor)
        if config.weights == "size" and t + 1 < len(config.n_clusters):
            labelled = [(out.location / task.name, part) for task, part in zip(tasks, counted, strict=True)]
            height = -(-len(labelled) // N_COUNTS)
            some = [labelled[start : start + height] for start in range(0, len(labelled), height)]
            count = partial(rows_below_parts, n_clusters=made[t])
            weights = executor.reduce(count, some, operator.add, fan_in=2)
        parts = centroids
    out.files += describe_centroids(out, executor)
    out.facts |= {"n_clusters": made, "width": embeddings.facts["width"], "backbone": embeddings.facts["backbone"]}
    if agreements:
        out.facts["agreement"] = {str(level): value for level, value in agreements.items()}
    return {"rows": n_rows, "kept": n_rows, "dropped": 0, "bad": 0}


def label_tasks(prefix: str, parts: Sequence[EmbeddingsPart], folder: Location, device: Device) -> list[LabelTask]:
    """One task a part, with a memory in ``folder`` where a GPU needs it."""
    trail = place_for_labels(folder, device)
    return [LabelTask(part_name(i, prefix), part, trail.memory(i)) for i, part in enumerate(parts)]


def fit_and_label(
    config: ClusterConfig, level: int, tasks: Sequence[LabelTask], counted: Sequence[Rows], out: Output,
    executor: Executor, device: Device,
) -> list[EmbeddingsPart]:  # fmt: skip
    """The centroids of a level by k-means of its rows, and the nearest one of every row; ``counted`` are the rows of
    the tasks with their weights."""
    centroids = level_parts(out, level)
    if not centroids:
        fitted = fit_level(
            [part for part in counted if part.n_rows],
            config.n_clusters[level],
            config.runs[level],
            config.sizes[level],
            seed_key=(config.seed, level),
            executor=executor,
            how=config.lloyd,
            trail=FileLevel(out.scratch(f"level-{level}")),
            pick=config.resample,
            device=device,
        )
        centroids = write_centroids(out, level, fitted)
    label_all(tasks, load(centroids), out, executor, device)
    return centroids


def label_all(
    tasks: Sequence[LabelTask], centroids: np.ndarray, out: Output, executor: Executor, device: Device
) -> None:
    """Write the nearest of all centroids for every row."""
    shared = step_shared(step_to(centroids, device), executor, [task.member for task in tasks])
    out.make(partial(label_part, out=out.location), tasks, [[task.name] for task in tasks], shared=shared)


def split_and_label(
    config: ClusterConfig, level: int, tasks: Sequence[LabelTask], out: Output, executor: Executor, device: Device
) -> list[EmbeddingsPart]:
    """The same in two steps, by ``n_splits``."""
    parts = [task.part for task in tasks]
    job = job_of(config, level, parts, out.scratch(f"level-{level}"), device, executor)
    plan = split_level(job, parts, executor)
    if not level_parts(out, level):
        k = int(plan.offsets[-1])
        files = [(i, start, min(start + CENTROID_ROWS, k)) for i, start in enumerate(range(0, k, CENTROID_ROWS))]
        write = partial(write_split_centroids, out=out.location)
        for some in (files[1:], files[:1]):
            for _ in executor.map(write, some, {"job": job, "plan": plan}):
                pass
    work = partial(label_split_part, out=out.location)
    shared = {"job": job, "plan": plan}
    out.make(work, list(enumerate(tasks)), [[task.name] for task in tasks], shared=shared)
    return level_parts(out, level)


def write_split_centroids(file: tuple[int, int, int], out: Location, job: Job, plan: Plan) -> None:
    """One file of the centroids of a level: its number, and which centroids it has."""
    number, begin, end = file
    x = read_centroids(begin, end, job, plan)
    write_embeddings(out / part_name(number, f"centroids-{job.level}"), np.arange(len(x)), x)


def label_split_part(numbered: tuple[int, LabelTask], out: Location, job: Job, plan: Plan) -> Timed:
    """The labels that the pieces have sent to a part."""
    number, task = numbered
    found = labels_of_part(number, task.part, job, plan)
    return told(write_labels(out / task.name, task.part, *found), task.part.n_rows, job.device)


def rows_below_parts(labelled: Sequence[tuple[Location, Rows]], n_clusters: int) -> np.ndarray:
    """What parts add to the rows of the pool below each cluster, int64 (n_clusters,): files of labels, and what is
    labelled there. Holds two such arrays."""
    total = np.zeros(n_clusters, np.int64)
    for location, part in labelled:
        labels = read_table(location, ["label"])["label"].to_numpy()
        total += rows_below(labels, n_clusters, weights_of(part))
    return total


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


def agreement(
    tasks: Sequence[LabelTask], centroids: Sequence[EmbeddingsPart], out: Location, executor: Executor
) -> float:
    """The share of sampled rows that got the nearest of all centroids, where not all were looked at. This process holds
    AGREEMENT_PARTS * AGREEMENT_ROWS vectors."""
    some = [task for task in tasks if task.part.n_rows]
    some = some[:: -(-len(some) // AGREEMENT_PARTS)]
    sampled = executor.map(partial(sample_rows, out=out), some)
    x, found = (np.concatenate(column) for column in zip(*sampled, strict=True))
    nearest = executor.reduce(nearest_of_part, centroids, np.minimum, shared={"x": x}).get()
    return float((found <= nearest).mean())


def sample_rows(task: LabelTask, out: Location) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of a part, and how far they are from the centroid they got."""
    rows = np.linspace(0, task.part.n_rows - 1, min(AGREEMENT_ROWS, task.part.n_rows)).astype(np.int64)
    x = np.concatenate(list(SubsetRows(task.part, rows).blocks()))
    return x, read_table(out / task.name, ["sq_distance"])["sq_distance"].to_numpy()[rows]


def nearest_of_part(part: EmbeddingsPart, x: np.ndarray) -> np.ndarray:
    """float32 (n,): squared distances of rows to the nearest of the centroids in one file."""
    return nearest_centroid(x, read_embeddings(part.location)[1])[1]


def label_part(task: LabelTask, out: Location, step: Step, groups: CentroidGroups | None = None) -> Timed:
    """The nearest centroid of every row of a part, and its squared distance."""
    found = assign_member(task.member, step, groups)
    return told(write_labels(out / task.name, task.part, *found), task.part.n_rows, step.device)


def told(file: FileInfo, n_rows: int, device: Device) -> Timed:
    """A file of labels; the log counts rows, and clusters of the level below, by who labelled them."""
    return Timed([file], {f"rows_by_{'numba_cpu' if device.name == CPU.name else 'torch_gpu'}": n_rows})


def write_labels(file: Location, part: EmbeddingsPart, labels: np.ndarray, sq_distance: np.ndarray) -> FileInfo:
    """What every row of a part got."""
    table = pa.table(
        {
            "row": pa.array(covered_rows(part.location), pa.int32()),
            "label": pa.array(labels),
            "sq_distance": pa.array(sq_distance),
        }
    )
    return write_table(file, table)


def labels_of_level(tree: Artifact, level: int) -> np.ndarray:
    """The level-``level`` cluster of each cluster of the level below, int32 (k,), for levels from 1 on."""
    names = [file.name for file in tree.files if file.name.startswith(f"labels-{level}-")]
    return np.concatenate([read_table(tree.location / name, ["label"])["label"].to_numpy() for name in names])


STAGE = Stage(version=3, config=ClusterConfig, run=run, reads={"embeddings": ("embed",)})
