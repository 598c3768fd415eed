"""What ``decontaminate`` certifies of each reference: which of its images have a near copy in the pool, what was
dropped for them, and how near the rest is.

    certificate-<reference>.json         all numbers, and the sentence that they allow
    nearest-<reference>-0000000.parquet  of every image of a part of the reference that was embedded: row (int32, within
                                         the part of its pool), near_row (int64, position in the pool) and similarity
                                         (float32) of the nearest row that was looked at, null when there was none

The numbers are of the rows that the step looked at, before anything was dropped, unless their name says ``kept``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, describe, part_name, pool_of, read_table, write_table
from curation.decontaminate import similarity_bins
from curation.embeddings import EmbeddingsPart, covered_rows
from curation.execute import Executor, on_worker
from pipelines.errors import TaskError
from pipelines.stage import Output
from pipelines.stages.references import Job, Part, Reference, read_beside, read_seen
from pipelines.stages.touched import Touched

# The nearest row of the pool, of one reference image; row_id -1: no row was looked at.
NEAREST = np.dtype([("row_id", "<i8"), ("similarity", "<f4")])


class Evidence(NamedTuple):
    """What some parts of the pool say of the references."""

    nearest: np.ndarray  # NEAREST of every image that was embedded, reference by reference; (0,) without rows
    direct: np.ndarray  # int64 (m,): rows near an image of each reference
    kept: np.ndarray  # float32 (m,): the highest similarity of a kept row to an image of each reference, or -inf


class Piece(NamedTuple):
    """A part of a reference, and where its images are in ``Evidence.nearest``."""

    name: str  # of its table
    begin: int
    vectors: EmbeddingsPart


class Images(NamedTuple):
    """What one or more tables of nearest rows say."""

    n: int
    near: int  # with a similarity that reaches the threshold
    highest: float  # of the similarities, or -inf
    bins: np.ndarray  # int64 (N_BINS,): see ``similarity_bins``


def certificate_name(reference: str) -> str:
    """``certificate-imagenet_val.json``."""
    return f"certificate-{reference}.json"


def read_certificates(step: Artifact) -> dict[str, dict[str, Any]]:
    """The certificates of a finished step, by reference, in their order."""
    names: list[str] = step.facts["references"]
    return {name: json.loads((step.location / certificate_name(name)).read()) for name in names}


def nearest_name(reference: str, index: int) -> str:
    """``nearest-imagenet_val-0000012.parquet`` for part 12 of a reference."""
    return part_name(index, f"nearest-{reference}")


def certify(
    job: Job,
    parts: Sequence[Part],
    references: Sequence[Reference],
    artifacts: Sequence[Artifact],
    of_each: Sequence[Touched] | None,
    counts: Counts,
    out: Output,
    executor: Executor,
) -> None:
    """Write the certificates and their tables; the facts say the references in order, and the sentences.

    of_each: the components of each reference, in mode ``component``. counts: those of the step. One task holds about
    40 bytes a reference image, of all references together; the driver holds O(parts).
    """
    evidence = executor.reduce(partial(evidence_of_part, job=job), parts, merge_evidence)
    pieces = pieces_of(references)
    flat = [piece for some in pieces for piece in some]
    write = partial(write_nearest, out=out.artifact)
    out.make(write, flat, [[piece.name] for piece in flat], {"evidence": evidence})
    # the totals come without the images
    direct, kept = on_worker(executor, totals_of, {"evidence": evidence}).get()
    certificates = []
    for j, (reference, artifact) in enumerate(zip(references, artifacts, strict=True)):
        names = [piece.name for piece in pieces[j]]
        images = executor.reduce(partial(count_images, job=job), names, merge_images).get()
        known = about(job, reference.name, artifact, counts) | numbers(
            images, int(direct[j]), None if of_each is None else of_each[j], float(kept[j])
        )
        certificates.append({**known, "statement": statement(known)})
    written = [[certificate_name(reference.name)] for reference in references]
    out.make(partial(write_certificate, out=out.artifact), certificates, written)
    out.facts["references"] = [reference.name for reference in references]
    out.facts["verdict"] = "\n".join(str(known["statement"]) for known in certificates)


def evidence_of_part(part: Part, job: Job) -> Evidence:
    """What one part says, when it is decided which of its rows are kept."""
    seen, beside = read_seen(part, job), read_beside(part, job)
    nearest = np.empty(len(seen), NEAREST)
    nearest["row_id"], nearest["similarity"] = seen["row"] + np.int64(part.start), seen["similarity"]
    kept = read_table(job.out / part_name(part.number), ["kept"])["kept"].to_numpy()
    direct = (beside >= np.float32(job.config.min_similarity)).sum(axis=1)
    return Evidence(nearest, direct, beside[:, kept].max(axis=1, initial=-np.inf))


def merge_evidence(a: Evidence, b: Evidence) -> Evidence:
    """What earlier parts and later ones say; of equal similarities the earlier row counts."""
    nearest = a.nearest if len(a.nearest) else b.nearest
    if len(a.nearest) and len(b.nearest):
        nearest = np.where(b.nearest["similarity"] > a.nearest["similarity"], b.nearest, a.nearest)
    return Evidence(nearest, a.direct + b.direct, np.maximum(a.kept, b.kept))


def totals_of(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers a reference: rows near its images, and the highest similarity of a kept row."""
    return evidence.direct, evidence.kept


