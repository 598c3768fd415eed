"""The k-NN join in cells beside an exact search by FAISS.

Half of the rows have one planted partner at a cosine uniform in [.6, .99], in directions that are isotropic, so no
cell keeps them together but by chance; the others lie in 2,000 concepts of Pareto sizes, at a cosine of about .36
within one. Edges at or above .6 are asked for, by ``neighbors`` with its defaults, on Ray with 2 workers.

join-1m   a million rows. ``recall`` of all planted edges, and of those in [.60, .65) and so on; ``recall_sampled`` of
          all edges that the exact search finds for the sampled rows. The peer is ``faiss.knn`` with 2 threads on
          sampled rows, before and after the join, times all rows over the sampled. ``seconds`` and ``peer_seconds``
          are for all rows; ``ratio`` their quotient.
growth    the same at a quarter of the rows. ``exponent`` is log(seconds ratio) / log(4) of the join, which is all but
          ``train`` (the quantizer) and ``assign`` (rows to their cells); these two and ``scan``, which is most of the
          join, have their own. ``ratio`` is the greatest exponent allowed over that of the join.

``peak_mb`` is the most memory of any process that searches, ``worker_mb`` that of the largest worker. Rows are made in
a process of their own and lie in TMPDIR, 1 kB each, and their signatures beside them, 3 kB.

    python tests/bench/bench_neighbors.py [--data FILE.npy] [--rows N] [--cases ...] [--seed S] [--json FILE]

--data: rows float (n, d) as .npy, searched as they are; then ``recall`` is that of the sampled rows alone.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import arguments, most_mb, ray_workers, report

from curation.artifact import Artifact, FileInfo, finish, part_name, read_table, write_table
from curation.embeddings import embedding_parts, write_embeddings
from curation.neighbors import NeighborsConfig
from curation.store import Location
from pipelines.executor import Resources
from pipelines.ray_executor import RayExecutor
from pipelines.stage import Output
from pipelines.stages import neighbors

N_ROWS = 1_000_000
WIDTH = 384
PART_ROWS = 65_536
N_CONCEPTS, PARETO = 2000, 1.5
MIN_SIMILARITY = 0.6
BINS = ((0.6, 0.65), (0.65, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0))
WORKERS = 2
SHUFFLED = ("members", "found", "lists", "wanted", "vectors")  # what a join writes on its way
SAMPLED = 1024  # rows that the exact search is timed on, each time
LEAST_RATIO, LEAST_RECALL, LEAST_BIN, MOST_MB = 40.0, 0.99, 0.97, 2048.0
MOST_EXPONENT = 1.2
LEAST_ROWS = 250_000  # below, speed and growth are not asked for: starting workers takes the time


def unit(x: np.ndarray) -> np.ndarray:
    """Rows float32 of length 1."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def planted_rows(n_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows float16 (n, WIDTH) in random order, and pairs int64 (n // 4, 2) of partners."""
    rng = np.random.default_rng(seed)
    n_pairs = n_rows // 4
    place = rng.permutation(n_rows)
    rows = np.empty((n_rows, WIDTH), np.float16)
    a = unit(rng.standard_normal((n_pairs, WIDTH), np.float32))
    aside = rng.standard_normal((n_pairs, WIDTH), np.float32)
    aside = unit(aside - a * np.einsum("nd,nd->n", a, aside)[:, None])
    cosine = rng.uniform(0.6, 0.99, (n_pairs, 1)).astype(np.float32)
    rows[place[:n_pairs]], rows[place[n_pairs : 2 * n_pairs]] = a, unit(a * cosine + aside * np.sqrt(1 - cosine**2))
    weight = np.random.default_rng([seed, 99]).pareto(PARETO, N_CONCEPTS) + 1  # the same at every number of rows
    concept = rng.choice(N_CONCEPTS, n_rows - 2 * n_pairs, p=weight / weight.sum())
    centre = unit(rng.standard_normal((N_CONCEPTS, WIDTH), np.float32))
    noise = unit(rng.standard_normal((len(concept), WIDTH), np.float32))
    rows[place[2 * n_pairs :]] = unit(0.6 * centre[concept] + 0.8 * noise)
    return rows, np.stack([place[:n_pairs], place[n_pairs : 2 * n_pairs]], axis=1)


