"""What hierarchical k-means takes at a size nobody measures on a laptop, from what two benchmarks measured.

    python tests/bench/bench_kmeans.py --cases k4000 coarse --seeding --json kmeans.json
    python tests/bench/bench_sampling.py --json sampling.json
    python tests/bench/plan_cluster.py kmeans.json sampling.json [--gpu assign.json] [--rows 17e9] [--width 1024]

Levels and resampling are those of the recipe ``lvd1689m``, and so is --n-splits. A level with more than 1 of these is
made in two steps: ``first``, k-means into n_clusters / n_splits clusters over all rows; these are sent to their first
clusters, and each of those is split by itself, resampling too: ``small`` ones in parallel, by a task that holds some of
them, --piece-bytes of vectors, or has one in a local file, up to --alone-bytes; ``large`` ones, which are larger still,
one after the other, each by all workers. A level above clusters the centroids below, float32. A resampling is one more
k-means, of some rows: each of its steps reads all of its level, or of its first cluster.

Columns: ``TB sums`` is what tasks hand on to be merged, sums of clusters above all; ``M calls`` are millions of
requests to the storage; ``core h`` is work that all cores share; ``alone h`` is work of one core while the others wait,
one run after the other; ``wait h`` is the time of requests, on all cores, and of the driver, which starts one task
after the other; ``GPU h`` is what a GPU takes for the same assignments, in which every row meets every centroid;
``largest`` the memory of the largest process of the step; ``wall`` the hours with --cores cores, or with --gpus GPUs,
which leave seeding, shuffle and sampling to cores, and need no groups; no more of them work at a time than a step has
tasks, and a task of ``small`` has a GPU from its first request to its end. Bytes are not in the hours. Rows and
clusters of ``small`` and ``large`` are those of all first clusters at once. Steps of less than a thousandth of both
walls are left out, but not of the sums, unless --every is given.

What is reckoned, and printed with the plan: products of rows and centroids at the measured rates, their number a row
and step growing with k, or from COARSE_FROM clusters on with its square root; --n-iter steps of every run, an upper
bound, as the tolerance ends most runs earlier; log-normal sizes of first clusters, of which the largest has --skew
times the average, and shares as these sizes are. The latter is an assumption, and so are --request-ms and --task-ms,
and --gpu-tflops without --gpu.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from bench_kmeans import COARSE_CLUSTERS, SHAPES, WIDTH
from scipy.special import ndtri

from curation.coarse import COARSE_FROM, GROUP_SAMPLE, GROUP_SIZE, GROUP_STEPS, N_QUERIES
from curation.kmeans import MOST_SUMS, Lloyd
from curation.rows import BLOCK_ROWS
from curation.seed_sample import seed_sample
from curation.seeding import CELLS_FROM, COARSE_ROWS, MIN_CELLS, PER_CELL
from curation.split import cut_pieces, split_shares
from pipelines.recipe import SHIPPED
from pipelines.stages.cluster import AGREEMENT_PARTS, AGREEMENT_ROWS, CENTROID_ROWS
from pipelines.stages.split import ALONE_BYTES, FIRST_LABEL, LABEL, PIECE_BYTES

TREE = yaml.safe_load((SHIPPED / "lvd1689m.yaml").read_text())["steps"]["tree"]
STORED, FLOAT = 2, 4  # bytes of a value: of a row in an artifact, and of a centroid or of a row in a kernel
SUM = 8  # of a value of the sums
POSITION, OFFSET = 8, 8  # bytes beside each row that is sent; of a destination of a shuffle file
COUNTED, FAN_IN = 16, 16  # bytes of a first cluster whose rows are counted, and how many tasks' counts are one
LABELLED = 12  # bytes a row that is labelled: row, label, squared distance
BOUNDS = 8  # bytes a row, read and written in every step in which no groups are used
GATHERED = 16  # bytes a row of the worker that chooses the closest rows
HELD_EXACT, HELD_COARSE = 2 * FLOAT + SUM, 3 * FLOAT + SUM  # bytes a value of the centroids: of a worker ...
HELD_BY_DRIVER = 3 * FLOAT + 2 * SUM  # ... and of the driver: three states, sums and their quotients
SEEDING_BYTES = 2 * FLOAT  # a value of the sample: as it was drawn, and as one
PIECE_HELD = 2 * FLOAT  # a value of the vectors of a piece: see PIECE_BYTES
PART_CALLS, RANGE_CALLS, BOUND_CALLS = 2, 3, 3  # requests: footer, rows; number, bounds, records; there?, read, write
LABELS_READ, SAMPLE_WRITTEN = 16, 22  # bytes a row that ``sample`` reads, and writes at most
GPU_HELD = STORED + FLOAT + SUM  # bytes a value of the centroids
N_KINDS = 500  # sizes of first clusters that are reckoned with, the small and the large ones apart
LEFT_OUT = 1e-3  # share of the hours


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
    request: float  # seconds
    task: float  # seconds of the driver


class Size(NamedTuple):
    """The problem."""

    rows: float
    width: int
    n_clusters: Sequence[float]  # finest first
    n_splits: Sequence[float]
    resample_size: Sequence[int]
    n_resamples: Sequence[int]  # one a level
    n_iter: int
    skew: float
    part_rows: int
    piece_bytes: float
    alone_bytes: float

    @property
    def piece_rows(self) -> int:
        """Rows that a task may hold."""
        return max(1, int(self.piece_bytes // (FLOAT * self.width)))

    @property
    def small_rows(self) -> int:
        """Rows of a first cluster that a task may take."""
        return max(self.piece_rows, int(self.alone_bytes // (FLOAT * self.width)))


class Source(NamedTuple):
    """Rows that k-means reads in every step."""

    rows: float
    row_bytes: float
    parts: float
    calls: float = PART_CALLS  # requests that read a part


class Work(NamedTuple):
    """A step of the plan."""

    level: int
    step: str
    rows: float = 0  # in a run
    clusters: float = 0
    runs: int = 1
    read: float = 0  # bytes
    written: float = 0
    sums: float = 0  # bytes, from task to task
    calls: float = 0  # requests
    tasks: float = 0
    cores: float = 0  # core-seconds that are shared
    alone: float = 0  # core-seconds of one core
    flops: float = 0  # of a GPU instead of ``cores``
    workers: float = math.inf  # that have something to do at a time, at most
    without_gpu: bool = False  # the step is not there when GPUs assign
    has_gpu: bool = False  # its tasks have a GPU each, whether or not they use it
    held: float = 0  # bytes of the largest process

    def scaled(self, times: float) -> "Work":
        """So many times the work."""
        return self._replace(**{name: times * getattr(self, name) for name in SUMMED})

    def resampled(self, runs: int) -> "Work":
        """The same step in so many runs."""
        return self.scaled(runs)._replace(runs=runs)

    def takes(self, cores: float, rates: Rates) -> dict[str, float]:
        """Seconds of the step by what takes them."""
        busy = min(cores, self.workers)
        shares = {"many cores": self.cores / busy, "one core": self.alone}
        return {**shares, "requests": self.calls * rates.request / busy, "starting tasks": self.tasks * rates.task}

    def takes_with_gpus(self, cores: float, gpus: float, rates: Rates) -> dict[str, float]:
        """The same where GPUs assign."""
        if self.without_gpu:
            return {"one core": 0.0}
        takes, busy = self.takes(gpus if self.has_gpu else cores, rates), min(gpus, self.workers)
        return {**takes, "many cores": 0.0, "GPUs": self.flops / rates.flops / busy} if self.flops else takes


SUMMED = ("read", "written", "sums", "calls", "tasks", "cores", "alone", "flops")  # of works


def together(works: Iterable[Work]) -> list[Work]:
    """The steps of the same name as one, in the order of the first of each."""
    found: dict[str, Work] = {}
    for work in works:
        if work.step in found:
            old = found[work.step]
            more: dict[str, Any] = {
                name: getattr(old, name) + getattr(work, name) for name in (*SUMMED, "rows", "clusters")
            }
            least = min(old.workers, work.workers)
            found[work.step] = work._replace(**more, workers=least, held=max(old.held, work.held))
        else:
            found[work.step] = work
    return list(found.values())


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
    """Rates from what the benchmarks wrote; what they do not measure is 0."""
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
        request=0.0,
        task=0.0,
    )


def gpu_flops(rows: Sequence[Mapping[str, Any]]) -> float:
    """The rate of the assignment of rows on a GPU: of those that come from the host, the best that was measured."""
    rates = [
        max([float(value) for name, value in row.items() if name.startswith("host_")] or [float(row["ours"])])
        for row in rows
        if row["case"] == "assign" and row.get("unit", "").startswith("TFLOP/s")
    ]
    if not rates:
        raise SystemExit("--gpu must hold a case assign in TFLOP/s: got " + ", ".join(row["case"] for row in rows))
    return max(rates) * 1e12


def assigning(n: float, k: float, d: int, rates: Rates, *, pruned: bool) -> float:
    """Core-seconds of one assignment of n rows."""
    if k >= COARSE_FROM:
        return n * d * rates.coarse * math.sqrt(k / rates.coarse_k)
    return n * k * d / (rates.pruned if pruned else rates.plain)


def sets_of_sums(parts: float) -> int:
    """Of a step of k-means: see ``in_runs``."""
    n = math.ceil(parts)
    return -(-n // max(1, -(-n // MOST_SUMS)))


def one_run(level: int, source: Source, n: float, k: float, size: Size, rates: Rates) -> Iterator[Work]:
    """k-means of n rows of a source over all workers. Also where these are fewer all are read."""
    d, steps, coarse = size.width, size.n_iter, k >= COARSE_FROM
    rows_read = source.rows * source.row_bytes
    sample = min(n, seed_sample(math.ceil(k), d))
    yield Work(
        level, "seeds", sample, k, read=rows_read, calls=source.parts * source.calls, tasks=source.parts,
        workers=source.parts,
        sums=sample * d * FLOAT, alone=seeding_products(sample, k) * d / rates.seeding,
        held=sample * d * SEEDING_BYTES,
    )  # fmt: skip
    if coarse:
        alone = steps * grouping_products(k) * d / rates.plain
        yield Work(level, "groups", k, k, tasks=steps, alone=alone, without_gpu=True, held=2 * FLOAT * k * d)
    bounds, sets = 0 if coarse else BOUNDS * n, sets_of_sums(source.parts)
    yield Work(
        level, "steps", n, k, read=steps * (rows_read + bounds), written=steps * (2 * FLOAT * k * d + bounds),
        sums=steps * 2 * (sets - 1) * SUM * k * d, tasks=steps * (2 * sets - 1),
        calls=steps * source.parts * (source.calls + (0 if coarse else BOUND_CALLS)),
        cores=steps * assigning(n, k, d, rates, pruned=True), flops=2.0 * steps * n * k * d,
        workers=sets, held=max(HELD_COARSE if coarse else HELD_EXACT, HELD_BY_DRIVER) * k * d,
    )  # fmt: skip


def labelling(
    level: int, step: str, source: Source, k: float, size: Size, rates: Rates, *, pruned: bool = False
) -> Work:
    """One assignment of all rows."""
    n, d = source.rows, size.width
    held = (HELD_COARSE if k >= COARSE_FROM else HELD_EXACT) * k * d
    cores = assigning(n, k, d, rates, pruned=pruned)
    return Work(level, step, n, k, read=n * source.row_bytes, calls=source.parts * source.calls, tasks=source.parts,
                cores=cores, flops=2.0 * n * k * d, workers=source.parts, held=held)  # fmt: skip


def all_runs(level: int, source: Source, k: float, size: Size, rates: Rates) -> Iterator[Work]:
    """k-means of a source, and its resamplings."""
    yield from one_run(level, source, source.rows, k, size, rates)
    chosen, runs = size.resample_size[level], size.n_resamples[level]
    if chosen > 1 and runs:
        choose = labelling(level, "choose", source, k, size, rates)
        held = max(choose.held, source.rows * GATHERED + k * chosen * LABELLED)
        yield choose._replace(held=held, sums=source.rows * BOUNDS).resampled(runs)
        for work in one_run(level, source, min(source.rows, chosen * k), k, size, rates):
            yield work._replace(step=f"resampled {work.step}").resampled(runs)


def agreeing(level: int, k: float, size: Size, rates: Rates) -> Work:
    """The sampled rows that are compared with all centroids."""
    d, files = size.width, math.ceil(k / CENTROID_ROWS)
    n = AGREEMENT_PARTS * AGREEMENT_ROWS
    return Work(
        level, "agreement", n, k, read=FLOAT * k * d, calls=files * PART_CALLS, tasks=files,
        cores=n * k * d / rates.plain, workers=files, held=2 * FLOAT * (n + CENTROID_ROWS) * d,
    )  # fmt: skip


def whole(level: int, source: Source, size: Size, rates: Rates) -> Iterator[Work]:
    """A level that one k-means makes."""
    n, k, d = source.rows, size.n_clusters[level], size.width
    yield from all_runs(level, source, k, size, rates)
    yield labelling(level, "labels", source, k, size, rates)._replace(written=n * LABELLED + FLOAT * k * d)
    if k >= COARSE_FROM:
        yield agreeing(level, k, size, rates)


class Split(NamedTuple):
    """The first clusters of a level, the largest last; and how many pieces the small ones are in."""

    sizes: np.ndarray  # int64 (m,)
    shares: np.ndarray  # int64 (m,): into how many each is split
    n_large: int
    n_pieces: int


def split_of(n: float, k: float, n_splits: float, size: Size) -> Split:
    """What the pipeline would make of first clusters of log-normal sizes, whose sums of squares are as their sizes."""
    m = math.ceil(k / n_splits)
    z = ndtri((np.arange(m) + 0.5) / m)
    sigma = z[-1] - math.sqrt(max(0.0, z[-1] ** 2 - 2 * math.log(size.skew)))  # the last one has skew times the mean
    sizes = np.exp(sigma * z)
    sizes = np.maximum(1, np.round(sizes * (n / sizes.sum()))).astype(np.int64)
    mixed = np.random.default_rng(0).permutation(sizes)
    n_large = int((sizes > size.small_rows).sum())
    pieces = len(cut_pieces(mixed, size.piece_rows)) - 1 - n_large
    return Split(sizes, split_shares(sizes, sizes.astype(np.float64), math.ceil(k)), n_large, pieces)


def kinds(sizes: np.ndarray, shares: np.ndarray) -> Iterator[tuple[int, float, float]]:
    """How many first clusters there are of about a size, that size, and their share."""
    for some in np.array_split(np.arange(len(sizes)), min(N_KINDS, len(sizes)) or 1):
        if len(some):
            yield len(some), float(sizes[some].mean()), float(shares[some].mean())


def first_step(level: int, source: Source, m: float, size: Size, rates: Rates) -> Iterator[Work]:
    """The first k-means, and the way of the rows to its clusters."""
    n, parts = source.rows, source.parts
    for work in one_run(level, source, n, m, size, rates):
        yield work._replace(step=f"first {work.step}")
    label = labelling(level, "first labels", source, m, size, rates, pruned=True)
    counts = parts * (1 + 1 / (FAN_IN - 1)) * COUNTED * m  # one of every part, merged in a tree
    yield label._replace(written=n * FIRST_LABEL.itemsize, sums=counts, tasks=3 * parts, calls=label.calls + 2 * parts)
    sent = n * (source.row_bytes + POSITION) + parts * OFFSET * m
    read = n * (source.row_bytes + FIRST_LABEL.itemsize)
    yield Work(
        level, "send", n, m, read=read, written=sent, calls=parts * (source.calls + 2), tasks=parts, workers=parts,
        held=n / parts * (3 * source.row_bytes + 2 * POSITION),
    )  # fmt: skip


def small_ones(level: int, source: Source, split: Split, size: Size, rates: Rates) -> Iterator[Work]:
    """The first clusters that tasks take: their runs are work of all cores, and make no requests."""
    few = len(split.sizes) - split.n_large
    if not few:
        return
    sizes, shares = split.sizes[:few], split.shares[:few]
    rows, k, tasks = float(sizes.sum()), float(shares.sum()), split.n_pieces
    record = source.row_bytes + POSITION
    sample = min(rows, size.piece_rows, seed_sample(int(shares.max(initial=1)), size.width))
    held = size.width * (PIECE_HELD * min(rows, size.piece_rows) + SEEDING_BYTES * sample)
    yield Work(
        level, "small read", rows, k, read=rows * record + OFFSET * len(split.sizes) * source.parts,
        written=rows * LABEL.itemsize + tasks * OFFSET * source.parts + FLOAT * k * size.width,
        calls=tasks * (RANGE_CALLS * source.parts + 2), tasks=tasks, workers=tasks, has_gpu=True, held=held,
    )  # fmt: skip
    for count, n, share in kinds(sizes, shares):
        for work in all_runs(level, Source(n, 0, 0, 0), share, size, rates):
            held_here = Work(
                level, f"small {work.step}", runs=work.runs, cores=work.cores + work.alone, flops=work.flops,
                workers=tasks, has_gpu=True,
            )  # fmt: skip
            yield held_here.scaled(count)._replace(rows=count * work.rows, clusters=count * work.clusters)


def large_ones(level: int, source: Source, split: Split, size: Size, rates: Rates) -> Iterator[Work]:
    """The first clusters that all workers split, one after the other; their rows lie in ranges of the sent files."""
    few, parts = len(split.sizes) - split.n_large, source.parts
    record = source.row_bytes + POSITION
    for count, n, share in kinds(split.sizes[few:], split.shares[few:]):
        filled = parts * -math.expm1(-n / parts)  # parts that have a row of it, when these lie anywhere
        ranges = Source(n, record, filled, RANGE_CALLS - 1 + max(1.0, n / filled / BLOCK_ROWS))
        find = Work(level, "find", n, share, calls=2 * parts, read=3 * OFFSET * parts, tasks=parts, workers=parts)
        label = labelling(level, "labels", ranges, share, size, rates)
        label = label._replace(
            read=2 * label.read, written=n * LABEL.itemsize + FLOAT * share * size.width,
            calls=2 * label.calls + filled, tasks=2 * filled,
        )  # fmt: skip
        for work in (find, *all_runs(level, ranges, share, size, rates), label):
            all_of = work.scaled(count)._replace(rows=count * work.rows, clusters=count * work.clusters)
            yield all_of._replace(step=f"large {work.step}")


def in_two_steps(level: int, source: Source, size: Size, rates: Rates) -> Iterator[Work]:
    """A level with first clusters."""
    n, k, d = source.rows, size.n_clusters[level], size.width
    split = split_of(n, k, size.n_splits[level], size)
    yield from first_step(level, source, len(split.sizes), size, rates)
    yield from small_ones(level, source, split, size, rates)
    yield from together(large_ones(level, source, split, size, rates))
    calls, tasks = source.parts * (RANGE_CALLS * split.n_pieces + split.n_large + 1), source.parts + k / CENTROID_ROWS
    yield Work(
        level, "labels", n, k, read=n * LABEL.itemsize + FLOAT * k * d, written=n * LABELLED + FLOAT * k * d,
        calls=calls, tasks=tasks, workers=tasks, held=2 * FLOAT * CENTROID_ROWS * d,
    )  # fmt: skip
    yield agreeing(level, k, size, rates)


def sources(size: Size) -> Iterator[Source]:
    """What each level clusters."""
    d = size.width
    yield Source(size.rows, STORED * d, math.ceil(size.rows / size.part_rows))
    for k in size.n_clusters[:-1]:
        yield Source(k, FLOAT * d, math.ceil(k / CENTROID_ROWS))


def plan(size: Size, rates: Rates) -> list[Work]:
    """All steps, in order."""
    works = list[Work]()
    for level, source in enumerate(sources(size)):
        way = in_two_steps if size.n_splits[level] > 1 else whole
        works += together(way(level, source, size, rates))
    n = size.rows
    sample = Work(
        len(size.n_clusters), "sample", n, size.n_clusters[0], read=LABELS_READ * n, written=SAMPLE_WRITTEN * n,
        alone=n / rates.sampled, held=rates.sample_bytes * n,
    )  # fmt: skip
    return [*works, sample]


def line(work: Work, rates: Rates, cores: float, gpus: float) -> dict[str, Any]:
    """A row of the table."""
    takes, with_gpus = work.takes(cores, rates), work.takes_with_gpus(cores, gpus, rates)
    return {
        "level": work.level, "step": work.step, "runs": work.runs, "rows": work.rows, "clusters": work.clusters,
        "TB read": work.read / 1e12, "TB written": work.written / 1e12, "TB sums": work.sums / 1e12,
        "M calls": work.calls / 1e6, "M tasks": work.tasks / 1e6, "core h": work.cores / 3600,
        "alone h": work.alone / 3600, "wait h": (takes["requests"] + takes["starting tasks"]) / 3600,
        "GPU h": work.flops / rates.flops / 3600, "largest GB": work.held / 1e9,
        "wall h": sum(takes.values()) / 3600, "GPU wall h": sum(with_gpus.values()) / 3600,
        "mostly": max(takes, key=lambda name: takes[name]),
        "mostly with GPUs": max(with_gpus, key=lambda name: with_gpus[name]),
    }  # fmt: skip


def in_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for people."""
    names = [name for name in rows[0] if not name.startswith("mostly")]
    cells = [names, *([str(row["level"]), *(_cell(row[name]) for name in names[1:])] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return (
            "-" if value == 0 else f"{value:.0f}" if 100 <= value < 1e5 or value == int(value) < 1e5 else f"{value:.3g}"
        )
    return str(value)


def total_of(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of some rows, and the largest memory."""
    kept = ("runs", "rows", "clusters", "mostly", "mostly with GPUs")
    empty = {"level": rows[0]["level"] if name == "level" else "", "step": name, **dict.fromkeys(kept, "")}
    more = {key: sum(row[key] for row in rows) for key in rows[0] if key not in empty}
    found = {**empty, **more, "largest GB": max(row["largest GB"] for row in rows)}
    return {key: found[key] for key in rows[0]}


def with_totals(rows: list[dict[str, Any]], left_out: float) -> list[dict[str, Any]]:
    """Behind every level its sums, and at the end those of all; without the steps of too small a share."""
    found, last = [], total_of("all", rows)
    for level in dict.fromkeys(row["level"] for row in rows):
        own = [row for row in rows if row["level"] == level]
        found += [row for row in own if any(row[wall] >= left_out * last[wall] for wall in ("wall h", "GPU wall h"))]
        found += [total_of("level", own)] if len(own) > 1 else []
    return [*found, last]


def slowest(rows: list[dict[str, Any]], wall: str, why: str, n: int = 3) -> str:
    """The steps that take the most hours, and what takes them."""
    last = sum(row[wall] for row in rows)
    some = sorted(rows, key=lambda row: row[wall], reverse=True)[:n]
    return "; ".join(
        f"level {row['level']}, {row['step']}: {row[wall]:.3g} h, {row[wall] / last:.0%}, mostly {row[why]}"
        for row in some
    )


def notes_of_level(level: int, source: Source, size: Size) -> list[str]:
    """What its sums are, and which first clusters are large."""
    n_splits, d = size.n_splits[level], size.width
    k = math.ceil(size.n_clusters[level] / n_splits)
    sets = sets_of_sums(source.parts)
    tb, sets_tb = source.rows * source.row_bytes / 1e12, 2 * (sets - 1) * SUM * k * d / 1e12
    name = f"level {level}: "
    found = [
        f"{name}the sums of {k:.4g} {'first ' if n_splits > 1 else ''}clusters are {SUM * k * d / 1e9:.3g} GB; {sets} "
        f"tasks of a step, of {math.ceil(source.parts / sets)} parts at most, hand on one set each, merged two by two: "
        f"{sets_tb:.3g} TB a step, beside {tb:.3g} TB of rows"
    ]
    if n_splits > 1:
        split = split_of(source.rows, size.n_clusters[level], n_splits, size)
        m, few = len(split.sizes), len(split.sizes) - split.n_large
        share = float(split.sizes[few:].sum() / split.sizes.sum())
        found.append(
            f"{name}a first cluster has {source.rows / m:.4g} rows on average; {split.n_large} of {m}, with "
            f"{share:.1%} of all rows, have more than the {size.small_rows} of a task and are split one after the "
            f"other; the others are in {split.n_pieces} pieces, each read from {source.parts:.0f} files"
        )
    return found


def notes(size: Size, rates: Rates, rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """What was assumed, and what stands out."""
    largest, most, last = (max(rows, key=lambda row: row[name]) for name in ("largest GB", "TB read", "TB sums"))
    all_of, d = total_of("all", rows), size.width
    wide = max(math.ceil(k / s) for k, s in zip(size.n_clusters, size.n_splits, strict=True))
    source = f"measured: {args.gpu.name}" if args.gpu else "assumed, not measured"
    return [
        f"slowest on {args.cores:g} cores: {slowest(rows, 'wall h', 'mostly')}",
        f"slowest with {args.gpus:g} GPUs: {slowest(rows, 'GPU wall h', 'mostly with GPUs')}",
        f"largest process: level {largest['level']}, {largest['step']}, {largest['largest GB']:.4g} GB",
        f"in all {all_of['core h']:.4g} core-hours and {all_of['alone h']:.4g} hours of a core alone; or "
        f"{all_of['GPU h']:.4g} GPU-hours",
        f"most is read by level {most['level']}, {most['step']}: at {most['TB read'] / most['wall h'] / 3.6:.3g} GB/s "
        f"it keeps up with the cores, at {most['TB read'] / most['GPU wall h'] / 3.6:.3g} GB/s with the GPUs",
        f"most is handed on from task to task by level {last['level']}, {last['step']}: {last['TB sums']:.4g} TB",
        *(some for level, one in enumerate(sources(size)) for some in notes_of_level(level, one, size)),
        f"a GPU that has all centroids of a run holds {GPU_HELD * wide * d / 1e9:.3g} GB at {wide:.3g}",
        "",
        f"core: {rates.plain:.3g} products/s, {rates.pruned:.3g} with bounds, {rates.seeding:.3g} in seeding, and "
        f"{1 / rates.coarse:.3g} values/s of rows through groups of {rates.coarse_k:g} centroids: measured",
        f"GPU: {rates.flops / 1e12:.4g} TFLOP/s, {source}",
        f"{1e3 * rates.request:g} ms a request and {1e3 * rates.task:g} ms of the driver a task: assumed",
        f"{size.n_iter} steps of every run are an upper bound: tol {Lloyd().tol:g} ends most runs earlier",
        f"sizes of first clusters are log-normal, and the largest has {size.skew:g} times the average: assumed",
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
    parser.add_argument(
        "--n-splits", type=float, nargs="+", default=TREE["n_splits"], help="one a level; 1: no two steps"
    )
    parser.add_argument("--resample-size", type=int, nargs="+", default=TREE["resample_size"], help="one a level")
    parser.add_argument("--n-resamples", type=int, nargs="+", default=TREE["n_resamples"], help="one, or one a level")
    parser.add_argument("--piece-bytes", type=float, default=PIECE_BYTES, help="of vectors that a task holds")
    parser.add_argument("--alone-bytes", type=float, default=ALONE_BYTES, help="of those it has in a file")
    parser.add_argument("--n-iter", type=int, default=Lloyd().n_iter)
    parser.add_argument("--skew", type=float, default=10.0, help="rows of the largest first cluster over the average")
    parser.add_argument("--part-rows", type=int, default=65_536)
    parser.add_argument("--cores", type=float, default=1000.0)
    parser.add_argument("--gpus", type=float, default=64.0)
    parser.add_argument("--request-ms", type=float, default=10.0, help="of the storage")
    parser.add_argument("--task-ms", type=float, default=0.5, help="of the driver")
    parser.add_argument("--measured-width", type=int, default=WIDTH, help="of the rows of bench_kmeans")
    parser.add_argument("--every", action="store_true", help="show the steps of little time too")
    parser.add_argument("--json", type=Path, help="also write all steps here, a list of objects")
    args = parser.parse_args()
    runs = args.n_resamples if isinstance(args.n_resamples, list) else [args.n_resamples]
    args.n_resamples = runs * len(args.n_clusters) if len(runs) == 1 else runs
    for name in ("n_splits", "resample_size", "n_resamples"):
        if len(getattr(args, name)) != len(args.n_clusters):
            parser.error(f"{name} must have one number a level: got {getattr(args, name)} for {args.n_clusters}")
    return args


def main() -> int:
    """Print the plan."""
    args = parse()
    kmeans, sampling = (json.loads(path.read_text()) for path in (args.kmeans, args.sampling))
    rates = measured(kmeans, sampling, args.measured_width)
    flops = gpu_flops(json.loads(args.gpu.read_text())) if args.gpu else args.gpu_tflops * 1e12
    rates = rates._replace(flops=flops, request=args.request_ms / 1e3, task=args.task_ms / 1e3)
    size = Size(
        args.rows, args.width, args.n_clusters, args.n_splits, args.resample_size, args.n_resamples,
        args.n_iter, args.skew, args.part_rows, args.piece_bytes, args.alone_bytes,
    )  # fmt: skip
    rows = [line(work, rates, args.cores, args.gpus) for work in plan(size, rates)]
    sizes = zip(size.n_clusters, size.n_splits, strict=True)
    made = ", ".join(f"{k:.4g}" + (f" ({n:g} in each of {math.ceil(k / n):.4g})" if n > 1 else "") for k, n in sizes)
    print(f"{size.rows:.3g} rows of width {size.width}, clusters {made}\n")
    shown = with_totals(rows, 0 if args.every else LEFT_OUT)
    print("\n".join([*in_columns(shown), "", *notes(size, rates, rows, args)]))
    if args.json:
        args.json.write_text(json.dumps(with_totals(rows, 0), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
