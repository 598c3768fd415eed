"""``decontaminate``: drop what is near a reference pool, such as an evaluation set, or joined to what is."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.decontaminate import DecontaminateConfig
from curation.execute import Executor
from curation.selection import carried_count, write_selection
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, Step
from pipelines.stages.dedup import check_drop
from pipelines.stages.hops import Job, Part, columns_of, hop_folder, looked_at, measure, reach
from pipelines.stages.mix import check_unmixed, refuse_mixes
from pipelines.stages.neighbors import Base, based_parts, nearest_in_base


def check(name: str, config: DecontaminateConfig, inputs: Mapping[str, Step]) -> None:
    """Neighbors that fit the mode and the similarity, no mix with shares. Raises UserError before anything runs."""
    refuse_mixes(name, inputs)
    near = inputs.get("neighbors")
    if near is not None:
        check_edges_fit(name, config, None if near.config is None else near.config.min_similarity)


def run(config: DecontaminateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept, and the nearest reference row with its similarity (null if there is none), for every row looked at.

    With a ``selection`` its rows alone are looked at: edges through other rows do not count, and its counts go on.
    Selected rows that ``embed`` could not decode are bad: counted, and not in the result.

    Mode ``component`` adds hops (int32; 1: near a reference image, 2: near such a row, ...; 0: kept), through (int64,
    the row id it was reached from: of the hop before, the one most similar, ties to the lowest id) and
    through_similarity (float32), both null for hops 0 and 1. The facts say the rows of each hop, and how many
    components were dropped and the rows of the largest: connected components of the graph of dropped rows and
    reference images, joined by the edges between rows and by every pair of a row and a reference image that reaches
    ``min_similarity``; pairs of reference images do not join.
    """
    embeddings: Artifact = inputs["embeddings"]
    reference: Artifact = inputs["reference"]
    job = Job(config, embeddings, inputs.get("neighbors"), inputs.get("selection"), out.location)
    check_unmixed("decontaminate.selection", job.before)
    check_same_backbone(embeddings, reference)
    check_edges(job)
    base = based_parts(reference)
    parts = [Part(i, start, part) for i, (start, part) in enumerate(based_parts(embeddings))]
    names = [[part_name(part.number)] for part in parts]
    also = ""
    if config.mode == "direct":
        out.make(partial(decide_part, job=job), parts, names, shared={"reference": base})
    else:
        parts, frontiers = reach(job, parts, base, out, executor)
        also = measure(job, parts, frontiers, base, int(pool_of(reference).starts[-1]), out, executor)
        out.make(partial(write_part, job=job), parts, names)
    counts = {"rows": 0, "kept": 0, "dropped": 0, "bad": 0, **add_counts(file.counts for file in out.files)}
    check_drop(config.max_drop_fraction, counts, out.artifact, sorted(file.name for file in out.files), also)
    return counts


def check_same_backbone(embeddings: Artifact, reference: Artifact) -> None:
    """Similarities between vectors of different models mean nothing."""
    a, b = embeddings.facts["backbone"], reference.facts["backbone"]
    if a != b:
        raise UserError(
            f"embeddings and reference must come from one backbone: got {a['name']} and {b['name']}",
            "embed both pools with the same backbone",
        )


def check_edges(job: Job) -> None:
    """Edges of the same rows, from a similarity on that leaves none out. Raises UserError."""
    if job.edges is None:
        return
    check_edges_fit("decontaminate", job.config, job.edges.manifest["config"]["min_similarity"])
    if job.edges.input("embeddings").digest != job.embeddings.digest:
        raise UserError(
            "decontaminate.neighbors must be made from the same embeddings: got edges of other vectors",
            "name the same embed step in both",
        )


def check_edges_fit(name: str, config: DecontaminateConfig, lowest: float | None) -> None:
    """Neighbors in the mode that reads them, from a similarity on (None: not known) that leaves out none that counts.

    Raises UserError.
    """
    if config.mode != "component":
        raise UserError(
            f"{name}.neighbors is read in mode 'component' alone: got it in mode {config.mode!r}",
            "set mode: component, or leave neighbors out",
        )
    if lowest is not None and lowest > config.min_similarity:
        raise UserError(
            f"{name}.min_similarity must be at least that of its neighbors, {lowest}: got {config.min_similarity}",
            "lower min_similarity of the neighbors step, or raise this one",
        )


def decide_part(part: Part, job: Job, reference: Base) -> FileInfo:
    """The rows of one part, each by its own nearest reference image."""
    rows, x, bad = looked_at(part, job)
    best = nearest_in_base(x, reference, 1)
    kept = ~(best.similarity[:, 0] >= np.float32(job.config.min_similarity))
    count = carried_count(job.before, part.number, rows, kept)
    return write_selection(
        job.out / part_name(part.number), rows, kept, bad, **columns_of(best, "near_row", "similarity"), **count
    )


def write_part(part: Part, job: Job) -> FileInfo:
    """The rows of one part, each with the hop that reached it, if one did."""
    table = read_table(job.aside("direct", part_name(part.number)))
    rows = table["row"].to_numpy()
    hops, through = np.zeros(len(rows), np.int32), np.full(len(rows), -1, np.int64)
    similarity = np.zeros(len(rows), np.float32)
    for hop in part.hops:
        found = read_table(job.aside(hop_folder(hop), part_name(part.number)), ["row", "through", "through_similarity"])
        at = np.searchsorted(rows, found["row"].to_numpy())
        hops[at] = hop
        if hop > 1:
            through[at] = found["through"].to_numpy()
            similarity[at] = found["through_similarity"].to_numpy()
    return write_selection(
        job.out / part_name(part.number),
        rows,
        hops == 0,
        {"bad": part.bad, "direct": int((hops == 1).sum()), "transitive": int((hops > 1).sum())},
        near_row=table["near_row"],
        similarity=table["similarity"],
        hops=pa.array(hops),
        through=pa.array(through, mask=hops < 2),
        through_similarity=pa.array(similarity, mask=hops < 2),
        **carried_count(job.before, part.number, rows, hops == 0),
    )


STAGE = Stage(
    version=2,
    config=DecontaminateConfig,
    run=run,
    reads={"embeddings": ("embed",), "reference": ("embed",)},
    through=("embeddings.pool", "reference.pool"),
    optional={"selection": SELECTIONS, "neighbors": ("neighbors",)},
    check=check,
)
