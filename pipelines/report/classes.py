"""What the page says of labelled pools: how even the classes are, before and after each choice."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Artifact, read_table
from curation.selection import read_selection
from pipelines.report.run import Run
from pipelines.stage import SELECTIONS

MAX_LABELS = 10_000  # different labels of a pool; more are names, not classes


def classes(run: Run) -> list[dict[str, Any]]:
    """Every pool with labels and a selection: its classes at first, after each selection, and how even they are."""
    labels = read_table(run.labels, ["source", "label"]) if run.labels else None
    found = []
    for name, pool in run.of("pool").items():
        chain = [step for step in run.of(*SELECTIONS).items() if run.pool(step[1]) == pool]
        if not chain:
            continue
        counted = [(name, count_labels(run, pool, None, labels))]
        counted += [(step, count_labels(run, pool, selection, labels)) for step, selection in chain]
        if len(counted[0][1]) < 2 or len(counted[0][1]) > MAX_LABELS:
            continue
        first, last = counted[0][1], counted[-1][1]
        shown = [label for label, _ in sorted(first.items(), key=lambda item: (-item[1], item[0]))][
            : run.config.n_classes
        ]
        found.append({
            "name": name, "last": counted[-1][0], "n_classes": len(first),
            "rows": [{"step": step, **balance(counts)} for step, counts in counted],
            "bars": [{"label": label, "before": first[label], "after": last[label]} for label in shown],
            "most": max([*first.values(), *last.values()]),
        })  # fmt: skip
    return found


def count_labels(run: Run, pool: Artifact, selection: Artifact | None, labels: pa.Table | None) -> Counter[str]:
    """Images of every class."""
    work = partial(labels_of_part, pool=pool, selection=selection)
    total = Counter[str]()
    for some in run.executor.map(work, range(len(pool.parts)), shared={"labels": labels}):
        total.update(some)
    return total


def labels_of_part(index: int, pool: Artifact, selection: Artifact | None, labels: pa.Table | None) -> dict[str, int]:
    """Images of every class in one part; an image without a class is left out."""
    table = read_table(pool.part(index), ["source", "label"])
    column = table["label"]
    if labels is not None:
        at = pc.index_in(table["source"], value_set=labels["source"])
        column = pc.coalesce(labels["label"].combine_chunks().take(at.combine_chunks()), column.combine_chunks())
    if selection is not None:
        column = column.take(pa.array(read_selection(selection.part(index)).rows))
    counted = column.drop_null().value_counts().to_pylist()
    return {str(entry["values"]): int(entry["counts"]) for entry in counted}


def balance(counts: Mapping[str, int]) -> dict[str, Any]:
    """How even classes are: the number of even classes with the same entropy, and the largest to the smallest."""
    n = np.array([count for count in counts.values() if count], np.float64)
    p = n / max(n.sum(), 1)
    return {
        "images": int(n.sum()),
        "classes": len(n),
        "effective": float(np.exp(-(p * np.log(p)).sum())) if len(n) else 0.0,
        "ratio": float(n.max() / n.min()) if len(n) else 0.0,
    }
