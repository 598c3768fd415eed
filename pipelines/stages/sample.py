"""``sample``: balanced sampling from a hierarchy, from the top down, and flat samples to compare it with."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.balance import level_balance
from curation.draws import NOTHING, Block, draw_capped, draw_rows
from curation.execute import Executor, on_worker
from curation.hierarchy import ClusterConfig
from curation.sampling import SampleConfig, frequency_quotas, leaf_quotas
from curation.selection import write_selection
from curation.shuffle import read_shuffle, write_groups
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, Step, make_aside
from pipelines.stages.cluster import labels_of_level
from pipelines.stages.rank import Origin, Scores, origins_of, source_scores

N_TASKS = 64  # that count clusters: each holds all of them, and reads its parts one after the other
MAX_GROUPS = 1_000_000  # labels that a cap is for; more are names, not labels


class Job(NamedTuple):
    """What tasks read, and where they write."""

    config: SampleConfig
    tree: Artifact
    n_clusters: list[int]  # of each level, the finest first
    scratch: Location
    pool: Artifact | None  # where there is a cap: it tells sources and labels
    origins: tuple[Origin, ...]  # of its sources


def run(config: SampleConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept and count of every row, with the cluster it was drawn from and that cluster's quota.

    Which cluster that is depends on the mode: of level 0, or of ``level``; with ``uniform`` it is 0, the one that has
    all rows. One task goes over all rows, a part at a time; it holds what ``curation.draws`` tells, and leaves a byte a
    row in scratch. Facts say how even the clusters of every level are before and after.
    """
    tree: Artifact = inputs["hierarchy"]
    pool = None if config.cap is None else pool_of(tree)
    origins = () if pool is None else tuple(origins_of(pool))
    job = Job(config, tree, tree.facts["n_clusters"], out.scratch("draws"), pool, origins)
    check_level("sample.level", config, len(job.n_clusters))
    groups = find_groups(job, executor)
    ranges = np.array_split(np.arange(len(tree.parts)), min(N_TASKS, len(tree.parts)))
    sizes = executor.reduce(partial(leaf_sizes, job=job), [some.tolist() for some in ranges], np.add, fan_in=2)
    if not (job.scratch / "rows").exists():
        on_worker(executor, partial(draw, job=job, n_groups=len(groups)), {"sizes": sizes}).get()
    quotas = on_worker(executor, partial(read_numbers, location=job.scratch / "quotas"), {})
    names = [part_name(i) for i in range(len(tree.parts))]
    work = partial(write_part, job=job, out=out.location)
    path = on_worker(executor, partial(drawn_from, job=job), {})
    out.make(work, list(range(len(names))), [[name] for name in names], shared={"quotas": quotas, "path": path})
    tell = partial(balance_facts, job=job)
    levels = on_worker(executor, tell, {"sizes": sizes}).get()
    out.facts |= {"target": config.target, "drawn": levels[0]["after"]["images"], "levels": levels}
    return {"bad": 0, **add_counts(file.counts for file in out.files)}


def check(name: str, config: SampleConfig, inputs: Mapping[str, Step]) -> None:
    """Keys that fit the mode, a level that is there, one cap. Raises UserError before anything runs."""
    if config.level is not None and config.mode not in ("level", "inverse_frequency"):
        raise UserError(
            f"{name}.level must be left out in mode {config.mode!r}: got {config.level}",
            "it belongs to modes level and inverse_frequency",
        )
    if config.pick == "closest" and not (config.mode == "tree" or (config.mode == "level" and not config.level)):
        raise UserError(
            f"{name}.pick must be random in mode {config.mode!r}"
            + (" above level 0" if config.level else "")
            + ": got closest",
            "distances are known to centroids of level 0 alone",
        )
    if config.max_per_source is not None and config.max_per_label is not None:
        raise UserError(
            f"{name} must have at most one of max_per_source and max_per_label: got both",
            "sample twice, or make the sources or the labels even before",
        )
    if config.cap is not None and config.mode == "inverse_frequency":
        raise UserError(
            f"{name} must have no cap in mode 'inverse_frequency': got {config.cap}", "use mode level: it is as even"
        )
    tree = inputs["hierarchy"].config
    if isinstance(tree, ClusterConfig):
        check_level(f"{name}.level", config, len(tree.n_clusters))


