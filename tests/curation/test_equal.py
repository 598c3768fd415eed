import numpy as np
import pytest

from curation import loops_bits
from curation.equal import digest_partition, digest_records, find_equal


@pytest.mark.parametrize("dtype", ["f2", "f4"])
@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_of_equal_rows_stands_for_them(dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 5)).astype(dtype)[rng.integers(0, 40, 100)]
    ids = rng.permutation(1000)[:100].astype(np.int64)
    records = digest_records(x, ids)
    found = {(int(e["row_id"]), int(e["other"]), bool(e["copy"])) for e in find_equal(records)}
    expected = set()
    for group in {row.tobytes() for row in x}:
        members = sorted(int(i) for i, row in zip(ids, x, strict=True) if row.tobytes() == group)
        expected |= {(member, members[0], True) for member in members[1:]}
        expected |= {(members[0], members[1], False)} if len(members) > 1 else set()
    assert found == expected != set()
    apart = [find_equal(records[digest_partition(records, 7) == p]) for p in range(7)]
    assert {(int(e["row_id"]), int(e["other"]), bool(e["copy"])) for some in apart for e in some} == expected


def test_digests_differ_where_any_value_does():
    x = np.zeros((2 * 64 + 1, 64), np.float16)
    for i in range(64):
        x[2 * i + 1, i], x[2 * i + 2, i] = 1, np.float16(6e-8)
    digests = loops_bits.row_digests(x.view("<u2"))
    assert len(np.unique(digests, axis=0)) == len(x)
    assert len(np.unique(digests[:, 0])) == len(np.unique(digests[:, 1])) == len(x)
    swapped = np.array([[1, 2, 3], [2, 1, 3], [3, 2, 1]], np.float16)
    assert len(np.unique(loops_bits.row_digests(swapped.view("<u2")), axis=0)) == 3
