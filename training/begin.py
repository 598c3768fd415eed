"""Weights to begin with: the backbone of an earlier training, of a folder, or of a model on the Hugging Face hub."""

from dataclasses import asdict

import torch

from embedding.backbone import VIT_FORMAT, find_folder, load_vit
from embedding.folder import read_config
from embedding.hf_weights import load_hf_vit
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

# What is no matter of shape: it changes how a forward is made in training, or how weights are drawn.
_FREE = ("drop_path", "rope_rescale", "rope_rescale_per", "layer_scale", "mlp_ratio", "swiglu_align", "image_size")


def begin_with(vit: ViT, spec: str, image_size: int) -> None:
    """Fill ``vit`` with the weights that ``spec`` names.

    spec: a folder written by ``save_vit`` or by transformers (DINOv2, DINOv3), or a name on the hub. image_size: pixels
    of a global crop, to whose grid learned positions of the Hugging Face models are brought. Raises ValueError for a
    model of another shape, naming the fields of ``train.vit`` that would fit it.
    """
    folder = find_folder(spec)
    own = read_config(folder).get("format") == VIT_FORMAT
    found = load_vit(folder)[0] if own else load_hf_vit(folder, image_size)
    if differ := _differences(found.config, vit.config):
        raise ValueError(f"train.init must be a backbone of the shape of train.vit: {spec} has {differ}")
    shapes = {name: tuple(p.shape) for name, p in vit.state_dict().items()}
    other = [name for name, p in found.state_dict().items() if tuple(p.shape) != shapes.get(name)]
    if other or len(shapes) != len(found.state_dict()):
        first = (other or sorted(shapes.keys() - found.state_dict().keys()))[0]
        raise ValueError(
            f"train.init must be a backbone of the shape of train.vit: {first} is {shapes.get(first)} here, and "
            f"{tuple(found.state_dict()[first].shape) if first in found.state_dict() else None} in {spec}"
        )
    with torch.no_grad():
        vit.load_state_dict(found.state_dict())


def _differences(theirs: ViTConfig, ours: ViTConfig) -> str:
    """The fields in which two shapes differ, as one would set them."""
    there, here = asdict(theirs) | {"ffn_hidden": theirs.ffn_hidden}, asdict(ours) | {"ffn_hidden": ours.ffn_hidden}
    differ = [f"{name} {there[name]} ({here[name]} here)" for name in there if there[name] != here[name]]
    return ", ".join(text for text in differ if text.split()[0] not in _FREE)
