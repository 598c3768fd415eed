"""Assignment by short products finds what exact distances say, and the kernel finds what torch does.

The kernel runs by triton's interpreter, which must be asked for before triton is imported: so in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from curation import nearest_torch as module
from curation.nearest import nearest_centroid
from curation.nearest_torch import ROWS, TorchTarget, torch_target

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton comes with torch for GPUs alone, and is not installed")


def mixture(seed, n, k, width, spread=0.8):
    """Unit rows around concepts, some concepts far more often than others, and centroids of some more of them."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(max(2, k // 4), width))
    weight = rng.pareto(1.5, len(centre)) + 1
    concept = rng.choice(len(centre), n + 3 * k, p=weight / weight.sum())
    rows = centre[concept] + spread * rng.normal(size=(n + 3 * k, width))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("f4")
    return rows[:n], rows[n:].reshape(k, 3, width).mean(axis=1).astype("f4")


def same(x, centroids, target=None):
    """Labels are those of the exact kernel but where distances differ by less than a part in 100,000."""
    target = target or torch_target(centroids, "cpu")
    labels, sq_distance = target.assign(x)
    assert labels.dtype == np.int32 and sq_distance.dtype == np.float32
    expected, least = nearest_centroid(x.astype("f4"), centroids)
    distance = ((x.astype("f8") - centroids[labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(sq_distance, distance, rtol=1e-6, atol=1e-12)
    others = labels != expected
    np.testing.assert_allclose(distance[others], least[others], rtol=1e-5)
    return labels, expected


@pytest.mark.parametrize("width", [8, 37, 64, 130])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 100, 700])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_labels_are_those_of_the_exact_kernel(width, k, dtype):
    x, centroids = mixture(width + k, 900, k, width)
    labels, expected = same(x.astype(dtype), centroids)
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("tile", [(2**12, 2**13), (70, 33), (128, 2)])
@pytest.mark.parametrize("rows, pairs", [(ROWS, 2**14), (211, 13)])
def test_neither_rows_nor_tiles_change_what_is_found(tile, rows, pairs, monkeypatch):
    x, centroids = mixture(0, 1000, 300, 48)
    expected = nearest_centroid(x, centroids)[0]
    monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "PAIRS", pairs)
    monkeypatch.setattr(module, "CENTROID_ROWS", 77)
    found = TorchTarget(centroids, "cpu").find(x)
    np.testing.assert_array_equal(found.labels.numpy(), expected)
    assert 0 < found.n_pairs < 300 and 0 < found.n_rest < 100 and 0 < found.margin < 0.1 and found.excess == 1


@pytest.mark.parametrize("shift", [0, 5, 1000])
@pytest.mark.parametrize("tile", [(2**12, 2**13), (50, 33)])
def test_near_ties(shift, tile, monkeypatch):
    """Centroids twice, the copies in another order, and others 1e-4 from them: nearer than short products can see."""
    monkeypatch.setattr(module, "TILE", tile)
    rng = np.random.default_rng(1)
    first = rng.normal(size=(60, 100)).astype("f4")
    near = first + 1e-4 * rng.normal(size=first.shape)
    centroids = (np.concatenate([first, near, first[::-1]]) + shift).astype("f4")
    x = (centroids[rng.integers(180, size=800)] + 1e-3 * rng.normal(size=(800, 100))).astype("f4")
    labels, expected = same(x, centroids)
    np.testing.assert_array_equal(labels, expected)
    assert (labels < 120).all() and len(np.unique(labels)) > 100


@pytest.mark.parametrize("copies", [2, 3, 50])
def test_ties_of_equal_centroids_go_to_the_lower(copies):
    x, centroids = mixture(2, 400, 40, 24)
    order = np.random.default_rng(0).permutation(40 * copies)
    many = np.tile(centroids, (copies, 1))[order]
    labels, expected = same(x, many)
    np.testing.assert_array_equal(labels, expected)
    lowest = {int(c): min(np.flatnonzero(order % 40 == c)) for c in range(40)}
    np.testing.assert_array_equal(labels, [lowest[int(c)] for c in nearest_centroid(x, centroids)[0]])


def test_few_decide_by_distances_where_products_can_tell():
    rng = np.random.default_rng(3)
    centroids = rng.normal(size=(200, 64)).astype("f4")
    own = rng.integers(200, size=3000)
    found = TorchTarget(centroids, "cpu").find((centroids[own] + 0.1 * rng.normal(size=(3000, 64))).astype("f4"))
    np.testing.assert_array_equal(found.labels.numpy(), own)
    assert found.n_pairs == found.n_rest == 0


