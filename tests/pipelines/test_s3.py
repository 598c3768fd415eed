"""A whole recipe with images and root on S3, over HTTP: the same content as on a disk."""

import json
import time
from dataclasses import replace

import pytest

from curation.artifact import Artifact
from curation.store import Location
from pipelines.engine import read_root, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.lock import STALE_S, lock_root


def test_a_recipe_on_s3_gives_the_content_of_a_local_one(tiny, on_s3):
    for path in sorted(p for p in tiny.images.rglob("*") if p.is_file()):
        (on_s3 / f"images/{path.relative_to(tiny.images)}").write(path.read_bytes())
    moved = {"web": "source", "exam": "source", "page": "labels"}
    steps = []
    for step in tiny.recipe.steps:
        field = moved.get(step.name)
        if field is not None:
            here = getattr(step.config, field).removeprefix(str(tiny.images))
            step = replace(step, config=replace(step.config, **{field: f"{on_s3}/images{here}"}))  # noqa: PLW2901
        steps.append(step)
    recipe = replace(tiny.recipe, steps=tuple(steps))
    root = on_s3 / "root"
    for result in run_recipe(recipe, root, LocalExecutor(recipe.resources)):
        there = Artifact(result.location)
        assert there.digest == tiny.artifact(result.name).digest, result.name
        assert there.counts == tiny.artifact(result.name).counts
    assert not [entry.name for entry in root.list() if "scratch" in entry.name or entry.name.endswith(".lock")]
    again = run_recipe(recipe, root, LocalExecutor(recipe.resources))
    assert {result.state for result in again} == {"done before"}
    assert all(artifact is not None for artifact in read_root(root).values())


def test_one_run_at_a_time_on_s3(on_s3):
    with lock_root(on_s3, print), pytest.raises(UserError, match="another run works on"), lock_root(on_s3, print):
        pass
    with lock_root(on_s3, print):
        pass
    assert on_s3.list() == []


def test_a_dead_holder_is_taken_over_and_that_is_said(on_s3):
    lock = on_s3 / ".lock"
    lock.write(json.dumps({"holder": "process 7 on elsewhere", "time": time.time() - STALE_S - 1}).encode())
    said: list[str] = []
    with lock_root(on_s3, said.append):
        assert "process 7 on elsewhere, silent for" in said[0]


def test_a_live_holder_is_not(on_s3):
    (on_s3 / ".lock").write(json.dumps({"holder": "process 7 on elsewhere", "time": time.time()}).encode())
    with pytest.raises(UserError, match="process 7 on elsewhere, alive at"), lock_root(on_s3, print):
        pass


def test_the_lock_of_a_killed_holder_on_a_disk_is_free(tmp_path):
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    with lock_root(Location(str(tmp_path)), print):
        pass
