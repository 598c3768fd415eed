"""Weights to begin with: the backbone of an earlier training, of a folder, or of a model on the Hugging Face hub."""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embedding.backbone import VIT_FORMAT, find_folder, load_vit
from embedding.folder import read_config, read_tensors
from embedding.hf_weights import load_hf_vit, uncovered, vit_config
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

_FREE = ("drop_path", "rope_rescale", "rope_rescale_per")  # how a forward is made in training: no matter of shape
_FFN = ("mlp_ratio", "swiglu_align")  # matter as far as the hidden width follows from them
_SCALE = re.compile(r"(^|\.)(ls[12]|layer_scale[12]\.lambda1)$")  # a LayerScale, in our files and in Hugging Face's


class Shape(NamedTuple):
    """The shape of a backbone to begin with."""

    config: ViTConfig
    plain_scales: bool = False  # every LayerScale is 1: a network without them has the same features
    resized: bool = False  # learned positions are brought to the grid of the global crops, whatever it is

    def fields(self) -> dict[str, Any]:
        """The keys of ``train.vit`` that make it, image_size null where it is to be that of the global crops."""
        found = {field.name: getattr(self.config, field.name) for field in fields(ViTConfig)}
        found = {name: value for name, value in found.items() if name not in _FREE}
        if self.plain_scales:
            found["layer_scale"] = None
        if self.config.position == "learned":
            found["rope_rescale"] = None  # what a preset may have set
        if self.resized:
            found["image_size"] = None
        return found


def shape_of(spec: str, image_size: int | None = None) -> Shape:
    """The shape of the backbone that ``spec`` names; of its weights the scales alone are read.

    spec, image_size: as for ``begin_with``; None: the native size. Raises ValueError for what is none, or no ViT of
    ours; ImportError when a name on the hub is given and its client is missing.
    """
    folder = find_folder(spec)
    config = read_config(folder)
    if config.get("format") == VIT_FORMAT:
        return Shape(load_vit(folder)[0].config, _all_ones(read_tensors(folder).items()))
    if why := uncovered(config):
        raise ValueError(f"{spec} must be a DINOv2 or DINOv3 ViT to begin a training with: got {why}")
    theirs = vit_config(config)
    if theirs.image_size and image_size:
        theirs = replace(theirs, image_size=image_size)
    scales = _all_ones(read_tensors(folder).items())
    return Shape(_with_plain_ratio(theirs), scales, resized=theirs.position == "learned")


def differences(theirs: Shape, ours: ViTConfig) -> dict[str, tuple[Any, Any]]:
    """The fields of ``train.vit`` in which two shapes differ: theirs and ours."""
    there, here = asdict(_with_plain_ratio(theirs.config)), asdict(ours)
    same_width, same_ffn = theirs.config.width == ours.width, theirs.config.ffn_hidden == ours.ffn_hidden
    free = {*_FREE, "layer_scale", *(_FFN if same_ffn else ("swiglu_align",) if not same_width else ())}
    found = {name: (there[name], here[name]) for name in there if name not in free and there[name] != here[name]}
    scaled = theirs.config.layer_scale is not None
    if scaled != (ours.layer_scale is not None) and not (scaled and theirs.plain_scales):
        found["layer_scale"] = theirs.config.layer_scale, ours.layer_scale
    return found


def check_shape(spec: str, theirs: Shape, ours: ViTConfig) -> None:
    """Raise ValueError, naming the fields of ``train.vit`` that differ, unless a training can begin with a shape."""
    if differ := differences(theirs, ours):
        said = ", ".join(f"{name} {text_of(there)} ({text_of(here)} here)" for name, (there, here) in differ.items())
        raise ValueError(f"train.init must be a backbone of the shape of train.vit: {spec} has {said}")


def begin_with(vit: ViT, spec: str, image_size: int) -> None:
    """Fill ``vit`` with the weights that ``spec`` names.

    spec: a folder written by ``save_vit`` or by transformers (DINOv2, DINOv3), or a name on the hub. image_size: pixels
    of a global crop, to whose grid learned positions of the Hugging Face models are brought. The layouts of Hugging
    Face always have a LayerScale: where all of it is 1 and ``vit`` has none, it is left out. Raises ValueError for a
    model of another shape, naming the fields of ``train.vit`` that would fit it.
    """
    folder = find_folder(spec)
    own = read_config(folder).get("format") == VIT_FORMAT
    found = load_vit(folder)[0] if own else load_hf_vit(folder, image_size)
    state = found.state_dict()
    check_shape(spec, Shape(found.config, _all_ones(state.items())), vit.config)
    wanted = vit.state_dict()
    with torch.no_grad():
        vit.load_state_dict({name: value for name, value in state.items() if name in wanted or not _SCALE.search(name)})


def _all_ones(tensors: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether every LayerScale among some tensors is 1, and there is one."""
    found = [bool((value == 1).all()) for name, value in tensors if _SCALE.search(name)]
    return bool(found) and all(found)


def _with_plain_ratio(config: ViTConfig) -> ViTConfig:
    """The same shape with the ratio that one would set, where a hidden width was told instead."""
    ratio = round(config.ffn_hidden / config.width * (1.0 if config.ffn == "mlp" else 1.5), 6)
    plain = replace(config, mlp_ratio=ratio, swiglu_align=ViTConfig.swiglu_align)
    return plain if plain.ffn_hidden == config.ffn_hidden else config


def text_of(value: Any) -> str:
    """A value as one would set it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
