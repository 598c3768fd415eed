"""K-means beside FAISS and scikit-learn, and what its parts cost.

k4000   50,000 rows of 384, 4,000 clusters: the mean of 10 steps from the same start, random rows
k16000  200,000 rows, 16,000 clusters
coarse  1,000,000 rows, assigned to 10,000 and to 100,000 centroids, rows themselves: as the pipeline does, directly
        to the fewer and through a coarse quantizer to the more
disk-4m 1,000,000 and 4,000,000 rows of 256 in float16 parts, 10,000 clusters, 5 steps, by ``openlvd cluster`` on Ray:
        the memory of the largest process, and seconds a step beside the bare float32 product of all cores; in TMPDIR,
        2.6 GB

Rows are those of a heavy-tailed mixture: groups of Pareto sizes, normal with log-normal spreads, made unit; ``--data``
takes other rows, float (n, d) as .npy. Two threads for all sides. Ours: two parts, a thread of one math thread each, as
two workers of the pipeline. The objective of every side is that of its last centroids, found by one exact assignment;
the table has ours relative to the fastest peer's and every peer's relative to ours. Empty clusters take
the farthest rows, as in scikit-learn; in FAISS half of the largest cluster, which ends higher. ``product`` is the bare
float32 product of rows and centroids of a step, by numpy with two threads; its BLAS core stands in ``blas``, for
OPENBLAS_CORETYPE may hold it below what the processor can.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, below, most_mb, peak_mb, report
from threadpoolctl import threadpool_info, threadpool_limits

from curation.artifact import describe, finish, part_name
from curation.coarse import COARSE_FROM, CoarseTarget, group_centroids
from curation.embeddings import write_embeddings
from curation.execute import Here, SerialExecutor, fold_tree, local_values
from curation.kmeans import HeldTrail, Lloyd, State, refine
from curation.nearest import Target, assign, nearest_centroid
from curation.rows import ArrayRows
from curation.seeding import kmeans_plus_plus, seed_rows
from curation.store import Location

WIDTH = 384
THREADS = 2
N_ITER = 10
SHAPES = {"k4000": (50_000, 4000), "k16000": (200_000, 16_000)}
ROWS_PER_GROUP = 50  # of the mixture, on average
BLOCK = 4096
COARSE_ROWS, COARSE_CLUSTERS = 1_000_000, (10_000, 100_000)
MOST_COARSE, LEAST_AGREEMENT, CHECKED_ROWS = 4.0, 0.99, 16_384
DISK_ROWS, DISK_WIDTH, DISK_CLUSTERS, DISK_ITER = (1_000_000, 4_000_000), 256, 10_000, 5
PART_ROWS = 65_536
MOST_MB, MOST_GROWTH, MOST_OVER_PRODUCT = 1073.7, 1.05, 1.2
MOST_OBJECTIVE = 1.001  # of the fastest peer's
LEAST_RATIO = 1.0
MANY_ROWS = 100_000  # from here on every side is timed once, after a step to warm up


def mixture(n: int, width: int, seed: int) -> np.ndarray:
    """Unit rows float32 (n, width) of a heavy-tailed mixture."""
    rng = np.random.default_rng(seed)
    n_groups = max(2, n // ROWS_PER_GROUP)
    weights = rng.pareto(1.0, n_groups) + 0.01
    of = rng.choice(n_groups, n, p=weights / weights.sum())
    centres = rng.standard_normal((n_groups, width), np.float32)
    spread = rng.lognormal(-0.3, 0.5, n_groups).astype(np.float32)
    x = np.empty((n, width), np.float32)
    for start in range(0, n, BLOCK):
        at = slice(start, start + BLOCK)
        x[at] = centres[of[at]] + spread[of[at], None] * rng.standard_normal((len(of[at]), width), np.float32)
        x[at] /= np.linalg.norm(x[at], axis=1, keepdims=True)
    return x


class ThreadExecutor(SerialExecutor):
    """Two workers in this process: what they call releases the interpreter's lock."""

    def map(self, fn: Callable[..., Any], items: Sequence[Any], shared: Any = None) -> Any:
        """In item order."""
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(partial(fn, **local_values(shared)), items)

    def reduce(
        self,
        fn: Callable[..., Any],
        items: Sequence[Any],
        merge: Callable[..., Any],
        shared: Any = None,
        fan_in: int = 16,
    ) -> Here[Any]:
        """Over the tree of every executor."""
        return Here(fold_tree(self.map(fn, items, shared), merge, fan_in))


