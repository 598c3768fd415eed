import hashlib
import json
import os
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.artifact import part_name
from curation.mix import MIX_FILE, read_mix, spec_of, write_mix
from curation.shards import TarFacts, shard_name, with_tar
from curation.store import Location
from training.mixing import Mixing
from training.stream import (
    ShardChangedError,
    ShardGoneError,
    Stream,
    list_shards,
    locate_tar,
    read_images,
    read_index,
    shard_totals,
)


@pytest.fixture
def shards(make_shards, tmp_path):
    """5 shards of 0-7 samples whose bytes are their keys; some counts above 1."""
    samples = [[(f"s{i}n{j}", f"bytes of {i} {j}".encode()) for j in range(n)] for i, n in enumerate((7, 3, 0, 5, 4))]
    return make_shards(tmp_path, samples, counts={"s0n0": 3, "s3n1": 2, "s4n3": 4})


@pytest.fixture
def elsewhere(shards, tmp_path):
    """The same, with the tars in a folder of their own, under names of their own."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "index").mkdir()
    for i in range(5):
        tar = tmp_path / "tars" / f"{i}.tar"
        tar.write_bytes((tmp_path / shard_name(i)).read_bytes())
        data = tar.read_bytes()
        facts = TarFacts(tar.name, len(data), hashlib.sha256(data).hexdigest())
        table = with_tar(pq.read_table(tmp_path / part_name(i)), facts)
        pq.write_table(table, tmp_path / "index" / part_name(i))
    manifest = {"format": 1, "locations": {"source": str(tmp_path / "tars")}}
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    return Location(str(tmp_path / "index"))


N = 19 + 2 + 1 + 3


def one_epoch(stream, epoch=0):
    return [stream.sample(epoch * N + i) for i in range(N)]


def test_an_epoch_shows_every_sample_as_often_as_its_count(shards):
    stream = Stream(shards, batch=4, seed=3, n_open=2)
    assert stream.n_samples == N
    for epoch in range(3):
        seen = Counter(s.key for s in one_epoch(stream, epoch))
        assert len(seen) == 19
        assert {k: v for k, v in seen.items() if v > 1} == {"s0n0": 3, "s3n1": 2, "s4n3": 4}


def test_the_order_is_the_documented_formula(shards):
    seed, n_open, sizes = 3, 2, [7 + 2, 3, 0, 5 + 1, 4 + 3]
    counts = {(0, 0): 3, (3, 1): 2, (4, 3): 4}
    expected = []
    for epoch in range(2):
        order = np.random.default_rng([seed, epoch]).permutation(5)
        for group, start in enumerate(range(0, 5, n_open)):
            pool = [
                f"s{i}n{j}"
                for i in order[start : start + n_open]
                for j in range((7, 3, 0, 5, 4)[i])
                for _ in range(counts.get((i, j), 1))
            ]
            permutation = np.random.default_rng([seed, epoch, group]).permutation(len(pool))
            expected += [pool[p] for p in permutation]
    stream = Stream(shards, batch=4, seed=seed, n_open=n_open)
    assert [stream.sample(i).key for i in range(2 * N)] == expected
    np.testing.assert_array_equal(stream.totals, sizes)


def test_a_batch_is_its_slice_of_the_numbers_across_groups_and_epochs(shards):
    stream = Stream(shards, batch=7, seed=1, n_open=2)
    flat = [s for step in range(9) for s in stream.batch(step)]
    assert flat == [stream.sample(i) for i in range(63)]
    assert [s.number for s in flat] == list(range(63))
    assert [s.epoch for s in flat] == [i // N for i in range(63)]
    far = Stream(shards, batch=7, seed=1, n_open=2).batch(5)  # without what came before
    assert far == stream.batch(5)
    big = Stream(shards, batch=3 * N, seed=1, n_open=2).batch(0)
    assert big[:63] == flat


def test_seeds_and_epochs_differ(shards):
    a, b = (Stream(shards, batch=4, seed=s, n_open=2) for s in (0, 1))
    assert [s.key for s in one_epoch(a)] != [s.key for s in one_epoch(b)]
    assert [s.key for s in one_epoch(a)] != [s.key for s in one_epoch(a, 1)]


def test_offsets_lead_to_the_bytes(shards):
    samples = one_epoch(Stream(shards, batch=4, n_open=3))
    for sample, data in zip(samples, read_images(shards, samples), strict=True):
        shard, row = sample.key[1:].split("n")
        assert data == f"bytes of {shard} {row}".encode()


def test_index_files_are_read_when_their_group_is(shards, monkeypatch):
    import training.stream as module

    stream, read = Stream(shards, batch=2, n_open=2), []
    original = module.read_index
    monkeypatch.setattr(module, "read_index", lambda s, i, c: read.append(i) or original(s, i, c))
    stream.batch(0)
    assert len(read) == 2
    stream.batch(1)
    assert len(read) == 2


def test_totals_given_are_not_read_again(shards, monkeypatch):
    totals = shard_totals(shards, list_shards(shards))
    monkeypatch.setattr("training.stream.shard_totals", None)
    assert Stream(shards, batch=2, totals=totals).n_samples == N


def test_what_is_wrong_with_shards_is_said(make_shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard index"):
        Stream(Location(str(tmp_path)), batch=2)
    with pytest.raises(ValueError, match="at least one sample"):
        Stream(make_shards(tmp_path / "a", [[]]), batch=2)
    with pytest.raises(ValueError, match="counts must be at least 1: got 0"):
        Stream(make_shards(tmp_path / "b", [[("k", b"x")]], counts={"k": 0}), batch=2)


def test_tars_elsewhere_are_found_where_the_index_says(elsewhere, tmp_path):
    """In place of those beside it; where the source is now, when that is said."""
    stream = Stream(elsewhere, batch=4, n_open=3)
    samples = one_epoch(stream)
    data = [f"bytes of {s.key[1:].replace('n', ' ')}".encode() for s in samples]
    assert read_images(elsewhere, samples) == data
    (tmp_path / "tars").rename(tmp_path / "moved")
    locate_tar.cache_clear()
    with pytest.raises(ShardGoneError, match=r"tars/.\.tar must be the shard that its index is of: it is gone"):
        read_images(elsewhere, samples)
    moved = Location(str(tmp_path / "moved"))
    assert read_images(elsewhere, samples, moved) == data
    np.testing.assert_array_equal(shard_totals(elsewhere, list_shards(elsewhere), root=moved), stream.totals)


def test_a_tar_is_looked_at_once(elsewhere, monkeypatch):
    looked = []
    entry = Location.entry
    monkeypatch.setattr(Location, "entry", lambda self: looked.append(self.name) or entry(self))
    stream = Stream(elsewhere, batch=4)
    assert sorted(looked) == ["0.tar", "1.tar", "2.tar", "3.tar", "4.tar"]
    looked.clear()
    for _ in range(3):
        read_images(elsewhere, one_epoch(stream))
    assert sorted(looked) == ["0.tar", "1.tar", "3.tar", "4.tar"]  # one is empty


@pytest.mark.parametrize("beside", [True, False])
def test_a_run_does_not_begin_with_a_tar_that_is_not_the_one_indexed(shards, elsewhere, tmp_path, beside):
    at, name = (shards, "shard-0000003.tar") if beside else (elsewhere, "tars/3.tar")
    data = (tmp_path / name).read_bytes()
    ids = list_shards(at)
    (tmp_path / name).write_bytes(data[:1024])
    words = (
        r"it breaks off at 1024 bytes, and the last image ends at 4620" if beside else r"it had \d+ bytes and has 1024"
    )
    with pytest.raises(ShardChangedError, match=rf"{name} must be the shard that its index is of: {words}"):
        shard_totals(at, ids)
    (tmp_path / name).write_bytes(data + bytes(512))
    if beside:
        shard_totals(at, ids)
    else:
        with pytest.raises(ShardChangedError, match="had"):
            shard_totals(at, ids)
    (tmp_path / name).unlink()
    with pytest.raises(ShardGoneError, match=rf"{name} must be the shard that its index is of: it is gone"):
        shard_totals(at, ids)


def test_a_tar_of_the_same_size_that_is_another_is_no_longer_the_one_indexed(elsewhere, tmp_path):
    """Its content says so: a copy with another time is the same."""
    stream, tar = Stream(elsewhere, batch=N), tmp_path / "tars/3.tar"
    os.utime(tar, ns=(1, 1))
    assert len(read_images(elsewhere, stream.batch(0))) == N
    shard_totals(elsewhere, list_shards(elsewhere))
    tar.write_bytes(tar.read_bytes().replace(b"bytes of 3 2", b"bytes of 3 9"))
    locate_tar.cache_clear()
    words = r"tars/3.tar must be the shard that its index is of: it has other bytes at its ends, in the same size"
    for look in (lambda: shard_totals(elsewhere, list_shards(elsewhere)), lambda: locate_tar(elsewhere, 3)):
        with pytest.raises(ShardChangedError, match=words):
            look()


def test_a_tar_that_goes_while_it_is_read_is_one_clear_error(shards, elsewhere, tmp_path):
    for at, name in ((shards, "shard-0000003.tar"), (elsewhere, "tars/3.tar")):
        samples = Stream(at, batch=N).batch(0)
        read_images(at, samples)
        (tmp_path / name).unlink()
        with pytest.raises(ShardGoneError, match=rf"{name} must be the shard that its index is of: it is gone"):
            read_images(at, samples)


SIZES = (7, 3, 0, 5, 4)
NAMES = [f"s{i}n{j}" for i, n in enumerate(SIZES) for j in range(n)]
COUNTS = {
    "few": {"s3n0": 1, "s3n4": 2, "s4n1": 1},  # in two of the shards
    "odd": {name: 1 for name in NAMES if name[-1] in "135"},
    "all": {name: 1 + (name == "s0n0") for name in NAMES},
}


@pytest.fixture
def mixed(shards, add_mix):
    return add_mix(shards, COUNTS, {"few": 0.2}, {"odd": 0.3, "all": 0.7})


def test_a_mix_by_brute_force(mixed):
    """Every draw of every component is the formula's, from its own shards, counts and epochs."""
    seed, n_open = 3, 2
    stream = Stream(mixed, batch=6, seed=seed, n_open=n_open)
    drawn = {name: [] for name in COUNTS}
    for step in range(40):
        samples, (component, draw) = stream.batch(step), Mixing(stream.mix, 6, seed).step(step)
        assert [s.component for s in samples] == component.tolist()
        assert [s.number for s in samples] == (draw * 3 + component).tolist()
        for s in samples:
            drawn[list(COUNTS)[s.component]].append((s.number // 3, s.key, s.epoch))
    for c, (name, counts) in enumerate(COUNTS.items()):
        expected, epoch = [], 0
        own = [i for i in range(5) if any(f"s{i}n{j}" in counts for j in range(SIZES[i]))]
        while len(expected) < len(drawn[name]):
            order = np.random.default_rng([seed, epoch, c, 0, 3]).permutation(len(own))
            for group, start in enumerate(range(0, len(own), n_open)):
                ids = [own[i] for i in order[start : start + n_open]]
                pool = [k for i in ids for j in range(SIZES[i]) for k in [f"s{i}n{j}"] * counts.get(f"s{i}n{j}", 0)]
                permutation = np.random.default_rng([seed, epoch, c, group, 4]).permutation(len(pool))
                expected += [(pool[p], epoch) for p in permutation]
            epoch += 1
        assert [rest for _, *rest in sorted(drawn[name])] == [list(pair) for pair in expected[: len(drawn[name])]]
        assert [number for number, *_ in sorted(drawn[name])] == list(range(len(drawn[name])))
        assert epoch > 1 or name == "odd"


def test_every_component_is_seen_evenly(mixed):
    stream = Stream(mixed, batch=5, n_open=2)
    seen = {}
    for sample in (s for step in range(300) for s in stream.batch(step)):
        seen.setdefault((sample.component, sample.epoch), []).append(sample.key)
    last = {c: max(epoch for component, epoch in seen if component == c) for c in range(3)}
    assert min(last.values()) > 10
    for (c, epoch), keys in seen.items():
        counts = Counter(list(COUNTS.values())[c])
        assert Counter(keys) == counts if epoch < last[c] else Counter(keys) <= counts


def test_a_mix_starts_anywhere_and_numbers_are_its_own(mixed):
    stream = Stream(mixed, batch=5, seed=1, n_open=2)
    batches = [stream.batch(step) for step in range(30)]
    assert [Stream(mixed, batch=5, seed=1, n_open=2).batch(step) for step in (29, 4)] == [batches[29], batches[4]]
    flat = [s for batch in batches for s in batch]
    assert len({s.number for s in flat}) == len(flat)
    assert [stream.sample(s.number) for s in flat] == flat
    for a, b in zip(flat[:40], map(stream.after, flat[:40]), strict=True):
        assert (b.component, b.number // 3) == (a.component, a.number // 3 + 1)
    alone = [batch for batch in batches if batch[0].component == 0]
    assert alone and all({s.component for s in batch} == {0} for batch in alone)


def test_totals_of_a_mix_travel(mixed, monkeypatch):
    spec, ids = read_mix(mixed), list_shards(mixed)
    totals = shard_totals(mixed, ids, spec)
    assert totals.T.tolist() == [[0, 0, 0, 3, 1], [3, 1, 0, 2, 2], [8, 3, 0, 5, 4]]
    whole = Stream(mixed, batch=2)
    monkeypatch.setattr("training.stream.shard_totals", None)
    monkeypatch.setattr("training.stream.read_mix", None)
    assert Stream(mixed, batch=2, totals=totals, mix=spec).batch(7) == whole.batch(7)
    with pytest.raises(ValueError, match=r"totals must have the shape \(5, 3\): got \(5,\)"):
        Stream(mixed, batch=2, totals=totals[:, 0], mix=spec)


def test_shards_that_are_not_of_their_mix_are_refused(mixed, make_shards, add_mix, tmp_path):
    write_mix(MIX_FILE, spec_of(["few", "gone"], {}, {"few": 0.5, "gone": 0.5}), mixed)
    with pytest.raises(ValueError, match="an index must have the column count:gone: got none in part-0000000"):
        Stream(mixed, batch=2)
    for name, count, words in (("none", 0, "sample of b: got none"), ("less", -1, "counts must be at least 0: got -1")):
        shards = make_shards(tmp_path / name, [[("k", b"x")]])
        add_mix(shards, {"a": {"k": 1}, "b": {"k": count}}, {}, {"a": 0.5, "b": 0.5})
        with pytest.raises(ValueError, match=words):
            Stream(shards, batch=2)


def test_a_small_component_is_not_read_again_for_each_of_its_epochs(make_shards, add_mix, tmp_path, monkeypatch):
    """A batch goes through a component of 3 images dozens of times: its index is read once for every open shard."""
    samples = [[(f"s{i}n{j}", b"x") for j in range(30)] for i in range(4)]
    few = {f"s{i}n0": 1 for i in range(3)}
    everything = {key: 1 for shard in samples for key, _ in shard}
    shards = add_mix(
        make_shards(tmp_path / "m", samples), {"few": few, "all": everything}, {}, {"few": 0.5, "all": 0.5}
    )
    stream = Stream(shards, batch=256, seed=0, n_open=2)
    read = []
    monkeypatch.setattr(
        "training.stream.read_index", lambda *args, real=read_index: read.append(args[1]) or real(*args)
    )
    stream.batch(0)
    n_groups_of_all = -(-128 // 60) + 1
    assert len(read) <= 3 * 2 + 2 * n_groups_of_all
