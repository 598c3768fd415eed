"""Scores: a small head on embeddings, one number an image. Aesthetic and NSFW predictors of the field have this form.

A head is a safetensors file, read and never executed:

- one linear layer: ``weight`` (1, d) and ``bias`` (1,);
- or several: ``layers.<n>.weight`` (h, d) and ``layers.<n>.bias`` (h,), applied by ascending n; numbers may be missing,
  as where a Sequential had a dropout.

Its metadata says the rest: ``activation``, between layers, not behind the last: "relu", "gelu" (with erf) or "none";
and ``output``, of the last layer: "identity" (as it is without this key), "sigmoid", or "softmax:<i>", the probability
of class i. A file with several layers must say its activation.

To convert a PyTorch head, whose ``state_dict`` has these names or is renamed to them::

    tensors = torch.load("head.pth", weights_only=True)
    safetensors.torch.save_file(tensors, "head.safetensors", metadata={"activation": "none", "output": "identity"})

LAION's aesthetic predictors are linear layers on CLIP vectors (``improved-aesthetic-predictor``: several, named
``layers.0``, ``layers.2``, ..., without an activation), their NSFW detectors have "relu" and "sigmoid". A layer in
front that subtracts a mean m and divides by a deviation s goes into the first: weight / s, and bias - weight (m / s).
A head reads unit rows, as embeddings are stored; it fits the backbone that it was trained on alone.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from curation.pool import MEASURES, POOL_SCHEMA

Floats = npt.NDArray[np.float32]

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16: the upper half of an F32
OUTPUTS = ("identity", "sigmoid", "softmax:<i>")
TAKEN = ("row", "bytes", *POOL_SCHEMA.names, *MEASURES)  # columns that select knows already


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """A head, and what its number is called."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    head: str  # a safetensors file, local or s3://, with a linear layer or several: see embedding/score.py
    column: str = "score"  # lower-case letters, digits and _; select.where knows the number by this name

    def __post_init__(self) -> None:
        if not self.head:
            raise ValueError("score.head must be a safetensors file: got ''")
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", self.column):
            raise ValueError(f"score.column must be lower-case letters, digits and _: got {self.column!r}")
        if self.column in TAKEN:
            raise ValueError(f"score.column must not be a column that pools have: got {self.column!r}")


class Layer(NamedTuple):
    """x -> x weight^T + bias."""

    weight: Floats  # (h, d)
    bias: Floats  # (h,)


def none(x: Floats) -> Floats:
    """x itself."""
    return x


def relu(x: Floats) -> Floats:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


def gelu(x: Floats) -> Floats:
    """x Phi(x), by the error function: not its approximation by tanh."""
    from scipy.special import erf

    values: Floats = x * (erf(x / np.float32(np.sqrt(2))) + 1) / 2
    return values


ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {"none": none, "relu": relu, "gelu": gelu}


class Head(NamedTuple):
    """Layers, what stands between them, and what becomes of the last."""

    layers: tuple[Layer, ...]
    activation: str
    output: str  # "identity", "sigmoid" or "softmax"
    chosen: int  # the class of a softmax, otherwise 0

    @property
    def width(self) -> int:
        """Numbers of a vector that it takes."""
        return int(self.layers[0].weight.shape[1])


def read_head(data: bytes, name: str) -> Head:
    """The head in the bytes of a safetensors file, float32. Raises ValueError, with ``name``, for what is none."""
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"{name} must be a safetensors file: {e}") from e
    layers = tuple(_layer(tensors, prefix, name) for prefix in _prefixes(tensors, name))
    for i, (before, after) in enumerate(itertools.pairwise(layers)):
        if after.weight.shape[1] != len(before.bias):
            raise ValueError(
                f"{name} must have layers that fit one another: got {len(before.bias)} numbers from layer {i} of "
                f"{len(layers)} and a weight {after.weight.shape} behind it"
            )
    metadata = header.get("__metadata__") or {}
    output, chosen = _output(metadata.get("output", "identity"), len(layers[-1].bias), name)
    return Head(layers, _activation(metadata, len(layers), name), output, chosen)


