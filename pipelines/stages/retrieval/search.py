"""Mode ``sample`` of ``retrieve``: the nearest rows of every seed image, brought to the parts they are in."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from curation.embeddings import EmbeddingsPart, covered_rows
from curation.execute import Executor, Ref, on_worker
from curation.neighbors import Neighbors, merge_block, merge_candidates
from curation.retrieve import HIT, RetrieveConfig, hit_records, merge_hits, row_claims, share_pairs
from curation.shuffle import read_shuffle, write_shuffle
from pipelines.stage import SCRATCH, make_aside
from pipelines.stages.neighbors import based_parts
from pipelines.stages.retrieval.job import Job, Plan, SeedPart, Span, looked_at, part_names, read_claims

SEARCH_GROUPS = 16  # tasks that search the pool for one part of a seed pool, each some of the pool's parts
NEAR = np.dtype([("row_id", "<i8"), ("similarity", "<f4")])


class Tile(NamedTuple):
    """One part of a seed pool and some parts of the pool."""

    seeds: SeedPart
    group: int


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
    make_aside(partial(gather_hits, job=job), spans, part_names(spans), job.out / SCRATCH / "found", executor)
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


def plan_sample(sizes: np.ndarray, config: RetrieveConfig) -> Plan:
    """One pair a seed pool: all it asked for."""
    pools = np.arange(len(sizes))
    return Plan(share_pairs(pools, pools, sizes, len(sizes), config), None, np.zeros_like(sizes), sizes, 0)
