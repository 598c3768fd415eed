"""What the page says of thresholds that were calibrated: how they tell known copies, and which pairs they mistake."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, read_table
from embedding.known_copies import TRANSFORMS
from pipelines.report import drawings
from pipelines.report.drawings import Curve
from pipelines.report.run import Run
from pipelines.report.thumbnails import make_thumbs
from pipelines.stages.calibrate import CURVE

DEMANDS = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)  # precisions of which the table says what they cost
FalsePair = tuple[float, int, int]  # minus the similarity, and two rows of the pool, the lower first


def calibrations(run: Run) -> list[dict[str, Any]]:
    """Every calibrate step: its curves, the suggested threshold, and the pairs of other images that are most alike."""
    found = []
    for name, step in run.of("calibrate").items():
        table, facts = read_table(step.location / CURVE), step.facts
        thresholds = table["threshold"].to_numpy()
        mark = facts["suggested"]["threshold"] if facts["suggested"] else None
        at = len(thresholds) - 1 if mark is None else int(np.searchsorted(thresholds, np.float32(mark)))
        found.append({
            "name": name, "facts": facts, "backbone": facts["backbone"]["name"], "config": step.manifest["config"],
            "chart": curves_of(name, table, mark) if len(thresholds) else "", "demands": demands(table),
            "at": row_of(table, at) if len(thresholds) else None,
            "each": [(way, *(table[f"{what}_{way}"][at].as_py() for what in ("recall", "precision")))
                     for way in TRANSFORMS] if len(thresholds) else [],
            "groups": picture_false_pairs(run, step),
        })  # fmt: skip
    return found


def curves_of(name: str, table: pa.Table, mark: float | None) -> Any:
    """Precision and recall against the threshold."""
    precision, recall = (table[what].to_numpy() for what in ("precision", "recall"))
    words = "none is suggested" if mark is None else f"{mark:.4g} is suggested"
    alt = f"Precision and recall of {name} by threshold; {words}"
    curves = [Curve("precision", precision, "precision"), Curve("recall", recall, "recall")]
    return drawings.share_chart(table["threshold"].to_numpy(), curves, mark, "min_similarity", alt)


def demands(table: pa.Table) -> list[tuple[float, dict[str, float]]]:
    """For each precision that one may ask for and get, the lowest threshold that has it."""
    precision = table["precision"].to_numpy()
    fits = [(demand, np.flatnonzero(precision >= demand)) for demand in DEMANDS]
    return [(demand, row_of(table, int(at[0]))) for demand, at in fits if len(at)]


def row_of(table: pa.Table, at: int) -> dict[str, float]:
    """What is told of one threshold."""
    return {key: table[key][at].as_py() for key in ("threshold", "recall", "precision", "false_per_image")}


def picture_false_pairs(run: Run, step: Artifact) -> list[tuple[str, list[dict[str, Any]]]]:
    """The most similar pairs of different images of the sample, with thumbnails."""
    n = run.config.n_pairs
    pairs: list[FalsePair] = []
    for some in run.executor.map(partial(false_pairs_of_part, step=step, n=n), range(len(step.parts))):
        pairs = sorted({*pairs, *some})[:n]
    thumbs = make_thumbs(run.pool(step), [row_id for _, *pair in pairs for row_id in pair], run.executor)
    shown = [{"left": thumbs[a], "right": thumbs[b], "similarity": -s, "edge": -s} for s, a, b in pairs]
    return [("Most similar different images of the sample", shown)] if shown else []


def false_pairs_of_part(index: int, step: Artifact, n: int) -> list[FalsePair]:
    """The n most similar of the pairs that the images of a part make with their nearest others, each pair once."""
    table = read_table(step.part(index), ["near_similarity", "row_id", "near_row"]).drop_null()
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return sorted({(-similarity, min(a, b), max(a, b)) for similarity, a, b in rows})[:n]
