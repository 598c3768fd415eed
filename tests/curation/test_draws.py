import itertools

import numpy as np
import pytest

from curation import draws
from curation.draws import DRAW_KEY, Block, draw_capped, draw_key, draw_rows
from curation.sampling import leaf_quotas, split_mix


def some_rows(rng, n=400, k=30):
    """Skewed labels with empty clusters, distances with many ties, sizes."""
    labels = (k * rng.random(n) ** 2.5).astype("i4")
    return labels, rng.integers(0, 6, n).astype("f4"), np.bincount(labels, minlength=k)


def cut(labels, distance, heights):
    """Blocks of the given heights, and one of what is left; empty ones too."""
    ends = [0, *np.cumsum(heights).tolist(), len(labels)]
    return [Block(labels[a:b], distance[a:b]) for a, b in itertools.pairwise(ends)]


def drawn_by_hand(labels, sizes, quotas, seed, level, tickets):
    """Selection sampling of one cluster after the other, from its definition: a ticket is drawn with the probability
    need / left, by a hash of the key of its cluster and what is left."""
    counts = np.zeros(len(labels), int)
    for cluster in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == cluster)
        whole, need = divmod(int(quotas[cluster]), len(rows)) if tickets == 1 else (0, int(quotas[cluster]))
        counts[rows] = whole
        own = split_mix(draw_key(seed, level, DRAW_KEY) + np.array([cluster], np.uint64))
        left = np.arange(len(rows) * tickets, 0, -1)
        luck = (split_mix(own + left.astype(np.uint64)) >> np.uint64(11)).astype(float) * 2.0**-53
        for row, u, remaining in zip(np.repeat(rows, tickets), luck, left.tolist(), strict=True):
            if u * remaining < need:
                counts[row], need = counts[row] + 1, need - 1
        assert need == 0
    return counts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("replace", [False, True])
def test_random_draws_are_selection_sampling_in_any_blocks(seed, replace):
    rng = np.random.default_rng(seed)
    labels, distance, sizes = some_rows(rng)
    copies = int(rng.integers(1, 5))
    quotas = rng.binomial(sizes * copies, 0.4)
    heights = rng.multinomial(200, np.full(6, 1 / 6)) * (rng.random(6) < 0.7)
    found = []
    for blocks in ([Block(labels)], cut(labels, distance, heights)):
        told = list(draw_rows(lambda: blocks, sizes, quotas, seed, level=2, max_copies=copies, replace=replace))  # noqa: B023
        assert [len(counts) for counts in told] == [len(block.labels) for block in blocks]
        found.append(np.concatenate(told))
    expected = drawn_by_hand(labels, sizes, quotas, seed, 2, copies if replace else 1)
    for counts in found:
        assert counts.dtype == np.uint8
        np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(np.bincount(labels, found[0], minlength=len(sizes)), quotas)
    assert found[0].max() <= copies


