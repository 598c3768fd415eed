"""``decontaminate``: drop what is directly near a reference pool, such as an evaluation set."""

from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name
from curation.decontaminate import DecontaminateConfig
from curation.embeddings import EmbeddingsPart, covered_rows
from curation.execute import Executor
from curation.selection import read_selection, rows_among, write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage
from pipelines.stages.dedup import check_drop
from pipelines.stages.neighbors import Base, based_parts, nearest_in_base


def run(config: DecontaminateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept, and the nearest reference row with its similarity, for every row looked at.

    Selected rows that ``embed`` could not decode are bad: counted, and not in the result.
    """
    embeddings: Artifact = inputs["embeddings"]
    reference: Artifact = inputs["reference"]
    check_same_backbone(embeddings, reference)
    items = [(i, part) for i, (_, part) in enumerate(based_parts(embeddings))]
    before = inputs.get("selection")
    work = partial(decide_part, config=config, embeddings=embeddings, before=before, out=out.location)
    out.make(work, items, [[part_name(i)] for i, _ in items], shared={"reference": based_parts(reference)})
    counts = {"rows": 0, "kept": 0, "dropped": 0, "bad": 0, **add_counts(file.counts for file in out.files)}
    check_drop(config.max_drop_fraction, counts, out.artifact, sorted(file.name for file in out.files))
    return counts


def check_same_backbone(embeddings: Artifact, reference: Artifact) -> None:
    """Similarities between vectors of different models mean nothing."""
    a, b = embeddings.facts["backbone"], reference.facts["backbone"]
    if a != b:
        raise UserError(
            f"embeddings and reference must come from one backbone: got {a['name']} and {b['name']}",
            "embed both pools with the same backbone",
        )


def decide_part(
    item: tuple[int, EmbeddingsPart],
    config: DecontaminateConfig,
    embeddings: Artifact,
    before: Artifact | None,
    out: Location,
    reference: Base,
) -> FileInfo:
    """One part: the rows looked at are those of the selection, if there is one."""
    index, part = item
    rows, x = part.read()
    bad: Counts = {}
    if before is not None:
        chosen = read_selection(before.part(index)).rows
        undecoded = np.isin(chosen, covered_rows(embeddings.location / part_name(index, "rejected")))
        if undecoded.any():
            bad, chosen = {"bad": int(undecoded.sum())}, chosen[~undecoded]
        at = rows_among(chosen, rows, "embeddings")
        rows, x = chosen, x[at]
    best = nearest_in_base(x, reference, 1)
    similarity = best.similarity[:, 0]
    return write_selection(
        out / part_name(index),
        rows,
        ~(similarity >= np.float32(config.min_similarity)),
        bad,
        near_row=pa.array(best.row_ids[:, 0]),
        similarity=pa.array(similarity),
    )


STAGE = Stage(
    version=1,
    config=DecontaminateConfig,
    run=run,
    reads={"embeddings": ("embed",), "reference": ("embed",)},
    through=("embeddings.pool", "reference.pool"),
    optional={"selection": SELECTIONS},
)
