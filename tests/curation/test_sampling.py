import itertools

import numpy as np
import pytest

from curation.draws import Block, draw_rows
from curation.hierarchy import Hierarchy, Level, hierarchical_kmeans
from curation.sampling import (
    SampleConfig,
    child_luck,
    equal_shares,
    frequency_quotas,
    leaf_quotas,
    ragged_shares,
    sample_hierarchy,
    split_mix,
)

# sizes, target, copies -> base shares, remainder, children that may get one more
QUOTAS = [
    ([10, 20, 5], 25, 1, [10, 10, 5], 0, set()),
    ([10, 3, 20, 7], 25, 1, [7, 3, 7, 7], 1, {0, 2}),
    ([100, 50, 10, 1], 60, 1, [24, 24, 10, 1], 1, {0, 1}),
    ([1000, 10, 10, 1], 100, 1, [79, 10, 10, 1], 0, set()),
    ([1000, 10, 10, 1], 3, 1, [0, 0, 0, 0], 3, {0, 1, 2, 3}),
    ([4, 2, 1], 20, 3, [11, 6, 3], 0, set()),
    ([0, 4, 9], 6, 1, [0, 3, 3], 0, set()),
    ([20000, 8000, 1000, 500, 200], 5000, 1, [1650, 1650, 1000, 500, 200], 0, set()),
    ([3, 0, 5], 8, 1, [3, 0, 5], 0, set()),
    ([3, 0, 5], 900, 1, [3, 0, 5], 0, set()),
    ([3, 0, 5], 900, 2, [6, 0, 10], 0, set()),
    ([3, 4], 0, 1, [0, 0], 0, set()),
    ([0, 0], 5, 1, [0, 0], 0, set()),
    ([], 5, 1, [], 0, set()),
]


@pytest.mark.parametrize("case", QUOTAS)
def test_shares_of_known_cases(case):
    sizes, target, copies, base, remainder, above = case
    lucky = set()
    for seed in range(40):
        shares = equal_shares(np.array(sizes, int), target, np.random.default_rng(seed), copies)
        assert shares.dtype == np.int64
        more = shares - np.array(base, int)
        assert set(np.unique(more)) <= {0, 1} and more.sum() == remainder
        lucky |= set(np.flatnonzero(more).tolist())
    assert lucky == above  # everyone who may get one more does, sooner or later


def greedy_shares(caps, target):
    """Max-min optimum, one unit at a time to whoever has least and has room."""
    shares = [0] * len(caps)
    for _ in range(min(target, sum(caps))):
        i = min((i for i in range(len(caps)) if shares[i] < caps[i]), key=lambda i: shares[i])
        shares[i] += 1
    return sorted(shares)


def test_shares_are_the_max_min_optimum():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        copies = int(rng.integers(1, 4))
        sizes = rng.integers(0, rng.choice([2, 5, 40]), size=int(rng.integers(1, 9)))
        target = int(rng.integers(0, sizes.sum() * copies + 5))
        shares = equal_shares(sizes, target, rng, copies)
        assert shares.sum() == min(target, copies * sizes.sum())
        assert (shares <= copies * sizes).all()
        assert sorted(shares.tolist()) == greedy_shares((copies * sizes).tolist(), target)


def test_greedy_is_the_lexicographic_optimum():
    """The oracle itself, against all splits of a small case: the sorted shares, lowest first, are the largest."""
    for caps, target in [((3, 1, 4), 5), ((0, 2, 2), 3), ((5, 5, 1), 7), ((1, 1, 1), 2)]:
        splits = itertools.product(*(range(cap + 1) for cap in caps))
        assert greedy_shares(caps, target) == max(sorted(split) for split in splits if sum(split) == target)


def test_the_remainder_is_uniform():
    counts = sum(equal_shares(np.array([5, 9, 1, 7, 6]), 18, np.random.default_rng(s)) for s in range(3000))
    extra = counts - 3000 * np.array([4, 4, 1, 4, 4])
    assert extra[2] == 0
    np.testing.assert_allclose(extra[[0, 1, 3, 4]], 750, atol=4 * np.sqrt(3000 * 3 / 16))


