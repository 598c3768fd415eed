"""``sample``: balanced sampling from a hierarchy, from the top down."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table
from curation.execute import Executor, on_worker
from curation.sampling import SampleConfig, leaf_quotas, row_counts
from curation.selection import write_selection
from curation.store import Location
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.cluster import labels_of_level


def run(config: SampleConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept and count of every row, with its cluster and that cluster's quota."""
    tree: Artifact = inputs["hierarchy"]
    n_clusters: list[int] = tree.facts["n_clusters"]
    locations = [tree.part(i) for i in range(len(tree.parts))]
    sizes = executor.reduce(partial(leaf_sizes, n_leaves=n_clusters[0]), locations, np.add)
    share = partial(share_target, tree=tree, n_levels=len(n_clusters), config=config)
    quotas = on_worker(executor, share, {"sizes": sizes})
    draw = partial(draw_rows, locations=locations, config=config)
    counts = on_worker(executor, draw, {"quotas": quotas})
    starts = tree.starts
    items = [(i, int(starts[i])) for i in range(len(locations))]
    work = partial(write_part, tree=tree, out=out.location)
    out.make(work, items, [[part_name(i)] for i, _ in items], shared={"quotas": quotas, "counts": counts})
    return {"bad": 0, **add_counts(file.counts for file in out.files)}


def leaf_sizes(location: Location, n_leaves: int) -> np.ndarray:
    """Rows of each leaf in one part, int64 (n_leaves,)."""
    sizes: np.ndarray = np.bincount(read_table(location, ["label"])["label"].to_numpy(), minlength=n_leaves)
    return sizes


def share_target(sizes: np.ndarray, tree: Artifact, n_levels: int, config: SampleConfig) -> np.ndarray:
    """How many rows each leaf gives, int64 (n_leaves,): the one task that holds the labels of all upper levels."""
    upper = [labels_of_level(tree, t) for t in range(1, n_levels)]
    return leaf_quotas(sizes, upper, config.target, config.seed, config.max_copies)


def draw_rows(locations: Sequence[Location], config: SampleConfig, quotas: np.ndarray) -> np.ndarray:
    """How often each covered row is drawn, int32 (n,): the one task that holds O(rows), 16 bytes each."""
    labels = np.concatenate([read_table(at, ["label"])["label"].to_numpy() for at in locations])
    distance = None
    if config.pick == "closest":
        distance = np.concatenate([read_table(at, ["sq_distance"])["sq_distance"].to_numpy() for at in locations])
    return row_counts(labels, quotas, config.seed, distance)


def write_part(
    item: tuple[int, int], tree: Artifact, out: Location, quotas: np.ndarray, counts: np.ndarray
) -> FileInfo:
    """The decision on every row of a part."""
    index, start = item
    table = read_table(tree.part(index), ["row", "label"])
    labels = table["label"].to_numpy()
    count = counts[start : start + len(labels)]
    return write_selection(
        out / part_name(index),
        table["row"].to_numpy(),
        count > 0,
        {"drawn": int(count.sum())},
        count=pa.array(count, pa.int32()),
        cluster=pa.array(labels),
        quota=pa.array(quotas[labels]),
    )


STAGE = Stage(version=2, config=SampleConfig, run=run, reads={"hierarchy": ("cluster",)})
