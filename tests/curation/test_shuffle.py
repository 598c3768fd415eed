import numpy as np
import pytest

from curation.shuffle import read_shuffle, write_groups, write_shuffle

RECORD = np.dtype([("key", "V3"), ("row", "<i4")])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [RECORD, np.dtype("<f8")])
def test_every_record_arrives_once_in_order(place, seed, dtype):
    rng = np.random.default_rng(seed)
    n, n_destinations = int(rng.integers(0, 60)), int(rng.integers(1, 9))
    records = np.frombuffer(rng.bytes(n * dtype.itemsize), dtype)
    destination = rng.integers(0, n_destinations, n)
    write_shuffle(place / "x", records, destination, n_destinations)
    for k in range(n_destinations):
        found = read_shuffle(place / "x", dtype, k)
        assert found.dtype == dtype
        assert found.tobytes() == b"".join(records[i].tobytes() for i in range(n) if destination[i] == k)
    assert len(place.list()) == 1


def test_the_layout_is_the_documented_one(tmp_path, place):
    write_shuffle(place / "x", np.array([10, 20, 30], "<i2"), np.array([2, 0, 2]), 3)
    head = np.array([3, 0, 1, 1, 3], "<i8").tobytes()
    assert (place / "x").read() == head + np.array([20, 10, 30], "<i2").tobytes()


@pytest.mark.parametrize("destination, words", [([0, 3], r"in \[0, 3\): got 0..3"), ([-1, 0], r"got -1..0")])
def test_destinations_out_of_range_are_named(place, destination, words):
    with pytest.raises(ValueError, match=words):
        write_shuffle(place / "x", np.arange(2), np.array(destination), 3)
    write_shuffle(place / "x", np.arange(2), np.array([0, 1]), 3)
    with pytest.raises(ValueError, match=r"x must have destination 3: it has 3"):
        read_shuffle(place / "x", np.dtype("i8"), 3)
    with pytest.raises(ValueError, match="every record must have a destination: got 2 and 1"):
        write_shuffle(place / "x", np.arange(2), np.array([0]), 3)


def test_groups_make_the_same_file_as_records_with_destinations(place):
    groups = [np.arange(n, dtype="<i8") for n in (2, 0, 3)]
    write_groups(place / "x", iter(groups), 3)
    write_shuffle(place / "y", np.concatenate(groups), np.repeat(np.arange(3), [2, 0, 3]), 3)
    assert (place / "x").read() == (place / "y").read()
    with pytest.raises(ValueError, match="every destination must have a group: got 3 for 4"):
        write_groups(place / "z", iter(groups), 4)
    assert not (place / "z").exists()
