"""What single stages do with input that is not as it should be."""

import io
import json
import tarfile

import pytest
from tiny import TRAIN, digit

from curation.artifact import Artifact, read_table
from curation.listing import ROOT_FILE
from curation.selection import read_selection
from curation.store import Location
from pipelines import engine
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages import evaluate, sample
from pipelines.stages.table import STAGES


def png(i, side=32):
    out = io.BytesIO()
    digit(i, side).save(out, "PNG")
    return out.getvalue()


def fill(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def run_steps(root, **steps):
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources))
    return {result.name: Artifact(result.location) for result in results}


def test_a_trained_model_is_saved_with_the_normalisation_it_was_trained_with(tiny, tmp_path):
    mean, std = [0.4, 0.3, 0.2], [0.5, 0.6, 0.7]
    web = {"stage": "pool", "source": str(tiny.images / "exam")}
    raw = {"stage": "shards", "pool": "web"}
    train = {"stage": "train", "shards": "raw", **TRAIN, "n_steps": 1, "augment": {"mean": mean, "std": std}}
    made = run_steps(tmp_path / "root", web=web, raw=raw, first=train)["first"]
    saved = json.loads((made.location / "config.json").read())
    found = next(values for values in saved.values() if isinstance(values, dict) and "std" in values)
    assert (found["mean"], found["std"]) == (mean, std)


SMALL = 32 * 32  # pixels: what an embed step with this limit refuses, its pool may have taken


def with_large(folder, n_small, n_large):
    fill(folder, {f"{i:03d}.png": png(i) for i in range(n_small)})
    fill(folder, {f"{i:03d}-large.png": png(i, 64) for i in range(n_large)})


def test_selected_rows_that_embed_rejected_are_bad(tmp_path):
    with_large(tmp_path / "web", 60, 2)
    fill(tmp_path / "exam", {"a.png": png(5, 40)})
    pool = {"stage": "pool", "part_rows": 16}
    steps = {
        "web": {**pool, "source": str(tmp_path / "web")},
        "exam": {**pool, "source": str(tmp_path / "exam")},
        "usable": {"stage": "select", "pool": "web", "where": "width > 0"},
        "vectors": {"stage": "embed", "pool": "web", "backbone": "pixels", "max_pixels": SMALL},
        "exam_vectors": {"stage": "embed", "pool": "exam", "backbone": "pixels"},
        "clean": {"stage": "decontaminate", "embeddings": "vectors", "selection": "usable",
                  "reference": "exam_vectors", "min_similarity": 0.99},
    }  # fmt: skip
    made = run_steps(tmp_path / "root", **steps)
    assert made["vectors"].counts["bad"] == 2
    counts = made["clean"].counts
    assert (counts["rows"], counts["kept"], counts["dropped"], counts["bad"]) == (62, 59, 1, 2)
    pool, seen = made["web"], []
    for i in range(len(pool.parts)):
        rows = read_table(made["clean"].part(i), ["row"])["row"]
        seen += read_table(pool.part(i), ["source"])["source"].take(rows).to_pylist()
    assert len(seen) == 60 and not any("large" in name for name in seen)
    few = {**steps, "few": {"stage": "select", "pool": "web", "where": "source < '050'"}}
    few["vectors"] = {**few["vectors"], "selection": "few"}
    order = ("web", "exam", "usable", "few", "vectors", "exam_vectors")
    few["tree"] = {"stage": "cluster", "embeddings": "vectors", "n_clusters": [2], "n_resamples": 0}
    seeds = {"stage": "retrieve", "seeds": ["exam_vectors"], "selection": "usable"}
    few["near"] = {**seeds, "mode": "sample", "embeddings": "vectors"}
    few["group"] = {**seeds, "mode": "cluster", "hierarchy": "tree", "min_hits": 0}
    words = "the {} artifact .*/{}/.* must cover every row .* are missing, first row .*; the selection is .*/usable/"
    for last, source in (("clean", "embed vectors"), ("near", "embed vectors"), ("group", "cluster tree")):
        steps = {name: few[name] for name in (*order, "tree", last)}
        with pytest.raises(UserError, match=f"step {last}: " + words.format(*source.split())) as caught:
            run_steps(tmp_path / "root", **steps)
        assert "embed with this selection" in caught.value.hint


def test_an_embedding_step_with_too_many_bad_images_stops(tmp_path):
    with_large(tmp_path / "web", 6, 3)
    web = {"stage": "pool", "source": str(tmp_path / "web")}
    embed = {"stage": "embed", "pool": "web", "backbone": "pixels", "max_pixels": SMALL}
    words = r"step x: at most 0\.05 of the images may be bad \(max_bad_fraction\): got 3 of 9, first 000-large\.png \("
    with pytest.raises(UserError, match=words):
        run_steps(tmp_path / "root", web=web, x=embed)
    assert run_steps(tmp_path / "root", web=web, x={**embed, "max_bad_fraction": 0.4})["x"].counts["bad"] == 3


