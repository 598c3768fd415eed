"""``evaluate`` pools as ``embed`` does: it votes with the very vectors that a step of its own would have written."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny import digit

from curation.artifact import Artifact, read_table
from curation.embeddings import embedding_parts
from curation.store import Location
from embedding.backbone import load_vit, save_vit
from embedding.config import POOLINGS
from embedding.decode import decode_rgb
from embedding.maps import cls_attention, heat_rgb, pca_rgb
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.linear import draw_places
from pipelines.stages.maps import MAPS, N_IMAGES, SIDE
from pipelines.stages.table import STAGES
from training.probes import fit_probe, knn_predict, linear_predict

K = 3


def run_steps(root, steps, executor=None):
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(root)), executor or LocalExecutor(recipe.resources))
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


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_probe_is_that_of_the_vectors_of_embed(made, pooling):
    parts = [embedding_parts(made[step_of(of, pooling)]) for of in ("bank", "asked")]
    bank, asked = (np.concatenate([part.read()[1] for part in some]) for some in parts)
    classes, labels = np.unique(column(made["bank"], "label"), return_inverse=True)
    votes = made[step_of("votes", pooling)]
    probe, strength = fit_probe(bank, labels)
    assert column(votes, "linear_predicted").tolist() == classes[linear_predict(probe, asked)].tolist()
    right = column(votes, "linear_predicted") == column(votes, "label")
    assert votes.facts["linear_accuracy"] == right.mean() and votes.counts["linear_correct"] == right.sum()
    assert votes.facts["linear_strength"] == strength


def fill(folder, labels, first=0):
    """Digits ``first``, ``first + 1``, ..., each in the folder of its label; None: beside the folders."""
    for i, label in enumerate(labels):
        at = folder if label is None else folder / label
        at.mkdir(parents=True, exist_ok=True)
        digit(first + i).save(at / f"{first + i:03d}.png")


def score(folder, name="root", part_rows=16, executor=None, **config):
    pools = {of: {"stage": "pool", "source": str(folder / of), "part_rows": part_rows} for of in ("bank", "asked")}
    step = {"stage": "evaluate", "backbone": "pixels", "bank": "bank", "queries": "asked", "n_neighbors": K, **config}
    return run_steps(folder / name, {**pools, "score": step}, executor)["score"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two labelled pools of digits; some images of the bank have no label."""
    folder, target = tmp_path_factory.mktemp("digits"), load_digits().target
    fill(folder / "bank", [None if i % 7 == 3 else f"d{target[i]}" for i in range(120)])
    fill(folder / "asked", [f"d{target[i]}" for i in range(120, 160)], first=120)
    return folder


@pytest.mark.parametrize("linear_rows", [100_000, 50])
def test_how_the_bank_is_cut_and_who_works_does_not_show(digits, ray_executor, linear_rows):
    def told(artifact):
        names = ("label", "predicted", "linear_predicted")
        facts = {key: value for key, value in artifact.facts.items() if key != "backbone"}
        return facts, *(column(artifact, name).tolist() for name in names)

    runs = {rows: score(digits, f"{linear_rows}-{rows}", rows, linear_rows=linear_rows) for rows in (16, 7, 500)}
    assert told(runs[16]) == told(runs[7]) == told(runs[500])
    assert len(set(told(runs[16])[3])) > 5 and runs[16].facts["linear_accuracy"] > 0.5
    spread = score(digits, f"{linear_rows}-ray", 16, ray_executor, linear_rows=linear_rows)
    assert spread.digest == runs[16].digest and spread.facts == runs[16].facts
    another = score(digits, f"{linear_rows}-16", 16, linear_rows=linear_rows, seed=1)
    assert told(another)[3] != told(runs[16])[3]


def test_drawn_rows_are_some_of_the_bank():
    places = draw_places(1000, 100, 0)
    assert len(set(places.tolist())) == 100 and (np.diff(places) > 0).all() and 0 <= places[0] <= places[-1] < 1000
    assert abs(places.mean() - 500) < 100
    assert not np.array_equal(places, draw_places(1000, 100, 1))
    assert draw_places(100, 100, 0).tolist() == list(range(100))


