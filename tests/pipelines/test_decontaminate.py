"""Component mode of ``decontaminate`` on small random graphs, against a search over all pairs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curation.artifact import Artifact, finish, part_name, read_table, write_table
from curation.decontaminate import DecontaminateConfig, similarity_bins
from curation.embeddings import covered_rows, embedding_parts, write_embeddings
from curation.neighbors import NeighborsConfig
from curation.selection import write_selection
from curation.store import Location
from pipelines.engine import drop_scratch
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor
from pipelines.stage import Output
from pipelines.stages import connect, decontaminate, hops, neighbors, stand_ins
from pipelines.stages.certificate import certificate_name, nearest_name

WIDTH = 3  # few, so that random rows are near one another


def artifact(root: Path, name: str, stage: str, files: Any, config: Any, facts: Any, **inputs: Artifact) -> Artifact:
    """Files as a finished step."""
    made_from = {
        key: {"path": f"{a.location.parent.name}/{a.location.name}", "digest": a.digest} for key, a in inputs.items()
    }
    head = {"stage": stage, "config": config, "facts": facts, "inputs": made_from, "counts": {}}
    return finish(place(root, name), files, head)


def place(root: Path, name: str) -> Location:
    return Location(str(root / name / "0"))


def embedded(root: Path, name: str, x: np.ndarray, cuts: Sequence[int], backbone: str = "b") -> Artifact:
    """A pool and its embeddings, in parts that may be empty."""
    pool, at = place(root, f"{name}_pool"), place(root, name)
    parts = np.split(x, cuts)
    files = [write_table(pool / part_name(i), pa.table({"row_id": np.arange(len(y))})) for i, y in enumerate(parts)]
    made = artifact(root, f"{name}_pool", "pool", files, {}, {})
    files = [write_embeddings(at / part_name(i), np.arange(len(y)), y) for i, y in enumerate(parts)]
    nothing = pa.table({"row": pa.array([], pa.int32())})
    files += [write_table(at / part_name(i, "rejected"), nothing) for i in range(len(parts))]
    return artifact(root, name, "embed", files, {}, {"backbone": {"name": backbone}, "width": x.shape[1]}, pool=made)


def selected(root: Path, pool: Artifact, kept: np.ndarray) -> Artifact:
    """A selection of a pool."""
    parts, at = np.split(kept, pool.starts[1:-1]), place(root, "chosen")
    files = [write_selection(at / part_name(i), np.arange(len(k)), k) for i, k in enumerate(parts)]
    return artifact(root, "chosen", "select", files, {}, {}, pool=pool)


def edges_of(root: Path, embeddings: Artifact, n_neighbors: int, min_similarity: float) -> Artifact:
    config = NeighborsConfig(n_neighbors=n_neighbors, min_similarity=min_similarity)
    out = Output(place(root, "near"), LocalExecutor())
    neighbors.STAGE.run(config, {"embeddings": embeddings}, out, LocalExecutor())
    return artifact(root, "near", "neighbors", out.files, vars(config), out.facts, embeddings=embeddings)


@dataclass
class Done:
    """What a run of the step left."""

    rows: np.ndarray = field(compare=False)  # positions in the pool
    columns: dict[str, list[Any]]
    counts: dict[str, int]
    facts: dict[str, Any]  # of the components
    bytes: list[bytes]  # of the parts
    verdict: str
    certificates: dict[str, dict[str, Any]]
    nearest: dict[str, pa.Table]  # of all parts of a reference


def clean(root: Path, name: str, inputs: dict[str, Artifact | None], executor: Any = None, **config: Any) -> Done:
    out = Output(place(root, name), executor or LocalExecutor())
    config = {"mode": "component", "max_drop_fraction": 1.0, **config}
    given = {key: value for key, value in inputs.items() if value is not None}
    if "reference" in given:
        given["reference.exam"] = given.pop("reference")
    config["reference"] = tuple(key.partition(".")[2] for key in given if key.startswith("reference."))
    counts = decontaminate.STAGE.run(DecontaminateConfig(**config), given, out, executor or LocalExecutor())
    parts = [out.location / file.name for file in sorted(out.files) if file.name.startswith("part-")]
    tables = [read_table(part) for part in parts]
    starts = given["embeddings"].input("pool").starts
    rows = np.concatenate([t["row"].to_numpy() + start for t, start in zip(tables, starts[:-1], strict=True)])
    columns = pa.concat_tables(tables).to_pydict()
    verdict, names = out.facts.pop("verdict"), out.facts.pop("references")
    assert names == list(config["reference"])
    certificates = {name: json.loads((out.location / certificate_name(name)).read()) for name in names}
    nearest = {name: nearest_rows(out, name, given[f"reference.{name}"]) for name in names}
    assert len(out.files) == len(parts) + len(names) + sum(len(given[f"reference.{name}"].parts) for name in names)
    found = [part.read() for part in parts]
    return Done(rows, columns, counts, out.facts, found, verdict, certificates, nearest)


def nearest_rows(out: Output, name: str, reference: Artifact) -> pa.Table:
    """The tables of a reference as one; their rows are those of the embeddings."""
    tables = [read_table(out.location / nearest_name(name, i)) for i in range(len(reference.parts))]
    for i, table in enumerate(tables):
        assert table["row"].to_pylist() == covered_rows(reference.part(i)).tolist()
    return pa.concat_tables(tables)


def similarities(a: Artifact, b: Artifact) -> np.ndarray:
    """float32 (n, m), the sums taken in float64 and one by one."""
    x, y = (np.concatenate([part.read()[1] for part in embedding_parts(e)]).astype("f8") for e in (a, b))
    return (x[:, None] * y[None]).sum(2).astype("f4")


def listed(near: Artifact | None, similarity: np.ndarray, lowest: np.float32, looked: np.ndarray) -> np.ndarray:
    """bool (n, n): the pairs that are joined, by their similarity or by the list of one of the two.

    The similarity of what is listed becomes that of the list, in place: of equal rows it is 1, not a rounded sum. The
    lowest copy that was looked at stands in for a row that was not.
    """
    joined = similarity >= lowest
    if near is not None:
        in_list, stands_in = np.zeros_like(joined), substitutes(near, looked)
        for part, start in enumerate(near.input("embeddings").input("pool").starts[:-1]):
            table = read_table(near.part(part))
            rows, near_rows = table["row"].to_numpy() + start, table["near_row"].to_numpy()
            rows, near_rows = stands_in[rows], stands_in[near_rows]
            in_list[rows, near_rows] = True
            for i, j in ((rows, near_rows), (near_rows, rows)):
                similarity[i, j] = table["similarity"].to_numpy()
        joined &= in_list | in_list.T
    np.fill_diagonal(joined, False)
    return joined


def substitutes(near: Artifact, looked: np.ndarray) -> np.ndarray:
    """int64 (n,): each row, or its lowest copy that was looked at if it was not itself."""
    found = np.arange(len(looked))
    for part, start in reversed(list(enumerate(near.input("embeddings").input("pool").starts[:-1]))):
        table = read_table(near.part(part))
        for row, lowest, equal in reversed(
            list(zip(*(table[c].to_pylist() for c in ("row", "near_row", "equal")), strict=True))
        ):
            if equal and looked[row + start] and not looked[lowest]:
                found[lowest] = row + start
    return found


def expected(
    joined: np.ndarray, similarity: np.ndarray, to_images: np.ndarray, looked: np.ndarray, lowest: np.float32
) -> tuple[list[int], list[int | None], list[float | None], list[int]]:
    """Hops by breadth-first search, the strongest edges back, and the sizes of scipy's components."""
    joined = joined & looked[:, None] & looked[None]
    hit = (to_images >= lowest) & looked[:, None]
    n_hops = np.where(hit.any(1), 1, 0)
    through: list[int | None] = [None] * len(looked)
    strength: list[float | None] = [None] * len(looked)
    hop = 1
    while (n_hops == hop).any():
        for row in np.flatnonzero((n_hops == 0) & joined[:, n_hops == hop].any(1)).tolist():
            back = np.flatnonzero(joined[row] & (n_hops == hop)).tolist()
            through[row] = min(back, key=lambda i: (-similarity[row, i], i))
            strength[row] = float(similarity[row, through[row]])
        n_hops[[row for row in range(len(looked)) if n_hops[row] == 0 and through[row] is not None]] = hop + 1
        hop += 1
    graph = coo_matrix(np.block([[joined, hit], [hit.T, np.zeros((hit.shape[1],) * 2, bool)]]))
    labels, n = connected_components(graph, directed=False)[1], len(looked)
    touched = np.unique(labels[n:])
    sizes = [int((labels[:n] == label).sum()) for label in touched]
    return n_hops.tolist(), through, strength, sorted(size for size in sizes if size)


