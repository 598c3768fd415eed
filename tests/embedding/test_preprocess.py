import json

import numpy as np
import pytest
from PIL import Image

from embedding.preprocess import IMAGENET_MEAN, Preprocess, pixel_descriptor, read_hf_preprocess

HF = {
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype("u1")


def hf_folder(folder, **changes):
    config = {k: v for k, v in (HF | changes).items() if v != "absent"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_resize_crop_and_normalise_by_hand():
    image = picture(50, 90)
    resized = Image.fromarray(image).resize((72, 40), Image.Resampling.BICUBIC)
    crop = np.asarray(resized)[4:36, 20:52] / 255
    want = ((crop - IMAGENET_MEAN) / (0.229, 0.224, 0.225)).transpose(2, 0, 1)
    out = Preprocess(size=40, crop=32)(image)
    assert out.dtype == np.float32
    assert out.shape == (3, 32, 32)
    assert out.flags.c_contiguous
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic", "box"])
def test_each_filter_is_that_of_pillow(resample):
    image = picture(30, 20)
    pre = Preprocess(size=16, crop=None, keep_aspect=False, resample=resample, mean=(0, 0, 0), std=(1, 1, 1), scale=1.0)
    want = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling[resample.upper()]))
    np.testing.assert_array_equal(pre(image).transpose(1, 2, 0), want)


@pytest.mark.parametrize("shape", [(40, 40), (33, 100), (100, 33), (7, 9), (301, 200), (1, 1), (2, 60)])
def test_equals_transformers(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = transformers.BitImageProcessorPil.from_pretrained(hf_folder(tmp_path))
    image = picture(*shape)
    want = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(read_hf_preprocess(tmp_path)(image), want, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {"size": 40, "crop": 32, "keep_aspect": True}),
        ({"crop_size": "absent", "size": 24}, {"size": 24, "crop": None, "keep_aspect": False}),
        ({"size": 48, "crop_size": 32}, {"size": 48, "crop": 32, "keep_aspect": True}),
        (
            {"size": {"height": 24, "width": 24}, "crop_size": None, "do_center_crop": None},
            {"size": 24, "crop": None, "keep_aspect": False},
        ),
        ({"size": {"height": 48, "width": 48}}, {"size": 48, "crop": 32, "keep_aspect": False}),
        ({"do_center_crop": False, "size": 24}, {"size": 24, "crop": None}),
        ({"resample": 2}, {"resample": "bilinear"}),
        ({"do_rescale": False}, {"scale": 1.0}),
        ({"rescale_factor": "absent"}, {"scale": 1 / 255}),
        ({"rescale_factor": 0.5}, {"scale": 0.5}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        ({}, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "resample": "bicubic"}),
    ],
)
def test_reads_the_file_of_hugging_face(tmp_path, changes, want):
    read = read_hf_preprocess(hf_folder(tmp_path, **changes))
    assert {key: getattr(read, key) for key in want} == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": "absent"}, r"preprocessor_config.json must give image_mean: it is absent"),
        ({"size": "absent"}, "must give size"),
        ({"resample": "absent"}, "must give resample"),
        ({"do_resize": False}, "do_resize must be true"),
        ({"size": {"height": 20, "width": 30}}, "size must be a square or, for size, shortest_edge: got"),
        ({"size": {"shortest_edge": 40, "longest_edge": 80}}, "longest_edge"),
        ({"resample": 5}, r"resample must be one of \[0, 1, 2, 3, 4\]: got 5"),
        ({"do_center_crop": False}, "crop must be given with keep_aspect"),
        ({"crop_size": 64}, r"preprocess.crop must be in \[1, size\]: got crop 64, size 40"),
    ],
)
def test_files_of_hugging_face_that_leave_a_question(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_hf_preprocess(hf_folder(tmp_path, **changes))


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "null", b"\xff", json.dumps(HF | {"size": 1.5}),
                                  json.dumps(HF | {"image_std": "abc"})])  # fmt: skip
