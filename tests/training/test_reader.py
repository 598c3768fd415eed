from pathlib import Path

import numpy as np
import pytest

import training.reader as module
from training.reader import Reader
from training.stream import Stream, read_images


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
    with pytest.raises(FileNotFoundError, match=r"shard-0000002\.tar"):
        list(Reader(shards)(samples))
