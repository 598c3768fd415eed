"""A level of ``cluster`` in two steps, by ``n_splits``."""

import hashlib

import numpy as np
import pytest

from curation import labelling
from curation.artifact import Artifact, finish, part_name, read_table
from curation.embeddings import embedding_parts, read_embeddings, write_embeddings
from curation.execute import CPU, Device, SerialExecutor
from curation.hierarchy import ClusterConfig, HeldLevel, fit_level
from curation.kmeans import fit
from curation.labelling import assign_part
from curation.nearest import nearest_centroid
from curation.rows import ArrayRows
from curation.split import split_shares
from curation.store import Location
from pipelines.executor import LocalExecutor
from pipelines.stage import Output
from pipelines.stages import cluster as stage
from pipelines.stages import split as module
from pipelines.stages.cluster import run
from pipelines.stages.trails import FileTrail

CONFIG = ClusterConfig(n_clusters=(40, 6), n_splits=(5, 1), n_resamples=2, resample_size=(3, 3), tol=0, n_iter=8)


class Stopped(Exception):
    """What ends a run here."""


def cluster(tiny, folder, config=CONFIG, executor=None) -> Output:
    """Run the stage."""
    executor = executor or LocalExecutor()
    out = Output(Location(str(folder)), executor)
    run(config, {"embeddings": tiny.artifact("web_vec")}, out, executor)
    return out


