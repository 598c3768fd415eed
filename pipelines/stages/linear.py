"""How ``evaluate`` fits a linear probe to the bank: drawn rows in one array, a strength at a time, then all rows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from curation.embeddings import EmbeddingsPart, covered_rows
from curation.execute import Executor, Ref, on_worker
from pipelines.stage import progress_held
from training.evaluate import EvaluateConfig
from training.probes import LinearProbe, choose_strength, fit_linear, held_last, held_out_right, standardise

Voters = Sequence[tuple[int, EmbeddingsPart]]  # the labelled rows, each part with where it begins in its pool


class Drawn(NamedTuple):
    """Rows of the bank, those last that are held out."""

    x: np.ndarray  # float32 (n, d), standardised
    labels: np.ndarray  # int32 (n,)
    n_fit: int  # rows that are not held out
    mean: np.ndarray  # float32 (d,), what was taken from the vectors,
    scale: np.ndarray  # float32 (d,), and what they were divided by


class Fitted(NamedTuple):
    """A probe where it was made, and the strength that was chosen."""

    probe: Ref[LinearProbe]
    strength: float


def fit_on_bank(config: EvaluateConfig, voters: Voters, labels: Ref[np.ndarray], executor: Executor) -> Fitted:
    """The probe of the bank. labels: int32, the class of every row of its pool. Each strength is a task."""
    gather = partial(gather_rows, voters=voters, most=config.linear_rows, seed=config.seed)
    drawn = on_worker(executor, gather, {"labels": labels})
    n_held = on_worker(executor, count_held, {"drawn": drawn}).get()
    n_strengths, asked = len(config.linear_strengths), 0
    with progress_held(executor) as show:

        def n_right(strength: float) -> int:
            nonlocal asked
            asked += 1
            right = on_worker(executor, partial(try_strength, strength=strength), {"drawn": drawn}).get()
            show(asked, n_strengths, "strengths", f"{right / n_held:.1%} right at {strength:g}")
            return right

        strength = choose_strength(config.linear_strengths, n_right, n_held)
    return Fitted(on_worker(executor, partial(fit_all, strength=strength), {"drawn": drawn}), strength)


def gather_rows(labels: np.ndarray, voters: Voters, most: int, seed: int) -> Drawn:
    """At most ``most`` rows of the bank, drawn by their place in it: how it is cut into parts does not show.

    Holds 4 bytes for each of most * width, one part of the bank, and where there are more rows 8 bytes for each.
    """
    ends = np.cumsum([part.n_rows for _, part in voters])
    places = draw_places(int(ends[-1]), most, seed)
    cuts = [0, *np.searchsorted(places, ends).tolist()]
    within = [places[cuts[i] : cuts[i + 1]] - (ends[i] - part.n_rows) for i, (_, part) in enumerate(voters)]
    y = np.concatenate([
        labels[start + covered_rows(part.location)[here]]
        for (start, part), here in zip(voters, within, strict=True)
    ])  # fmt: skip
    order, n_fit = held_last(y, seed)
    target = np.empty(len(y), np.int64)
    target[order] = np.arange(len(y))
    x = gather_vectors([part for _, part in voters], within, target)
    mean, scale = standardise(x)
    return Drawn(x, y[order], n_fit, mean, scale)


def draw_places(n_rows: int, most: int, seed: int) -> np.ndarray:
    """int64, ascending: ``most`` of ``n_rows`` places, or all of them."""
    if n_rows <= most:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng([seed, n_rows]).choice(n_rows, most, replace=False, shuffle=False))


def gather_vectors(parts: list[EmbeddingsPart], within: list[np.ndarray], target: np.ndarray) -> np.ndarray:
    """float32 (n, d): the rows ``within`` each part, one part after the other, put at ``target`` (n,)."""
    x, done = np.empty((0, 0), np.float32), 0
    for part, here in zip(parts, within, strict=True):
        if len(here):
            vectors = part.read()[1][here]
            x = x if x.size else np.empty((len(target), vectors.shape[1]), np.float32)
            x[target[done : done + len(here)]] = vectors
            done += len(here)
    return x


def count_held(drawn: Drawn) -> int:
    """Rows that are held out."""
    return len(drawn.labels) - drawn.n_fit


def try_strength(drawn: Drawn, strength: float) -> int:
    """Held-out rows that are classified right."""
    return held_out_right(drawn.x, drawn.labels, drawn.n_fit, strength)


def fit_all(drawn: Drawn, strength: float) -> LinearProbe:
    """The probe of all rows, for vectors as they are stored."""
    return fit_linear(drawn.x, drawn.labels, strength)._replace(mean=drawn.mean, scale=drawn.scale)