def graph_of(root: Path, seed: int) -> Iterator[Any]:
    """Random rows with exact copies among them, images near a few, parts of odd sizes, often a selection."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 90))
    x = rng.normal(size=(n, WIDTH))
    x[1::7] = x[::7][: len(x[1::7])]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cuts = np.sort(rng.integers(0, n + 1, 6))
    images = rng.normal(size=(int(rng.integers(1, 5)), WIDTH))
    images = np.concatenate([images / np.linalg.norm(images, axis=1, keepdims=True), x[:1]])
    web = embedded(root, "web", x.astype("f2"), cuts)
    exam = embedded(root, "exam", images.astype("f2"), [2])
    looked = rng.random(n) < 0.8 if seed % 2 else np.ones(n, bool)
    chosen = selected(root, web.input("pool"), looked) if seed % 2 else None
    return web, exam, chosen, looked


@pytest.mark.parametrize("way", ["searched", "all listed", "few listed"])
@pytest.mark.parametrize("seed", range(12))
def test_hops_and_components_are_those_of_a_search_over_all_pairs(tmp_path, monkeypatch, seed, way):
    monkeypatch.setattr(hops, "FRONTIER_ROWS", 4)
    monkeypatch.setattr(stand_ins, "EDGES_AT_ONCE", 5)
    monkeypatch.setattr(connect, "RANGE_ROWS", 1 + 7 * seed)
    monkeypatch.setattr(connect, "ONE_TASK_ROWS", 1000 * (seed % 4))
    web, exam, chosen, looked = graph_of(tmp_path, seed)
    lowest = 0.94 if seed % 3 else 0.985
    near = None if way == "searched" else edges_of(tmp_path, web, 3 if way == "few listed" else len(looked), 0.9)
    inputs = {"embeddings": web, "reference": exam, "selection": chosen, "neighbors": near}
    done = clean(tmp_path, "clean", inputs, min_similarity=lowest)
    similarity, to_images = similarities(web, web), similarities(web, exam)
    joined = listed(near, similarity, np.float32(lowest), looked)
    n_hops, through, strength, sizes = expected(joined, similarity, to_images, looked, np.float32(lowest))
    assert done.rows.tolist() == np.flatnonzero(looked).tolist()
    assert done.columns["hops"] == [n_hops[row] for row in done.rows]
    assert done.columns["kept"] == [n_hops[row] == 0 for row in done.rows]
    assert done.columns["through"] == [through[row] for row in done.rows]
    assert done.columns["through_similarity"] == [strength[row] for row in done.rows]
    assert done.columns["near_row"] == to_images[done.rows].argmax(1).tolist()
    assert done.columns["similarity"] == to_images[done.rows].max(1).tolist()
    by_hop = np.bincount(n_hops)[1:].tolist()
    assert done.facts == {
        "hops": {str(hop): n for hop, n in enumerate(by_hop, 1)},
        "n_components": len(sizes),
        "largest_component": sizes[-1],
    }
    dropped = sum(by_hop)
    counts = {"rows": int(looked.sum()), "kept": int(looked.sum()) - dropped, "dropped": dropped, "bad": 0}
    assert done.counts == {**counts, "direct": by_hop[0], "transitive": dropped - by_hop[0]}
    assert sum(sizes) == dropped
    [known] = done.certificates.values()
    assert (known["dropped_direct"], known["dropped_transitive"]) == (by_hop[0], dropped - by_hop[0])
    assert (known["components"], known["largest_component"]) == (len(sizes), sizes[-1])


@pytest.mark.parametrize("seed", [1, 3, 5, 7, 9, 13, 15])
def test_lists_and_searches_drop_the_same_when_rows_with_copies_are_left_out(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(stand_ins, "EDGES_AT_ONCE", 5)
    web, exam, chosen, looked = graph_of(tmp_path, seed)
    near = edges_of(tmp_path, web, len(looked), 0.9)
    assert (substitutes(near, looked) != np.arange(len(looked))).any()
    inputs = {"embeddings": web, "reference": exam, "selection": chosen}
    searched = clean(tmp_path, "searched", inputs, min_similarity=0.94)
    walked = clean(tmp_path, "walked", {**inputs, "neighbors": near}, min_similarity=0.94)
    assert walked.columns["kept"] == searched.columns["kept"]
    sizes = [{key: done.facts[key] for key in ("n_components", "largest_component")} for done in (walked, searched)]
    assert sizes[0] == sizes[1]


def test_a_copy_stands_in_for_a_row_that_is_left_out(tmp_path):
    """Rows 0, 3 and 4 are equal and row 0 is left out; what is near them is near row 3, and row 4 with it."""
    web = embedded(tmp_path, "web", circle([10, 0, 20, 10, 10]), [1, 3])
    inputs = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([-9]), [])}
    inputs["selection"] = selected(tmp_path, web.input("pool"), np.arange(5) > 0)
    done = clean(tmp_path, "clean", {**inputs, "neighbors": edges_of(tmp_path, web, 2, 0.9)}, min_similarity=NEAR)
    assert done.columns["hops"] == [1, 3, 2, 3] and done.columns["through"] == [None, 3, 1, 3]
    searched = clean(tmp_path, "searched", inputs, min_similarity=NEAR)
    assert searched.columns["hops"] == [1, 3, 2, 2]


def test_two_copies_of_near_rows_that_are_left_out_are_near(tmp_path):
    web = embedded(tmp_path, "web", circle([10, 20, 10, 20]), [1, 2, 3])
    inputs = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([1]), [])}
    inputs["selection"] = selected(tmp_path, web.input("pool"), np.arange(4) > 1)
    done = clean(tmp_path, "clean", {**inputs, "neighbors": edges_of(tmp_path, web, 3, 0.9)}, min_similarity=NEAR)
    assert done.columns["hops"] == [1, 2] and done.columns["through"] == [None, 2]
    assert (done.facts["n_components"], done.facts["largest_component"]) == (1, 2)


def test_the_random_graphs_have_long_chains_and_several_components(tmp_path):
    """Otherwise the test above shows little."""
    longest, most = 0, 0
    for seed in range(12):
        web, exam, *_ = graph_of(tmp_path / str(seed), seed)
        done = clean(tmp_path / str(seed), "clean", {"embeddings": web, "reference": exam}, min_similarity=0.94)
        longest, most = max(longest, len(done.facts["hops"])), max(most, done.facts["n_components"])
    assert longest >= 5 and most >= 3


def circle(degrees: Sequence[float]) -> np.ndarray:
    """Unit rows of a plane: rows ten degrees apart have a similarity of .985."""
    angle = np.radians(np.asarray(degrees, float))
    return np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1).astype("f4")


NEAR = float(np.cos(np.radians(10.5)))


@pytest.mark.parametrize("listed", [False, True])
def test_a_chain_is_followed_to_its_end_and_not_through_rows_left_out(tmp_path, listed):
    web = embedded(tmp_path, "web", circle([0, 10, 20, 30, 40, 90, 100, 180]), [3, 3, 5])
    exam = embedded(tmp_path, "exam", circle([-5, -9, 185]), [])
    inputs = {"embeddings": web, "reference": exam, "neighbors": edges_of(tmp_path, web, 2, 0.9) if listed else None}
    done = clean(tmp_path, "all", inputs, min_similarity=NEAR)
    assert done.columns["hops"] == [1, 2, 3, 4, 5, 0, 0, 1]
    assert done.columns["through"] == [None, 0, 1, 2, 3, None, None, None]
    assert (done.facts["n_components"], done.facts["largest_component"]) == (2, 5)
    without_20 = selected(tmp_path, web.input("pool"), np.arange(8) != 2)
    done = clean(tmp_path, "some", {**inputs, "selection": without_20}, min_similarity=NEAR)
    assert done.columns["hops"] == [1, 2, 0, 0, 0, 0, 1]
    assert done.facts["hops"] == {"1": 2, "2": 1}


def test_rows_near_one_image_are_one_component(tmp_path):
    """Also when it is the nearest image of neither, and they are not near one another."""
    web = embedded(tmp_path, "web", circle([0, 20]), [1])
    inputs = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([-1, 10, 21]), [])}
    done = clean(tmp_path, "clean", inputs, min_similarity=NEAR)
    assert (done.columns["hops"], done.columns["near_row"]) == ([1, 1], [0, 2])
    assert (done.facts["n_components"], done.facts["largest_component"]) == (1, 2)
    apart = {**inputs, "reference": embedded(tmp_path, "far", circle([-1, 21]), [])}
    assert clean(tmp_path, "apart", apart, min_similarity=NEAR).facts["n_components"] == 2


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("degrees", [[0, 10], [10, 0]])
@pytest.mark.parametrize("file_rows", [1, 9])
def test_rows_of_one_hop_that_are_near_join_what_they_belong_to(tmp_path, monkeypatch, file_rows, degrees, listed):
    """Each is near an image that is far from the other. They are in two parts, their vectors in two files or one."""
    monkeypatch.setattr(hops, "FRONTIER_ROWS", file_rows)
    web = embedded(tmp_path, "web", circle([90, *degrees]), [1, 2])
    inputs = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([-9, 19]), [])}
    near = {"neighbors": edges_of(tmp_path, web, 2, 0.9)} if listed else {}
    done = clean(tmp_path, "clean", {**inputs, **near}, min_similarity=NEAR)
    assert (done.columns["hops"], done.facts["n_components"]) == ([0, 1, 1], 1)


MODE_FIELDS = ("dropped_transitive", "components", "largest_component")
OF_ALL = ("reference", "kept", "highest_kept_similarity", "statement")  # what the other references change


@pytest.mark.parametrize("way", ["direct", "searched", "listed"])
@pytest.mark.parametrize("seed", range(8))
def test_several_references_are_each_as_if_it_were_alone(tmp_path, monkeypatch, seed, way):
    monkeypatch.setattr(connect, "RANGE_ROWS", 1 + 7 * seed)
    monkeypatch.setattr(connect, "ONE_TASK_ROWS", 1000 * (seed % 4))
    web, exam, chosen, looked = graph_of(tmp_path, seed)
    rng = np.random.default_rng([seed, 1])
    quiz = embedded(tmp_path, "quiz", unit(rng.normal(size=(5, WIDTH))), [0, 3])
    images = np.concatenate([part.read()[1] for part in embedding_parts(exam)])
    test = embedded(tmp_path, "test", images[::-1].astype("f2"), [1])  # the same images as exam, in another order
    mode, lowest = "direct" if way == "direct" else "component", 0.97
    inputs = {"embeddings": web, "selection": chosen}
    inputs["neighbors"] = edges_of(tmp_path, web, len(looked), 0.9) if way == "listed" else None
    references = {"exam": exam, "quiz": quiz, "test": test}
    several = {f"reference.{name}": reference for name, reference in references.items()}
    done = clean(tmp_path, "clean", {**inputs, **several}, min_similarity=lowest, mode=mode)
    scores = {name: similarities(web, reference) for name, reference in references.items()}
    best = np.stack([score[done.rows].max(1) for score in scores.values()])
    which = best.argmax(0)
    assert done.columns["reference"] == which.tolist() and 2 not in which
    assert done.columns["similarity"] == best.max(0).tolist()
    nearest = np.stack([score[done.rows].argmax(1) for score in scores.values()])
    assert done.columns["near_row"] == nearest[which, np.arange(len(which))].tolist()
    kept = done.rows[np.array(done.columns["kept"])]
    for name, reference in references.items():
        alone = clean(tmp_path, f"only-{name}", {**inputs, "reference": reference}, min_similarity=lowest, mode=mode)
        mine, [single] = done.certificates[name], alone.certificates.values()
        for key in single:
            assert mine[key] == single[key] or key in OF_ALL, key
        assert done.nearest[name].equals(alone.nearest["exam"])
        score = scores[name][looked]
        assert done.nearest[name]["near_row"].to_pylist() == np.flatnonzero(looked)[score.argmax(0)].tolist()
        assert done.nearest[name]["similarity"].to_pylist() == score.max(0).tolist()
        assert (mine["images"], mine["images_near"]) == (score.shape[1], (score.max(0) >= np.float32(lowest)).sum())
        assert mine["histogram"] == similarity_bins(score.max(0)).tolist()
        assert mine["highest_similarity"] == float(score.max())
        assert mine["dropped_direct"] == (score >= np.float32(lowest)).any(1).sum()
        assert mine["highest_kept_similarity"] == float(scores[name][kept].max()) < np.float32(lowest)
        assert [mine[field] for field in MODE_FIELDS] == [None] * 3 or mode == "component"
        if mode == "component":
            assert mine["dropped_direct"] + mine["dropped_transitive"] == alone.counts["dropped"]
    assert done.verdict.splitlines() == [known["statement"] for known in done.certificates.values()]


def unit(x: np.ndarray) -> np.ndarray:
    """Unit rows, float16."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f2")


