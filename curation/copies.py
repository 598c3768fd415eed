"""Copies across the members of a union: rows with the same bytes, of which one goes on.

A pool has no two rows with one key, but the members of a union may have. Of the selected rows with one key the first
(lowest row id) stays, and is seen as often as the copy that is seen most often, in every component of a mix.
"""

import numpy as np
import pyarrow as pa

from curation.pool import KEY_RECORD, find_duplicates, key_records


def record_dtype(n_counts: int) -> np.dtype:
    """A selected row on its way to the hash partition of its key: KEY_RECORD (its unit is the part), and its counts."""
    return np.dtype([*KEY_RECORD.descr, ("counts", "<i4", (n_counts,))])


def change_dtype(n_counts: int) -> np.dtype:
    """What becomes of a selected row of a part that has copies: new counts, all 0 when it is dropped."""
    return np.dtype([("row", "<i4"), ("counts", "<i4", (n_counts,))])


def counted_keys(keys: pa.Array, part: int, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The records of a part's selected rows. keys: hex sha256 (n,); rows: int (n,); counts: int32 (n, n_counts)."""
    plain, at = key_records(keys, part)
    records = np.zeros(len(plain), record_dtype(counts.shape[1]))
    records["key"], records["unit"], records["row"], records["counts"] = plain["key"], part, rows[at], counts[at]
    return records


def merge_copies(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of the rows that share a key, among the records of one hash partition in any order.

    Returns (changes (m,) of ``change_dtype``, their part int64 (m,)). O(n log n), about four times the records.
    """
    found, part = find_duplicates(records)
    place = _place(records["unit"], records["row"])
    order = np.argsort(place)
    copy = order[np.searchsorted(place, _place(part, found["row"]), sorter=order)]
    first = order[np.searchsorted(place, _place(found["first_unit"], found["first_row"]), sorter=order)]
    by_first = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[by_first], prepend=-1))
    kept = first[by_first][starts]
    changes = np.zeros(len(copy) + len(kept), change_dtype(records["counts"].shape[1]))
    changes["row"] = records["row"][np.concatenate([copy, kept])]
    if len(kept):
        most = np.maximum.reduceat(records["counts"][copy[by_first]], starts, axis=0)
        changes["counts"][len(copy) :] = np.maximum(records["counts"][kept], most)
    return changes, records["unit"][np.concatenate([copy, kept])].astype(np.int64)


def apply_changes(rows: np.ndarray, counts: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a part that stay, and their counts. rows (n,) ascending; counts (n, n_counts), the first above 0."""
    counts = counts.copy()
    counts[np.searchsorted(rows, changes["row"])] = changes["counts"]
    stays = counts[:, 0] > 0
    return rows[stays], counts[stays]


def _place(part: np.ndarray, row: np.ndarray) -> np.ndarray:
    """int64: one number for part and row, in the order of row ids."""
    return (part.astype(np.int64) << 32) | row.astype(np.int64)