def digests(folder) -> dict[str, str]:
    """Every file that the stage leaves, but what is in scratch."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.parquet")}


def rows_of(tiny) -> list[np.ndarray]:
    """The unit rows of every part."""
    return [part.read()[1] for part in embedding_parts(tiny.artifact("web_vec"))]


def labels_of(folder, n_parts) -> tuple[np.ndarray, np.ndarray]:
    """Labels and squared distances of all rows."""
    tables = [read_table(Location(str(folder)) / part_name(i)) for i in range(n_parts)]
    return tuple(np.concatenate([t[name].to_numpy() for t in tables]) for name in ("label", "sq_distance"))


def centroids_of(folder, level=0) -> np.ndarray:
    """All centroids of a level."""
    paths = sorted(folder.glob(f"centroids-{level}-*.parquet"))
    return np.concatenate([read_embeddings(Location(str(path)))[1] for path in paths])


def test_it_is_a_k_means_in_every_cluster_of_a_first_one(tiny, tmp_path):
    out = cluster(tiny, tmp_path)
    parts = rows_of(tiny)
    x = np.concatenate(parts)
    state = fit([ArrayRows(part) for part in parts if len(part)], 8, (0, 0, 0), SerialExecutor(), CONFIG.lloyd)
    first, squares = nearest_centroid(x, state.centroids)
    shares = split_shares(np.bincount(first, minlength=8), np.bincount(first, squares, 8), 40)
    assert shares.sum() == 40
    labels, sq_distance = labels_of(tmp_path, len(parts))
    expected, offset = [], 0
    for c, k in enumerate(shares.tolist()):
        rows = ArrayRows(x[first == c])
        found = fit_level(
            [rows], k, 2, 3, seed_key=(0, 0, 1, c), executor=SerialExecutor(), how=CONFIG.lloyd, trail=HeldLevel()
        )
        near, distances = assign_part(rows, found)
        np.testing.assert_array_equal(labels[first == c], near + offset)
        np.testing.assert_array_equal(sq_distance[first == c], distances)
        expected.append(found)
        offset += k
    np.testing.assert_array_equal(centroids_of(tmp_path), np.concatenate(expected))
    assert out.facts["n_clusters"] == [40, 6]
    exact = nearest_centroid(x, centroids_of(tmp_path))[1]
    assert out.facts["agreement"] == {"0": pytest.approx((sq_distance <= exact).mean())}  # fewer rows than are sampled
    assert len(centroids_of(tmp_path, 1)) == 6


def test_clusters_too_large_for_a_task_are_fitted_by_all_workers(tiny, tmp_path, monkeypatch):
    cluster(tiny, tmp_path / "small")
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    monkeypatch.setattr(module, "ALONE_BYTES", 1)
    cluster(tiny, tmp_path / "large")
    assert list((tmp_path / "large" / "scratch" / "level-0").glob("large-*"))
    x, n_parts = np.concatenate(rows_of(tiny)), len(rows_of(tiny))
    files = sorted((tmp_path / "large" / "scratch" / "level-0" / "first").iterdir())
    records = np.concatenate([np.frombuffer(file.read_bytes(), module.FIRST_LABEL) for file in files])
    sizes, squares = np.bincount(records["label"]), np.bincount(records["label"], records["sq_distance"])
    offsets = np.concatenate([[0], np.cumsum(split_shares(sizes, squares, 40))])
    for name in ("small", "large"):
        labels, distances = labels_of(tmp_path / name, n_parts)
        centroids = centroids_of(tmp_path / name)
        for c in range(8):
            own = slice(*offsets[[c, c + 1]])
            near, squared = nearest_centroid(x[records["label"] == c], centroids[own])
            np.testing.assert_array_equal(labels[records["label"] == c], near + own.start)
            np.testing.assert_array_equal(distances[records["label"] == c], squared)
    small, large = (labels_of(tmp_path / name, n_parts)[1].sum() for name in ("small", "large"))
    assert large == pytest.approx(small, rel=0.1)  # other draws, as in other parts


def test_rows_in_a_file_change_no_byte(tiny, tmp_path, monkeypatch):
    cluster(tiny, tmp_path / "memory")
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    memmap, in_files = np.memmap, []
    monkeypatch.setattr(np, "memmap", lambda *args, **kwargs: in_files.append(args) or memmap(*args, **kwargs))
    cluster(tiny, tmp_path / "file")
    assert digests(tmp_path / "file") == digests(tmp_path / "memory")
    assert len(in_files) == 8


class WithGpus(LocalExecutor):
    """Notes what is done by workers with GPUs."""

    def __post_init__(self):
        super().__post_init__()
        self.on_gpus = set()

    def map_workers(self, make, items, gpus=0):
        assert gpus == GPU.gpus
        self.on_gpus.add(make.func.__name__)
        return super().map_workers(make, items, gpus)

    def map(self, fn, items, shared=None, gpus=0):
        self.on_gpus |= {fn.__name__} if gpus else set()
        return super().map(fn, items, shared, gpus)

    def reduce(self, fn, items, merge, shared=None, fan_in=16, gpus=0):
        assert not gpus
        return super().reduce(fn, items, merge, shared, fan_in, gpus)


GPU = Device("cpu:0", 0.5)  # what runs on a GPU, on this CPU


@pytest.mark.parametrize("most", [1 << 28, 1])
def test_gpus_leave_the_bytes_of_a_cpu(tiny, tmp_path, monkeypatch, most):
    """Where no row is as near to two centroids as short numbers can tell."""
    monkeypatch.setattr(module, "PIECE_BYTES", most)
    monkeypatch.setattr(module, "ALONE_BYTES", most)
    cluster(tiny, tmp_path / "cpu")
    monkeypatch.setattr(stage, "device_of", lambda executor: GPU)
    monkeypatch.setattr(labelling, "assign", None)  # nothing is compared otherwise
    executor = WithGpus()
    out = cluster(tiny, tmp_path / "gpu", executor=executor)
    assert digests(tmp_path / "gpu") == digests(tmp_path / "cpu")
    assert executor.on_gpus == {"labeller", "split_piece"} and out.log["assign_gpus"] == 0.5
    assert set(out.log) == {"assign_gpus", "rows_by_torch_gpu"}


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("most", [1 << 28, 1])
def test_it_goes_on_after_any_stop_with_the_same_bytes(tiny, tmp_path, monkeypatch, most, device):
    monkeypatch.setattr(stage, "device_of", lambda executor: device)
    monkeypatch.setattr(module, "PIECE_BYTES", most)
    monkeypatch.setattr(module, "ALONE_BYTES", most)
    cluster(tiny, tmp_path / "undisturbed")
    expected = digests(tmp_path / "undisturbed")
    stops, save, write = [], FileTrail.save, module.write_shuffle

    def save_and_stop(trail, state):
        save(trail, state)
        stops.append("step")
        raise Stopped

    def write_and_stop(location, *rest):
        write(location, *rest)
        if location not in stops:
            stops.append(location)
            raise Stopped

    monkeypatch.setattr(FileTrail, "save", save_and_stop)
    monkeypatch.setattr(module, "write_shuffle", write_and_stop)
    for _ in range(300):
        try:
            cluster(tiny, tmp_path / "disturbed")
        except Stopped:
            continue
        break
    assert digests(tmp_path / "disturbed") == expected
    assert stops.count("step") > 8 and len(set(stops)) > (8 if most > 1 else 6)


def written(folder, parts) -> Artifact:
    """Unit rows, a list of parts, as embeddings."""
    place = Location(str(folder))
    files = [write_embeddings(place / part_name(i), np.arange(len(x)), x) for i, x in enumerate(parts)]
    counts = {"rows": sum(map(len, parts))}
    facts = {"width": parts[0].shape[1], "backbone": {"name": "none"}}
    head = {"stage": "embed", "version": 1, "fingerprint": "", "config": {}, "inputs": {}, "counts": counts}
    finish(place, files, {**head, "facts": facts, "numerics": {}})
    return Artifact(place)


def unit_mixture(seed, n, width=16, n_groups=80) -> np.ndarray:
    """Unit rows float32 (n, width)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_groups, width))[rng.integers(n_groups, size=n)] + 0.3 * rng.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


