"""Rows of embeddings that are equal, byte for byte: the lowest row id stands for the others.

More equal rows than a row has neighbours would fill its list with one another, and by rank alone no list would lead
from the first of them to the last.
"""

import numpy as np

ROWS_PER_PARTITION = 1 << 22  # rows of one hash partition: 24 bytes each, so a task holds some 500 MB

DIGEST = np.dtype([("digest", "<u8", (2,)), ("row_id", "<i8")])
# A row that others are equal to: ``other`` is the lowest of them, or of its copies for the lowest itself.
EQUAL = np.dtype([("row_id", "<i8"), ("other", "<i8"), ("copy", "?")])


def digest_records(x: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """DIGEST (n,) of rows (n, d) as they are stored, float16 or float32. Holds 24 bytes a row."""
    from curation import loops_bits

    records = np.empty(len(x), DIGEST)
    records["digest"], records["row_id"] = loops_bits.row_digests(np.ascontiguousarray(x).view("<u2")), row_ids
    return records


def digest_partition(records: np.ndarray, n_partitions: int) -> np.ndarray:
    """int64 (n,): the hash partition of each record."""
    return (records["digest"][:, 0] % np.uint64(n_partitions)).astype(np.int64)


def find_equal(records: np.ndarray) -> np.ndarray:
    """EQUAL (m,) of the rows among DIGEST (n,), in any order, that have equals, ascending by row id.

    ``copy`` is true of all but the lowest row of a group. O(n log n), about four times the records in memory.
    """
    order = np.lexsort((records["row_id"], *records["digest"].T))
    row_ids, digests = records["row_id"][order], records["digest"][order]
    new = np.ones(len(order) + 1, bool)
    new[1:-1] = (digests[1:] != digests[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(new[:-1], np.arange(len(order)), 0))
    leads, copies = np.flatnonzero(new[:-1] & ~new[1:]), np.flatnonzero(~new[:-1])
    found = np.empty(len(leads) + len(copies), EQUAL)
    found["row_id"] = row_ids[np.concatenate([leads, copies])]
    found["other"] = row_ids[np.concatenate([leads + 1, first[copies]])]
    found["copy"] = np.arange(len(found)) >= len(leads)
    return found[np.argsort(found["row_id"], kind="stable")]
