import numpy as np
import pytest

from curation.checks import check_unit_rows


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_unit_rows_pass_in_every_float(dtype):
    x = np.random.default_rng(0).normal(size=(50, 64))
    check_unit_rows((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype), "x")
    check_unit_rows(np.empty((0, 64), dtype), "x")


@pytest.mark.parametrize("bad, norm", [(np.nan, "nan"), (np.inf, "inf"), (0, "0"), (3, "3"), (1.002, "1.002")])
def test_a_bad_row_is_counted_and_named(bad, norm):
    x = np.eye(5, dtype="f4")
    x[3, 3] = x[4, 4] = bad
    with pytest.raises(ValueError, match=rf"queries must have unit rows: 2 of 5 do not, first row 3 has norm {norm};"):
        check_unit_rows(x, "queries")


def test_tolerance_is_an_argument():
    check_unit_rows(np.full((1, 1), 1.002, "f4"), "x", atol=0.01)


@pytest.mark.parametrize("x", [np.ones(3, "f4"), np.eye(3, dtype="i4")])
def test_other_arrays_are_refused(x):
    with pytest.raises(ValueError, match=r"x must be a float array \(n, d\): got"):
        check_unit_rows(x, "x")