def check_level(name: str, config: SampleConfig, n_levels: int) -> None:
    """Raise UserError unless the hierarchy has the level that is sampled."""
    if (config.level or 0) >= n_levels:
        raise UserError(
            f"{name} must be below the number of levels of the hierarchy: got {config.level} of {n_levels}",
            "level 0 is the finest",
        )


def leaf_sizes(parts: Sequence[int], job: Job) -> np.ndarray:
    """Rows of each leaf in some parts, int64 (n_leaves,)."""
    from curation import loops_sampling as loops

    sizes = np.zeros(job.n_clusters[0], np.int64)
    for index in parts:
        loops.add_rows(sizes, read_table(job.tree.part(index), ["label"])["label"].to_numpy())
    return sizes


def upper_labels(job: Job) -> list[np.ndarray]:
    """The labels of all levels but the first."""
    return [labels_of_level(job.tree, t) for t in range(1, len(job.n_clusters))]


def drawn_from(job: Job) -> np.ndarray | None:
    """The cluster that the rows of each leaf are drawn from, int32 (n_leaves,); None: the leaf itself."""
    config, n_leaves = job.config, job.n_clusters[0]
    if config.mode == "uniform":
        return np.zeros(n_leaves, np.int32)
    if not config.level:
        return None
    path = np.arange(n_leaves, dtype=np.int32)
    for t in range(1, config.level + 1):
        path = labels_of_level(job.tree, t)[path]
    return path


def draw(sizes: np.ndarray, job: Job, n_groups: int) -> None:
    """Leave in scratch the quotas of what rows are drawn from, the images of each leaf and, last, the counts of all
    rows, a group a part."""
    config, path = job.config, drawn_from(job)
    n = job.n_clusters[config.level or 0] if config.mode != "uniform" else 1
    total = sizes if path is None else sum_by(path, sizes, n)
    share = partial(shares, upper=upper_labels(job) if config.mode == "tree" else [], config=config)
    how: dict[str, Any] = {"level": draw_level(job), "pick": config.pick, "max_copies": config.max_copies}
    counts: Iterator[np.ndarray]
    if config.cap is None:
        quotas = share(total, None)
        replace = config.mode == "inverse_frequency"
        counts = draw_rows(partial(blocks, job, path), total, quotas, config.seed, replace=replace, **how)
    else:
        capped = draw_capped(partial(blocks, job, path), n, n_groups, config.cap, share, config.seed, **how)
        quotas, counts = capped.quotas, iter(capped.counts)
    (job.scratch / "quotas").write(quotas.astype("<i8").tobytes())
    drawn = np.zeros(len(sizes), np.int64)
    if path is None:
        drawn = quotas
    write_groups(job.scratch / "counts", counts if path is None else added(counts, drawn, job), len(job.tree.parts))
    (job.scratch / "leaves").write(drawn.astype("<i8").tobytes())
    (job.scratch / "rows").write(str(int(sizes.sum())).encode())


def added(counts: Iterator[np.ndarray], drawn: np.ndarray, job: Job) -> Iterator[np.ndarray]:
    """The counts of every part, each added to the images of its leaves on the way."""
    from curation import loops_sampling as loops

    for index, count in enumerate(counts):
        loops.add_counts(drawn, read_table(job.tree.part(index), ["label"])["label"].to_numpy(), count)
        yield count


def draw_level(job: Job) -> int:
    """The level of the clusters that rows are drawn from; the root is above all."""
    return len(job.n_clusters) if job.config.mode == "uniform" else job.config.level or 0


def sum_by(path: np.ndarray, sizes: np.ndarray, n: int) -> np.ndarray:
    """int64 (n,): sizes added by what they belong to."""
    from curation import loops_sampling as loops

    total = np.zeros(n, np.int64)
    loops.add_counts(total, path, sizes)
    return total


def shares(sizes: np.ndarray, held: np.ndarray | None, upper: Sequence[np.ndarray], config: SampleConfig) -> np.ndarray:
    """The quotas of the clusters that rows are drawn from, int64 (k,)."""
    if config.mode == "inverse_frequency":
        return frequency_quotas(sizes, config.target, config.seed, config.max_copies)
    return leaf_quotas(sizes, upper, config.target, config.seed, config.max_copies, held)


