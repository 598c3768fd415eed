"""Runs the steps of a recipe: what is done already is found by fingerprint, what is missing is made.

The fingerprint of a step is a hash of its stage, stage version, config without locations, the content of its
inputs, and what was found outside. So a changed threshold recomputes that step and those below it, and an input
that was recomputed to the same bytes recomputes nothing.
"""

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curation.artifact import Artifact, Counts, finish, pool_of
from curation.store import Entry, Location
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor
from pipelines.lock import lock_root
from pipelines.numerics import numerics
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe, Step
from pipelines.stage import FOUND, SCRATCH, Output, Stage
from pipelines.stages.table import STAGES

Look = tuple[Sequence[Entry] | None, Any]  # what is outside: its listing, and what the stage made of it
RUN_FILE = "run.json"  # which artifact each step of the last run on this root is at
LOG_FILE = "run.jsonl"  # beside a manifest: times and hosts, a line an attempt


@dataclass(frozen=True)
class Prepared:
    """A step whose inputs are known, so that it is known where its output is."""

    step: Step
    stage: Stage
    inputs: Mapping[str, Artifact]
    found: Any  # what a stage that reads outside has listed
    found_digest: str | None
    fingerprint: str
    location: Location

    @property
    def locations(self) -> dict[str, str]:
        """Where the outside sources of this step are, as the recipe says now."""
        given = {name: getattr(self.step.config, name) for name in self.stage.locations}
        return {name: str(Location(uri).resolved()) for name, uri in given.items() if uri}

    def artifact(self) -> Artifact:
        """The output, done or not."""
        return Artifact(self.location, self.locations)


@dataclass(frozen=True)
class StepResult:
    """What a run says of a step."""

    name: str
    stage: str
    state: str  # "done before", "done" now; in a plan also "to do", "to go on", "to do after its inputs"
    counts: Counts
    seconds: float
    location: Location | None


def content_id(value: Any) -> str:
    """sha256 of a JSON-able value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def config_values(config: Any) -> dict[str, Any]:
    """A config as plain values."""
    return dataclasses.asdict(config)


def prepare(step: Step, done: Mapping[str, Artifact], root: Location, outside: Mapping[str, Look]) -> Prepared:
    """Find the fingerprint of a step whose inputs are finished."""
    stage = STAGES[step.stage]
    inputs = {name: done[source] for name, source in step.inputs.items()}
    entries, found = outside.get(step.name, (None, None))
    found_digest = None if entries is None else content_id([list(entry) for entry in entries])
    check_one_pool(step, inputs)
    listed = set(stage.locations) | (set(stage.step_or_value) if entries is not None else set())
    identity = {
        "stage": step.stage,
        "version": stage.version,
        # what was listed outside is known by its content, so where it lies does not count
        "config": {k: v for k, v in config_values(step.config).items() if k not in listed},
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
        "through": {path: reached(inputs, path).digest for path in stage.through},
        "found": found_digest,
    }
    fingerprint = content_id(identity)[:16]
    return Prepared(step, stage, inputs, found, found_digest, fingerprint, root / step.name / fingerprint)


def reached(inputs: Mapping[str, Artifact], path: str) -> Artifact:
    """The input of an input, such as ``neighbors.embeddings``."""
    first, *rest = path.split(".")
    artifact = inputs[first]
    for name in rest:
        artifact = artifact.input(name)
    return artifact


def check_one_pool(step: Step, inputs: Mapping[str, Artifact]) -> None:
    """Rows of a selection are rows of one pool. Raises UserError when the other inputs are of another."""
    if "selection" not in inputs:
        return
    other = "pool" if "pool" in inputs else "embeddings"
    if pool_of(inputs["selection"]).digest != pool_of(inputs[other]).digest:
        raise UserError(
            f"{step.name}.selection must select from the pool of {step.name}.{other}: "
            f"{step.inputs['selection']} selects from another than {step.inputs[other]}",
            "a selection means rows of the pool it was made from",
        )


def look_outside(steps: Sequence[Step]) -> dict[str, Look]:
    """What the steps that read from outside find there, before anything is written. Raises UserError."""
    found: dict[str, Look] = {}
    for step in steps:
        look = STAGES[step.stage].look
        if look is None:
            continue
        try:
            found[step.name] = look(step.config)
        except FileNotFoundError as e:
            raise UserError(f"{step.name}: {e}", "check the path; it is relative to where the command runs") from e
        except PermissionError as e:
            raise UserError(f"{step.name}: cannot read {e.filename}: {e.strerror}", "check who may read it") from e
    return found


def run_step(prepared: Prepared, root: Location, executor: LocalExecutor | RayExecutor) -> Counts:
    """Make what is missing of a step and finish it with its manifest."""
    keep_if_alike(prepared.location, executor.resources.mixed_machines)
    out = Output(prepared.location, executor)
    started = time.time()
    inputs = {**prepared.inputs, FOUND: prepared.found}
    try:
        counts = prepared.stage.run(prepared.step.config, inputs, out, executor)
    except UserError as e:
        log_run(prepared.location, {"failed": e.message})
        raise UserError(f"step {prepared.step.name}: {e.message}", e.hint) from e
    except TaskError as e:
        log_run(prepared.location, {"failed": str(e)})
        raise TaskError(f"step {prepared.step.name} failed {e}") from e
    head = {
        "stage": prepared.step.stage,
        "version": prepared.stage.version,
        "fingerprint": prepared.fingerprint,
        "config": {k: v for k, v in config_values(prepared.step.config).items() if k not in prepared.stage.locations},
        "locations": prepared.locations,
        "inputs": {
            name: {"path": relative_path(artifact.location, root), "digest": artifact.digest}
            for name, artifact in prepared.inputs.items()
        },
        "found": prepared.found_digest,
        "counts": counts,
        "facts": out.facts,
        "numerics": numerics(),
    }
    log_run(prepared.location, {"seconds": round(time.time() - started, 3), "counts": counts})
    finish(prepared.location, out.files, head)
    return counts


def keep_if_alike(location: Location, mixed_machines: bool) -> None:
    """Parts that an interrupted run left are kept if it had this machine's numerics: one step, one kind of bits."""
    tag = location / SCRATCH / "numerics.json"
    mine = json.dumps(numerics(), sort_keys=True).encode()
    if location.is_folder() and not mixed_machines and not (tag.exists() and tag.read() == mine):
        location.delete()
    location.sweep()
    tag.write(mine)


