"""The part ``assign`` of ``bench_gpu``: rows to their nearest centroids on one GPU, and a step of k-means.

Unit rows around concepts, of which few have most of the rows, with noise of heavy tails; made on the device, kept there
as float16. The centroids are those of two steps of k-means from rows drawn at random.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_neighbors import blocks, unit

from curation import nearest_torch
from curation.nearest_torch import ROWS, Found, TorchTarget, torch_target

PARETO, FREEDOM = 1.5, 5.0  # of the sizes of concepts; of Student's t, whose tails rows have
STEPS = 2  # of k-means, before
LEAST_EQUAL = 0.9999  # share of rows with the label of exact distances
MOST_FARTHER = 1e-5  # relative squared distance of the others
RATIO_AIM = 0.6  # share of the measured peak
CHECKED_AT_ONCE = 1000
BLOCK_ROWS = 4096  # rows that k-means hands over at a time
SMALL = (3000, 700, 100)  # rows, centroids and width of the case that is compared with the exact kernel
TRITON_ERRORS: tuple[type[Exception], ...] = ()
if importlib.util.find_spec("triton") is not None:
    from triton.errors import TritonError

    TRITON_ERRORS = (TritonError,)  # a kernel that cannot be compiled or takes too much; no RuntimeError
Tensor = torch.Tensor
Seconds = Callable[..., float]


class Size(NamedTuple):
    """How much of everything."""

    rows: int
    width: int
    clusters: int
    checked: int  # rows whose labels are compared with exact ones


FULL = Size(1_000_000, 1024, 100_000, 20_000)
TINY = Size(3000, 48, 200, 500)


class Given(NamedTuple):
    """Rows, centroids, and what the last step of k-means took."""

    x: Tensor  # float16 (n, d), on the device
    centroids: np.ndarray  # float32 (k, d)
    took: dict[str, float]


def mixture_rows(size: Size, device: str, seed: int) -> Tensor:
    """float16 (n, d), made block by block."""
    rng, random = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
    n_concepts = size.clusters // 4
    weight = rng.pareto(PARETO, n_concepts) + 1
    centre = unit(torch.randn(n_concepts, size.width, device=device, generator=random))
    x = torch.empty(size.rows, size.width, dtype=torch.float16, device=device)
    for at in blocks(size.rows, ROWS):
        n = at.stop - at.start
        concept = torch.from_numpy(rng.choice(n_concepts, n, p=weight / weight.sum())).to(device)
        scale = torch.from_numpy(np.sqrt(FREEDOM / rng.chisquare(FREEDOM, (n, 1))).astype("f4")).to(device)
        noise = unit(torch.randn(n, size.width, device=device, generator=random))
        x[at] = unit(0.6 * centre[concept] + 0.8 * scale * noise)
    return x


def step(x: Tensor, centroids: np.ndarray, device: str) -> tuple[np.ndarray, dict[str, float]]:
    """The next centroids, by sums in float64 on the device, and the seconds of each piece."""
    clock = [time.perf_counter()]

    def lap() -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    target = torch_target(centroids, device)
    lap()
    labels = target.find(x).labels
    lap()
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
    for at in blocks(len(x), ROWS):
        sums.index_add_(0, labels[at], x[at].double())
    sizes = torch.bincount(labels, minlength=len(centroids))[:, None]
    moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), target.centroids.double()).float().cpu().numpy()
    lap()
    pieces = np.diff(clock).tolist()
    return moved, dict(zip(("prepare_seconds", "assign_seconds", "sums_seconds"), pieces, strict=True))


def given(size: Size, device: str, seed: int) -> Given:
    """Rows, and centroids as a step of k-means meets them."""
    x = mixture_rows(size, device, seed)
    drawn = np.sort(np.random.default_rng(seed).choice(size.rows, size.clusters, replace=False))
    centroids = x[torch.from_numpy(drawn).to(device)].float().cpu().numpy()
    took: dict[str, float] = {}
    for _ in range(STEPS):  # the first one compiles
        centroids, took = step(x, centroids, device)
    return Given(x, centroids, took)


def flops(n: int, centroids: np.ndarray) -> float:
    """Of the products of n rows and all centroids."""
    return 2.0 * n * centroids.size


def small(device: str, seed: int) -> dict[str, Any]:
    """A case that ``curation.nearest`` does too; where there is no numba, all distances in float64 do."""
    n, k, width = SMALL
    rng = np.random.default_rng(seed)
    centroids = rng.normal(size=(k, width)).astype("f4")
    centroids[k // 2 :] = centroids[: k - k // 2] + 1e-3 * rng.normal(size=(k - k // 2, width))
    x = (centroids[rng.integers(k, size=n)] + 0.5 * rng.normal(size=(n, width))).astype("f4")
    start = time.perf_counter()
    labels, sq_distance = torch_target(centroids, device).assign(x)
    took = time.perf_counter() - start
    if has_numba():
        from curation.nearest import nearest_centroid

        name, expected = "curation.nearest", nearest_centroid(x, centroids)
    else:
        name, expected = "every distance in float64", every_distance(x, centroids)
    same = float((labels == expected[0]).mean())
    near = bool(np.allclose(sq_distance, expected[1], rtol=MOST_FARTHER))
    return {"ours": same, "unit": "share of equal labels", "peer_name": name, "rows": n, "width": width, "clusters": k,
            "equal": same >= LEAST_EQUAL and near, "seconds": took}  # fmt: skip


def has_numba() -> bool:
    """Whether the exact kernel can run here."""
    try:
        return importlib.util.find_spec("numba") is not None
    except ValueError:  # a name without a module behind it
        return False


def every_distance(x: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroids and squared distances, float64; a row at a time."""
    far = centroids.astype("f8")
    distance = np.stack([((row - far) ** 2).sum(1) for row in x.astype("f8")])
    return distance.argmin(1), distance.min(1)


