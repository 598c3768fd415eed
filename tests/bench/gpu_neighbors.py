"""The part ``neighbors`` of ``bench_gpu``: the k-NN join on one GPU, by torch alone from vectors to edges.

Rows as those of ``bench_neighbors``: half have one planted partner at a cosine uniform in [.6, .99], the others lie in
concepts. They are made on the device and stay there as float16.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

import curation.signatures as signing
from curation import scan_torch
from curation.cells import TRAIN_ITERATIONS, cells_for, sample_rows
from curation.finders import FaissOnGpu, TorchFinder, faiss_has_gpu
from curation.neighbors import UNIT_ROUNDOFF
from curation.scan_torch import Tile, compare
from curation.signatures import COORDINATES, LARGE, Limits, directions, limits_at, signature_distances

MIN_SIMILARITY, MOST = 0.6, 256  # candidates of a row: 4 for each of 64 neighbours, as the stage lists
N_CONCEPTS, PARETO = 2000, 1.5
BLOCK_ROWS = 2**16  # made, signed or assigned at once
MEMBER_ROWS = 2**20  # whose cells are sorted at once
PROBED = 256  # cells of a row that are looked at to choose nprobe
ASKED_PAIRS = 4096  # planted pairs, for the same
PLANTED_RECALL = 0.995  # that nprobe is chosen for
VERIFIED_PAIRS = 2**19
WAITING_EDGES = 2**26
CHECKED_ROWS = 300
QUERIES, CANDIDATES = 4096, 80  # of the exact search: 64 neighbours and what is asked for beyond
LEAST_RECALL = 0.99
Tensor = torch.Tensor


class Size(NamedTuple):
    """How much of everything."""

    rows: int
    width: int
    exact_rows: int  # base of the exact search
    seconds: float  # after which no other cell is scanned, so that the run ends


FULL = Size(10_000_000, 768, 1_000_000, 330.0)
TINY = Size(6000, 64, 3000, 60.0)


class Planted(NamedTuple):
    """Rows float16 (n, d), of which row i and row i + len(cosine) are partners at ``cosine`` (n // 4,)."""

    x: Tensor
    cosine: Tensor


class Cells(NamedTuple):
    """Which rows lie in a cell, some rows of the pool at a time: their ids by cell, and where cells begin."""

    rows: list[Tensor]
    bounds: list[list[int]]

    def of(self, cell: int) -> Tensor:
        """int64 (n,)."""
        some = [rows[b[cell] : b[cell + 1]] for rows, b in zip(self.rows, self.bounds, strict=True)]
        return torch.cat(some).long()


def unit(x: Tensor) -> Tensor:
    """Rows float32 of length 1."""
    return torch.nn.functional.normalize(x.float())


def planted_rows(n: int, width: int, device: str, seed: int) -> Planted:
    """Made block by block."""
    rng, random = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return unit(torch.randn(rows, width, device=device, generator=random))

    x, n_pairs = torch.empty(n, width, dtype=torch.float16, device=device), n // 4
    cosine = torch.empty(n_pairs, device=device)
    for start in range(0, n_pairs, BLOCK_ROWS):
        end = min(n_pairs, start + BLOCK_ROWS)
        a, aside = normal(end - start), normal(end - start)
        aside = unit(aside - a * (a * aside).sum(1, keepdim=True))
        drawn = 0.6 + 0.39 * torch.rand(end - start, 1, device=device, generator=random)
        x[start:end], x[n_pairs + start : n_pairs + end] = a, drawn * a + (1 - drawn**2).sqrt() * aside
        cosine[start:end] = (unit(x[start:end]) * unit(x[n_pairs + start : n_pairs + end])).sum(1)
    weight = rng.pareto(PARETO, N_CONCEPTS) + 1
    centre = normal(N_CONCEPTS)
    for start in range(2 * n_pairs, n, BLOCK_ROWS):
        end = min(n, start + BLOCK_ROWS)
        concept = torch.from_numpy(rng.choice(N_CONCEPTS, end - start, p=weight / weight.sum())).to(device)
        x[start:end] = unit(0.6 * centre[concept] + 0.8 * normal(end - start))
    return Planted(x, cosine)


def signed(x: Tensor, seed: int) -> Tensor:
    """int64 (n, 16): ``curation.signatures.signatures`` without numba; a coordinate at a border may fall otherwise."""
    y = unit(x) @ torch.from_numpy(directions(x.shape[1], seed).copy()).to(x.device)
    signs = y > 0
    turned = signs ^ (y.abs() < LARGE * y.square().mean(1, keepdim=True).sqrt())
    bits = torch.cat([signs, turned], dim=1).view(len(x), -1, 8).byte()
    return (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(2, dtype=torch.uint8).view(torch.int64)


def limits_of(width: int, seed: int) -> Limits:
    """``limits_at`` of signatures that torch makes."""

    def by_torch(x: np.ndarray, seed: int) -> np.ndarray:
        return signed(torch.from_numpy(x), seed).numpy().view(np.uint64)

    with patch.object(signing, "signatures", by_torch):
        return limits_at(MIN_SIMILARITY, width, seed)


def blocks(n: int, rows: int = BLOCK_ROWS) -> Iterator[slice]:
    """Ranges of so many rows."""
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def nearest_cells(x: Tensor, centroids: Tensor, k: int) -> Tensor:
    """int32 (n, k), the nearest first; products of float16 on a GPU."""
    dtype = torch.float32 if x.device.type == "cpu" else torch.float16
    there = centroids.to(dtype).T.contiguous()
    return torch.cat([(x[at].to(dtype) @ there).topk(k, dim=1).indices.int() for at in blocks(len(x))])


def train(x: Tensor, nlist: int, seed: int) -> Tensor:
    """Unit centroids float32 (nlist, d), by spherical k-means on as many rows as the stage takes."""
    rng = np.random.default_rng(seed)
    at = torch.from_numpy(rng.choice(len(x), sample_rows(len(x), x.shape[1], nlist), replace=False)).to(x.device)
    sample = unit(x[at])
    centroids = sample[:nlist].clone()
    for _ in range(TRAIN_ITERATIONS):
        labels = nearest_cells(sample, centroids, 1)[:, 0].long()
        sums = torch.zeros_like(centroids).index_add_(0, labels, sample)
        centroids = torch.where(sums.any(1, keepdim=True), unit(sums), centroids)
    return centroids


def choose_nprobe(planted: Planted, centroids: Tensor) -> int:
    """As few cells a row as find PLANTED_RECALL of the planted pairs, PROBED at most."""
    n_pairs, most = len(planted.cosine), min(PROBED, len(centroids))
    n = min(ASKED_PAIRS, n_pairs)
    a, b = (nearest_cells(planted.x[first : first + n], centroids, most) for first in (0, n_pairs))
    rank = torch.arange(1, most + 1, device=a.device)
    both = torch.maximum(rank[:, None], rank[None, :])
    needed = [torch.where(a[i, :, None] == b[i, None, :], both, most).min() for i in range(n)]
    wanted = torch.stack(needed).sort().values
    return int(wanted[min(n - 1, int(PLANTED_RECALL * n))])


def assign(x: Tensor, centroids: Tensor, nprobe: int) -> Cells:
    """Every row in its nearest cells."""
    rows, bounds, ends = [], [], torch.arange(len(centroids) + 1, device=x.device, dtype=torch.int32)
    for at in blocks(len(x), MEMBER_ROWS):
        cell, order = nearest_cells(x[at], centroids, nprobe).view(-1).sort()
        rows.append((order // nprobe + at.start).int())
        bounds.append(torch.searchsorted(cell, ends).tolist())
    return Cells(rows, bounds)


class Edges:
    """Pairs at or above the threshold, as keys ``row * rows + near row``, each once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.keys = torch.empty(0, dtype=torch.int64, device=x.device)
        self.waiting: list[Tensor] = []
        self.n_waiting = 0

    def offer(self, a: Tensor, b: Tensor) -> None:
        """Verify pairs by their vectors."""
        for at in blocks(len(a), VERIFIED_PAIRS):
            near = (unit(self.x[a[at]]) * unit(self.x[b[at]])).sum(1) >= MIN_SIMILARITY
            self.waiting.append(a[at][near] * len(self.x) + b[at][near])
            self.n_waiting += len(self.waiting[-1])
        if self.n_waiting > WAITING_EDGES:
            self.settle()

    def settle(self) -> None:
        """Each once, ascending."""
        self.keys = torch.cat([self.keys, *self.waiting]).unique()
        self.waiting, self.n_waiting = [], 0

    def recall(self, planted: Planted) -> float:
        """The share of the planted pairs, both directions counted."""
        n_pairs = len(planted.cosine)
        a = torch.arange(n_pairs, device=self.x.device)[planted.cosine >= MIN_SIMILARITY]
        found = [torch.isin(i * len(self.x) + j, self.keys).float().mean() for i, j in ((a, a + n_pairs),
                                                                                      (a + n_pairs, a))]  # fmt: skip
        return float(sum(found) / 2)


class Scan(NamedTuple):
    """What was scanned."""

    edges: Edges
    n_pairs: int  # products of two signatures
    n_candidates: int
    n_cells: int


def tiles_of(ids: Tensor, signatures: Tensor) -> list[Tile]:
    """The rows of a cell in tiles."""
    return [Tile(ids[at], signatures[ids[at]]) for at in blocks(len(ids), scan_torch.TILE_ROWS)]


def scan(x: Tensor, signatures: Tensor, cells: Cells, limits: Limits, until: float) -> Scan:
    """Scan the cells and verify what is found, cell by cell until the clock says ``until``."""
    edges, n_pairs, n_candidates, n_cells = Edges(x), 0, 0, len(cells.bounds[0]) - 1
    for cell in range(n_cells):
        if time.perf_counter() > until:
            n_cells = cell
            break
        tiles = tiles_of(cells.of(cell), signatures)
        compare(tiles, tiles, limits, MOST)
        sizes = [len(tile.ids) for tile in tiles]
        n_pairs += (sum(sizes) ** 2 + sum(size**2 for size in sizes)) // 2
        for tile in tiles:
            a, b, _ = tile.nearest(MOST)
            n_candidates += len(a)
            edges.offer(a, b)
    edges.settle()
    return Scan(edges, n_pairs, n_candidates, n_cells)


def is_right(cells: Cells, signatures: Tensor, limits: Limits) -> bool:
    """Whether rows of a cell find what the definition on a CPU says."""
    largest = max(range(len(cells.bounds[0]) - 1), key=lambda cell: sum(b[cell + 1] - b[cell] for b in cells.bounds))
    ids = cells.of(largest)[:CHECKED_ROWS]
    bits, host = signatures[ids].cpu().numpy().view(np.uint64), ids.cpu().numpy()
    tiles = tiles_of(ids, signatures)
    compare(tiles, tiles, limits, len(ids))
    found = {pair for tile in tiles for pair in zip(*(c.tolist() for c in tile.nearest(len(ids))), strict=True)}
    i, j = (at.ravel() for at in np.indices((len(ids), len(ids))))
    told = signature_distances(bits[i], bits[j])
    near = (i != j) & np.all([d <= most for d, most in zip(told, limits, strict=True)], axis=0)
    return found == set(zip(host[i[near]].tolist(), host[j[near]].tolist(), told[2][near].tolist(), strict=True))


def timed(device: str, seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """The result of work that the device has ended; its seconds are noted."""
    start = time.perf_counter()
    found = work()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds[f"{name}_seconds"] = time.perf_counter() - start
    return found


def join(size: Size, device: str, seed: int, peak: float) -> dict[str, Any]:
    """Vectors to edges: the row of the table. ``ratio``: share of the peak that products of signatures make up."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    planted = planted_rows(size.rows, size.width, device, seed)
    x, limits, nlist = planted.x, limits_of(size.width, seed), cells_for(size.rows)
    took: dict[str, float] = {}
    centroids = timed(device, took, "train", lambda: train(x, nlist, seed))
    nprobe = timed(device, took, "choose", lambda: choose_nprobe(planted, centroids))
    cells = timed(device, took, "assign", lambda: assign(x, centroids, nprobe))
    words = timed(device, took, "sign", lambda: torch.cat([signed(x[at], seed) for at in blocks(len(x))]))
    right = is_right(cells, words, limits)
    until = time.perf_counter() + size.seconds
    done = timed(device, took, "scan", lambda: scan(x, words, cells, limits, until))
    rate = 2 * COORDINATES * done.n_pairs / took["scan_seconds"]
    return {
        "ours": len(done.edges.keys) / sum(took.values()), "unit": "edges/s", "equal": right,
        "peer_name": "products at the measured peak", "ratio": rate / peak, "products_tops": rate / 1e12,
        "rows": size.rows, "width": size.width, "nlist": nlist, "nprobe": nprobe, "edges": len(done.edges.keys),
        "pairs": done.n_pairs, "candidates": done.n_candidates, "cells_scanned": done.n_cells,
        "recall": done.edges.recall(planted), **{name: round(s, 3) for name, s in took.items()},
    }  # fmt: skip


def tile(device: str, seed: int, peak: float, side: int, seconds: Callable[..., float]) -> dict[str, Any]:
    """Two tiles of random signatures: products alone, and with all that is asked of them, of which few pass."""
    rng = np.random.default_rng(seed)
    a, b = (Tile(torch.arange(side, device=device) + i * side,
                 torch.from_numpy(rng.integers(-(2**63), 2**63, (side, 16))).to(device)) for i in range(2))  # fmt: skip
    limits, flops = limits_of(COORDINATES, seed), 2 * COORDINATES * side**2
    products = seconds(lambda: torch._int_mm(a.coordinates, b.coordinates.T), 20, device)
    all_of_it = seconds(lambda: scan_torch.near_pairs(a, b, limits), 20, device)
    return {"ours": flops / all_of_it / 1e12, "peer": flops / products / 1e12, "peer_name": "its int8 products alone",
            "unit": "TOP/s", "ratio": products / all_of_it, "rows": side, "of_peak": flops / all_of_it / peak,
            "products_of_peak": flops / products / peak}  # fmt: skip


def exact(size: Size, device: str, seed: int, seconds: Callable[..., float]) -> dict[str, Any]:
    """The torch kernel of an exact search beside FAISS on the same GPU, or why that could not run."""
    x = unit(planted_rows(size.exact_rows, size.width, device, seed).x).cpu().numpy()
    queries = np.ascontiguousarray(x[:QUERIES])
    finder = TorchFinder(x, device)
    score = finder.best(queries, CANDIDATES)[0]
    few = finder.there(queries[:16]).double()
    truth = torch.cat([few @ finder.base[at].double().T for at in blocks(len(x))], dim=1).topk(CANDIDATES).values
    bound = (size.width + 2) * UNIT_ROUNDOFF * 1.01
    right = np.abs(truth.cpu().numpy() - score[:16]).max() <= bound
    ours = seconds(lambda: finder.best(queries, CANDIDATES), 3, device)
    flops = 2 * len(queries) * x.size
    row = {"ours": flops / ours / 1e12, "unit": "TFLOP/s, float32", "rows": len(x), "width": size.width,
           "queries": len(queries), "k": CANDIDATES}  # fmt: skip
    why = faiss_missing()
    if why:
        return {**row, "peer_name": "none", "faiss": why, "equal": bool(right)}
    found, theirs = faiss_on_gpu(x, queries, device, seconds)
    right &= bool(np.abs(found - score).max() <= 2 * bound)
    name = min(theirs, key=lambda name: theirs[name])
    return {**row, "peer": flops / theirs[name] / 1e12, "peer_name": f"faiss {name}", "ratio": theirs[name] / ours,
            "equal": bool(right), **{f"{name}_seconds": s for name, s in theirs.items()}}  # fmt: skip


def faiss_missing() -> str:
    """Why FAISS cannot use a GPU here; nothing when it can."""
    try:
        import faiss
    except ImportError as e:
        return f"{type(e).__name__}: {e}"
    return "" if faiss_has_gpu() else f"faiss {faiss.__version__} sees no GPU"


def faiss_on_gpu(
    x: np.ndarray, queries: np.ndarray, device: str, seconds: Callable[..., float]
) -> tuple[np.ndarray, dict[str, float]]:
    """Scores, and seconds of two ways: with the base sent along, as the package calls it, and with the base there."""
    import faiss

    sent = FaissOnGpu(x, device)
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), x.shape[1])
    index.add(x)
    ways = {"knn_gpu": lambda: sent.best(queries, CANDIDATES), "index": lambda: index.search(queries, CANDIDATES)}
    return sent.best(queries, CANDIDATES)[0], {name: seconds(work, 3, device) for name, work in ways.items()}
