"""``retrieve``: the images of a pool that lie near trusted seed images. What is exact is in ``curation.retrieve``.

Both modes find the rows that every seed pool asks for, cut them to their quotas, share a target, and write. What the
passes hand to one another lies in scratch files, so an interrupted step goes on where it was:

    near/<seed part>-<group>   sample: the nearest rows of every seed image among some parts of the pool
    hits/<seed part>           sample: what they hit, shuffled to the parts of the pool; cluster: as one list
    found/<part>               sample: rows of a part that seed pools ask for
    members/<part>             rows of groups that are cut, shuffled to the task that finds the cut
    claims/<part>              rows of a part that seed pools retrieve
    draft                      with a target: the rows that stay, shuffled to the parts
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.embeddings import EmbeddingsPart, covered_rows, read_embeddings
from curation.execute import Executor, Ref, on_worker
from curation.kmeans import assign_part
from curation.neighbors import Neighbors, merge_block, merge_candidates
from curation.retrieve import (
    CLAIM,
    CUT,
    DRAFTED,
    HIT,
    MEMBER,
    Cuts,
    Pairs,
    Planned,
    RetrieveConfig,
    bucket_groups,
    cluster_claims,
    draft,
    find_cuts,
    first_of_runs,
    hit_records,
    judge,
    merge_hits,
    order_keys,
    plan_seed_pool,
    row_claims,
    share_pairs,
)
from curation.selection import read_selection, rows_among, write_selection
from curation.shuffle import read_shuffle, write_shuffle
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SCRATCH, SELECTIONS, Inputs, Output, Stage, listed, part_span
from pipelines.stages.cluster import labels_of_level
from pipelines.stages.neighbors import based_parts

SEARCH_GROUPS = 16  # tasks that search the pool for one part of a seed pool, each some of the pool's parts
BUCKET_ROWS = 1 << 22  # rows whose cuts one task finds, unless one group has more: 64 bytes each
NEAR = np.dtype([("row_id", "<i8"), ("similarity", "<f4")])

Span = tuple[int, int, int]  # part, position of its first row in the pool, rows
Item = TypeVar("Item")


class SeedPart(NamedTuple):
    """A part of a seed pool."""

    name: str  # of its scratch files
    pool: int  # index of the seed pool
    start: int  # position of its first row in its pool
    vectors: EmbeddingsPart


class Tile(NamedTuple):
    """One part of a seed pool and some parts of the pool."""

    seeds: SeedPart
    group: int


@dataclass(frozen=True)
class Job:
    """What every task needs to know."""

    config: RetrieveConfig
    source: Artifact  # has the rows that may be retrieved: embeddings, or a hierarchy
    embeddings: Artifact
    before: Artifact | None  # the selection
    seeds: tuple[SeedPart, ...]
    out: Location

    def aside(self, folder: str, name: str) -> Location:
        """A scratch file."""
        return self.out / SCRATCH / folder / name


class Plan(NamedTuple):
    """What is drawn from where."""

    pairs: Pairs
    seen: np.ndarray | None  # HIT of every pair; None in mode sample
    clusters: np.ndarray  # int64 (n_pools,), that qualify
    n_rows: np.ndarray  # int64 (n_pools,), rows in them
    most: int  # seed images of one pool in one cluster


def check(name: str, config: RetrieveConfig, inputs: Mapping[str, str]) -> None:
    """Keys that belong to the mode, and to no other. Raises UserError before anything runs."""
    own = {"sample": ("embeddings", "n_neighbors"), "cluster": ("hierarchy", "min_hits", "per_cluster", "level")}
    [other] = own.keys() - {config.mode}
    for key in own[other]:
        value = inputs.get(key, getattr(config, key, None))
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


def run(config: RetrieveConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write for every row looked at: kept, the nearest seed image that asked for it, and which seed pools did.

    Columns: row, kept; near_row (int64, position of that seed image in the pool of its seed pool) and seed (int32,
    index of that seed pool), both null where not retrieved; seed_pools (int64, bit i: seed pool i retrieved it); hits
    (int64, seed images of these that asked for it, or lie in its cluster). Mode ``sample`` adds similarity (float32,
    to the seed image, null where not retrieved). Mode ``cluster`` adds cluster (int32) and sq_distance (float32, to
    its centroid) of every row; near_row is the seed image nearest to the centroid, and a row that several seed pools
    retrieved is of the one whose image is nearest.

    With a ``selection`` its rows alone are looked at; those that were not decoded are bad. Facts say of every seed
    pool what it asked for and what became of it: an image counts for every seed pool that retrieved it. The driver
    holds O(parts); what each task holds is told by its kernel.
    """
    source: Artifact = inputs["embeddings"] if config.mode == "sample" else inputs["hierarchy"]
    embeddings = source if config.mode == "sample" else source.input("embeddings")
    pools = listed(inputs, "seeds", config.seeds)
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


