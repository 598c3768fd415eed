import io
import os
import signal
import time
from collections import deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from curation.mix import read_mix
from curation.store import Location, client
from embedding.decode import decode_rgb
from training.augment import AugmentConfig, crop_rng, multi_crop
from training.augment_torch import batched_crops
from training.loader import LoaderPlan, WorkerDied, batches
from training.stream import Stream, list_shards, shard_totals


def png(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def plan_of(shards, **fields):
    mix = read_mix(shards)
    totals = shard_totals(shards, list_shards(shards), mix)
    values = {"batch": 5, "seed": 2, "n_open": 2, "augment": AugmentConfig(), "global_size": 16, "local_size": 8,
              "n_local": 3} | fields  # fmt: skip
    return LoaderPlan(shards=shards, totals=totals, mix=mix, **values)


@pytest.fixture
def shards(make_shards, tmp_path):
    return make_shards(tmp_path, [[(f"{i}-{j}", png(10 * i + j)) for j in range(6)] for i in range(3)])


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.step, x.keys, x.bad, x.components) == (y.step, y.keys, y.bad, y.components)
        arrays = [(batch.globals, batch.locals, *(batch.pictures or ())) for batch in (x, y)]
        for one, other in zip(*arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_batch_is_the_crops_of_its_samples(shards):
    plan = plan_of(shards)
    (batch,) = batches(plan, 4, 5)
    samples = Stream(shards, batch=5, seed=2, n_open=2).batch(4)
    assert (batch.step, batch.keys, batch.bad) == (4, [s.key for s in samples], [])
    assert batch.components == [0] * 5
    assert batch.globals.shape == (2, 5, 16, 16, 3)
    assert batch.locals.shape == (3, 5, 8, 8, 3)
    for slot, s in enumerate(samples):
        shard, row = map(int, s.key.split("-"))
        image = decode_rgb(png(10 * shard + row))
        crops = multi_crop(image, AugmentConfig(), (16, 8), 3, crop_rng(2, s.epoch, s.number))
        np.testing.assert_array_equal(batch.globals[:, slot], crops.globals)
        np.testing.assert_array_equal(batch.locals[:, slot], crops.locals)


def test_workers_change_no_byte_and_a_late_start_neither(shards):
    plan = plan_of(shards)
    here = list(batches(plan, 0, 9))
    assert_same(list(batches(plan, 0, 9, n_workers=1, prefetch=1)), here)
    assert_same(list(batches(plan, 6, 9, n_workers=2, prefetch=3)), here[6:])
    assert list(batches(plan, 3, 3, n_workers=2)) == []


@pytest.mark.parametrize("cuts", [(0, 2, 8), (0, 1, 7, 8)])
def test_slots_of_several_processes_make_the_whole_batch(mixed, cuts):
    """Also of a mix, and where a sample is bad."""
    plan = plan_of(mixed, batch=8)
    whole = list(batches(plan, 0, 12))
    parts = [list(batches(replace(plan, slots=slots), 0, 12)) for slots in pairwise(cuts)]
    for batch, *of_step in zip(whole, *parts, strict=True):
        assert [key for part in of_step for key in part.keys] == batch.keys
        assert [bad for part in of_step for bad in part.bad] == batch.bad
        assert [c for part in of_step for c in part.components] == batch.components
        np.testing.assert_array_equal(np.concatenate([part.globals for part in of_step], axis=1), batch.globals)
        np.testing.assert_array_equal(np.concatenate([part.locals for part in of_step], axis=1), batch.locals)
    assert any(batch.bad for batch in whole)


def test_pictures_become_the_crops_of_the_workers(mixed):
    plan = plan_of(mixed, batch=8, global_size=24, local_size=12)
    device = replace(plan, crops_on="device")
    left = list(batches(device, 0, 6))
    for batch, crops in zip(left, batches(plan, 0, 6), strict=True):
        assert (batch.globals, batch.locals) == (None, None)
        assert (batch.keys, batch.bad, batch.components) == (crops.keys, crops.bad, crops.components)
        assert batch.pictures.sizes.tolist() == [[20, 24]] * 8
        made = batched_crops(*batch.pictures, (24, 12))
        for a, b in zip(made, (crops.globals, crops.locals), strict=True):
            difference = np.abs(a.numpy().astype(int) - b)
            assert difference.max() <= 1
            assert difference.mean() < 0.01
    assert_same(list(batches(device, 0, 6, n_workers=2, prefetch=1)), left)
    (part,) = batches(replace(device, slots=(2, 5)), 3, 4)
    np.testing.assert_array_equal(part.pictures.drawn, left[3].pictures.drawn[:, 2:5])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots": (0, 6)}, r"slots must be a range within 0\.\.5: got 0\.\.6"),
        ({"slots": (2, 2)}, r"slots must be a range within 0\.\.5: got 2\.\.2"),
        ({"crops_on": "gpu"}, "crops_on must be 'worker' or 'device': got 'gpu'"),
    ],
)
def test_plans_that_cannot_be_are_refused(shards, fields, words):
    with pytest.raises(ValueError, match=words):
        plan_of(shards, **fields)