def test_a_spoilt_file_is_named(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json must be a JSON object as transformers writes it: "
    ):
        read_hf_preprocess(tmp_path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must come with its preprocessing: no preprocessor_config\.json in"):
        read_hf_preprocess(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100, "crop": 224}, "got crop 224, size 100"),
        ({"size": 0}, "size 0"),
        ({"crop": None}, "preprocess.crop must be given"),
        ({"resample": "cubic"}, "got 'cubic'"),
        ({"std": (0.1, 0.0, 0.1)}, "std above 0"),
        ({"mean": (0.1, 0.2)}, "must be 3 numbers"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


@pytest.mark.parametrize("bad", [np.zeros((4, 4), "u1"), np.zeros((4, 4, 3), "f4"), np.zeros((0, 4, 3), "u1")])
@pytest.mark.parametrize("function", [Preprocess(), pixel_descriptor])
def test_arrays_that_are_no_images_are_named(bad, function):
    with pytest.raises(ValueError, match=r"an image must be uint8 \(h, w, 3\): got"):
        function(bad)


def test_a_long_strip_takes_little_memory_and_keeps_its_centre():
    strip = np.zeros((1, 3_000_000, 3), "u1")  # resized whole, it would take 800 GB
    strip[:, 1_500_000:] = 255
    out = Preprocess(size=256, crop=256, mean=(0, 0, 0), std=(1, 1, 1))(strip)
    near = np.asarray(Image.fromarray(strip[:, 1_499_990:1_500_010]).resize((5120, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal((out * 255).round().astype("u1").transpose(1, 2, 0), near[:, 2432:2688])
    assert (out[:, :, 0].min(), out[:, :, -1].max()) == (0, 1)
    np.testing.assert_array_equal(Preprocess()(strip.transpose(1, 0, 2)), Preprocess()(strip).transpose(0, 2, 1))


def test_pixel_descriptor_of_a_16_pixel_image_by_hand():
    image = picture(16, 16)
    want = image.astype(float).ravel() - image.mean()
    out = pixel_descriptor(image)
    assert out.dtype == np.float32
    assert out.shape == (768,)
    np.testing.assert_allclose(out, want / np.linalg.norm(want), atol=1e-6)


@pytest.mark.parametrize(("h", "w"), [(32, 48), (160, 16), (64, 320)])
def test_pixel_descriptor_is_an_average_of_areas(h, w):
    tiles = np.kron(picture(16, 16), np.ones((h // 16, w // 16, 1))) * 0.7
    image = (tiles + picture(h, w, seed=1) * 0.3).astype("u1")
    means = image.astype(float).reshape(16, h // 16, 16, w // 16, 3).mean((1, 3))
    want = np.floor(means + 0.5).ravel()
    want -= want.mean()
    assert pixel_descriptor(image) @ (want / np.linalg.norm(want)) > 0.9999


def test_pixel_descriptor_knows_a_copy_from_another_image():
    smooth = [
        np.asarray(Image.fromarray(picture(5, 7, s)).resize((300, 200), Image.Resampling.BICUBIC)) for s in (0, 1)
    ]
    small = np.asarray(Image.fromarray(smooth[0]).resize((120, 83), Image.Resampling.BICUBIC))
    assert pixel_descriptor(smooth[0]) @ pixel_descriptor(small) > 0.99
    assert pixel_descriptor(smooth[0]) @ pixel_descriptor(smooth[1]) < 0.7
    brighter = (smooth[0] * 0.5 + 60).astype("u1")
    assert pixel_descriptor(smooth[0]) @ pixel_descriptor(brighter) > 0.99


def test_constant_images_are_unit_rows_too():
    axis = np.eye(768, dtype="f4")[0]
    for value in (0, 128, 255):
        np.testing.assert_array_equal(pixel_descriptor(np.full((9, 5, 3), value, "u1")), axis)
    red = pixel_descriptor(np.tile(np.array([200, 10, 10], "u1"), (9, 5, 1)))
    assert np.linalg.norm(red) == pytest.approx(1, abs=1e-6)
    assert red[0] > 0 > red[1]
