"""Balanced sampling of a tenth of the rows from five levels of clusters with heavy-tailed sizes.

rows-1e8    ``leaf_quotas`` and ``draw_rows`` over labels in memory, at random
closest     the same, the closest rows of every cluster
stage       the stage ``sample`` over parts of 65,536 rows in files, serially, with what it writes

The peer does what public code does: a list of rows for every cluster, then from the top down a Python loop over the
clusters of a node, and over the leaves with ``numpy.random.choice``. It needs 8 bytes for a row and 100 for a leaf in
lists, so both sides are timed beside one another at ``--peer-rows`` (``ratio``), in memory; ``seconds``,
``bytes_a_row`` and ``peak_mb`` are those of the whole case, in a fresh process. All is done in one thread.
``bytes_a_row`` is what the process takes at its peak beyond what it had before there were labels: labels and distances,
4 bytes each, are among it. ``equal``: both sides draw as many, with the same shares of the top clusters.

``--data``: labels int (n,) of rows as .npy instead, clusters of level 0; the levels above are made up. TMPDIR holds 8
bytes a row.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from bench_components import memory
from common import arguments, interleaved, report

from curation.artifact import Artifact, finish, part_name, write_table
from curation.draws import Block, cluster_sizes, draw_rows
from curation.execute import SerialExecutor
from curation.hierarchy import Hierarchy
from curation.sampling import SampleConfig, leaf_quotas
from curation.store import Location
from pipelines.stage import Output
from pipelines.stages.sample import STAGE

ROWS = {"rows-1e8": 100_000_000, "closest": 10_000_000, "stage": 10_000_000}
PEER_ROWS = 3_000_000
LEVELS = 5
ROWS_A_LEAF, FAN = 100, 10  # on average
PARETO = 1.1  # exponent of the sizes of leaves
SHARE = 10  # one row of so many is drawn
PART_ROWS = 65_536
LEAST_ROWS = 10_000_000  # below, the floors are not asked for
MOST_BYTES, MOST_SECONDS = 16.0, 30.0  # a row; of rows-1e8


class Data(NamedTuple):
    """A hierarchy of rows, their labels in a file."""

    labels: Path  # int32 (n,)
    distance: Path  # float32 (n,)
    upper: list[np.ndarray]  # as ``leaf_quotas`` takes it
    n_rows: int
    n_leaves: int


def make_data(folder: Path, n_rows: int, given: Path | None, seed: int) -> Data:
    """Rows in random order, or given labels; every cluster has a random parent."""
    rng = np.random.default_rng(seed)
    if given is None:
        n_leaves = max(n_rows // ROWS_A_LEAF, 1)
        weight = rng.pareto(PARETO, n_leaves) + 0.01
        ends = np.round(np.cumsum(weight) / weight.sum() * n_rows).astype(np.int64)
        labels = np.repeat(np.arange(n_leaves, dtype=np.int32), np.diff(ends, prepend=0))
        rng.shuffle(labels)
    else:
        labels = np.load(given)[:n_rows].astype(np.int32)
    n_leaves = int(labels.max()) + 1
    upper, below = [], n_leaves
    for _ in range(LEVELS - 1):
        above = max(below // FAN, 1)
        upper.append(rng.integers(0, above, below, dtype=np.int32))
        below = above
    names = folder / f"labels-{len(labels)}.npy", folder / f"distance-{len(labels)}.npy"
    np.save(names[0], labels)
    np.save(names[1], rng.random(len(labels), np.float32))
    return Data(*names, upper, len(labels), n_leaves)


def ours(labels: np.ndarray, distance: np.ndarray | None, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """(quotas of leaves, counts of rows)."""
    pick, block = ("random", Block(labels)) if distance is None else ("closest", Block(labels, distance))
    sizes = cluster_sizes(labels, data.n_leaves)
    quotas = leaf_quotas(sizes, data.upper, len(labels) // SHARE, 0)
    [counts] = draw_rows(lambda: [block], sizes, quotas, 0, pick=pick)
    return quotas, counts


def loop_shares(sizes: list[int], target: int, rng: np.random.Generator) -> list[int]:
    """Max-min fair shares of one node by bisection; the remainder at random."""
    if sum(sizes) <= target:
        return sizes
    low, high = 0, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(middle, n) for n in sizes) <= target else (low, middle - 1)
    found = [min(low, n) for n in sizes]
    above = [i for i, n in enumerate(sizes) if n > low]
    for i in rng.choice(len(above), target - sum(found), replace=False).tolist():
        found[above[i]] += 1
    return found


def by_loops(labels: np.ndarray, distance: np.ndarray | None, data: Data) -> tuple[list[int], np.ndarray]:
    """(quotas of top clusters, rows), a loop over clusters."""
    rng = np.random.default_rng(0)
    lists = [lists_of(level) for level in (labels, *data.upper)]
    sizes = [[len(rows) for rows in lists[0]]]
    for children in lists[1:]:
        sizes.append([sum(sizes[-1][i] for i in some) for some in children])
    top = quotas = loop_shares(sizes[-1], len(labels) // SHARE, rng)
    for below, children in zip(reversed(sizes[:-1]), reversed(lists[1:]), strict=True):
        shares = [0] * len(below)
        for quota, some in zip(quotas, children, strict=True):
            for i, share in zip(some, loop_shares([below[i] for i in some], quota, rng), strict=True):
                shares[i] = share
        quotas = shares
    drawn = []
    for quota, rows in zip(quotas, lists[0], strict=True):
        if distance is None:
            drawn.append(rng.choice(rows, quota, replace=False) if len(rows) else rows)
        else:
            drawn.append(rows[np.argsort(distance[rows], kind="stable")[:quota]])
    return top, np.concatenate(drawn)


def lists_of(labels: np.ndarray) -> list[Any]:
    """The members of every cluster."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])


