"""``retrieve``: the images of a pool that lie near trusted seed images. What is exact is in ``curation.retrieve``.

Both modes find the rows that every seed pool asks for, cut them to their quotas, share a target, and write. The passes
are in ``pipelines.stages.retrieval``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of
from curation.embeddings import covered_rows
from curation.execute import Executor
from curation.hierarchy import ClusterConfig
from curation.retrieve import DRAFTED, Planned, RetrieveConfig, judge
from curation.selection import carried_count, write_selection
from curation.shuffle import read_shuffle
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, Step, listed, part_span
from pipelines.stages.mix import check_unmixed, refuse_mixes
from pipelines.stages.retrieval.clusters import assign, check_level, rows_of_clusters
from pipelines.stages.retrieval.job import Job, Span, looked_at, read_claims, seed_parts
from pipelines.stages.retrieval.quotas import cut, plan_pools, share_target
from pipelines.stages.retrieval.search import search


def check(name: str, config: RetrieveConfig, inputs: Mapping[str, Step]) -> None:
    """Keys of the mode and of no other, a level that is there, no mix with shares. Raises UserError before anything
    runs."""
    refuse_mixes(name, inputs)
    own = {"sample": ("embeddings", "n_neighbors"), "cluster": ("hierarchy", "min_hits", "per_cluster", "level")}
    [other] = own.keys() - {config.mode}
    for key in own[other]:
        value = inputs[key].name if key in inputs else getattr(config, key, None)
        if value is not None:
            raise UserError(
                f"{name}.{key} must be left out in mode {config.mode!r}: got {value!r}",
                f"{key} belongs to mode {other!r}",
            )
    needed = own[config.mode][0]
    if needed not in inputs:
        kind = {"embeddings": "embed", "hierarchy": "cluster"}[needed]
        raise UserError(
            f"{name} must name its {needed} in mode {config.mode!r}: got none",
            f"add {needed}: and a step of stage {kind} over the pool to retrieve from",
        )
    if needed == "hierarchy" and isinstance(inputs[needed].config, ClusterConfig):
        check_level(f"{name}.level", config, len(inputs[needed].config.n_clusters))


def run(config: RetrieveConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write for every row looked at: kept, the nearest seed image that asked for it, and which seed pools did.

    Columns: row, kept; near_row (int64, position of that seed image in the pool of its seed pool) and seed (int32,
    index of that seed pool), both null where not retrieved; seed_pools (int64, bit i: seed pool i retrieved it); hits
    (int64, seed images of these that asked for it, or lie in its cluster). Mode ``sample`` adds similarity (float32,
    to the seed image, null where not retrieved). Mode ``cluster`` adds cluster (int32) and sq_distance (float32, to
    its centroid) of every row; near_row is the seed image nearest to the centroid, and a row that several seed pools
    retrieved is of the one whose image is nearest.

    With a ``selection`` its rows alone are looked at, and its counts go on; those that were not decoded are bad.
    Facts say of every seed pool what it asked for and what became of it: an image counts for every seed pool that
    retrieved it. The driver holds O(parts); what each task holds is told by its kernel.
    """
    source: Artifact = inputs["embeddings"] if config.mode == "sample" else inputs["hierarchy"]
    embeddings = source if config.mode == "sample" else source.input("embeddings")
    pools = listed(inputs, "seeds", config.seeds)
    check_unmixed("retrieve.selection", inputs.get("selection"))
    check_seeds(config, pools, embeddings)
    job = Job(config, source, embeddings, inputs.get("selection"), seed_parts(pools), out.location)
    spans = part_span(pool_of(embeddings))
    if config.mode == "sample":
        check_rows(config, job)
        plan, also = search(job, spans, executor)
    else:
        plan, also = assign(job, spans, executor)
    planned = plan_pools(config, pools, plan, executor)
    cut(job, spans, plan, also, executor)
    drafted = share_target(job, spans, executor)
    names = [[part_name(index)] for index, _, _ in spans]
    out.make(partial(write_part, job=job, drafted=drafted), spans, names, shared=also)
    return count(config, planned, out)


