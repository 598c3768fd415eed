"""DINOv2, DINOv2 with registers and DINOv3: weights of the Hugging Face layouts in the project's own ViT, and back.

Needs no transformers. What is not the ViT of ``embedding.vit`` (another activation, a missing bias) is told by
``uncovered`` and left to transformers.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from embedding.folder import read_config, read_tensors
from embedding.preprocess import Preprocess, write_hf_preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

DINOV2, REGISTERS, DINOV3 = "dinov2", "dinov2_with_registers", "dinov3_vit"
STACKED = ("mlp.weights_in.weight", "mlp.weights_in.bias")  # gate and up of DINOv2's SwiGLU, one below the other
# What transformers takes for a key that a config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    DINOV2: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 14,
             "layer_norm_eps": 1e-6, "num_register_tokens": 0},
    REGISTERS: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16,
                "layer_norm_eps": 1e-6, "num_register_tokens": 4},
    DINOV3: {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16,
             "layer_norm_eps": 1e-5, "num_register_tokens": 0},
}  # fmt: skip


def uncovered(config: Mapping[str, Any]) -> str | None:
    """Why the own ViT cannot be the model of a config.json; None: it can."""
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        return f"model_type {kind!r}"
    get = {"num_channels": 3, "hidden_act": "gelu", **config}
    act = "silu" if get.get("use_gated_mlp") else "gelu"
    rules = {
        "patch_size": isinstance(get.get("patch_size", 1), int),
        "image_size": isinstance(get.get("image_size", 1), int),
        "num_channels": get["num_channels"] == 3,
        "hidden_act": get.get("use_swiglu_ffn") or get["hidden_act"] == act,
        "proj_bias": get.get("proj_bias", True),
        "mlp_bias": get.get("mlp_bias", True),
        "value_bias": get.get("query_bias", True) == get.get("value_bias", True),
        "key_bias": get.get("query_bias", True) or not get.get("key_bias", False),
    }
    return next((f"{key} {get.get(key)!r}" for key, kept in rules.items() if not kept), None)


def vit_config(config: Mapping[str, Any], native_size: int | None = None) -> ViTConfig:
    """The shape of the own ViT for a config.json that is covered. native_size: pixels, of learned positions.

    Raises ValueError for a shape that no ViT has.
    """
    kind = config["model_type"]
    get = {**_DEFAULTS[kind], **{key: value for key, value in config.items() if value is not None}}
    width = get["hidden_size"]
    common = {
        "width": width,
        "depth": get["num_hidden_layers"],
        "heads": get["num_attention_heads"],
        "patch_size": get["patch_size"],
        "norm_eps": get["layer_norm_eps"],
        "n_registers": get["num_register_tokens"] if kind != DINOV2 else 0,
        "layer_scale": float(get.get("layerscale_value", 1.0)),
    }
    if kind == DINOV3:
        gated, bias = get.get("use_gated_mlp", False), get.get("query_bias", True)
        common |= {"ffn": "swiglu" if gated else "mlp", "swiglu_align": 1, "qkv_bias": bias}
        common |= {"key_bias": bool(get.get("key_bias", False)), "rope_base": get.get("rope_theta", 100.0)}
        # A quarter of a channel more: the hidden width is what it is, whichever way floats round.
        hidden = get.get("intermediate_size", 1536) + 0.25
        return ViTConfig(**common, mlp_ratio=(1.5 if gated else 1.0) * hidden / width)
    bias = get.get("qkv_bias", True)
    return ViTConfig(
        **common,
        mlp_ratio=float(get.get("mlp_ratio", 4)),
        ffn="swiglu" if get.get("use_swiglu_ffn", False) else "mlp",
        qkv_bias=bias,
        key_bias=bias,
        position="learned",
        image_size=native_size or get.get("image_size", 224),
    )


def load_hf_vit(folder: str | Path, side: int | None = None) -> ViT:
    """The own ViT with the weights of a Hugging Face folder: float32, eval mode, on the CPU.

    side: pixels of the images it is for. Learned positions are brought to that grid once, here, by the rule of
    transformers: bicubic in float32, with antialiasing for DINOv2 with registers, without for DINOv2. (Meta's own
    code for DINOv2 adds 0.1 to the grid: at other than the native size its vectors differ by some 1e-2.) None: the
    native size. Raises ValueError for a model the ViT cannot be, and for weights that do not match the config, with
    the first of their names.
    """
    folder = Path(folder)
    config = read_config(folder)
    if why := uncovered(config):
        raise ValueError(f"{folder} must be a DINOv2 or DINOv3 ViT to load into the own ViT: got {why}")
    wanted = vit_config(config)
    with torch.device("meta"):
        vit = ViT(wanted)
    own = _own_tensors(read_tensors(folder), vit, str(config["model_type"]), folder)
    if wanted.image_size and side and side != wanted.image_size:
        own["pos_embed"] = _at_grid(own["pos_embed"], side // wanted.patch_size, config["model_type"] == REGISTERS)
        with torch.device("meta"):
            vit = ViT(vit_config(config, side))
    vit.load_state_dict(own, assign=True)
    return vit.eval()


def _own_tensors(tensors: Mapping[str, Tensor], vit: ViT, kind: str, folder: Path) -> dict[str, Tensor]:
    """The state of the own ViT, float32. Every tensor of it must be there, with its shape, and none be left over."""
    mark = "embeddings.cls_token"
    prefix = next((name.removesuffix(mark) for name in tensors if name.endswith(mark)), "")  # under a head: "dinov2."
    sources = dict(_sources(vit, kind))
    missing = sorted(name for names in sources.values() for name in names if prefix + name not in tensors)
    optional = {"embeddings.mask_token", *([] if vit.config.n_registers else ["embeddings.register_tokens"])}
    if missing := [name for name in missing if name not in optional]:
        raise ValueError(
            f"{folder} must hold every weight of the model: {len(missing)} are missing, first {missing[0]}"
        )
    read = {prefix + name for names in sources.values() for name in names}
    body = tuple(prefix + name for name in ("embeddings.", "encoder.", "layer.", "layernorm.", "norm."))
    if extra := sorted(name for name in tensors if name.startswith(body) and name not in read):
        raise ValueError(f"{folder} must hold the weights of its config.json: {len(extra)} too many, first {extra[0]}")
    own: dict[str, Tensor] = {}
    for name, parameter in vit.state_dict().items():
        found = [tensors[prefix + source].float() for source in sources[name] if prefix + source in tensors]
        value = torch.cat(found) if found else torch.zeros(parameter.shape)
        if sources[name][0].endswith(STACKED):
            value = value.tensor_split(2)[".up." in name]
        if value.numel() != parameter.numel() or value.squeeze().shape != parameter.squeeze().shape:
            raise ValueError(
                f"{folder} must hold the weights of its config.json: {' + '.join(sources[name])} must be "
                f"{tuple(parameter.shape)}: got {tuple(value.shape)}"
            )
        own[name] = value.reshape(parameter.shape)
    return own


def _sources(vit: ViT, kind: str) -> Iterator[tuple[str, list[str]]]:
    """For each tensor of the own ViT the tensors on disk it is made of, one below the other."""
    v3 = kind == DINOV3
    patches = "embeddings.patch_embeddings" if v3 else "embeddings.patch_embeddings.projection"
    top = {"patch_embed": patches, "norm": "norm" if v3 else "layernorm"}
    tokens = {"cls_token": "cls_token", "mask_token": "mask_token", "registers": "register_tokens",
              "pos_embed": "position_embeddings"}  # fmt: skip
    for name in vit.state_dict():
        if name in tokens:
            yield name, [f"embeddings.{tokens[name]}"]
            continue
        head, _, leaf = name.rpartition(".")
        if head in top:
            yield name, [f"{top[head]}.{leaf}"]
            continue
        _, i, part = name.split(".", 2)
        block = f"layer.{i}" if v3 else f"encoder.layer.{i}"
        yield name, [f"{block}.{source}" for source in _block_sources(part, v3, vit.config)]


def _block_sources(part: str, v3: bool, config: ViTConfig) -> list[str]:
    """The tensors of a block, by the name within the block."""
    head, _, leaf = part.rpartition(".")
    if part in ("ls1", "ls2"):
        return [f"layer_scale{part[-1]}.lambda1"]
    if head == "qkv":
        letters = "qv" if leaf == "bias" and not config.key_bias else "qkv"
        words = {"q": "query", "k": "key", "v": "value"}
        return [f"attention.{x}_proj.{leaf}" if v3 else f"attention.attention.{words[x]}.{leaf}" for x in letters]
    if head == "proj":
        return [f"attention.o_proj.{leaf}" if v3 else f"attention.output.dense.{leaf}"]
    if head in ("norm1", "norm2"):
        return [part]
    names = {"ffn.fc1": "fc1", "ffn.fc2": "fc2"}
    if v3:
        names = {"ffn.fc1": "up_proj", "ffn.fc2": "down_proj"}
        names |= {"ffn.gate": "gate_proj", "ffn.up": "up_proj", "ffn.down": "down_proj"}
    elif config.ffn == "swiglu":
        names = {"ffn.gate": "weights_in", "ffn.up": "weights_in", "ffn.down": "weights_out"}
    return [f"mlp.{names[head]}.{leaf}"]


def _at_grid(pos_1ND: Tensor, side: int, antialias: bool) -> Tensor:
    """Learned positions (1, 1 + S * S, D) for a square grid of another side, (1, 1 + side * side, D)."""
    native = round((pos_1ND.shape[1] - 1) ** 0.5)
    square_1DSS = pos_1ND[:, 1:].float().reshape(1, native, native, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square_1DSS, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([pos_1ND[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def save_hf(folder: str | Path, vit: ViT, preprocess: Preprocess) -> None:
    """Write a ViT as transformers reads it: config.json, model.safetensors and preprocessor_config.json.

    Rotary positions make a DINOv3 model, learned ones DINOv2, with registers if there are any; learned positions are
    brought to the grid of the preprocessed image, so that its vectors are those of ``vit``. Float32. Each
    file is written aside and renamed, the config last. Raises ValueError for a shape these models do not have.
    """
    folder, config = Path(folder), hf_config(vit.config, preprocess.side)
    tensors = {name: tensor.detach().float().cpu() for name, tensor in vit.state_dict().items()}
    if vit.config.image_size:  # antialiased: the rule of the own ViT
        tensors["pos_embed"] = _at_grid(tensors["pos_embed"], preprocess.side // vit.config.patch_size, antialias=True)
    kind, d = str(config["model_type"]), vit.config.width
    if kind != DINOV3 and vit.config.qkv_bias and not vit.config.key_bias:
        for name in [name for name in tensors if name.endswith("qkv.bias")]:
            q, v = tensors[name].split(d)
            tensors[name] = torch.cat([q, torch.zeros(d), v])
    theirs: dict[str, Tensor] = {}
    with torch.device("meta"):
        layout = ViT(vit_config(config))  # every branch has a scale and, in DINOv2, keys have a bias
    for name, sources in _sources(layout, kind):
        value = tensors[name] if name in tensors else torch.ones(d)  # the scale of a branch without one
        if sources[0].endswith(STACKED):
            value = torch.cat([theirs[sources[0]], value]) if sources[0] in theirs else value
            theirs[sources[0]] = value
        else:
            theirs |= dict(zip(sources, value.chunk(len(sources)), strict=True))
    if kind != DINOV3:
        theirs["embeddings.mask_token"] = theirs["embeddings.mask_token"][0]
    if kind == DINOV2:
        del theirs["embeddings.register_tokens"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    aside = folder / ".aside"
    save_file({name: value.contiguous().clone() for name, value in theirs.items()}, aside, {"format": "pt"})
    os.replace(aside, folder / "model.safetensors")  # noqa: PTH105  # one rename
    write_hf_preprocess(folder, preprocess)
    aside.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    os.replace(aside, folder / "config.json")  # noqa: PTH105


def hf_config(config: ViTConfig, side: int) -> dict[str, Any]:
    """The config.json of transformers for a ViT that sees images of ``side`` pixels.

    Raises ValueError for a shape that DINOv2 or DINOv3 cannot have there.
    """
    if side % config.patch_size:
        raise ValueError(f"the side of an image must be a multiple of the patch size {config.patch_size}: got {side}")
    swiglu = config.ffn == "swiglu"
    common: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "patch_size": config.patch_size,
        "image_size": side,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": 1.0 if config.layer_scale is None else config.layer_scale,
        "torch_dtype": "float32",
    }
    if config.position == "rope":
        bias = config.qkv_bias
        common |= {"model_type": DINOV3, "architectures": ["DINOv3ViTModel"], "intermediate_size": config.ffn_hidden}
        common |= {"query_bias": bias, "key_bias": config.key_bias, "value_bias": bias, "use_gated_mlp": swiglu}
        common |= {"hidden_act": "silu" if swiglu else "gelu", "num_register_tokens": config.n_registers}
        return common | {"rope_theta": config.rope_base, "pos_embed_rescale": config.rope_rescale}
    if config.mlp_ratio != int(config.mlp_ratio):
        raise ValueError(f"vit.mlp_ratio must be a whole number in DINOv2: got {config.mlp_ratio}")
    common |= {"mlp_ratio": int(config.mlp_ratio), "use_swiglu_ffn": swiglu, "hidden_act": "gelu"}
    common |= {"qkv_bias": config.qkv_bias, "model_type": DINOV2, "architectures": ["Dinov2Model"]}
    if config.n_registers:
        common |= {"model_type": REGISTERS, "architectures": ["Dinov2WithRegistersModel"]}
        common["num_register_tokens"] = config.n_registers
    if (there := vit_config(common).ffn_hidden) != config.ffn_hidden:
        raise ValueError(f"the hidden width of the FFN must be {there} in DINOv2: got {config.ffn_hidden}")
    return common