def by_us(x: np.ndarray, start: np.ndarray, n_iter: int) -> np.ndarray:
    """Centroids after so many steps."""
    parts = [ArrayRows(half) for half in np.array_split(x, THREADS)]
    how = Lloyd(n_iter=n_iter, tol=0, empty="farthest")
    with threadpool_limits(1):
        return refine(parts, State(start), ThreadExecutor(), how, HeldTrail()).centroids


def by_faiss(x: np.ndarray, start: np.ndarray, n_iter: int) -> np.ndarray:
    """The same by faiss.Kmeans, from the same start."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    found = faiss.Kmeans(
        x.shape[1], len(start), niter=n_iter, max_points_per_centroid=len(x), min_points_per_centroid=1
    )
    found.train(x, init_centroids=start)
    return np.asarray(found.centroids)


def by_superkmeans(x: np.ndarray, start: np.ndarray, n_iter: int) -> np.ndarray:
    """The same by faiss.SuperKmeans, which prunes by statistics; from random rows of its own."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    found = faiss.SuperKmeans(
        x.shape[1], len(start), niter=n_iter, max_points_per_centroid=len(x), min_points_per_centroid=1
    )
    found.train(x)
    return np.asarray(found.centroids)


def by_sklearn(x: np.ndarray, start: np.ndarray, n_iter: int) -> np.ndarray:
    """The same by scikit-learn's Lloyd, from the same start."""
    from sklearn.cluster import KMeans

    with threadpool_limits(THREADS):
        found = KMeans(len(start), init=start, n_init=1, max_iter=n_iter, tol=0, algorithm="lloyd").fit(x)
    return np.asarray(found.cluster_centers_, np.float32)