def check_seeds(config: RetrieveConfig, pools: Sequence[Artifact], embeddings: Artifact) -> None:
    """Seeds there are, of the backbone that made the pool's vectors. Raises UserError."""
    backbone = embeddings.facts["backbone"]
    for name, seeds in zip(config.seeds, pools, strict=True):
        if not seeds.starts[-1]:
            raise UserError(
                f"retrieve.seeds must have images that were embedded: {name} has none", "leave it out, or fill its pool"
            )
        theirs = seeds.facts["backbone"]
        if theirs != backbone:
            raise UserError(
                f"seeds and pool must come from one backbone: got {theirs['name']} for {name} and {backbone['name']} "
                "for the pool",
                "embed both with the same backbone",
            )


def check_rows(config: RetrieveConfig, job: Job) -> None:
    """Enough rows to be asked for. Raises UserError."""
    n_rows = int(job.embeddings.starts[-1])
    if job.before is not None:
        n_rows = min(n_rows, job.before.counts["kept"])
    if config.k > n_rows:
        raise UserError(
            f"retrieve.n_neighbors must be at most the rows to retrieve from: got {config.k} for {n_rows} rows",
            "ask for fewer, or select less strictly",
        )


def write_part(
    span: Span,
    job: Job,
    drafted: Location | None,
    follow: np.ndarray | None = None,
    centroids: np.ndarray | None = None,
) -> FileInfo:
    """The decision on every row of a part that was looked at."""
    index = span[0]
    why: dict[str, Any] = {}
    if job.config.mode == "sample":
        rows, _, bad = looked_at(index, covered_rows(job.source.part(index)), job)
    else:
        rows, clusters, distance, bad = rows_of_clusters(index, job, follow, centroids)
        why = {"cluster": pa.array(clusters, pa.int32()), "sq_distance": pa.array(distance, pa.float32())}
    by_draft = None if drafted is None else read_shuffle(drafted, DRAFTED, index)
    verdict = judge(rows, read_claims("claims", index, job), by_draft)
    none = ~verdict.retrieved
    if job.config.mode == "sample":
        why = {"similarity": pa.array(-verdict.gap, mask=none)}
    also = {"bad": bad, "retrieved": int(verdict.retrieved.sum())}
    for j in range(len(job.config.seeds)):
        mine = (verdict.seed_pools >> j) & 1 == 1
        also |= {f"retrieved_{j}": int(mine.sum()), f"kept_{j}": int((mine & verdict.kept).sum())}
    return write_selection(
        job.out / part_name(index),
        rows,
        verdict.kept,
        also,
        near_row=pa.array(verdict.near_row, mask=none),
        hits=pa.array(verdict.hits),
        seed=pa.array(verdict.seed, mask=none),
        seed_pools=pa.array(verdict.seed_pools),
        **why,
        **carried_count(job.before, index, rows, verdict.kept),
    )


def count(config: RetrieveConfig, planned: Mapping[str, Planned], out: Output) -> Counts:
    """The counts of all parts, and as facts those of every seed pool."""
    total = add_counts(file.counts for file in out.files)
    out.facts["seed_pools"] = {
        name: {**plan._asdict(), "retrieved": total.pop(f"retrieved_{j}"), "kept": total.pop(f"kept_{j}")}
        for j, (name, plan) in enumerate(planned.items())
    }
    return {**total, "nominal": sum(plan.nominal for plan in planned.values())}


STAGE = Stage(
    version=1,
    config=RetrieveConfig,
    run=run,
    lists={"seeds": ("embed",)},
    optional={"embeddings": ("embed",), "hierarchy": ("cluster",), "selection": SELECTIONS},
    through=("embeddings.pool", "hierarchy.embeddings", "hierarchy.embeddings.pool", "seeds.pool"),
    check=check,
)
