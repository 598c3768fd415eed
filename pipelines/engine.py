"""Runs the steps of a recipe: what is done already is found by fingerprint, what is missing is made."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from curation.artifact import Artifact, Counts, at_path, finish
from curation.store import Location
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor, Progress, quiet
from pipelines.fingerprint import Prepared, config_values, fingerprint_of, look_outside, prepare
from pipelines.lock import lock_root
from pipelines.numerics import numerics
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe
from pipelines.stage import FOUND, SCRATCH, Output, Step

OnStep = Callable[[str, str], Progress]  # name and stage of a step -> what is told its progress
FINGERPRINT = "fingerprint"  # in the scratch of a step at a place that does not say it
NUMERICS = "numerics.json"  # in the scratch of every step: the kind of machine that makes it
RUN_FILE = "run.json"  # which artifact each step of the last run on this root is at
LOG_FILE = "run.jsonl"  # beside a manifest: times and hosts, a line an attempt
BEGUN = (f"{SCRATCH}/{FINGERPRINT}", f"{SCRATCH}/{NUMERICS}", LOG_FILE)  # what a step writes before its first file


@dataclass(frozen=True)
class StepResult:
    """What a run says of a step."""

    name: str
    stage: str
    state: str  # "done before", "done" now; in a plan also "to do", "to go on", "to do after its inputs"
    counts: Counts
    seconds: float
    location: Location | None


def run_step(prepared: Prepared, root: Location, executor: LocalExecutor | RayExecutor) -> Counts:
    """Make what is missing of a step and finish it with its manifest."""
    if prepared.placed:
        (prepared.location / SCRATCH / FINGERPRINT).write(prepared.fingerprint.encode())
    keep_if_alike(prepared.location, executor.resources.mixed_machines)
    out = Output(prepared.location, executor)
    started = time.time()
    inputs = {**prepared.inputs, FOUND: prepared.found}
    try:
        counts = prepared.stage.run(prepared.step.config, inputs, out, executor)
    except UserError as e:
        log_failure(prepared.location, e.message)
        raise UserError(f"step {prepared.step.name}: {e.message}", e.hint) from e
    except TaskError as e:
        log_failure(prepared.location, str(e))
        raise TaskError(f"step {prepared.step.name} failed {e}") from e
    head = {
        "stage": prepared.step.stage,
        "version": prepared.stage.version,
        "fingerprint": prepared.fingerprint,
        "config": {k: v for k, v in config_values(prepared.step.config).items() if k not in prepared.stage.locations},
        "locations": prepared.locations,
        "inputs": {
            name: {"path": input_path(artifact.location, prepared, root), "digest": artifact.digest}
            for name, artifact in prepared.inputs.items()
        },
        "found": prepared.found_digest,
        "counts": counts,
        "facts": out.facts,
        "numerics": numerics(),
    }
    log = {name: round(value, 3) for name, value in out.log.items()}
    log_run(prepared.location, {"seconds": round(time.time() - started, 3), "counts": counts, **log})
    prepared.location.sweep()  # an upload whose first request was answered to nobody was begun twice
    finish(prepared.location, out.files, head)
    return counts


def keep_if_alike(location: Location, mixed_machines: bool) -> None:
    """Parts that an interrupted run left are kept if it had this machine's numerics: one step, one kind of bits."""
    tag = location / SCRATCH / NUMERICS
    mine = numerics_tag()
    placed = (location / SCRATCH / FINGERPRINT).exists()  # then check_place has looked, and what is not ours stays
    if not placed and location.is_folder() and not mixed_machines and not (tag.exists() and tag.read() == mine):
        location.delete()
    location.sweep()
    tag.write(mine)


def numerics_tag() -> bytes:
    """The kind of this machine, as a step notes it."""
    return json.dumps(numerics(), sort_keys=True).encode()


def check_place(prepared: Prepared, mixed_machines: bool) -> None:
    """A place of the user's choice is empty (hidden files aside) or holds this very step. Raises UserError."""
    at, artifact = prepared.location, Artifact(prepared.location)
    if artifact.is_complete():
        found, what = str(artifact.manifest.get("fingerprint")), f"a finished {artifact.stage} artifact"
    elif (at / SCRATCH / FINGERPRINT).exists():
        if all(entry.name in BEGUN or entry.name.startswith(".") for entry in at.list()):
            return  # what was begun there failed before it made anything
        found, what = (at / SCRATCH / FINGERPRINT).read().decode(), "parts"
    else:
        others = [entry.name for entry in at.list() if not entry.name.startswith(".")] if at.is_folder() else []
        if others:
            raise UserError(f"{at} must be empty: got {len(others)} files, first {others[0]}", "choose another --out")
        return
    if found != prepared.fingerprint:
        raise UserError(
            f"{at} must be empty or of these inputs and settings: got {what} of others, fingerprint {found} and not "
            f"{prepared.fingerprint}",
            "choose another --out",
        )
    tag = at / SCRATCH / NUMERICS
    if not artifact.is_complete() and not mixed_machines and tag.exists() and tag.read() != numerics_tag():
        raise UserError(
            f"{at} must hold parts made by machines of one kind: got some of {tag.read().decode()}",
            "choose another --out, or allow mixed_machines: same bytes become a tolerance",
        )


