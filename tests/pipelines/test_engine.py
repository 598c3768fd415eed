"""What is done again and what is not; locks, logs, plans; and the refusals of a run."""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny import digit

from curation.artifact import Artifact, read_table
from curation.selection import read_selection
from curation.store import Location
from pipelines.cli import main
from pipelines.engine import plan_recipe, read_root, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES


def changed(recipe, step, **config):
    steps = [replace(s, config=replace(s.config, **config)) if s.name == step else s for s in recipe.steps]
    return replace(recipe, steps=tuple(steps))


def states(recipe, root, until=None):
    results = run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources), until)
    return {r.name: r.state for r in results}


def test_a_second_run_does_nothing(tiny):
    assert set(states(tiny.recipe, tiny.root).values()) == {"done before"}


def test_a_changed_threshold_redoes_that_step_and_those_below_it(tiny, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    found = states(changed(tiny.recipe, "near", min_similarity=0.98), root)
    below = {"near", "unique", "clean", "web_vec", "tree", "split_tree", "near_seeds", "near_clusters", "new_tree",
             "balanced", "shards", "mixed", "mixed_shards", "page"}  # fmt: skip
    assert {name for name, state in found.items() if state == "done"} == below


def test_an_input_with_the_same_bytes_redoes_nothing_below(tiny, tmp_path):
    """Another n_neighbors gives other edges or the same; the same decisions below are found by content."""
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    found = states(changed(tiny.recipe, "usable", where="width >= 23"), root)
    assert {name for name, state in found.items() if state == "done"} == {"usable", "page"}  # the page tells settings


def test_new_files_in_the_source_are_noticed(tiny, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(tiny.images, images)
    recipe = changed(changed(tiny.recipe, "web", source=str(images / "web")), "exam", source=str(images / "exam"))
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    before = [r.state for r in plan_recipe(recipe, Location(str(root)), "web")]
    digit(1000).save(images / "web" / "new.png")
    after = [r.state for r in plan_recipe(recipe, Location(str(root)), "web")]
    assert (before, after) == (["done before"], ["to do"])


def test_a_moved_source_is_found_where_the_recipe_says_now(tiny, tmp_path):
    shutil.copytree(tiny.images, tmp_path / "elsewhere", copy_function=shutil.copy2)
    recipe = changed(tiny.recipe, "web", source=str(tmp_path / "elsewhere" / "web"))
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    shutil.rmtree(root / "raw")
    found = states(recipe, root)
    assert (found["web"], found["raw"], found["first"]) == ("done before", "done", "done before")


def test_a_plan_executes_nothing(tiny, tmp_path):
    root = tmp_path / "new"
    plan = {r.name: r.state for r in plan_recipe(tiny.recipe, Location(str(root)))}
    assert not root.exists()
    assert plan["web"] == "to do"
    assert plan["near"] == "to do after its inputs"


def test_the_status_of_a_root_needs_no_recipe(tiny):
    found = read_root(Location(str(tiny.root)))
    assert list(found) == [step.name for step in tiny.recipe.steps]
    assert all(isinstance(artifact, Artifact) and artifact.is_complete() for artifact in found.values())
    with pytest.raises(UserError, match="must be the root of a run"):
        read_root(Location(str(tiny.images)))


@pytest.mark.parametrize(
    "text",
    ["garbage", "[]", '{"steps": ["a"]}', '{"steps": {"web": 3}}', '{"steps": {"web": {"stage": "pool", "path": 3}}}',
     '{"steps": {"web": {"stage": "pool", "path": "ftp://a/b"}}}', "\udcff"],
)  # fmt: skip
def test_notes_that_cannot_be_read_are_none(tiny, tmp_path, text, capsys, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    before = (root / "run.json").read_bytes()
    (root / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    words = f"{root} must be the root of a run: its run.json does not say the steps of one"
    with pytest.raises(UserError, match=words):
        read_root(Location(str(root)))
    monkeypatch.setattr(sys, "argv", ["openlvd", "status", str(root)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith(f"error: {words}\n\nhint: ")
    assert {r.state for r in plan_recipe(tiny.recipe, Location(str(root)))} == {"done before"}
    assert set(states(tiny.recipe, root).values()) == {"done before"}
    assert (root / "run.json").read_bytes() == before


def noted_done(root):
    return [name for name, artifact in read_root(Location(str(root))).items() if artifact is not None]


def test_a_run_of_some_steps_forgets_no_other(tiny, tmp_path):
    """Up to a step, or stopped before the first: what is valid still stays noted."""
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    before = (root / "run.json").read_bytes()
    states(tiny.recipe, root, "usable")
    assert (root / "run.json").read_bytes() == before
    run = run_recipe(tiny.recipe, Location(str(root)), LocalExecutor(tiny.recipe.resources))
    next(run)
    run.close()
    assert (root / "run.json").read_bytes() == before


def test_what_a_change_makes_obsolete_is_not_noted(tiny, tmp_path):
    """Settings above it or its own, as soon as the run starts; other bytes above it, as soon as they are there."""
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    names = [step.name for step in tiny.recipe.steps]
    near = changed(tiny.recipe, "near", min_similarity=0.98)
    below = {"near", "unique", "clean", "web_vec", "tree", "split_tree", "near_seeds", "near_clusters", "new_tree",
             "balanced", "shards", "mixed", "mixed_shards", "page"}  # fmt: skip
    states(near, root, "usable")
    assert noted_done(root) == [name for name in names if name not in below]
    states(near, root, "near")
    assert noted_done(root) == [name for name in names if name not in below - {"near"}]
    images = tmp_path / "images"
    shutil.copytree(tiny.images, images)
    digit(1000).save(images / "exam" / "3" / "new.png")
    root = tmp_path / "other"
    shutil.copytree(tiny.root, root)
    states(changed(tiny.recipe, "exam", source=str(images / "exam")), root, "exam")
    apart = {"web", "exam", "usable", "web_copy", "near", "unique", "raw", "found", "first", "alike", "near_cells",
             "scored", "liked", "fit"}  # fmt: skip
    assert noted_done(root) == [name for name in names if name in apart]


def test_a_step_of_the_same_bytes_keeps_those_below_noted(tiny, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    states(changed(tiny.recipe, "usable", where="width >= 23"), root, "usable")
    assert noted_done(root) == [step.name for step in tiny.recipe.steps if step.name != "page"]


def test_times_are_in_the_log_and_not_in_the_manifest(tiny):
    artifact = tiny.artifact("near")
    lines = (artifact.location / "run.jsonl").read().splitlines()
    assert json.loads(lines[-1])["seconds"] > 0
    assert "seconds" not in artifact.manifest
    assert "host" not in artifact.manifest


def test_two_runs_on_one_root_at_once_are_refused(tiny, tmp_path):
    """The first run is stopped between two steps: it holds the root until it is closed."""
    root = Location(str(tmp_path / "root"))
    first = run_recipe(tiny.recipe, root, LocalExecutor(tiny.recipe.resources))
    next(first)
    with pytest.raises(UserError, match=f"another run works on .*: process {os.getpid()}"):
        next(run_recipe(tiny.recipe, root, LocalExecutor(tiny.recipe.resources)))
    first.close()
    next(run_recipe(tiny.recipe, root, LocalExecutor(tiny.recipe.resources)))


def test_a_source_that_changed_underneath_stops_the_step(tiny, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(tiny.images, images)
    recipe = changed(tiny.recipe, "web", source=str(images / "web"))
    root = Location(str(tmp_path / "root"))
    steps = run_recipe(recipe, root, LocalExecutor(recipe.resources))
    assert next(steps).name == "web"
    digit(1500).save(images / "web" / "0001.png")
    with pytest.raises(UserError, match=r"0001\.png must hold the image that the pool saw"):
        list(steps)


def run_steps(tmp_path, **steps):
    recipe = parse_recipe({"steps": steps}, STAGES)
    return list(run_recipe(recipe, Location(str(tmp_path / "root")), LocalExecutor(recipe.resources)))


def test_an_empty_pool_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="must hold images"):
        run_steps(tmp_path, web={"stage": "pool", "source": str(tmp_path / "empty")})
    assert not (tmp_path / "root").exists()


def test_a_missing_folder_is_told_before_anything_is_written(tiny, tmp_path):
    web = {"stage": "pool", "source": str(tiny.images / "web")}
    with pytest.raises(UserError, match="exam: no folder or file"):
        run_steps(tmp_path, web=web, exam={"stage": "pool", "source": str(tmp_path / "nowhere")})
    assert not (tmp_path / "root").exists()


def test_a_pool_that_is_all_bad_stops(tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"not an image %d" % i)
    with pytest.raises(UserError, match=r"may be bad \(max_bad_fraction\): got 3 of 3, first 0\.jpg"):
        run_steps(tmp_path, web={"stage": "pool", "source": str(tmp_path / "bad")})
    assert not list((tmp_path / "root").rglob("manifest.json"))


def test_a_threshold_that_drops_too_much_stops_with_the_similarities(tiny, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    recipe = changed(changed(tiny.recipe, "near", min_similarity=0.3), "unique", max_drop_fraction=0.2)
    with pytest.raises(UserError, match=r"step unique: at most 0\.2 of the rows .* similarities 0\.\d+-"):
        states(recipe, root)


def test_a_wrong_expression_names_the_columns(tiny, tmp_path):
    web = {"stage": "pool", "source": str(tiny.images / "web"), "max_bad_fraction": 1.0}
    with pytest.raises(UserError, match=r"select\.where must be an expression") as caught:
        run_steps(tmp_path, web=web, some={"stage": "select", "pool": "web", "where": "widht > 3"})
    assert "width" in caught.value.hint


def test_an_expression_cannot_read_files(tiny, tmp_path):
    web = {"stage": "pool", "source": str(tiny.images / "web"), "max_bad_fraction": 1.0}
    where = f"width > (SELECT count(*) FROM read_csv('{tiny.images}/labels.parquet'))"
    with pytest.raises(UserError, match=r"select\.where must be an expression"):
        run_steps(tmp_path, web=web, some={"stage": "select", "pool": "web", "where": where})


def test_planted_copies_leaks_and_bad_files_are_found(tiny):
    """What the tiny pool was made with is what the steps say of it."""
    pool = tiny.artifact("web")
    rejected = {}
    for file in pool.files:
        if file.name.startswith("rejected-"):
            for row in read_table(pool.location / file.name).to_pylist():
                rejected[row["source"]] = row["reason"]
    assert rejected == {
        "again.png": "exact_duplicate", "broken.jpg": "undecodable", "page.png": "undecodable",
        "tiny.png": "too_small",
    }  # fmt: skip
    names = [read_table(pool.part(i))["source"].to_pylist() for i in range(len(pool.parts))]
    dropped = set()
    for step in ("unique", "clean"):
        for i in range(len(pool.parts)):
            kept = set(read_selection(tiny.artifact(step).part(i)).rows.tolist())
            seen = read_table(tiny.artifact(step).part(i), ["row"])["row"].to_pylist()
            dropped |= {names[i][row] for row in seen if row not in kept}
    copies = {f"{i:04d}.png" for i in range(0, 40, 4)}  # the larger of the two stays
    leaks = {f"leak-{i:04d}.png" for i in range(150, 155)}
    assert dropped == copies | leaks


def test_row_ids_count_through_the_parts(tiny):
    pool = tiny.artifact("web")
    ids = [read_table(pool.part(i), ["row_id"])["row_id"].to_numpy() for i in range(len(pool.parts))]
    np.testing.assert_array_equal(np.concatenate(ids), np.arange(pool.counts["kept"]))
    assert [len(x) for x in ids] == np.diff(pool.starts).tolist()


def test_other_rows_with_the_same_edges_are_decided_anew(tiny, tmp_path):
    """The edges of a k-NN graph may be equal, none for example, while the rows they are about are not."""
    web = {"stage": "pool", "source": str(tiny.images / "exam"), "part_rows": 40}
    steps = {
        "web": web,
        "some": {"stage": "select", "pool": "web", "where": "row_id % 2 = 0"},
        "vec": {"stage": "embed", "pool": "web", "selection": "some", "backbone": "pixels"},
        "near": {"stage": "neighbors", "embeddings": "vec", "min_similarity": 1.0},
        "unique": {"stage": "dedup", "neighbors": "near"},
    }
    run_steps(tmp_path, **steps)
    steps["some"] = {**steps["some"], "where": "row_id % 2 = 1"}
    last = run_steps(tmp_path, **steps)[-1]
    assert last.state == "done"
    assert read_selection(Artifact(last.location).part(0)).rows.tolist() == list(range(1, 40, 2))


def test_a_selection_of_another_pool_is_refused(tiny, tmp_path):
    steps = {
        "a": {"stage": "pool", "source": str(tiny.images / "web"), "max_bad_fraction": 1.0},
        "b": {"stage": "pool", "source": str(tiny.images / "exam")},
        "some": {"stage": "select", "pool": "b", "where": "width > 3"},
        "shards": {"stage": "shards", "pool": "a", "selection": "some"},
    }
    with pytest.raises(UserError, match=r"shards\.selection must select from the pool of shards\.pool: some selects"):
        run_steps(tmp_path, **steps)


def test_a_model_folder_that_moves_is_the_same_model(tiny, tmp_path):
    trained = tiny.artifact("first")
    for name in ("one", "two"):
        shutil.copytree(trained.location.uri, tmp_path / name)
    states_of = {}
    for name in ("one", "two"):
        vec = {"stage": "embed", "pool": "b", "backbone": str(tmp_path / name)}
        results = run_steps(tmp_path, b={"stage": "pool", "source": str(tiny.images / "exam")}, vec=vec)
        states_of[name] = results[-1].state
    assert states_of == {"one": "done", "two": "done before"}


def test_parts_of_another_kind_of_machine_are_made_anew(tiny, tmp_path, monkeypatch):
    """A package was upgraded between a kill and the next run: the step does not mix two kinds of bits."""
    root = tmp_path / "root"
    shutil.copytree(tiny.root, root)
    (step,) = (root / "near").iterdir()
    (step / "manifest.json").unlink()
    (step / "scratch").mkdir()
    (step / "scratch" / "numerics.json").write_text("{}")
    before = (step / "part-0000000.parquet").stat().st_mtime_ns
    assert states(tiny.recipe, root)["near"] == "done"
    assert (step / "part-0000000.parquet").stat().st_mtime_ns > before


def test_a_failed_attempt_is_in_the_log_and_the_root_has_a_status(tiny, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError):
        run_steps(tmp_path, web={"stage": "pool", "source": str(bad)})
    assert read_root(Location(str(tmp_path / "root"))) == {"web": None}
    (log,) = (tmp_path / "root").rglob("run.jsonl")
    assert "may be bad" in json.loads(log.read_text().splitlines()[-1])["failed"]
