"""The nearest centroid of every row on a GPU: products of bfloat16 propose, longer numbers decide where they cannot.

A score is ``x . c - |c| ** 2 / 2``, both seen from the mean centroid; the highest belongs to the nearest centroid. Of
every row the three highest are found by products of bfloat16, added as float32. Where the second is lower than the
highest by more than a margin, that is it. Where the third is, the two distances decide, summed in float64. The others,
a small share, meet all centroids by products of float32, and distances decide among those that are as near as these can
tell. Ties go to the lower centroid.

The margin. Rounding a row x and a centroid c to bfloat16 moves their score by ``e . c + x . f``, with e and f the two
rounding errors, which are known. Errors of different coordinates are taken as independent with mean 0: the variance is
``sum(e ** 2 * c ** 2 + x ** 2 * f ** 2)``, at most ``|e|_4 ** 2 * |c|_4 ** 2 + |x|_4 ** 2 * |f|_4 ** 2`` by
Cauchy-Schwarz, with ``|x|_4 = sum(x ** 4) ** .25``. Between two scores of a row it is at most

    4 * |e|_4 ** 2 * max|c|_4 ** 2 + 2 * |x|_4 ** 2 * max|f|_4 ** 2,

and the margin SIGMAS times its root. Where errors are not independent (rows of few values, say), this is too little:
so some rows of every block meet some centroids in float64 too, and where their errors are larger than that in the
mean, the margin grows as they do. Added are bounds of what adding float32 costs, and of the bits a score is marked in.
The model covers data as networks make them; it is no bound for every input, as that of ``curation.nearest`` is.
"""

import importlib.util
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from curation.finders import check_device, float32_products, on_device
from curation.nearest import UNIT_ROUNDOFF

SIGMAS = 3.0  # of the error between two scores: beyond it is one pair in 700, of those few that are as near as that
MARKED = 2.0**-18  # of a score, that ``nearest_triton`` cuts off
ROWS = 2**16  # rows on the device at once
PADDED = 256  # of rows and centroids, and
PADDED_WIDTH = 64  # of their width: multiples of what a kernel takes at once
CENTROID_ROWS = 2**16  # centroids prepared at once
TILE = (2**12, 2**13)  # rows and centroids whose products torch makes at once
PAIRS = 2**14  # rows and centroids whose distance is summed at once
SAMPLED_ROWS, SAMPLED_CENTROIDS = 64, 2048  # whose errors are looked at, of every block


class Found(NamedTuple):
    """Rows with their centroids, on the device, and how they were found."""

    labels: Any  # int32 (n,)
    sq_distance: Any  # float32 (n,), squared Euclidean, to the own centroid; differences, not products
    n_pairs: int  # rows of which two distances decided
    n_rest: int  # rows that met all centroids in float32
    margin: float  # mean of the rows
    excess: float  # the highest of all blocks by which their sampled errors enlarged it: 1 where the model covers them


class Three(NamedTuple):
    """The three highest scores of rows, and who has the first two."""

    scores: Any  # float32 (3, n), descending
    labels: Any  # int64 (2, n)