def test_a_certificate_says_what_it_is_about_and_its_sentence_what_it_shows(tmp_path):
    web = embedded(tmp_path, "web", circle([0, 10, 20, 90]), [2])
    exam, quiz = embedded(tmp_path, "exam", circle([-5, 5, 40]), [1]), embedded(tmp_path, "quiz", circle([200]), [])
    references = {"reference.exam": exam, "reference.quiz": quiz}
    done = clean(tmp_path, "clean", {"embeddings": web, **references}, min_similarity=NEAR, mode="direct")
    known = done.certificates["exam"]
    assert known["pool_digest"] == web.input("pool").digest and known["embeddings_digest"] == web.digest
    assert known["reference_pool_digest"] == exam.input("pool").digest
    assert known["reference_embeddings_digest"] == exam.digest and known["selection_digest"] is None
    assert (known["backbone"], len(known["backbone_digest"])) == ({"name": "b"}, 64)
    assert (known["mode"], known["min_similarity"]) == ("direct", NEAR)
    assert (known["rows"], known["kept"], known["bad"]) == (4, 2, 0)
    assert (known["images"], known["images_near"], known["reference_pool_images"]) == (3, 2, 3)
    assert known["dropped_direct"] == 2
    assert known["highest_kept_similarity"] == pytest.approx(np.cos(np.radians(15)), abs=1e-3)
    words = (
        "exam: 2 of 3 images had a near copy among 4 images (0.983255 and above); of 2 kept ones the nearest is at 0.96"
    )
    assert known["statement"].startswith(words) and known["statement"].endswith(" by b.")
    assert done.certificates["quiz"]["statement"].startswith("quiz: 0 of 1 images had")
    assert done.nearest["quiz"]["near_row"].to_pylist() == [3]