def test_classes_of_one_pool_alone(tmp_path):
    """What the bank does not know is never said, and wrong; what no query shows costs nothing."""
    fill(tmp_path / "bank", [f"d{i % 10}" for i in range(40)])
    fill(tmp_path / "asked", ["d1", "new", "d2", "other"], first=1)
    votes = score(tmp_path)
    said = column(votes, "linear_predicted").tolist()
    assert set(said) <= {f"d{i}" for i in range(10)} and votes.facts["n_classes"] == 10
    assert votes.counts["linear_correct"] == sum(a == b for a, b in zip(said, column(votes, "label"), strict=True))


def test_one_class_is_told_before_anything_is_embedded(tmp_path):
    fill(tmp_path / "bank", ["cat"] * 4)
    fill(tmp_path / "asked", ["cat"] * 2, first=4)
    with pytest.raises(UserError, match="linear probe must have two classes or more: got 'cat' alone") as caught:
        score(tmp_path)
    assert "evaluate.linear: false" in caught.value.hint
    assert not list((tmp_path / "root" / "score").rglob("rejected-*"))
    votes = score(tmp_path, linear=False)
    assert votes.facts["accuracy"] == 1 and not any("linear" in key for key in (*votes.facts, *votes.counts))
    assert read_table(votes.part(0)).column_names == ["row", "label", "predicted"]


def test_maps_show_the_first_query_of_each_label(made):
    votes = made[step_of("votes", "cls")]
    rows = read_table(votes.location / MAPS).to_pylist()
    labels = column(made["asked"], "label").tolist()
    firsts = sorted({label: labels.index(label) for label in labels}.values())[:N_IMAGES]
    assert [row["row_id"] for row in rows] == firsts and len(rows) == N_IMAGES
    assert [row["label"] for row in rows] == [labels[i] for i in firsts]
    assert MAPS in {file.name for file in votes.files}
    for row in rows:
        sizes = {decode_rgb(row[name]).shape for name in ("image", "components", "attention")}
        assert sizes == {(SIDE, SIDE, 3)}


def test_maps_are_those_of_the_encoder_at_twice_its_side(made, tmp_path):
    votes, pool = made[step_of("votes", "cls")], made["asked"]
    rows = read_table(votes.location / MAPS).to_pylist()
    assert {(row["side"], row["grid"]) for row in rows} == {(64, 8)}
    files = column(pool, "source")
    folder = pool.outside("source")[0].path
    vit, preprocess = load_vit(folder.parent / "vit")
    twice = Preprocess(size=64, crop=64)
    assert preprocess.side == 32
    inputs = torch.stack(
        [torch.from_numpy(twice(decode_rgb((folder / files[r["row_id"]]).read_bytes()))) for r in rows]
    )
    with torch.inference_mode():
        patches = vit(inputs).patches.reshape(len(rows), 8, 8, -1).numpy()
        heat = heat_rgb(cls_attention(vit, inputs).numpy())
    for name, expected in (("components", pca_rgb(patches)), ("attention", heat)):
        for row, picture in zip(rows, expected, strict=True):
            shown = np.asarray(Image.open(io.BytesIO(row[name])))
            np.testing.assert_array_equal(shown, picture.repeat(SIDE // 8, 0).repeat(SIDE // 8, 1))


def test_maps_of_few_labels_and_of_none(made, tmp_path):
    """Filled up with the first queries of any label; no more than there are, and nothing of what has no patches."""
    vit = made["asked"].outside("source")[0].path.parent / "vit"
    fill(tmp_path / "bank", ["a", "b"] * 5)
    fill(tmp_path / "asked", ["a"] * 9 + ["b", None], first=20)
    votes = score(tmp_path, part_rows=4, backbone=str(vit))
    rows = read_table(votes.location / MAPS).to_pylist()
    labels = column(votes.input("queries"), "label").tolist()
    firsts = [labels.index("a"), labels.index("b")]
    others = [i for i in range(len(labels)) if i not in firsts]
    assert [row["row_id"] for row in rows] == sorted(firsts + others[: N_IMAGES - 2])
    plain = score(tmp_path, "plain")
    assert MAPS not in {file.name for file in plain.files}
    fill(tmp_path / "few" / "asked", [None] * 3)
    fill(tmp_path / "few" / "bank", ["a", "b"])
    few = score(tmp_path / "few", backbone=str(vit))
    assert [row["label"] for row in read_table(few.location / MAPS).to_pylist()] == [None] * 3
