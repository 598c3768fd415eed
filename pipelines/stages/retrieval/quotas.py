"""Both modes of ``retrieve``: what each seed pool asks for, the rows that quotas draw, and the draft of a target."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from curation.artifact import Artifact
from curation.execute import Executor, Ref, on_worker
from curation.retrieve import (
    CUT,
    DRAFTED,
    MEMBER,
    Cuts,
    Planned,
    RetrieveConfig,
    bucket_groups,
    cluster_claims,
    draft,
    find_cuts,
    first_of_runs,
    order_keys,
    plan_seed_pool,
)
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SCRATCH, make_aside
from pipelines.stages.retrieval.clusters import rows_of_clusters
from pipelines.stages.retrieval.job import Job, Plan, Span, part_names, read_claims

BUCKET_ROWS = 1 << 22  # rows whose cuts one task finds, unless one group has more: 64 bytes each


def plan_pools(
    config: RetrieveConfig, pools: Sequence[Artifact], plan: Ref[Plan], executor: Executor
) -> dict[str, Planned]:
    """What each seed pool asks for. Raises UserError when no cluster qualifies."""
    clusters, n_rows, most = on_worker(executor, summary, {"plan": plan}).get()
    if config.mode == "cluster" and not any(clusters):
        raise UserError(
            f"a cluster must have more than {config.most_hits_without} images of one seed pool (min_hits): got at most "
            f"{most}",
            "lower min_hits, or make fewer clusters",
        )
    return {
        name: plan_seed_pool(
            config.mode,
            int(seeds.starts[-1]),
            n_neighbors=config.k,
            n_clusters=clusters[j],
            per_cluster=config.per_cluster,
            n_in_clusters=n_rows[j],
            max_rows=config.max_rows,
        )
        for j, (name, seeds) in enumerate(zip(config.seeds, pools, strict=True))
    }


def summary(plan: Plan) -> tuple[list[int], list[int], int]:
    """The few numbers of a plan that the driver needs."""
    return plan.clusters.tolist(), plan.n_rows.tolist(), plan.most


def candidates(
    index: int, job: Job, plan: Plan, follow: np.ndarray | None = None, centroids: np.ndarray | None = None
) -> np.ndarray:
    """CLAIM (n,) by (row, pool): all rows of a part that quotas draw from."""
    if plan.seen is None:
        return read_claims("found", index, job)
    rows, clusters, distance, _ = rows_of_clusters(index, job, follow, centroids)
    return cluster_claims(rows, clusters, distance, plan.pairs, plan.seen)


def keys_of(claims: np.ndarray, start: int, config: RetrieveConfig) -> tuple[np.ndarray, np.ndarray]:
    """The row ids of claims in one part, int64 (n,), and the order in which they are picked, uint64 (n,)."""
    row_ids = claims["row"] + np.int64(start)
    return row_ids, order_keys(row_ids, claims["value"], config.pick, config.seed)


def cut(job: Job, spans: Sequence[Span], plan: Ref[Plan], also: Mapping[str, Any], executor: Executor) -> None:
    """Find the last row that every quota draws, and write the rows of each part that are drawn."""
    n_buckets = on_worker(executor, count_buckets, {"plan": plan}).get()
    found: Ref[np.ndarray] | np.ndarray = np.zeros(0, CUT)
    shared = {"plan": plan, **also}
    if n_buckets:
        members = job.out / SCRATCH / "members"
        make_aside(partial(send_members, job=job), spans, part_names(spans), members, executor, shared)
        work = partial(cut_bucket, job=job, n_parts=len(spans))
        found = executor.reduce(work, range(n_buckets), join_cuts, shared={"plan": plan})
    cuts = on_worker(executor, all_cuts, {"plan": plan, "found": found})
    claims = job.out / SCRATCH / "claims"
    make_aside(partial(keep_claims, job=job), spans, part_names(spans), claims, executor, {**shared, "cuts": cuts})


def count_buckets(plan: Plan) -> int:
    """How many tasks find cuts."""
    bucket = bucket_groups(plan.pairs, BUCKET_ROWS)[1]
    return int(bucket[-1]) + 1 if len(bucket) else 0


def join_cuts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cuts of both, for ``executor.reduce``."""
    return np.concatenate([a, b])