def exact_labels(x: Tensor, centroids: Tensor) -> Tensor:
    """int64 (n,): by products in float64, CHECKED_AT_ONCE rows at a time."""
    there = centroids.double()
    half, found = there.square().sum(1) / 2, []
    for at in blocks(len(x), CHECKED_AT_ONCE):
        found.append((x[at].double() @ there.T).sub_(half).argmax(1))
    return torch.cat(found)


def agreement(x: Tensor, found: Found, centroids: Tensor, n: int, seed: int) -> dict[str, float]:
    """Of n rows drawn at random: the share with the label of float64, and how much farther the others are at most."""
    drawn = np.sort(np.random.default_rng(seed).choice(len(x), n, replace=False))
    rows = torch.from_numpy(drawn).to(x.device)
    some, ours, exact = x[rows].float(), found.labels[rows].long(), exact_labels(x[rows], centroids)
    other = (ours != exact).nonzero()[:, 0]
    here, there = (nearest_torch.sq_distances(some[other], centroids[labels[other]]) for labels in (ours, exact))
    farther = float((here / there - 1).max()) if len(other) else 0.0
    return {"agree": 1 - len(other) / n, "farther": farther}


def assign(case: Given, size: Size, device: str, seed: int, peak: float, seconds: Seconds) -> dict[str, Any]:
    """All rows, from where they lie on the device to labels and distances there."""
    x, target = case.x, torch_target(case.centroids, device)
    found = target.find(x)
    agree = agreement(x, found, target.centroids, size.checked, seed)
    took = seconds(lambda: target.find(x), 3, device)
    rate = flops(len(x), case.centroids) / took
    few = x[:BLOCK_ROWS].float().cpu().numpy()
    many = x[:ROWS].float().cpu().numpy()
    host = {f"host_{len(block)}_tflops": flops(len(block), case.centroids) / 1e12
            / seconds(lambda block=block: target.assign(block), 3, device) for block in (few, many)}  # fmt: skip
    return {
        "ours": rate / 1e12, "unit": "TFLOP/s, 2 n k d", "peer": peak / 1e12, "peer_name": "products at the peak",
        "ratio": rate / peak, "seconds": took, "rows": len(x), "width": size.width, "clusters": size.clusters,
        "equal": agree["agree"] >= LEAST_EQUAL and agree["farther"] <= MOST_FARTHER, **agree,
        "pairs_share": found.n_pairs / len(x), "rest_share": found.n_rest / len(x), "margin": found.margin,
        "excess": found.excess, "kernel": "torch" if target.config is None else "triton", **host,
    }  # fmt: skip


def kernel(case: Given, device: str, peak: float, seconds: Seconds) -> dict[str, Any]:
    """The three highest scores of ROWS rows alone: torch, and triton by every config that fits, the best of which must
    stand first in ``nearest_triton.CONFIGS``."""
    x, target = case.x[:ROWS], TorchTarget(case.centroids, device, by_triton=False)
    low = torch.zeros(nearest_torch.padded(len(x), nearest_torch.PADDED), target.low.shape[1], dtype=torch.bfloat16,
                      device=device)  # fmt: skip
    low[: len(x), : x.shape[1]] = x.float() - target.shift
    n_flops = flops(len(x), case.centroids)
    by_torch = n_flops / seconds(lambda: target._three_highest(low, len(x)), 2, device) / 1e12
    row = {"unit": "TFLOP/s, 2 n k d", "rows": len(x), "width": x.shape[1], "clusters": len(case.centroids)}
    if torch_target(case.centroids[:1], device).config is None:
        return {**row, "ours": by_torch, "peer_name": "none", "triton": "no triton, or no GPU that it can use"}
    rates = by_configs(case.centroids, low, len(x), device, n_flops, seconds)
    best = max(rates, key=lambda name: rates[name])
    return {**row, "ours": rates[best], "peer": by_torch, "peer_name": "torch", "ratio": rates[best] / by_torch,
            "best": best, "of_peak": rates[best] * 1e12 / peak, **rates}  # fmt: skip


def by_configs(
    centroids: np.ndarray, low: Tensor, n: int, device: str, n_flops: float, seconds: Seconds
) -> dict[str, float]:
    """TFLOP/s of each, by its numbers; 0 for one that fails."""
    from curation.nearest_triton import configs_for

    target, rates = torch_target(centroids, device), {}
    for config in configs_for(low.device):
        target.config = config
        name = "x".join(str(int(number)) for number in config)
        try:
            rates[name] = n_flops / seconds(lambda: target._three_highest(low, n), 3, device) / 1e12
        except (RuntimeError, *TRITON_ERRORS) as e:
            print(f"{name}: {type(e).__name__}: {e}")
            rates[name] = 0.0
    return rates


def kmeans_step(case: Given, size: Size) -> dict[str, Any]:
    """The second step: centroids sent, rows assigned, sums in float64."""
    took = sum(case.took.values())
    return {"ours": size.rows / took, "unit": "rows/s", "peer_name": "none", "rows": size.rows, "width": size.width,
            "clusters": size.clusters, "seconds": took, **case.took}  # fmt: skip
