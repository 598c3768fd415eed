import numpy as np
import pyarrow as pa
import pytest

from curation.artifact import Artifact, describe, finish, part_name, read_table, write_table
from curation.selection import read_selection, rows_among, selected_rows, write_selection
from curation.store import Location


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("with_count", [False, True])
def test_the_kept_rows_come_back_with_their_counts(tmp_path, seed, with_count):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 30))
    rows = np.sort(rng.choice(1000, n, replace=False))
    kept, count = rng.random(n) < rng.random(), rng.integers(0, 5, n).astype("i4")
    why = {"count": count, "similarity": rng.random(n)} if with_count else {}
    at = Location(str(tmp_path / "x.parquet"))
    info = write_selection(at, rows, kept, **why)
    assert info.counts == {"rows": n, "kept": kept.sum(), "dropped": n - kept.sum()} and describe(at) == info
    found = read_selection(at)
    assert found.rows.dtype == found.counts.dtype == np.int32
    oracle = [(r, c if with_count else 1) for r, k, c in zip(rows, kept, count, strict=True) if k]
    assert list(zip(found.rows.tolist(), found.counts.tolist(), strict=True)) == oracle
    assert read_table(at).column_names == ["row", "kept", *why]


@pytest.mark.parametrize("dtype", ["i4", "i8", "u4"])
@pytest.mark.parametrize("rows", [[1, 1], [2, 1], [0, 5, 4]])
def test_rows_must_ascend(tmp_path, rows, dtype):
    with pytest.raises(ValueError, match=r"x.parquet must have strictly ascending rows"):
        write_selection(Location(str(tmp_path / "x.parquet")), np.array(rows, dtype), np.ones(len(rows), bool))
    assert not list(tmp_path.iterdir())


def test_columns_of_other_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="length"):
        write_selection(Location(str(tmp_path / "x.parquet")), np.arange(3), np.ones(2, bool))


def test_without_a_selection_all_rows_of_a_part_go_on(place):
    pool = finish(
        place, [write_table(place / part_name(i), pa.table({"x": range(n)})) for i, n in enumerate((2, 0))], {}
    )
    assert selected_rows(pool, None, 0).rows.tolist() == [0, 1]
    assert selected_rows(pool, None, 0).counts.tolist() == [1, 1]
    assert selected_rows(pool, None, 1).rows.dtype == np.int32 and len(selected_rows(pool, None, 1).rows) == 0
    chosen = Artifact(place / "chosen")
    write_selection(chosen.part(1), np.array([4, 9]), np.array([False, True]))
    assert selected_rows(pool, chosen, 1).rows.tolist() == [9]


@pytest.mark.parametrize("seed", range(20))
def test_rows_among_is_a_lookup(seed):
    rng = np.random.default_rng(seed)
    covered = np.sort(rng.choice(100, int(rng.integers(1, 40)), replace=False))
    rows = rng.choice(covered, int(rng.integers(0, 40)))
    np.testing.assert_array_equal(rows_among(rows, covered, "x"), [covered.tolist().index(row) for row in rows])


@pytest.mark.parametrize(
    "rows, covered, words",
    [
        ([1, 4, 5], [1, 5], "labels must cover every row that is asked for: 1 of 3 are missing, first row 4"),
        ([7, 8], [1, 5], "2 of 2 are missing, first row 7"),
        ([0], [1, 5], "1 of 1 are missing, first row 0"),
        ([0, 3], [], "2 of 2 are missing, first row 0"),
    ],
)
def test_rows_that_are_not_covered_are_named(rows, covered, words):
    with pytest.raises(ValueError, match=words):
        rows_among(np.array(rows), np.array(covered, int), "labels")
    assert len(rows_among(np.zeros(0, int), np.array(covered, int), "labels")) == 0


def test_bad_rows_are_counted_and_not_listed(tmp_path):
    info = write_selection(
        Location(str(tmp_path / "p.parquet")), np.arange(4), np.arange(4) < 1, {"bad": 2, "drawn": 3}
    )
    assert info.rows == 4
    assert info.counts == {"rows": 6, "kept": 1, "dropped": 3, "bad": 2, "drawn": 3}
