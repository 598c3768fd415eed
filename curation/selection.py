"""Selections: which rows of a pool go on, how often, and why the others do not.

A selection has the parts of its pool. A part lists the rows that the step looked at, in ascending order, with
``kept``; ``count`` (how often an image is to be seen) and the columns that explain the decision are optional.
Every step that decides about images writes this form, so every such step can be the input of the next.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, read_table, write_table
from curation.store import Location


class Selected(NamedTuple):
    """The kept rows of one part."""

    rows: np.ndarray  # int32 (n,), ascending, within the part
    counts: np.ndarray  # int32 (n,), at least 1


def write_selection(
    location: Location, rows: np.ndarray, kept: np.ndarray, also: Counts | None = None, **why: np.ndarray | pa.Array
) -> FileInfo:
    """Write one part. ``rows`` int (n,) strictly ascending, ``kept`` bool (n,), ``why`` further columns (n,).

    ``also`` are further counts; rows that were ``bad`` are not among ``rows``, but are counted as looked at. Raises
    ValueError when rows are not ascending: a join by ``searchsorted`` would go wrong silently.
    """
    if not (rows[1:] > rows[:-1]).all():
        raise ValueError(f"{location.name} must have strictly ascending rows")
    table = pa.table({"row": pa.array(rows, pa.int32()), "kept": pa.array(kept, pa.bool_()), **why})
    n_kept = int(kept.sum())
    also = also or {}
    n_seen = len(rows) + also.get("bad", 0)
    return write_table(location, table, {"rows": n_seen, "kept": n_kept, "dropped": len(rows) - n_kept, **also})


def read_selection(location: Location) -> Selected:
    """The kept rows of one part of a selection."""
    table = read_table(location)
    kept = table["kept"].to_numpy()
    rows = table["row"].to_numpy()[kept]
    counts = table["count"].to_numpy()[kept] if "count" in table.column_names else np.ones(len(rows), np.int32)
    return Selected(rows, counts)


def carried_count(before: Artifact | None, part: int, rows: np.ndarray, kept: np.ndarray) -> dict[str, pa.Array]:
    """The column ``count`` of a selection made from another: that of the one before, 0 where a row is not kept.

    ``rows`` int (n,) ascending, all kept by ``before``; ``kept`` bool (n,). Returns int32 (n,) by name, or nothing
    when there is no selection before or it has no counts. Reads one part.
    """
    if before is None or "count" not in (table := read_table(before.part(part))).column_names:
        return {}
    at = rows_among(rows, table["row"].to_numpy(), "the selection before")
    return {"count": pa.array(np.where(kept, table["count"].to_numpy()[at], 0).astype(np.int32))}


def selected_rows(pool: Artifact, selection: Artifact | None, part: int) -> Selected:
    """The kept rows of a part; all of its rows without a selection."""
    if selection is not None:
        return read_selection(selection.part(part))
    n_rows = pool.parts[part].rows
    return Selected(np.arange(n_rows, dtype=np.int32), np.ones(n_rows, np.int32))


def rows_among(rows: np.ndarray, covered: np.ndarray, name: str) -> np.ndarray:
    """int64 (n,): where each of ``rows`` stands in the ascending ``covered``. Raises ValueError if one is missing."""
    at = np.searchsorted(covered, rows)
    missing = covered[np.minimum(at, len(covered) - 1)] != rows if len(covered) else np.ones(len(rows), bool)
    if missing.any():
        raise ValueError(
            f"{name} must cover every row that is asked for: {missing.sum()} of {len(rows)} are missing, "
            f"first row {rows[missing][0]}"
        )
    return at
