"""Connected components beside scipy's csgraph, with the building of its matrix.

Both sides get the same int32 edges and give a label to every row; the peer's labels are renamed to the smallest row of
each component for the comparison, untimed. Both use one thread. The peer is run with every type of weights in
WEIGHTS, and the faster one counts.

random    10 edges a row between any two rows: one component and a few rows alone
cliques   rows in groups of Pareto sizes, each with edges to the next 10 of its group, sorted by row, at random ids: as
          a search for neighbours leaves them
path      all rows in one chain, at random ids, its edges in random order

``--data``: edges int (m, 2) as .npy instead. ``bytes_a_row`` is what ``connected_components`` holds at its peak beside
the edges, the labels among it, in a fresh process; ``bytes_a_row_blocks`` what ``join_forests`` holds that reads the
edges block by block, beside a block. TMPDIR holds the edges: 80 bytes a row in case random.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, report
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components as scipy_components

from curation.components import connected_components, join_forests

N_ROWS = 10_000_000
N_NEIGHBORS = 10
PARETO = 1.5  # exponent of the sizes of groups: half of the rows have 4 or more others, some thousands
BLOCK = 1 << 20  # edges read at a time
MANY_EDGES = 60_000_000  # from here on a case is timed once
WEIGHTS = ("f8", "i1")  # types of the peer's matrix: what it computes in, and the smallest
LEAST_ROWS = 1_000_000  # below, the floors are not asked for: a process has more memory of its own than so few rows
LEAST_RATIO = 4.0
MOST_BYTES = 16.0  # a row


def random_edges(n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """int32 (10 n, 2)."""
    return rng.integers(0, n_rows, (N_NEIGHBORS * n_rows, 2), dtype=np.int32)


def path_edges(n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """int32 (n - 1, 2)."""
    row = rng.permutation(n_rows).astype(np.int32)
    at = rng.permutation(n_rows - 1)
    return np.stack([row[at], row[at + 1]], axis=1)


def clique_edges(n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """int32 (m, 2): the next rows of the group, round and round, but not the row itself."""
    sizes = np.ceil(rng.pareto(PARETO, n_rows)).clip(1, n_rows).astype(np.int64)
    ends = np.cumsum(sizes)
    group = np.searchsorted(ends, np.arange(n_rows), side="right")
    sizes = np.bincount(group)
    start, size = (np.cumsum(sizes) - sizes)[group], sizes[group]
    row = rng.permutation(n_rows)
    place = np.argsort(row)
    blocks = []
    for first in range(0, n_rows, BLOCK):
        at = place[first : first + BLOCK, None]
        near = start[at] + (at - start[at] + np.arange(1, N_NEIGHBORS + 1)) % size[at]
        i, j = np.nonzero(np.arange(1, N_NEIGHBORS + 1) < size[at])
        blocks.append(np.stack([first + i, row[near[i, j]]], axis=1).astype(np.int32))
    return np.concatenate(blocks)


CASES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "random": random_edges,
    "cliques": clique_edges,
    "path": path_edges,
}


def by_scipy(edges: np.ndarray, n_rows: int, weights: str) -> np.ndarray:
    """Labels in scipy's order."""
    matrix = csr_matrix((np.ones(len(edges), weights), (edges[:, 0], edges[:, 1])), (n_rows, n_rows))
    labels: np.ndarray = scipy_components(matrix, directed=False)[1]
    return labels


def smallest_rows(labels: np.ndarray) -> np.ndarray:
    """Labels as the smallest row of each component."""
    smallest = np.empty(labels.max() + 1, np.int64)
    smallest[labels[::-1]] = np.arange(len(labels))[::-1]  # of equal labels the last one assigned stays
    return smallest[labels]


