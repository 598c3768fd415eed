import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.shards import (
    INDEX_SCHEMA,
    ShardsConfig,
    mixed_order,
    plan_groups,
    shard_bounds,
)


@pytest.mark.parametrize("seed", range(30))
def test_groups_cover_every_part_with_rows_once(seed):
    rng = np.random.default_rng(seed)
    n_selected = (rng.integers(0, 50, int(rng.integers(0, 40))) * (rng.random() < 0.9)).tolist()
    mix_rows = int(rng.integers(1, 200))
    groups = plan_groups(n_selected, mix_rows, seed)
    assert sorted(part for group in groups for part in group) == [i for i, n in enumerate(n_selected) if n]
    rows = [[n_selected[part] for part in group] for group in groups]
    assert all(sum(group) >= mix_rows for group in rows[:-1])
    assert all(sum(group[:-1]) < mix_rows for group in rows)  # no larger than it needs to be
    assert groups == plan_groups(n_selected, mix_rows, seed)


def test_groups_are_a_function_of_the_seed():
    assert plan_groups([5] * 40, 20, 0) != plan_groups([5] * 40, 20, 1)
    order = [part for group in plan_groups([5] * 40, 20, 0) for part in group]
    assert order != sorted(order) and plan_groups([], 5, 0) == plan_groups([0, 0], 5, 0) == []


@pytest.mark.parametrize("n_rows", [0, 1, 2, 9, 10, 11, 99, 100, 101, 12_345])
@pytest.mark.parametrize("shard_rows", [1, 3, 10, 1000])
def test_shards_are_few_and_even(n_rows, shard_rows):
    bounds = shard_bounds(n_rows, shard_rows)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == n_rows and bounds.dtype == np.int64
    assert len(sizes) == -(-n_rows // shard_rows)
    if n_rows:
        assert sizes.min() >= 1 and sizes.max() <= min(sizes.min() + 1, shard_rows)


def test_orders_are_permutations_that_differ_by_seed_and_group():
    orders = [mixed_order(500, seed, group) for seed, group in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(500)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], mixed_order(500, 0, 0))
    assert len(mixed_order(0, 0, 0)) == 0


def test_an_index_has_no_holes_but_for_labels(tmp_path):
    entry = {"key": "k", "row_id": 1, "offset": 512, "length": 9, "format": "png", "label": None, "width": 1,
             "height": 1, "count": 1}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([entry], INDEX_SCHEMA), tmp_path / "ok")
    for name in set(entry) - {"label"}:
        with pytest.raises(pa.ArrowInvalid, match=f"'{name}'"):
            pq.write_table(pa.Table.from_pylist([{**entry, name: None}], INDEX_SCHEMA), tmp_path / "x")


@pytest.mark.parametrize("field", ["shard_rows", "mix_rows"])
def test_settings_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=f"shards.{field} must be at least 1: got 0"):
        ShardsConfig(**{field: 0})