def write_rows(folder: Path, n_rows: int | None, seed: int, data: Path | None) -> None:
    """An embeddings artifact, and ``pairs.npy``: the planted pairs with the cosine of the stored rows."""
    if data is None:
        rows, pairs = planted_rows(n_rows or N_ROWS, seed)
    else:
        rows, pairs = np.load(data, mmap_mode="r")[:n_rows], np.zeros((0, 2), np.int64)
    files: dict[str, list[FileInfo]] = {"pool": [], "vec": []}
    for i, start in enumerate(range(0, len(rows), PART_ROWS)):
        x = np.asarray(rows[start : start + PART_ROWS])
        x = x if x.dtype == np.float16 else unit(x)
        table = pa.table({"row_id": np.arange(start, start + len(x))})
        files["pool"].append(write_table(at(folder, "pool") / part_name(i), table))
        files["vec"].append(write_embeddings(at(folder, "vec") / part_name(i), np.arange(len(x)), x))
    head = {"config": {}, "counts": {}}
    pool = finish(at(folder, "pool"), files["pool"], {**head, "stage": "pool", "facts": {}, "inputs": {}})
    facts, made_from = (
        {"backbone": {"name": "planted"}, "width": rows.shape[1]},
        {"path": "pool/0", "digest": pool.digest},
    )
    finish(at(folder, "vec"), files["vec"], {**head, "stage": "embed", "facts": facts, "inputs": {"pool": made_from}})
    ends = (unit(rows[pairs[:, i]].astype(np.float32)).astype(np.float64) for i in range(2))
    np.savez(folder / "pairs.npz", pairs=pairs, cosine=np.einsum("nd,nd->n", *ends))


def at(folder: Path, step: str) -> Location:
    """Where an artifact is."""
    return Location(str(folder / step / "0"))


def join(folder: Path) -> dict[str, Any]:
    """Run the stage: seconds in all and by phase, facts, memory, and the recall of the planted pairs by cosine."""
    executor = RayExecutor(Resources(workers=WORKERS))
    try:
        for _ in executor.map(time.sleep, [0.3] * 4 * WORKERS):  # the workers are there
            pass
        out = Output(at(folder, "near"), executor)
        config = NeighborsConfig(min_similarity=MIN_SIMILARITY, method="cells")
        start = time.perf_counter()
        neighbors.run(config, {"embeddings": Artifact(at(folder, "vec"))}, out, executor)
        seconds = time.perf_counter() - start
        workers = [most_mb(pid) for pid in ray_workers()]
    finally:
        executor.close()
    [scratch] = Path(str(out.scratch("").path)).glob("join-*")
    sizes = {f"{kind}_bytes": bytes_below(scratch / kind) for kind in SHUFFLED}
    phases = {name.removesuffix("_seconds"): value for name, value in out.log.items() if name.endswith("_seconds")}
    memory = {"worker_mb": max(workers), "peak_mb": max([*workers, most_mb(os.getpid())])}
    return {"seconds": seconds, **phases, **memory, **sizes, "facts": dict(out.facts)}


def bytes_below(folder: Path) -> int:
    """What its files hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def recall_of(folder: Path) -> dict[str, float]:
    """The recall of the planted pairs at or above the threshold, over all and by cosine, both directions counted."""
    planted = np.load(folder / "pairs.npz")
    pairs, cosine = planted["pairs"], planted["cosine"]
    if not len(pairs):
        return {}
    found = edge_keys(folder)
    there = np.stack([np.isin(key(*ends), found) for ends in (pairs.T, pairs.T[::-1])]).mean(axis=0)
    recall = {"recall": float(there[cosine >= MIN_SIMILARITY].mean())}
    for low, high in BINS:
        inside = (cosine >= low) & (cosine < high)
        recall[f"recall_{round(100 * low):03d}_{round(100 * high):03d}"] = float(there[inside].mean())
    return recall


def key(row: np.ndarray, near_row: np.ndarray) -> np.ndarray:
    """One int64 for an edge."""
    return (row.astype(np.int64) << 32) | near_row


def edge_keys(folder: Path) -> np.ndarray:
    """int64 (m,): all edges that were found."""
    parts = range(len(Artifact(at(folder, "vec")).parts))
    tables = [read_table(at(folder, "near") / part_name(i)) for i in parts]
    rows = [table["row"].to_numpy() + np.int64(i * PART_ROWS) for i, table in enumerate(tables)]
    near = [table["near_row"].to_numpy() for table in tables]
    return key(np.concatenate(rows), np.concatenate(near))


def exact(folder: Path, seed: int) -> dict[str, Any]:
    """Exact search of SAMPLED rows: seconds for all rows, and the edges of the sampled ones as keys."""
    import faiss

    faiss.omp_set_num_threads(WORKERS)
    x = np.concatenate([part.read()[1] for part in embedding_parts(Artifact(at(folder, "vec")))])
    rows = np.sort(np.random.default_rng([seed, 1]).choice(len(x), min(SAMPLED, len(x)), replace=False))
    queries, k = x[rows], NeighborsConfig(min_similarity=1).n_neighbors
    faiss.knn(queries[:64], x[:1024], k, metric=faiss.METRIC_INNER_PRODUCT)  # its threads are there
    start = time.perf_counter()
    similarity, near = faiss.knn(queries, x, k, metric=faiss.METRIC_INNER_PRODUCT)
    seconds = time.perf_counter() - start
    wanted = (similarity >= MIN_SIMILARITY) & (near != rows[:, None])
    edges = key(np.repeat(rows, wanted.sum(axis=1)), near[wanted])
    return {"seconds": seconds * len(x) / len(rows), "edges": edges, "rows": len(x), "width": x.shape[1]}


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(work, args)


def joined(folder: Path, n_rows: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Rows made, an exact search before and after the join of them, all measured."""
    apart(write_rows, folder, n_rows, args.seed, args.data)
    before = apart(exact, folder, args.seed)
    ours = apart(join, folder)
    after = apart(exact, folder, args.seed)
    edges = before["edges"]
    ours["recall_sampled"] = float(np.isin(edges, edge_keys(folder)).mean()) if len(edges) else None
    ours["peer_seconds"] = (before["seconds"] + after["seconds"]) / 2
    return {**ours, **recall_of(folder), "rows": before["rows"], "width": before["width"]}


