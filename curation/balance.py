"""How even the clusters of a hierarchy are, before and after sampling: numbers of a bounded size for any hierarchy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from curation.sampling import level_sums

N_RANKS = 64  # places of a curve of sizes by rank


def level_balance(before: np.ndarray, after: np.ndarray, upper_labels: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Of each level, the finest first: how even its clusters are before and after.

    before, after: int (n_leaves,), rows of each level-0 cluster and images drawn from it; upper_labels as in
    ``leaf_quotas``. Clusters without rows before are left out. ``ranks``: places in the order of size, the largest is
    1; see ``balance``. Holds about 60 bytes for each cluster of all levels.
    """
    levels = []
    for rows, drawn in zip(*(level_sums(sizes, upper_labels)[0] for sizes in (before, after)), strict=True):
        filled = rows > 0
        ranks = np.unique(np.geomspace(1, max(filled.sum(), 1), N_RANKS).round().astype(np.int64))
        levels.append({
            "clusters": int(filled.sum()), "ranks": ranks.tolist(),
            "before": balance(rows[filled], ranks), "after": balance(drawn[filled], ranks),
        })  # fmt: skip
    return levels


def balance(sizes: np.ndarray, ranks: np.ndarray) -> dict[str, Any]:
    """How even sizes int (k,) are, empty ones too.

    ``images``: their sum. ``effective``: how many equal ones have the same entropy, exp(H). ``gini``: 0 when all are
    equal, towards 1 when one has all. ``kl_to_uniform``: ln k - H, in nats. ``sizes``: how many lie from a power of two
    to the next, as (lowest, highest, number). ``at_ranks``: the sizes at places ``ranks`` from 1, largest first.
    Without images nothing is even or uneven: effective and gini and the divergence are 0.
    """
    falling = np.sort(sizes)[::-1]
    total, k = int(sizes.sum()), len(sizes)
    p = falling[falling > 0] / max(total, 1)
    entropy = float(-(p * np.log(p)).sum())
    place = np.arange(k, 0, -1, dtype=np.float64)  # of the smallest: 1
    gini = 2 * float((place * falling).sum()) / (k * total) - (k + 1) / k if total else 0.0
    return {
        "images": total,
        "effective": float(np.exp(entropy)) if total else 0.0,
        "gini": gini,
        "kl_to_uniform": max(float(np.log(k)) - entropy, 0.0) if total else 0.0,
        "sizes": size_bins(sizes),
        "at_ranks": falling[np.minimum(ranks, k) - 1].tolist() if k else [],
    }


def size_bins(sizes: np.ndarray) -> list[tuple[int, int, int]]:
    """(lowest, highest, number) for every power of two up to the largest size; 0 has a bin of its own."""
    bits = np.frexp(sizes.astype(np.float64))[1]  # how many a size has; 0 has none
    counts = np.bincount(bits, minlength=1)
    return [(1 << b >> 1, max((1 << b) - 1, 0), n) for b, n in enumerate(counts.tolist())]
