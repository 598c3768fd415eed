"""``evaluate``: k-NN accuracy of an encoder, with one labelled pool as the bank and another as the queries."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.embeddings import EmbeddingsPart
from curation.execute import Executor
from curation.store import Location
from embedding.decode import MAX_PIXELS
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.embed import Model, embed_pool, executor_gpus, look
from pipelines.stages.neighbors import Base, nearest_in_base
from training.evaluate import EvaluateConfig
from training.probes import knn_vote


class Bank(NamedTuple):
    """Labelled vectors that vote."""

    base: Base
    labels: np.ndarray  # int32 (n,), class of each row of the bank's pool, -1 without a label
    classes: list[str]


def run(config: EvaluateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the label and the prediction of every query; the accuracy is a fact of the artifact."""
    pools: dict[str, Artifact] = {name: inputs[name] for name in ("bank", "queries")}
    device = "cuda" if executor_gpus(executor) else "cpu"
    model = Model(config.backbone, inputs.get("backbone"), config.pooling, device)
    parts = {name: embedded(model, pool, name, out, executor) for name, pool in pools.items()}
    classes, labels = bank_labels(pools["bank"])
    starts = pools["bank"].starts
    bank = Bank([(int(starts[i]), part) for i, part in enumerate(parts["bank"])], labels, classes)
    items = list(enumerate(parts["queries"]))
    work = partial(predict_part, config=config, queries=pools["queries"], out=out.location)
    out.make(work, items, [[part_name(i)] for i, _ in items], shared={"bank": bank})
    counts = add_counts(file.counts for file in out.files)
    out.facts |= {"accuracy": counts["correct"] / counts["rows"], "n_classes": len(classes)}
    return counts


def embedded(model: Model, pool: Artifact, name: str, out: Output, executor: Executor) -> list[EmbeddingsPart]:
    """The vectors of a pool, kept in scratch for as long as the step runs."""
    side = Output(out.scratch(name), executor)
    embed_pool(model, pool, None, MAX_PIXELS, side, executor)
    out.facts["backbone"] = side.facts["backbone"]
    sizes = {file.name: file.rows for file in side.files}
    parts, first = [], 0
    for i in range(len(pool.parts)):
        parts.append(EmbeddingsPart(side.location / part_name(i), sizes[part_name(i)], first))
        first += sizes[part_name(i)]
    return parts


def bank_labels(pool: Artifact) -> tuple[list[str], np.ndarray]:
    """Classes, sorted by name, and the class of every row: 4 bytes each. Raises UserError without labels."""
    encoded = [read_table(pool.part(i), ["label"])["label"] for i in range(len(pool.parts))]
    classes = sorted({str(label) for column in encoded for label in column.unique().to_pylist() if label is not None})
    if not classes:
        raise UserError(
            "the bank must have labels: got none",
            "put its images in one folder a class, or name the metadata column with label_column",
        )
    known = pa.array(classes)
    found = [pa.compute.index_in(column, known).fill_null(-1).to_numpy() for column in encoded]
    return classes, np.concatenate(found).astype(np.int32)


def predict_part(
    item: tuple[int, EmbeddingsPart], config: EvaluateConfig, queries: Artifact, out: Location, bank: Bank
) -> FileInfo:
    """The vote on every query of a part."""
    index, part = item
    rows, x = part.read()
    best = nearest_in_base(x, bank.base, config.n_neighbors)
    voter = bank.labels[np.maximum(best.row_ids, 0)]
    similarity = np.where((best.row_ids >= 0) & (voter >= 0), best.similarity, -np.inf)
    predicted = knn_vote(np.maximum(voter, 0), similarity, len(bank.classes), config.temperature)
    label = read_table(queries.part(index), ["label"])["label"].take(pa.array(rows))
    names = pa.array(bank.classes).take(pa.array(predicted))
    n_right = sum(a == b for a, b in zip(label.to_pylist(), names.to_pylist(), strict=True))
    table = pa.table({"row": pa.array(rows, pa.int32()), "label": label, "predicted": names})
    counts = {"rows": len(rows), "kept": len(rows), "dropped": 0, "bad": 0, "correct": n_right}
    return write_table(out / part_name(index), table, counts)


STAGE = Stage(
    version=1,
    config=EvaluateConfig,
    run=run,
    reads={"bank": ("pool",), "queries": ("pool",)},
    step_or_value={"backbone": ("train",)},
    look=look,
)
