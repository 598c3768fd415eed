"""What the page says of new images in an old hierarchy: whether they lie as the old ones do."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipelines.report import drawings
from pipelines.report.run import Run, step_inputs


def drifts(run: Run) -> list[dict[str, Any]]:
    """Every assign step: what its facts say, and how far old and new images lie from their centroids."""
    return [
        {"name": name, "hierarchy": step_inputs(step)["hierarchy"], "facts": step.facts["drift"],
         "chart": distance_chart(name, step.facts["drift"]["histogram"])}
        for name, step in run.of("assign").items()
    ]  # fmt: skip


def distance_chart(name: str, histogram: Mapping[str, list[float]]) -> Markup:
    """Shares of old and new images by squared distance, in per cent."""
    last = histogram["edges"][-1]
    series = [
        (css, [100 * share for share in histogram[which]]) for css, which in (("before", "old"), ("after", "new"))
    ]
    ticks = [f"{value:.3g}" for value in (0, last / 2, last)]
    alt = f"Old images and those of {name} by squared distance to their centroid, from 0 to {last:.4g}"
    return drawings.bar_chart(series, ticks, "squared distance to the centroid", alt)