def check_labels(out, x, n_parts) -> None:
    """Every row has a centroid that is there, at the distance that is told."""
    labels, sq_distance = labels_of(out.location.path, n_parts)
    centroids = centroids_of(out.location.path)
    assert out.facts["n_clusters"][0] == len(centroids) > labels.max()
    found = ((x.astype("f8") - centroids[labels]) ** 2).sum(1)
    np.testing.assert_allclose(found, sq_distance, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sizes", [(2, 2), None])
@pytest.mark.parametrize("most", [1 << 28, 1])
def test_equal_rows_leave_as_many_centroids_as_labels_count_on(tmp_path, monkeypatch, sizes, most):
    monkeypatch.setattr(module, "PIECE_BYTES", most)
    monkeypatch.setattr(module, "ALONE_BYTES", most)
    x = np.concatenate([unit_mixture(0, 60, n_groups=60)[np.arange(3000) % 60], unit_mixture(1, 60)])
    embeddings = written(tmp_path / "vectors", np.split(x, [1000]))
    config = ClusterConfig(n_clusters=(200, 6), n_splits=(20, 1), n_resamples=2, resample_size=sizes)
    out = Output(Location(str(tmp_path / "tree")), LocalExecutor())
    run(config, {"embeddings": embeddings}, out, LocalExecutor())
    assert out.facts["n_clusters"] == [200, 6] or sizes is None
    check_labels(out, x, 2)


@pytest.mark.parametrize("first", [np.float16, np.float32])
def test_parts_of_both_lengths_of_float_are_sent_as_they_are(tmp_path, first):
    x = unit_mixture(0, 1000)
    halves = [half.astype(kind) for half, kind in zip(np.split(x, 2), (first, np.float32), strict=True)]
    out = Output(Location(str(tmp_path / "tree")), LocalExecutor())
    config = ClusterConfig(n_clusters=(60,), n_splits=(10,), n_resamples=0)
    embeddings = written(tmp_path / "vectors", halves)
    run(config, {"embeddings": embeddings}, out, LocalExecutor())
    check_labels(out, np.concatenate([part.read()[1] for part in embedding_parts(embeddings)]), 2)


def test_the_objective_is_near_that_of_one_k_means_and_lower_than_with_equal_shares(tmp_path, monkeypatch):
    embeddings = written(tmp_path / "vectors", np.split(unit_mixture(0, 6000), 3))

    def fitted(n_splits, name):
        config = ClusterConfig(n_clusters=(300,), n_splits=(n_splits,), n_resamples=0)
        out = Output(Location(str(tmp_path / name)), LocalExecutor())
        run(config, {"embeddings": embeddings}, out, LocalExecutor())
        return labels_of(tmp_path / name, 3)[1].sum(), out.facts.get("agreement", {}).get("0", 1)

    found = {n: fitted(n, str(n)) for n in (1, 5, 20)}
    assert found[1][1] == 1
    assert found[1][0] < found[5][0] < found[20][0] < 1.05 * found[1][0]
    assert 0.5 < found[20][1] < 1 and found[20][1] <= found[5][1]
    monkeypatch.setattr(module, "split_shares", lambda sizes, squares, k: np.full(len(sizes), k // len(sizes)))
    assert fitted(20, "equal")[0] > found[20][0]


@pytest.mark.parametrize("n_splits", [(5,), (5, 0), (41, 1), (1, 7)])
def test_splits_must_fit_the_levels(n_splits):
    with pytest.raises(ValueError, match=r"cluster\.n_splits must have one number a level"):
        ClusterConfig(n_clusters=(40, 6), n_splits=n_splits)


def test_weights_of_size_need_levels_in_one_step():
    ClusterConfig(n_clusters=(40, 6), n_splits=(5, 1), weights="size")
    with pytest.raises(ValueError, match="must be 1 above the first level"):
        ClusterConfig(n_clusters=(40, 6), n_splits=(5, 2), weights="size")