def bare_product(x: np.ndarray, start: np.ndarray) -> float:
    """Seconds of ``x @ start.T``, of which a part is timed."""
    height = min(BLOCK, len(x))
    n, out = min(4, len(x) // height) * height, np.empty((height, len(start)), np.float32)
    with threadpool_limits(THREADS):
        np.dot(x[:height], start.T, out=out)
        begin = time.perf_counter()
        for first in range(0, n, height):
            np.dot(x[first : first + height], start.T, out=out)
        return (time.perf_counter() - begin) / n * len(x)


SIDES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "ours": by_us,
    "faiss.Kmeans": by_faiss,
    "faiss.SuperKmeans": by_superkmeans,
    "scikit-learn": by_sklearn,
}


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and the last result of every side; they take turns, forwards and backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for repeat in range(repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            begin = time.perf_counter()
            results[name] = sides[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def objective(x: np.ndarray, centroids: np.ndarray) -> float:
    """The sum of squared distances to the nearest centroids."""
    blocks = (x[first : first + BLOCK] for first in range(0, len(x), BLOCK))
    return float(sum(nearest_centroid(block, centroids)[1].sum(dtype=np.float64) for block in blocks))


def blas_core() -> str:
    """The kernels of numpy's BLAS."""
    return ",".join(sorted({str(lib.get("architecture")) for lib in threadpool_info() if lib["user_api"] == "blas"}))


def steps_case(case: str, x: np.ndarray, k: int, seed: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    start = x[np.sort(np.random.default_rng([seed, 1]).choice(len(x), k, replace=False))].copy()
    for side in SIDES.values():
        side(x[:1000], start[:20], 2)  # compiled, imported
    product = statistics.median(bare_product(x, start) for _ in range(5))
    sides = {name: partial(side, x, start, N_ITER) for name, side in SIDES.items()}
    seconds, centroids = in_turns(sides, 1 if len(x) >= MANY_ROWS else repeats)
    inertia = {name: objective(x, found) for name, found in centroids.items()}
    best = min((name for name in SIDES if name != "ours"), key=seconds.__getitem__)
    return {
        "case": case,
        "ours": seconds["ours"] / N_ITER,
        "peer": seconds[best] / N_ITER,
        "peer_name": best,
        "ratio": seconds[best] / seconds["ours"],
        "unit": "s/step",
        "rows": len(x),
        "clusters": k,
        "threads": THREADS,
        "objective": inertia["ours"] / inertia[best],
        "product": product,
        "blas": blas_core(),
        **{f"{name} s": seconds[name] / N_ITER for name in SIDES if name != "ours"},
        **{f"{name} objective": inertia[name] / inertia["ours"] for name in SIDES if name != "ours"},
        "peak_mb": peak_mb(),
    }


def seeding_case(x: np.ndarray, k: int, seed: int, most_seeds: int = 500) -> dict[str, Any]:
    """Seconds of the seeding beside those of greedy k-means++ on the same rows, of which ``most_seeds`` are timed."""
    with threadpool_limits(1):
        seed_rows(x[:4096], 300, np.random.default_rng(seed))
        begin = time.perf_counter()
        seed_rows(x, k, np.random.default_rng(seed))
        ours = time.perf_counter() - begin
        begin = time.perf_counter()
        few = min(k, most_seeds)
        kmeans_plus_plus(x, few, np.random.default_rng(seed))
        peer = (time.perf_counter() - begin) * k / few
    return {
        "case": f"seeding-{k}", "ours": ours, "peer": peer, "peer_name": f"greedy k-means++, from {few} seeds",
        "ratio": peer / ours, "unit": "s", "rows": len(x), "clusters": k, "threads": 1, "peak_mb": peak_mb(),
    }  # fmt: skip


def coarse_case(x: np.ndarray, seed: int) -> dict[str, Any]:
    """Seconds of one assignment of all rows to few and to many centroids, and how often the latter is exact."""
    rng, seconds = np.random.default_rng([seed, 2]), []
    blocks = [x[first : first + BLOCK] for first in range(0, len(x), BLOCK)]
    some = x[np.sort(rng.choice(len(x), min(CHECKED_ROWS, len(x)), replace=False))]
    agreement = 1.0
    for k in (min(k, len(x) // 4) for k in COARSE_CLUSTERS):
        centroids = x[np.sort(rng.choice(len(x), k, replace=False))].copy()
        begin = time.perf_counter()
        with threadpool_limits(1), ThreadPoolExecutor(THREADS) as pool:
            if k < COARSE_FROM:
                list(pool.map(partial(assign, target=Target(centroids)), blocks))
            else:
                target = CoarseTarget(group_centroids(centroids))
                list(pool.map(target.assign, blocks))
        seconds.append(time.perf_counter() - begin)
        if k >= COARSE_FROM:
            agreement = float((target.assign(some)[1] <= nearest_centroid(some, centroids)[1]).mean())
    few, many = seconds
    return {
        "case": "coarse", "ours": many, "peer": few, "peer_name": f"ours, {COARSE_CLUSTERS[0]} clusters",
        "ratio": few / many, "times": many / few, "unit": "s", "rows": len(x), "clusters": k, "threads": THREADS,
        "agreement": agreement, "peak_mb": peak_mb(),
    }  # fmt: skip


def write_pool(folder: Path, n_rows: int, data: np.ndarray | None, seed: int) -> None:
    """An embeddings artifact of so many rows, float16."""
    place, files = Location(str(folder)), []
    for i, first in enumerate(range(0, n_rows, PART_ROWS)):
        n = min(PART_ROWS, n_rows - first)
        x = mixture(n, DISK_WIDTH, seed * 1000 + i) if data is None else data[np.arange(first, first + n) % len(data)]
        write_embeddings(place / part_name(i), np.arange(n), x.astype(np.float16), {"rows": n})
        files.append(describe(place / part_name(i)))
    head = {
        "stage": "embed",
        "version": 1,
        "fingerprint": "bench",
        "config": {},
        "inputs": {},
        "counts": {"rows": n_rows},
    }
    width = x.shape[1]
    finish(place, files, {**head, "facts": {"width": width, "backbone": {"name": "bench"}}, "numerics": {}})


def watched(command: list[str], found: list[float]) -> float:
    """Seconds of a command; the most memory of each of its processes goes to ``found``."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: dict[int, float] = {}

    def look() -> None:
        while child.poll() is None:
            for pid in [child.pid, *_below(child.pid)]:
                try:
                    if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes() or pid == child.pid:
                        peaks[pid] = most_mb(pid)
                except (OSError, AssertionError):  # it has just ended
                    continue
            time.sleep(0.2)

    watcher = threading.Thread(target=look)
    watcher.start()
    code = child.wait()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    found.append(max(peaks.values()))
    return time.perf_counter() - begin


def _below(pid: int) -> list[int]:
    try:
        return list(below(pid))
    except OSError:
        return []


def disk_case(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step and memory through the command, at two numbers of rows."""
    data = np.load(args.data).astype(np.float32) if args.data else None
    peaks: list[float] = []
    sizes = [n if not args.rows else n * args.rows // DISK_ROWS[-1] for n in DISK_ROWS]
    k = min(DISK_CLUSTERS, sizes[0] // 16)
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            at = Path(folder) / str(n)
            write_pool(at / "vectors", n, data, args.seed)
            spent = []
            for n_iter in (1, 1 + DISK_ITER):  # what is not steps is the same in both
                out = at / f"tree-{n_iter}"
                settings = ["--n-clusters", f"[{k}]", "--n-iter", str(n_iter), "--tol", "0", "--n-resamples", "0"]
                command = [str(Path(sys.executable).parent / "openlvd"), "cluster", "--embeddings", str(at / "vectors")]
                spent.append(watched([*command, *settings, "--out", str(out), "--executor", "ray"], peaks))
            step = (spent[1] - spent[0]) / DISK_ITER
    x = mixture(4 * BLOCK, data.shape[1] if data is not None else DISK_WIDTH, args.seed)
    product = statistics.median(bare_product(x, x[np.arange(k) % len(x)].copy()) for _ in range(5)) * sizes[-1] / len(x)
    return {
        "case": "disk-4m", "ours": step, "peer": product, "peer_name": f"bare product, {os.cpu_count()} threads",
        "ratio": product / step, "times": step / product, "unit": "s/step", "rows": sizes[-1], "clusters": k,
        "threads": THREADS, "blas": blas_core(), "mb_few": max(peaks[:2]), "mb_many": max(peaks[2:]),
        "peak_mb": max(peaks),
    }  # fmt: skip


def floors_missed(row: dict[str, Any]) -> list[str]:
    """What a row should have reached and did not."""
    case = row["case"]
    if case.startswith("seeding"):
        return []
    if case == "coarse":
        checks = [("times", row["times"] <= MOST_COARSE), ("agreement", row["agreement"] >= LEAST_AGREEMENT)]
    elif case == "disk-4m":
        grown = row["mb_many"] / row["mb_few"]
        checks = [("times", row["times"] <= MOST_OVER_PRODUCT), ("peak_mb", row["peak_mb"] <= MOST_MB)]
        checks.append(("mb_many", grown <= MOST_GROWTH))
    else:
        checks = [("ratio", row["ratio"] >= LEAST_RATIO), ("objective", row["objective"] <= MOST_OBJECTIVE)]
    return [f"{case}: {name} {row[name]:.5g}" for name, met in checks if not met]


def run_case(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table that a case gives."""
    if case == "disk-4m":
        return [disk_case(args)]
    n, k = SHAPES.get(case, (COARSE_ROWS, 0))
    x = np.load(args.data).astype(np.float32) if args.data else mixture(args.rows or n, WIDTH, args.seed)
    if case == "coarse":
        return [coarse_case(x, args.seed)]
    k = min(k, len(x) // 4)
    rows = [steps_case(case, x, k, args.seed, args.repeats)]
    return [*rows, seeding_case(x, k, args.seed)] if args.seeding else rows


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(str(__doc__))
    parser.add_argument("--cases", nargs="+", choices=[*SHAPES, "coarse", "disk-4m"], default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeding", action="store_true", help="time the seeding too")
    args = parser.parse_args()
    rows = [row for case in args.cases for row in run_case(case, args)]
    return report(rows, args, [line for row in rows for line in floors_missed(row)])


if __name__ == "__main__":
    sys.exit(main())
