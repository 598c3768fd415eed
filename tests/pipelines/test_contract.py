"""The contract of every stage: the same bytes whatever happens, counts that add up, inputs untouched."""

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hold_digests import DIGESTS, digests_of, machine_tag
from tiny import EXTRA_STEPS, STEP_OF_STAGE, answer

from curation.artifact import Artifact, FileInfo
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.fingerprint import look_outside, prepare, reached
from pipelines.recipe import STEP, Recipe
from pipelines.stage import FOUND, Output
from pipelines.stages.table import STAGES

STEPS = sorted([*STEP_OF_STAGE.values(), *EXTRA_STEPS])
N_KILLS = int(os.environ.get("OPENLVD_KILLS", "2"))


def run_until(recipe: Recipe, root: Path, step: str, executor: Any = None) -> None:
    executor = executor or LocalExecutor(recipe.resources)
    for _ in run_recipe(recipe, Location(str(root)), executor, step):
        pass


def content(folder: Path) -> dict[str, str]:
    """Every file of a finished step but its logs, by checksum."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.jsonl" and path.parent.name != "log"
    }


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a finished file is written again; unfinished ones and scratch may come and go."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("run.jsonl", "run.json", ".lock")
        and not path.name.startswith(".side-")
        and "scratch" not in path.parts
    }


def test_every_stage_is_in_the_contract(tiny):
    assert set(STEP_OF_STAGE) == set(STAGES)
    assert {step.stage for step in tiny.recipe.steps} == set(STAGES)
    for step in ("web", "web_vec", "near", "unique", "clean", "tree", "balanced", "found", *EXTRA_STEPS):
        assert len(tiny.artifact(step).parts) >= 8, step


@pytest.mark.parametrize("step", STEPS)
def test_two_runs_give_the_same_bytes(tiny, without, step):
    root = without(step)
    run_until(tiny.recipe, root, step)
    assert content(root / step) == content(tiny.root / step)


@pytest.mark.parametrize("step", STEPS)
def test_ray_gives_the_same_bytes(tiny, without, ray_executor, step):
    root = without(step)
    run_until(tiny.recipe, root, step, ray_executor)
    assert content(root / step) == content(tiny.root / step)


def stop_at_publish(recipe: Recipe, root: Path, step: str, n: int, told: Any) -> None:
    """In another process: run a step, and at its n-th file, written but not yet named, wait to be killed."""
    publish = Location.publish
    seen = 0

    def slow(self: Location, side: Path) -> None:
        nonlocal seen
        if f"/{step}/" in self.uri:
            seen += 1
            if seen == n:
                told.send(n)
                time.sleep(600)
        publish(self, side)

    Location.publish = slow  # type: ignore[method-assign]
    run_until(recipe, root, step)
    told.send(0)  # there were fewer files


def kill_at(context: Any, recipe: Recipe, root: Path, step: str, n: int) -> bool:
    """SIGKILL a run of a step in the middle of its n-th file; False when it had fewer."""
    ours, theirs = context.Pipe()
    process = context.Process(target=stop_at_publish, args=(recipe, root, step, n, theirs))
    process.start()
    reached = answer(process, ours) == n
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return reached


def parts_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """The finished parts; what stands beside a part is written before it, and again when the part is not there."""
    return {name: stamp for name, stamp in stamps(folder).items() if "/part-" in name} if folder.exists() else {}


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tiny, without, other_process, step):
    root = without(step)
    folder = root / step
    rng = np.random.default_rng([len(step), N_KILLS])
    n_files = len(tiny.artifact(step).files)
    for kill in range(N_KILLS):
        at = 1 if kill == 0 and n_files < 3 else int(rng.integers(1, max(2, n_files)))
        before = parts_of(folder)
        if not kill_at(other_process, tiny.recipe, root, step, at):
            break  # so little was left that it finished
        after = parts_of(folder)
        assert {name: after.get(name) for name in before} == before, "a finished part was done again"
    before = parts_of(folder)
    run_until(tiny.recipe, root, step)
    assert content(folder) == content(tiny.root / step)
    after = parts_of(folder)
    assert {name: after[name] for name in before} == before, "a finished part was done again"


@pytest.mark.parametrize("step", STEPS)
def test_counts_add_up(tiny, step):
    counts = tiny.artifact(step).counts
    assert counts["rows"] == counts["kept"] + counts["dropped"] + counts.get("bad", 0)
    assert counts["rows"] > 0


@pytest.mark.parametrize("step", STEPS)
def test_inputs_are_untouched(tiny, without, step):
    root = without(step)
    before = stamps(root), stamps(tiny.images)
    run_until(tiny.recipe, root, step)
    after = stamps(root)
    assert {name: after[name] for name in before[0]} == before[0]
    assert stamps(tiny.images) == before[1]


# Another valid value of a field, where adding one would not give one; of a field with two values, each for the other.
OTHER = {
    "decontaminate.reference": ("web_copy",),
    "decontaminate.mode": {"direct": "component", "component": "direct"},
    "union.members": ("exam_copy", "web_copy"),
    "mix.components": ("exam", "balanced", "more"),
    "mix.homogeneous": {"exam": 0.2},
    "mix.heterogeneous": {"balanced": 0.6, "more": 0.4},
    "pool.image_column": "picture",
    "pool.label_column": "class",
    "pool.measures": ("blur", "phash"),
    "select.where": "height >= 24",
    "select.scores": ("other",),
    "score.column": "quality",
    "embed.backbone": "pixels",
    "embed.pooling": "mean",
    "embed.decoder": "scaled",
    "embed.precision": "bfloat16",
    "neighbors.method": "exact",
    "neighbors.nprobe": 3,
    "dedup.keep": "first",
    "dedup.rule": "semdedup",
    "cluster.n_clusters": (18, 4),
    "cluster.resample_size": (2, 2),
    "cluster.empty": "split",
    "cluster.n_splits": (2, 1),
    "cluster.resample": {"closest": "random", "random": "closest"},
    "cluster.weights": {"equal": "size", "size": "equal"},
    "cluster.metric": {"euclidean": "cosine", "cosine": "euclidean"},
    "sample.pick": "closest",
    "sample.mode": "uniform",
    "sample.level": 1,
    "sample.max_per_source": 30,
    "sample.max_per_label": 4,
    "retrieve.mode": {"sample": "cluster", "cluster": "sample"},
    "retrieve.seeds": ("web_copy",),
    "retrieve.n_neighbors": 5,
    "retrieve.min_hits": 2,
    "retrieve.per_cluster": 2,
    "retrieve.level": 0,
    "retrieve.pick": "closest",
    "calibrate.backbone": "pixels",
    "calibrate.pooling": "mean",
    "calibrate.precision": "bfloat16",
    "calibrate.decoder": "scaled",
    "evaluate.backbone": "pixels",
    "evaluate.pooling": "mean",
    "evaluate.linear_strengths": (1.0,),
    "report.title": "Another",
    "train.final_lr": 2e-6,
    "train.init": "some/folder",
    "train.image_size": 64,
    "train.local_size": 8,
    "train.init_gain": None,
    "train.final_momentum": 1.0,
    "train.final_weight_decay": 0.4,
    "train.group": 8,
    "train.koleo_group": 8,
    "train.koleo_crops": 1,
    "train.clip": "parameter",
    "train.result": "best",
    "train.centering": "softmax",
    "train.schedule": "cosine",
    "train.precision": "bfloat16",
    "train.teacher_temperature_start": 0.03,
    "train.mask_ratio": (0.2, 0.4),
}


NEEDED = {  # by a field that may not change alone: the others
    "result": {"knn_every": 5},
    "teacher_temperature_start": {"teacher_temperature_start": 0.02, "teacher_temperature_steps": 2},
    "teacher_temperature_steps": {"teacher_temperature_start": 0.02, "teacher_temperature_steps": 2},
    "init_frozen_steps": {"init": "some/folder"},
}


def other_value(stage: str, name: str, value: Any) -> Any:
    if f"{stage}.{name}" in OTHER:
        other = OTHER[f"{stage}.{name}"]
        return other[value] if isinstance(other, dict) and isinstance(value, str) else other
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 + 0.013
    raise AssertionError(f"give another value for {stage}.{name}: it is {value!r}")


@pytest.mark.parametrize("step", STEPS)
def test_every_config_field_changes_the_fingerprint(tiny, step):
    entry = next(s for s in tiny.recipe.steps if s.name == step)
    done = {name: tiny.artifact(source) for name, source in {s.name: s.name for s in tiny.recipe.steps}.items()}
    outside = look_outside(tiny.recipe.steps)
    root = Location(str(tiny.root))
    base = prepare(entry, done, root, outside).fingerprint
    assert base == tiny.artifact(step).location.name
    for field in fields(entry.config):
        if field.name in STAGES[entry.stage].locations or is_config(getattr(entry.config, field.name)):
            continue
        other = other_value(entry.stage, field.name, getattr(entry.config, field.name))
        needed = NEEDED.get(field.name, {})
        base = prepare(replace(entry, config=replace(entry.config, **needed)), done, root, outside).fingerprint
        changed = replace(entry, config=replace(entry.config, **{**needed, field.name: other}))
        assert prepare(changed, done, root, outside).fingerprint != base, field.name


def is_config(value: Any) -> bool:
    return hasattr(value, "__dataclass_fields__") and not isinstance(value, type)


def recording(config: Any, seen: set[str]) -> Any:
    """The same config, which notes the fields that code reads; copying it whole does not count as reading."""
    kind = type(config)

    class Recorder(kind):
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1)
            if name in kind.__dataclass_fields__ and caller.f_globals.get("__name__") != "dataclasses":
                seen.add(name)
            value = object.__getattribute__(self, name)
            return recording(value, seen) if is_config(value) else value

    copy = object.__new__(Recorder)
    for field in fields(config):
        object.__setattr__(copy, field.name, object.__getattribute__(config, field.name))
    return copy


# What needs labelled shards, which tests/training/test_knn.py has.
READ_ELSEWHERE = {"train": {"knn_images"}}
# Settings under which the fields that are for one case alone come to be read.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sample": [{}, {"mode": "level", "level": 1}, {"max_per_source": 50}, {"max_per_label": 50}],
    "train": [
        {},
        {"centering": "softmax", "schedule": "cosine"},
        {"teacher_temperature_start": 0.03, "teacher_temperature_steps": 2},
    ],
}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_config_field_is_read(tiny, tmp_path, name):
    """In one of the modes of its stage."""
    stage = STAGES[name]
    entries = [s for s in tiny.recipe.steps if s.name in STEPS and s.stage == name]
    runs = [(entry, variant) for entry in entries for variant in VARIANTS.get(name, [{}])]
    seen: set[str] = set()
    for i, (entry, variant) in enumerate(runs):
        inputs = {name: tiny.artifact(source) for name, source in entry.inputs.items()}
        config = recording(replace(entry.config, **variant), seen)
        seen.clear() if i == 0 else None
        found = stage.look(config)[1] if stage.look else None
        executor = LocalExecutor(Resources(loader_workers=0))
        out = Output(Location(str(tmp_path / str(i))), executor)
        stage.run(config, {**inputs, FOUND: found}, out, executor)
    assert {field.name for field in fields(stage.config)} - seen == READ_ELSEWHERE.get(name, set())


@pytest.mark.parametrize(
    ("name", "value"), [("loader_workers", 2), ("checkpoint_every", 0), ("mixed_machines", True), ("workers", 1)]
)
def test_resources_change_no_byte(tiny, without, name, value):
    root = without("first")
    run_until(tiny.recipe, root, "first", LocalExecutor(replace(tiny.recipe.resources, **{name: value})))
    assert content(root / "first") == content(tiny.root / "first")


def test_fewer_workers_change_no_byte(tiny, without, ray_executor, monkeypatch):
    monkeypatch.setattr(ray_executor, "n_workers", 1)
    root = without("tree")
    run_until(tiny.recipe, root, "tree", ray_executor)
    assert content(root / "tree") == content(tiny.root / "tree")


def test_bytes_change_only_with_the_stage_version(tiny):
    """Raise a stage's ``version`` when its output changes, then run ``hold_digests.py``."""
    held = json.loads(DIGESTS.read_text())
    found = digests_of({step: tiny.artifact(step) for step in STEPS})
    assert set(held["stages"]) == set(STAGES)
    if held["numerics"] != machine_tag():  # on machines of another kind the bytes may differ
        warnings.warn(f"digests are of {held['numerics']}, this machine is {machine_tag()}", stacklevel=1)
        return
    changed = {stage for stage in found if found[stage] != held["stages"][stage]}
    unraised = {stage for stage in changed if found[stage]["version"] == held["stages"][stage]["version"]}
    assert not unraised, "their bytes changed: raise their version, then run tests/pipelines/hold_digests.py"
    assert not changed, "run tests/pipelines/hold_digests.py"


