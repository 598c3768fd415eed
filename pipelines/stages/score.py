"""``score``: a number of every embedded image by a linear or MLP head, as a column for ``select``."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, write_table
from curation.embeddings import EmbeddingsPart, covered_rows, embedding_parts
from curation.execute import Executor
from curation.store import Entry, Location
from embedding.score import Head, ScoreConfig, read_head, score_rows
from pipelines.errors import UserError
from pipelines.stage import FOUND, Inputs, Output, Stage

HINT = "embedding/score.py says how a head is stored, and how one of PyTorch is converted"


def look(config: ScoreConfig) -> tuple[Sequence[Entry], Head]:
    """The head, known by its content, wherever it lies and whatever it is called."""
    location = Location(config.head).resolved()
    try:
        data = location.read()
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"score.head must be a safetensors file: no file {config.head}", HINT) from e
    try:
        head = read_head(data, config.head)
    except ValueError as e:
        raise UserError(str(e), HINT) from e
    return [Entry("head", len(data), hashlib.sha256(data).hexdigest())], head


def run(config: ScoreConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``row`` and the column of every covered row."""
    embeddings: Artifact = inputs["embeddings"]
    head: Head = inputs[FOUND]
    width, backbone = embeddings.facts["width"], embeddings.facts["backbone"]
    if width != head.width:
        raise UserError(
            f"score.head must take the vectors of {backbone['name']}, which have {width} numbers: got one for "
            f"{head.width}",
            "a head fits the backbone that it was trained on alone",
        )
    parts = embedding_parts(embeddings)
    names = [[part_name(i)] for i in range(len(parts))]
    work = partial(score_part, parts=parts, column=config.column, out=out.location)
    out.make(work, range(len(parts)), names, shared={"head": head})
    out.facts |= {"column": config.column, "backbone": backbone}
    return {**add_counts(file.counts for file in out.files), "dropped": 0, "bad": 0}


def score_part(index: int, parts: Sequence[EmbeddingsPart], column: str, out: Location, head: Head) -> FileInfo:
    """One part, in blocks cut at fixed places. Raises UserError when a score is not finite."""
    rows = covered_rows(parts[index].location)
    scores = np.concatenate([np.zeros(0, np.float32), *(score_rows(x, head) for x in parts[index].blocks())])
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"{column} must be finite: got {scores[bad[0]]} for row {rows[bad[0]]} of {parts[index].location}, and so "
            f"for {len(bad)} of its {len(rows)} rows",
            "the weights of the head are too large for float32",
        )
    table = pa.table({"row": pa.array(rows, pa.int32()), column: pa.array(scores, pa.float32())})
    return write_table(out / part_name(index), table, {"rows": len(rows), "kept": len(rows)})


STAGE = Stage(
    version=1,
    config=ScoreConfig,
    run=run,
    reads={"embeddings": ("embed",)},
    locations=("head",),
    look=look,
)
