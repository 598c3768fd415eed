import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import training.reader as module
from curation import s3 as requests
from curation.artifact import part_name
from curation.shards import TarFacts, with_tar
from curation.store import Location
from training.reader import Reader
from training.stream import ShardGoneError, Stream, read_images


def opened():
    """Tars that this process holds open."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.endswith(".tar") for link in links)


@pytest.fixture
def shards(make_shards, tmp_path):
    rng = np.random.default_rng(0)
    return make_shards(tmp_path, [[(f"{i}-{j}", rng.bytes(int(rng.integers(0, 3000)))) for j in range(5)]
                                  for i in range(7)])  # fmt: skip


@pytest.mark.parametrize("most", [1, 3, 64])
def test_the_bytes_are_those_of_the_stream_however_many_tars_may_be_open(shards, monkeypatch, most):
    monkeypatch.setattr(module, "_OPEN", most)
    read, stream = Reader(shards), Stream(shards, batch=6, n_open=4)
    for step in range(12):
        samples = stream.batch(step)
        assert list(read(samples)) == read_images(shards, samples)
        assert 1 <= opened() <= min(most, 7)
    del read
    assert opened() == 0


def test_what_is_cut_off_is_short_and_what_is_gone_an_error(shards, tmp_path):
    samples = sorted(Stream(shards, batch=35).batch(0))
    last = samples[-1]
    whole = list(Reader(shards)(samples))
    path = tmp_path / f"shard-{last.shard:07d}.tar"
    path.write_bytes(path.read_bytes()[: last.offset + 10])
    assert list(Reader(shards)(samples)) == [*whole[:-1], whole[-1][:10]]
    (tmp_path / "shard-0000002.tar").unlink()
    with pytest.raises(ShardGoneError, match=r"shard-0000002\.tar must be the shard that its index is of: it is gone"):
        list(Reader(shards)(samples))


@pytest.fixture
def apart(shards, tmp_path, on_s3):
    """The same, their index on this disk and the tars on S3."""
    (tmp_path / "index").mkdir()
    for i in range(7):
        data = (tmp_path / f"shard-{i:07d}.tar").read_bytes()
        (on_s3 / f"{i}.tar").write(data)
        facts = TarFacts(f"{i}.tar", len(data), hashlib.sha256(data).hexdigest())
        pq.write_table(with_tar(pq.read_table(tmp_path / part_name(i)), facts), tmp_path / "index" / part_name(i))
    (tmp_path / "index" / "manifest.json").write_text(json.dumps({"format": 1, "locations": {"source": on_s3.uri}}))
    return Location(str(tmp_path / "index"))


def test_of_tars_on_s3_a_batch_is_many_requests_at_a_time_wherever_the_index_is(shards, apart, monkeypatch):
    """None is answered before all are asked; what comes keeps its order."""
    stream = Stream(apart, batch=12)
    first, second = stream.batch(0), stream.batch(1)
    here = [list(Reader(shards)(samples)) for samples in (first, second)]
    list(Reader(apart)(stream.batch(2) + first + second))  # the tars are looked at
    together, real = threading.Barrier(12, timeout=30), requests.read
    monkeypatch.setattr(requests, "read", lambda *args: together.wait() >= 0 and real(*args))
    assert list(Reader(apart)(first)) == here[0]
    assert read_images(apart, second) == here[1]


def test_a_tar_that_is_deleted_on_s3_is_one_clear_error(apart, on_s3):
    samples = sorted(Stream(apart, batch=35).batch(0))
    read = Reader(apart)
    list(read(samples))
    (on_s3 / "2.tar").delete()
    for look in (lambda: list(read(samples)), lambda: read_images(apart, samples[10:11])):
        with pytest.raises(ShardGoneError, match=r"2\.tar must be the shard that its index is of: it is gone"):
            look()


def test_a_tar_on_s3_is_looked_at_by_one_thread(apart, monkeypatch):
    looked = []
    entry = Location.entry
    monkeypatch.setattr(Location, "entry", lambda self: looked.append(self.name) or entry(self))
    stream = Stream(apart, batch=35)
    looked.clear()
    list(Reader(apart)(stream.batch(0)))
    read_images(apart, stream.batch(1))
    assert sorted(looked) == [f"{i}.tar" for i in range(7)]