def drop_scratch(artifact: Artifact) -> None:
    """Remove what a finished step needed on its way; a kill may have left it after the manifest was there."""
    scratch = artifact.location / SCRATCH
    if scratch.is_folder():
        scratch.delete()


def relative_path(location: Location, root: Location) -> str:
    """``step/fingerprint`` of an artifact below a root."""
    return location.uri.removeprefix(root.uri.rstrip("/") + "/")


def log_run(location: Location, event: Mapping[str, Any]) -> None:
    """Add a line to the log of a step."""
    log = location / LOG_FILE
    before = log.read() if log.exists() else b""
    line = {"time": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid(), **event}
    log.write(before + (json.dumps(line) + "\n").encode())


def last_seconds(artifact: Artifact) -> float:
    """How long the last attempt at a step took, in seconds."""
    log = artifact.location / LOG_FILE
    events = [json.loads(line) for line in log.read().splitlines()] if log.exists() else []
    return next((float(event["seconds"]) for event in reversed(events) if "seconds" in event), 0.0)


def run_recipe(
    recipe: Recipe,
    root: Location,
    executor: LocalExecutor | RayExecutor,
    until: str | None = None,
    on_step: Callable[[str, str], Callable[[int, int], None]] = lambda name, stage: lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[StepResult]:
    """Run the steps in order, each result as it is there. ``on_step`` gives the progress callback of a step.

    Raises UserError or TaskError; what is finished stays, and the next run goes on from there.
    """
    steps = chosen_steps(recipe, until)
    root = root.resolved()
    outside = look_outside(steps)
    with lock_root(root, say):
        done: dict[str, Artifact] = {}
        note_run(root, recipe, done)
        for step in steps:
            prepared = prepare(step, done, root, outside)
            artifact = prepared.artifact()
            state, started = "done before", time.time()
            if not artifact.is_complete():
                executor.progress = on_step(step.name, step.stage)
                run_step(prepared, root, executor)
                state, artifact = "done", prepared.artifact()
            drop_scratch(artifact)
            done[step.name] = artifact
            note_run(root, recipe, done)
            seconds = time.time() - started if state == "done" else 0.0
            yield StepResult(step.name, step.stage, state, artifact.counts, seconds, artifact.location)


def chosen_steps(recipe: Recipe, until: str | None) -> tuple[Step, ...]:
    """The steps up to ``until``. Raises UserError when there is no such step."""
    if until is None:
        return recipe.steps
    names = [step.name for step in recipe.steps]
    if until not in names:
        raise UserError(f"--until must name a step of the recipe: got {until!r}", f"its steps are {', '.join(names)}")
    return recipe.steps[: names.index(until) + 1]


def note_run(root: Location, recipe: Recipe, done: Mapping[str, Artifact]) -> None:
    """Write which artifact each step is at, so that a root can be read without its recipe."""
    steps = {
        step.name: {"stage": step.stage, "path": relative_path(done[step.name].location, root)}
        if step.name in done
        else {"stage": step.stage, "path": None}
        for step in recipe.steps
    }
    (root / RUN_FILE).write((json.dumps({"seed": recipe.seed, "steps": steps}, indent=1) + "\n").encode())


def plan_recipe(recipe: Recipe, root: Location, until: str | None = None) -> Iterator[StepResult]:
    """What a run would do, without doing any of it."""
    root = root.resolved()
    done: dict[str, Artifact] = {}
    steps = chosen_steps(recipe, until)
    outside = look_outside(steps)
    for step in steps:
        if any(source not in done for source in step.inputs.values()):
            yield StepResult(step.name, step.stage, "to do after its inputs", {}, 0.0, None)
            continue
        prepared = prepare(step, done, root, outside)
        artifact = prepared.artifact()
        if artifact.is_complete():
            done[step.name] = artifact
            yield StepResult(step.name, step.stage, "done before", artifact.counts, 0.0, artifact.location)
        else:
            n_files = len(prepared.location.list()) if prepared.location.is_folder() else 0
            state = f"to go on ({n_files} files there)" if n_files else "to do"
            yield StepResult(step.name, step.stage, state, {}, 0.0, prepared.location)


def read_root(root: Location) -> dict[str, Artifact | None]:
    """The steps of the last run on a root and their artifacts, None where a step is not finished. Raises UserError."""
    root = root.resolved()
    try:
        noted = json.loads((root / RUN_FILE).read())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{root} must be the root of a run: it has no {RUN_FILE}", "start one with openlvd run") from e
    return {name: Artifact(root / entry["path"]) if entry["path"] else None for name, entry in noted["steps"].items()}
