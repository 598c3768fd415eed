import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding.backbone import load_backbone
from embedding.hf_weights import hf_config, load_hf_vit, save_hf, uncovered, vit_config
from embedding.preprocess import Preprocess, read_hf_preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "layer_scale": 0.5}
LEARNED = {"position": "learned", "image_size": 16, "key_bias": True, "n_registers": 0}
VARIANTS = {
    "dinov3": {},
    "dinov3 swiglu": {"ffn": "swiglu", "mlp_ratio": 6.0},
    "dinov3 no bias": {"qkv_bias": False, "n_registers": 0, "rope_base": 50.0},
    "dinov3 key bias": {"key_bias": True},
    "dinov3 plain": {"layer_scale": None, "mlp_ratio": 3.7778, "rope_rescale": 2.0},
    "dinov2": LEARNED,
    "dinov2 swiglu": LEARNED | {"ffn": "swiglu", "norm_eps": 1e-6},
    "dinov2 no bias": LEARNED | {"qkv_bias": False, "key_bias": False},
    "dinov2 no key bias": LEARNED | {"key_bias": False, "layer_scale": None},
    "registers": LEARNED | {"n_registers": 3},
}
PREPROCESS = Preprocess(size=40, crop=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), resample="bilinear")


def random_vit(options, seed=1):
    vit = ViT(ViTConfig(**SMALL | options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return vit


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + 7 * i, 50, 3)).astype("u1") for i in range(n)]


def prepared():
    return torch.from_numpy(np.stack([PREPROCESS(image) for image in pictures()]))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_vit_comes_back_and_is_what_transformers_reads(tmp_path, name):
    vit = random_vit(VARIANTS[name])
    save_hf(tmp_path, vit, PREPROCESS)
    assert read_hf_preprocess(tmp_path) == PREPROCESS
    with torch.no_grad():
        want = vit(prepared())
        again = load_hf_vit(tmp_path, PREPROCESS.side)(prepared())
    for a, b in zip(want, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        theirs = model.eval()(pixel_values=prepared()).last_hidden_state
    torch.testing.assert_close(torch.cat([want.cls[:, None], *want[1:]], 1), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_transformers_is_needed(tmp_path, monkeypatch, name):
    save_hf(tmp_path, random_vit(VARIANTS[name]), PREPROCESS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with torch.no_grad():
        want = random_vit(VARIANTS[name])(prepared()).patches.mean(1).numpy()
    backbone = load_backbone(str(tmp_path), pooling="mean")
    np.testing.assert_allclose(backbone.embed(pictures()), want, rtol=1e-5, atol=1e-5)
    assert backbone.identity["network"] == "openlvd-vit"


def test_saving_twice_gives_the_same_bytes_and_nothing_else(tmp_path):
    for name in "ab":
        save_hf(tmp_path / name, random_vit({}), PREPROCESS)
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"width": 384, "heads": 6, "depth": 12, "patch_size": 16},
        {"width": 384, "heads": 6, "ffn": "swiglu", "mlp_ratio": 6.0},
        {"width": 1152, "heads": 18, "mlp_ratio": 3.7778},
        {"width": 4096, "heads": 32, "ffn": "swiglu", "mlp_ratio": 3.0, "swiglu_align": 64, "qkv_bias": False},
        {"width": 768, "heads": 12, "position": "learned", "image_size": 32, "key_bias": True},
    ],
)
def test_the_hidden_width_of_published_shapes_survives(options):
    config = ViTConfig(**SMALL | options)
    assert vit_config(hf_config(config, 32)).ffn_hidden == config.ffn_hidden


@pytest.mark.parametrize("hidden", [1, 2, 47, 48, 49, 1536, 3413, 4099])
@pytest.mark.parametrize("gated", [True, False])
def test_any_hidden_width_of_dinov3_is_met_exactly(hidden, gated):
    config = {"model_type": "dinov3_vit", "hidden_size": 36, "num_attention_heads": 3, "intermediate_size": hidden}
    assert vit_config(config | {"use_gated_mlp": gated}).ffn_hidden == hidden


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def renamed(prefix):
    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)
        tensors["classifier.weight"] = torch.ones(2, 32)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, num_hidden_layers=3), r"every weight.*: 18 are missing, first encoder.layer.2"),
        (lambda f: edit_config(f, num_hidden_layers=1), r"its config.json: 18 too many, first encoder.layer.1"),
        (lambda f: edit_config(f, hidden_size=64), r"embeddings.cls_token must be \(1, 1, 64\): got \(1, 1, 32\)"),
        (lambda f: edit_config(f, image_size=64), r"position_embeddings must be \(1, 65, 32\): got \(1, 17, 32\)"),
        (lambda f: edit_config(f, patch_size=4), "position_embeddings must be"),
        (lambda f: edit_config(f, use_swiglu_ffn=True), r"missing, first encoder.layer.0.mlp.weights_in.bias"),
        (lambda f: edit_config(f, qkv_bias=False), r"too many, first encoder.layer.0.attention.attention.key.bias"),
        (lambda f: edit_config(f, patch_size=5), "must be a multiple of"),
        (lambda f: edit_weights(f, lambda t: t.pop("layernorm.bias")), "1 are missing, first layernorm.bias"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "must be a whole safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json must be a JSON object"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json must be a JSON object: got list"),
    ],
)  # fmt: skip
def test_weights_that_do_not_match_the_config_are_named(tmp_path, damage, message):
    save_hf(tmp_path, random_vit(LEARNED), PREPROCESS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path))


def test_weights_below_a_head_and_in_half_precision_are_read(tmp_path):
    vit = random_vit(LEARNED)
    save_hf(tmp_path, vit, PREPROCESS)
    edit_weights(tmp_path, renamed("dinov2."))
    edit_weights(tmp_path, lambda t: t.update({name: value.half() for name, value in t.items()}))
    again = load_hf_vit(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again.norm.bias, vit.norm.bias, rtol=1e-3, atol=1e-3)


def test_what_the_own_vit_cannot_be_is_told(tmp_path):
    v3 = hf_config(random_vit({}).config, 32)
    for changes in ({"hidden_act": "relu"}, {"proj_bias": False}, {"mlp_bias": False}, {"value_bias": False},
                    {"num_channels": 1}, {"patch_size": [8, 8]}, {"model_type": "vit"}):  # fmt: skip
        assert next(iter(changes)) in str(uncovered(v3 | changes))
    assert uncovered(v3) is None
    save_hf(tmp_path, random_vit({}), PREPROCESS)
    edit_config(tmp_path, hidden_act="relu")
    with pytest.raises(
        ValueError, match="must be a DINOv2 or DINOv3 ViT to load into the own ViT: got hidden_act 'relu'"
    ):
        load_hf_vit(tmp_path)


@pytest.mark.parametrize(
    ("options", "side", "message"),
    [
        ({}, 30, "must be a multiple of the patch size 8: got 30"),
        (LEARNED | {"mlp_ratio": 2.5}, 32, "vit.mlp_ratio must be a whole number in DINOv2: got 2.5"),
        (LEARNED | {"ffn": "swiglu", "swiglu_align": 64}, 32, "hidden width of the FFN must be 88 in DINOv2: got 128"),
    ],
)
def test_shapes_that_cannot_be_saved_are_named(options, side, message):
    with pytest.raises(ValueError, match=message):
        hf_config(ViTConfig(**SMALL | options), side)