def run_join(case: str, found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row of the table for a join, and the floors it missed."""
    facts = found["facts"]
    ratio = found["peer_seconds"] / found["seconds"]
    row = {
        "case": case,
        "ours": found["rows"] / found["seconds"],
        "peer": found["rows"] / found["peer_seconds"],
        "peer_name": "faiss.knn, 2 threads, sampled rows",
        "ratio": ratio,
        "unit": "rows/s",
        **{
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in found.items()
            if name != "facts"
        },
        **{name: facts[name] for name in ("nlist", "nprobe")},
        "recall_told": facts["recall"],
    }
    missed = [f"{name} {value:.4f} is below {LEAST_BIN}" for name, value in row.items()
              if name.startswith("recall_0") and value < LEAST_BIN]  # fmt: skip
    recall = found.get("recall", found["recall_sampled"])
    if recall is not None and recall < LEAST_RECALL:
        missed.append(f"recall {recall:.4f} is below {LEAST_RECALL}")
    if found["rows"] >= LEAST_ROWS and ratio < LEAST_RATIO:
        missed.append(f"ratio {ratio:.1f} is below {LEAST_RATIO}")
    if found["peak_mb"] > MOST_MB:
        missed.append(f"peak_mb {found['peak_mb']} is above {MOST_MB}")
    return row, [f"{case}: {line}" for line in missed]


def run_growth(few: dict[str, Any], many: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row of the table for the growth between two joins, and the floors it missed."""

    def exponent(phase: str) -> float:
        return math.log(many[phase] / few[phase]) / math.log(many["rows"] / few["rows"])

    for found in (few, many):
        found["join"] = found["seconds"] - found["train"] - found["assign"]
    row = {
        "case": "growth",
        "ours": exponent("join"),
        "peer": 2.0,
        "peer_name": "exact search",
        "ratio": MOST_EXPONENT / exponent("join"),
        "unit": "exponent",
        "rows": many["rows"],
        **{f"exponent_{phase}": round(exponent(phase), 3) for phase in ("train", "assign", "scan")},
        **{f"{phase}_seconds": round(many[phase], 2) for phase in ("join", "train", "assign", "scan")},
        "peak_mb": many["peak_mb"],
        **{f"nprobe_{name}": found["facts"]["nprobe"] for name, found in (("few", few), ("many", many))},
        "worker_growth_mb": round(many["worker_mb"] - few["worker_mb"], 1),
    }
    missed = []
    if few["rows"] >= LEAST_ROWS and row["ours"] > MOST_EXPONENT:
        missed.append(f"growth: exponent {row['ours']:.2f} is above {MOST_EXPONENT}")
    return row, missed


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", nargs="+", choices=["join-1m", "growth"], default=["join-1m", "growth"])
    args = parser.parse_args()
    rows, missed = [], []
    found = {}
    for share in (1, 4)[: 2 if "growth" in args.cases else 1]:
        n_rows = (args.rows or (None if args.data else N_ROWS)) or len(np.load(args.data, mmap_mode="r"))
        with tempfile.TemporaryDirectory() as folder:
            found[share] = joined(Path(folder), n_rows // share, args)
    if "join-1m" in args.cases:
        row, lines = run_join("join-1m", found[1])
        rows.append(row)
        missed += lines
    if "growth" in args.cases:
        row, lines = run_growth(found[4], found[1])
        rows.append(row)
        missed += lines
    return report(rows, args, missed)


if __name__ == "__main__":
    sys.exit(main())