def test_infos_in_the_manifest_are_those_of_the_files(tiny):
    for step in STEPS:
        artifact = tiny.artifact(step)
        for file in artifact.files:
            assert isinstance(file, FileInfo)
            data = (artifact.location / file.name).read()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
        assert not (Path(artifact.location.uri) / "scratch").exists()
    assert STEP not in json.dumps(tiny.artifact("web_copy").manifest["config"])


@pytest.mark.parametrize("step", STEPS)
def test_whatever_a_stage_reads_is_in_its_fingerprint(tiny, tmp_path, monkeypatch, step):
    """Inputs of inputs too: a stage that opens one must declare it in ``through``."""
    entry = next(s for s in tiny.recipe.steps if s.name == step)
    stage = STAGES[entry.stage]
    inputs = {name: tiny.artifact(source) for name, source in entry.inputs.items()}
    declared = {a.digest for a in [*inputs.values(), *reached(inputs, stage.through).values()]}
    opened: dict[str, str] = {}
    real = Artifact.input

    def recorded(self: Artifact, name: str) -> Artifact:
        found = real(self, name)
        opened[found.digest] = f"{self.location} {name}"
        return found

    monkeypatch.setattr(Artifact, "input", recorded)
    found = stage.look(entry.config)[1] if stage.look else None
    executor = LocalExecutor(Resources(loader_workers=0))
    stage.run(entry.config, {**inputs, FOUND: found}, Output(Location(str(tmp_path)), executor), executor)
    assert {digest: name for digest, name in opened.items() if digest not in declared} == {}