def in_turns(cases: dict[str, Callable[[], np.ndarray]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and the last result of each case; the cases take turns, forwards and backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    results = {}
    for repeat in range(repeats):
        for name in sorted(cases, reverse=repeat % 2 == 1):
            start = time.perf_counter()
            results[name] = cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def blocks_of(file: Path) -> Iterator[np.ndarray]:
    """int32 (<= BLOCK, 2)."""
    with file.open("rb") as opened:
        while len(block := np.fromfile(opened, np.int32, 2 * BLOCK)):
            yield block.reshape(-1, 2)


def memory(what: str) -> int:
    """Bytes of memory that this process has now (VmRSS) or had at most (VmHWM). Of the process alone: what getrusage
    tells of a started process is never less than its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def held(file: Path, n_rows: int, whole: bool) -> tuple[float, float]:
    """(most bytes a row that ours takes beside the edges, most MB of the process), to be called in a fresh process.

    whole: all edges are in memory before; otherwise they are read block by block.
    """
    connected_components(np.zeros((1, 2), np.int32), 1)  # compiled
    edges = np.fromfile(file, np.int32).reshape(-1, 2) if whole else None
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before = memory("VmRSS")
    if edges is not None:
        connected_components(edges, n_rows)
    else:
        before += BLOCK * 8
        join_forests(blocks_of(file), n_rows)
    peak = memory("VmHWM")
    return (peak - before) / n_rows, peak / 1e6


def in_fresh_process(*args: Any) -> tuple[float, float]:
    """``held(*args)``."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        found: tuple[float, float] = fresh.apply(held, args)
        return found


def run_case(case: str, edges: np.ndarray, n_rows: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "edges"
        edges.tofile(file)
        bytes_whole, peak_mb = in_fresh_process(file, n_rows, True)
        bytes_blocks, _ = in_fresh_process(file, n_rows, False)
    for find in (connected_components, partial(by_scipy, weights=WEIGHTS[0])):
        find(edges[:1000], n_rows)  # compiled, imported
    seconds, labels = in_turns(
        {
            "ours": partial(connected_components, edges, n_rows),
            **{weights: partial(by_scipy, edges, n_rows, weights) for weights in WEIGHTS},
        },
        repeats,
    )
    best = min(WEIGHTS, key=seconds.__getitem__)
    return {
        "case": case,
        "ours": len(edges) / seconds["ours"],
        "peer": len(edges) / seconds[best],
        "peer_name": f"scipy csgraph, {best} weights",
        "ratio": seconds[best] / seconds["ours"],
        "unit": "edges/s",
        "rows": n_rows,
        "edges": len(edges),
        "seconds": seconds["ours"],
        "threads": 1,
        "bytes_a_row": bytes_whole,
        "bytes_a_row_blocks": bytes_blocks,
        "peak_mb": peak_mb,
        "equal": bool((labels["ours"] == smallest_rows(labels[best])).all()),
    }


def cases_of(args: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, int]]:
    """(case, edges int32 (m, 2), rows) one after the other."""
    if args.data:
        edges = np.load(args.data)
        n_rows = int(edges.max()) + 1
        if n_rows > np.iinfo(np.int32).max:
            raise SystemExit(f"--data must have row ids below 2**31 - 1, for scipy: got {n_rows - 1}")
        yield args.data.stem, edges.astype(np.int32), n_rows
        return
    for case in args.cases:
        yield case, CASES[case](args.rows, np.random.default_rng(args.seed)), args.rows


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(str(__doc__))
    parser.set_defaults(rows=N_ROWS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows, missed = [], []
    for case, edges, n_rows in cases_of(args):
        repeats = 1 if len(edges) > MANY_EDGES else args.repeats  # the peer takes half a minute
        rows.append(row := run_case(case, edges, n_rows, repeats))
        if n_rows < LEAST_ROWS:
            continue
        if not row["ratio"] >= LEAST_RATIO:
            missed.append(f"{case}: {row['ratio']:.2f} times the peer, less than {LEAST_RATIO:g}")
        missed += [
            f"{case}: {name} {row[name]:.2f}, more than {MOST_BYTES:g}"
            for name in ("bytes_a_row", "bytes_a_row_blocks")
            if not row[name] <= MOST_BYTES
        ]
    return report(rows, args, missed)


if __name__ == "__main__":
    sys.exit(main())
