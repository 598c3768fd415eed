"""``evaluate``: k-NN accuracy of an encoder, with one labelled pool as the bank and another as the queries."""

import operator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.embeddings import EmbeddingsPart
from curation.execute import Executor, on_worker
from curation.selection import write_selection
from curation.store import Location
from embedding.decode import MAX_PIXELS
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.embed import Model, embed_pool, look
from pipelines.stages.neighbors import Base, nearest_in_base
from training.evaluate import EvaluateConfig
from training.probes import knn_vote


class Bank(NamedTuple):
    """Labelled vectors that vote."""

    base: Base  # the labelled rows alone
    classes: list[str]


def run(config: EvaluateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the label and the prediction of every query; the accuracy is a fact of the artifact."""
    pools: dict[str, Artifact] = {name: inputs[name] for name in ("bank", "queries")}
    labelled = Artifact(out.scratch("labelled"))
    classes = find_classes(pools["bank"], labelled, executor)
    model = Model(config.backbone, inputs.get("backbone"), config.pooling)
    voters = embedded(model, pools["bank"], labelled, "bank", out, executor)
    asked = embedded(model, pools["queries"], None, "queries", out, executor)
    labels = on_worker(executor, bank_labels, {"pool": pools["bank"], "classes": classes})
    starts = pools["bank"].starts
    bank = Bank([(int(starts[i]), part) for i, part in enumerate(voters)], classes)
    items = list(enumerate(asked))
    work = partial(predict_part, config=config, queries=pools["queries"], bank=bank, out=out.location)
    out.make(work, items, [[part_name(i)] for i, _ in items], shared={"labels": labels})
    counts = add_counts(file.counts for file in out.files)
    out.facts |= {"accuracy": counts["correct"] / counts["rows"], "n_classes": len(classes)}
    return counts


def find_classes(pool: Artifact, labelled: Artifact, executor: Executor) -> list[str]:
    """The classes of the bank, sorted by name; its labelled rows become a selection. Raises UserError without any."""
    work = partial(classes_of_part, pool=pool, labelled=labelled)
    classes: set[str] = executor.reduce(work, range(len(pool.parts)), operator.or_).get()
    if not classes:
        raise UserError(
            "the bank must have labels: got none",
            "put its images in one folder a class, or name the metadata column with label_column",
        )
    return sorted(classes)


def classes_of_part(index: int, pool: Artifact, labelled: Artifact) -> set[str]:
    """The labels in one part; which rows have one is written down."""
    label = read_table(pool.part(index), ["label"])["label"]
    write_selection(labelled.part(index), np.arange(len(label)), label.is_valid().to_numpy())
    return set(label.drop_null().unique().to_pylist())


def embedded(
    model: Model, pool: Artifact, selection: Artifact | None, name: str, out: Output, executor: Executor
) -> list[EmbeddingsPart]:
    """The vectors of a pool, kept in scratch for as long as the step runs. Raises UserError when there are none."""
    side = Output(out.scratch(name), executor)
    embed_pool(model, pool, selection, MAX_PIXELS, side, executor)
    out.facts["backbone"] = side.facts["backbone"]
    sizes = {file.name: file.rows for file in side.files}
    parts, first = [], 0
    for i in range(len(pool.parts)):
        parts.append(EmbeddingsPart(side.location / part_name(i), sizes[part_name(i)], first))
        first += sizes[part_name(i)]
    if first == 0:
        kind = "images" if selection is None else "labelled images"
        raise UserError(f"the {name} must have {kind} that decode: got none", "see why in what embed says of this pool")
    return parts


def bank_labels(pool: Artifact, classes: list[str]) -> np.ndarray:
    """The class of every row, int32 (n,), -1 without a label: the one task that holds O(rows), 4 bytes each."""
    labels = np.empty(int(pool.starts[-1]), np.int32)
    for i, (start, stop) in enumerate(pairwise(pool.starts.tolist())):
        found = pc.index_in(read_table(pool.part(i), ["label"])["label"], pa.array(classes))
        labels[start:stop] = found.fill_null(-1).to_numpy()
    return labels


def predict_part(
    item: tuple[int, EmbeddingsPart],
    config: EvaluateConfig,
    queries: Artifact,
    bank: Bank,
    out: Location,
    labels: np.ndarray,
) -> FileInfo:
    """The vote on every query of a part."""
    index, part = item
    rows, x = part.read()
    best = nearest_in_base(x, bank.base, config.n_neighbors)
    voter = labels[np.maximum(best.row_ids, 0)]  # of a place that nobody takes, any: its similarity is -inf
    predicted = knn_vote(voter, best.similarity, len(bank.classes), config.temperature)
    label = read_table(queries.part(index), ["label"])["label"].take(pa.array(rows))
    names = pa.array(bank.classes).take(pa.array(predicted))
    n_right = sum(a == b for a, b in zip(label.to_pylist(), names.to_pylist(), strict=True))
    table = pa.table({"row": pa.array(rows, pa.int32()), "label": label, "predicted": names})
    counts = {"rows": len(rows), "kept": len(rows), "dropped": 0, "bad": 0, "correct": n_right}
    return write_table(out / part_name(index), table, counts)


STAGE = Stage(
    version=3,
    config=EvaluateConfig,
    run=run,
    reads={"bank": ("pool",), "queries": ("pool",)},
    step_or_value={"backbone": ("train",)},
    look=look,
)
