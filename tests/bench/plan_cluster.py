"""What hierarchical k-means takes at a size nobody measures on a laptop, from what two benchmarks measured.

    python tests/bench/bench_kmeans.py --cases k4000 coarse --seeding --json kmeans.json
    python tests/bench/bench_sampling.py --json sampling.json
    python tests/bench/plan_cluster.py kmeans.json sampling.json [--gpu assign.json] [--rows 17e9] [--width 1024]

Levels and resampling are those of the recipe ``lvd1689m``. The first level is made in two steps: k-means into
--first-clusters, which goes over all rows in every step; rows are sent once to their first cluster; every first cluster
is split by a k-means of its rows in memory, all of them in parallel. A level above clusters the centroids below,
float32, and a resampling is one more k-means, of some of them: as it is today, each of its steps reads all.

Columns: ``core h`` is work that all cores share; ``alone h`` is work of one core while the others wait, one run after
the other; ``GPU h`` is what a GPU takes for the same assignments, in which every row meets every centroid; ``largest``
the memory of the largest process of the step; ``wall`` the hours with --cores cores, or with --gpus GPUs, which leave
seeding, shuffle and sampling to cores, and need no groups. Reading and writing are not in the hours.

What is reckoned, and printed with the plan: products of rows and centroids at the measured rates, their number a row
and step growing with k, or from COARSE_FROM clusters on with its square root; --n-iter steps of every run, an upper
bound, as the tolerance ends most runs earlier; first clusters of equal sizes but for the largest, which has --skew
times the average, an assumption. Without --gpu the rate of a GPU is --gpu-tflops, an assumption too.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from bench_kmeans import COARSE_CLUSTERS, SHAPES, WIDTH

from curation.coarse import COARSE_FROM, GROUP_SAMPLE, GROUP_SIZE, GROUP_STEPS, N_QUERIES
from curation.kmeans import Lloyd, seed_sample
from curation.seeding import CELLS_FROM, COARSE_ROWS, MIN_CELLS, PER_CELL
from pipelines.recipe import SHIPPED

TREE = yaml.safe_load((SHIPPED / "lvd1689m.yaml").read_text())["steps"]["tree"]
STORED, FLOAT = 2, 4  # bytes of a value: of a row in an artifact, and of a centroid or of a row in a kernel
SUM = 8  # of a value of the sums
SENT = 16  # bytes beside each row that is sent to its first cluster
LABELLED = 12  # bytes a row that is labelled: row, label, squared distance
BOUNDS = 8  # bytes a row, read and written in every step in which no groups are used
GATHERED = 16  # bytes a row of the worker that chooses the closest rows
HELD_EXACT, HELD_COARSE = 2 * FLOAT + SUM, 3 * FLOAT + SUM  # bytes a value of the centroids: of a worker ...
HELD_BY_DRIVER = 3 * FLOAT + 2 * SUM  # ... and of the driver: three states, sums and their quotients
SEEDING_BYTES = 12  # a value of the sample: see ``seed_centroids``
LABELS_READ, SAMPLE_WRITTEN = 16, 22  # bytes a row that ``sample`` reads, and writes at most
GPU_HELD = STORED + FLOAT + SUM  # bytes a value of the centroids


class Rates(NamedTuple):
    """What a core and a GPU do."""

    pruned: float  # products/s of a core in steps that know bounds
    plain: float  # products/s of a core where all centroids are compared
    coarse: float  # core-seconds for a row and a value of it, at ``coarse_k`` clusters
    coarse_k: float
    seeding: float  # products/s of a core
    sampled: float  # rows/s of a core
    sample_bytes: float  # a row
    flops: float  # of a GPU


class Size(NamedTuple):
    """The problem."""

    rows: float
    width: int
    n_clusters: Sequence[float]  # finest first
    resample_size: Sequence[int]
    n_resamples: Sequence[int]  # one a level; that of the finest is not used
    first: float  # clusters of the first step of level 0
    n_iter: int
    skew: float
    part_rows: int


class Work(NamedTuple):
    """A step of the plan."""

    level: int
    step: str
    rows: float = 0  # in a run
    clusters: float = 0
    runs: int = 1
    read: float = 0  # bytes
    written: float = 0
    cores: float = 0  # core-seconds that are shared
    alone: float = 0  # core-seconds of one core
    flops: float = 0  # of a GPU instead of ``cores``
    without_gpu: bool = False  # the step is not there when GPUs assign
    held: float = 0  # bytes of the largest process

    def times(self, runs: int) -> "Work":
        """The same step in so many runs."""
        more = {name: runs * getattr(self, name) for name in ("read", "written", "cores", "alone", "flops")}
        return self._replace(runs=runs, **more)

    def wall(self, cores: float) -> float:
        """Seconds on so many cores."""
        return self.cores / cores + self.alone

    def wall_gpu(self, cores: float, gpus: float, rate: float) -> float:
        """Seconds where GPUs assign."""
        if self.without_gpu:
            return 0.0
        return self.flops / rate / gpus + self.alone if self.flops else self.wall(cores)


def seeding_products(n: float, k: float) -> float:
    """Of ``seed_rows`` among n rows, a value of a row."""
    log = 2 + math.log(k)
    if k < CELLS_FROM:
        return n * k * log
    cells = max(MIN_CELLS, k // PER_CELL)
    return n * k + 2 * PER_CELL * log * n + min(n, COARSE_ROWS * cells) * cells * (2 + math.log(cells))


def grouping_products(k: float) -> float:
    """Of ``group_centroids``, a value of a centroid."""
    groups = min(k, math.sqrt(k) / GROUP_SIZE)
    return (GROUP_STEPS * min(k, GROUP_SAMPLE * groups) + k) * groups + N_QUERIES * k


def measured(kmeans: Sequence[Mapping[str, Any]], sampling: Sequence[Mapping[str, Any]], width: int) -> Rates:
    """Rates from what the benchmarks wrote; that of a GPU is 0."""
    found = {row["case"]: row for row in [*kmeans, *sampling]}
    steps = max((row for row in kmeans if row["case"] in SHAPES), key=lambda row: row["clusters"], default=None)
    seeding = next((row for row in kmeans if row["case"].startswith("seeding")), None)
    if steps is None or seeding is None or not {"coarse", "stage"} <= set(found):
        raise SystemExit("a plan needs the cases k4000 or k16000, seeding, coarse and stage: see --help")
    coarse, stage = found["coarse"], found["stage"]
    few = min(COARSE_CLUSTERS[0], coarse["rows"] // 4)
    return Rates(
        pruned=steps["rows"] * steps["clusters"] * width / (steps["threads"] * steps["ours"]),
        plain=coarse["rows"] * few * width / (coarse["threads"] * coarse["peer"]),
        coarse=coarse["threads"] * coarse["ours"] / coarse["rows"] / width,  # with the groups, a few hundredths of it
        coarse_k=coarse["clusters"],
        seeding=seeding_products(seeding["rows"], seeding["clusters"]) * width / seeding["ours"],
        sampled=stage["ours"],
        sample_bytes=stage["bytes_a_row"],
        flops=0.0,
    )


def gpu_flops(rows: Sequence[Mapping[str, Any]]) -> float:
    """The rate of the assignment of rows on a GPU, the best that was measured."""
    rates = [
        float(row["ours"]) for row in rows if row["case"] == "assign" and row.get("unit", "").startswith("TFLOP/s")
    ]
    if not rates:
        raise SystemExit("--gpu must hold a case assign in TFLOP/s: got " + ", ".join(row["case"] for row in rows))
    return max(rates) * 1e12


def assigning(n: float, k: float, d: int, rates: Rates, *, pruned: bool) -> float:
    """Core-seconds of one assignment of n rows."""
    if k >= COARSE_FROM:
        return n * d * rates.coarse * math.sqrt(k / rates.coarse_k)
    return n * k * d / (rates.pruned if pruned else rates.plain)


def one_run(level: int, n_all: float, n: float, k: float, row_bytes: float, size: Size, rates: Rates) -> Iterator[Work]:
    """k-means of n of n_all rows over all workers. Also where these are fewer all are read."""
    d, steps, coarse = size.width, size.n_iter, k >= COARSE_FROM
    sample = min(n, seed_sample(math.ceil(k), d))
    yield Work(
        level, "seeds", sample, k, read=n_all * row_bytes, alone=seeding_products(sample, k) * d / rates.seeding,
        held=sample * d * SEEDING_BYTES,
    )  # fmt: skip
    if coarse:
        alone = steps * grouping_products(k) * d / rates.plain
        yield Work(level, "groups", k, k, alone=alone, without_gpu=True, held=2 * FLOAT * k * d)
    bounds = 0 if coarse else BOUNDS * n
    yield Work(
        level, "steps", n, k, read=steps * (n_all * row_bytes + bounds), written=steps * (2 * FLOAT * k * d + bounds),
        cores=steps * assigning(n, k, d, rates, pruned=True), flops=2.0 * steps * n * k * d,
        held=max(HELD_COARSE if coarse else HELD_EXACT, HELD_BY_DRIVER) * k * d,
    )  # fmt: skip


def labelling(level: int, step: str, n: float, k: float, row_bytes: float, size: Size, rates: Rates) -> Work:
    """One assignment of all rows."""
    d = size.width
    held = (HELD_COARSE if k >= COARSE_FROM else HELD_EXACT) * k * d
    cores = assigning(n, k, d, rates, pruned=False)
    return Work(level, step, n, k, read=n * row_bytes, cores=cores, flops=2.0 * n * k * d, held=held)


def two_steps(size: Size, rates: Rates) -> Iterator[Work]:
    """Level 0."""
    n, d, first = size.rows, size.width, size.first
    per = size.n_clusters[0] / first
    for work in one_run(0, n, n, first, STORED * d, size, rates):
        yield work._replace(step=f"first {work.step}")
    sent = n * (STORED * d + SENT)
    yield labelling(0, "send", n, first, STORED * d, size, rates)._replace(written=sent)
    sample = min(n / first, seed_sample(math.ceil(per), d))
    largest = size.skew * n / first
    held = (
        largest * ((STORED + FLOAT) * d + 2 * SENT)
        + 3 * FLOAT * d * min(largest, seed_sample(math.ceil(per), d))
        + 32 * per * d
    )
    yield Work(0, "split seeds", sample * first, per, cores=first * seeding_products(sample, per) * d / rates.seeding)
    yield Work(
        0, "split steps", n, per, read=sent, written=n * LABELLED + FLOAT * size.n_clusters[0] * d,
        cores=size.n_iter * assigning(n, per, d, rates, pruned=True), flops=2.0 * size.n_iter * n * per * d, held=held,
    )  # fmt: skip


def above(level: int, size: Size, rates: Rates) -> Iterator[Work]:
    """A level over the centroids of the one below."""
    d, n, k = size.width, size.n_clusters[level - 1], size.n_clusters[level]
    yield from one_run(level, n, n, k, FLOAT * d, size, rates)
    chosen, runs = size.resample_size[level], size.n_resamples[level]
    if chosen > 1 and runs:
        choose = labelling(level, "choose", n, k, FLOAT * d, size, rates)
        held = max(choose.held, n * GATHERED + k * chosen * LABELLED)
        yield choose._replace(held=held).times(runs)
        for work in one_run(level, n, min(n, chosen * k), k, FLOAT * d, size, rates):
            yield work._replace(step=f"resampled {work.step}").times(runs)
    label = labelling(level, "label", n, k, FLOAT * d, size, rates)
    yield label._replace(written=n * LABELLED + FLOAT * k * d)


def plan(size: Size, rates: Rates) -> list[Work]:
    """All steps, in order."""
    works = list(two_steps(size, rates))
    for level in range(1, len(size.n_clusters)):
        works += above(level, size, rates)
    n = size.rows
    sample = Work(
        len(size.n_clusters), "sample", n, size.n_clusters[0], read=LABELS_READ * n, written=SAMPLE_WRITTEN * n,
        alone=n / rates.sampled, held=rates.sample_bytes * n,
    )  # fmt: skip
    return [*works, sample]


def line(work: Work, rates: Rates, cores: float, gpus: float) -> dict[str, Any]:
    """A row of the table."""
    return {
        "level": work.level, "step": work.step, "runs": work.runs, "rows": work.rows, "clusters": work.clusters,
        "TB read": work.read / 1e12, "TB written": work.written / 1e12, "core h": work.cores / 3600,
        "alone h": work.alone / 3600, "GPU h": work.flops / rates.flops / 3600, "largest GB": work.held / 1e9,
        "wall h": work.wall(cores) / 3600, "GPU wall h": work.wall_gpu(cores, gpus, rates.flops) / 3600,
    }  # fmt: skip


def in_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for people."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if value == 0 else f"{value:.0f}" if 100 <= value < 1e5 else f"{value:.3g}"
    return str(value)


def total_of(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of some rows, and the largest memory."""
    sums = ("TB read", "TB written", "core h", "alone h", "GPU h", "wall h", "GPU wall h")
    empty = {"level": rows[0]["level"] if name == "level" else "", "step": name, "runs": "", "rows": "", "clusters": ""}
    more = {key: sum(row[key] for row in rows) for key in sums} | {"largest GB": max(row["largest GB"] for row in rows)}
    return empty | {key: more[key] for key in rows[0] if key in more}


