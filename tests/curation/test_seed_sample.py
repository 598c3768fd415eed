import itertools

import numpy as np
import pytest
from blobs import blobs, cut, with_weights

from curation import seed_sample as module
from curation.execute import SerialExecutor
from curation.kmeans import fit, kmeans
from curation.nearest import nearest_centroid
from curation.seed_sample import Draw, sample_counts, seeds_of_sample


@pytest.mark.parametrize("n_parts", [1, 5])
def test_a_bounded_seeding_sample_costs_no_quality(n_parts, monkeypatch):
    x = blobs(7, n=9000)
    whole = np.mean([kmeans(x, 30, np.random.default_rng(s)).sq_distance.sum() for s in range(4)])
    monkeypatch.setattr(module, "MIN_SEED_ROWS", 500)
    parts = cut(x, np.arange(1, n_parts) * 9000 // n_parts)
    fits = [fit(parts, 30, (s,), SerialExecutor()).centroids for s in range(4)]
    sampled = np.mean([nearest_centroid(x, c)[1].sum() for c in fits])
    assert sampled <= 1.05 * whole


def test_every_part_draws_from_its_own_key():
    keys = []

    class Recording(SerialExecutor):
        def reduce(self, fn, items, *args, **kwargs):
            keys.extend(item.key for item in items if isinstance(item, Draw))
            return super().reduce(fn, items, *args, **kwargs)

        def map(self, fn, items, *args, **kwargs):
            keys.extend(item for item in items if getattr(fn, "func", fn) is seeds_of_sample)
            return super().map(fn, items, *args, **kwargs)

    for seed_key in ((5, 0), (5, 1)):
        fit(cut(blobs(0), [1000, 2000, 3000]), 5, seed_key, Recording())
    states = {tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys}
    assert len(keys) == len(states) == 2 * (4 + 1)


def test_the_seeding_sample_is_bounded_in_bytes_but_not_below_some_rows_a_cluster():
    for k, width in itertools.product((1, 1000, 5000, 10_000, 100_000), (2, 256, 1024)):
        n = module.seed_sample(k, width)
        assert n >= module.MIN_SEED_ROWS and n >= module.LEAST_SEED_ROWS * k
        assert n == max(module.MIN_SEED_ROWS, module.LEAST_SEED_ROWS * k) or 4 * width * n <= module.SEED_BYTES
        assert n <= max(module.MIN_SEED_ROWS, module.SEED_ROWS_PER_CLUSTER * k)
    assert module.seed_sample(10_000, 2) == 10_000 * module.SEED_ROWS_PER_CLUSTER


def test_every_row_has_the_same_chance_to_be_in_the_sample():
    sizes, total = [3, 0, 1, 50, 7, 1], np.zeros(6)
    for seed in range(4000):
        counts = sample_counts(sizes, 20, np.random.default_rng(seed))
        assert sum(counts) == 20 and all(0 <= c <= size for c, size in zip(counts, sizes, strict=True))
        total += counts
    np.testing.assert_allclose(total / 4000, 20 * np.array(sizes) / 62, atol=0.04)
    assert sample_counts(sizes, 62, np.random.default_rng(0)) == sizes
    assert sum(sample_counts([10**10] * 3, 10**7, np.random.default_rng(0))) == 10**7


def test_first_centroids_have_weight():
    x = np.arange(1000, dtype="f4")[:, None]
    parts = with_weights(cut(x, [200, 500]), np.where(x[:, 0] % 100 == 99, 1, 0))
    for seed in range(20):
        start = module.seed_centroids(parts, 60, (seed,), SerialExecutor())[:, 0]
        heavy = start % 100 == 99
        assert len(np.unique(start[heavy])) == 10
        assert len(np.unique(start[~heavy])) <= 1  # stands in when no row of weight is left


def test_a_sample_of_rows_keeps_their_weights(monkeypatch):
    monkeypatch.setattr(module, "MIN_SEED_ROWS", 500)
    x = np.arange(4000, dtype="f4")[:, None]
    parts = with_weights(cut(x, [200, 2500]), np.where(x[:, 0] < 3000, 0, 5))
    for seed in range(20):
        start = module.seed_centroids(parts, 10, (seed,), SerialExecutor())[:, 0]
        assert (start >= 3000).all() and len(np.unique(start)) == 10
