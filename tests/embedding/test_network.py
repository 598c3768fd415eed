"""A network on bytes: normalised where it works, filled up when it is compiled, begun without waiting."""

import pickle

import numpy as np
import pytest
import torch

from embedding.flops import vit_flops
from embedding.network import Backbone, Running, begin_with, network_backbone, too_large, vit_backbone
from embedding.pooling import Features
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

PREPROCESS = Preprocess(size=20, crop=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
CPU = Running("cpu", "float32", False)
VIT = ViTConfig(width=32, depth=3, heads=2, patch_size=8, layer_scale=0.5)


def pictures(n):
    rng = np.random.default_rng(n)
    return [rng.integers(0, 256, (20 + i, 30, 3)).astype("u1") for i in range(n)]


def test_bytes_become_the_values_of_the_preprocessing():
    """Bit for bit: the vectors of a CPU are in manifests."""
    seen = []
    begin = begin_with(lambda images: seen.append(images.clone()) or images.flatten(1), PREPROCESS, CPU)
    images = pictures(5)
    rows = begin(np.stack([PREPROCESS.cropped(image) for image in images])).rows()
    want = np.stack([PREPROCESS(image) for image in images])
    np.testing.assert_array_equal(seen[0].numpy(), want)
    np.testing.assert_array_equal(rows, want.reshape(5, -1))
    assert seen[0].is_contiguous() and rows.dtype == np.float32


def test_every_byte_has_its_value():
    scaled = np.arange(256) / 255
    for c in range(3):
        want = (scaled - PREPROCESS.mean[c]) / PREPROCESS.std[c]
        np.testing.assert_allclose(PREPROCESS.values[c], want, rtol=1e-5, atol=1e-6)
    assert PREPROCESS.values.dtype == np.float32


def test_batches_of_a_compiled_network_have_few_heights():
    """Each height would be compiled anew; what fills them up is not seen in the rows."""
    heights = []

    def computed(images):
        heights.append(len(images))
        return images.flatten(1)

    begin, plain = (begin_with(computed, PREPROCESS, CPU._replace(compiled=compiled)) for compiled in (True, False))
    for n in (1, 70, 3, 128, 129, 100):
        batch = np.random.default_rng(n).integers(0, 256, (n, 16, 16, 3)).astype("u1")
        rows = begin(batch).rows()
        expected = heights.pop()
        np.testing.assert_array_equal(rows, plain(batch).rows())
        assert heights.pop() == n
        assert expected == {1: 64, 70: 128, 3: 128, 128: 128, 129: 192, 100: 192}[n]


def test_a_vit_knows_what_it_costs_and_how_small_its_images_may_be():
    backbone = vit_backbone(ViT(VIT), {"name": "vit"}, PREPROCESS, "cls", CPU)
    assert backbone.flops == vit_flops(VIT, 16)
    assert backbone.least_side == PREPROCESS.least_side == 20
    assert network_backbone(lambda x: Features(x.mean((2, 3)), None), {}, PREPROCESS, "cls", CPU).flops is None
    again = pickle.loads(pickle.dumps(backbone.prepare))  # it goes to the processes that decode
    image = pictures(1)[0]
    np.testing.assert_array_equal(again(image), backbone.prepare(image))
    assert again(image).dtype == np.uint8


def test_the_blocks_are_compiled_once_for_all(monkeypatch):
    """After the width is known: a batch of one image is not compiled."""
    made = []

    def compiled(self):
        made.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend)

    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 2])
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch.compiler.reset()
    vit = ViT(VIT)
    backbone = vit_backbone(vit, {"name": "vit"}, PREPROCESS, "cls", CPU._replace(compiled=True))
    assert made == list(vit.blocks) and not graphs
    batch = np.stack([backbone.prepare(image) for image in pictures(5)])
    rows = backbone.forward(batch)
    assert len(graphs) == 1 and (64 * 9, 32) in graphs[0]  # tokens of all images, flat
    want = vit_backbone(ViT(VIT), {"name": "vit"}, PREPROCESS, "cls", CPU).forward(batch)
    np.testing.assert_allclose(rows, want, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("n", [0, 3])
def test_what_works_at_once_is_begun_and_done(n):
    backbone = Backbone(4, {}, lambda image: image, lambda inputs: inputs * 2)
    begun = backbone.begun(np.ones((n, 4), np.float32))
    np.testing.assert_array_equal(begun.rows(), np.full((n, 4), 2, np.float32))
    assert begun.seconds() >= 0


def test_the_sentence_for_a_batch_that_does_not_fit():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert too_large(256, error) == "256 images at a time must fit the memory of the GPU: CUDA out of memory"
