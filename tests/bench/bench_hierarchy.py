"""Hierarchical k-means with resampling beside one k-means of FAISS.

mixture-384  50,000 rows of a heavy-tailed mixture (see bench_kmeans), or of ``--data``; levels of 1,000 and 100
             clusters, each resampled 10 times from the 25 and 5 rows closest to every centroid; at most 50 steps a run

The peer does one ``faiss.Kmeans(1000, niter=50)`` of the same rows: the hierarchy is 22 k-means runs, of which the
first is on all rows. Two threads for both; ours: two parts, a thread of one math thread each, as two workers of the
pipeline.

``objective`` is that of the first clustering relative to FAISS's, ``kl`` the divergence in nats of the final centroids
from a uniform density: LEADERS rows are spread over the support, each the farthest one from those before, and ``kl``
compares the share of the centroids nearest to each with 1 / LEADERS. ``kl_to_the_end`` is that with tolerance 0. Both
are means over ``--kl-seeds`` seeds, because one seed differs from the next by a tenth; ``kl_noise`` is the standard
error of their difference.
"""

import sys
from functools import partial
from typing import Any

import numpy as np
from bench_kmeans import THREADS, WIDTH, ThreadExecutor, blas_core, by_faiss, in_turns, mixture, objective
from common import arguments, peak_mb, report
from threadpoolctl import threadpool_limits

from curation.hierarchy import HeldLevel, fit_level
from curation.kmeans import TOLERANCE, Lloyd, fit
from curation.nearest import nearest_centroid
from curation.rows import ArrayRows

N_ROWS = 50_000
LEVELS = ((1000, 25), (100, 5))  # clusters, rows kept of each
N_RESAMPLES = 10
N_ITER = 50
LEADERS = 100
LEAST_RATIO = 0.4
MOST_OBJECTIVE = 1.005
MOST_NOISE = 2.0  # standard errors that kl may be above that with tolerance 0


def halves(x: np.ndarray) -> list[ArrayRows]:
    """A part for each worker."""
    return [ArrayRows(half) for half in np.array_split(x, THREADS)]


def hierarchy(x: np.ndarray, seed: int, tol: float) -> list[np.ndarray]:
    """The centroids of all levels."""
    found, how = [x], Lloyd(n_iter=N_ITER, tol=tol)
    with threadpool_limits(1):
        for t, (k, size) in enumerate(LEVELS):
            found.append(
                fit_level(
                    halves(found[-1]), k, N_RESAMPLES, size,
                    seed_key=(seed, t), executor=ThreadExecutor(), how=how, trail=HeldLevel(),
                )
            )  # fmt: skip
    return found[1:]


def leaders(x: np.ndarray) -> np.ndarray:
    """Rows spread over the support: the first, then always the one that is farthest from all before."""
    chosen, nearest = [0], np.full(len(x), np.inf)
    while len(chosen) < LEADERS:
        np.minimum(nearest, ((x - x[chosen[-1]]) ** 2).sum(axis=1), out=nearest)
        chosen.append(int(nearest.argmax()))
    return x[chosen]


def kl_to_uniform(centroids: np.ndarray, spread: np.ndarray) -> float:
    """How far the shares of centroids near each leader are from equal ones, in nats."""
    share = np.bincount(nearest_centroid(centroids, spread)[0], minlength=len(spread)) / len(centroids)
    return float(np.log(len(spread)) + np.sum(share * np.log(np.maximum(share, 1e-300))))


def main() -> int:
    """Run the case."""
    parser = arguments(str(__doc__))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kl-seeds", type=int, default=4, help="hierarchies with each tolerance that kl is a mean of")
    args = parser.parse_args()
    x = np.load(args.data).astype(np.float32) if args.data else mixture(args.rows or N_ROWS, WIDTH, args.seed)
    k = LEVELS[0][0]
    start = x[np.sort(np.random.default_rng([args.seed, 1]).choice(len(x), k, replace=False))].copy()
    by_faiss(x[:1000], start[:20], 2)
    hierarchy(x[: 2 * k], args.seed, 0.5)  # compiled, imported
    seconds, found = in_turns(
        {"ours": partial(hierarchy, x, args.seed, TOLERANCE), "peer": partial(by_faiss, x, start, N_ITER)}, args.repeats
    )
    with threadpool_limits(1):
        first = fit(halves(x), k, (args.seed, 0, 0), ThreadExecutor(), Lloyd(n_iter=N_ITER)).centroids
    spread, seeds = leaders(x), range(args.seed, args.seed + args.kl_seeds)
    kl = {tol: [kl_to_uniform(hierarchy(x, seed, tol)[0], spread) for seed in seeds] for tol in (TOLERANCE, 0.0)}
    noise = np.sqrt(sum(np.var(values, ddof=1) / len(values) for values in kl.values())) if len(seeds) > 1 else np.nan
    row: dict[str, Any] = {
        "case": "mixture-384" if not args.data else args.data.stem,
        "ours": seconds["ours"],
        "peer": seconds["peer"],
        "peer_name": f"faiss.Kmeans({k}, niter={N_ITER})",
        "ratio": seconds["peer"] / seconds["ours"],
        "unit": "s",
        "rows": len(x),
        "threads": THREADS,
        "objective": objective(x, first) / objective(x, found["peer"]),
        "kl": float(np.mean(kl[TOLERANCE])),
        "kl_to_the_end": float(np.mean(kl[0.0])),
        "kl_noise": float(noise),
        "kl_first": kl_to_uniform(first, spread),
        "blas": blas_core(),
        "peak_mb": peak_mb(),
    }
    missed = []
    if row["ratio"] < LEAST_RATIO:
        missed.append(f"{row['ratio']:.2f} times the peer, less than {LEAST_RATIO:g}")
    if row["objective"] > MOST_OBJECTIVE:
        missed.append(f"objective {row['objective']:.5f}, more than {MOST_OBJECTIVE:g}")
    if row["kl"] > row["kl_to_the_end"] + MOST_NOISE * row["kl_noise"]:
        missed.append(f"kl {row['kl']:.4f}, more than with tolerance 0: {row['kl_to_the_end']:.4f}")
    return report([row], args, missed)


if __name__ == "__main__":
    sys.exit(main())
