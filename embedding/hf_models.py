"""Image encoders that transformers computes: CLIP and SigLIP (alone or with their text tower), MAE, ViT and their kin.

What a model gives is told by its outputs, not by a list of names:

    summary   CLIP: the image embedding, projected when the folder holds the projection; SigLIP: the vector of its
              attention head; every other model with a token before its patches: that CLS token after the last norm;
              nothing for a SigLIP without its head and for models of patches alone
    patches   the tokens of the last hidden state behind CLS and registers; CLIP's are before its last norm

MAE masks three of four patches at random when it is run as it comes; here it sees all of them, in order.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from embedding.folder import read_config, weights_sha256
from embedding.pooling import Features

_HEADED = ("clip_vision_model", "siglip_vision_model")  # towers whose summary is what their own head pools


def need_transformers(spec: str) -> None:
    """Raise ImportError with what to install unless transformers is there."""
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise ImportError(f"backbone {spec!r} needs the package transformers: pip install 'openlvd[hf]'") from e


def load_hf_model(folder: Path, device: str) -> Callable[[Tensor], Features]:
    """The features of images (B, 3, side, side) by the model in a folder, in float32.

    Raises ValueError for a model that transformers does not know, that is not whole, or is no image encoder;
    ImportError without transformers.
    """
    weights_sha256(folder)  # its message comes before that of transformers
    need_transformers(str(folder))
    model = _load(folder).to(device)
    tower = getattr(model, "vision_model", model)
    with_text = hasattr(model, "get_image_features")
    if not with_text and not isinstance(getattr(tower.config, "hidden_size", None), int):
        raise ValueError(
            f"the model must be an image encoder with hidden_size: got {model.config.model_type} in {folder}"
        )
    if tower.config.model_type in ("siglip2_vision_model", "siglip2"):
        raise ValueError(f"{folder} must take images of one size: SigLIP2 of any aspect (NaFlex) is not read")

    def features(images: Tensor) -> Features:
        if with_text:
            out = model.get_image_features(pixel_values=images)
            if isinstance(out, Tensor):  # before transformers 5, and models of other kinds
                return Features(out, None)
            return Features(out.pooler_output, _patches(out.last_hidden_state, images, tower.config, folder)[1])
        out = model(pixel_values=images, **_all_patches(tower, images))
        first, patches = _patches(out.last_hidden_state, images, tower.config, folder)
        if hasattr(out, "image_embeds"):
            return Features(out.image_embeds, patches)
        return Features(out.pooler_output if tower.config.model_type in _HEADED else first, patches)

    return features


def _load(folder: Path) -> Any:
    """A transformers model in eval mode, float32, every weight from the folder."""
    from transformers import AutoModel, CLIPVisionModelWithProjection

    kinds = read_config(folder).get("architectures") or []
    loader = CLIPVisionModelWithProjection if CLIPVisionModelWithProjection.__name__ in kinds else AutoModel
    try:
        model, info = loader.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by their names
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"{folder} must hold a model that transformers knows, whole and without code: {e}") from e
    _check_weights(model, info, folder)
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
    return model.eval().requires_grad_(False)


def _check_weights(model: Any, info: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError for what transformers would fill with random values, or leave out, without an error."""
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler.") and "mask_token" not in k)
    if missing:
        raise ValueError(
            f"{folder} must hold every weight of the model: {len(missing)} are missing, first {missing[0]}"
        )
    must = f"{folder} must hold the weights of its config.json"
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{must}: {name} must be {tuple(wanted)}: got {tuple(found)}")
    if extra := sorted(name for name in info["unexpected_keys"] if _is_in_layers(model, name)):
        raise ValueError(f"{must}: {len(extra)} too many, first {extra[0]}")


def _is_in_layers(model: Any, name: str) -> bool:
    """Whether a tensor that a model has no place for is a weight of its layers: there are more, or they have less.

    What stands beside the layers, such as another head, a decoder or a text tower, may be left over.
    """
    for full_name in (name, name.removeprefix(f"{model.base_model_prefix}.")):  # a file may hold more than the model
        *path, leaf = full_name.split(".")
        module = model
        for step in path:
            if isinstance(module, torch.nn.ModuleList):
                return leaf in ("weight", "bias")
            module = getattr(module, step, None)
    return False


def _all_patches(model: Any, images: Tensor) -> dict[str, Tensor]:
    """What keeps MAE from shuffling the patches: it sorts them by noise, and this noise is their order."""
    if model.config.model_type != "vit_mae":
        return {}
    n_patches = (images.shape[2] // model.config.patch_size) * (images.shape[3] // model.config.patch_size)
    return {"noise": torch.arange(n_patches, device=images.device).expand(len(images), -1)}


def _patches(tokens: Tensor, images: Tensor, config: Any, folder: Path) -> tuple[Tensor | None, Tensor]:
    """The first token, if it is no patch, and the patches, which are the last tokens."""
    size = config.patch_size if isinstance(getattr(config, "patch_size", None), int) else 0
    n_patches = (images.shape[2] // size) * (images.shape[3] // size) if size else -1
    if tokens.ndim != 3 or not 0 < n_patches <= tokens.shape[1]:
        raise ValueError(
            f"the backbone must give tokens (n, tokens, width), one for each patch: got {tuple(tokens.shape)} from "
            f"{folder}"
        )
    n_before = tokens.shape[1] - n_patches
    return (tokens[:, 0] if n_before else None), tokens[:, n_before:]