def drop_scratch(artifact: Artifact) -> None:
    """Remove what a finished step needed on its way; a kill may have left it after the manifest was there."""
    scratch = artifact.location / SCRATCH
    if scratch.is_folder():
        scratch.delete()


def relative_path(location: Location, root: Location) -> str:
    """``step/fingerprint`` of an artifact below a root, the whole URI of one that is elsewhere."""
    return location.uri.removeprefix(root.uri.rstrip("/") + "/")


def input_path(location: Location, prepared: Prepared, root: Location) -> str:
    """How a manifest names an input: below the root, below the artifact itself (``./...``), or by its whole URI."""
    if not prepared.placed:
        return relative_path(location, root)
    path = relative_path(location, prepared.location)
    return path if path == location.uri else f"./{path}"


def log_run(location: Location, event: Mapping[str, Any]) -> None:
    """Add a line to the log of a step."""
    log = location / LOG_FILE
    before = log.read() if log.exists() else b""
    line = {"time": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid(), **event}
    log.write(before + (json.dumps(line) + "\n").encode())


def log_failure(location: Location, words: str) -> None:
    """Add to the log of a step why it failed; where that cannot be written either, the failure is what to tell."""
    with suppress(OSError):
        log_run(location, {"failed": words})


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
    on_step: OnStep = lambda name, stage: quiet,
    say: Callable[[str], None] = lambda text: None,
    places: Mapping[str, Location] | None = None,
) -> Iterator[StepResult]:
    """Run the steps in order, each result as it is there. ``on_step`` gives the progress callback of a step.

    ``places`` are where steps go that are not to be below the root; the next run finds them there again.
    Raises UserError or TaskError; what is finished stays, and the next run goes on from there. The notes of the last
    run stay for the steps that this one has not come to, as far as it would find them done.
    """
    steps = chosen_steps(recipe, until)
    root = root.resolved()
    outside = look_outside(steps)
    with lock_root(root, say):
        done: dict[str, Artifact] = {}
        earlier = noted_before(root)
        elsewhere = outside_root(root, earlier)
        noted = still_valid(recipe, done, earlier)
        note_run(root, recipe, noted)
        for step in steps:
            prepared = prepare(step, done, root, outside, (places or {}).get(step.name))
            artifact, result = finish_step(where_it_is(prepared, elsewhere), root, executor, on_step)
            done[step.name] = artifact
            if step.name not in noted or noted[step.name].location != artifact.location:
                noted = still_valid(recipe, done, earlier)
                note_run(root, recipe, noted)
            yield result


def run_alone(
    step: Step,
    inputs: Mapping[str, Artifact],
    place: Location,
    executor: LocalExecutor | RayExecutor,
    on_step: OnStep = lambda name, stage: quiet,
    say: Callable[[str], None] = lambda text: None,
) -> StepResult:
    """Run one step on artifacts from anywhere, by the names in ``step.inputs``; its artifact is made at ``place``.

    Same fingerprint, files and manifest as in a recipe. Raises UserError, also when something else is at ``place``,
    or TaskError.
    """
    place = place.resolved()
    prepared = prepare(step, inputs, place, look_outside([step]), place)
    sources = [
        (name, at) for name, some in prepared.locations.items() for at in ([some] if isinstance(some, str) else some)
    ]
    for name, at in sources:
        if f"{place}/".startswith(f"{at.rstrip('/')}/"):
            raise UserError(f"{place} must not be in the {name}: got {at}", "choose another --out")
    check_place(prepared, executor.resources.mixed_machines)  # before the lock, which leaves a file there
    with lock_root(place, say):
        return finish_step(prepared, place, executor, on_step)[1]


def finish_step(
    prepared: Prepared, root: Location, executor: LocalExecutor | RayExecutor, on_step: OnStep
) -> tuple[Artifact, StepResult]:
    """The output of a step, made now unless it is there."""
    step, artifact, started = prepared.step, prepared.artifact(), time.time()
    if prepared.placed:
        check_place(prepared, executor.resources.mixed_machines)
    state, seconds = "done before", 0.0
    if not artifact.is_complete():
        executor.progress = on_step(step.name, step.stage)
        run_step(prepared, root, executor)
        state, seconds, artifact = "done", time.time() - started, prepared.artifact()
    drop_scratch(artifact)
    return artifact, StepResult(step.name, step.stage, state, artifact.counts, seconds, artifact.location)