def is_even(data: Data, labels: np.ndarray, distance: np.ndarray | None) -> bool:
    """Whether both sides give their top clusters the same shares, in order, and ours draws what it says."""
    quotas, counts = ours(labels, distance, data)
    top = Hierarchy.from_labels([np.arange(data.n_leaves), *data.upper])
    path = np.arange(data.n_leaves)
    for level in top.levels[1:]:
        path = level.labels[path]
    shares = np.bincount(path, quotas)
    said = np.array_equal(np.bincount(labels, counts, minlength=data.n_leaves), quotas)
    peer, rows = by_loops(labels, distance, data)
    return bool(said and len(rows) == counts.sum() and np.array_equal(np.sort(shares), np.sort(peer)))


def held(data: Data, pick: str) -> tuple[float, float, float]:
    """(seconds, most bytes a row, most MB of the process), to be called in a fresh process."""
    few = np.zeros(1000, np.int32)
    little = data._replace(upper=[np.zeros(1, np.int32)] * (LEVELS - 1), n_rows=len(few), n_leaves=1)
    ours(few, None if pick == "random" else few.astype(np.float32), little)  # compiled
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before = memory("VmRSS")
    labels = np.load(data.labels)
    distance = None if pick == "random" else np.load(data.distance)
    start = time.perf_counter()
    ours(labels, distance, data)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    return seconds, (peak - before) / data.n_rows, peak / 1e6


def write_tree(folder: Path, data: Data) -> Artifact:
    """The hierarchy as the stage ``cluster`` leaves it, without centroids."""
    at, files = Location(str(folder)), []
    labels, distance = np.load(data.labels, mmap_mode="r"), np.load(data.distance, mmap_mode="r")
    for i, start in enumerate(range(0, data.n_rows, PART_ROWS)):
        own = slice(start, min(start + PART_ROWS, data.n_rows))
        rows = np.arange(own.stop - start, dtype=np.int32)
        table = pa.table({"row": rows, "label": np.array(labels[own]), "sq_distance": np.array(distance[own])})
        files.append(write_table(at / part_name(i), table))
    for t, level in enumerate(data.upper, 1):
        files.append(write_table(at / part_name(0, f"labels-{t}"), pa.table({"label": level})))
    n_clusters = [len(level) for level in data.upper] + [int(data.upper[-1].max()) + 1]
    return finish(at, files, {"stage": "cluster", "facts": {"n_clusters": n_clusters}, "inputs": {}, "counts": {}})


def held_by_stage(tree: Artifact, little: Artifact, folder: Path, n_rows: int) -> tuple[float, float, float]:
    """As ``held``, of the stage."""
    executor = SerialExecutor()
    config = SampleConfig(target=n_rows // SHARE)
    STAGE.run(config, {"hierarchy": little}, Output(Location(str(folder / "little")), executor), executor)  # compiled
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.perf_counter()
    STAGE.run(config, {"hierarchy": tree}, Output(Location(str(folder / "whole")), executor), executor)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    return seconds, (peak - before) / n_rows, peak / 1e6


def in_fresh_process(fn: Any, *args: Any) -> tuple[float, float, float]:
    """``fn(*args)``."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        found: tuple[float, float, float] = fresh.apply(fn, args)
        return found


def run_case(case: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    pick = "closest" if case == "closest" else "random"
    n_rows = args.rows or ROWS[case]
    data = make_data(folder, n_rows, args.data, args.seed)
    if case == "stage":
        tree = write_tree(folder / "tree", data)
        little = write_tree(folder / "little", make_data(folder, min(10_000, data.n_rows), args.data, args.seed))
        told = in_fresh_process(held_by_stage, tree, little, folder / "sample", data.n_rows)
    else:
        told = in_fresh_process(held, data, pick)
    seconds, bytes_a_row, peak_mb = told
    few = make_data(folder, min(args.peer_rows, data.n_rows), args.data, args.seed)
    labels = np.load(few.labels)
    distance = np.load(few.distance) if pick == "closest" else None
    sides: dict[str, Callable[[], object]] = {
        "ours": partial(ours, labels, distance, few),
        "peer": partial(by_loops, labels, distance, few),
    }
    timed = interleaved(sides, args.repeats)
    return {
        "case": case,
        "ours": data.n_rows / seconds,
        "peer": few.n_rows / timed["peer"],
        "peer_name": "a Python loop over clusters",
        "ratio": timed["peer"] / timed["ours"],
        "unit": "rows/s",
        "rows": data.n_rows,
        "peer_rows": few.n_rows,
        "clusters": data.n_leaves,
        "seconds": seconds,
        "threads": 1,
        "bytes_a_row": bytes_a_row,
        "peak_mb": peak_mb,
        "equal": is_even(few, labels, distance),
    }


def missed_floors(row: dict[str, Any]) -> Sequence[str]:
    """What a row of the table should have been."""
    missed = []
    if row["rows"] >= LEAST_ROWS and not row["bytes_a_row"] <= MOST_BYTES:
        missed.append(f"{row['case']}: {row['bytes_a_row']:.2f} bytes a row, more than {MOST_BYTES:g}")
    if row["case"] == "rows-1e8" and not row["seconds"] <= MOST_SECONDS:
        missed.append(f"{row['case']}: {row['seconds']:.1f} s, more than {MOST_SECONDS:g}")
    return missed


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(str(__doc__))
    parser.add_argument("--cases", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--peer-rows", type=int, default=PEER_ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_case(case, Path(folder), args))
    return report(rows, args, [line for row in rows for line in missed_floors(row)])


if __name__ == "__main__":
    sys.exit(main())