class TorchTarget:
    """Centroids float32 (k, d) to assign rows to, on a device ("cpu", "cuda", "cuda:1"): as ``nearest_centroid``, but
    for the few rows whose errors the model of the margin does not cover.

    Holds there k * d * 6 bytes, and for each of ROWS rows some d * 40 bytes. ``by_triton``: products by the kernel of
    ``curation.nearest_triton``; None: where there is triton and a GPU that it can use. Raises ValueError when k is 0 or
    there is no such device.
    """

    def __init__(self, centroids: np.ndarray, device: str, by_triton: bool | None = None) -> None:
        import torch

        if len(centroids) == 0:
            raise ValueError(f"rows need at least one centroid: got {centroids.shape}")
        check_device(device)
        self.centroids = on_device(np.asarray(centroids, np.float32), device)
        (k, self.width), self.device = self.centroids.shape, self.centroids.device
        self.shift = self.centroids.mean(dim=0, dtype=torch.float64).float()
        self.low = torch.zeros(padded(k, PADDED), padded(self.width, PADDED_WIDTH), dtype=torch.bfloat16,
                               device=self.device)  # fmt: skip
        self.half = torch.zeros(len(self.low), device=self.device)
        self.reach, self.spread, self.error = 0.0, 0.0, 0.0  # the most |c|, |c|_4 and |f|_4
        for start in range(0, k, CENTROID_ROWS):
            self._prepare(slice(start, min(k, start + CENTROID_ROWS)))
        some = torch.arange(min(k, SAMPLED_CENTROIDS), device=self.device) * k // min(k, SAMPLED_CENTROIDS)
        self.sampled = (self.centroids[some] - self.shift).double(), self.low[some, : self.width].double()
        self.config = None if by_triton is False else triton_config(self.device)
        if by_triton and self.config is None:
            raise ValueError(f"products by triton need triton and a GPU for it: got {device}")
        if self.config is not None:
            from curation.nearest_triton import PADDING

            self.half[k:] = PADDING

    def _prepare(self, at: slice) -> None:
        near = self.centroids[at] - self.shift
        self.low[at, : self.width] = near
        squares = near.double().square_().sum(dim=1)
        self.half[at] = squares / 2
        self.reach = max(self.reach, math.sqrt(float(squares.max())))
        self.spread = max(self.spread, float(four_norms(near).max()))
        self.error = max(self.error, float(four_norms(self.low[at, : self.width].float() - near).max()))

    def assign(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a block of rows float32 or float16 (n, d), of any height: labels int32 (n,) and squared distances float32
        (n,). More rows at once keep a GPU busier: ROWS do. Raises ValueError where the widths differ."""
        found = self.find(block)
        return found.labels.cpu().numpy(), found.sq_distance.cpu().numpy()

    def find(self, x: Any) -> Found:
        """Of finite rows (n, d), an array or a tensor (float32, float16, bfloat16; on any device): see ``Found``."""
        import torch

        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"cannot assign rows {tuple(x.shape)} to centroids {tuple(self.centroids.shape)}")
        found = [self._found(self._there(x[start : start + ROWS])) for start in range(0, len(x), ROWS)]
        return Found(
            torch.cat([torch.empty(0, dtype=torch.int32, device=self.device), *(some.labels for some in found)]),
            torch.cat([torch.empty(0, device=self.device), *(some.sq_distance for some in found)]),
            sum(some.n_pairs for some in found),
            sum(some.n_rest for some in found),
            sum(len(some.labels) * some.margin for some in found) / max(1, len(x)),
            max([1.0, *(some.excess for some in found)]),
        )

    def _there(self, x: Any) -> Any:
        """float32, on the device."""
        x = on_device(x, str(self.device)) if isinstance(x, np.ndarray) else x.to(self.device)
        return x.float()

    def _found(self, x: Any) -> Found:
        """Of float32 rows, at most ROWS."""
        near = x - self.shift
        low = near.new_zeros(padded(len(x), PADDED), self.low.shape[1], dtype=self.low.dtype)
        low[: len(x), : self.width] = near
        three = self._three_highest(low, len(x))
        margin, excess = self._margin(near, low[: len(x), : self.width], three.scores[0])
        best, second, third = three.scores
        doubt, many = ~(best - second > margin), ~(best - third > margin)
        labels = three.labels[0].clone()
        pairs, rest = ((doubt & ~many).nonzero()[:, 0], (doubt & many).nonzero()[:, 0])
        labels[pairs] = nearer(x, self.centroids, pairs, *three.labels[:, pairs])
        labels[rest] = self._among_all(x[rest], near[rest], labels[rest])
        distances = own_distances(x, self.centroids, labels)
        return Found(labels.int(), distances, len(pairs), len(rest), float(margin.mean()), excess)

    def _three_highest(self, low: Any, n: int) -> Three:
        """Of the first n rows bfloat16, padded."""
        if self.config is None:
            return three_highest(low[:n], self.low, self.half, len(self.centroids))
        from curation.nearest_triton import top_three

        return merged_splits(*top_three(low, self.low, self.half, self.config), n)

    def _margin(self, near: Any, low: Any, best: Any) -> tuple[Any, float]:
        """What two scores of a row must differ by, float32 (n,), and how far it was enlarged."""
        size, error = four_norms(near), four_norms(low.float() - near)
        sigma = (4 * (error * self.spread) ** 2 + 2 * (size * self.error) ** 2).sqrt()
        one = ((error * self.spread) ** 2 + (size * self.error) ** 2).sqrt()
        excess = self._excess(near, low, one)
        adding = (self.width / 16 + 8) * 2 * UNIT_ROUNDOFF * self.reach * (near.norm(dim=1).double() + self.reach)
        return (SIGMAS * excess * sigma + 2 * adding + 2 * MARKED * best.abs()).float(), excess

    def _excess(self, near: Any, low: Any, sigma: Any) -> float:
        """How many times larger errors of some rows are than the model says; 1 where they are not."""
        import torch

        n = min(len(near), SAMPLED_ROWS)
        some = torch.arange(n, device=self.device) * len(near) // n
        exact, rounded = (values[some].double() @ there.T for values, there in zip((near, low), self.sampled,
                                                                                  strict=True))  # fmt: skip
        found = (rounded - exact).square().mean(dim=1).sqrt() / sigma[some]
        return max(1.0, float(found.nan_to_num(0.0).max()))  # 0 / 0: nothing was rounded

    def _among_all(self, x: Any, near: Any, labels: Any) -> Any:
        """int64 (n,): the nearest of all centroids of rows float32, given one that is near."""
        import torch

        settled, nearest = labels.clone(), x.new_full((len(x),), math.inf, dtype=torch.float64)
        for first in range(0, len(x), TILE[0]):
            at = slice(first, first + TILE[0])
            own = (near[at].double() * (self.centroids[labels[at]] - self.shift)).sum(dim=1) - self.half[labels[at]]
            bound = (self.width + 8) * UNIT_ROUNDOFF * self.reach * (near[at].norm(dim=1).double() + self.reach)
            floor = (own - 2 * bound).float()
            for start in range(0, len(self.centroids), TILE[1]):
                far = self.centroids[start : start + TILE[1]] - self.shift
                with float32_products():
                    score = near[at] @ far.T
                score -= self.half[start : start + len(far)]
                row, column = (score >= floor[:, None]).nonzero(as_tuple=True)
                offer(x, self.centroids, row + first, column + start, nearest, settled)
        return settled


def torch_target(centroids: np.ndarray, device: str) -> TorchTarget:
    """What assigns blocks of rows to centroids float32 (k, d) on a device: see ``TorchTarget``."""
    return TorchTarget(centroids, device)


def padded(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def triton_config(device: Any) -> Any:
    """How the kernel is cut for a device; None where there is no triton, or no GPU that it can use."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from curation.nearest_triton import configs_for

    return next(iter(configs_for(device)), None)


def four_norms(x: Any) -> Any:
    """float64 (n,): ``sum(x ** 4) ** .25`` of rows float32."""
    import torch

    return torch.linalg.vector_norm(x.square(), dim=1, dtype=torch.float64).sqrt()


def three_highest(low: Any, centroids: Any, half: Any, k: int) -> Three:
    """By torch, of rows bfloat16 (n, w) among the first k centroids bfloat16; scores float32. Holds those of TILE."""
    import torch

    product, found = products_of(low.device), []
    for rows in low.split(TILE[0]):
        scores = torch.full((len(rows), 3), -3.0e38, device=low.device)
        labels = torch.zeros(len(rows), 3, dtype=torch.int64, device=low.device)
        for start in range(0, k, TILE[1]):
            end = min(k, start + TILE[1])
            more = product(rows, centroids[start:end]).sub_(half[start:end]).topk(min(3, end - start), dim=1)
            scores, labels = torch.cat([scores, more.values], 1), torch.cat([labels, more.indices + start], 1)
            scores, order = scores.topk(3, dim=1)
            labels = labels.gather(1, order)
        found.append((scores.T, labels.T[:2]))
    return Three(*(torch.cat(columns, dim=1) for columns in zip(*found, strict=True)))


def products_of(device: Any) -> Any:
    """A function of bfloat16 (n, w) and (k, w): their products float32 (n, k), exact but for the adding.

    A GPU adds as float32 where torch can be asked to; elsewhere both become float32, of which they are.
    """
    import torch

    if device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
        return lambda x, y: torch.mm(x, y.T, out_dtype=torch.float32)
    return lambda x, y: x.float() @ y.float().T


def merged_splits(scores: Any, labels: Any, n: int) -> Three:
    """The three highest of all pieces: scores (3, s, m), labels (2, s, m), of which the first n are rows."""
    scores, labels = scores[:, :, :n], labels[:, :, :n]
    if scores.shape[1] == 1:
        return Three(scores[:, 0], labels[:, 0].long())
    top, order = scores.reshape(-1, n).sort(dim=0, descending=True, stable=True)
    return Three(top[:3], labels.reshape(-1, n).gather(0, order[:2]).long())  # of which none was a third of a piece


def nearer(x: Any, centroids: Any, rows: Any, one: Any, other: Any) -> Any:
    """int64 (p,): which of two centroids is nearer to each of those rows, ties to the lower."""
    import torch

    found = [one[:0]]
    for row, a, b in zip(*map(partial(torch.split, split_size_or_sections=PAIRS), (rows, one, other)), strict=True):
        here, there = (sq_distances(x[row], centroids[label]) for label in (a, b))
        found.append(torch.where((there < here) | ((there == here) & (b < a)), b, a))
    return torch.cat(found)


def offer(x: Any, centroids: Any, rows: Any, labels: Any, nearest: Any, settled: Any) -> None:
    """Compare rows with centroids int64 (p,) directly; ``nearest`` float64 and ``settled`` of every row are updated in
    place. Centroids come ascending from call to call: a tie stays with the lower."""
    for start in range(0, len(rows), PAIRS):
        row, label = rows[start : start + PAIRS], labels[start : start + PAIRS]
        distance = sq_distances(x[row], centroids[label])
        least = nearest.scatter_reduce(0, row, distance, "amin")
        hit = distance == least[row]
        lowest = settled.scatter_reduce(0, row[hit], label[hit], "amin", include_self=False)
        better = least < nearest
        settled[better], nearest[better] = lowest[better], least[better]


def sq_distances(a: Any, b: Any) -> Any:
    """float64 (p,), squared, of rows float32: summed by halves, so that equal rows give equal bits wherever they
    stand."""
    import torch

    squares = (a.double() - b.double()).square_()
    width = squares.shape[1]
    squares = torch.nn.functional.pad(squares, (0, 2 ** (width - 1).bit_length() - width))
    while squares.shape[1] > 1:
        left, right = squares.chunk(2, dim=1)
        squares = left + right
    return squares[:, 0]


def own_distances(x: Any, centroids: Any, labels: Any) -> Any:
    """float32 (n,): squared distance of every row to the centroid it is labelled with; added as float64."""
    import torch

    found = [x.new_empty(0)]
    for rows, some in zip(x.split(PAIRS), labels.split(PAIRS), strict=True):
        apart = centroids[some].sub_(rows)
        found.append(apart.square_().sum(dim=1, dtype=torch.float64).float())
    return torch.cat(found)
