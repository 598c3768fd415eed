from pathlib import Path

import numpy as np
import pytest

from training.handover import close_memory, open_memory, pack, path_of, unpack


def opened():
    return len(list(Path("/proc/self/fd").iterdir()))


def value():
    rng = np.random.default_rng(0)
    return {
        "a": rng.integers(0, 9, (3, 5, 7)),
        "none": np.empty((2, 0, 3)),
        "turned": rng.random((40, 30)).T,
        "cut": np.arange(100, dtype=np.uint8)[::3],
        "odd": np.arange(77, dtype=np.int8),
        "words": ["x", None],
    }


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    assert made["words"] == expected["words"]
    for name in ("a", "none", "turned", "cut", "odd"):
        np.testing.assert_array_equal(made[name], expected[name])
        assert made[name].dtype == expected[name].dtype


@pytest.mark.parametrize("where", ["memory", "no memory", "out of reach"])
def test_what_is_packed_is_unpacked(where):
    memory = None if where == "no memory" else open_memory()
    path = "/proc/self/fd/99999" if where == "out of reach" else path_of(memory)
    parcel = pack(value(), path)
    assert parcel.in_memory == (where == "memory")
    made = unpack(parcel, memory)
    close_memory(memory)
    assert_same(made, value())
    made["a"][:] = 1  # the arrays are the receiver's own
    assert (made["a"] == 1).all()


def test_without_arrays():
    memory = open_memory()
    assert unpack(pack(["x", 1], path_of(memory)), memory) == ["x", 1]
    assert unpack(pack(np.empty(0), path_of(memory)), memory).shape == (0,)
    close_memory(memory)


def test_memory_goes_with_its_last_array():
    before = opened()
    memory = open_memory()
    made = unpack(pack(value(), path_of(memory)), memory)
    close_memory(memory)
    part = made["a"][1:2, :2]
    del made
    assert opened() > before
    np.testing.assert_array_equal(part, value()["a"][1:2, :2])
    del part
    assert opened() == before


def test_arrays_begin_where_a_vector_may():
    memory = open_memory()
    made = unpack(pack(value(), path_of(memory)), memory)
    close_memory(memory)
    assert all(made[name].ctypes.data % 64 == 0 for name in ("a", "turned", "odd"))


def test_a_full_system_is_an_error_and_no_short_array(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        pack(value(), "/dev/full")