def test_batches_are_the_same_where_memory_cannot_be_shared(shards, monkeypatch):
    plan = plan_of(shards)
    expected = list(batches(plan, 0, 4))
    assert_same(list(batches(plan, 0, 4, n_workers=1)), expected)
    monkeypatch.setattr("training.loader.open_memory", lambda: None)
    assert_same(list(batches(plan, 0, 4, n_workers=1)), expected)


def test_a_bad_sample_is_counted_and_replaced_by_the_next_of_the_stream(make_shards, tmp_path):
    samples = [(f"{i}", png(i)) for i in range(8)]
    samples[3], samples[5] = ("3", b"no image"), ("5", png(5)[:60])
    shards = make_shards(tmp_path, [samples])
    plan = plan_of(shards, batch=8, n_open=1)
    stream = Stream(shards, batch=8, seed=2, n_open=1)
    order = [stream.sample(i) for i in range(40)]
    for step, batch in enumerate(batches(plan, 0, 3)):
        bad = []
        for slot, s in enumerate(order[8 * step : 8 * step + 8]):
            number = s.number
            while order[number].key in "35":
                bad.append(order[number].key)
                number += 1
            assert batch.keys[slot] == order[number].key
            image = decode_rgb(png(int(order[number].key)))
            expected = multi_crop(image, plan.augment, (16, 8), 3, crop_rng(2, s.epoch, s.number))
            np.testing.assert_array_equal(batch.globals[:, slot], expected.globals)
        assert [b.key for b in batch.bad] == bad
        assert {b.reason for b in batch.bad} == {"undecodable"}


@pytest.fixture
def mixed(make_shards, add_mix, tmp_path):
    """One component with even, one with odd names; the broken image is odd."""
    samples = [[(f"{i}-{j}", png(10 * i + j)) for j in range(6)] for i in range(3)]
    samples[1][3] = ("1-3", b"no image")
    keys = [key for shard in samples for key, _ in shard]
    counts = {name: {key: 1 for key in keys if int(key[-1]) % 2 == odd} for odd, name in enumerate(("even", "odd"))}
    return add_mix(make_shards(tmp_path / "mixed", samples), counts, {"odd": 0.25}, {"even": 0.75, "odd": 0.25})


def test_batches_of_a_mix_are_the_same_from_any_worker(mixed):
    plan = plan_of(mixed, batch=8)
    here = list(batches(plan, 0, 12))
    for batch in here:
        assert [int(key[-1]) % 2 for key in batch.keys] == batch.components  # the replaced one too
        assert sum(batch.components) in (2, 8)
    assert {b.key for batch in here for b in batch.bad} == {"1-3"}
    assert_same(list(batches(plan, 0, 12, n_workers=1, prefetch=2)), here)
    assert_same(list(batches(plan, 7, 12, n_workers=2, prefetch=1)), here[7:])


