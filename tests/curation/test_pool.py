import hashlib

import numpy as np
import pyarrow as pa
import pytest

from curation.pool import (
    DUPLICATE_RECORD,
    KEY_RECORD,
    POOL_SCHEMA,
    REJECTED_SCHEMA,
    SCAN_SCHEMA,
    PoolConfig,
    find_duplicates,
    key_partition,
    key_records,
    part_sizes,
)


def random_units(rng, n_rows, n_keys, n_units):
    """Hex keys of the rows of every unit, None where a row was rejected."""
    keys = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(n_keys)]
    units = [[] for _ in range(n_units)]
    for _ in range(n_rows):
        units[rng.integers(n_units)].append(None if rng.random() < 0.1 else keys[rng.integers(n_keys)])
    return units


def duplicates_by_dict(units):
    """(unit, row, first_unit, first_row) of every row whose key an earlier one has."""
    first, found = {}, set()
    for u, keys in enumerate(units):
        for row, key in enumerate(keys):
            if key is not None and first.setdefault(key, (u, row)) != (u, row):
                found.add((u, row, *first[key]))
    return found


def all_records(units):
    pieces = [key_records(pa.array(keys, pa.string()), u)[0] for u, keys in enumerate(units)]
    return np.concatenate(pieces)


def as_set(found, unit):
    assert found.dtype == DUPLICATE_RECORD and unit.dtype == np.int64 and len(found) == len(unit)
    return {
        (int(u), int(f["row"]), int(f["first_unit"]), int(f["first_row"])) for u, f in zip(unit, found, strict=True)
    }


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("n_partitions", [1, 4])
def test_duplicates_match_a_dict_in_any_order_and_number_of_partitions(seed, n_partitions):
    rng = np.random.default_rng(seed)
    n_keys = int(rng.choice([1, 3, 50, 1000]))
    units = random_units(rng, int(rng.integers(0, 300)), n_keys, int(rng.integers(1, 8)))
    records = rng.permutation(all_records(units))
    partition = key_partition(records, n_partitions)
    assert set(partition.tolist()) <= set(range(n_partitions)) and partition.dtype == np.int64
    pieces = [find_duplicates(records[partition == k]) for k in range(n_partitions)]
    found = [as_set(*piece) for piece in pieces]
    assert set().union(*found) == duplicates_by_dict(units)
    assert sum(map(len, found)) == len(duplicates_by_dict(units))


def test_keys_that_share_a_beginning_are_not_duplicates():
    a, b = "00" * 31 + "01", "00" * 31 + "02"
    records, _ = key_records(pa.array([a, b, a, "01" + "00" * 31]), 5)
    found, unit = find_duplicates(records)
    assert as_set(found, unit) == {(5, 2, 5, 0)}


def test_partitions_are_even_and_depend_on_the_key_alone():
    keys = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(4000)]
    records, _ = key_records(pa.array(keys), 0)
    partition = key_partition(records, 7)
    assert np.bincount(partition, minlength=7).min() > 450
    assert partition[3] == int.from_bytes(bytes.fromhex(keys[3])[:8], "little") % 7
    np.testing.assert_array_equal(key_partition(records[::-1], 7), partition[::-1])


@pytest.mark.parametrize("seed", range(10))
def test_key_records_hold_the_rows_that_have_a_key(seed):
    rng = np.random.default_rng(seed)
    [keys] = random_units(rng, int(rng.integers(0, 30)), 9, 1)
    records, rows = key_records(pa.array(keys, pa.string()), 12)
    assert rows.tolist() == [i for i, key in enumerate(keys) if key is not None] == records["row"].tolist()
    assert records.dtype == KEY_RECORD and (records["unit"] == 12).all()
    assert [bytes(key).hex() for key in records["key"]] == [key for key in keys if key is not None]


@pytest.mark.parametrize("seed", range(20))
def test_parts_hold_all_kept_rows_and_never_two_units(seed):
    rng = np.random.default_rng(seed)
    n_kept, part_rows = rng.integers(0, 30, int(rng.integers(0, 10))), int(rng.integers(1, 12))
    first, sizes = part_sizes(n_kept, part_rows)
    oracle = [min(part_rows, n - at) for n in n_kept.tolist() for at in range(0, n, part_rows)]
    assert sizes.tolist() == oracle and sizes.dtype == np.int64
    assert len(first) == len(n_kept) + 1 and first[-1] == len(sizes)
    for i, n in enumerate(n_kept):
        assert sizes[first[i] : first[i + 1]].sum() == n


def test_schemas_share_their_columns():
    assert POOL_SCHEMA.names[0] == "row_id" and {"reason", "detail"} & set(POOL_SCHEMA.names) == set()
    assert all(POOL_SCHEMA.field(name) == SCAN_SCHEMA.field(name) for name in POOL_SCHEMA.names[1:])
    assert set(REJECTED_SCHEMA.names) - set(SCAN_SCHEMA.names) == {"duplicate_of"}
    assert all(REJECTED_SCHEMA.field(name) == SCAN_SCHEMA.field(name) for name in REJECTED_SCHEMA.names[:-1])


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("min_side", 0, "pool.min_side must be at least 1: got 0"),
        ("max_pixels", -1, "pool.max_pixels must be at least 1: got -1"),
        ("part_rows", 0, "pool.part_rows must be at least 1: got 0"),
        ("max_aspect_ratio", 0.5, "pool.max_aspect_ratio must be at least 1: got 0.5"),
        ("max_aspect_ratio", float("nan"), "must be at least 1: got nan"),
        ("max_bad_fraction", 1.5, r"pool.max_bad_fraction must be in \[0, 1\]: got 1.5"),
        ("max_bad_fraction", float("nan"), r"in \[0, 1\]: got nan"),
    ],
)
def test_settings_out_of_range_are_named(field, value, words):
    with pytest.raises(ValueError, match=words):
        PoolConfig(source="x", **{field: value})
