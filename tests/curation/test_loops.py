import numpy as np
import pytest

from curation import loops


@pytest.mark.parametrize("width", [0, 1, 3, 4, 7, 8, 9, 64, 130])
def test_dot_and_distance_are_exact_symmetric_and_the_same_everywhere(width):
    rng = np.random.default_rng(width)
    a, b = rng.normal(size=(2, width)).astype("f4")
    x = np.zeros((3, 2 * width + 1), "f4")  # the same numbers elsewhere in memory
    x[1, width + 1 :], x[2, 1 : width + 1] = a, b
    wide = a.astype("f8"), b.astype("f8")
    assert loops.dot(a, b) == pytest.approx(wide[0] @ wide[1], rel=1e-13, abs=1e-13)
    assert loops.sq_distance(a, b) == pytest.approx(((wide[0] - wide[1]) ** 2).sum(), rel=1e-13)
    assert loops.dot(a, b) == loops.dot(b, a) == loops.dot(x[1, width + 1 :], x[2, 1 : width + 1])
    assert loops.sq_distance(a, b) == loops.sq_distance(b, a)


def test_a_product_too_fine_for_float32_counts():
    a, b = np.array([1, 2**-20], "f4"), np.array([1, 2**-20], "f4")
    assert loops.dot(a, b) == 1 + 2.0**-40
