import json
from math import erf

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from embedding.score import ScoreConfig, read_head, score_rows

ACTIVATION = {
    "none": lambda x: x,
    "relu": lambda x: np.where(x > 0, x, 0),
    "gelu": np.vectorize(lambda x: x * (1 + erf(x / 2**0.5)) / 2),
}
OUTPUT = {
    "identity": lambda x: x[:, 0],
    "sigmoid": lambda x: 1 / (1 + np.exp(-x[:, 0])),
    "softmax:2": lambda x: np.exp(x[:, 2]) / np.exp(x).sum(axis=1),
}


def head_file(tensors, **metadata):
    return save({name: np.asarray(value, "f4") for name, value in tensors.items()}, metadata or None)


def layers(*widths, seed=0):
    """Random layers, numbered 0, 2, 4, ... and last 10: by name 10 would stand before 2."""
    rng = np.random.default_rng(seed)
    names = [*range(0, 2 * len(widths) - 4, 2), 10]
    tensors = {}
    for n, d, h in zip(names, widths, widths[1:], strict=False):
        tensors |= {f"layers.{n}.weight": rng.normal(size=(h, d)), f"layers.{n}.bias": rng.normal(size=h)}
    return {name: np.asarray(value, "f4") for name, value in tensors.items()}


@pytest.mark.parametrize("output", OUTPUT)
@pytest.mark.parametrize("activation", ACTIVATION)
def test_scores_are_those_of_the_formula(activation, output):
    tensors = layers(7, 5, 6, 3 if output == "softmax:2" else 1)
    head = read_head(head_file(tensors, activation=activation, output=output), "x")
    x = np.random.default_rng(1).normal(size=(40, 7)).astype("f4")
    y = x.astype(float)
    for n in (0, 2, 10):
        y = ACTIVATION[activation](y) if n else y
        y = y @ tensors[f"layers.{n}.weight"].T.astype(float) + tensors[f"layers.{n}.bias"]
    scores = score_rows(x, head)
    assert scores.dtype == np.float32 and head.width == 7
    np.testing.assert_allclose(scores, OUTPUT[output](y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["", "layers.0."])
def test_one_layer_needs_no_metadata(name):
    weight, bias = np.arange(3.0)[None], np.array([0.5])
    head = read_head(head_file({f"{name}weight": weight, f"{name}bias": bias}), "x")
    np.testing.assert_array_equal(score_rows(np.eye(3, dtype="f4"), head), [0.5, 1.5, 2.5])
    assert score_rows(np.zeros((0, 3), "f4"), head).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_become_float32(dtype):
    weight, bias = torch.randn((1, 9)).to(dtype), torch.randn(1).to(dtype)
    head = read_head(save_torch({"weight": weight, "bias": bias}), "x")
    np.testing.assert_array_equal(head.layers[0].weight, weight.float().numpy())
    np.testing.assert_array_equal(head.layers[0].bias, bias.float().numpy())


def test_what_overflows_shows_and_saturation_does_not():
    tensors = {"weight": [[3e38]], "bias": [0]}
    assert score_rows(np.array([[4]], "f4"), read_head(head_file(tensors), "x"))[0] == np.inf
    sure = read_head(head_file({"weight": [[1e4]], "bias": [0]}, output="sigmoid"), "x")
    np.testing.assert_array_equal(score_rows(np.array([[1], [-1]], "f4"), sure), [1, 0])
    sure = read_head(head_file({"weight": [[1e4], [-1e4]], "bias": [0, 0]}, output="softmax:1"), "x")
    np.testing.assert_array_equal(score_rows(np.array([[1], [-1]], "f4"), sure), [0, 1])


DEEP = {"activation": "relu"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, {}, "must hold layers.<n>.weight and layers.<n>.bias, or one weight and bias, and nothing else: got none"),
        ({"weight": [[1]], "bias": [0], "layers.0.weight": [[1]]}, {},
         "and nothing else: got bias, layers.0.weight, weight"),
        ({**layers(3, 2, 1), "norm.weight": [1]}, DEEP, "and nothing else: got 'norm.weight'"),
        ({"weight": [[1]]}, {}, "a.bin must have bias: it is missing"),
        ({"layers.4.bias": [1]}, {}, "a.bin must have layers.4.weight: it is missing"),
        ({"weight": [1], "bias": [0]}, {}, r"got weight \(1,\) and bias \(1,\)"),
        ({"weight": [[1, 2]], "bias": [0, 0]}, {}, r"got weight \(1, 2\) and bias \(2,\)"),
        ({"weight": [[np.nan]], "bias": [0]}, {}, "must hold finite numbers: weight does not"),
        ({"layers.0.weight": np.ones((2, 3)), "layers.0.bias": np.ones(2), "layers.1.weight": np.ones((1, 3)),
          "layers.1.bias": np.ones(1)}, DEEP, r"got 2 numbers from layer 0 of 2 and a weight \(1, 3\) behind it"),
        (layers(3, 2, 1), {}, r"must say its activation \(none, relu, gelu\) in its metadata: got none"),
        (layers(3, 2, 1), {"activation": "tanh"}, "in its metadata: got 'tanh'"),
        (layers(3, 1), {"output": "exp"}, "must have an output of identity, sigmoid, softmax:<i> .*: got 'exp'"),
        (layers(3, 2), {}, "must give one number for output 'identity', or say softmax:<i>: got 2"),
        (layers(3, 2), {"output": "softmax:2"}, "at least two numbers, one of them for 'softmax:2': got 2"),
        (layers(3, 1), {"output": "softmax:0"}, "at least two numbers, one of them for 'softmax:0': got 1"),
    ],
)  # fmt: skip
def test_a_head_that_is_none_is_told_in_one_sentence(tensors, metadata, words):
    with pytest.raises(ValueError, match=f"a.bin .*{words}" if "a.bin" not in words else words):
        read_head(head_file(tensors, **metadata), "a.bin")


def test_integers_are_no_weights():
    data = save({"weight": np.ones((1, 2), "i4"), "bias": np.ones(1, "f4")})
    with pytest.raises(ValueError, match=r"a.bin must hold floats: weight is I32"):
        read_head(data, "a.bin")


WHOLE = head_file(layers(3, 1))


@pytest.mark.parametrize(
    "data",
    [b"", b"pickle", WHOLE[:20], WHOLE[:-1], WHOLE + b"x", b"\xff" * 99, (5).to_bytes(8, "little") + b"[1,2]",
     (2).to_bytes(8, "little") + b"\xff\xff"],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_told(data):
    with pytest.raises(ValueError, match=r"a\.bin must be a safetensors file: "):
        read_head(data, "a.bin")


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"rows must be \(n, 3\) for this head: got \(2, 4\)"):
        score_rows(np.zeros((2, 4), "f4"), read_head(WHOLE, "x"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head": ""}, "score.head must be a safetensors file: got ''"),
        ({"column": "Nice"}, "score.column must be lower-case letters, digits and _: got 'Nice'"),
        ({"column": "a b"}, "got 'a b'"),
        ({"column": "width"}, "score.column must not be a column that pools have: got 'width'"),
        ({"column": "bytes"}, "got 'bytes'"),
        ({"column": "row"}, "got 'row'"),
        ({"column": "blur"}, "got 'blur'"),
    ],
)
def test_configs_that_cannot_be_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        ScoreConfig(**{"head": "x.safetensors", **values})


def test_the_metadata_is_where_the_format_has_it():
    data = head_file(layers(3, 1), output="sigmoid")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"output": "sigmoid"} and read_head(data, "x").output == "sigmoid"
