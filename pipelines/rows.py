"""Where rows of a pool stand in its parts, and their images as the pool saw them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from curation.artifact import Artifact
from curation.embeddings import embedding_parts
from curation.selection import rows_among
from curation.sources import ImageChanged
from pipelines.errors import UserError


def place_in_parts(position: int, pool: Artifact) -> tuple[int, int]:
    """The part that holds a row of a pool, and where the row stands in it."""
    part = int(np.searchsorted(pool.starts, position, side="right")) - 1
    return part, position - int(pool.starts[part])


def rows_covered(rows: np.ndarray, covered: np.ndarray, source: Artifact, selection: Artifact) -> np.ndarray:
    """int64 (n,): where selected rows of a part stand among the rows that ``source`` has of it, ascending.

    Raises UserError, with both artifacts, when one is missing: what was embedded is not what was selected.
    """
    try:
        return rows_among(rows, covered, f"the {source.kind} artifact {source.location}")
    except ValueError as e:
        raise UserError(
            f"{e}; the selection is {selection.location}",
            "embed with this selection or a wider one, or select from what was embedded",
        ) from e


def by_part(row_ids: np.ndarray, pool: Artifact) -> Iterator[tuple[int, np.ndarray]]:
    """The parts that hold some rows of a pool, ascending int64 (n,), each with where its rows stand in it."""
    part = np.searchsorted(pool.starts, row_ids, side="right") - 1
    for index in np.unique(part).tolist():
        yield index, row_ids[part == index] - pool.starts[index]


def vectors_of_part(item: tuple[int, np.ndarray], embeddings: Artifact) -> np.ndarray:
    """float64 (n, d): the vectors of some rows of one part, which the embeddings must cover."""
    index, rows = item
    covered, x = embedding_parts(embeddings)[index].read()
    return x[np.searchsorted(covered, rows)].astype(np.float64)


@contextmanager
def unchanged_images() -> Iterator[None]:
    """A block that reads images of a pool. Raises UserError, with the file, when one has changed since or is gone."""
    hint = (
        "put the old file back, or make the pool anew: a run of the recipe does so by itself when a file has another "
        "size or time"
    )
    try:
        yield
    except ImageChanged as e:
        raise UserError(str(e), hint) from e
    except FileNotFoundError as e:
        raise UserError(f"{e.filename or e} must hold the image that the pool saw: it is gone", hint) from e