def test_ragged_shares_are_the_shares_of_each_group():
    rng = np.random.default_rng(1)
    for _ in range(200):
        counts = rng.integers(0, 6, size=int(rng.integers(1, 9)))  # empty groups, first and last too
        offsets = np.concatenate([[0], np.cumsum(counts)])
        sizes, targets = rng.integers(0, 30, size=counts.sum()), rng.integers(0, 90, size=len(counts))
        shares = ragged_shares(sizes, offsets, targets, rng.random(len(sizes)), 2)
        for g, (a, b) in enumerate(itertools.pairwise(offsets)):
            assert sorted(shares[a:b].tolist()) == greedy_shares((2 * sizes[a:b]).tolist(), int(targets[g]))


def greedy_above(floors, caps, target):
    """As ``greedy_shares``, where everybody has something already."""
    shares = list(floors)
    for _ in range(min(target, sum(caps)) - sum(floors)):
        i = min((i for i in range(len(caps)) if shares[i] < caps[i]), key=lambda i: shares[i])
        shares[i] += 1
    return shares


def test_shares_above_what_is_held_are_the_max_min_optimum():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        copies = int(rng.integers(1, 3))
        sizes, held = rng.integers(0, 12, size=6), rng.integers(0, 12, size=6) * (rng.random(6) < 0.5)
        target = int(rng.integers(held.sum(), held.sum() + copies * sizes.sum() + 3))
        caps = (held + copies * sizes).tolist()
        luck = rng.random(6)
        shares = ragged_shares(sizes, np.array([0, 6]), np.array([target]), luck, copies, held)
        assert shares.sum() == min(target, sum(caps)) and (shares >= held).all() and (shares <= caps).all()
        assert sorted(shares.tolist()) == sorted(greedy_above(held.tolist(), caps, target))
    none = ragged_shares(sizes, np.array([0, 6]), np.array([target]), luck, copies, np.zeros(6, int))
    np.testing.assert_array_equal(none, ragged_shares(sizes, np.array([0, 6]), np.array([target]), luck, copies))


def test_leaves_have_what_they_hold_and_nodes_share_the_rest():
    rng = np.random.default_rng(5)
    upper = [rng.integers(0, 6, 20), rng.integers(0, 2, 6)]
    upper[0][:6], upper[1][:2] = np.arange(6), [0, 1]  # none is empty
    for seed in range(50):
        sizes, held = rng.integers(0, 9, 20), rng.integers(0, 9, 20) * (rng.random(20) < 0.3)
        target = int(rng.integers(held.sum(), held.sum() + sizes.sum() + 2))
        quotas = leaf_quotas(sizes, upper, target, seed, held=held)
        nodes = [np.arange(20), upper[0], upper[1][upper[0]], np.zeros(20, int)]
        for child, parent in itertools.pairwise(nodes):
            for node in np.unique(parent):
                inside = np.unique(child[parent == node])
                sums = [[int(x[child == c].sum()) for c in inside] for x in (held, held + sizes, quotas)]
                assert sorted(sums[2]) == sorted(greedy_above(sums[0], sums[1], sum(sums[2])))


def simulated_frequencies(room, target, rng):
    """One draw after the other, of all clusters with room."""
    drawn = np.zeros(len(room), int)
    for _ in range(target):
        drawn[rng.choice(np.flatnonzero(drawn < room))] += 1
    return drawn


def test_inverse_frequencies_are_those_of_one_draw_after_the_other():
    sizes, copies, target, n = np.array([1, 2, 0, 30, 3]), 2, 12, 3000
    drawn = np.array([frequency_quotas(sizes, target, seed, copies) for seed in range(n)])
    rng = np.random.default_rng(0)
    expected = np.array([simulated_frequencies(sizes * copies, target, rng) for _ in range(n)])
    assert (drawn.sum(axis=1) == target).all() and (drawn <= sizes * copies).all()
    for ours, theirs in zip(drawn.T, expected.T, strict=True):
        error = np.sqrt((ours.var() + theirs.var()) / n)
        assert abs(ours.mean() - theirs.mean()) <= 5 * error
        assert abs(ours.std() - theirs.std()) <= 5 * error
    np.testing.assert_array_equal(frequency_quotas(sizes, 99999, 0, copies), copies * sizes)
    assert frequency_quotas(sizes, 0, 0).sum() == 0


