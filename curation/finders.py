"""Who looks for the rows of a base that are near queries: FAISS on a CPU, FAISS on a GPU, or torch on a GPU.

A finder proposes rows by float32 products, and tells similarities by float64 sums. The products of every finder keep
the bound of float32 arithmetic, in whatever order they are summed; the similarities of all have the same bits. So who
looks changes nothing about what ``curation.neighbors`` finds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

BASE_ROWS = 2**15  # base rows that a GPU multiplies with the queries at once
DOT_PAIRS = 2**15  # pairs whose products a GPU adds up at once
LANES = 8  # of a float64 sum, as ``loops.dot`` adds
FAISS_GPU_MOST = 2048  # rows that FAISS gives a query on a GPU, at most

Scores = tuple[np.ndarray, np.ndarray]


class Finder(Protocol):
    """Looks in one base, float32 (m, d) unit rows, for queries x, float32 (n, d) unit rows."""

    def best(self, x: np.ndarray, k: int) -> Scores:
        """The k highest float32 products of each query, best first, and their columns in base, int64; both (n, k).

        k is at most the rows of the base.
        """
        ...

    def at_least(self, x: np.ndarray, floor: np.ndarray) -> Scores:
        """Position int64 (p,) in x and column int64 (p,) in base of every product of at least ``floor`` float32 (n,) of
        its query. Holds n * m scores."""
        ...

    def similarity(self, x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float32 (p,): ``loops.dot`` of row x[rows[i]] and base row columns[i]; both int64 (p,)."""
        ...


def finder_in(base: np.ndarray, device: str) -> Finder:
    """What looks in a base on a device: "cpu", or "cuda" with FAISS where that has a GPU, else torch.

    On a GPU the base lies there, 4 * d bytes a row. Raises ValueError where there is no such device.
    """
    if device == "cpu":
        return FaissOnCpu(base)
    check_device(device)
    return FaissOnGpu(base, device) if faiss_has_gpu() else TorchFinder(base, device)


def finder_name(device: str) -> str:
    """Who looks on a device, for the log of a run: faiss_cpu, faiss_gpu or torch_gpu."""
    if device == "cpu":
        return "faiss_cpu"
    return "faiss_gpu" if faiss_has_gpu() else "torch_gpu"


def check_device(device: str) -> None:
    """Raise ValueError for "cuda" where torch sees no GPU."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch sees: got {device}; without a GPU set resources.gpus to 0")


def on_device(values: np.ndarray, device: str) -> Any:
    """A tensor of an array; torch wants one that it may write to, and what workers share is not."""
    import torch

    values = np.ascontiguousarray(values)
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)


def faiss_has_gpu() -> bool:
    """Whether there is a FAISS that can use a GPU, and one for it."""
    try:
        import faiss
    except ImportError:
        return False
    return int(faiss.get_num_gpus()) > 0


class FaissOnCpu:
    """FAISS proposes, numba adds."""

    def __init__(self, base: np.ndarray) -> None:
        self.base = base

    def best(self, x: np.ndarray, k: int) -> Scores:
        """See Finder."""
        import faiss

        score, column = faiss.knn(x, self.base, k, metric=faiss.METRIC_INNER_PRODUCT)
        return score, column

    def at_least(self, x: np.ndarray, floor: np.ndarray) -> Scores:
        """See Finder."""
        position, column = np.nonzero(x @ self.base.T >= floor[:, None])
        return position, column

    def similarity(self, x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See Finder."""
        from curation import loops

        found: np.ndarray = loops.pair_dots(x, self.base, rows, columns)
        return found


class TorchFinder:
    """Everything by torch, on any device: products of BASE_ROWS rows at a time, of which the best stay.

    Holds the base, and for n queries 6 * BASE_ROWS bytes each; for similarities DOT_PAIRS * 24 * d bytes.
    """

    def __init__(self, base: np.ndarray, device: str) -> None:
        self.device = device
        self.base = self.there(base)

    def there(self, values: np.ndarray) -> Any:
        """The same on the device."""
        return on_device(values, self.device)

    def best(self, x: np.ndarray, k: int) -> Scores:
        """See Finder."""
        import torch

        queries = self.there(x)
        score = torch.empty(len(x), 0, device=self.device)
        column = torch.empty(len(x), 0, dtype=torch.int64, device=self.device)
        with float32_products():
            for start in range(0, len(self.base), BASE_ROWS):
                products = queries @ self.base[start : start + BASE_ROWS].T
                more = products.topk(min(k, products.shape[1]), dim=1)
                found, at = torch.cat([score, more.values], dim=1), torch.cat([column, more.indices + start], dim=1)
                top = found.topk(min(k, found.shape[1]), dim=1)
                score, column = top.values, at.gather(1, top.indices)
        return score.cpu().numpy(), column.cpu().numpy()

    def at_least(self, x: np.ndarray, floor: np.ndarray) -> Scores:
        """See Finder."""
        with float32_products():
            near = (self.there(x) @ self.base.T >= self.there(floor)[:, None]).nonzero()
        return near[:, 0].cpu().numpy(), near[:, 1].cpu().numpy()

    def similarity(self, x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See Finder."""
        import torch

        queries, out = self.there(x), torch.empty(len(rows), device=self.device)
        rows_there, columns_there = self.there(rows), self.there(columns)
        for start in range(0, len(rows), DOT_PAIRS):
            at = slice(start, start + DOT_PAIRS)
            out[at] = dots(queries[rows_there[at]], self.base[columns_there[at]])
        found: np.ndarray = out.cpu().numpy()
        return found


class FaissOnGpu(TorchFinder):
    """FAISS proposes, which takes the base from this machine's memory every time; torch does the rest."""

    def __init__(self, base: np.ndarray, device: str) -> None:
        super().__init__(base, device)
        self.host = base

    def best(self, x: np.ndarray, k: int) -> Scores:
        """See Finder."""
        import faiss

        if k > FAISS_GPU_MOST:
            return super().best(x, k)
        score, column = faiss.knn_gpu(faiss_resources(), x, self.host, k, metric=faiss.METRIC_INNER_PRODUCT)
        return score, column


@lru_cache(maxsize=1)
def faiss_resources() -> Any:
    """Memory and handles that FAISS keeps on a GPU, once a process."""
    import faiss

    return faiss.StandardGpuResources()


@contextmanager
def float32_products() -> Iterator[None]:
    """No shorter numbers than float32 inside products of float32, whatever is set for networks."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def dots(a: Any, b: Any) -> Any:
    """``loops.dot`` of rows, tensors float32 (p, d), to the bit: products are exact, sums in the same order."""
    import torch

    whole = a.shape[1] - a.shape[1] % LANES
    products = a.double() * b.double()
    sums = torch.zeros(len(a), LANES, dtype=torch.float64, device=a.device)
    for i in range(0, whole, LANES):
        sums += products[:, i : i + LANES]
    sums = sums[:, 0::2] + sums[:, 1::2]
    sums = sums[:, 0::2] + sums[:, 1::2]
    total = sums[:, 0] + sums[:, 1]
    for i in range(whole, a.shape[1]):
        total = total + products[:, i]
    return total.float()
