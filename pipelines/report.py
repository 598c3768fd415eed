"""What the page of a run says: facts read from its artifacts, a section a kind of step, bounded in pictures.

Every function here looks at one kind of step and returns plain values for the template; what is O(rows) is counted
part by part on the workers. Nothing is computed anew that a step has written down, and no times and no absolute paths
get in, so equal artifacts give equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from curation.artifact import Artifact, pool_of, read_table
from curation.execute import Executor
from curation.store import Location
from pipelines import drawings
from pipelines.drawings import Curve, Node

MAX_SHOWN = 48  # upper limit of the settings that ask for pictures
KINDS = {
    "pool": "source", "select": "choice", "dedup": "choice", "decontaminate": "choice", "sample": "choice",
    "embed": "vectors", "neighbors": "vectors", "cluster": "vectors", "shards": "source", "train": "model",
    "evaluate": "model", "report": "model",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page is called and how much it shows."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    title: str = "What happened to the images"
    labels: str = ""  # Parquet with columns source and label: classes that the pool itself does not know
    n_pairs: int = 6  # pairs of each kind: most similar, least similar, drawn at random
    n_images: int = 14  # images of a cluster
    n_clusters: int = 24  # clusters with pictures, from the largest to the smallest
    n_rejected: int = 6  # files of each reason
    n_classes: int = 30  # classes with a bar, the most frequent
    seed: int = 0  # of what is drawn at random

    def __post_init__(self) -> None:
        for name in ("n_pairs", "n_images", "n_clusters", "n_rejected", "n_classes"):
            if not 0 <= getattr(self, name) <= MAX_SHOWN:
                raise ValueError(f"report.{name} must be in 0..{MAX_SHOWN}: got {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """The steps that the page is about, in the order of the recipe."""

    steps: Mapping[str, Artifact]
    config: ReportConfig
    labels: Location | None  # the file of labels, if there is one
    executor: Executor

    @cached_property
    def _at(self) -> dict[str, Artifact]:
        return {artifact.location.uri: artifact for artifact in self.steps.values()}

    def of(self, *stages: str) -> dict[str, Artifact]:
        """The steps of some stages."""
        return {name: artifact for name, artifact in self.steps.items() if artifact.stage in stages}

    def pool(self, artifact: Artifact) -> Artifact:
        """The pool behind an artifact, with its source where it is now."""
        pool = pool_of(artifact)
        return self._at.get(pool.location.uri, pool)

    def name(self, artifact: Artifact) -> str:
        """The step that made an artifact."""
        return artifact.location.parent.name

    def reading(self, artifact: Artifact, key: str, *stages: str) -> dict[str, Artifact]:
        """The steps whose input ``key`` is ``artifact``."""
        return {
            name: step
            for name, step in self.of(*stages).items()
            if step.has_input(key) and step.manifest["inputs"][key]["digest"] == artifact.digest
        }


class Fact(NamedTuple):
    """A number at the head of the page."""

    value: str
    label: str


def build_page(run: Run) -> str:
    """The whole page as HTML."""
    from pipelines import report_sections as sections

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
        steps=step_table(run),
        rejected=sections.rejected(run),
        pairs=sections.duplicates(run),
        leaks=sections.leaks(run),
        clusters=sections.clusters(run),
        classes=sections.classes(run),
        trainings=trainings(run),
        scores=scores(run),
        backbones=backbones(run),
    )


def step_inputs(artifact: Artifact) -> dict[str, str]:
    """The step behind each input."""
    return {key: entry["path"].split("/")[0] for key, entry in artifact.manifest["inputs"].items()}


def picture(run: Run) -> Markup:
    """Steps as boxes, and how many rows each kept."""
    nodes = [
        Node(name, KINDS.get(step.stage, "vectors"), (step.stage, outcome(step))) for name, step in run.steps.items()
    ]
    inputs = {name: list(step_inputs(step).values()) for name, step in run.steps.items()}
    return drawings.pipeline_picture(nodes, inputs)


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
    """Name, stage, inputs and counts of every step."""
    rows = []
    for name, step in run.steps.items():
        counts = step.counts
        first = {key: counts.pop(key, None) for key in ("rows", "kept", "dropped", "bad")}
        more = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items() if value)
        reads = ", ".join(dict.fromkeys(step_inputs(step).values()))
        rows.append({"name": name, "stage": step.stage, "reads": reads, **first, "more": more,
                     "fingerprint": step.manifest["fingerprint"]})  # fmt: skip
    return rows


def headline(run: Run) -> list[Fact]:
    """The few numbers that sum up a run."""
    facts: list[Fact] = []
    chosen = list(run.of("sample").values()) or list(run.of("decontaminate", "dedup", "select").values())
    pools = {run.pool(step).location.uri: run.pool(step) for step in chosen} or run.of("pool")
    facts.append(Fact(f"{sum(pool.counts['rows'] for pool in pools.values()):,}", "files looked at"))
    for stage, label in (("dedup", "near-duplicates dropped"), ("decontaminate", "leaks dropped")):
        if run.of(stage):
            facts.append(Fact(f"{sum(step.counts['dropped'] for step in run.of(stage).values()):,}", label))
    if chosen:
        label = "images in the curated set" if run.of("sample") else "images kept"
        facts.append(Fact(f"{chosen[-1].counts['kept']:,}", label))
    return facts


def trainings(run: Run) -> list[dict[str, Any]]:
    """Loss and teacher entropy of every training that took a step."""
    found = []
    for name, step in run.of("train").items():
        config = step.manifest["config"]
        if not config["n_steps"]:
            continue
        table = read_table(step.part(0), ["loss", "teacher_entropy", "usage_perplexity"])
        loss, entropy, used = (table[column].to_numpy() for column in table.column_names)
        uniform = math.log(config["n_prototypes"])
        last = max(1, len(loss) // 20)
        end = float(np.nanmean(loss[-last:]))
        curves = [Curve("loss", loss, "loss"), Curve("teacher entropy", entropy, "entropy")]
        alt = f"Loss and teacher entropy of {name} by step; the loss ends at {end:.2f} nats, ln K is {uniform:.2f}"
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


def best_of(found: Sequence[Any], n: int, key: Any) -> list[Any]:
    """The first ``n`` by ``key``; the order of equals is theirs."""
    return sorted(found, key=key)[:n]
