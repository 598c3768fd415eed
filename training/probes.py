"""What frozen features are worth: weighted k-NN, a linear probe, and the effective rank."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

STRENGTHS = (1e6, 1e5, 1e4, 1e3, 1e2, 10.0, 1.0, 0.1, 0.01)  # of a linear probe: C of 1e-6 to 1e2 in scikit-learn
HELD_OUT = 10  # one row of so many is held out to choose a strength

_BLOCK = 1024  # queries a product
_MAX_ITER = 1000  # of L-BFGS
_PATIENCE = 2  # strengths in a row that are worse than the best, before weaker ones are given up
_FLAT = 1e-6  # standard deviation of a channel that says nothing: the float16 of a stored unit vector moves it more


def knn_predict(
    bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, k: int = 20, temperature: float = 0.07
) -> np.ndarray:
    """The label each query gets from its k nearest rows of the bank, by cosine.

    bank (n, d) and queries (m, d): float with rows of L2 norm 1; bank_labels: int (n,), at least 0. A neighbour votes
    with weight exp(similarity / temperature), normalised over the k (arXiv 2104.14294, section 4.2); similarities
    that tie are ordered by row, classes that tie go to the lower label. Returns int64 (m,). Holds 12 bytes for each of
    1024 * n pairs. Raises ValueError when shapes or k do not fit.
    """
    if not 1 <= k <= len(bank) or len(bank) != len(bank_labels) or bank.shape[1:] != queries.shape[1:]:
        raise ValueError(
            f"k must be in 1..rows of the bank, and widths and labels must agree: got k {k}, bank {bank.shape}, "
            f"labels {bank_labels.shape}, queries {queries.shape}"
        )
    n_classes = int(bank_labels.max()) + 1
    bank, out = bank.astype(np.float32), np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _BLOCK):
        similarity = queries[start : start + _BLOCK].astype(np.float32) @ bank.T
        top = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(similarity, top, axis=1)
        out[start : start + _BLOCK] = knn_vote(bank_labels[top], best, n_classes, temperature)
    return out


def knn_vote(labels: np.ndarray, similarity: np.ndarray, n_classes: int, temperature: float = 0.07) -> np.ndarray:
    """The class of most weight among the neighbours of each query, int64 (m,); ties go to the lower class.

    labels: int (m, k) of the neighbours, best first; similarity: float (m, k), cosine, -inf for one that is missing.
    """
    weight = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / temperature)
    votes = np.zeros((len(labels), n_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weight)
    best: np.ndarray = votes.argmax(axis=1)
    return best


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the queries whose ``knn_predict`` label is theirs, in [0, 1]. labels: int (m,)."""
    return float((knn_predict(bank, bank_labels, queries, k, temperature) == labels).mean())


class LinearProbe(NamedTuple):
    """A linear classifier of features."""

    mean: np.ndarray  # float32 (d,), taken from the features,
    scale: np.ndarray  # float32 (d,), and what they are divided by then
    weight: np.ndarray  # float32 (c, d)
    bias: np.ndarray  # float32 (c,)
    classes: np.ndarray  # int (c,): the labels it can give, ascending


def fit_probe(
    x: np.ndarray, labels: np.ndarray, *, strengths: Sequence[float] = STRENGTHS, seed: int = 0
) -> tuple[LinearProbe, float]:
    """Multinomial logistic regression on frozen features, and the strength of regularisation that was chosen.

    x (n, d): float, finite; labels: int (n,). Every channel is standardised over all rows, as a batch norm before the
    linear layer would do it: what a strength means hangs less on the encoder, and L-BFGS needs fewer steps. The
    strength is what classifies a held-out tenth best (``held_last``, ``choose_strength``); the probe is then fitted on
    all rows (the protocol of DINOv2, arXiv 2304.07193). Holds one float32 copy of x and what ``fit_linear`` holds.
    Raises ValueError for fewer than two classes.
    """
    order, n_fit = held_last(labels, seed)
    x, labels = x[order].astype(np.float32), labels[order]
    mean, scale = standardise(x)

    def n_right(strength: float) -> int:
        return held_out_right(x, labels, n_fit, strength)

    strength = choose_strength(strengths, n_right, len(x) - n_fit)
    return fit_linear(x, labels, strength)._replace(mean=mean, scale=scale), strength


