"""``cluster`` stops after any step of k-means and goes on from there."""

import hashlib

import numpy as np
import pytest

from curation import kmeans
from curation.embeddings import embedding_parts, read_embeddings
from curation.execute import Here, SerialExecutor
from curation.hierarchy import ClusterConfig, fit_level, rows_below
from curation.kmeans import ArrayRows, State, assign_part, weighted
from curation.nearest import Bounds
from curation.store import Location
from pipelines.executor import LocalExecutor
from pipelines.stage import Output
from pipelines.stages.cluster import run
from pipelines.stages.trails import FileLevel, FileMemory, FileTrail

CONFIG = ClusterConfig(n_clusters=(40, 6), n_resamples=2, resample_size=(3, 3), tol=0, n_iter=8)


class Stopped(Exception):
    """What ends a run here."""


def cluster(tiny, folder) -> dict[str, str]:
    """Run the stage; every file it leaves, by checksum, but what is in scratch."""
    out = Output(Location(str(folder)), LocalExecutor())
    run(CONFIG, {"embeddings": tiny.artifact("web_vec")}, out, LocalExecutor())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.parquet")}


@pytest.fixture
def counted(monkeypatch):
    """The number of steps so far."""
    steps, step = [], kmeans.lloyd_step
    monkeypatch.setattr(kmeans, "lloyd_step", lambda *args: steps.append(1) or step(*args))
    return steps


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
    for _ in range(1000):
        try:
            found = cluster(tiny, tmp_path / "disturbed")
        except Stopped:
            continue
        break
    assert found == expected
    assert len(counted) == n_steps  # none was done twice
    assert n_saved == n_steps + 6  # six runs were seeded


def test_lost_or_foreign_bounds_change_no_byte(tiny, tmp_path, monkeypatch):
    expected = cluster(tiny, tmp_path / "undisturbed")
    load, rng = FileMemory.load, np.random.default_rng(0)

    def load_some(memory, tag):
        return None if rng.random() < 0.5 else load(memory, tag)

    monkeypatch.setattr(FileMemory, "load", load_some)
    assert cluster(tiny, tmp_path / "forgetful") == expected
    assert list((tmp_path / "forgetful" / "scratch").rglob("bounds-*"))


def test_bounds_come_back_under_their_tag_alone(tmp_path):
    memory = FileMemory(Location(str(tmp_path / "bounds")))
    assert memory.load(b"a" * 32) is None
    bounds = Bounds(np.array([3, 1], np.int32), np.array([0.5, 2], np.float32))
    memory.save(b"a" * 32, bounds)
    assert memory.load(b"b" * 32) is None
    for held, saved in zip(memory.load(b"a" * 32), bounds, strict=True):
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
