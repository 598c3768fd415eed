"""The page of a run as HTML: its head, the picture of its steps and their table; the sections have a file each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from curation.artifact import Artifact
from pipelines.report import drawings
from pipelines.report.classes import classes
from pipelines.report.clusters import clusters
from pipelines.report.drawings import Node
from pipelines.report.drift import drifts
from pipelines.report.maps import patch_maps
from pipelines.report.models import backbones, scores, trainings
from pipelines.report.pairs import duplicates, leaks
from pipelines.report.rejected import rejected
from pipelines.report.retrieval import mixes, retrievals
from pipelines.report.run import Run, step_inputs
from pipelines.report.thresholds import calibrations
from pipelines.stage import HEAD_COUNTS

KINDS = {
    "pool": "source", "union": "source", "select": "choice", "dedup": "choice", "decontaminate": "choice",
    "retrieve": "choice", "sample": "choice", "mix": "choice", "embed": "vectors", "neighbors": "vectors",
    "cluster": "vectors", "score": "vectors", "shards": "source", "train": "model", "evaluate": "model",
    "index": "source", "report": "model", "calibrate": "model", "assign": "vectors",
}  # fmt: skip
CHOICES = (("mix",), ("sample",), ("retrieve",), ("decontaminate", "dedup", "select"))  # the last word comes first
NOT_FINISHED = "not finished"
FOLDED = ("pool", "embed")  # stages of which many that are used alike share a box of the picture


class Fact(NamedTuple):
    """A number at the head of the page."""

    value: str
    label: str


def build_page(run: Run) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=run.config.title,
        facts=headline(run),
        picture=picture(run),
        folded=len(set(boxes_of(run).values())) < len(run.steps),
        steps=step_table(run),
        unfinished=run.unfinished,
        rejected=rejected(run),
        calibrations=calibrations(run),
        pairs=duplicates(run),
        leaks=leaks(run),
        retrievals=retrievals(run),
        clusters=clusters(run),
        drifts=drifts(run),
        mixes=mixes(run),
        classes=classes(run),
        trainings=trainings(run),
        scores=scores(run),
        maps=patch_maps(run),
        backbones=backbones(run),
    )


def picture(run: Run) -> Markup:
    """Steps as boxes, and how many rows each kept; pools and embeddings that are used alike may share a box."""
    inputs, boxes = sources_of(run), boxes_of(run)
    members: dict[str, list[str]] = {}
    for name, box in boxes.items():
        members.setdefault(box, []).append(name)
    nodes = [box_of(box, [run.steps[name] for name in names]) for box, names in members.items()]
    apart = [Node(name, "missing", (stage, NOT_FINISHED)) for name, stage in run.unfinished.items()]
    arrows = {
        box: list(dict.fromkeys(boxes[a] for name in names for a in inputs[name])) for box, names in members.items()
    }
    return drawings.pipeline_picture(nodes, arrows, apart)


def sources_of(run: Run) -> dict[str, list[str]]:
    """The finished steps that each step reads."""
    return {
        name: [source for source in step_inputs(step).values() if source in run.steps]
        for name, step in run.steps.items()
    }


def boxes_of(run: Run) -> dict[str, str]:
    """The box of each step."""
    return drawings.fold({name: step.stage for name, step in run.steps.items()}, sources_of(run), FOLDED)


def box_of(name: str, steps: Sequence[Artifact]) -> Node:
    """The box of one step, or of several of a stage."""
    stage = steps[0].stage
    words = outcome(steps[0]) if len(steps) == 1 else f"{sum(step.counts['kept'] for step in steps):,}"
    return Node(name, KINDS.get(stage, "vectors"), (stage, words))


def outcome(step: Artifact) -> str:
    """What a step did, in three words."""
    counts = step.counts
    if "accuracy" in step.facts:
        return f"{100 * step.facts['accuracy']:.1f} %"
    if "suggested" in step.facts:
        return f"from {step.facts['suggested']['threshold']:.4g} on" if step.facts["suggested"] else "no threshold"
    if step.stage == "train":
        return f"{step.manifest['config']['n_steps']:,} steps"
    rows, kept = counts.get("rows", 0), counts.get("kept", 0)
    return f"{kept:,}" if kept == rows else f"{kept:,} of {rows:,}"


def step_table(run: Run) -> list[dict[str, Any]]:
    """Name, stage, inputs and counts of every step; of one that is not finished its name and stage."""
    rows = []
    for name, step in run.steps.items():
        counts = step.counts
        first = {key: counts.pop(key, None) for key in HEAD_COUNTS}
        more = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items() if value)
        reads = ", ".join(dict.fromkeys(step_inputs(step).values()))
        rows.append({"name": name, "stage": step.stage, "reads": reads, **first, "more": more,
                     "fingerprint": step.manifest["fingerprint"]})  # fmt: skip
    empty = {"reads": "", **dict.fromkeys(HEAD_COUNTS), "more": NOT_FINISHED, "fingerprint": ""}
    return rows + [{"name": name, "stage": stage, **empty} for name, stage in run.unfinished.items()]


def headline(run: Run) -> list[Fact]:
    """The few numbers that sum up a run."""
    facts: list[Fact] = []
    chosen = next((found for stages in CHOICES if (found := list(run.of(*stages).values()))), [])
    pools = {run.pool(step).location.uri: run.pool(step) for step in chosen} or run.of("pool")
    facts.append(Fact(f"{sum(pool.counts['rows'] for pool in pools.values()):,}", "files looked at"))
    for stage, label in (("dedup", "near-duplicates dropped"), ("decontaminate", "leaks dropped")):
        if run.of(stage):
            facts.append(Fact(f"{sum(step.counts['dropped'] for step in run.of(stage).values()):,}", label))
    if chosen:
        label = "images kept" if chosen[-1].stage in CHOICES[-1] else "images in the curated set"
        facts.append(Fact(f"{chosen[-1].counts['kept']:,}", label))
    return facts