@pytest.mark.parametrize("mode", ["direct", "component"])
def test_of_equal_rows_in_several_parts_the_lowest_is_certified(tmp_path, mode):
    web = embedded(tmp_path, "web", circle([90, 0, 180, 0, 0]), [2, 3, 3])
    exam = embedded(tmp_path, "exam", circle([90, 3]), [])
    done = clean(tmp_path, "clean", {"embeddings": web, "reference": exam}, min_similarity=NEAR, mode=mode)
    assert done.nearest["exam"]["near_row"].to_pylist() == [0, 1]


@pytest.mark.parametrize("mode", ["direct", "component"])
@pytest.mark.parametrize("rows", ["all", "none"])
def test_without_hits_everything_stays(tmp_path, mode, rows):
    web = embedded(tmp_path, "web", circle([0, 10, 20, 30]), [2, 2])
    chosen = selected(tmp_path, web.input("pool"), np.full(4, rows == "all"))
    inputs = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([180]), []), "selection": chosen}
    inputs["neighbors"] = edges_of(tmp_path, web, 2, 0.9) if mode == "component" else None
    done = clean(tmp_path, "clean", inputs, min_similarity=NEAR, mode=mode)
    n = 4 if rows == "all" else 0
    assert (done.counts["rows"], done.counts["kept"], done.counts["dropped"]) == (n, n, 0)
    assert done.columns["near_row"] == [0] * n == done.columns["reference"]
    known, found = done.certificates["exam"], done.nearest["exam"].to_pydict()
    if n:
        assert (found["near_row"], sum(known["histogram"])) == ([3], 1)
        assert known["highest_kept_similarity"] == known["highest_similarity"] == found["similarity"][0]
    else:
        assert (found["near_row"], found["similarity"], sum(known["histogram"])) == ([None], [None], 0)
        assert known["highest_kept_similarity"] is None is known["highest_similarity"]
        assert "; no image was kept by b." in known["statement"]
    assert (known["images"], known["images_near"], known["dropped_direct"]) == (1, 0, 0)
    columns = {"row", "kept", "near_row", "similarity", "reference"}
    if mode == "component":
        assert done.columns["hops"] == [0] * n and done.columns["through"] == [None] * n
        assert done.facts == {"hops": {}, "n_components": 0, "largest_component": 0}
        assert (done.counts["direct"], done.counts["transitive"]) == (0, 0)
        assert [known[field] for field in MODE_FIELDS] == [0, 0, 0]
    else:
        assert set(done.columns) == columns and done.facts == {}