def with_totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Behind every level its sums, and at the end those of all."""
    found = []
    for level in dict.fromkeys(row["level"] for row in rows):
        own = [row for row in rows if row["level"] == level]
        found += own + ([total_of("level", own)] if len(own) > 1 else [])
    return [*found, total_of("all", rows)]


def notes(size: Size, rates: Rates, rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """What was assumed, and what stands out."""
    largest = max(rows, key=lambda row: row["largest GB"])
    slowest, slowest_gpu = (max(rows, key=lambda row: row[wall]) for wall in ("wall h", "GPU wall h"))
    all_of = total_of("all", rows)
    parts, d = size.rows / size.part_rows, size.width
    most = max(rows, key=lambda row: row["TB read"])
    wide = max(size.n_clusters[1:])
    source = f"measured: {args.gpu.name}" if args.gpu else "assumed, not measured"
    return [
        f"slowest step on {args.cores:g} cores: level {slowest['level']}, {slowest['step']}, {slowest['wall h']:.3g} "
        f"h; with {args.gpus:g} GPUs: level {slowest_gpu['level']}, {slowest_gpu['step']}, "
        f"{slowest_gpu['GPU wall h']:.3g} h",
        f"largest process: level {largest['level']}, {largest['step']}, {largest['largest GB']:.4g} GB",
        f"in all {all_of['core h']:.4g} core-hours and {all_of['alone h']:.4g} hours of a core alone; or "
        f"{all_of['GPU h']:.4g} GPU-hours",
        f"most is read by level {most['level']}, {most['step']}: at {most['TB read'] / most['wall h'] / 3.6:.3g} GB/s "
        f"it keeps up with the cores, at {most['TB read'] / most['GPU wall h'] / 3.6:.3g} GB/s with the GPUs",
        f"the sums of a part are {SUM * size.first * d / 1e9:.3g} GB in a first step: if each of {parts:.3g} parts of "
        f"{size.part_rows} rows hands on its own, {parts * SUM * size.first * d / 1e12:.4g} TB a step, beside "
        f"{size.rows * STORED * d / 1e12:.4g} TB of rows; a worker that adds up its parts hands on one",
        f"a GPU that has all centroids of a level above holds {GPU_HELD * wide * d / 1e9:.3g} GB at {wide:.3g}",
        "",
        f"core: {rates.plain:.3g} products/s, {rates.pruned:.3g} with bounds, {rates.seeding:.3g} in seeding, and "
        f"{1 / rates.coarse:.3g} values/s of rows through groups of {rates.coarse_k:g} centroids: measured",
        f"GPU: {rates.flops / 1e12:.4g} TFLOP/s, {source}",
        f"{size.n_iter} steps of every run are an upper bound: tol {Lloyd().tol:g} ends most runs earlier",
        f"the largest first cluster has {size.skew:g} times the average: assumed",
        *([] if rates.coarse_k >= COARSE_FROM else [
            f"groups were not measured: the case coarse had {rates.coarse_k:g} clusters, fewer than {COARSE_FROM}"
        ]),
    ]  # fmt: skip


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kmeans", type=Path, help="what bench_kmeans.py wrote with --json")
    parser.add_argument("sampling", type=Path, help="what bench_sampling.py wrote with --json")
    parser.add_argument("--gpu", type=Path, help="what bench_gpu.py --part assign wrote with --json")
    parser.add_argument("--gpu-tflops", type=float, default=250.0, help="of an assignment, without --gpu: assumed")
    parser.add_argument("--rows", type=float, default=17e9)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--n-clusters", type=float, nargs="+", default=TREE["n_clusters"], help="finest first")
    parser.add_argument("--resample-size", type=int, nargs="+", default=TREE["resample_size"], help="one a level")
    parser.add_argument("--n-resamples", type=int, nargs="+", default=TREE["n_resamples"], help="one, or one a level")
    parser.add_argument("--first-clusters", type=float, default=100_000)
    parser.add_argument("--n-iter", type=int, default=Lloyd().n_iter)
    parser.add_argument("--skew", type=float, default=10.0, help="rows of the largest first cluster over the average")
    parser.add_argument("--part-rows", type=int, default=65_536)
    parser.add_argument("--cores", type=float, default=1000.0)
    parser.add_argument("--gpus", type=float, default=64.0)
    parser.add_argument("--measured-width", type=int, default=WIDTH, help="of the rows of bench_kmeans")
    parser.add_argument("--json", type=Path, help="also write the steps here, a list of objects")
    args = parser.parse_args()
    runs = args.n_resamples if isinstance(args.n_resamples, list) else [args.n_resamples]
    args.n_resamples = runs * len(args.n_clusters) if len(runs) == 1 else runs
    for name in ("resample_size", "n_resamples"):
        if len(getattr(args, name)) != len(args.n_clusters):
            parser.error(f"{name} must have one number a level: got {getattr(args, name)} for {args.n_clusters}")
    return args


def main() -> int:
    """Print the plan."""
    args = parse()
    kmeans, sampling = (json.loads(path.read_text()) for path in (args.kmeans, args.sampling))
    rates = measured(kmeans, sampling, args.measured_width)
    flops = gpu_flops(json.loads(args.gpu.read_text())) if args.gpu else args.gpu_tflops * 1e12
    rates = rates._replace(flops=flops)
    size = Size(
        args.rows, args.width, args.n_clusters, args.resample_size, args.n_resamples, args.first_clusters,
        args.n_iter, args.skew, args.part_rows,
    )  # fmt: skip
    rows = [line(work, rates, args.cores, args.gpus) for work in plan(size, rates)]
    whole = with_totals(rows)
    print(f"{size.rows:.3g} rows of width {size.width}, clusters {', '.join(f'{k:.4g}' for k in size.n_clusters)}\n")
    print("\n".join([*in_columns(whole), "", *notes(size, rates, rows, args)]))
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