def random_hierarchy(rng, n_rows=300, n_clusters=(40, 12, 4)):
    """Skewed labels with empty clusters on every level."""
    labels, below = [], n_rows
    for k in n_clusters:
        labels.append((k * rng.random(below) ** 2).astype("i4"))
        below = k
    levels = [Level(None, labels[0], rng.integers(0, 5, n_rows).astype("f4")), *(Level(None, x) for x in labels[1:])]
    return Hierarchy(levels)


def rows_under(hierarchy):
    """Node of every row on each level, finest first, and the root."""
    nodes = [hierarchy.levels[0].labels]
    for level in hierarchy.levels[1:]:
        nodes.append(level.labels[nodes[-1]])
    return [*nodes, np.zeros_like(nodes[0])]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("pick", ["random", "closest"])
def test_every_node_shares_its_rows_evenly(seed, pick):
    rng = np.random.default_rng(seed)
    hierarchy, copies = random_hierarchy(rng), int(rng.integers(1, 4))
    n_rows = len(hierarchy.levels[0].labels)
    target = int(rng.integers(0, copies * n_rows + 20))
    rows = sample_hierarchy(hierarchy, target, rng, pick, copies)
    assert rows.dtype == np.int64 and (np.diff(rows) >= 0).all() and len(rows) == min(target, copies * n_rows)
    times = np.bincount(rows, minlength=n_rows)
    nodes = rows_under(hierarchy)
    for child, parent in itertools.pairwise(nodes):
        for node in np.unique(parent):
            inside = np.unique(child[parent == node])
            caps = [copies * int((child == c).sum()) for c in inside]
            drawn = [int(times[child == c].sum()) for c in inside]
            assert sorted(drawn) == greedy_shares(caps, sum(drawn))
    for leaf in np.unique(nodes[0]):
        inside = times[nodes[0] == leaf]
        assert inside.max() - inside.min() <= 1
        if pick == "closest":  # by (distance, row)
            order = np.lexsort((np.flatnonzero(nodes[0] == leaf), hierarchy.levels[0].sq_distance[nodes[0] == leaf]))
            assert (np.diff(inside[order]) <= 0).all()


@pytest.mark.parametrize("pick", ["random", "closest"])
def test_the_pieces_of_the_stage_give_the_same_sample(pick):
    hierarchy = random_hierarchy(np.random.default_rng(3))
    labels, distance = hierarchy.levels[0].labels, hierarchy.levels[0].sq_distance
    whole = sample_hierarchy(hierarchy, 420, np.random.default_rng(7), pick, 3)
    seed = int(np.random.default_rng(7).integers(2**32))
    sizes = np.bincount(labels, minlength=40)
    quotas = leaf_quotas(sizes, [level.labels for level in hierarchy.levels[1:]], 420, seed, 3)
    blocks = [Block(labels[i : i + 70], distance[i : i + 70]) for i in range(0, len(labels), 70)]
    counts = np.concatenate(list(draw_rows(lambda: blocks, sizes, quotas, seed, pick=pick, max_copies=3)))
    np.testing.assert_array_equal(np.repeat(np.arange(len(labels)), counts), whole)


