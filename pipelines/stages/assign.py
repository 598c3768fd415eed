"""``assign``: new images in the clusters of an existing hierarchy, and how they differ from those it was made of.

The artifact has the form of that of ``cluster``: ``part-*`` for the new images, the centroids and the labels above as
they are.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from curation import coarse
from curation.artifact import Artifact, Counts, FileInfo, read_table
from curation.drift import AssignConfig, Spread, drift
from curation.embeddings import embedding_parts
from curation.execute import Executor, on_worker
from curation.store import Location, file_sha256
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.cluster import agreement, label_all, label_tasks, labels_of_level, level_parts
from pipelines.stages.edges import device_of
from pipelines.stages.retrieval.clusters import centroids_of_level

N_TASKS = 64  # that count clusters: each holds all of them, and reads its parts one after the other


def run(config: AssignConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the level-0 label and squared distance of every new row; facts tell its drift from the rows of the
    hierarchy, which may itself come from this stage.

    A task holds a part and all centroids of level 0, also where ``cluster`` made them in two steps; the drift is
    counted in tasks that hold the clusters of level 0, 8 bytes each, and reckoned in one that holds about 100.
    """
    embeddings, tree = inputs["embeddings"], inputs["hierarchy"]
    check_vectors(embeddings, tree)
    frozen = [file for file in tree.files if not file.name.startswith("part-")]
    out.make(partial(copy_file, tree=tree, out=out.location), frozen, [[file.name] for file in frozen])
    parts = embedding_parts(embeddings)
    device = device_of(executor)
    out.log["assign_gpus"] = device.gpus  # of a task that compares rows and centroids
    tasks = label_tasks("part", parts, out.scratch("labels-0"), device)
    label_all(tasks, centroids_of_level(tree, 0), out, executor, device)
    out.facts |= {name: tree.facts[name] for name in ("n_clusters", "width", "backbone")}
    n_clusters = tree.facts["n_clusters"]
    agreements = {level: share for level, share in tree.facts.get("agreement", {}).items() if level != "0"}
    if n_clusters[0] >= coarse.COARSE_FROM:
        agreements["0"] = agreement(tasks, level_parts(out, 0), out.location, executor)
    if agreements:
        out.facts["agreement"] = agreements
    spreads = {
        "old": spread_of([tree.part(i) for i in range(len(tree.parts))], n_clusters[0], executor),
        "new": spread_of([out.location / task.name for task in tasks], n_clusters[0], executor),
    }
    tell = partial(drift_of, config=config, tree=tree)
    out.facts["drift"] = on_worker(executor, tell, spreads).get()
    n_rows = sum(part.n_rows for part in parts)
    return {"rows": n_rows, "kept": n_rows, "dropped": 0, "bad": 0}


def check_vectors(embeddings: Artifact, tree: Artifact) -> None:
    """Raise UserError unless there are new vectors, of the backbone and the width of the hierarchy."""
    ours, theirs = embeddings.facts, tree.facts
    if (ours["backbone"], ours["width"]) != (theirs["backbone"], theirs["width"]):
        raise UserError(
            "assign.embeddings must be of the backbone of assign.hierarchy: got "
            f"{ours['backbone']['name']}, {ours['width']} wide, for {theirs['backbone']['name']}, "
            f"{theirs['width']} wide",
            "embed the new images with the same backbone, weights and settings",
        )
    if not embeddings.starts[-1]:
        raise UserError("assign.embeddings must have images: got none", "leave the step out, or fill its pool")


def copy_file(file: FileInfo, tree: Artifact, out: Location) -> FileInfo:
    """One file of the hierarchy, as it is."""
    source, target = tree.location / file.name, out / file.name
    with source.local_copy() as path, target.side_file() as side:
        shutil.copyfile(path, side)
        if file_sha256(side) != file.sha256:
            raise ValueError(f"{source} must be the file that its manifest names: its sha256 differs")
    return file


def spread_of(files: Sequence[Location], n_clusters: int, executor: Executor) -> Any:
    """A reference to where the rows of some parts lie."""
    groups = [[files[i] for i in some] for some in np.array_split(np.arange(len(files)), min(N_TASKS, len(files)))]
    return executor.reduce(partial(spread_of_parts, n_clusters=n_clusters), groups, Spread.merge, fan_in=2)


def spread_of_parts(files: Sequence[Location], n_clusters: int) -> Spread:
    """Where the rows of these parts lie."""
    spread = Spread.zeros(n_clusters)
    for file in files:
        table = read_table(file, ["label", "sq_distance"])
        spread = spread.add(table["label"].to_numpy(), table["sq_distance"].to_numpy())
    return spread


def drift_of(old: Spread, new: Spread, config: AssignConfig, tree: Artifact) -> dict[str, Any]:
    """The drift of new rows from old ones, with the levels of the hierarchy."""
    n_clusters: list[int] = tree.facts["n_clusters"]
    return drift(config, old, new, [(labels_of_level(tree, t), k) for t, k in enumerate(n_clusters) if t])


STAGE = Stage(
    version=2,
    config=AssignConfig,
    run=run,
    reads={"embeddings": ("embed",), "hierarchy": ("cluster",)},
)