def _prefixes(tensors: dict[str, Any], name: str) -> list[str]:
    """What stands before ``weight`` and ``bias`` of each layer, in order."""
    matches = [re.fullmatch(r"(layers\.(\d+)\.)?(weight|bias)", key) for key in tensors]
    strange = [key for key, match in zip(tensors, matches, strict=True) if match is None]
    numbers = {match[1] or "": int(match[2] or -1) for match in matches if match is not None}
    if strange or not numbers or (len(numbers) > 1 and "" in numbers):
        got = f"{min(strange)!r}" if strange else ", ".join(sorted(tensors)) or "none"
        raise ValueError(
            f"{name} must hold layers.<n>.weight and layers.<n>.bias, or one weight and bias, and nothing else: "
            f"got {got}"
        )
    return sorted(numbers, key=lambda prefix: numbers[prefix])


def _layer(tensors: dict[str, Any], prefix: str, name: str) -> Layer:
    for key in ("weight", "bias"):
        if prefix + key not in tensors:
            raise ValueError(f"{name} must have {prefix}{key}: it is missing")
        if tensors[prefix + key]["dtype"] not in FLOATS:
            raise ValueError(f"{name} must hold floats: {prefix}{key} is {tensors[prefix + key]['dtype']}")
    weight, bias = (_floats(tensors[prefix + key]) for key in ("weight", "bias"))
    if weight.ndim != 2 or not weight.size or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} must have a weight (h, d) and a bias (h,) in each layer: got {prefix}weight {weight.shape} and "
            f"{prefix}bias {bias.shape}"
        )
    for key, values in (("weight", weight), ("bias", bias)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must hold finite numbers: {prefix}{key} does not")
    return Layer(weight, bias)


def _floats(tensor: dict[str, Any]) -> Floats:
    values = np.frombuffer(tensor["data"], FLOATS[tensor["dtype"]])
    if tensor["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # an F64 too large for float32 is told as not finite
        return values.reshape(tensor["shape"]).astype(np.float32)


def _activation(metadata: dict[str, Any], n_layers: int, name: str) -> str:
    given = metadata.get("activation", "none" if n_layers == 1 else None)
    if given not in ACTIVATIONS:
        words = "none" if given is None else repr(given)
        raise ValueError(f"{name} must say its activation ({', '.join(ACTIVATIONS)}) in its metadata: got {words}")
    return str(given)


def _output(given: str, n: int, name: str) -> tuple[str, int]:
    """(kind, class) of a last layer that gives ``n`` numbers."""
    match = re.fullmatch(r"(identity|sigmoid|softmax:(\d+))", given)
    if match is None:
        raise ValueError(f"{name} must have an output of {', '.join(OUTPUTS)} in its metadata: got {given!r}")
    if match[2] is None and n != 1:
        raise ValueError(f"{name} must give one number for output {given!r}, or say softmax:<i>: got {n}")
    if match[2] is not None and (n < 2 or int(match[2]) >= n):
        raise ValueError(f"{name} must give at least two numbers, one of them for {given!r}: got {n}")
    return given.partition(":")[0], int(match[2] or 0)


def score_rows(x: Floats, head: Head) -> Floats:
    """float32 (n,): the head of rows x, float32 (n, d). All in float32.

    The bits of a product depend on the height of x: cut blocks at fixed places. Memory: two layers of n rows. What
    overflows is an infinity or NaN in the result. Raises ValueError for rows of another width.
    """
    if x.ndim != 2 or x.shape[1] != head.width:
        raise ValueError(f"rows must be (n, {head.width}) for this head: got {x.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        for i, layer in enumerate(head.layers):
            x = x if i == 0 else ACTIVATIONS[head.activation](x)
            x = x @ layer.weight.T + layer.bias
        if head.output == "sigmoid":
            x = np.reciprocal(1 + np.exp(-x))
        elif head.output == "softmax":
            x = np.exp(x - x.max(axis=1, keepdims=True))
            x = np.divide(x, x.sum(axis=1, keepdims=True), dtype=np.float32)
    return x[:, head.chosen]