def test_crops_of_a_mix_are_keyed_by_component_and_draw(mixed):
    plan = plan_of(mixed, batch=8)
    samples = Stream(mixed, batch=8, seed=2, n_open=2).batch(3)
    (batch,) = batches(plan, 3, 4)
    for slot, (s, key) in enumerate(zip(samples, batch.keys, strict=True)):
        shard, row = map(int, key.split("-"))
        crops = multi_crop(
            decode_rgb(png(10 * shard + row)), AugmentConfig(), (16, 8), 3, crop_rng(2, s.epoch, s.number)
        )
        np.testing.assert_array_equal(batch.globals[:, slot], crops.globals)


def test_shards_on_s3_give_the_same_bytes(shards, tmp_path, monkeypatch):
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        for name, value in {"ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "ACCESS_KEY_ID": "a",
                            "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        client.cache_clear()
        client().create_bucket(Bucket="pool")
        for entry in shards.list():
            (Location("s3://pool/train") / entry.name).write((shards / entry.name).read())
        here = list(batches(plan_of(shards), 0, 4))
        assert_same(list(batches(plan_of(Location("s3://pool/train")), 0, 4)), here)
    finally:
        client.cache_clear()
        server.stop()


def test_nothing_decodable_is_one_clear_error(make_shards, tmp_path):
    plan = plan_of(make_shards(tmp_path, [[("a", b"x"), ("b", b"y")]]))
    with pytest.raises(ValueError, match="one of 256 samples in a row must decode: got none"):
        list(batches(plan, 0, 1))
    with pytest.raises(ValueError, match="one of 256 samples in a row must decode: got none"):
        list(batches(plan, 0, 1, n_workers=1))


def test_a_lost_shard_is_one_clear_error(shards, tmp_path):
    plan = plan_of(shards)
    (tmp_path / "shard-0000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-0000001\.tar"):
        list(batches(plan, 0, 5))


def status(pid):
    """State letter, parent and command line of a process; None when it is gone."""
    folder = Path("/proc") / str(pid)
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1]), (folder / "cmdline").read_text()
    except OSError:
        return None


def children():
    """Live worker processes of this process (the resource tracker is none)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        state, parent, command = status(folder.name) or ("Z", 0, "")
        if state != "Z" and parent == os.getpid() and "spawn_main" in command:
            found.append(int(folder.name))
    return found


def opened():
    """Pieces of memory between processes that this one holds."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("memfd:openlvd" in link for link in links)


def test_a_killed_worker_is_one_clear_error_and_leaves_nobody(shards):
    before = opened()
    stream = batches(plan_of(shards), 0, 10_000, n_workers=2, prefetch=1)
    next(stream)
    workers = children()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="all 2 loader workers must live: got one that was killed"):
        deque(stream, maxlen=0)  # holds no batch
    assert children() == []
    assert opened() == before


def test_closing_early_ends_the_workers(shards):
    before = opened()
    stream = batches(plan_of(shards), 0, 10_000, n_workers=1, prefetch=2)
    first = next(stream)
    kept = first.globals.copy()
    stream.close()
    assert children() == []
    np.testing.assert_array_equal(first.globals, kept)  # it lies in memory of its own
    del first
    assert opened() == before


def test_workers_end_when_their_parent_is_killed(shards, run_python):
    code = """
        import os, sys
        from curation.store import Location, client
        sys.path.insert(0, sys.argv[2])
        from test_loader import batches, children, plan_of
        stream = batches(plan_of(Location(sys.argv[1])), 0, 10_000, n_workers=1)
        next(stream)
        print(*children(), flush=True)
        os.kill(os.getpid(), 9)
    """
    process = run_python(code, shards.uri, Path(__file__).parent)
    out, err = process.communicate(timeout=60)
    workers = [int(p) for p in out.split()]
    assert len(workers) == 1, err
    deadline = time.monotonic() + 20
    while any((status(p) or "Z")[0] != "Z" for p in workers):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def test_torch_is_not_loaded_in_workers(run_python):
    process = run_python("import sys, training.loader; print('torch' in sys.modules)")
    assert process.communicate(timeout=60)[0].strip() == "False"


def test_a_location_travels(shards):
    assert plan_of(shards).shards == Location(shards.uri)
