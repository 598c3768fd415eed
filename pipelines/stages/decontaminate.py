"""``decontaminate``: drop what is near a reference pool, such as an evaluation set, or joined to what is.

Any number of references in one step; each gets a certificate (``certificate``).
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table
from curation.decontaminate import DecontaminateConfig
from curation.execute import Executor
from curation.selection import carried_count, write_selection
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, Step, listed
from pipelines.stages.certificate import certify
from pipelines.stages.dedup import check_drop
from pipelines.stages.hops import hop_folder, measure, reach
from pipelines.stages.mix import check_unmixed, refuse_mixes
from pipelines.stages.neighbors import based_parts
from pipelines.stages.references import Job, Part, Reference, looked_at, nearest_images, references_of


def check(name: str, config: DecontaminateConfig, inputs: Mapping[str, Step]) -> None:
    """References that are not the pool, neighbors that fit the mode and the similarity, no mix with shares.

    Raises UserError before anything runs.
    """
    refuse_mixes(name, inputs)
    if inputs["embeddings"].name in config.references:
        raise itself(name, inputs["embeddings"].name)
    near = inputs.get("neighbors")
    if near is not None:
        check_edges_fit(name, config, None if near.config is None else near.config.min_similarity)


def run(config: DecontaminateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write kept, and the nearest reference image with its similarity, for every row looked at.

    Columns: row, kept; near_row (int64, position of that image in the pool of its reference), similarity (float32) and
    reference (int32, index of that reference in the facts' list of names); ties go to the first reference, then to the
    lowest row. Beside the parts stand a certificate of every reference and its tables, see ``certificate``.

    With a ``selection`` its rows alone are looked at: edges through other rows do not count, but what is near a row
    that it left out is near the copies of that row that it kept. Its counts go on.
    Selected rows that ``embed`` could not decode are bad: counted, and not in the result.

    Mode ``component`` adds hops (int32; 1: near a reference image, 2: near such a row, ...; 0: kept), through (int64,
    the row id it was reached from: of the hop before, the one most similar, ties to the lowest id) and
    through_similarity (float32), both null for hops 0 and 1. The facts say the rows of each hop, and how many
    components were dropped and the rows of the largest: connected components of the graph of dropped rows and
    reference images, joined by the edges between rows and by every pair of a row and a reference image that reaches
    ``min_similarity``; pairs of reference images do not join.
    """
    embeddings: Artifact = inputs["embeddings"]
    artifacts = listed(inputs, "reference", config.references)
    job = Job(config, embeddings, inputs.get("neighbors"), inputs.get("selection"), out.location)
    check_unmixed("decontaminate.selection", job.before)
    check_edges(job)
    check_references(job, artifacts)
    references, n_images = references_of(config.references, artifacts)
    parts = [Part(i, start, part) for i, (start, part) in enumerate(based_parts(embeddings))]
    names = [[part_name(part.number)] for part in parts]
    also, of_each = "", None
    if config.mode == "direct":
        out.make(partial(decide_part, job=job), parts, names, shared={"references": references})
    else:
        parts, frontiers = reach(job, parts, references, out, executor)
        also, of_each = measure(job, parts, frontiers, references, n_images, out, executor)
        out.make(partial(write_part, job=job), parts, names)
    counts = {"rows": 0, "kept": 0, "dropped": 0, "bad": 0, **add_counts(file.counts for file in out.files)}
    check_drop(config.max_drop_fraction, counts, out.artifact, sorted(file.name for file in out.files), also)
    certify(job, parts, references, artifacts, of_each, counts, out, executor)
    return counts


def check_references(job: Job, artifacts: Sequence[Artifact]) -> None:
    """References with images, other than the pool, with vectors that can be compared with its own. Raises UserError."""
    mine = job.embeddings.facts
    for name, reference in zip(job.config.references, artifacts, strict=True):
        if not reference.starts[-1]:
            raise UserError(
                f"decontaminate.reference must have images that were embedded: {name} has none",
                "fill its pool, or leave it out: nothing can be said of an empty one",
            )
        if reference.digest == job.embeddings.digest:
            raise itself("decontaminate", name)
        theirs = reference.facts
        if theirs["backbone"] != mine["backbone"]:
            raise UserError(
                f"embeddings and reference must come from one backbone: got {mine['backbone']['name']} and "
                f"{theirs['backbone']['name']} for {name}",
                "embed both pools with the same backbone",
            )
        if theirs["width"] != mine["width"]:
            raise UserError(
                f"embeddings and reference must have one width: got {mine['width']} and {theirs['width']} for {name}",
                "embed both pools with the same backbone",
            )


def itself(name: str, reference: str) -> UserError:
    """The sentence for a pool that is its own reference."""
    return UserError(
        f"{name}.reference must be other images than those looked at: got {reference}, the pool itself",
        "every image would be dropped as near itself; name the embeddings of the evaluation set",
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


def decide_part(part: Part, job: Job, references: Sequence[Reference]) -> FileInfo:
    """The rows of one part, each by its own nearest reference image."""
    rows, x, bad = looked_at(part, job)
    nearest = nearest_images(part, job, rows, x, references)
    kept = ~(nearest.similarity >= np.float32(job.config.min_similarity))
    count = carried_count(job.before, part.number, rows, kept)
    return write_selection(job.out / part_name(part.number), rows, kept, bad, **nearest.columns(), **count)


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
        **{name: table[name] for name in ("near_row", "similarity", "reference")},
        hops=pa.array(hops),
        through=pa.array(through, mask=hops < 2),
        through_similarity=pa.array(similarity, mask=hops < 2),
        **carried_count(job.before, part.number, rows, hops == 0),
    )


STAGE = Stage(
    version=3,
    config=DecontaminateConfig,
    run=run,
    reads={"embeddings": ("embed",)},
    lists={"reference": ("embed",)},
    through=("embeddings.pool", "reference.pool"),
    optional={"selection": SELECTIONS, "neighbors": ("neighbors",)},
    check=check,
)
