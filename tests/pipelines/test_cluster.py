"""``cluster`` stops after any step of k-means and goes on from there."""

import hashlib

import numpy as np
import pytest

from curation import kmeans, labelling
from curation.embeddings import embedding_parts, read_embeddings
from curation.execute import Device, Here, SerialExecutor
from curation.hierarchy import ClusterConfig, fit_level, rows_below
from curation.kmeans import State
from curation.labelling import assign_part
from curation.nearest import Bounds
from curation.rows import ArrayRows, weighted
from curation.store import Location
from pipelines.errors import TaskError
from pipelines.executor import LocalExecutor
from pipelines.stage import Output
from pipelines.stages import cluster as module
from pipelines.stages.cluster import run
from pipelines.stages.trails import FileLevel, FileMemory, FileTrail

CONFIG = ClusterConfig(n_clusters=(40, 6), n_resamples=2, resample_size=(3, 3), tol=0, n_iter=8)


class Stopped(Exception):
    """What ends a run here."""


def cluster(tiny, folder, executor=None, config=CONFIG) -> dict[str, str]:
    """Run the stage; every file it leaves, by checksum, but what is in scratch."""
    executor = executor or LocalExecutor()
    run(config, {"embeddings": tiny.artifact("web_vec")}, Output(Location(str(folder)), executor), executor)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.parquet")}


@pytest.fixture
def counted(monkeypatch):
    """The number of steps so far."""
    steps, step = [], kmeans.lloyd_step
    monkeypatch.setattr(kmeans, "lloyd_step", lambda *args: steps.append(1) or step(*args))
    return steps


def until_done(tiny, out):
    """What ``cluster`` leaves when it is begun again after every stop."""
    for _ in range(1000):
        try:
            return cluster(tiny, out)
        except Stopped:
            continue
    raise AssertionError("it stopped a thousand times")


def test_it_goes_on_after_every_step_with_the_same_bytes(tiny, tmp_path, monkeypatch, counted):
    expected = cluster(tiny, tmp_path / "undisturbed")
    n_steps = len(counted)
    assert len(expected) >= 8 and n_steps > 12
    counted.clear()
    save, n_saved = FileTrail.save, 0

    def save_and_stop(trail, state):
        nonlocal n_saved
        save(trail, state)
        n_saved += 1
        raise Stopped

    monkeypatch.setattr(FileTrail, "save", save_and_stop)
    found = until_done(tiny, tmp_path / "disturbed")
    assert found == expected
    assert len(counted) == n_steps  # none was done twice
    assert n_saved == n_steps + 6  # six runs were seeded


def test_lost_or_foreign_bounds_change_no_byte(tiny, tmp_path, monkeypatch):
    expected = cluster(tiny, tmp_path / "undisturbed")
    load, rng = FileMemory.load, np.random.default_rng(0)

    def load_some(memory):
        return None if rng.random() < 0.5 else load(memory)

    monkeypatch.setattr(FileMemory, "load", load_some)
    assert cluster(tiny, tmp_path / "forgetful") == expected
    assert list((tmp_path / "forgetful" / "scratch").rglob("bounds-*"))


def test_bounds_come_back_with_their_tag(tmp_path):
    memory = FileMemory(Location(str(tmp_path / "bounds")))
    assert memory.load() is None
    bounds = Bounds(np.array([3, 1], np.int32), np.array([0.5, 2], np.float32))
    memory.save(b"a" * 32, bounds)
    tag, found = memory.load()
    assert tag == b"a" * 32
    for held, saved in zip(found, bounds, strict=True):
        np.testing.assert_array_equal(held, saved)
        assert held.dtype == saved.dtype


def test_a_state_comes_back_bit_by_bit(tmp_path):
    trail = FileLevel(Location(str(tmp_path))).run(3)
    assert trail.load() is None
    c = np.random.default_rng(0).normal(size=(4, 2)).astype("f4")
    for state in (State(c), State(c, c + 1, 7, 1 / 3, True)):
        trail.save(state)
        found = trail.load()
        np.testing.assert_array_equal(found.centroids, c)
        assert (found.before is None) == (state.before is None) and found[2:] == state[2:]


def test_the_stage_is_the_kernel_with_every_option(tiny, tmp_path):
    """Level by level on arrays with the rows of every part; another number of runs a level."""
    config = ClusterConfig(
        n_clusters=(40, 6, 2), n_resamples=(2, 0, 1), resample_size=(3, 3, 2), resample="random", weights="size",
        metric="cosine", n_iter=8, seed=5,
    )  # fmt: skip
    embeddings = tiny.artifact("web_vec")
    out = Output(Location(str(tmp_path)), LocalExecutor())
    run(config, {"embeddings": embeddings}, out, LocalExecutor())
    parts, counts = [ArrayRows(part.read()[1]) for part in embedding_parts(embeddings) if part.n_rows], None
    n_rows = sum(part.n_rows for part in parts)
    for t, k in enumerate(config.n_clusters):
        rows = parts if counts is None else weighted(parts, Here(counts))
        how = {"seed_key": (5, t), "executor": SerialExecutor(), "how": config.lloyd, "pick": "random"}
        expected = fit_level(rows, k, config.runs[t], config.sizes[t], **how)
        found = read_embeddings(Location(str(tmp_path / f"centroids-{t}-0000000.parquet")))[1]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        counts = rows_below(np.concatenate([assign_part(part, found)[0] for part in parts]), k, counts)
        assert counts.sum() == n_rows
        parts = [ArrayRows(found)]


