"""Each supported family of models beside transformers' own forward: random weights, a folder as transformers saves it.

family       what runs here        "cls" is                            patches
dinov2       own ViT               CLS after the last norm             after the last norm
registers    own ViT               the same                            the same
dinov3       own ViT               the same                            the same
clip         transformers          the projected image embedding       before the last norm
clip tower   transformers          CLS after the last norm             before the last norm
clip vectors transformers          the projected image embedding       before the last norm
siglip       transformers          the vector of the attention head    after the last norm
siglip tower transformers          the same                            the same
mae          transformers          CLS after the last norm             after the last norm, all of them
vit          transformers          CLS after the last norm             after the last norm
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding.backbone import load_backbone
from embedding.preprocess import read_hf_preprocess

transformers = pytest.importorskip("transformers")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
TOWER = {**SHAPE, "intermediate_size": 48}
TEXT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
V2 = {**SHAPE, "layerscale_value": 0.5}
V3 = {**SHAPE, "layerscale_value": 0.5, "intermediate_size": 72, "num_register_tokens": 3}
PREPROCESS = {
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 3,
}


@dataclass
class Family:
    kind: str  # a class of transformers
    options: dict[str, Any]
    n_before: int  # tokens before the patches
    own: bool = False


DEPTHS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
MAE = {**TOWER, "decoder_num_attention_heads": 2, "decoder_hidden_size": 16}
BOTH = {"vision_config": TOWER, "text_config": TEXT}
FAMILIES = {
    "dinov2": Family("Dinov2Model", V2, 1, True),
    "dinov2 swiglu": Family("Dinov2Model", {**V2, "use_swiglu_ffn": True}, 1, True),
    "dinov2 no bias": Family("Dinov2Model", {**V2, "qkv_bias": False}, 1, True),
    "registers": Family("Dinov2WithRegistersModel", {**V2, "num_register_tokens": 2}, 3, True),
    "registers swiglu": Family("Dinov2WithRegistersModel", {**V2, "use_swiglu_ffn": True}, 5, True),
    "dinov3": Family("DINOv3ViTModel", V3, 4, True),
    "dinov3 swiglu": Family("DINOv3ViTModel", {**V3, **GATED}, 4, True),
    "dinov3 no bias": Family("DINOv3ViTModel", {**V3, "query_bias": False, "value_bias": False}, 4, True),
    "dinov3 key bias": Family("DINOv3ViTModel", {**V3, "key_bias": True, "num_register_tokens": 0}, 1, True),
    "dinov3 relu": Family("DINOv3ViTModel", {**V3, "hidden_act": "relu"}, 4),
    "clip": Family("CLIPModel", {**BOTH, "projection_dim": 24}, 1),
    "clip tower": Family("CLIPVisionModel", TOWER, 1),
    "clip vectors": Family("CLIPVisionModelWithProjection", {**TOWER, "projection_dim": 24}, 1),
    "siglip": Family("SiglipModel", BOTH, 0),
    "siglip tower": Family("SiglipVisionModel", TOWER, 0),
    "siglip headless": Family("SiglipVisionModel", {**TOWER, "vision_use_head": False}, 0),
    "mae": Family("ViTMAEForPreTraining", MAE, 1),
    "vit": Family("ViTModel", TOWER, 1),
    "vit with a head": Family("ViTForImageClassification", TOWER, 1),
    "swin": Family("SwinModel", {"image_size": 32, "patch_size": 4, **DEPTHS}, 0),
}
WITH_CLS = [name for name in FAMILIES if name not in ("siglip headless", "swin")]


def make(folder, name, preprocess=PREPROCESS):
    """A folder as transformers writes it, and the model, every weight random."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    cls = getattr(transformers, family.kind)
    model = cls(cls.config_class(**family.options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return model


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + 7 * i, 50, 3)).astype("u1") for i in range(n)]


def inputs(folder):
    preprocess = read_hf_preprocess(folder)
    return torch.from_numpy(np.stack([preprocess(image) for image in pictures()]))


@torch.no_grad()
def their_vectors(model, images, n_before):
    """Summary and patch tokens by what the class of transformers computes, by its documented outputs."""
    name = type(model).__name__
    if name in ("CLIPModel", "SiglipModel"):
        return model.get_image_features(pixel_values=images).pooler_output, (
            model.vision_model(pixel_values=images).last_hidden_state[:, n_before:]
        )
    if name == "ViTMAEForPreTraining":
        return mae_without_mask(model.vit, images)
    model = getattr(model, "vit", model)
    out = model(pixel_values=images)
    summary = out.last_hidden_state[:, 0]
    if name == "CLIPVisionModelWithProjection":
        summary = out.image_embeds
    elif name in ("CLIPVisionModel", "SiglipVisionModel"):
        summary = out.pooler_output
    return summary, out.last_hidden_state[:, n_before:]


def mae_without_mask(vit, images):
    """MAE's encoder with every patch in its place, from its layers."""
    x = vit.embeddings.patch_embeddings(images) + vit.embeddings.position_embeddings[:, 1:]
    cls = vit.embeddings.cls_token + vit.embeddings.position_embeddings[:, :1]
    x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
    for layer in vit.layers:
        x = layer(x)
    x = vit.layernorm(x)
    return x[:, 0], x[:, 1:]


