"""Mode ``cluster`` of ``retrieve``: the clusters that seed images lie in, and what each gives to whom."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from curation.artifact import Artifact, read_table
from curation.embeddings import EmbeddingsPart, covered_rows, read_embeddings
from curation.execute import Executor, Ref, on_worker
from curation.labelling import assign_part
from curation.retrieve import HIT, RetrieveConfig, hit_records, merge_hits, share_pairs
from pipelines.errors import UserError
from pipelines.stage import SCRATCH, make_aside
from pipelines.stages.cluster import labels_of_level
from pipelines.stages.retrieval.job import Job, Plan, SeedPart, Span, looked_at


def assign(job: Job, spans: Sequence[Span], executor: Executor) -> tuple[Ref[Plan], dict[str, Any]]:
    """Find the clusters that seed images lie in, and what each gives to whom."""
    tree, level = job.source, job.config.cluster_level
    n_clusters: list[int] = tree.facts["n_clusters"]
    check_level("retrieve.level", job.config, len(n_clusters))
    centroids = on_worker(executor, partial(centroids_of_level, tree=tree, level=level), {})
    names = [seeds.name for seeds in job.seeds]
    hits = job.out / SCRATCH / "hits"
    make_aside(partial(hit_clusters, job=job), job.seeds, names, hits, executor, {"centroids": centroids})
    seen = executor.reduce(partial(read_hits, job=job), job.seeds, merge_hits)
    follow = on_worker(executor, partial(follow_labels, tree=tree, level=level), {})
    also = {"follow": follow, "centroids": centroids if level else None}
    sizes = executor.reduce(
        partial(cluster_sizes, job=job, n_clusters=n_clusters[level]), spans, np.add, shared={"follow": follow}
    )
    return on_worker(executor, partial(plan_clusters, config=job.config), {"seen": seen, "sizes": sizes}), also


def check_level(key: str, config: RetrieveConfig, n_levels: int) -> None:
    """Raise UserError unless the hierarchy has the level whose clusters are asked for."""
    if config.cluster_level >= n_levels:
        raise UserError(
            f"{key} must be below the number of levels, {n_levels}: got {config.cluster_level}", "0 is the finest"
        )


def centroids_of_level(tree: Artifact, level: int) -> np.ndarray:
    """float32 (k, d)."""
    names = [file.name for file in tree.files if file.name.startswith(f"centroids-{level}-")]
    return np.concatenate([read_embeddings(tree.location / name)[1] for name in names])


def follow_labels(tree: Artifact, level: int) -> np.ndarray | None:
    """The cluster at a level of every finest cluster, int32 (k,); None at the finest."""
    follow = None
    for t in range(1, level + 1):
        labels = labels_of_level(tree, t)
        follow = labels if follow is None else labels[follow]
    return follow


def hit_clusters(seeds: SeedPart, job: Job, centroids: np.ndarray) -> None:
    """HIT (n,): the clusters that images of one part of a seed pool lie in."""
    labels, distance = assign_part(seeds.vectors, centroids)
    rows = covered_rows(seeds.vectors.location) + np.int64(seeds.start)
    job.aside("hits", seeds.name).write(hit_records(seeds.pool, labels, rows, distance).tobytes())


def read_hits(seeds: SeedPart, job: Job) -> np.ndarray:
    """What ``hit_clusters`` wrote."""
    return np.frombuffer(job.aside("hits", seeds.name).read(), HIT)


def cluster_sizes(span: Span, job: Job, n_clusters: int, follow: np.ndarray | None) -> np.ndarray:
    """Rows of a part that may be retrieved from each cluster, int64 (n_clusters,)."""
    table = read_table(job.source.part(span[0]), ["row", "label"])
    _, at, _ = looked_at(span[0], table["row"].to_numpy(), job)
    labels = table["label"].to_numpy()[at]
    sizes: np.ndarray = np.bincount(labels if follow is None else follow[labels], minlength=n_clusters)
    return sizes


def plan_clusters(seen: np.ndarray, sizes: np.ndarray, config: RetrieveConfig) -> Plan:
    """The clusters that qualify for each seed pool and what they give."""
    most, n_pools = int(seen["hits"].max()), len(config.seeds)
    seen = seen[seen["hits"] > config.most_hits_without]
    size = sizes[seen["target"]]
    n_rows = np.zeros(n_pools, np.int64)
    np.add.at(n_rows, seen["pool"], size)
    pairs = share_pairs(seen["pool"], seen["target"], size, n_pools, config)
    return Plan(pairs, seen, np.bincount(seen["pool"], minlength=n_pools), n_rows, most)


def rows_of_clusters(
    index: int, job: Job, follow: np.ndarray | None, centroids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows looked at in one part, their cluster int32 and squared distance to its centroid float32, and bad rows.

    The hierarchy knows the distance at the finest level; above it the vectors are read.
    """
    table = read_table(job.source.part(index), ["row", "label", "sq_distance"])
    rows, at, bad = looked_at(index, table["row"].to_numpy(), job)
    clusters = table["label"].to_numpy()[at]
    if follow is None or centroids is None:
        return rows, clusters, table["sq_distance"].to_numpy()[at], bad
    from curation import loops

    clusters = follow[clusters]
    distance, first = np.empty(len(rows), np.float32), 0
    for block in EmbeddingsPart(job.embeddings.part(index), table.num_rows, 0).blocks():
        low, high = np.searchsorted(at, (first, first + len(block)))
        distance[low:high] = loops.row_sq_distances(block[at[low:high] - first], centroids, clusters[low:high])
        first += len(block)
    return rows, clusters, distance, bad