GPU = Device("cpu:0", 0.25)  # what runs on a GPU, on this CPU


@pytest.fixture
def by_torch(monkeypatch):
    """All that would be done on GPUs."""
    monkeypatch.setattr(module, "device_of", lambda executor: GPU)


class WithGpus(LocalExecutor):
    """Workers with GPUs that label; tasks without add up, and sums are merged where they were made."""

    def __post_init__(self):
        super().__post_init__()
        self.on_gpus, self.work = [], []

    def map_workers(self, make, items, gpus=0):
        assert gpus == GPU.gpus and make.func is labelling.labeller
        self.on_gpus += [member.part.n_rows for load in items for member in load]
        return super().map_workers(make, items, gpus)

    def map(self, fn, items, shared=None, gpus=0):
        assert not gpus
        return super().map(fn, items, shared, gpus)

    def reduce(self, fn, items, merge, shared=None, fan_in=16, gpus=0):
        assert not gpus
        return super().reduce(fn, items, merge, shared, fan_in, gpus)


OPTIONS = ClusterConfig(
    n_clusters=(40, 6, 2), n_resamples=(2, 0, 1), resample_size=(3, 3, 2), resample="random", weights="size",
    metric="cosine", n_iter=8, seed=5,
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, OPTIONS])
def test_gpus_leave_the_bytes_of_a_cpu(tiny, tmp_path, counted, by_torch, monkeypatch, config):
    """Where no row is as near to two centroids as short numbers can tell."""
    monkeypatch.setattr(module, "device_of", lambda executor: Device("cpu", 0))
    expected = cluster(tiny, tmp_path / "cpu", config=config)
    n_steps = len(counted)
    monkeypatch.setattr(module, "device_of", lambda executor: GPU)
    monkeypatch.setattr(labelling, "assign", None)  # nor do tasks without a GPU compare anything
    executor = WithGpus()
    assert cluster(tiny, tmp_path / "gpu", executor, config) == expected
    assert len(counted) == 2 * n_steps
    n_rows = sum(part.n_rows for part in embedding_parts(tiny.artifact("web_vec")))
    assert sum(executor.on_gpus) > n_rows * 10 and 0 not in executor.on_gpus


def test_the_log_says_who_labelled(tiny, tmp_path, by_torch, monkeypatch):
    outs = [Output(Location(str(tmp_path / name)), LocalExecutor()) for name in ("gpu", "cpu")]
    for out, device in zip(outs, (GPU, Device("cpu", 0)), strict=True):
        monkeypatch.setattr(module, "device_of", lambda executor, device=device: device)
        run(CONFIG, {"embeddings": tiny.artifact("web_vec")}, out, LocalExecutor())
    n_rows = sum(part.n_rows for part in embedding_parts(tiny.artifact("web_vec")))
    assert outs[0].log == {"assign_gpus": 0.25, "rows_by_torch_gpu": n_rows + 40}
    assert outs[1].log == {"assign_gpus": 0, "rows_by_numba_cpu": n_rows + 40}


def test_gpus_on_ray_leave_the_same_bytes(tiny, tmp_path, monkeypatch, ray_executor):
    monkeypatch.setattr(module, "device_of", lambda executor: Device("cpu:0", 0))  # Ray has none to give
    config = ClusterConfig(n_clusters=(40, 6), n_resamples=(2, 0), resample_size=(3, 3), n_iter=2)
    expected = cluster(tiny, tmp_path / "serial", config=config)
    assert cluster(tiny, tmp_path / "ray", ray_executor, config) == expected


def test_with_gpus_it_goes_on_after_any_stop_with_the_same_bytes(tiny, tmp_path, monkeypatch, by_torch):
    """After every state, and after every other memory that labels are left in: also in the middle of a load."""
    expected = cluster(tiny, tmp_path / "undisturbed")
    save, remember, stops = FileTrail.save, FileMemory.save, []

    def save_and_stop(trail, state):
        save(trail, state)
        stops.append("state")
        raise Stopped

    def remember_and_stop(memory, tag, bounds):
        remember(memory, tag, bounds)
        if (memory, tag) not in stops and memory.location.name[-1] in "13579":
            stops.append((memory, tag))
            raise Stopped

    monkeypatch.setattr(FileTrail, "save", save_and_stop)
    monkeypatch.setattr(FileMemory, "save", remember_and_stop)
    found = until_done(tiny, tmp_path / "disturbed")
    assert found == expected
    assert stops.count("state") > 12 and len(set(stops)) > 24


def test_labels_that_are_lost_are_missed_and_made_again(tiny, tmp_path, monkeypatch, by_torch):
    expected = cluster(tiny, tmp_path / "undisturbed")
    load, rng = FileMemory.load, np.random.default_rng(0)

    def lose_some(memory):
        if rng.random() < 0.02:
            memory.location.path.unlink(missing_ok=True)
        return load(memory)

    monkeypatch.setattr(FileMemory, "load", lose_some)
    n_lost = 0
    for _ in range(1000):
        try:
            found = cluster(tiny, tmp_path / "forgetful")
        except TaskError as e:
            assert "labels made on cpu:0 must be in the memory of their part: they were lost" in str(e)
            n_lost += 1
            continue
        break
    assert found == expected and n_lost > 3