def test_direct_mode_drops_what_is_near_and_nothing_else(tmp_path):
    inputs = {
        "embeddings": embedded(tmp_path, "web", circle([0, 10, 20, 30]), [2, 2]),
        "reference": embedded(tmp_path, "exam", circle([-5, 5]), []),
    }
    done = clean(tmp_path, "clean", inputs, min_similarity=NEAR, mode="direct")
    assert done.columns["kept"] == [False, False, True, True] and done.columns["near_row"] == [0, 1, 1, 1]


class Killed(BaseException):
    """Stops a step as a signal would: nothing catches it."""


@pytest.mark.parametrize("way", ["searched", "listed", "left out"])
def test_a_step_stopped_at_any_file_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, way):
    monkeypatch.setattr(hops, "FRONTIER_ROWS", 2)
    web = embedded(tmp_path, "web", circle([0, 30, 10, 20, 90, 180, 10]), [2, 4])
    inputs: dict[str, Artifact | None] = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([-5]), [])}
    inputs["neighbors"] = None if way == "searched" else edges_of(tmp_path, web, 2, 0.9)
    inputs["selection"] = selected(tmp_path, web.input("pool"), np.arange(7) != 2) if way == "left out" else None
    whole = clean(tmp_path, "whole", inputs, min_similarity=NEAR)
    publish, seen, stop = Location.publish, [], [0]

    def stopped(self: Location, side: Path) -> None:
        if len(seen) == stop[0]:
            raise Killed
        seen.append(self.uri)
        publish(self, side)

    monkeypatch.setattr(Location, "publish", stopped)
    n_files = 0
    while True:
        seen.clear()
        stop[0] = n_files
        try:
            clean(tmp_path, f"stopped-{n_files}", inputs, min_similarity=NEAR)
            break
        except Killed:
            first = list(seen)
        seen.clear()
        stop[0] = -1
        again = clean(tmp_path, f"stopped-{n_files}", inputs, min_similarity=NEAR)
        assert again == whole
        twice = {tuple(uri.split("/")[-2:]) for uri in set(first) & set(seen)}
        # these are whole before what tells that the part was looked at, or how much was forwarded
        assert {folder for folder, _ in twice} <= {"seen", "beside", "hop-0001", "forwarded"}, "a whole file again"
        assert len({name.removeprefix("part-")[:7] for _, name in twice}) <= 1
        n_files += 1
    assert n_files > 20
    drop_scratch(Artifact(place(tmp_path, "whole")))
    beside = {certificate_name("exam"), nearest_name("exam", 0)}
    assert {entry.name for entry in place(tmp_path, "whole").list()} == {part_name(i) for i in range(3)} | beside