@pytest.mark.parametrize("name", WITH_CLS)
def test_vectors_are_those_of_transformers(tmp_path, name):
    family = FAMILIES[name]
    summary, patches = (x.numpy() for x in their_vectors(make(tmp_path, name), inputs(tmp_path), family.n_before))
    assert patches.shape[1] == 16
    want = {"cls": summary, "mean": patches.mean(1), "cls+mean": np.concatenate([summary, patches.mean(1)], axis=1)}
    want["gem"] = np.cbrt((np.maximum(patches, 1e-6).astype("f8") ** 3).mean(1))
    for pooling, vectors in want.items():
        backbone = load_backbone(str(tmp_path), pooling=pooling)
        np.testing.assert_allclose(backbone.embed(pictures()), vectors, rtol=1e-5, atol=1e-5)
        assert backbone.width == vectors.shape[1]
        assert backbone.identity.get("network") == ("openlvd-vit" if family.own else "transformers")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "swin"])
def test_patches_are_those_of_transformers(tmp_path, name):
    """Row by row, without CLS and registers."""
    model = make(tmp_path, name)
    want = their_vectors(model, inputs(tmp_path), FAMILIES[name].n_before)[1].numpy()
    backbone = load_backbone(str(tmp_path), pooling="mean")
    assert backbone.patches is not None
    out = backbone.patches(np.stack([backbone.prepare(image) for image in pictures()]))
    assert (out.shape, out.dtype) == ((3, 4, 4, 32), np.float32)
    for y, x in np.ndindex(4, 4):
        np.testing.assert_allclose(out[:, y, x], want[:, 4 * y + x], rtol=1e-5, atol=1e-5)


def one_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config.get("vision_config", config)["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def of_second_layer(tensors):
    """The first weight of the last layer of the image tower."""
    return min(name for name in tensors if re.search(r"layers?\.1\..*weight", name) and not OTHERS.search(name))


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors, of_second_layer(tensors))
    save_file(tensors, path, {"format": "pt"})


OTHERS = re.compile("text_model|decoder")
DAMAGES = {
    "missing": (lambda f: edit(f, lambda t, name: t.pop(name)), r"every weight of the model: 1 are missing, first "),
    "left over": (one_layer, r"the weights of its config.json: 16 too many, first "),
    "misshapen": (
        lambda f: edit(f, lambda t, name: t.update({name: torch.ones(3, 5)})),
        r"the weights of its config.json: .*layers\.1\..*weight must be \(\d+(, \d+)?,?\): got \(3, 5\)\Z",
    ),
}


@pytest.mark.parametrize("name", ["clip", "clip tower", "clip vectors", "siglip", "mae", "vit", "vit with a head"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_match_the_config_are_named(tmp_path, name, damage):
    """By transformers they would be filled with random values, or left out: another head may be, a layer may not."""
    make(tmp_path, name)
    load_backbone(str(tmp_path))
    change, words = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(ValueError, match=f"must hold {words}") as caught:
        load_backbone(str(tmp_path))
    assert re.search(r"layers\.1\.", str(caught.value))


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].own])
@pytest.mark.parametrize("side", [16, 48, 56])
def test_other_sizes_than_the_native_one(tmp_path, name, side):
    """DINOv2 brings its positions to the grid; what transformers does with them there is done here once."""
    square = {**PREPROCESS, "size": {"height": side, "width": side}, "crop_size": None}
    model = make(tmp_path, name, square)
    summary, patches = (x.numpy() for x in their_vectors(model, inputs(tmp_path), FAMILIES[name].n_before))
    assert patches.shape[1] == (side // 8) ** 2
    for pooling, vectors in (("cls", summary), ("mean", patches.mean(1))):
        out = load_backbone(str(tmp_path), pooling=pooling).embed(pictures())
        np.testing.assert_allclose(out, vectors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip tower", "mae", "vit"])
def test_a_size_that_a_model_does_not_take_is_named(tmp_path, name):
    make(tmp_path, name, {**PREPROCESS, "crop_size": {"height": 24, "width": 24}})
    with pytest.raises(ValueError, match="must take images of 24 pixels: "):
        load_backbone(str(tmp_path))


def test_a_siglip_without_its_head_has_patches_alone(tmp_path):
    model = make(tmp_path, "siglip headless")
    with torch.no_grad():
        want = model(pixel_values=inputs(tmp_path)).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(load_backbone(str(tmp_path), pooling="mean").embed(pictures()), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"^pooling must be 'mean' or 'gem' with a model without a CLS token"):
        load_backbone(str(tmp_path))


def test_models_that_show_no_token_for_each_patch_are_refused(tmp_path):
    make(tmp_path, "swin")
    with pytest.raises(ValueError, match=r"must give tokens \(n, tokens, width\), one for each patch: got"):
        load_backbone(str(tmp_path))


def test_mae_draws_no_random_order(tmp_path):
    make(tmp_path, "mae")
    backbone = load_backbone(str(tmp_path), pooling="mean")
    np.testing.assert_array_equal(backbone.embed(pictures()), backbone.embed(pictures()))
    state = torch.get_rng_state()
    backbone.embed(pictures())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["dinov2", "vit", "siglip"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_near_and_in_the_identity(tmp_path, name, precision):
    make(tmp_path, name)
    full, low = (load_backbone(str(tmp_path), precision=value) for value in ("float32", precision))
    a, b = full.embed(pictures()), low.embed(pictures())
    assert b.dtype == np.float32
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.99
    assert not np.array_equal(a, b)
    assert full.identity["precision"] == "float32"
    assert {**full.identity, "precision": precision} == low.identity
