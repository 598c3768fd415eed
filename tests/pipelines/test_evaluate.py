"""``evaluate`` pools as ``embed`` does: it votes with the very vectors that a step of its own would have written."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tiny import digit

from curation.artifact import Artifact, read_table
from curation.embeddings import embedding_parts
from curation.store import Location
from embedding.backbone import save_vit
from embedding.config import POOLINGS
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES
from training.probes import knn_predict

K = 3


def run_steps(root, steps):
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources))
    return {result.name: Artifact(result.location) for result in results}


def column(artifact, name):
    return np.concatenate([read_table(artifact.part(i), [name])[name] for i in range(len(artifact.parts))])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For every pooling the vectors of two labelled pools, and the votes of one on the other."""
    folder, vit = tmp_path_factory.mktemp("evaluate"), ViT(ViTConfig(width=32, depth=1, heads=2, patch_size=8))
    with torch.no_grad():  # so that vectors differ by more than their last digits
        for parameter in vit.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    save_vit(folder / "vit", vit, Preprocess(size=32, crop=32))
    for i, label in enumerate(load_digits().target[:80]):
        at = folder / ("bank" if i % 2 else "asked") / str(label)
        at.mkdir(parents=True, exist_ok=True)
        digit(i).save(at / f"{i}.png")
    steps = {of: {"stage": "pool", "source": str(folder / of), "part_rows": 16} for of in ("bank", "asked")}
    for pooling in POOLINGS:
        model = {"backbone": str(folder / "vit"), "pooling": pooling}
        for of in ("bank", "asked"):
            steps[step_of(of, pooling)] = {"stage": "embed", "pool": of, **model}
        votes = {"stage": "evaluate", "bank": "bank", "queries": "asked", "n_neighbors": K}
        steps[step_of("votes", pooling)] = {**votes, **model}
    return run_steps(folder / "root", steps)


def step_of(kind, pooling):
    return f"{kind}-{pooling}".replace("+", "-")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_vote_is_that_of_the_vectors_of_embed(made, pooling):
    parts = [embedding_parts(made[step_of(of, pooling)]) for of in ("bank", "asked")]
    bank, asked = (np.concatenate([part.read()[1] for part in some]) for some in parts)
    classes, labels = np.unique(column(made["bank"], "label"), return_inverse=True)
    votes = made[step_of("votes", pooling)]
    assert bank.shape[1] == (64 if pooling == "cls+mean" else 32)
    assert column(votes, "predicted").tolist() == classes[knn_predict(bank, labels, asked, K)].tolist()
    right = column(votes, "predicted") == column(votes, "label")
    assert votes.facts["accuracy"] == right.mean()
    assert votes.facts["backbone"] == made[step_of("bank", pooling)].facts["backbone"]
    assert votes.facts["backbone"]["pooling"] == pooling


def test_the_votes_hang_on_the_pooling(made):
    votes = [column(made[step_of("votes", pooling)], "predicted").tolist() for pooling in POOLINGS]
    assert len(set(map(tuple, votes))) == len(POOLINGS)


def test_a_pooling_that_is_none_is_refused_when_the_recipe_is_read(tmp_path):
    step = {"stage": "evaluate", "backbone": "pixels", "bank": "a", "queries": "a", "pooling": "max"}
    steps = {"a": {"stage": "pool", "source": str(tmp_path)}, "score": step}
    with pytest.raises(UserError, match=r"evaluate\.pooling must be one of \('cls', 'mean', .*\): got 'max'"):
        parse_recipe({"steps": steps}, STAGES)