def blocks(job: Job, path: np.ndarray | None) -> Iterator[Block]:
    """What rows are drawn from, part by part."""
    columns = ["label", *(["sq_distance"] if job.config.pick == "closest" else [])]
    for index in range(len(job.tree.parts)):
        table = read_table(job.tree.part(index), columns)
        labels = table["label"].to_numpy()
        groups = NOTHING if job.pool is None else read_numbers(job.scratch / group_name(index), "<i4")
        distance = table["sq_distance"].to_numpy() if job.config.pick == "closest" else NOTHING
        yield Block(labels if path is None else path[labels], distance, groups)


def find_groups(job: Job, executor: Executor) -> Mapping[str, int]:
    """What is capped, with its number; leaves the number of every row in scratch, a file a part."""
    if job.pool is None:
        return {}
    parts = range(len(job.tree.parts))
    found: set[str] = executor.reduce(partial(names_of_part, job=job), list(parts), operator.or_).get()
    if len(found) > MAX_GROUPS:
        raise UserError(
            f"sample.max_per_label must be for at most {MAX_GROUPS} labels: got {len(found)}",
            "labels that say what every image is are no classes: leave the cap out",
        )
    groups = {name: i for i, name in enumerate(sorted(found))}
    work = partial(number_part, job=job)
    make_aside(work, list(parts), [group_name(i) for i in parts], job.scratch, executor, shared={"groups": groups})
    return groups


def group_name(index: int) -> str:
    """The file with the numbers of a part."""
    return f"groups-{index:07d}"


def group_names(index: int, job: Job) -> pa.Array:
    """string (n,): the source or the label of every covered row of a part; null where it has none."""
    assert job.pool is not None, "a sample without a cap asks for no groups"
    rows = read_table(job.tree.part(index), ["row"])["row"].to_numpy()
    if job.config.max_per_label is not None:
        labels: pa.Array = read_table(job.pool.part(index), ["label"])["label"].combine_chunks().take(pa.array(rows))
        return labels
    sources = Scores("source_priority", job.pool, job.tree, origins=job.origins)
    return pc.cast(pa.array(-source_scores(index, sources, rows)), pa.string())


def names_of_part(index: int, job: Job) -> set[str]:
    """The sources or labels of a part."""
    return set(group_names(index, job).unique().drop_null().to_pylist())


def number_part(index: int, job: Job, groups: Mapping[str, int]) -> None:
    """Write the number of every row's group, int32 (n,), -1 where it has none."""
    at = pc.index_in(group_names(index, job), value_set=pa.array(list(groups), pa.string()), skip_nulls=True)
    (job.scratch / group_name(index)).write(pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype("<i4").tobytes())


def read_numbers(location: Location, dtype: str = "<i8") -> np.ndarray:
    """A file of numbers."""
    return np.frombuffer(location.read(), dtype)


def balance_facts(sizes: np.ndarray, job: Job) -> list[dict[str, Any]]:
    """How even every level is before and after."""
    return level_balance(sizes, read_numbers(job.scratch / "leaves"), upper_labels(job))


def write_part(index: int, job: Job, out: Location, quotas: np.ndarray, path: np.ndarray | None) -> FileInfo:
    """The decision on every row of a part."""
    table = read_table(job.tree.part(index), ["row", "label"])
    labels = table["label"].to_numpy()
    clusters = labels if path is None else path[labels]
    count = read_shuffle(job.scratch / "counts", np.min_scalar_type(job.config.max_copies), index)
    return write_selection(
        out / part_name(index),
        table["row"].to_numpy(),
        count > 0,
        {"drawn": int(count.sum())},
        count=pa.array(count.astype(np.int32)),
        cluster=pa.array(clusters),
        quota=pa.array(quotas[clusters]),
    )


STAGE = Stage(
    version=3,
    config=SampleConfig,
    run=run,
    reads={"hierarchy": ("cluster",)},
    through=("hierarchy.embeddings", "hierarchy.embeddings.pool"),
    check=check,
)
