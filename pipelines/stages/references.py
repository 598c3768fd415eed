"""What both modes of ``decontaminate`` do first: look for the nearest images of rows, and the nearest rows of images.

One pass over all pairs of a row of the pool and a reference image gives both. It leaves scratch files, part by part:

    beside/<part>    of each reference the similarity of its nearest image to every row looked at: float32 (m, n)
    seen/<part>      of every reference image its nearest row of the part: SEEN, reference by reference; empty when no
                     row of the part was looked at
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, pool_of
from curation.decontaminate import DecontaminateConfig, merge_both_ways
from curation.embeddings import EmbeddingsPart, covered_rows
from curation.neighbors import Neighbors
from curation.selection import read_selection
from curation.store import Location
from pipelines.rows import rows_covered
from pipelines.stage import SCRATCH
from pipelines.stages.connect import raw_name
from pipelines.stages.neighbors import Base, based_parts

# The nearest row of a part, of one reference image.
SEEN = np.dtype([("row", "<i4"), ("similarity", "<f4")])


class Reference(NamedTuple):
    """A pool of images to stay away from."""

    name: str
    first: int  # position of its first image, where the images of all references are counted one after the other
    parts: Sequence[tuple[int, EmbeddingsPart]]  # with the positions of their pool parts


class Job(NamedTuple):
    """What every task needs to know."""

    config: DecontaminateConfig
    embeddings: Artifact
    edges: Artifact | None  # of a neighbors step
    before: Artifact | None  # the selection
    out: Location

    def aside(self, folder: str, name: str) -> Location:
        """A scratch file."""
        return self.out / SCRATCH / folder / name


class Part(NamedTuple):
    """A part of the pool on its way through the hops."""

    number: int
    start: int  # position of its first row in the pool
    vectors: EmbeddingsPart
    hops: tuple[int, ...] = ()  # those that reached a row of it
    bad: int = 0  # selected rows that were not decoded


class Nearest(NamedTuple):
    """The nearest image of all references, of each row; ties go to the first reference, then to the lowest image."""

    near_row: np.ndarray  # int64 (n,), position in the pool of that reference
    similarity: np.ndarray  # float32 (n,)
    reference: np.ndarray  # int32 (n,), index of that reference

    def columns(self) -> dict[str, pa.Array]:
        """What a part says of it."""
        return {
            "near_row": pa.array(self.near_row),
            "similarity": pa.array(self.similarity),
            "reference": pa.array(self.reference, pa.int32()),
        }


def references_of(names: Sequence[str], found: Sequence[Artifact]) -> tuple[list[Reference], int]:
    """The references, and how many images their pools have together."""
    references, first = list[Reference](), 0
    for name, artifact in zip(names, found, strict=True):
        references.append(Reference(name, first, based_parts(artifact)))
        first += int(pool_of(artifact).starts[-1])
    return references, first


def images_of(references: Sequence[Reference]) -> Base:
    """The images of all references as one base, their ids counted one after the other."""
    return [(reference.first + start, vectors) for reference in references for start, vectors in reference.parts]


def looked_at(part: Part, job: Job) -> tuple[np.ndarray, np.ndarray, Counts]:
    """Rows int32 (n,), their vectors float32 (n, d), and how many selected rows were not decoded."""
    rows, x = part.vectors.read()
    if job.before is None:
        return rows, x, {}
    bad: Counts = {}
    chosen = read_selection(job.before.part(part.number)).rows
    undecoded = np.isin(chosen, covered_rows(job.embeddings.part(part.number, "rejected")))
    if undecoded.any():
        bad, chosen = {"bad": int(undecoded.sum())}, chosen[~undecoded]
    return chosen, x[rows_covered(chosen, rows, job.embeddings, job.before)], bad


def nearest_images(part: Part, job: Job, rows: np.ndarray, x: np.ndarray, references: Sequence[Reference]) -> Nearest:
    """The nearest reference image of every row (n,), x (n, d), of a part; leaves its files of ``beside`` and ``seen``.

    Holds one part of a reference at a time, and beside it 12 bytes a row and reference and 8 bytes a reference image.
    """
    ids, best, seen = rows.astype(np.int64), list[Neighbors](), [np.zeros(0, SEEN)]
    for reference in references:
        of_rows = Neighbors.none_yet(len(rows), 1)
        for start, vectors in reference.parts if len(rows) else ():
            image_rows, y = vectors.read()
            of_images = Neighbors.none_yet(len(y), 1)
            of_rows, of_images = merge_both_ways(x, y, ids, image_rows + np.int64(start), of_rows, of_images)
            seen.append(np.empty(len(y), SEEN))
            seen[-1]["row"], seen[-1]["similarity"] = of_images.row_ids[:, 0], of_images.similarity[:, 0]
        best.append(of_rows)
    similarity = np.stack([found.similarity[:, 0] for found in best])
    job.aside("seen", raw_name(part.number)).write(np.concatenate(seen).tobytes())
    job.aside("beside", raw_name(part.number)).write(similarity.tobytes())
    which = similarity.argmax(axis=0)  # of equals the first
    at = np.arange(len(rows))
    near_row = np.stack([found.row_ids[:, 0] for found in best])[which, at]
    return Nearest(near_row, similarity[which, at], which.astype(np.int32))


def read_seen(part: Part, job: Job) -> np.ndarray:
    """SEEN (m,) of all reference images, or (0,) when no row of the part was looked at."""
    return np.frombuffer(job.aside("seen", raw_name(part.number)).read(), SEEN)


def read_beside(part: Part, job: Job) -> np.ndarray:
    """float32 (references, n): the similarity of every row looked at to the nearest image of each reference."""
    values = np.frombuffer(job.aside("beside", raw_name(part.number)).read(), np.float32)
    return values.reshape(len(job.config.references), -1)