def test_a_flat_hierarchy_is_one_round_of_shares():
    labels = np.repeat(np.arange(3), [10, 20, 5])
    rows = sample_hierarchy(Hierarchy.from_labels([labels]), 25, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [10, 10, 5]


def test_an_upper_level_changes_the_balance():
    """Two small clusters under one node share what one small cluster gets alone."""
    labels = np.repeat(np.arange(3), 100)
    rows = sample_hierarchy(Hierarchy.from_labels([labels, np.array([0, 0, 1])]), 80, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [20, 20, 40]


def test_seeds_repeat_and_differ():
    hierarchy = random_hierarchy(np.random.default_rng(3))
    first, same, other = (sample_hierarchy(hierarchy, 100, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_quotas_are_keyed_by_seed():
    labels = np.arange(60) % 7
    quotas = [leaf_quotas(np.full(60, 9), [labels], 100, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(quotas[0], quotas[1])
    assert not np.array_equal(quotas[0], quotas[2])
    # both rounds have a remainder: the root's among 7 nodes, and each node's among its leaves
    assert not np.array_equal(*(np.bincount(labels, quota) for quota in quotas[1:]))


def test_one_more_child_changes_no_draw_in_another_node():
    """Each of three nodes gives one of its equal children one more; the first node then gets a child."""
    target = 3 * 19
    before = leaf_quotas(np.full(18, 9), [np.repeat([0, 1, 2], 6)], target, 5)
    after = leaf_quotas(np.full(19, 9), [np.repeat([0, 1, 2], [7, 6, 6])], target, 5)
    assert before.reshape(3, 6).sum(axis=1).tolist() == [19, 19, 19]
    np.testing.assert_array_equal(after[7:], before[6:])
    np.testing.assert_array_equal(child_luck(5, 1, np.array([0, 6, 9]))[:6], child_luck(5, 1, np.array([0, 7, 9]))[:6])


def test_the_remainder_of_nodes_is_uniform_over_their_children():
    """20,000 nodes of seven children, two of which get one more; then one node and as many seeds."""
    n, extra = 20_000, 2
    nodes = leaf_quotas(np.full(7 * n, 50), [np.repeat(np.arange(n), 7)], n * (7 * 3 + extra), 1).reshape(n, 7) - 3
    seeds = np.array([leaf_quotas(np.full(7, 50), [np.zeros(7, int)], 7 * 3 + extra, seed) for seed in range(3000)]) - 3
    for more in (nodes, seeds):
        assert (more.sum(axis=1) == extra).all()
        deviation = 5 * np.sqrt(len(more) * extra / 7 * (1 - extra / 7))
        np.testing.assert_allclose(more.sum(axis=0), len(more) * extra / 7, atol=deviation)
        pairs = more.T @ more  # and every pair of children as often as any other
        np.testing.assert_allclose(pairs[~np.eye(7, dtype=bool)], len(more) / 21, atol=5 * np.sqrt(len(more) / 21))


def test_luck_is_keyed_by_seed_level_node_and_child():
    offsets = np.array([0, 3, 3, 8])
    lucks = [child_luck(seed, level, offsets) for seed in (0, 1, 2**70) for level in (1, 2)]
    assert all(luck.dtype == np.uint64 and len(luck) == 8 for luck in lucks)
    assert len(np.unique(np.concatenate(lucks))) == 48
    assert len(child_luck(0, 1, np.array([0]))) == 0


def test_split_mix_gives_the_published_numbers():
    """The first outputs of the generator with seed 1234567: its counter is the seed plus steps."""
    counters = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert split_mix(counters).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("target", [25, 25.0, np.float32(25), np.int32(25)])
@pytest.mark.parametrize("kind", ["i4", "u8", "f4"])
def test_shares_are_integers_for_whole_floats(target, kind):
    shares = equal_shares(np.array([10, 20, 5], kind), target, np.random.default_rng(0))
    assert shares.dtype == np.int64 and shares.tolist() == [10, 10, 5]


def test_large_targets_do_not_overflow():
    sizes = np.array([6 * 10**9, 4 * 10**9, 1])
    shares = equal_shares(sizes, 10**10, np.random.default_rng(0), 4)
    assert shares.tolist() == [5 * 10**9 - 2, 5 * 10**9 - 2, 4]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda h, rng: sample_hierarchy(h, 5, rng, "furthest"), "pick must be 'random' or 'closest': got 'furthest'"),
        (lambda h, rng: sample_hierarchy(h, 5, rng, "closest"), "level 0 has no sq_distance"),
        (lambda h, rng: sample_hierarchy(h, -5, rng), "target -5"),
        (lambda h, rng: sample_hierarchy(h, 5, rng, max_copies=0), "max_copies 0"),
        (lambda h, rng: equal_shares(np.array([3, -1]), 2, rng), "sizes from -1"),
        (lambda h, rng: equal_shares(np.array([3, 1]), 2.5, rng), "target must be whole numbers: 1 of 1 .* first 2.5"),
        (lambda h, rng: equal_shares(np.array([3, 0.5]), 2, rng), "sizes must be whole numbers: 1 of 2 .* first 0.5"),
        (lambda h, rng: equal_shares(np.array([3, 1]), float("nan"), rng), "target must be whole .* first nan"),
        (lambda h, rng: equal_shares(np.array([3, np.inf]), 2, rng), "sizes must be whole .* first inf"),
        (lambda h, rng: equal_shares(["3"], 2, rng), "sizes must be whole numbers: got <U1"),
        (lambda h, rng: sample_hierarchy(h, 2.5, rng), "target must be whole numbers"),
        (lambda h, rng: frequency_quotas(np.array([3, -1]), 2, 0), "sizes from -1"),
        (lambda h, rng: frequency_quotas(np.array([3, 1]), -2, 0), "target -2"),
        (lambda h, rng: frequency_quotas(np.array([3, 1]), 2, 0, 0), "max_copies 0"),
        (lambda h, rng: SampleConfig(target=0), "sample.target must be at least 1: got 0"),
        (lambda h, rng: SampleConfig(target=1, max_copies=0), "sample.max_copies must be at least 1: got 0"),
        (lambda h, rng: SampleConfig(target=1, seed=-1), "sample.seed must be at least 0: got -1"),
        (lambda h, rng: SampleConfig(target=1, level=-1), "sample.level must be at least 0: got -1"),
        (lambda h, rng: SampleConfig(target=1, max_per_source=0), "sample.max_per_source must be at least 1: got 0"),
        (lambda h, rng: SampleConfig(target=1, max_per_label=0), "sample.max_per_label must be at least 1: got 0"),
        (lambda h, rng: SampleConfig(target=1, mode="even"), "sample.mode must be one of tree, .*: got 'even'"),
        (lambda h, rng: SampleConfig(target=1, pick="far"), "sample.pick must be 'random' or 'closest': got 'far'"),
    ],
)
def test_what_cannot_be_sampled_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(Hierarchy.from_labels([np.array([0, 1, 1])]), np.random.default_rng(0))


def mixture(rng, n=40_000):
    """Three groups of very unequal size and density, and a thin background over the square [-3, 3) ** 2."""
    centers, widths = np.array([[-1.5, -1.5], [1.2, 1.2], [1.5, -1.2], [0, 0]]), np.array([0.25, 0.4, 0.3, 0])
    which = rng.choice(4, n, p=[0.6, 0.25, 0.12, 0.03])
    x = centers[which] + rng.normal(size=(n, 2)) * widths[which, None]
    x[which == 3] = rng.uniform(-3, 3, (int((which == 3).sum()), 2))
    return np.clip(x, -2.999, 2.999).astype("f4")


def divergence(x):
    """From uniform over the square, in nats, by a grid; half a row more in every cell."""
    cells = np.histogram2d(*x.T, bins=8, range=[[-3, 3]] * 2)[0].ravel() + 0.5
    p = cells / cells.sum()
    return (p * np.log(p * len(p))).sum()


def test_more_levels_and_resampling_make_a_sample_more_uniform():
    """The experiment of Vo et al.: raw > one level > two > three > three with resampling; each has 300 top clusters."""
    ways = [([300], 0), ([1200, 300], 0), ([2400, 850, 300], 0), ([2400, 850, 300], 5)]
    found = []
    for seed in range(3):
        x = mixture(np.random.default_rng(seed))
        told = [divergence(x[:1500])]
        for n_clusters, n_resamples in ways:
            tree = hierarchical_kmeans(x, n_clusters, np.random.default_rng(seed), n_resamples=n_resamples, n_iter=15)
            told.append(divergence(x[sample_hierarchy(tree, 1500, np.random.default_rng(seed))]))
        found.append(told)
    raw, flat, two, three, resampled = np.mean(found, axis=0)
    assert raw > 2 * flat and flat > 1.4 * two and two > 1.05 * three and three > resampled