def seed_parts(pools: Sequence[Artifact]) -> tuple[SeedPart, ...]:
    """The parts of all seed pools that have images."""
    return tuple(
        SeedPart(f"{j:02d}-{i:07d}", j, start, part)
        for j, seeds in enumerate(pools)
        for i, (start, part) in enumerate(based_parts(seeds))
        if part.n_rows
    )


def make_aside(
    work: Callable[..., None],
    items: Sequence[Item],
    names: Sequence[str],
    folder: Location,
    executor: Executor,
    shared: Mapping[str, Any] | None = None,
) -> None:
    """Have every item's scratch file made, unless an interrupted run left it whole."""
    there = {entry.name for entry in folder.list()} if folder.is_folder() else set()
    for _ in executor.map(work, [item for item, name in zip(items, names, strict=True) if name not in there], shared):
        pass


def by_part(spans: Sequence[Span]) -> list[str]:
    """The names of the scratch files of parts."""
    return [str(index) for index, _, _ in spans]


def looked_at(index: int, covered: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows of a part that may be retrieved, where they stand among the covered ones, and how many are bad."""
    if job.before is None:
        return covered, np.arange(len(covered)), 0
    chosen = read_selection(job.before.part(index)).rows
    undecoded = np.isin(chosen, covered_rows(job.embeddings.part(index, "rejected")))
    chosen = chosen[~undecoded]
    return chosen, rows_among(chosen, covered, "embeddings"), int(undecoded.sum())


# Mode sample


def search(job: Job, spans: Sequence[Span], executor: Executor) -> tuple[Ref[Plan], dict[str, Any]]:
    """Find the nearest rows of every seed image, and bring them to the parts they are in."""
    parts = [(index, start, part) for index, (start, part) in enumerate(based_parts(job.embeddings))]
    step = -(-len(parts) // SEARCH_GROUPS)
    groups = [parts[i : i + step] for i in range(0, len(parts), step)]
    tiles = [Tile(seeds, group) for seeds in job.seeds for group in range(len(groups))]
    near = job.out / SCRATCH / "near"
    make_aside(partial(search_tile, job=job), tiles, [tile_name(t) for t in tiles], near, executor, {"groups": groups})
    starts = np.array([start for _, start, _ in spans], np.int64)
    route = partial(route_hits, job=job, n_groups=len(groups))
    names = [seeds.name for seeds in job.seeds]
    make_aside(route, job.seeds, names, job.out / SCRATCH / "hits", executor, {"starts": starts})
    make_aside(partial(gather_hits, job=job), spans, by_part(spans), job.out / SCRATCH / "found", executor)
    n_pools = len(job.config.seeds)
    sizes = executor.reduce(partial(found_sizes, job=job, n_pools=n_pools), spans, np.add)
    return on_worker(executor, partial(plan_sample, config=job.config), {"sizes": sizes}), {}


def tile_name(tile: Tile) -> str:
    """``00-0000003-07`` for seed pool 0, part 3, group 7."""
    return f"{tile.seeds.name}-{tile.group:02d}"


def search_tile(tile: Tile, job: Job, groups: Sequence[Sequence[tuple[int, int, EmbeddingsPart]]]) -> None:
    """The nearest rows among some parts, one in memory at a time: NEAR (n * k,), padded as ``Neighbors``."""
    queries = tile.seeds.vectors.read()[1]
    best = Neighbors.none_yet(len(queries), job.config.k)
    for index, start, part in groups[tile.group]:
        rows, x = part.read()
        if job.before is not None:
            rows, at, _ = looked_at(index, rows, job)
            x = x[at]
        best = merge_block(queries, x, rows + np.int64(start), best)
    near = np.empty(best.row_ids.size, NEAR)
    near["row_id"], near["similarity"] = best.row_ids.ravel(), best.similarity.ravel()
    job.aside("near", tile_name(tile)).write(near.tobytes())


def route_hits(seeds: SeedPart, job: Job, n_groups: int, starts: np.ndarray) -> None:
    """The nearest rows of a part of a seed pool, a HIT for each row, shuffled to the parts of the pool."""
    rows, k = covered_rows(seeds.vectors.location), job.config.k
    best, nobody = Neighbors.none_yet(len(rows), k), np.full(len(rows), -1, np.int64)
    for group in range(n_groups):
        near = np.frombuffer(job.aside("near", tile_name(Tile(seeds, group))).read(), NEAR).reshape(-1, k)
        best = merge_candidates(best, near["row_id"], near["similarity"], nobody)
    there = best.row_ids >= 0
    asked_by = np.repeat(rows + np.int64(seeds.start), there.sum(axis=1))
    hits = hit_records(seeds.pool, best.row_ids[there], asked_by, -best.similarity[there])
    destination = np.searchsorted(starts, hits["target"], side="right") - 1  # the last of empty parts is not empty
    write_shuffle(job.aside("hits", seeds.name), hits, destination, len(starts))


def gather_hits(span: Span, job: Job) -> None:
    """CLAIM (n,): the rows of a part that seed pools ask for, read one seed part after the other."""
    index, start, _ = span
    pools = [np.zeros(0, HIT) for _ in job.config.seeds]
    for seeds in job.seeds:
        more = read_shuffle(job.aside("hits", seeds.name), HIT, index)
        pools[seeds.pool] = merge_hits(pools[seeds.pool], more)
    job.aside("found", str(index)).write(row_claims(np.concatenate(pools), start).tobytes())


def found_sizes(span: Span, job: Job, n_pools: int) -> np.ndarray:
    """Rows of a part that each seed pool asks for, int64 (n_pools,)."""
    sizes: np.ndarray = np.bincount(read_claims("found", span[0], job)["pool"], minlength=n_pools)
    return sizes


def read_claims(folder: str, index: int, job: Job) -> np.ndarray:
    """The CLAIMs of a part in a scratch file."""
    return np.frombuffer(job.aside(folder, str(index)).read(), CLAIM)


def plan_sample(sizes: np.ndarray, config: RetrieveConfig) -> Plan:
    """One pair a seed pool: all it asked for."""
    pools = np.arange(len(sizes))
    return Plan(share_pairs(pools, pools, sizes, len(sizes), config), None, np.zeros_like(sizes), sizes, 0)


# Mode cluster


def assign(job: Job, spans: Sequence[Span], executor: Executor) -> tuple[Ref[Plan], dict[str, Any]]:
    """Find the clusters that seed images lie in, and what each gives to whom."""
    tree, level = job.source, job.config.cluster_level
    n_clusters: list[int] = tree.facts["n_clusters"]
    if level >= len(n_clusters):
        raise UserError(
            f"retrieve.level must be below the number of levels, {len(n_clusters)}: got {level}", "0 is the finest"
        )
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


# Both modes: quotas, the target, the result


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
        make_aside(partial(send_members, job=job), spans, by_part(spans), members, executor, shared)
        work = partial(cut_bucket, job=job, n_parts=len(spans))
        found = executor.reduce(work, range(n_buckets), join_cuts, shared={"plan": plan})
    cuts = on_worker(executor, all_cuts, {"plan": plan, "found": found})
    claims = job.out / SCRATCH / "claims"
    make_aside(partial(keep_claims, job=job), spans, by_part(spans), claims, executor, {**shared, "cuts": cuts})


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
