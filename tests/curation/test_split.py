import itertools

import numpy as np
import pytest

from curation.split import cut_pieces, split_shares


def test_shares_follow_the_sums_of_squares():
    shares = split_shares(np.array([1000, 1000, 1000]), np.array([1.0, 2.0, 5.0]), 80)
    assert shares.tolist() == [10, 20, 50]


@pytest.mark.parametrize("seed", range(50))
def test_shares_sum_up_within_their_bounds(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(1, 40))
    sizes = rng.integers(0, 12, m) * rng.integers(0, 2, m)
    squares = np.where(sizes > 1, rng.pareto(1, m) * rng.integers(0, 2, m), 0)
    most = np.where(squares > 0, sizes, sizes > 0)
    for k in (1, m, int(sizes.sum()), int(rng.integers(1, 300))):
        shares = split_shares(sizes, squares, k)
        assert np.all(shares >= (sizes > 0)) and np.all(shares <= most)
        assert shares.sum() == max(np.count_nonzero(sizes), min(k, most.sum()))


@pytest.mark.parametrize("seed", range(30))
def test_no_cluster_could_move_to_one_with_more_squares_a_share(seed):
    """Shares are proportional as far as whole numbers and bounds allow: none is two above what another lacks."""
    rng = np.random.default_rng(seed)
    sizes, squares = rng.integers(5, 60, 12), rng.pareto(1.5, 12) + 0.01
    shares = split_shares(sizes, squares, 100)
    rate = squares / shares
    for i, j in itertools.permutations(range(12), 2):
        if shares[i] > 1 and shares[j] < sizes[j]:
            assert squares[i] / (shares[i] - 1) > squares[j] / (shares[j] + 1) * 0.999, (rate[i], rate[j])


def test_equal_rows_stay_one_cluster():
    assert split_shares(np.array([50, 50]), np.array([0.0, 3.0]), 21).tolist() == [1, 20]


def test_ties_go_to_the_lower_cluster():
    assert split_shares(np.array([9, 9, 9]), np.ones(3), 7).tolist() == [3, 2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_hold_what_they_may_or_one_cluster(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 30, int(rng.integers(1, 60)))
    pieces = cut_pieces(sizes, 40)
    assert pieces[0] == 0 and pieces[-1] == len(sizes) and np.all(np.diff(pieces) > 0)
    for first, last in itertools.pairwise(pieces.tolist()):
        assert sizes[first:last].sum() <= 40
        assert last == len(sizes) or sizes[first : last + 1].sum() > 40  # and no piece could take one more
    assert cut_pieces(np.array([3, 100, 3, 3]), 10).tolist() == [0, 1, 2, 4]