def pieces_of(references: Sequence[Reference]) -> list[list[Piece]]:
    """The parts of every reference."""
    pieces, begin = list[list[Piece]](), 0
    for reference in references:
        pieces.append([])
        for index, (_, vectors) in enumerate(reference.parts):
            pieces[-1].append(Piece(nearest_name(reference.name, index), begin, vectors))
            begin += vectors.n_rows
    return pieces


def write_nearest(piece: Piece, out: Artifact, evidence: Evidence) -> FileInfo:
    """The table of one part of a reference."""
    rows = covered_rows(piece.vectors.location)
    mine = evidence.nearest[piece.begin : piece.begin + len(rows)]
    if not len(evidence.nearest):  # nothing was looked at
        mine = np.zeros(len(rows), NEAREST)
    none = np.full(len(rows), not len(evidence.nearest))
    table = {
        "row": pa.array(rows, pa.int32()),
        "near_row": pa.array(mine["row_id"], mask=none),
        "similarity": pa.array(mine["similarity"], mask=none),
    }
    return write_table(out.location / piece.name, pa.table(table))


def count_images(name: str, job: Job) -> Images:
    """What one table says."""
    table = read_table(job.out / name, ["similarity"])
    known = table["similarity"].drop_null().to_numpy()
    near = int((known >= np.float32(job.config.min_similarity)).sum())
    return Images(table.num_rows, near, float(known.max(initial=-np.inf)), similarity_bins(known))


def merge_images(a: Images, b: Images) -> Images:
    """What both say."""
    return Images(a.n + b.n, a.near + b.near, max(a.highest, b.highest), a.bins + b.bins)


def about(job: Job, name: str, reference: Artifact, counts: Counts) -> dict[str, Any]:
    """What a certificate is about, each thing by its content."""
    backbone = job.embeddings.facts["backbone"]
    return {
        "reference": name,
        "mode": job.config.mode,
        "min_similarity": job.config.min_similarity,
        "backbone": backbone,
        "backbone_digest": hashlib.sha256(json.dumps(backbone, sort_keys=True).encode()).hexdigest(),
        "pool_digest": pool_of(job.embeddings).digest,
        "embeddings_digest": job.embeddings.digest,
        "selection_digest": None if job.before is None else job.before.digest,
        "reference_pool_digest": pool_of(reference).digest,
        "reference_embeddings_digest": reference.digest,
        "reference_pool_images": int(pool_of(reference).starts[-1]),
        **{key: counts[key] for key in ("rows", "kept", "bad")},
    }


def numbers(images: Images, direct: int, touched: Touched | None, kept: float) -> dict[str, Any]:
    """What was found. None stands for what the mode does not have, and for a similarity that nothing has."""
    return {
        "images": images.n,
        "images_near": images.near,
        "highest_similarity": finite(images.highest),
        "histogram": images.bins.tolist(),
        "dropped_direct": direct,
        "dropped_transitive": None if touched is None else touched.rows - direct,
        "components": None if touched is None else touched.components,
        "largest_component": None if touched is None else touched.largest,
        "highest_kept_similarity": finite(kept),
    }


def finite(similarity: float) -> float | None:
    """A similarity as JSON has it."""
    return similarity if np.isfinite(similarity) else None


def statement(known: Mapping[str, Any]) -> str:
    """The sentence that the numbers allow. Raises TaskError when a kept row is near the reference after all."""
    low, highest, name = known["min_similarity"], known["highest_kept_similarity"], known["reference"]
    if highest is not None and highest >= np.float32(low):
        raise TaskError(f"no kept image may be within {low:g} of {name}: one is at {highest:.6g}")
    had = "image had" if known["images_near"] == 1 else "images had"
    looked_at = known["rows"] - known["bad"]
    found = f"{known['images_near']:,} of {known['images']:,} {had} a near copy among {looked_at:,} images"
    found += f" ({low:g} and above)"
    floor = np.floor(1e4 * highest) / 1e4 if highest is not None else 0  # never rounded up to the threshold
    nearest = (
        "no image was kept" if highest is None else f"of {known['kept']:,} kept ones the nearest is at {floor:.4f}"
    )
    return f"{name}: {found}; {nearest} by {known['backbone']['name']}."


def write_certificate(known: Mapping[str, Any], out: Artifact) -> FileInfo:
    """One certificate as a file."""
    location = out.location / certificate_name(known["reference"])
    location.write((json.dumps(known, indent=1) + "\n").encode())
    return describe(location)
