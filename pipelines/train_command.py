"""``openlvd train PATH``: from a folder of shards to an encoder, with no more than the path.

Tars that no run has made are indexed first. With the path alone, what is not given is suggested from the data; with
``--shards PATH`` it has the defaults of a recipe.

Under ``torchrun`` the first process does all of this, and the others do its training with it.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np
import typer

from curation.artifact import Artifact, read_table
from curation.listing import is_list, split_pattern
from curation.store import Location
from pipelines.commands import (
    PATH,
    Special,
    artifact_at,
    find_artifact,
    flag,
    place_of,
    read_config,
    read_step,
    see_help,
    settings_of,
    with_flag,
    workplace,
)
from pipelines.engine import RUN_FILE, StepResult, read_root, run_alone
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.fingerprint import look_outside, prepare
from pipelines.progress import StepProgress
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import PRESET, check_backbone, structure, with_presets
from pipelines.stage import Stage, Step
from pipelines.stages.begin import check_artifact, shape_of_artifact
from pipelines.stages.embed import MODEL_HINT
from pipelines.stages.train import train_job
from training.tar_index import IndexConfig

if TYPE_CHECKING:
    from training.begin import Shape

MAX_BAD = "max_bad_fraction"  # a setting of the index
SAMPLED_PARTS = 16  # of an index, whose sizes of images are looked at
USUAL_SIDE = 224  # pixels, where an index knows no size


def run_train(name: str, stage: Stage, given: Mapping[str, Any]) -> StepResult:
    """Run ``train`` as the options say, with progress on stderr. Raises UserError or TaskError."""
    given = with_flag(stage, given)
    text = given["shards"]
    if text is None:
        raise UserError(
            "PATH must be given: got none", "a folder or s3:// prefix of WebDataset shards: " + see_help(name)
        )
    if given[PATH] is not None and given["resources_gpus"] is None and given["executor"] in (None, "serial"):
        given["resources_gpus"] = int(has_gpu())
    out = place_of(given["out"]) if given["out"] is not None else default_place(text, "encoder")
    given["as_json"] = given["as_json"] or not leads()  # one of them speaks
    with workplace(given) as (executor, progress):
        if given["out"] is None:
            progress.say(f"the encoder goes to {out}; --out names another place")
        if executor.resources.train_processes > 1 and "RANK" in os.environ:
            raise UserError(
                f"torchrun starts the processes itself, so resources.train_processes must be 1: got "
                f"{executor.resources.train_processes}",
                "leave --resources-train-processes out, or torchrun",
            )
        begun = shape_at(name, given["init"]) if given[PATH] is not None else None
        shards = find_shards(text, out.parent, executor, progress)
        given["shards"] = shards.location.uri
        if given[PATH] is not None:
            given |= suggested(name, stage, given, shards, executor.resources.gpus > 0, begun, progress)
        step, inputs = read_step(name, stage, given)
        if "init" in step.inputs:
            check_artifact(given["init"], inputs[step.inputs["init"]], step.config)
        if not leads():
            train_along(step, inputs, out, executor)
            raise typer.Exit
        return run_alone(step, inputs, out, executor, progress.start, progress.say)


def leads() -> bool:
    """Whether this process is the first of those that ``torchrun`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def train_along(
    step: Step, inputs: Mapping[str, Artifact], out: Location, executor: LocalExecutor | RayExecutor
) -> None:
    """Do the training of another process with it, unless it is done. Raises UserError on Ray, which has its own."""
    if isinstance(executor, RayExecutor):
        raise UserError("torchrun goes with --executor serial: got ray", "on Ray set --resources-train-processes")
    found = {key: inputs[uri] for key, uri in step.inputs.items()}
    if not Artifact(out).is_complete():
        train_job(step.config, found, out, executor).train()


def has_gpu() -> bool:
    """Whether there is a GPU in this machine."""
    import torch

    return torch.cuda.is_available()


def default_place(text: str, what: str) -> Location:
    """``<name of the path>-<what>`` in the working directory, or beside the path when that is the working directory."""
    at, here = place_of(text), Path.cwd()
    inside = at.is_local and here.is_relative_to(at.path)
    return Location(str(at.path.parent if inside else here)) / f"{short_name(text)}-{what}"


def short_name(text: str) -> str:
    """What a path is called, in letters, digits, - and _: the folder of a pattern, a file without its suffix."""
    at = place_of(text)
    folder, pattern = split_pattern(at)
    name = folder.name if pattern else Path(at.name).stem if at.name.endswith(".tar") or is_list(at) else at.name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "shards"


def find_shards(text: str, root: Location, executor: LocalExecutor | RayExecutor, progress: StepProgress) -> Artifact:
    """The shards at a path; of tars that are no artifact the index, made below ``root`` unless it is there."""
    if artifact_at(text) is not None or is_of_run(place_of(text)):
        return find_artifact(flag("shards"), text, ("shards",))
    config = structure(IndexConfig, {"source": str(place_of(text))}, "index")
    step = Step(f"{short_name(text)}-index", "index", config, {})
    place = prepare(step, {}, root.resolved(), look_outside([step])).location
    while not leads() and not Artifact(place).is_complete():
        time.sleep(1)  # for the first process to make it; torchrun ends this one when that one fails
    try:
        made = run_alone(step, {}, place, executor, progress.start, progress.say)
    except UserError as e:
        if MAX_BAD not in e.message:
            raise
        option = flag(MAX_BAD)
        hint = f"{e.hint}: openlvd index {text} {option} X --out I, then openlvd train I"
        raise UserError(e.message, hint) from e
    progress.stop()
    bad = f", {made.counts['bad']:,} bad" if made.counts["bad"] else ""
    found = "was indexed before" if made.state == "done before" else "has no index, so one was made"
    images, tars = (some(made.counts[key], unit) for key, unit in (("kept", "image"), ("shards", "tar")))
    progress.say(f"{text} {found}: {images} in {tars}{bad}, at {place}")
    return Artifact(place)


def some(n: int, unit: str) -> str:
    """``1 tar``, ``2 tars``."""
    return f"{n:,} {unit}" if n == 1 else f"{n:,} {unit}s"


def is_of_run(at: Location) -> bool:
    """Whether a path is the root of a run, or one of its steps: no folder of tars of others."""
    if (at / RUN_FILE).exists():
        return True
    return (at.parent / RUN_FILE).exists() and at.name in read_root(at.parent)


def suggested(
    name: str,
    stage: Stage,
    given: Mapping[str, Any],
    shards: Artifact,
    gpu: bool,
    begun: "Shape | None",
    progress: StepProgress,
) -> dict[str, Any]:
    """The settings that are not given, from the index of the shards; says each, and why. Raises UserError."""
    from training.suggest import suggest

    texts = {field.name: given[field.name] for field in settings_of(stage)}
    own = read_config(stage.config, texts, name, flag)
    preset = with_presets(name, {PRESET: given[PRESET]}) if given.get(PRESET) else None
    n_images, side = facts_of(shards)
    try:
        found = suggest(n_images, side, gpu, own, preset, None if begun is None else begun.fields())
    except ValueError as e:
        raise UserError(str(e), see_help(name)) from e
    except (ArithmeticError, TypeError):
        check_parts(stage, with_presets(name, {**own, PRESET: given.get(PRESET) or []}), name)
        raise
    on = f"for {some(n_images, 'image')} on a {'GPU' if gpu else 'CPU'}"
    beside = "what is not given" if preset is None else f"beside {', '.join(given[PRESET])} what depends on the data"
    progress.say(f"{on}, {beside} is set to:" if found else f"{on} nothing is left to be set")
    for key, one in found.items():
        progress.say(f"  {key} {json.dumps(one.value)}: {one.reason}")
    return {key: one.value for key, one in found.items()}


def shape_at(name: str, text: str | None) -> "Shape | None":
    """The shape of the weights to begin with, if there are to be any. Raises UserError for what is no ViT of ours."""
    if text is None:
        return None
    from training.begin import shape_of

    if artifact_at(text) is not None:
        return shape_of_artifact(find_artifact(flag("init"), text, ("train",)))
    check_backbone(f"{name}.init", text, [])
    try:
        return shape_of(text)
    except ValueError as e:
        raise UserError(str(e), MODEL_HINT) from e


def check_parts(stage: Stage, values: Mapping[str, Any], name: str) -> None:
    """Raise UserError for a given setting with keys of its own whose keys or values are not what they should be."""
    for key, kind in get_type_hints(stage.config).items():
        config = next((one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)), None)
        if isinstance(config, type) and values.get(key) is not None:
            structure(config, values[key], f"{name}.{key}")


def facts_of(shards: Artifact) -> tuple[int, int]:
    """Samples of an epoch, and the median of the shorter sides in pixels, of the images in some parts of the index."""
    parts = [i for i, part in enumerate(shards.parts) if part.rows]
    chosen = parts[:: max(1, len(parts) // SAMPLED_PARTS)][:SAMPLED_PARTS]
    sizes = [read_table(shards.part(i), ["width", "height"]) for i in chosen]
    sides = np.concatenate([np.minimum(table["width"], table["height"]) for table in sizes] or [np.zeros(0)])
    sides = sides[sides > 0]
    counts = shards.counts
    return counts.get("seen_per_epoch", counts["kept"]), int(np.median(sides)) if len(sides) else USUAL_SIDE


TRAIN_COMMAND = Special(
    run_train,
    "; or WebDataset tars that no run has made: a folder, an s3:// prefix, a tar or a pattern. Settings that are not "
    "given are then suggested from the data; --out is a folder named after PATH",
)
