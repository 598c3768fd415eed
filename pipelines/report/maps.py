"""What the page shows of patch tokens: principal components and attention of a few queries, by ``evaluate``."""

import base64
from collections.abc import Mapping
from typing import Any

from curation.artifact import Artifact, read_table
from pipelines.report.run import Run, step_inputs
from pipelines.report.thumbnails import encode_thumb
from pipelines.stages.maps import MAPS


def patch_maps(run: Run) -> list[dict[str, Any]]:
    """Every evaluation with such pictures: its encoder, the size it saw the images at, and the pictures."""
    found = []
    for name, step in run.of("evaluate").items():
        rows = maps_of(step)[: run.config.n_maps]
        if rows:
            reads, first = step_inputs(step), rows[0]
            found.append(
                {"name": name, "backbone": reads.get("backbone", step.manifest["config"]["backbone"]),
                 "queries": reads["queries"], "side": first["side"], "grid": first["grid"],
                 "attention": first["attention"] is not None, "images": [pictures(row) for row in rows]}
            )  # fmt: skip
    return found


def maps_of(step: Artifact) -> list[dict[str, Any]]:
    """The rows of its ``maps.parquet``, a few; none when there is no such file."""
    if MAPS not in {file.name for file in step.files}:
        return []
    rows: list[dict[str, Any]] = read_table(step.location / MAPS).to_pylist()
    return rows


def pictures(row: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of one image as data, and its label."""
    return {
        "label": row["label"] or "",
        "image": encode_thumb(row["image"]),
        "components": as_uri(row["components"]),
        "attention": as_uri(row["attention"]),
    }


def as_uri(png: bytes | None) -> str:
    """A PNG file as a data URI; empty without one."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else ""