def test_rows_of_zeros_and_none():
    x, centroids = mixture(4, 30, 20, 16)
    x[::2] = 0
    same(x, centroids)
    same(np.zeros((5, 16), "f4"), np.zeros((3, 16), "f4"))
    same(np.ones((5, 16), "f4"), np.ones((1, 16), "f4"))
    same(x * np.float32(1e-12), centroids * np.float32(1e-12))
    labels, sq_distance = torch_target(centroids, "cpu").assign(x[:0])
    assert labels.shape == sq_distance.shape == (0,) and (labels.dtype, sq_distance.dtype) == (np.int32, np.float32)


def test_tensors_are_taken_as_they_are():
    x, centroids = mixture(5, 50, 20, 16)
    target = TorchTarget(centroids, "cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = torch.from_numpy(x).to(dtype)
        found = target.find(rows)
        np.testing.assert_array_equal(found.labels, nearest_centroid(rows.float().numpy(), centroids)[0])
    x.flags.writeable = centroids.flags.writeable = False
    same(x, centroids)


@pytest.mark.parametrize("width", [8, 96, 512])
def test_the_margin_covers_the_errors(width):
    """Of the two best, what products say of their difference is off by less than the margin, in every row."""
    x, centroids = mixture(6, 2000, 500, width)
    target = TorchTarget(centroids, "cpu")
    near, exact = torch.from_numpy(x) - target.shift, (torch.from_numpy(x) - target.shift).double()
    low = torch.zeros(len(x), target.low.shape[1], dtype=torch.bfloat16)
    low[:, :width] = near
    scores, labels = target._three_highest(low, len(x))
    margin, excess = target._margin(near, low[:, :width], scores[0])
    far = (target.centroids - target.shift).double()
    first, second = ((exact * far[some]).sum(1) - far[some].square().sum(1) / 2 for some in labels)
    error = ((scores[0] - scores[1]) - (first - second)).abs()
    assert excess == 1 and (error < margin).all() and error.max() > margin.mean() / 20


def test_errors_that_are_not_independent_enlarge_the_margin(monkeypatch):
    """Rows and centroids of few values: all coordinates are rounded to the same side."""
    rng = np.random.default_rng(7)
    x = (rng.integers(2, size=(500, 768)) * 1.0039).astype("f4")
    centroids = np.concatenate([x[:40], -x[:40]])
    found = TorchTarget(centroids, "cpu").find(x)
    monkeypatch.setattr(TorchTarget, "_excess", lambda *args: 1.0)
    assert found.excess > 1.5 and found.margin > 1.5 * TorchTarget(centroids, "cpu").find(x).margin
    np.testing.assert_array_equal(found.labels.numpy(), nearest_centroid(x, centroids)[0])


def test_equal_rows_have_equal_distances_wherever_they_stand():
    a, b = (torch.from_numpy(values) for values in mixture(8, 300, 300, 101))
    whole = module.sq_distances(a, b)
    np.testing.assert_allclose(whole, (a.double() - b.double()).square().sum(1), rtol=1e-14)
    assert all(torch.equal(whole[i:j], module.sq_distances(a[i:j], b[i:j])) for i, j in ((0, 1), (7, 60), (299, 300)))
    assert module.sq_distances(a[:, :1], b[:, :1]).shape == (300,)


def test_what_cannot_be_assigned():
    with pytest.raises(ValueError, match=r"rows \(2, 3\) to centroids \(2, 4\)"):
        torch_target(np.zeros((2, 4), "f4"), "cpu").assign(np.zeros((2, 3), "f4"))
    with pytest.raises(ValueError, match=r"at least one centroid: got \(0, 3\)"):
        torch_target(np.zeros((0, 3), "f4"), "cpu")
    with pytest.raises(ValueError, match="need triton and a GPU for it: got cpu"):
        TorchTarget(np.zeros((1, 3), "f4"), "cpu", by_triton=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="device must be one that torch sees: got cuda"):
        torch_target(np.zeros((1, 3), "f4"), "cuda")


def check_three_highest(n, k, width, config, n_processors):
    """The kernel beside torch: the same scores but for the bits that are cut off, and labels that have them."""
    from curation import nearest_triton

    nearest_triton.facts_of = lambda device: {"multiprocessor_count": n_processors}
    x, centroids = mixture(n + k, n, k, width)
    centroids[k // 2] = centroids[0]  # a tie
    target = TorchTarget(centroids, "cpu")
    near = torch.from_numpy(x) - target.shift
    low = torch.zeros(module.padded(n, module.PADDED), target.low.shape[1], dtype=torch.bfloat16)
    low[:n, :width] = near
    expected = target._three_highest(low, n)
    target.config = config
    target.half[k:] = nearest_triton.PADDING
    found = target._three_highest(low, n)
    real, bound = min(3, k), 2 * module.MARKED * expected.scores[0].abs().max() + 1e-6
    assert found.scores.shape == (3, n) and found.labels.shape == (2, n)
    assert (found.scores[:real] - expected.scores[:real]).abs().max() < bound
    assert (found.scores[real:] < -1e30).all() and (found.scores[:2] >= found.scores[1:]).all()
    for i in range(min(2, k)):
        scores = (low[:n].float() * target.low[found.labels[i]].float()).sum(1) - target.half[found.labels[i]]
        assert (scores - found.scores[i]).abs().max() < bound, "a label is that of its score"
    assert k == 1 or (found.labels[0] != found.labels[1]).all()
    same(x, centroids, target)


def check_kernel():
    """In a process with TRITON_INTERPRET."""
    from triton.runtime import interpreter

    from curation import nearest_triton
    from curation.nearest_triton import Config

    top_three, patch = nearest_triton.top_three, interpreter._patch_lang_tensor

    def as_numpy_wants_it(tensor, scope):  # from 2.4 on an array of one number is no index
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = as_numpy_wants_it
    # it multiplies the bits of bfloat16 as integers: so it gets the same numbers as float32
    nearest_triton.top_three = lambda low, centroids, *how: top_three(low.float(), centroids.float(), *how)
    torch.set_num_threads(1)
    module.PADDED = 128  # a step of the interpreter takes milliseconds
    for copies in (False, True):
        small, wide = Config(64, 32, 64, 4, 1, copies), Config(64, 128, 64, 4, 1, copies)
        check_three_highest(70, 200, 20, small, 1)
        check_three_highest(33, 90, 130, small, 100)  # pieces of one tile
        check_three_highest(250, 100, 8, wide, 1)  # the three highest of a row in one slot of a tile
        check_three_highest(20, 300, 50, Config(128, 16, 16, 4, 1, copies), 50)
        for k in (1, 2, 3, 5):
            check_three_highest(20, k, 8, small, 4)
    print("checked")


@needs_triton
def test_the_kernel_finds_what_torch_does():
    code = f"import runpy; runpy.run_path({__file__!r})['check_kernel']()"
    alone = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=alone, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "checked\n", done.stderr


@needs_triton
@pytest.mark.parametrize("number", range(7))
def test_every_config_compiles_and_fits_its_memory(number):
    """For a GPU of its kind, which need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget

    from curation import nearest_triton as kernel

    assert len(kernel.CONFIGS) == 7
    config, width = kernel.CONFIGS[number], 1024
    x, y = "*bf16", "*bf16"
    if config.tensor_copies:
        x, y = (f"tensordesc<bf16[{rows},{config.depth}]>" for rows in (config.rows, config.columns))
    codes = config.columns // kernel.SLOTS
    fixed = {"WIDTH": width, "M": config.rows, "N": config.columns, "K": config.depth, "LANES": kernel.SLOTS,
             "ROUNDS": codes.bit_length() - 1, "COPIES": config.tensor_copies}  # fmt: skip
    kinds = {"rows": x, "centroids": y, "half": "*fp32", "scores": "*fp32", "labels": "*i32"}
    kinds |= dict.fromkeys(["n_rows", "n_tiles", "tiles_of_split", "score_bits"], "i32")
    kinds |= dict.fromkeys(fixed, "constexpr")
    places = list(kinds)
    source = triton.compiler.ASTSource(
        kernel.three_highest, kinds, {(places.index(name),): value for name, value in fixed.items()},
        {(i,): [["tt.divisibility", 16]] for i in range(2 * config.tensor_copies, 6)},
    )  # fmt: skip
    capability = (kernel.TENSOR_COPIES if config.tensor_copies else kernel.OLDEST)[0] * 10
    options = {"num_warps": config.n_warps, "num_stages": config.n_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.metadata.shared <= config.shared_bytes <= 227 * 1024
    assert "wgmma" in made.asm["ptx"] or not config.tensor_copies


@needs_triton
def test_pieces_keep_processors_busy():
    from curation.nearest_triton import splits_for

    assert splits_for(10**5, 1000, 132) == 1 and splits_for(1, 1000, 1) == 1
    assert splits_for(32, 391, 132) in range(4, 65) and splits_for(1, 3, 132) == 3