def test_what_does_not_fit_together_is_refused(tmp_path):
    web, exam = (embedded(tmp_path, name, circle([0, 10, 20]), [2]) for name in ("web", "exam"))
    other = embedded(tmp_path, "other", circle([0, 10, 21]), [2])
    inputs = {"embeddings": web, "reference": exam, "neighbors": edges_of(tmp_path, web, 2, 0.9)}
    with pytest.raises(UserError, match=r"neighbors is read in mode 'component' alone: got it in mode 'direct'"):
        clean(tmp_path, "clean", inputs, min_similarity=NEAR, mode="direct")
    with pytest.raises(UserError, match=r"min_similarity must be at least that of its neighbors, 0\.9: got 0\.8"):
        clean(tmp_path, "clean", inputs, min_similarity=0.8)
    with pytest.raises(UserError, match=r"must be made from the same embeddings: got edges of other vectors"):
        clean(tmp_path, "clean", {**inputs, "embeddings": other}, min_similarity=NEAR)
    foreign = embedded(tmp_path, "foreign", circle([0]), [], backbone="c")
    with pytest.raises(UserError, match=r"must come from one backbone: got b and c for quiz"):
        clean(tmp_path, "clean", {**inputs, "reference": exam, "reference.quiz": foreign}, min_similarity=NEAR)
    wide = embedded(tmp_path, "wide", np.eye(4, dtype="f2"), [])
    with pytest.raises(UserError, match=r"must have one width: got 3 and 4 for exam"):
        clean(tmp_path, "clean", {**inputs, "reference": wide}, min_similarity=NEAR)


