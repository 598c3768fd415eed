"""``embed`` with the decoder ``scaled``: nearly the vectors of a full decode, under another name."""

import numpy as np
import pytest
import torch
from PIL import Image

from curation.artifact import Artifact
from curation.embeddings import read_embeddings
from curation.store import Location
from embedding.backbone import save_vit
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES


@pytest.fixture
def photos(tmp_path):
    """Smooth pictures of 800 x 1067."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(small).resize((1067, 800), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)
    return folder


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(width=32, depth=2, heads=2, patch_size=8))
    with torch.no_grad():
        for weights in vit.parameters():
            weights.normal_(0, 0.3)  # fresh weights hardly look at the image
    save_vit(tmp_path / "model", vit, Preprocess(size=48, crop=40))
    return tmp_path / "model"


@pytest.mark.parametrize("backbone", ["pixels", "vit"])
def test_vectors_are_near_those_of_a_full_decode_and_say_their_decoder(photos, model, tmp_path, backbone):
    embed = {"stage": "embed", "pool": "web", "backbone": str(model) if backbone == "vit" else "pixels"}
    steps = {
        "web": {"stage": "pool", "source": str(photos)},
        "full": embed,
        "scaled": {**embed, "decoder": "scaled"},
    }
    recipe = parse_recipe({"steps": steps}, STAGES)
    executor = LocalExecutor(recipe.resources)
    made = {r.name: r.location for r in run_recipe(recipe, Location(str(tmp_path / "root")), executor)}
    full, scaled = (Artifact(made[name]) for name in ("full", "scaled"))
    named = scaled.manifest["facts"]["backbone"]
    assert named.pop("decoder") == "scaled"
    assert named == full.manifest["facts"]["backbone"]
    x, y = (read_embeddings(a.part(0))[1].astype("f4") for a in (full, scaled))
    assert len(x) == len(y) == 9
    between = np.linalg.norm(x[:, None] - x[None], axis=2)[~np.eye(9, dtype=bool)]
    assert 0 < np.linalg.norm(x - y, axis=1).max() < between.min() / 5


def test_a_decoder_that_is_none_is_named():
    from embedding.config import EmbedConfig

    with pytest.raises(ValueError, match=r"embed.decoder must be one of \('full', 'scaled'\): got 'fast'"):
        EmbedConfig(backbone="pixels", decoder="fast")
