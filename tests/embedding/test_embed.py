import io

import numpy as np
import pytest
from PIL import Image

from embedding.backbone import Backbone, load_backbone
from embedding.decode import decode_rgb
from embedding.embed import BATCH_IMAGES, embed_images, unit_rows
from embedding.preprocess import pixel_descriptor


def file(seed):
    out = io.BytesIO()
    image = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype("u1")
    Image.fromarray(image).save(out, "JPEG")
    return out.getvalue()


def test_good_and_bad_files_are_told_apart():
    images = [file(0), b"no image", file(1), b"", file(2)]
    out = embed_images(load_backbone("pixels"), images)
    np.testing.assert_array_equal(out.good, [0, 2, 4])
    assert out.embeddings.dtype == np.float32
    want = np.stack([pixel_descriptor(decode_rgb(images[i])) for i in (0, 2, 4)])
    np.testing.assert_allclose(out.embeddings, want, atol=1e-6)
    assert {i: bad.reason for i, bad in out.bad.items()} == {1: "undecodable", 3: "undecodable"}
    assert {bad.reason for bad in embed_images(load_backbone("pixels"), images[::2], max_pixels=10).bad.values()} == {
        "too_large"
    }


@pytest.mark.parametrize("images", [[], [b"bad"], [b"bad"] * (BATCH_IMAGES + 1)])
def test_nothing_good_gives_no_rows(images):
    out = embed_images(load_backbone("pixels"), images)
    assert out.embeddings.shape == (0, 768)
    assert out.embeddings.dtype == np.float32
    assert out.good.shape == (0,)
    assert len(out.bad) == len(images)


def test_batches_are_cut_at_fixed_places():
    """Calls on pieces cut at multiples of the batch see the same batches, wherever bad files stand."""
    images = [file(i) if i % 5 else b"bad" for i in range(3 * BATCH_IMAGES + 7)]
    seen = []

    def forward(batch):
        seen.append(len(batch))
        return batch * 3  # embed_images makes unit rows of these

    backbone = Backbone(768, {}, pixel_descriptor, forward)
    whole = embed_images(backbone, images)
    batches, seen[:] = list(seen), []
    cut = BATCH_IMAGES
    pieces = [embed_images(backbone, images[i : i + cut]) for i in range(0, len(images), cut)]
    assert seen == batches
    assert sum(seen) == len(whole.good)
    np.testing.assert_array_equal(np.concatenate([p.embeddings for p in pieces]), whole.embeddings)
    np.testing.assert_array_equal(np.concatenate([p.good + i * cut for i, p in enumerate(pieces)]), whole.good)
    np.testing.assert_allclose(np.linalg.norm(whole.embeddings, axis=1), 1, atol=1e-6)


def test_unit_rows_by_hand():
    x = np.array([[3, 4], [0, -2], [1e-30, 0], [3e30, 4e30]], "f4")
    out = unit_rows(x)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [[0.6, 0.8], [0, -1], [1, 0], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(unit_rows(np.array([[0, 5]])), [[0, 1]])
    assert unit_rows(np.zeros((0, 7), "f4")).shape == (0, 7)
    half = np.full((2, 768), 300, "f2")  # the squares do not fit float16
    np.testing.assert_allclose(np.linalg.norm(unit_rows(half), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_rows_without_a_direction_are_named(bad):
    x = np.ones((4, 3), "f4")
    x[2] = bad
    with pytest.raises(ValueError, match="1 of 4 do not, first row 2 has norm"):
        unit_rows(x)


def test_only_matrices_of_numbers_have_rows():
    with pytest.raises(ValueError, match=r"got float64 \(3,\)"):
        unit_rows(np.ones(3))
    with pytest.raises(ValueError, match="got bool"):
        unit_rows(np.ones((3, 3), bool))