@pytest.mark.parametrize("exam", ["empty", "without parts"])
def test_a_reference_without_images_is_refused(tmp_path, exam):
    web, quiz = (embedded(tmp_path, name, circle(at), []) for name, at in (("web", [0, 10]), ("quiz", [180])))
    reference = embedded(tmp_path, "exam", circle([]), [])
    if exam == "without parts":
        reference = artifact(tmp_path, "none", "embed", [], {}, reference.facts, pool=reference.input("pool"))
    inputs = {"embeddings": web, "reference.quiz": quiz, "reference.exam": reference}
    with pytest.raises(UserError, match=r"reference must have images that were embedded: exam has none") as caught:
        clean(tmp_path, "clean", inputs, min_similarity=NEAR)
    assert caught.value.hint == "fill its pool, or leave it out: nothing can be said of an empty one"


def test_a_pool_is_not_its_own_reference(tmp_path):
    web = embedded(tmp_path, "web", circle([0, 10]), [])
    with pytest.raises(UserError, match=r"must be other images than those looked at: got exam, the pool itself"):
        clean(tmp_path, "clean", {"embeddings": web, "reference": web}, min_similarity=NEAR)


def test_no_certificate_says_what_is_not_so(tmp_path, monkeypatch):
    """The similarity of what is kept is measured: a row that is kept and near stops the step."""
    web, exam = embedded(tmp_path, "web", circle([0, 90]), []), embedded(tmp_path, "exam", circle([5]), [])
    write = decontaminate.write_selection
    monkeypatch.setattr(
        decontaminate, "write_selection", lambda at, rows, kept, *a, **k: write(at, rows, ~kept, *a, **k)
    )
    with pytest.raises(TaskError, match=r"no kept image may be within 0\.983255 of exam: one is at 0\.996"):
        clean(tmp_path, "clean", {"embeddings": web, "reference": exam}, min_similarity=NEAR, mode="direct")


