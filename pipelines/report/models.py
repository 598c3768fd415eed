"""What the page says of encoders: how they were trained, how well they tell classes, and what made the vectors."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.artifact import read_table
from pipelines.report import drawings
from pipelines.report.drawings import Curve
from pipelines.report.run import Run, step_inputs


def trainings(run: Run) -> list[dict[str, Any]]:
    """DINO loss and teacher entropy of every training that took a step."""
    found = []
    for name, step in run.of("train").items():
        config = step.manifest["config"]
        if not config["n_steps"]:
            continue
        table = read_table(step.part(0), ["dino_loss", "teacher_entropy", "usage_perplexity", "knn_accuracy"])
        loss, entropy, used, accuracy = (table[column].to_numpy() for column in table.column_names)
        prototypes = config["head"]["prototypes"]
        uniform = math.log(prototypes)
        measured = np.flatnonzero(np.isfinite(accuracy))
        last = max(1, len(loss) // 20)
        end = float(np.nanmean(loss[-last:]))
        curves = [Curve("DINO loss", loss, "loss"), Curve("teacher entropy", entropy, "entropy")]
        alt = f"DINO loss and teacher entropy of {name} by step; the loss ends at {end:.2f} nats, ln K is {uniform:.2f}"
        found.append({
            "name": name, "shards": step_inputs(step)["shards"], "steps": config["n_steps"], "batch": config["batch"],
            "seen": step.counts["kept"], "loss": end, "uniform": uniform, "prototypes": prototypes,
            "used": float(np.nanmean(used[-last:])), "skipped": step.counts["skipped_steps"],
            "learnt": end < uniform - 0.1, "kept": step.facts.get("step", config["n_steps"]),
            "alarms": list(step.facts.get("alarms", {}).values()),
            "accuracies": [(int(i) + 1, float(accuracy[i])) for i in measured],
            "chart": drawings.line_chart(curves, (uniform, f"ln K = {uniform:.2f}"), "step", "nats", alt),
        })  # fmt: skip
    return found


def scores(run: Run) -> list[dict[str, Any]]:
    """Accuracies by k-NN and by linear probes, those with one bank, one exam and one k beside one another."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, step in run.of("evaluate").items():
        config, reads, facts = step.manifest["config"], step_inputs(step), step.facts
        key = (reads["bank"], reads["queries"], str(config["n_neighbors"]), str(config["temperature"]))
        groups.setdefault(key, []).append(
            {"name": name, "backbone": reads.get("backbone", config["backbone"]), "accuracy": facts["accuracy"],
             "linear": facts.get("linear_accuracy"), "strength": facts.get("linear_strength"),
             "correct": step.counts["correct"], "rows": step.counts["rows"], "n_classes": facts["n_classes"]}
        )  # fmt: skip
    return [
        {"bank": bank, "queries": queries, "k": k, "temperature": t, "rows": rows[0]["rows"],
         "chance": 1 / rows[0]["n_classes"], "n_classes": rows[0]["n_classes"], "bars": rows,
         "linear": any(row["linear"] is not None for row in rows)}
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
    for name, step in run.of("embed", "evaluate", "calibrate").items():
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