def test_a_copy_says_what_it_is_a_copy_of(tmp_path):
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, i in (("c3/x.png", 2), ("c3/again.png", 1)):
            info = tarfile.TarInfo(name)
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
    (tmp_path / "web").mkdir()
    (tmp_path / "b.tar").rename(tmp_path / "web" / "b.tar")
    files = {"a.png": png(1), "c.png": png(2), "d.png": png(3), "e.png": png(1), "f.png": png(3), "g.png": b"x"}
    fill(tmp_path / "web", files)
    web = {"stage": "pool", "source": str(tmp_path / "web"), "part_rows": 2, "max_bad_fraction": 1.0}
    pool = run_steps(tmp_path / "root", web=web)["web"]
    rejected = [file.name for file in pool.files if file.name.startswith("rejected-")]
    rows = [row for name in rejected for row in read_table(pool.location / name).to_pylist()]
    assert {(row["source"], row["member"]): row["duplicate_of"] for row in rows} == {
        ("b.tar", "c3/again.png"): "a.png", ("c.png", None): "b.tar/c3/x.png", ("e.png", None): "a.png",
        ("f.png", None): "d.png", ("g.png", None): None,
    }  # fmt: skip
    labels = [read_table(pool.part(i), ["label"])["label"].to_pylist() for i in range(len(pool.parts))]
    assert any("c3" in some for some in labels)


def test_a_root_inside_the_source_is_no_image(tmp_path, monkeypatch):
    fill(tmp_path, {f"{i}.png": png(i) for i in range(4)})
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe({"steps": {"web": {"stage": "pool", "source": "."}}}, STAGES)
    states = []
    for _ in range(2):
        states += [r.state for r in run_recipe(recipe, Location("runs"), LocalExecutor(recipe.resources))]
    assert states == ["done", "done before"]
    assert engine.RUN_FILE == ROOT_FILE


def test_a_compressed_archive_is_refused_with_a_hint(tmp_path):
    fill(tmp_path / "web", {"b.tar.gz": b"x"})
    with pytest.raises(UserError, match=r"must be unpacked to \.tar .* first b\.tar\.gz") as caught:
        run_steps(tmp_path / "root", web={"stage": "pool", "source": str(tmp_path / "web")})
    assert ".tar" in caught.value.hint


def score(tmp_path, bank, queries, **config):
    fill(tmp_path / "bank", bank)
    fill(tmp_path / "queries", queries)
    pools = {name: {"stage": "pool", "source": str(tmp_path / name), "part_rows": 4} for name in ("bank", "queries")}
    step = {"stage": "evaluate", "backbone": "pixels", "bank": "bank", "queries": "queries", **config}
    return run_steps(tmp_path / "root", **pools, score=step)["score"]


def test_rows_without_a_label_take_no_place_among_the_neighbours(tmp_path):
    """The bank's unlabelled images are those nearest to the queries."""
    loose = {f"{side}.png": png(1, side) for side in range(33, 45)}
    made = score(tmp_path, {"a/0.png": png(0), "b/1.png": png(11), **loose}, {"b/x.png": png(1, 46)}, n_neighbors=5)
    assert made.facts["accuracy"] == 1 and made.facts["n_classes"] == 2
    assert read_table(made.part(0))["predicted"].to_pylist() == ["b"]


def test_a_bank_without_labels_is_told_before_anything_is_embedded(tmp_path):
    with pytest.raises(UserError, match="the bank must have labels: got none"):
        score(tmp_path, {"0.png": png(0)}, {"b/x.png": png(1, 46)})
    assert not list((tmp_path / "root" / "score").rglob("rejected-*"))


def test_a_bank_whose_labelled_images_are_all_bad_predicts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_PIXELS", SMALL)
    with pytest.raises(UserError, match="the bank must have labelled images that decode: got none"):
        score(tmp_path, {"a/0.png": png(0, 64), "b/2.png": png(2, 64), "1.png": png(1)}, {"b/x.png": png(1, 31)})


@pytest.mark.parametrize(("step", "module", "name"), [("balanced", sample, "leaf_quotas"), ("score", evaluate, "pc")])
def test_o_of_rows_is_never_on_the_driver(tiny, without, ray_executor, monkeypatch, step, module, name):
    """What gathers rows is made useless in this process; workers have their own."""
    monkeypatch.setattr(module, name, None)
    root = without(step)
    for _ in run_recipe(tiny.recipe, Location(str(root)), ray_executor, step):
        pass
    assert tiny.artifact(step, root).digest == tiny.artifact(step).digest


def test_the_sample_counts_what_it_drew(tiny):
    made = tiny.artifact("balanced")
    drawn = sum(int(read_selection(made.part(i)).counts.sum()) for i in range(len(made.parts)))
    assert made.counts["drawn"] == drawn == 60 and made.counts["bad"] == 0