def test_a_step_that_drops_too_much_says_how_it_came_to_that(tmp_path):
    web = embedded(tmp_path, "web", circle([0, 10, 20, 90, 180]), [3])
    inputs = {"embeddings": web, "reference": embedded(tmp_path, "exam", circle([-5, 180]), [])}
    words = (
        r"at most 0\.5 of the rows may be dropped \(max_drop_fraction\): got 4 of 5, in 2 components, the largest of 3 "
        r"rows, reached in 3 hops; similarities "
    )
    with pytest.raises(UserError, match=words):
        clean(tmp_path, "clean", inputs, min_similarity=NEAR, max_drop_fraction=0.5)


def test_frontier_files_span_what_their_rows_can_count(monkeypatch):
    """Rows of a file count from the start of its first part, in 32 bits."""
    monkeypatch.setattr(hops, "FRONTIER_ROWS", 10)
    starts = [0, 5, 2**30, 2**31, 2**31 + 9, 2**33]
    parts = [hops.Part(i, start, None) for i, start in enumerate(starts)]
    groups = hops.group_parts(parts, [4, 6, 1, 30, 1, 1])
    assert [[part.number for part in group] for group in groups] == [[0, 1], [2], [3], [4], [5]]
    assert [[part.number for part in g] for g in hops.group_parts(parts, [1] * 6)] == [[0, 1], [2], [3, 4], [5]]
