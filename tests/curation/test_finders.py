"""Whoever looks, the neighbours are the same: on this machine's CPU, where torch runs what it runs on a GPU."""

import inspect
from contextlib import contextmanager
from functools import partial

import faiss
import numpy as np
import pytest
import torch

from curation import finders, loops, neighbors
from curation.finders import FaissOnCpu, FaissOnGpu, TorchFinder, finder_in, finder_name
from curation.neighbors import Neighbors, merge_block, nearest_neighbors

KNN_GPU = inspect.signature(faiss.knn_gpu)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


def random_rows(seed, n, width=16):
    return unit(np.random.default_rng(seed).normal(size=(n, width)))


def tied_rows(seed, n, width=16):
    """Many copies, and many rows that differ by less than float32 products can tell."""
    rng = np.random.default_rng(seed)
    x = random_rows(seed, 12, width)[rng.integers(12, size=n)]
    return np.where(rng.random((n, 1)) < 0.5, x, unit(x + 1e-7 * rng.normal(size=x.shape)))


@pytest.fixture
def faiss_gpu(monkeypatch):
    """A FAISS that has a GPU, as far as one can tell without one. Gives the k of every search."""
    asked = []

    def knn_gpu(*args, **kwargs):
        given = KNN_GPU.bind(*args, **kwargs).arguments
        assert given["res"] == "resources" and set(given) == {"res", "xq", "xb", "k", "metric"}
        asked.append(given["k"])
        return faiss.knn(given["xq"], given["xb"], given["k"], metric=given["metric"])

    finders.faiss_resources.cache_clear()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu)
    yield asked
    finders.faiss_resources.cache_clear()


@pytest.fixture(params=[FaissOnGpu, TorchFinder])
def elsewhere(request, monkeypatch, faiss_gpu):
    """Searches go to one kind of finder while the block runs."""
    monkeypatch.setattr(finders, "BASE_ROWS", 90)
    monkeypatch.setattr(finders, "DOT_PAIRS", 77)

    @contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbors, "finder_in", lambda base, _: request.param(base, "cpu"))
            yield

    return patched


@pytest.mark.parametrize("make", [random_rows, tied_rows])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_those_of_the_cpu(elsewhere, make, seed):
    """Which ``test_neighbors`` compares with brute force."""
    width = [3, 16, 100, 384][seed]
    queries, base = make(seed, 70, width), make(seed, 600, width)
    k, own = int(np.random.default_rng(seed).integers(1, 60)), np.arange(100, 170)
    expected = nearest_neighbors(queries, base, k, own)
    with elsewhere():
        found = nearest_neighbors(queries, base, k, own)
    np.testing.assert_array_equal(found.row_ids, expected.row_ids)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


def test_blocks_of_a_base_and_ends(elsewhere):
    x = tied_rows(1, 500)
    whole, best = nearest_neighbors(x[:40], x, 30), Neighbors.none_yet(40, 30)
    with elsewhere():
        for block in np.split(np.random.default_rng(0).permutation(500), [1, 10, 300, 300]):
            best = merge_block(x[:40], x[block], block, best)
        assert (nearest_neighbors(x, x[:0], 4).row_ids == -1).all()
        assert nearest_neighbors(x[:0], x, 4).row_ids.shape == (0, 4)
    np.testing.assert_array_equal(best.row_ids, whole.row_ids)
    np.testing.assert_array_equal(best.similarity, whole.similarity)


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 100, 768])
def test_torch_adds_in_the_order_of_the_loops(width):
    """Half of the products take away the others, so that what is left is rounding: it tells the order."""
    rng = np.random.default_rng(width)
    x, y = ((rng.normal(size=(50, width)) * 10.0 ** rng.integers(-3, 3, (50, width))).astype("f4") for _ in range(2))
    half = width // 2
    order = rng.permutation(width)
    x[:, order[half : 2 * half]], y[:, order[half : 2 * half]] = x[:, order[:half]], -y[:, order[:half]]
    rows, columns = rng.integers(0, 50, (2, 400))
    found = TorchFinder(y, "cpu").similarity(x, rows, columns)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, loops.pair_dots(x, y, rows, columns))
    in_float64 = finders.dots(torch.from_numpy(x[rows]), torch.from_numpy(y[columns]).contiguous())
    np.testing.assert_array_equal(in_float64.numpy(), found)


def test_what_is_at_least_and_what_is_best(monkeypatch):
    x, base = random_rows(0, 20), random_rows(1, 300)
    floor = np.random.default_rng(0).uniform(0, 0.5, 20).astype("f4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finders, "BASE_ROWS", 7)
        found = [finder(base).best(x, 40) for finder in (FaissOnCpu, partial(TorchFinder, device="cpu"))]
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    np.testing.assert_array_equal(found[0][1], found[1][1])
    pairs = [np.stack(finder.at_least(x, floor)) for finder in (FaissOnCpu(base), TorchFinder(base, "cpu"))]
    np.testing.assert_array_equal(*pairs)
    assert pairs[0].shape[1] > 100


def test_shorter_numbers_are_noticed(monkeypatch):
    """What a GPU would give that multiplies TF32: 10 bits of each number."""

    class Short(TorchFinder):
        def best(self, x, k):
            short = TorchFinder(self.base.half().float().numpy(), "cpu")
            return short.best(x.astype("f2").astype("f4"), k)

    x = random_rows(0, 200, 64)
    monkeypatch.setattr(neighbors, "finder_in", Short)
    with pytest.raises(ArithmeticError, match=r"must be right within 4e-06: got one .* off; do not allow TF32"):
        nearest_neighbors(x, x, 5)


def test_products_are_float32_whatever_is_set():
    torch.set_float32_matmul_precision("medium")
    try:
        with finders.float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_faiss_has_its_gpu_where_it_can(faiss_gpu, monkeypatch):
    monkeypatch.setattr(finders, "check_device", lambda device: None)
    monkeypatch.setattr(finders, "FAISS_GPU_MOST", 50)
    monkeypatch.setattr(TorchFinder, "__init__", lambda self, base, device: vars(self).update(
        base=torch.from_numpy(base), device="cpu"))  # fmt: skip
    x = random_rows(0, 300)
    assert isinstance(finder_in(x, "cuda"), FaissOnGpu) and finder_name("cuda") == "faiss_gpu"
    assert isinstance(finder_in(x, "cpu"), FaissOnCpu) and finder_name("cpu") == "faiss_cpu"
    few, many = nearest_neighbors(x, x, 34, device="cuda"), nearest_neighbors(x, x, 35, device="cuda")
    assert faiss_gpu == [50], "more than FAISS gives on a GPU is left to torch"
    np.testing.assert_array_equal(few.row_ids, many.row_ids[:, :34])
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert type(finder_in(x, "cuda")) is TorchFinder and finder_name("cuda") == "torch_gpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    x = random_rows(0, 9)
    with pytest.raises(ValueError, match=r"device must be one that torch sees: got cuda; .*set resources.gpus to 0"):
        nearest_neighbors(x, x, 2, device="cuda")