@pytest.mark.parametrize("seed", range(20))
def test_the_closest_are_the_first_by_distance_and_row(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    labels, distance, sizes = some_rows(rng)
    quotas = rng.binomial(sizes * 3, 0.5)
    expected = np.zeros(len(labels), int)
    for cluster in np.unique(labels):
        rows = np.flatnonzero(labels == cluster)
        whole, rest = divmod(int(quotas[cluster]), len(rows))
        expected[rows] = whole
        expected[rows[np.lexsort((rows, distance[rows]))[:rest]]] += 1
    for range_rows in (1 << 29, 60, 1):  # gathered at once, a few clusters at a time, one at a time
        monkeypatch.setattr(draws, "RANGE_ROWS", range_rows)
        blocks = cut(labels, distance, [100, 0, 33])
        found = list(draw_rows(lambda: blocks, sizes, quotas, 0, pick="closest", max_copies=3))  # noqa: B023
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_a_random_cluster_is_uniform():
    """Every subset of a cluster as often as any other: 3 of 7 rows, in 20,000 clusters and then by as many seeds."""
    n = 20_000
    labels = np.tile(np.arange(n, dtype="i4"), 7)
    [counts] = draw_rows(lambda: [Block(labels)], np.full(n, 7), np.full(n, 3), 5)
    by_seed = [
        next(draw_rows(lambda: [Block(np.zeros(7, "i4"))], np.array([7]), np.array([3]), seed)) for seed in range(n)
    ]
    for drawn in (counts.reshape(7, n).T, np.array(by_seed)):
        subset = drawn @ (1 << np.arange(7))
        _, times = np.unique(subset, return_counts=True)
        assert len(times) == 35
        chi2 = ((times - n / 35) ** 2 / (n / 35)).sum()
        assert 10 < chi2 < 75  # 34 degrees of freedom: 1e-4 on either side


def test_with_replacement_a_row_is_drawn_as_often_as_a_ticket_of_many():
    """With many copies counts are multinomial: 4 draws from 5 rows."""
    n, copies = 4000, 500
    labels = np.tile(np.arange(n, dtype="i4"), 5)
    drawn = draw_rows(lambda: [Block(labels)], np.full(n, 5), np.full(n, 4), 1, max_copies=copies, replace=True)
    counts = next(drawn)
    assert counts.dtype == np.uint16
    for k, expected in enumerate([0.4096, 0.4096, 0.1536, 0.0256, 0.0016]):
        share = (counts == k).mean()
        assert abs(share - expected) < 5 * np.sqrt(expected / (5 * n)) + 1 / copies


def test_draws_are_keyed_by_seed_level_and_cluster():
    labels = np.repeat(np.arange(2, dtype="i4"), 50)
    sizes, quotas = np.array([50, 50]), np.array([20, 20])
    first = next(draw_rows(lambda: [Block(labels)], sizes, quotas, 1)).reshape(2, 50)
    seed = next(draw_rows(lambda: [Block(labels)], sizes, quotas, 2)).reshape(2, 50)
    level = next(draw_rows(lambda: [Block(labels)], sizes, quotas, 1, level=1)).reshape(2, 50)
    drawn = [tuple(row) for row in (*first, *seed, *level)]
    assert len(set(drawn)) == 6
    mixed = np.arange(150) % 3  # cluster 1 among others draws the same of its rows
    among = next(draw_rows(lambda: [Block(mixed.astype("i4"))], np.array([50, 50, 50]), np.array([9, 20, 30]), 1))
    np.testing.assert_array_equal(among[mixed == 1], first[1])


def test_the_last_rows_are_all_drawn_whatever_rounding_says():
    """All but one, and all, of many clusters of every size: the numbers are exact."""
    sizes = np.arange(1, 800)
    labels = np.repeat(np.arange(799, dtype="i4"), sizes)
    for quotas in (sizes - 1, sizes, sizes // 2):
        counts = next(draw_rows(lambda: [Block(labels)], sizes, quotas, 3))
        np.testing.assert_array_equal(np.bincount(labels, counts), quotas)


def capped(seed, pick, copies, k=12, n=300, n_groups=7, cap=9, share_of=0.5):
    rng = np.random.default_rng(seed)
    labels, distance, _ = some_rows(rng, n, k)
    groups = (n_groups * rng.random(n) ** 2).astype("i4")
    groups[rng.random(n) < 0.1] = -1
    target = int(share_of * n)
    upper = [np.arange(k) % 4]

    def share(sizes, held):
        return leaf_quotas(sizes, upper, target, seed, copies, held)

    whole = Block(labels, distance, groups)
    pieces = [Block(*(x[a:b] for x in whole)) for a, b in itertools.pairwise([0, 11, 11, 150, n])]
    found = [
        draw_capped(lambda: blocks, k, n_groups, cap, share, seed, pick=pick, max_copies=copies)  # noqa: B023
        for blocks in ([whole], pieces)
    ]
    one, other = (np.concatenate(some.counts).astype(int) for some in found)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found[0].quotas, np.bincount(labels, one, minlength=k))
    return labels, groups, one, target, share


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("pick", "copies"), [("random", 1), ("closest", 1), ("random", 3)])
def test_no_group_is_above_its_cap_and_the_target_is_filled(seed, pick, copies):
    labels, groups, counts, target, share = capped(seed, pick, copies)
    own = groups >= 0
    per_group = np.bincount(groups[own], counts[own], minlength=7).astype(int)
    room = np.minimum(np.bincount(groups[own], minlength=7) * copies, 9).sum() + copies * (~own).sum()
    assert per_group.max() == 9  # where it binds there are exactly as many
    assert counts.max() <= copies
    # closed groups have exactly the cap, so what can be had is theirs and all rows of the others
    closed = np.append(per_group == 9, False)[groups]
    assert counts.sum() == min(target, 9 * (per_group == 9).sum() + copies * (~closed).sum()) <= room
    held = np.bincount(labels, counts * closed, minlength=12).astype(int)
    np.testing.assert_array_equal(
        share(np.bincount(labels[~closed], minlength=12), held), np.bincount(labels, counts, minlength=12)
    )


def test_a_cap_that_nobody_exceeds_changes_nothing():
    labels, _, counts, target, share = capped(0, "random", 1, cap=1000)
    sizes = np.bincount(labels, minlength=12)
    [free] = draw_rows(lambda: [Block(labels)], sizes, share(sizes, np.zeros(12, int)), 0)
    np.testing.assert_array_equal(counts, free)
    assert counts.sum() == target


def test_what_stays_of_a_group_is_a_random_part_of_what_was_drawn():
    labels = np.zeros(20, "i4")
    groups = np.repeat(np.arange(2, dtype="i4"), 10)
    times = np.zeros(20)
    for seed in range(3000):
        free = next(draw_rows(lambda: [Block(labels)], np.array([20]), np.array([12]), seed))
        found = draw_capped(
            lambda: [Block(labels, groups=groups)], 1, 2, 4,
            lambda sizes, held: np.minimum(held + sizes, 12), seed,
        )  # fmt: skip
        [counts] = found.counts
        assert counts.reshape(2, 10).sum(axis=1).tolist() == [4, 4]
        first = (free.reshape(2, 10).sum(axis=1) > 4)[groups]  # those of the first round
        assert (counts[first] <= free[first]).all()
        times += counts
    np.testing.assert_allclose(times, 1200, atol=5 * np.sqrt(3000 * 0.24))
