"""What frozen features are worth: weighted k-NN and the effective rank."""

import numpy as np

_BLOCK = 1024  # queries a product


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