def all_cuts(plan: Plan, found: np.ndarray) -> Cuts:
    """The cut of every pair."""
    return Cuts.of(plan.pairs, found)


def send_members(span: Span, job: Job, plan: Plan, **also: Any) -> None:
    """The rows of one part in groups that are cut, shuffled to the tasks that find the cuts."""
    index, start, _ = span
    claims = candidates(index, job, plan, **also)
    group = plan.pairs.group[claims["pair"]]
    cut_groups, bucket = bucket_groups(plan.pairs, BUCKET_ROWS)
    at = np.minimum(np.searchsorted(cut_groups, group), len(cut_groups) - 1)
    once = np.zeros(len(claims), bool)
    once[first_of_runs(claims["row"], group)] = True  # seed pools share the rows of a cluster
    mine = np.flatnonzero(once & (cut_groups[at] == group))
    members = np.empty(len(mine), MEMBER)
    members["group"] = group[mine]
    members["row_id"], members["key"] = keys_of(claims[mine], start, job.config)
    write_shuffle(job.aside("members", str(index)), members, bucket[at[mine]], int(bucket[-1]) + 1)


def cut_bucket(number: int, job: Job, n_parts: int, plan: Plan) -> np.ndarray:
    """CUT (m,) of the pairs whose groups are in one bucket."""
    cut_groups, bucket = bucket_groups(plan.pairs, BUCKET_ROWS)
    files = [job.aside("members", str(index)) for index in range(n_parts)]
    members = np.concatenate([read_shuffle(file, MEMBER, number) for file in files])
    mine = np.isin(plan.pairs.group, cut_groups[bucket == number])
    return find_cuts(members, plan.pairs, np.flatnonzero(plan.pairs.is_cut & mine))


def keep_claims(span: Span, job: Job, plan: Plan, cuts: Cuts, **also: Any) -> None:
    """CLAIM (n,): the rows of one part that seed pools retrieve."""
    index, start, _ = span
    claims = candidates(index, job, plan, **also)
    row_ids, key = keys_of(claims, start, job.config)
    job.aside("claims", str(index)).write(claims[cuts.keep(claims["pair"], key, row_ids)].tobytes())


def share_target(job: Job, spans: Sequence[Span], executor: Executor) -> Location | None:
    """Draft ``target`` of the retrieved rows, if there are more. Returns where it is written which, and by whom."""
    if job.config.target is None:
        return None
    n_rows = sum(executor.map(partial(count_claimed, job=job), spans))
    if job.config.target >= n_rows:
        return None
    folder = job.out / SCRATCH / "draft"
    make_aside(partial(draft_rows, spans=spans, job=job), [0], ["rows"], folder, executor)
    return folder / "rows"


def count_claimed(span: Span, job: Job) -> int:
    """Rows of a part that any seed pool retrieves."""
    return len(first_of_runs(read_claims("claims", span[0], job)["row"]))


def draft_rows(_: int, spans: Sequence[Span], job: Job) -> None:
    """The one task that sees every claim, at 17 bytes each; see ``draft`` for what it holds."""
    row, pool, key, rows, part = [], [], [], [], []
    n_rows = 0
    for index, start, _ in spans:
        claims = read_claims("claims", index, job)
        first = first_of_runs(claims["row"])
        new = np.zeros(len(claims), np.int64)
        new[first] = 1
        row.append(np.cumsum(new) + (n_rows - 1))
        pool.append(claims["pool"].astype(np.int8))
        key.append(keys_of(claims, start, job.config)[1])
        rows.append(claims["row"][first])
        part.append(np.full(len(first), index, np.int32))
        n_rows += len(first)
    assert job.config.target is not None, "there is no draft without a target"
    joined = [np.concatenate(pieces) for pieces in (row, pool, key)]
    del row, pool, key
    owner = draft(joined[0], joined[1], joined[2], len(job.config.seeds), job.config.target)
    taken = np.flatnonzero(owner >= 0)
    records = np.empty(len(taken), DRAFTED)
    records["row"], records["pool"] = np.concatenate(rows)[taken], owner[taken]
    write_shuffle(job.aside("draft", "rows"), records, np.concatenate(part)[taken], len(spans))
