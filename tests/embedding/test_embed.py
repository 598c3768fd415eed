import io
import itertools
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from embedding.backbone import load_backbone
from embedding.decode import MAX_PIXELS, decode_rgb
from embedding.embed import BATCH_IMAGES, Waited, ahead, embed_images, embed_stream, preparation, unit_rows
from embedding.isolate import Processes
from embedding.network import Backbone, Begun
from embedding.preprocess import Preprocess, pixel_descriptor
from embedding.vit import ViT
from embedding.vit_config import ViTConfig


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


def small_vit():
    vit = ViT(ViTConfig(width=32, depth=1, heads=2, patch_size=8, layer_scale=0.5))
    return vit.eval().requires_grad_(False)


def vit_backbone(seen=None):
    vit, preprocess = small_vit(), Preprocess(size=40, crop=32)

    def forward(batch):
        if seen is not None:
            seen.append(len(batch))
        with torch.inference_mode():
            return vit(torch.from_numpy(batch)).cls.numpy()

    return Backbone(32, {}, preprocess, forward)


@pytest.mark.parametrize("n", [0, 1, 7, BATCH_IMAGES, 2 * BATCH_IMAGES + 9])
def test_threads_change_no_byte_and_no_batch(n):
    images = [file(i) if i % 5 else b"bad" for i in range(n)]
    seen = {}
    for threads in (0, 1, 2, 5):
        seen[threads] = []
        parts = list(embed_stream(vit_backbone(seen[threads]), iter(images), threads=threads))
        if threads == 0:
            want = parts
        assert len(parts) == len(want) == -(-n // BATCH_IMAGES)
        for a, b in zip(parts, want, strict=True):
            np.testing.assert_array_equal(a.embeddings, b.embeddings)
            np.testing.assert_array_equal(a.good, b.good)
            assert a.bad == b.bad
    assert all(batches == seen[0] for batches in seen.values())
    whole = embed_images(vit_backbone(), images)
    np.testing.assert_array_equal(
        np.concatenate([whole.embeddings[:0], *(p.embeddings for p in want)]), whole.embeddings
    )


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_may_be_of_any_size(threads):
    seen = []
    images = [file(i) for i in range(50)]
    parts = list(embed_stream(vit_backbone(seen), images, batch=20, threads=threads))
    assert seen == [20, 20, 10]
    rows = np.concatenate([part.embeddings for part in parts])
    np.testing.assert_allclose(rows, embed_images(vit_backbone(), images).embeddings, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_ahead_keeps_the_order_and_the_window(threads):
    rng = np.random.default_rng(threads)
    naps = rng.uniform(0, 0.004, 60)
    drawn, most = [], []

    def items():
        for i in range(60):
            drawn.append(i)
            yield i

    def work(i):
        time.sleep(naps[i])
        return i

    out = []
    for n, value in enumerate(ahead(work, items(), threads, 5)):
        most.append(len(drawn) - n)
        out.append(value)
    assert out == list(range(60))
    assert max(most) <= 5 + threads


def test_a_reader_that_stops_leaves_no_thread():
    before = threading.active_count()
    stream = embed_stream(vit_backbone(), (file(i) for i in itertools.count()), threads=2)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_what_reading_raises_comes_out(threads):
    def images():
        yield from (file(i) for i in range(40))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(embed_stream(vit_backbone(), images(), threads=threads))


@pytest.mark.parametrize("threads", [0, 2])
def test_time_without_data_is_told(threads):
    def images():
        for i in range(2 * BATCH_IMAGES):
            time.sleep(0.002)
            yield file(i)

    waited = Waited()
    list(embed_stream(vit_backbone(), images(), threads=threads, waited=waited))
    assert 2 * BATCH_IMAGES * 0.002 / 2 < waited.seconds <= waited.total  # sleeps; threads may wait for several at once
    log = waited.log(64)
    assert (log["images"], log["waiting_seconds"], log["worker_seconds"]) == (64, waited.seconds, waited.total)


@pytest.mark.parametrize("threads", [0, 2])
def test_rows_are_asked_for_when_the_next_batch_has_begun(threads):
    """So that a GPU has work while its last rows are read; they come in order all the same."""
    done = []

    def begin(inputs):
        number = sum(kind == "begun" for kind, _ in done)
        done.append(("begun", number))

        def rows():
            done.append(("read", number))
            return inputs.reshape(len(inputs), -1).astype(np.float32)

        return Begun(rows, lambda: 0.0)

    backbone = Backbone(768, {}, pixel_descriptor, None, begin=begin)
    images = [file(i) if i % 7 else b"bad" for i in range(4 * BATCH_IMAGES)]
    parts = list(embed_stream(backbone, images, threads=threads))
    assert done == [
        ("begun", 0), ("begun", 1), ("read", 0), ("begun", 2), ("read", 1), ("begun", 3), ("read", 2), ("read", 3)
    ]  # fmt: skip
    whole = embed_images(load_backbone("pixels"), images)
    np.testing.assert_array_equal(np.concatenate([part.embeddings for part in parts]), whole.embeddings)
    np.testing.assert_array_equal(np.concatenate([part.good for part in parts]), whole.good)


def test_a_batch_of_bad_images_alone_asks_nothing_of_the_device():
    seen = []

    def begin(inputs):
        seen.append(len(inputs))
        return Begun(lambda: np.ones((len(inputs), 3), np.float32), lambda: 0.0)

    backbone = Backbone(3, {}, pixel_descriptor, None, begin=begin)
    images = [file(0), *[b"bad"] * (2 * BATCH_IMAGES), file(1)]
    assert [len(part.good) for part in embed_stream(backbone, images)] == [1, 0, 1]
    assert seen == [1, 1]


def test_time_in_which_a_device_works_is_not_waiting():
    """A device that is busy with one batch until the next is there, by its own clock, has waited for nothing."""

    def begin(inputs):
        began = time.perf_counter()

        def rows():
            time.sleep(max(0, began + 0.05 - time.perf_counter()))
            return np.ones((len(inputs), 3), np.float32)

        return Begun(rows, lambda: 0.05)

    backbone = Backbone(3, {}, pixel_descriptor, None, begin=begin)
    waited = Waited()
    list(embed_stream(backbone, [file(i) for i in range(20)], batch=4, waited=waited))
    assert waited.total >= 0.05
    assert waited.seconds == pytest.approx(waited.total - 5 * 0.05)


def test_a_prepared_image_may_come_from_another_process():
    images = [file(i) if i % 5 else b"bad" for i in range(2 * BATCH_IMAGES + 3)]
    backbone = load_backbone("pixels")
    want = embed_images(backbone, images)
    apart = Processes(2)
    prepare = partial(apart, preparation("full", backbone, MAX_PIXELS))
    parts = list(embed_stream(backbone, images, threads=2, prepare=prepare))
    apart.close()
    np.testing.assert_array_equal(np.concatenate([part.embeddings for part in parts]), want.embeddings)
    assert {i: bad for part in parts for i, bad in part.bad.items()} == want.bad


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
