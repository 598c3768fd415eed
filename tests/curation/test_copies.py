import hashlib

import numpy as np
import pyarrow as pa
import pytest

from curation.copies import apply_changes, change_dtype, counted_keys, merge_copies, record_dtype
from curation.pool import key_partition


def key(i):
    return hashlib.sha256(b"%d" % i).hexdigest()


@pytest.mark.parametrize("seed", range(25))
def test_copies_are_merged_as_a_dictionary_would(seed):
    """Over parts and hash partitions in any number: the first of a key stays, with the largest counts."""
    rng = np.random.default_rng(seed)
    n_parts, n_counts, n_partitions = (int(rng.integers(1, n)) for n in (6, 4, 4))
    n_keys = int(rng.integers(1, 40))
    parts = []
    for _ in range(n_parts):
        rows = np.flatnonzero(rng.random(20) < 0.6).astype(np.int32)
        counts = rng.integers(0, 5, (len(rows), n_counts)).astype(np.int32)
        counts[:, 0] = np.maximum(counts.max(axis=1, initial=0), 1)
        parts.append((rows, counts, rng.integers(0, n_keys, len(rows))))
    first, most = {}, {}
    for part, (rows, counts, names) in enumerate(parts):
        for row, count, name in zip(rows.tolist(), counts, names.tolist(), strict=True):
            first.setdefault(name, (part, row))
            most[name] = np.maximum(most.get(name, 0), count)
    expected = {place: most[name].tolist() for name, place in first.items()}

    records = np.concatenate([
        counted_keys(pa.array([key(i) for i in names], pa.string()), part, rows, counts)
        for part, (rows, counts, names) in enumerate(parts)
    ])  # fmt: skip
    assert records.dtype == record_dtype(n_counts)
    records = records[rng.permutation(len(records))]
    to = key_partition(records, n_partitions)
    merged = [merge_copies(records[to == p]) for p in range(n_partitions)]
    changes, of_part = (np.concatenate(arrays) for arrays in zip(*merged, strict=True))
    assert changes.dtype == change_dtype(n_counts) and of_part.dtype == np.int64
    found = {}
    for part, (rows, counts, _) in enumerate(parts):
        before = counts.copy()
        left, new = apply_changes(rows, counts, changes[of_part == part])
        np.testing.assert_array_equal(counts, before)
        found |= {(part, row): count for row, count in zip(left.tolist(), new.tolist(), strict=True)}
    assert found == expected


def test_without_copies_nothing_changes():
    rows, counts = np.array([3, 9], np.int32), np.array([[2], [1]], np.int32)
    records = counted_keys(pa.array([key(0), key(1)]), 0, rows, counts)
    for some in (records, records[:0]):
        changes, part = merge_copies(some)
        assert len(changes) == len(part) == 0
    left, new = apply_changes(rows, counts, changes)
    assert (left.tolist(), new.tolist()) == ([3, 9], [[2], [1]])