def chosen_steps(recipe: Recipe, until: str | None) -> tuple[Step, ...]:
    """The steps up to ``until``. Raises UserError when there is no such step."""
    if until is None:
        return recipe.steps
    names = [step.name for step in recipe.steps]
    if until not in names:
        raise UserError(f"--until must name a step of the recipe: got {until!r}", f"its steps are {', '.join(names)}")
    return recipe.steps[: names.index(until) + 1]


def note_run(root: Location, recipe: Recipe, noted: Mapping[str, Artifact]) -> None:
    """Write which artifact each step is at, so that a root can be read without its recipe."""
    steps = {
        step.name: {"stage": step.stage, "path": relative_path(noted[step.name].location, root)}
        if step.name in noted
        else {"stage": step.stage, "path": None}
        for step in recipe.steps
    }
    (root / RUN_FILE).write((json.dumps({"seed": recipe.seed, "steps": steps}, indent=1) + "\n").encode())


def noted_before(root: Location) -> dict[str, Artifact]:
    """The steps that the last run on a root has come to; none when its notes are not there or cannot be read."""
    try:
        return {name: artifact for name, artifact in read_root(root).items() if artifact is not None}
    except UserError:  # notes spare work, and this run writes them anew
        return {}


def still_valid(recipe: Recipe, done: Mapping[str, Artifact], earlier: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """What is done of a recipe, and of the other steps what an earlier run has left and this one would leave.

    That is what has the fingerprint that follows from what is valid of the steps above; what is outside counts as it
    was then.
    """
    valid: dict[str, Artifact] = {}
    for step in recipe.steps:
        before = earlier.get(step.name)
        if step.name in done:
            valid[step.name] = done[step.name]
        elif before is not None and all(source in valid for source in step.inputs.values()):
            inputs = {name: valid[source] for name, source in step.inputs.items()}
            if is_made_of(before, step, inputs):
                valid[step.name] = before
    return valid


def is_made_of(artifact: Artifact, step: Step, inputs: Mapping[str, Artifact]) -> bool:
    """Whether an artifact is what a step makes of these inputs; not when its manifest is missing or spoilt."""
    try:
        fingerprint: str = artifact.manifest["fingerprint"]
        return fingerprint == fingerprint_of(step, inputs, artifact.manifest["found"])
    except (KeyError, TypeError, ValueError):
        return False


def outside_root(root: Location, steps: Mapping[str, Artifact]) -> dict[str, Location]:
    """The steps that were made outside a root, and where."""
    found = {name: artifact.location for name, artifact in steps.items()}
    return {name: at for name, at in found.items() if not at.uri.startswith(root.uri.rstrip("/") + "/")}


def where_it_is(prepared: Prepared, elsewhere: Mapping[str, Location]) -> Prepared:
    """A step that is to be below the root is taken from where an earlier run has put it, if that is the same."""
    at = elsewhere.get(prepared.step.name)
    if at is None or prepared.placed or prepared.artifact().is_complete() or not Artifact(at).is_complete():
        return prepared
    same = Artifact(at).manifest["fingerprint"] == prepared.fingerprint
    return replace(prepared, location=at, placed=True) if same else prepared


def plan_recipe(recipe: Recipe, root: Location, until: str | None = None) -> Iterator[StepResult]:
    """What a run would do, without doing any of it."""
    root = root.resolved()
    done: dict[str, Artifact] = {}
    steps = chosen_steps(recipe, until)
    outside = look_outside(steps)
    elsewhere = outside_root(root, noted_before(root))
    for step in steps:
        if any(source not in done for source in step.inputs.values()):
            yield StepResult(step.name, step.stage, "to do after its inputs", {}, 0.0, None)
            continue
        prepared = where_it_is(prepare(step, done, root, outside), elsewhere)
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
    return {
        name: Artifact(at_path(root, entry["path"])) if entry["path"] else None
        for name, entry in read_notes(root).items()
    }


def read_notes(root: Location) -> dict[str, dict[str, str | None]]:
    """The ``stage`` of every step of the last run on a root, and its ``path``, None where it is not finished.

    Raises UserError when there are no such notes, or none that can be read.
    """
    try:
        steps = json.loads((root / RUN_FILE).read())["steps"]
        return {str(name): {"stage": str(entry["stage"]), "path": as_path(entry["path"])}
                for name, entry in steps.items()}  # fmt: skip
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{root} must be the root of a run: it has no {RUN_FILE}", "start one with openlvd run") from e
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{root} must be the root of a run: its {RUN_FILE} does not say the steps of one",
            "check the path; a run of the recipe writes that file anew",
        ) from e


def as_path(value: object) -> str | None:
    """A path as notes have it, None for none. Raises TypeError or ValueError for what is no path."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a path must be text: got {value!r}")
    return Location(value).uri if value else None
