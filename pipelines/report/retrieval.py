"""What the page says of images that came in by retrieval, and of selections that were put together."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from curation.artifact import Artifact, pool_of, read_table
from pipelines.report.run import Run, best_of
from pipelines.report.thumbnails import make_thumbs


class Retrieved(NamedTuple):
    """A row that was retrieved, and the seed image it is near to."""

    luck: float  # drawn
    row_id: int
    seed_pool: int  # which of the step's seeds
    near: int  # row of the seed pool
    similarity: float | None  # cosine; None in mode cluster, where nearness is that of the cluster


def retrievals(run: Run) -> list[dict[str, Any]]:
    """Every retrieve step: what each seed pool asked for and got, and pairs drawn at random."""
    found = []
    for name, step in run.of("retrieve").items():
        config, pool = step.manifest["config"], run.pool(step)
        seeds = [run.pool(step.input(f"seeds.{seed}")) for seed in config["seeds"]]
        shown = draw(run, step)
        mine = make_thumbs(pool, [pair.row_id for pair in shown], run.executor)
        theirs = [
            make_thumbs(seed, [pair.near for pair in shown if pair.seed_pool == i], run.executor)
            for i, seed in enumerate(seeds)
        ]
        found.append({
            "name": name, "mode": config["mode"], "counts": step.counts, "config": config,
            "rows": [{"name": seed, **facts} for seed, facts in step.facts["seed_pools"].items()],
            "groups": [("Drawn at random", [
                {"left": theirs[p.seed_pool][p.near], "right": mine[p.row_id], "similarity": p.similarity,
                 "edge": p.similarity} for p in shown
            ])] if shown else [],
        })  # fmt: skip
    return found


def draw(run: Run, step: Artifact) -> list[Retrieved]:
    """Some of the retrieved rows that stayed, at random."""
    n = run.config.n_pairs
    shown: list[Retrieved] = []
    for some in run.executor.map(partial(draw_from_part, step=step, n=n, seed=run.config.seed), range(len(step.parts))):
        shown = best_of(shown + some, n, lambda pair: (pair.luck, pair.row_id))
    return shown


def draw_from_part(index: int, step: Artifact, n: int, seed: int) -> list[Retrieved]:
    """Some of the retrieved rows of a part."""
    start = int(pool_of(step).starts[index])
    table = read_table(step.part(index))
    table = table.filter(pc.and_(table["kept"], table["near_row"].is_valid()))
    luck = np.random.default_rng([seed, index]).random(table.num_rows)
    first = np.argsort(luck, kind="stable")[:n]
    return [
        Retrieved(float(luck[i]), start + row["row"], row["seed"], row["near_row"], row.get("similarity"))
        for i, row in zip(first.tolist(), table.take(first).to_pylist(), strict=True)
    ]


def mixes(run: Run) -> list[dict[str, Any]]:
    """Every mix step: its components, and how they share the batches."""
    found = []
    for name, step in run.of("mix").items():
        spec = step.facts.get("mix", {})
        alone, mixed = spec.get("homogeneous", {}), spec.get("heterogeneous", {})
        rest = 1 - sum(alone.values())
        rows = [
            {"name": component, **facts, "alone": alone.get(component), "mixed": mixed.get(component),
             "share": alone.get(component, 0) + rest * mixed.get(component, 0) if spec else None}
            for component, facts in step.facts["components"].items()
        ]  # fmt: skip
        found.append({"name": name, "counts": step.counts, "ratios": bool(spec), "rows": rows})
    return found
