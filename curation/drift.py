"""How new rows lie among the clusters of older ones: in other numbers, or farther from the centroids.

Distances are counted in a histogram of a fixed size, by the first bits of a float32: its bins are 1/256 to 1/128 of a
value wide, whatever the values are. So nothing here is O(rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

SHIFT = 16  # bits of a float32 that do not count: 7 of its fraction do
N_BINS = 1 << (31 - SHIFT)  # of values that are not negative
QUANTILE = 0.99  # of the old distances: what lies beyond is far
N_BARS = 40  # of the histogram that is told
N_GROWN = 10  # clusters that are told by name


@dataclass(frozen=True, kw_only=True)
class AssignConfig:
    """From which drift on new images ask for clusters of their own."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines/, no import here

    max_far: float = 0.05  # share of new rows farther from their centroid than 99 % of the old: more means drift
    max_variation: float = 0.1  # total variation between old and new shares of a level, above chance: more means drift

    def __post_init__(self) -> None:
        for name in ("max_far", "max_variation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"assign.{name} must be in [0, 1]: got {getattr(self, name)}")


class Spread(NamedTuple):
    """Where rows lie."""

    sizes: np.ndarray  # int64 (k,), rows of each level-0 cluster
    bins: np.ndarray  # int64 (N_BINS,), rows by squared distance to their centroid
    total: float  # sum of these distances

    @staticmethod
    def zeros(n_clusters: int) -> "Spread":
        """No rows yet."""
        return Spread(np.zeros(n_clusters, np.int64), np.zeros(N_BINS, np.int64), 0.0)

    def add(self, labels: np.ndarray, sq_distance: np.ndarray) -> "Spread":
        """With more rows: labels int (n,) and squared distances float32 (n,), not negative. The arrays are changed."""
        np.add.at(self.sizes, labels, 1)
        bits = np.abs(np.ascontiguousarray(sq_distance, np.float32)).view(np.uint32)
        self.bins[:] += np.bincount(bits >> SHIFT, minlength=N_BINS)
        return self._replace(total=self.total + float(sq_distance.sum(dtype=np.float64)))

    def merge(self, other: "Spread") -> "Spread":
        """Both together, in new arrays: on a cluster the inputs are read-only."""
        return Spread(self.sizes + other.sizes, self.bins + other.bins, self.total + other.total)


def drift(
    config: AssignConfig, old: Spread, new: Spread, upper: Sequence[tuple[np.ndarray, int]] = ()
) -> dict[str, Any]:
    """What new rows have of their own, in numbers and one sentence, JSON-able and of a bounded size.

    Both must have rows. upper: of each level from 1 on the cluster of each cluster of the level below, int (k,), and
    how many clusters it has.
    ``rows``: of old and new. ``far``: the ``quantile`` of the old squared distances, rounded up to the edge of a bin,
    and the share of new rows beyond. ``mean_sq_distance`` and ``histogram``: of both, the latter as shares between
    even ``edges``. ``levels``: see ``level_drift``, finest first. ``drifted``, ``verdict``: what the config makes of
    it. Old rows may be those that the centroids were fitted to; rows that were not lie a little farther, the more so
    the fewer rows a cluster has. Holds about 100 bytes a cluster. Raises ValueError when one has no rows.
    """
    n_old, n_new = int(old.bins.sum()), int(new.bins.sum())
    if not n_old or not n_new:
        raise ValueError(f"old and new must have rows: got {n_old} and {n_new}")
    before, after = old.sizes, new.sizes
    levels = [level_drift(before, after)]
    for labels, n_clusters in upper:
        before, after = (sizes_above(sizes, labels, n_clusters) for sizes in (before, after))
        levels.append(level_drift(before, after))
    numbers: dict[str, Any] = {
        "rows": {"old": n_old, "new": n_new},
        "far": far_share(old.bins, new.bins),
        "mean_sq_distance": {"old": old.total / n_old, "new": new.total / n_new},
        "histogram": even_histogram(old.bins, new.bins),
        "levels": levels,
    }
    drifted, verdict = judge(config, numbers)
    return {**numbers, "drifted": drifted, "verdict": verdict}


def sizes_above(sizes: np.ndarray, labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """int64 (n_clusters,): sizes int64 (k,) of clusters, added by the cluster ``labels`` int (k,) that each is in."""
    above = np.zeros(n_clusters, np.int64)
    np.add.at(above, labels, sizes)
    return above


def level_drift(old: np.ndarray, new: np.ndarray) -> dict[str, Any]:
    """How far apart the shares of clusters are: old, new int64 (k,), rows of each, some in both.

    ``kl``: Kullback-Leibler divergence of the new shares from the old, in nats; for it, a cluster that has new rows but
    no old one counts as if it had one. ``total_variation``: half the sum of absolute differences, 0 to 1;
    ``by_chance``: see there. ``emptied``: clusters with old rows and no new one; ``opened``: the other way round.
    ``grown``: the clusters whose share grew most, ties to the lower, with both shares.
    """
    n_old, n_new = int(old.sum()), int(new.sum())
    p, q = new / n_new, old / n_old
    growth = p - q
    return {
        "clusters": len(old),
        "kl": divergence(old, new),
        "total_variation": float(np.abs(growth).sum()) / 2,
        "by_chance": chance_variation(old, new),
        "emptied": int(np.sum((old > 0) & (new == 0))),
        "opened": int(np.sum((old == 0) & (new > 0))),
        "grown": [{"cluster": i, "old": float(q[i]), "new": float(p[i])} for i in most_grown(growth)],
    }


def most_grown(growth: np.ndarray) -> list[int]:
    """The at most N_GROWN places of the largest positive values float64 (k,), largest first, ties to the lower."""
    least = np.partition(growth, -N_GROWN)[-N_GROWN] if len(growth) > N_GROWN else -np.inf
    some = np.flatnonzero((growth >= least) & (growth > 0))
    found: list[int] = some[np.argsort(-growth[some], kind="stable")[:N_GROWN]].tolist()
    return found


def divergence(old: np.ndarray, new: np.ndarray) -> float:
    """The ``kl`` of ``level_drift``: 0 for equal shares, never infinite."""
    held = new > 0
    base = np.where(held, np.maximum(old, 1), old)
    p, q = new[held] / new.sum(), base[held] / base.sum()
    return max(float((p * np.log(p / q)).sum()), 0.0)


def chance_variation(old: np.ndarray, new: np.ndarray) -> float:
    """The mean total variation when the rows of old and new, int64 (k,), are mixed and dealt out again.

    Of the s rows of a cluster, X are new: hypergeometric. Its mean absolute deviation is that of the binomial (de
    Moivre's closed form), less by the ratio of their standard deviations.
    """
    from scipy.special import gammaln

    n_old, n_new = int(old.sum()), int(new.sum())
    n, sizes = n_old + n_new, (old + new).astype(np.float64)
    share = n_new / n
    v = np.floor(sizes * share) + 1
    ways = gammaln(sizes + 1) - gammaln(v + 1) - gammaln(sizes - v + 1)
    mean = 2 * v * np.exp(ways + v * np.log(share) + (sizes - v + 1) * np.log1p(-share))
    mean *= np.sqrt((n - sizes) / (n - 1))
    return float(mean.sum()) * (1 / n_old + 1 / n_new) / 2


def far_share(old: np.ndarray, new: np.ndarray) -> dict[str, float]:
    """The ``far`` of ``drift``; bins int64 (N_BINS,)."""
    rank = int(np.ceil(QUANTILE * old.sum()))
    at = int(np.searchsorted(np.cumsum(old), rank))
    share = int(new[at + 1 :].sum()) / int(new.sum())
    return {"quantile": QUANTILE, "sq_distance": float(bin_edges(at, at + 1)[1]), "share": share}


def even_histogram(old: np.ndarray, new: np.ndarray) -> dict[str, list[float]]:
    """The ``histogram`` of ``drift``: N_BARS shares of each, between even edges from 0 on. Inside a bin rows count as
    evenly spread."""
    last = int(np.flatnonzero(old + new)[-1])
    fine = bin_edges(0, last + 1)
    edges = np.linspace(0, fine[-1], N_BARS + 1)
    shares = []
    for bins in (old, new):
        below = np.concatenate([[0], np.cumsum(bins[: last + 1])]) / bins.sum()
        shares.append(np.diff(np.interp(edges, fine, below)).tolist())
    return {"edges": edges.tolist(), "old": shares[0], "new": shares[1]}


def bin_edges(first: int, last: int) -> np.ndarray:
    """float64 (last - first + 1,): where bins begin."""
    begin: np.ndarray = (np.arange(first, last + 1, dtype=np.uint32) << SHIFT).view(np.float32).astype(np.float64)
    return begin


def judge(config: AssignConfig, numbers: dict[str, Any]) -> tuple[bool, str]:
    """Whether the new rows have drifted, and what to say of it."""
    far = numbers["far"]["share"]
    if far > config.max_far:
        beyond = f"farther from any centroid than {100 * QUANTILE:g} % of the old ones"
        return True, f"{100 * far:.3g} % of the new images are {beyond}: cluster anew"
    levels = numbers["levels"]
    above = [level["total_variation"] - level["by_chance"] for level in levels]
    t = int(np.argmax(above))
    if above[t] > config.max_variation:
        told = f"{levels[t]['total_variation']:.3g} at level {t}, where chance gives {levels[t]['by_chance']:.3g}"
        return True, f"the new images lie near the old ones, but in other shares: the total variation is {told}"
    return False, "the new images are spread as the old ones"
