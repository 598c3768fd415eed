"""What the page of a run says: facts read from its artifacts, a section a kind of step, bounded in pictures.

Every function here looks at one kind of step and returns plain values for the template; what is O(rows) is counted
part by part on the workers. Nothing is computed anew that a step has written down, and no times and no absolute paths
get in, so equal artifacts give equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from curation.artifact import Artifact, read_table
from pipelines import drawings
from pipelines import report_retrieval as retrieval
from pipelines import report_sections as sections
from pipelines.drawings import Curve, Node
from pipelines.report_run import Run, step_inputs

KINDS = {
    "pool": "source", "union": "source", "select": "choice", "dedup": "choice", "decontaminate": "choice",
    "retrieve": "choice", "sample": "choice", "mix": "choice", "embed": "vectors", "neighbors": "vectors",
    "cluster": "vectors", "shards": "source", "train": "model", "evaluate": "model", "report": "model",
}  # fmt: skip

CHOICES = (("mix",), ("sample",), ("retrieve",), ("decontaminate", "dedup", "select"))  # the last word comes first
HEAD_COUNTS = ("rows", "kept", "dropped", "bad")  # columns of the table
NOT_FINISHED = "not finished"
FOLDED = ("pool", "embed")  # stages of which many that are used alike share a box of the picture


class Fact(NamedTuple):
    """A number at the head of the page."""

    value: str
    label: str


def build_page(run: Run) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=PackageLoader("pipelines", "templates"),
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
        rejected=sections.rejected(run),
        pairs=sections.duplicates(run),
        leaks=sections.leaks(run),
        retrievals=retrieval.retrievals(run),
        clusters=sections.clusters(run),
        mixes=retrieval.mixes(run),
        classes=sections.classes(run),
        trainings=trainings(run),
        scores=scores(run),
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


def trainings(run: Run) -> list[dict[str, Any]]:
    """DINO loss and teacher entropy of every training that took a step."""
    found = []
    for name, step in run.of("train").items():
        config = step.manifest["config"]
        if not config["n_steps"]:
            continue
        table = read_table(step.part(0), ["dino_loss", "teacher_entropy", "usage_perplexity"])
        loss, entropy, used = (table[column].to_numpy() for column in table.column_names)
        uniform = math.log(config["n_prototypes"])
        last = max(1, len(loss) // 20)
        end = float(np.nanmean(loss[-last:]))
        curves = [Curve("DINO loss", loss, "loss"), Curve("teacher entropy", entropy, "entropy")]
        alt = f"DINO loss and teacher entropy of {name} by step; the loss ends at {end:.2f} nats, ln K is {uniform:.2f}"
        found.append({
            "name": name, "shards": step_inputs(step)["shards"], "steps": config["n_steps"], "batch": config["batch"],
            "seen": step.counts["kept"], "loss": end, "uniform": uniform, "prototypes": config["n_prototypes"],
            "used": float(np.nanmean(used[-last:])), "skipped": step.counts["skipped_steps"],
            "learnt": end < uniform - 0.1,
            "chart": drawings.line_chart(curves, (uniform, f"ln K = {uniform:.2f}"), "step", "nats", alt),
        })  # fmt: skip
    return found


def scores(run: Run) -> list[dict[str, Any]]:
    """k-NN accuracies, those with one bank, one exam and one k beside one another."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, step in run.of("evaluate").items():
        config, reads, facts = step.manifest["config"], step_inputs(step), step.facts
        key = (reads["bank"], reads["queries"], str(config["n_neighbors"]), str(config["temperature"]))
        groups.setdefault(key, []).append(
            {"name": name, "backbone": reads.get("backbone", config["backbone"]), "accuracy": facts["accuracy"],
             "correct": step.counts["correct"], "rows": step.counts["rows"], "n_classes": facts["n_classes"]}
        )  # fmt: skip
    return [
        {"bank": bank, "queries": queries, "k": k, "temperature": t, "rows": rows[0]["rows"],
         "chance": 1 / rows[0]["n_classes"], "n_classes": rows[0]["n_classes"], "bars": rows}
        for (bank, queries, k, t), rows in groups.items()
    ]  # fmt: skip


def backbones(run: Run) -> list[dict[str, Any]]:
    """What made the vectors: each identity once, with the steps that used it."""
    made_by = {
        file.sha256: name
        for name, step in run.of("train").items()
        for file in step.files
        if file.name.endswith("tensors")
    }
    found: dict[str, dict[str, Any]] = {}
    for name, step in run.of("embed", "evaluate").items():
        identity = step.facts["backbone"]
        weights = identity.get("weights") or ""
        key = f"{identity['name']} {weights} {identity.get('pooling')}"
        row = found.setdefault(key, {
            "name": identity["name"], "weights": weights, "made_by": made_by.get(weights, ""),
            "pooling": identity.get("pooling") or "", "preprocess": settings(identity.get("preprocess") or {}),
            "architecture": settings(identity.get("config") or {}), "used_by": [],
        })  # fmt: skip
        row["used_by"].append(name)
    return list(found.values())


def settings(values: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, False, 0.0))
