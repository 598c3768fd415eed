"""The k-NN join in cells against the exact search, and what is told of its recall."""

import inspect
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import answer

from curation import cells, finders, scan_torch
from curation.artifact import Artifact, FileInfo, describe, finish, part_name, pool_of, read_table, write_table
from curation.embeddings import write_embeddings
from curation.neighbors import NeighborsConfig
from curation.store import Location
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.stage import Output
from pipelines.stages import edges, join, neighbors, recall
from pipelines.stages.neighbors import EXACT_ROWS

WIDTH = 24


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")


def near_rows(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Two thirds are noise, of the others each is near one of these or near another such."""
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(n, width)))
    for i in range(2 * n // 3, n):
        x[i] = x[rng.integers(0, i)] + rng.choice([0.02, 0.05, 0.1]) * rng.normal(size=width)
    return unit(x)[rng.permutation(n)].astype("f2")


def embedded(root: Path, x: np.ndarray, cuts: list[int], missing: Any = ()) -> Artifact:
    """Embeddings cut into parts, some rows of which could not be decoded."""
    files: dict[str, list[FileInfo]] = {"pool": [], "vec": []}
    at = {name: Location(str(root / name / "0")) for name in files}
    for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(x)], strict=True)):
        rows = np.array([r for r in range(end - start) if start + r not in missing], np.int64)
        files["pool"].append(write_table(at["pool"] / part_name(i), pa.table({"row_id": np.arange(start, end)})))
        files["vec"].append(write_embeddings(at["vec"] / part_name(i), rows, x[start + rows]))
    head: dict[str, Any] = {"config": {}, "counts": {}}
    pool = finish(at["pool"], files["pool"], {**head, "stage": "pool", "facts": {}, "inputs": {}})
    facts = {"backbone": {"name": "noise"}, "width": x.shape[1]}
    inputs = {"pool": {"path": "pool/0", "digest": pool.digest}}
    return finish(at["vec"], files["vec"], {**head, "stage": "embed", "facts": facts, "inputs": inputs})


def search(vectors: Artifact, name: str, executor: Any = None, known: Artifact | None = None, **config: Any) -> Output:
    """The edges that the stage writes."""
    executor = executor or LocalExecutor(Resources())
    out = Output(Location(str(vectors.location.parent.parent.path / name / "0")), executor)
    settings = {"min_similarity": 0.8, "n_neighbors": 16, "recall_queries": 400, **config}
    inputs = {"embeddings": vectors} | ({} if known is None else {"known": known})
    neighbors.run(NeighborsConfig(**settings), inputs, out, executor)
    return out


def edges_in(out: Output, vectors: Artifact) -> dict[tuple[int, int], tuple[float, bool]]:
    """What was written, by (row, near row): similarity and equal."""
    starts = pool_of(vectors).starts.tolist()
    found = {}
    for i, start in enumerate(starts[:-1]):
        for edge in read_table(out.location / part_name(i)).to_pylist():
            found[start + edge["row"], edge["near_row"]] = (edge["similarity"], edge["equal"])
    return found


def union(root: Path, *some: Artifact) -> Artifact:
    """Embeddings one after the other, as one artifact over the union of their pools."""
    made = {}
    for name, members in (("pool", [pool_of(vectors) for vectors in some]), ("vec", list(some))):
        at = Location(str(root / name / "0"))
        names = [f"m{i}" for i in range(len(some))]
        (at / "members.json").write(b"[]")
        inputs = {f"members.{key}": {"path": os.path.relpath(m.location.path, root), "digest": m.digest}
                  for key, m in zip(names, members, strict=True)}  # fmt: skip
        if name == "vec":
            inputs["pool"] = {"path": "pool/0", "digest": made["pool"].digest}
        head: dict[str, Any] = {"stage": "union", "config": {"members": names}, "counts": {}}
        made[name] = finish(at, [describe(at / "members.json")], {**head, "facts": some[0].facts, "inputs": inputs})
    return made["vec"]


def searched(vectors: Artifact, name: str, **config: Any) -> Artifact:
    """The edges as a finished artifact."""
    settings = {"min_similarity": 0.8, "n_neighbors": 16, "recall_queries": 400, **config}
    out = search(vectors, name, **config)
    made_from = {"embeddings": {"path": f"vec/{vectors.location.name}", "digest": vectors.digest}}
    config = asdict(NeighborsConfig(**settings))
    head = {"stage": "neighbors", "config": config, "facts": out.facts, "inputs": made_from, "counts": {}}
    return finish(out.location, out.files, head)


def bytes_in(out: Output) -> dict[str, str]:
    return {file.name: file.sha256 for file in out.files}


@pytest.mark.parametrize("seed", range(3))
def test_with_every_cell_probed_the_edges_are_the_exact_ones(tmp_path, seed):
    x = near_rows(3000, seed)
    vectors = embedded(tmp_path, x, [700, 700, 1500], missing={3, 800, 2999})
    exact = search(vectors, "exact", method="exact")
    joined = search(vectors, "cells", method="cells", nlist=16, nprobe=16, seed=seed)
    assert edges_in(joined, vectors) == edges_in(exact, vectors)
    assert bytes_in(joined) == bytes_in(exact) and len(edges_in(exact, vectors)) > 1000
    assert joined.facts["method"] == "cells" and exact.facts["method"] == "exact"
    assert joined.facts["recall"] == joined.facts["recall_strongest"] == 1.0


def test_what_is_found_is_exact_and_what_is_missing_is_told(tmp_path):
    vectors = embedded(tmp_path, near_rows(4000), [1000, 2500])
    truth = edges_in(search(vectors, "exact", method="exact"), vectors)
    out = search(vectors, "cells", method="cells", nlist=64, nprobe=2, min_recall=0.1, recall_queries=4000)
    found = edges_in(out, vectors)
    assert found.items() <= truth.items()
    assert all((b, a) in found for a, b in found), "no row has more than n_neighbors here, so edges go both ways"
    expected = len(found) / len(truth)
    assert (
        out.facts["recall_edges"] == len(truth) and out.facts["recall"] == pytest.approx(expected) and expected < 0.99
    )


def test_auto_probes_as_few_cells_as_the_recall_needs(tmp_path):
    vectors = embedded(tmp_path, near_rows(6000), [3000])
    truth = edges_in(search(vectors, "exact", method="exact"), vectors)
    nprobe = {}
    for least in (0.6, 0.99):
        out = search(vectors, f"cells-{least}", method="cells", nlist=64, min_recall=least, recall_queries=2000)
        found = edges_in(out, vectors)
        assert len(found) >= least * len(truth)
        nprobe[least] = out.facts["nprobe"]
    assert 1 <= nprobe[0.6] < nprobe[0.99] < 64


def test_too_few_cells_are_refused_before_the_join_and_a_number_is_named_that_does(tmp_path):
    vectors = embedded(tmp_path, near_rows(4000), [])
    with pytest.raises(UserError, match=r"neighbors.min_recall must be reached, 0.99: got 0\.\d+ of \d+ true") as error:
        search(vectors, "few", method="cells", nlist=64, nprobe=1)
    assert not (tmp_path / "few" / "0" / part_name(0)).exists()
    hint = error.value.hint or ""
    assert hint.startswith("set nprobe to ")
    assert hint.endswith(", or to auto")
    named = int(hint.split()[3].rstrip(","))
    assert search(vectors, "named", method="cells", nlist=64, nprobe=named).facts["recall"] >= 0.99


def test_cuts_groups_and_workers_change_no_edge(tmp_path, monkeypatch, ray_executor):
    x = near_rows(3000)
    vectors = embedded(tmp_path / "a", x, [1000, 2000])
    config = {"method": "cells", "nlist": 32, "nprobe": 8, "min_recall": 0.5}
    one = search(vectors, "near", **config)
    assert bytes_in(search(vectors, "ray", ray_executor, **config)) == bytes_in(one)
    monkeypatch.setattr(cells, "GROUP_ROWS", 700)  # pieces of few cells, and cells that are cut
    monkeypatch.setattr(cells, "SLICE_ROWS", 90)
    monkeypatch.setattr(join, "RUN_PAIRS", 500)  # many files of candidates
    assert bytes_in(search(vectors, "cut", **config)) == bytes_in(one)


@pytest.fixture
def on_torch(monkeypatch):
    """Searches run what they run on a GPU, on this CPU; in parts, cells and tiles that are small."""
    monkeypatch.setattr(cells, "GROUP_ROWS", 700)
    monkeypatch.setattr(cells, "SLICE_ROWS", 90)
    monkeypatch.setattr(scan_torch, "TILE_ROWS", 64)
    monkeypatch.setattr(finders, "BASE_ROWS", 200)

    @contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (neighbors, join, recall):
                patch.setattr(module, "device_of", lambda executor: edges.Device("cpu:0", 0.0))
            yield

    return patched


@pytest.mark.parametrize("method", ["exact", "cells"])
def test_torch_writes_the_same_bytes(tmp_path, on_torch, method, ray_executor):
    x = near_rows(3000)
    x[100:130] = x[99]  # equal rows, and fewer neighbours than are near
    vectors = embedded(tmp_path, x, [1000, 2000])
    config = {"method": method, "nlist": 32, "nprobe": 8, "min_recall": 0.5, "n_neighbors": 3}
    one = search(vectors, "near", **config)
    with on_torch():
        there = [search(vectors, f"torch-{name}", executor, **config) for name, executor in
                 (("local", None), ("ray", ray_executor))]  # fmt: skip
    assert one.log["search_gpus"] == 0
    for out in there:
        assert bytes_in(out) == bytes_in(one) and out.facts == one.facts and sum(f.rows for f in out.files) > 2500
        if method == "exact":
            assert (one.log["rows_by_faiss_cpu"], out.log["rows_by_torch_gpu"]) == (2970, 2970)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("method", ["exact", "cells"])
def test_a_gpu_that_is_not_there_is_named(tmp_path, method, ray_executor, monkeypatch):
    vectors = embedded(tmp_path, near_rows(600), [300])
    resources = Resources(gpus=1)
    with pytest.raises(TaskError, match=r"device must be one that torch sees: got cuda; .*set resources.gpus to 0"):
        search(vectors, "local", LocalExecutor(resources), method=method)
    monkeypatch.setattr(ray_executor, "resources", resources)
    with pytest.raises(UserError, match=r"resources.gpus must be at most the cluster's: got 1, it has 0"):
        search(vectors, "ray", ray_executor, method=method)


def test_a_giant_cell_is_cut(tmp_path, monkeypatch):
    """Nine tenths of the rows are near one direction, so nearly all of them lie in the same cells."""
    rng = np.random.default_rng(0)
    x = near_rows(3000)
    x[:2700] = unit(x[:1] + 0.03 * rng.normal(size=(2700, WIDTH)))
    x = x[rng.permutation(3000)]
    vectors = embedded(tmp_path, x, [1500])
    monkeypatch.setattr(cells, "GROUP_ROWS", 500)
    monkeypatch.setattr(cells, "SLICE_ROWS", 128)
    most = []
    scan = cells.near_in_cell

    def seen(queries: cells.Rows, base: Any, limits: Any, n: int) -> Any:
        most.append(len(queries.ids))
        return scan(queries, base, limits, n)

    monkeypatch.setattr(join, "near_in_cell", seen)
    config: dict[str, Any] = {"min_similarity": 0.97, "n_neighbors": 64}
    out = search(vectors, "cells", method="cells", nlist=8, nprobe=4, min_recall=0.5, **config)
    assert max(most) <= 128 and out.facts["recall"] > 0.9
    found = edges_in(out, vectors)
    similarity = unit(x.astype("f4")) @ unit(x.astype("f4")).T
    assert all(abs(similarity[pair] - s) < 1e-6 and s >= 0.97 for pair, (s, _) in found.items())
    assert len(found) > 100_000, "nearly all of 2,700 rows have 64 of the others"


@pytest.mark.parametrize("method", ["exact", "cells"])
def test_more_equal_rows_than_neighbours_stay_together(tmp_path, method):
    x = near_rows(1000)
    rng = np.random.default_rng(1)
    equal = np.sort(rng.choice(1000, 300, replace=False))
    x[equal] = x[equal[0]]
    near = int(np.setdiff1d(np.arange(1000), equal)[5])
    x[near] = unit(x[equal[:1]].astype("f4") + 0.01 * rng.normal(size=(1, WIDTH)))
    vectors = embedded(tmp_path, x, [400])
    found = edges_in(search(vectors, "near", method=method, n_neighbors=4), vectors)
    first = int(equal[0])
    assert all(found[int(row), first] == (1.0, True) for row in equal[1:])
    assert found[first, int(equal[1])] == (1.0, False)
    assert not any(b in set(equal[2:].tolist()) for _, b in found), "nobody else is near a copy"
    assert [b for a, b in found if a in set(equal[1:].tolist())] == [first] * 299
    assert found[first, near][1] is False and found[near, first][1] is False


def test_small_pools_are_searched_exactly_and_the_facts_say_so(tmp_path, monkeypatch):
    out = search(embedded(tmp_path, near_rows(200), []), "near")
    assert out.facts["method"] == "exact" and "nprobe" not in out.facts
    monkeypatch.setattr(neighbors, "EXACT_ROWS", 199)
    assert search(embedded(tmp_path / "more", near_rows(200), []), "near").facts["method"] == "cells"


def test_rows_that_are_all_equal_or_none(tmp_path):
    x = np.repeat(near_rows(3)[:1], 50, axis=0)
    found = search(embedded(tmp_path / "a", x, [20]), "near", method="cells")
    assert found.facts["recall"] is None and sum(file.rows for file in found.files) == 50
    nothing = search(embedded(tmp_path / "b", x[:0], []), "near")
    assert nothing.files[0].rows == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"nlist": 401}, "neighbors.nlist must be at most the number of rows that differ: got 401 for 400"),
        ({"nlist": 8, "nprobe": 9}, "neighbors.nprobe must be at most the number of cells: got 9 for 8"),
    ],
)
def test_cells_that_cannot_be_are_refused(tmp_path, config, words):
    with pytest.raises(UserError, match=words):
        search(embedded(tmp_path, near_rows(400), []), "near", method="cells", **config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "lsh"}, "neighbors.method must be one of auto, exact, cells: got 'lsh'"),
        ({"nprobe": 0}, "neighbors.nprobe must be 'auto' or at least 1: got 0"),
        ({"nprobe": "some"}, "neighbors.nprobe must be 'auto' or at least 1: got 'some'"),
        ({"nlist": -1}, "neighbors.nlist must not be negative: got -1"),
        ({"min_recall": 0}, r"neighbors.min_recall must be in \(0, 1\]: got 0"),
        ({"min_recall": 1.1}, r"neighbors.min_recall must be in \(0, 1\]: got 1.1"),
        ({"recall_queries": 0}, "neighbors.recall_queries must be at least 1: got 0"),
        ({"seed": -1}, "neighbors.seed must not be negative: got -1"),
    ],
)
def test_wrong_values_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        NeighborsConfig(min_similarity=0.9, **config)


def test_what_the_settings_say_of_themselves_is_so():
    """The comments of a config are the help texts of its options."""
    said = inspect.getsource(NeighborsConfig)
    assert f"exact up to {EXACT_ROWS:,} rows" in said
    assert f"about {cells.ROWS_PER_CELL} rows, between {cells.MIN_CELLS} and {cells.MAX_CELLS:,}" in said


def test_few_true_edges_leave_the_choice_to_planted_ones(tmp_path):
    """Of noise no row has an edge: which nprobe is safe is then asked of edges that are planted."""
    x = unit(np.random.default_rng(0).normal(size=(3000, 64))).astype("f2")
    vectors = embedded(tmp_path, x, [])
    out = search(vectors, "near", method="cells", nlist=32, min_similarity=0.9)
    assert out.facts["recall"] is None and out.facts["recall_edges"] == 0
    few = search(vectors, "few", method="cells", nlist=32, min_similarity=0.9, min_recall=0.5)
    assert 1 <= few.facts["nprobe"] < out.facts["nprobe"] < 32


def test_recall_of_full_lists_counts_any_near_row(tmp_path):
    """Rows with more near rows than room: the very strongest may differ, what counts is that the list is full."""
    rng = np.random.default_rng(0)
    centre = unit(rng.normal(size=(20, WIDTH)))
    x = unit(np.repeat(centre, 100, axis=0) + 0.01 * rng.normal(size=(2000, WIDTH))).astype("f2")
    vectors = embedded(tmp_path, x, [900])
    out = search(vectors, "near", method="cells", nlist=64, n_neighbors=4, min_recall=0.5)
    assert out.facts["recall_edges"] == 4 * 400
    assert out.facts["recall_strongest"] <= out.facts["recall"] <= 1 and out.facts["recall"] > 0.95


def peak_of(root: Path, told: Any) -> None:
    """In a fresh process: the most memory that a join takes, in MB above what it began with."""
    cells.GROUP_ROWS, cells.SLICE_ROWS, join.RUN_PAIRS = 4096, 1024, 4096
    cells.SAMPLE_BYTES, edges.ROWS_PER_PARTITION = 1 << 18, 4096
    recall.N_PLANTED = 64
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what is freed, by chance more or less of it
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    warm, vectors = (Artifact(Location(str(root / name / "vec" / "0"))) for name in ("warm", "all"))
    search(warm, "near", method="cells", nprobe=2, min_recall=0.1)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    search(vectors, "near", method="cells", nlist=64, nprobe=4, min_recall=0.1, n_neighbors=2, recall_queries=50)
    told.send(resident("VmHWM") - before)


def resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def test_memory_does_not_grow_with_the_parts(tmp_path):
    context = multiprocessing.get_context("spawn")
    found = {}
    for n_parts in (4, 32):
        root, x = tmp_path / str(n_parts), near_rows(512 * n_parts, width=256)
        embedded(root / "all", x, list(range(512, len(x), 512)))
        embedded(root / "warm", x[:300], [])
        ours, theirs = context.Pipe()
        process = context.Process(target=peak_of, args=(root, theirs))
        process.start()
        found[n_parts] = answer(process, ours)
        process.join()
    assert found[32] < found[4] + 5, f"MB at 4 and at 32 parts, whose vectors differ by 14 MB: {found}"


def test_scratch_that_a_killed_join_left_is_taken_up(tmp_path):
    vectors = embedded(tmp_path, near_rows(2000), [500, 1200])
    config = {"method": "cells", "nlist": 16, "nprobe": 6, "min_recall": 0.5}
    whole = search(vectors, "near", **config)
    [folder] = (tmp_path / "near" / "0" / "scratch").glob("join-*")
    kept = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}
    (tmp_path / "near" / "0" / part_name(1)).unlink()
    again = search(vectors, "near", **config)
    assert bytes_in(again) == bytes_in(whole)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept} == before


def old_and_new(tmp_path: Path, n_old: int = 2000, n_new: int = 500) -> tuple[Artifact, Artifact]:
    """An older pool, and its union with a later one; some new rows are equal to old ones."""
    x = near_rows(n_old + n_new)
    x[n_old : n_old + 60] = x[:20].repeat(3, axis=0)
    x[100:110] = x[90:100]
    old = embedded(tmp_path / "old", x[:n_old], [700, 700, 1500], missing={5, 1600})
    new = embedded(tmp_path / "new", x[n_old:], [200], missing={7})
    return old, union(tmp_path / "both", old, new)


@pytest.mark.parametrize("n_neighbors", [3, 16])
def test_with_known_edges_an_exact_search_gives_the_bytes_of_a_joint_one(tmp_path, monkeypatch, n_neighbors):
    old, both = old_and_new(tmp_path)
    config: dict[str, Any] = {"method": "exact", "n_neighbors": n_neighbors}
    joint = search(both, "joint", **config)
    known = searched(old, "near", **config)
    searched_rows = []

    def seen(x: np.ndarray, base: Any, k: int, *args: Any) -> Any:
        searched_rows.append((len(x), sum(len(part.read()[0]) for _, part in base)))
        return nearest(x, base, k, *args)

    nearest = neighbors.nearest_in_base
    monkeypatch.setattr(neighbors, "nearest_in_base", seen)
    assert bytes_in(search(both, "later", known=known, **config)) == bytes_in(joint)
    assert sum(n * m for n, m in searched_rows) <= 2 * 2000 * 500 + 500**2


@pytest.mark.parametrize("small", [False, True])
def test_with_known_edges_a_join_finds_those_of_new_rows(tmp_path, monkeypatch, small):
    if small:
        monkeypatch.setattr(cells, "GROUP_ROWS", 700)
        monkeypatch.setattr(cells, "SLICE_ROWS", 90)
    old, both = old_and_new(tmp_path)
    joint = search(both, "joint", method="exact")
    known = searched(old, "near", method="exact")
    every = {"method": "cells", "nlist": 16, "nprobe": 16}
    assert bytes_in(search(both, "later", known=known, **every)) == bytes_in(joint)
    pairs = []
    scan = cells.near_in_cell

    def seen(queries: cells.Rows, base: Any, limits: Any, n: int) -> Any:
        base = list(base)
        pairs.append(len(queries.ids) * sum(len(rows.ids) for rows in base))
        assert all((queries.ids >= 2000).all() or (rows.ids >= 2000).all() for rows in base)
        return scan(queries, base, limits, n)

    monkeypatch.setattr(join, "near_in_cell", seen)
    search(both, "again", known=known, **every)
    assert 0 < sum(pairs) <= 16 * (2 * 2000 * 500 + 500**2)


def test_known_edges_that_do_not_fit_are_refused(tmp_path):
    old, both = old_and_new(tmp_path)
    known = searched(old, "near", method="exact")
    other = embedded(tmp_path / "other", near_rows(300, seed=9), [])
    for vectors, config, words in (
        (other, {}, "neighbors.known must be of the first members of neighbors.embeddings"),
        (both, {"min_similarity": 0.7}, "neighbors.known must have n_neighbors 16 or more from min_similarity 0.7 or"),
        (both, {"n_neighbors": 17}, "neighbors.known must have n_neighbors 17 or more from min_similarity 0.8 or less"),
    ):
        with pytest.raises(UserError, match=words):
            search(vectors, "refused", known=known, method="exact", **config)


@pytest.mark.parametrize("method", ["exact", "cells"])
def test_more_neighbours_than_rows_are_all_rows(tmp_path, method):
    vectors = embedded(tmp_path, near_rows(200), [120])
    config = {"method": method, "nlist": 4, "nprobe": 4, "min_similarity": 0.1}
    every = search(vectors, "every", n_neighbors=199, **config)
    assert bytes_in(search(vectors, "more", n_neighbors=10**9, **config)) == bytes_in(every)


@pytest.mark.parametrize("method", ["exact", "cells"])
@pytest.mark.parametrize(("value", "norm"), [(0, "0"), (np.nan, "nan"), (np.inf, "inf"), (0.5, r"2\.\d+")])
def test_vectors_that_are_no_unit_vectors_are_refused_by_file_and_row(tmp_path, method, value, norm):
    x = near_rows(400)
    x[250] = value
    vectors = embedded(tmp_path, x, [200])
    words = rf"vec/0/part-0000001.parquet must hold unit vectors: row 50 of it has norm {norm}"
    with pytest.raises(TaskError, match=words):
        search(vectors, "near", method=method)


def test_known_edges_of_a_pool_with_other_starts_are_refused(tmp_path):
    """The same vectors, but a row that could not be read more before them: near rows are positions in the pool."""
    x = near_rows(600)
    old = embedded(tmp_path / "old", np.insert(x, 300, x[0], axis=0), [301], missing={300})
    known = searched(old, "near", method="exact")
    other = embedded(tmp_path / "other", x, [300])
    assert [part.sha256 for part in other.parts] == [part.sha256 for part in old.parts]
    with pytest.raises(UserError, match=r"neighbors.known must be of the first members of neighbors.embeddings"):
        search(other, "refused", known=known, method="exact")


def test_full_lists_are_counted(tmp_path):
    vectors = embedded(tmp_path, near_rows(900), [500])
    for k in (1, 3, 16):
        out = search(vectors, f"near-{k}", method="exact", n_neighbors=k)
        found = np.array([a for a, _ in edges_in(out, vectors)])
        n_full = int((np.bincount(found, minlength=900) >= k).sum())
        assert sum(file.counts["full_lists"] for file in out.files) == n_full


@pytest.mark.parametrize(("n_edges", "n_lost"), [(299, 1), (299, 3), (900, 1), (1000, 5), (40, 1)])
def test_a_pair_that_signatures_lose_does_not_decide_how_many_cells_there_are(n_edges, n_lost):
    rng = np.random.default_rng(n_edges)
    needed = rng.integers(1, 11, n_edges).astype(np.int32)
    needed[rng.choice(n_edges, n_lost, replace=False)] = recall.LOST
    planted = rng.integers(1, 15, 4096).astype(np.int32)
    ids = np.r_[np.arange(n_edges), np.full(4096, -1)]
    similarity = rng.uniform(0.8, 1, n_edges + 4096).astype("f4")
    reach = recall.Reach(ids, ids, similarity, np.r_[needed, planted])
    config = NeighborsConfig(min_similarity=0.8)
    if n_lost > max(1, 0.01 * n_edges):
        with pytest.raises(UserError, match=r"neighbors.min_recall must be reached"):
            recall.choose_nprobe(config, reach, 256)
    else:
        assert 8 <= recall.choose_nprobe(config, reach, 256) <= 14


@pytest.mark.parametrize("nothing", [0, 3])
def test_a_join_of_nothing(tmp_path, nothing):
    x = near_rows(9)[:nothing]
    out = search(embedded(tmp_path, x, [], missing=set(range(nothing))), "near", method="cells")
    assert out.facts["method"] == "exact" and out.files[0].counts["edges"] == 0


PHASES = ("send_digests", "compare_partition", "gather_equal", "draw_sample", "train_on_sample", "assign_part",
          "scan_piece", "list_candidates", "send_vectors", "write_part")  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_in_any_phase_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, phase):
    monkeypatch.setattr(cells, "GROUP_ROWS", 700)
    monkeypatch.setattr(edges, "ROWS_PER_PARTITION", 500)
    vectors = embedded(tmp_path, near_rows(2000), [500, 1200])
    config = {"method": "cells", "nlist": 16, "nprobe": 6, "min_recall": 0.5}
    whole = search(vectors, "whole", **config)
    place = next(module for module in (edges, join) if phase in vars(module))
    work, calls = getattr(place, phase), []

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == (1 if phase == "train_on_sample" else 2):
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(place, phase, stops)
        with pytest.raises(KeyboardInterrupt):
            search(vectors, "near", **config)
    assert calls
    assert bytes_in(search(vectors, "near", **config)) == bytes_in(whole)
