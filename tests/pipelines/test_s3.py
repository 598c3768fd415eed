"""A whole recipe with images and root on S3, over HTTP: the same content as on a disk."""

import json
import threading
import time
from dataclasses import replace

import pytest

from curation.artifact import Artifact
from curation.store import Location
from pipelines import lock
from pipelines.engine import read_root, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.lock import STALE_S, lock_root


def test_a_recipe_on_s3_gives_the_content_of_a_local_one(tiny, on_s3):
    for path in sorted(p for p in tiny.images.rglob("*") if p.is_file()):
        (on_s3 / f"images/{path.relative_to(tiny.images)}").write(path.read_bytes())
    moved = {"web": "source", "exam": "source", "page": "labels", "scored": "head"}
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


def beat_of(holder: str, age: float = 0.0) -> bytes:
    return json.dumps({"holder": holder, "time": time.time() - age, "token": holder}).encode()


def test_one_run_at_a_time_on_s3(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 5)
    busy = r"another run works on .*, alive at"
    with lock_root(on_s3, print), pytest.raises(UserError, match=busy), lock_root(on_s3, print):
        pass
    with lock_root(on_s3, print):
        pass
    assert on_s3.list() == []


def test_a_dead_holder_is_taken_over_and_that_is_said(on_s3):
    (on_s3 / ".lock").write(beat_of("process 7 on elsewhere", STALE_S + 1))
    said: list[str] = []
    with lock_root(on_s3, said.append):
        assert "process 7 on elsewhere, silent for" in said[0]


@pytest.mark.parametrize("age", [0.0, -3600.0])  # its clock may be ahead of ours
def test_a_holder_that_died_just_now_is_waited_for_and_taken_over(on_s3, monkeypatch, age):
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    (on_s3 / ".lock").write(beat_of("process 7 on elsewhere", age))
    said: list[str] = []
    with lock_root(on_s3, said.append):
        assert "process 7 on elsewhere: waiting for its next sign of life, at most" in said[0]
        assert "taking over" in said[1]
    assert len(said) == 2 and on_s3.list() == []


def test_a_live_holder_is_not(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "STALE_S", 5)
    (on_s3 / ".lock").write(beat_of("process 7 on elsewhere", age=1))
    beat = threading.Timer(0.1, (on_s3 / ".lock").write, [beat_of("process 7 on elsewhere")])
    beat.start()
    with pytest.raises(UserError, match="process 7 on elsewhere, alive at"), lock_root(on_s3, print):
        pass
    beat.join()


def test_one_that_lets_go_while_it_is_waited_for_is_followed(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    (on_s3 / ".lock").write(beat_of("process 7 on elsewhere"))
    end = threading.Timer(0.1, (on_s3 / ".lock").delete)
    end.start()
    said: list[str] = []
    with lock_root(on_s3, said.append):
        assert len(said) == 1 and "waiting" in said[0]
    end.join()
    assert on_s3.list() == []


def test_the_lock_of_a_killed_holder_on_a_disk_is_free(tmp_path):
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    with lock_root(Location(str(tmp_path)), print):
        pass
