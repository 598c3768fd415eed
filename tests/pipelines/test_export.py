"""``openlvd export``: what a trained step becomes for transformers."""

import json

import pytest
import torch

from embedding.backbone import save_vit
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.cli import app
from pipelines.errors import UserError
from pipelines.export import export

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8}


def encoder(folder, **options):
    vit = ViT(ViTConfig(**{**SMALL, **options}), seed=3)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    save_vit(folder, vit, Preprocess(size=32, keep_aspect=False, crop=None))
    return str(folder)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "dinov3_vit"),
        ({"ffn": "swiglu", "n_registers": 0, "qkv_bias": False}, "dinov3_vit"),
        ({"position": "learned", "image_size": 16, "key_bias": True, "n_registers": 0}, "dinov2"),
        ({"position": "learned", "image_size": 32, "key_bias": True}, "dinov2_with_registers"),
        ({"layer_scale": None}, "dinov3_vit"),
    ],
)
def test_features_are_those_of_transformers(tmp_path, options, kind):
    made = export(encoder(tmp_path / "ours", **options), str(tmp_path / "theirs"))
    assert made.model_type == kind
    assert made.own_difference <= 1e-6 and made.transformers_difference <= 1e-5
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip


def test_a_step_of_a_run_is_exported(tiny, tmp_path, capsys):
    app(["export", f"{tiny.root}/first", "--out", str(tmp_path / "hf"), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["model_type"] == "dinov3_vit" and told["transformers_difference"] <= 1e-5


def test_what_cannot_be_exported_is_said(tiny, tmp_path):
    with pytest.raises(UserError, match="PATH must be a trained encoder: got a pool artifact"):
        export(f"{tiny.root}/web", str(tmp_path / "hf"))
    with pytest.raises(UserError, match=r"PATH must be a trained encoder: no config.json and model.safetensors at"):
        export(str(tmp_path), str(tmp_path / "hf"))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="--out must be a new folder"):
        export(f"{tiny.root}/first", str(tmp_path / "there"))
    assert not (tmp_path / "hf").exists()