def held_last(labels: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """An order of the rows, int64 (n,), drawn by seed, whose last tenth is held out; and how many are not.

    A row of every class stays: a class of one row is never held out. So of few rows fewer than a tenth, even none, may
    be held out; of two rows or more of one class at least one is.
    """
    order = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    loose = np.delete(order, first)  # without the first row of every class
    n_held = min(max(len(labels) // HELD_OUT, 1), len(loose))
    return np.concatenate([order[first], loose]), len(labels) - n_held


def standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give every channel of x float32 (n, d) mean 0 and standard deviation 1, in place.

    Returns the mean and the standard deviation that were there, float32 (d,). A channel that is all but constant (less
    than 1e-6) becomes 0, and its scale is inf.
    """
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x -= mean
    scale = np.sqrt(np.einsum("nd,nd->d", x, x, dtype=np.float64) / len(x)).astype(np.float32)
    scale[scale < _FLAT] = np.inf
    x /= scale
    return mean, scale


def choose_strength(strengths: Sequence[float], n_right: Callable[[float], int], n_held: int) -> float:
    """The strength with most right answers among ``n_held`` held-out rows, ties to the stronger.

    ``n_right(strength)`` is asked from the strongest on, until nothing can be better: all are right, or two strengths
    in a row were worse than the best one; the weakest take by far the longest. Asks nothing where there is no choice:
    without held-out rows the strongest counts, which classifies by the means of the classes, nearly.
    """
    ordered = sorted(strengths, reverse=True)
    if len(ordered) == 1 or n_held == 0:
        return ordered[0]
    best, most, worse = ordered[0], -1, 0
    for strength in ordered:
        right = n_right(strength)
        worse = worse + 1 if right < most else 0
        if right > most:
            best, most = strength, right
        if most == n_held or worse == _PATIENCE:
            break
    return best


def held_out_right(x: np.ndarray, labels: np.ndarray, n_fit: int, strength: float) -> int:
    """How many of the rows from ``n_fit`` on a probe that was fitted on those before classifies right."""
    probe = fit_linear(x[:n_fit], labels[:n_fit], strength)
    return int((linear_predict(probe, x[n_fit:]) == labels[n_fit:]).sum())


def fit_linear(x: np.ndarray, labels: np.ndarray, strength: float) -> LinearProbe:
    """Multinomial logistic regression by L-BFGS, of x float32 (n, d) as it is, which is not changed.

    It minimises the sum over rows of the log loss, and strength / 2 times the squared norm of the weights (1 / strength
    is scikit-learn's C; the bias is free), in at most 1000 steps. Holds about 16 bytes for each of n * classes, and
    with scikit-learn below 1.9 a copy of x as float64. Raises ValueError for fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning  # here, for it takes a second to import
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"a linear probe must have labels of at least 2 classes: got {len(classes)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest strengths often end at the last step
        warnings.filterwarnings("ignore", message="The number of unique classes")  # of few rows it may be
        model = LogisticRegression(C=1 / strength, max_iter=_MAX_ITER).fit(x, labels)
    weight, bias = model.coef_.astype(np.float32), model.intercept_.astype(np.float32)
    if len(classes) == 2:  # one row of weights, for the second class: that of the first is 0
        weight, bias = np.vstack([0 * weight, weight]), np.append(np.float32(0), bias)
    d = x.shape[1]
    return LinearProbe(np.zeros(d, np.float32), np.ones(d, np.float32), weight, bias, classes)


def linear_predict(probe: LinearProbe, x: np.ndarray) -> np.ndarray:
    """The label of each row of x float (m, d), int64 (m,); classes that tie go to the lower one."""
    out = np.empty(len(x), np.int64)
    for start in range(0, len(x), _BLOCK):
        block = (x[start : start + _BLOCK].astype(np.float32) - probe.mean) / probe.scale
        out[start : start + _BLOCK] = probe.classes[(block @ probe.weight.T + probe.bias).argmax(axis=1)]
    return out


def rankme(features: np.ndarray) -> float:
    """Effective rank of features (n, d), in 1..min(n, d): exp of the entropy of the singular values (arXiv 2210.02885).

    float64 inside, holds a copy. Alone it is no sign of health: features spread out without getting better.
    Raises ValueError when all features are 0.
    """
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    if not sigma.sum() > 0:
        raise ValueError(f"rankme needs features that are finite and not all 0: got {features.shape}")
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
