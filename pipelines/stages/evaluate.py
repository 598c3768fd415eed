"""``evaluate``: accuracy of an encoder by k-NN and by a linear probe, with one labelled pool as the bank and another as
the queries.

    part-*         of every query that was embedded: row, label, and the classes that it is given: predicted (by k-NN)
                   and linear_predicted
    maps.parquet   pictures of what the patch tokens show, see ``pipelines.stages.maps``
"""

import operator
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.embeddings import EmbeddingsPart
from curation.execute import Executor, Ref, on_worker
from curation.selection import write_selection
from curation.store import Location
from embedding.decode import MAX_PIXELS
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.embed import Model, embed_pool, look
from pipelines.stages.linear import Voters, fit_on_bank
from pipelines.stages.maps import write_maps
from pipelines.stages.neighbors import nearest_in_base
from training.evaluate import EvaluateConfig
from training.probes import LinearProbe, knn_vote, linear_predict


class Bank(NamedTuple):
    """Labelled vectors that vote."""

    voters: Voters  # the labelled rows alone
    classes: list[str]


def run(config: EvaluateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the label and the predictions of every query; the accuracies are facts of the artifact."""
    pools: dict[str, Artifact] = {name: inputs[name] for name in ("bank", "queries")}
    labelled = Artifact(out.scratch("labelled"))
    classes = find_classes(pools["bank"], labelled, executor)
    if config.linear:
        check_several(classes)
    model = Model(config.backbone, inputs.get("backbone"), config.pooling)
    voters = embedded(model, pools["bank"], labelled, "bank", out, executor)
    asked = embedded(model, pools["queries"], None, "queries", out, executor)
    labels = on_worker(executor, bank_labels, {"pool": pools["bank"], "classes": classes})
    starts = pools["bank"].starts
    bank = Bank([(int(starts[i]), part) for i, part in enumerate(voters)], classes)
    items = list(enumerate(asked))
    shared: dict[str, Ref[Any]] = {"labels": labels}
    if config.linear:
        shared["probe"], out.facts["linear_strength"] = fit_on_bank(config, bank.voters, labels, executor)
    work = partial(predict_part, config=config, queries=pools["queries"], bank=bank, out=out.location)
    out.make(work, items, [[part_name(i)] for i, _ in items], shared)
    write_maps(model, pools["queries"], asked, out, executor)
    counts = add_counts(file.counts for file in out.files)
    out.facts |= {"accuracy": counts["correct"] / counts["rows"], "n_classes": len(classes)}
    if config.linear:
        out.facts["linear_accuracy"] = counts["linear_correct"] / counts["rows"]
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


def check_several(classes: Sequence[str]) -> None:
    """Raise UserError unless there is something to tell apart."""
    if len(classes) < 2:
        raise UserError(
            f"the bank of a linear probe must have two classes or more: got {classes[0]!r} alone",
            "set evaluate.linear: false for k-NN alone, or give a bank with more classes",
        )


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
    probe: LinearProbe | None = None,
) -> FileInfo:
    """The vote on every query of a part, and what the probe says of it."""
    index, part = item
    rows, x = part.read()
    best = nearest_in_base(x, bank.voters, config.n_neighbors)
    voter = labels[np.maximum(best.row_ids, 0)]  # of a place that nobody takes, any: its similarity is -inf
    predicted = knn_vote(voter, best.similarity, len(bank.classes), config.temperature)
    label = read_table(queries.part(index), ["label"])["label"].take(pa.array(rows))
    counts = {"rows": len(rows), "kept": len(rows), "dropped": 0, "bad": 0}
    table = {"row": pa.array(rows, pa.int32()), "label": label}
    table["predicted"], counts["correct"] = named(predicted, bank.classes, label)
    if probe is not None:
        found = named(linear_predict(probe, x), bank.classes, label)
        table["linear_predicted"], counts["linear_correct"] = found
    return write_table(out / part_name(index), pa.table(table), counts)


def named(predicted: np.ndarray, classes: list[str], label: pa.ChunkedArray) -> tuple[pa.Array, int]:
    """The names of predicted classes int (m,), and how many of them are the label."""
    names = pa.array(classes).take(pa.array(predicted))
    return names, pc.sum(pc.equal(names, label).cast(pa.int64()), min_count=0).as_py()


STAGE = Stage(
    version=4,
    config=EvaluateConfig,
    run=run,
    reads={"bank": ("pool",), "queries": ("pool",)},
    step_or_value={"backbone": ("train",)},
    look=look,
)
