import pickle

import numpy as np
import pytest
from blobs import cut, with_weights

from curation.rows import BLOCK_ROWS, ArrayRows, SubsetRows, full_blocks, weights_of
from curation.seed_sample import Draw, draw_rows


@pytest.mark.parametrize("n_rows", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
def test_blocks_are_cut_at_fixed_offsets(n_rows):
    x = np.arange(2 * n_rows, dtype="f8").reshape(n_rows, 2)
    for part, rows in [
        (ArrayRows(x), np.arange(n_rows)),
        (SubsetRows(ArrayRows(x), np.arange(1, n_rows, 3)), np.arange(1, n_rows, 3)),
        (SubsetRows(ArrayRows(x), np.arange(0)), np.arange(0)),
    ]:
        blocks = list(pickle.loads(pickle.dumps(part)).blocks())
        assert part.n_rows == len(rows) == sum(map(len, blocks))
        assert all(len(b) == BLOCK_ROWS for b in blocks[:-1]) and all(b.dtype == np.float32 and len(b) for b in blocks)
        np.testing.assert_array_equal(np.concatenate([np.empty((0, 2)), *blocks]), x[rows])


def test_ragged_pieces_become_full_blocks():
    pieces = [np.ones((n, 1), "f4") for n in (0, 4000, 0, 4096, 1, 95)]
    assert [len(b) for b in full_blocks(pieces)] == [4096, 4096]


def test_weights_travel_with_their_rows():
    weights = np.random.default_rng(0).integers(0, 2**40, 9000)
    x = weights[:, None].astype("f4")
    parts = with_weights(cut(x, [0, 5000]), weights)
    np.testing.assert_array_equal(np.concatenate([weights_of(part) for part in parts]), weights)
    rows = np.arange(3, 4000, 7)
    picked = pickle.loads(pickle.dumps(SubsetRows(SubsetRows(parts[2], np.arange(4000)), rows)))
    np.testing.assert_array_equal(weights_of(picked), weights[5000 + rows])
    assert weights_of(ArrayRows(x)) is None and weights_of(SubsetRows(ArrayRows(x), rows)) is None
    [drawn] = draw_rows(Draw(parts[1], 700, (3,)))
    np.testing.assert_array_equal(np.concatenate(drawn.blocks)[:, 0], drawn.weights.astype("f4"))
