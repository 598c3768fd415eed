"""The rules of ``dedup`` on small random graphs, in one task and over row ranges, against their definitions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import noise_png, write_head

from curation.artifact import Artifact, finish, part_name, read_table, write_table
from curation.components import connected_components
from curation.dedup import DedupConfig
from curation.embeddings import write_embeddings
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stage import Output, part_span
from pipelines.stages import connect, dedup, likeness, rank, ranked
from pipelines.stages.table import STAGES

WIDTH = 4  # of vectors


def artifact(root: Path, stage: str, tables: list[Any], facts: Any = None, **inputs: Artifact) -> Artifact:
    """Parts as a finished step; embeddings are given as rows and vectors."""
    at = Location(str(root / stage / "0"))
    files = [
        write_embeddings(at / part_name(i), *table) if stage == "embed" else write_table(at / part_name(i), table)
        for i, table in enumerate(tables)
    ]
    made_from = {key: {"path": f"{a.location.parent.name}/0", "digest": a.digest} for key, a in inputs.items()}
    return finish(at, files, {"stage": stage, "config": {}, "facts": facts or {}, "inputs": made_from, "counts": {}})


class Graph:
    """Rows in parts that may be empty, some not embedded, with edges among the others; with ``copies`` some equal."""

    def __init__(self, root: Path, seed: int, copies: bool = False):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(20, 300))
        cuts = np.sort(rng.integers(0, n + 1, 8))
        self.starts, self.ends = [0, *cuts.tolist()], [*cuts.tolist(), n]
        self.pixels = rng.integers(1, int(rng.choice([3, 100])), (n, 2))
        self.n_bytes, self.score = rng.integers(1, 50, n), rng.normal(size=n).round(1).astype("f4")
        self.scored = rng.random(n) < 0.9
        self.embedded = rng.random(n) < 0.9
        there = np.flatnonzero(self.embedded)
        self.home = np.arange(n)  # the lowest of the rows that are equal to each
        if copies:
            label = rng.integers(0, len(there), len(there)) % max(1, len(there) * 2 // 3)
            self.home[there] = there[np.unique(label, return_index=True)[1]][np.unique(label, return_inverse=True)[1]]
        homes = np.unique(self.home[there])
        pairs = np.unique(homes[rng.integers(0, len(homes), (int(rng.integers(0, n)), 2))], axis=0)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        similarity = rng.choice([0.6, 0.7, 0.8, 0.9], len(pairs)).astype("f4")
        equal = np.flatnonzero(self.home != np.arange(n))
        first = equal[np.unique(self.home[equal], return_index=True)[1]]
        one = np.ones(len(equal) + len(first), "f4")
        down, up = np.stack([equal, self.home[equal]], axis=1), np.stack([self.home[first], first], axis=1)
        self.edges, self.similarity = np.concatenate([pairs, down, up]), np.concatenate([similarity, one])
        self.equal = np.arange(len(self.edges)) - len(pairs) < len(equal)
        self.equal[: len(pairs)] = False
        self.has_equal = copies
        x = np.abs(rng.normal(size=(n, WIDTH)))
        self.x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f2")[self.home]
        pool = artifact(root, "pool", [self.pool_part(a, b) for a, b in self.spans()])
        embeddings = artifact(root, "embed", [self.embed_part(a, b) for a, b in self.spans()], pool=pool)
        self.scores = artifact(
            root, "score", [self.score_part(a, b) for a, b in self.spans()], {"column": "good"}, embeddings=embeddings
        )
        self.near = artifact(root, "neighbors", [self.near_part(a, b) for a, b in self.spans()], embeddings=embeddings)

    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.ends, strict=True))

    def pool_part(self, start: int, end: int) -> pa.Table:
        width, height = self.pixels[start:end].astype("i4").T
        at = np.arange(start, end)
        return pa.table({"row_id": at, "width": width, "height": height, "n_bytes": self.n_bytes[start:end]})

    def embed_part(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero(self.embedded[start:end])
        return rows, self.x[start:end][rows]

    def score_part(self, start: int, end: int) -> pa.Table:
        rows = np.flatnonzero(self.scored[start:end])
        return pa.table({"row": rows.astype("i4"), "good": self.score[start:end][rows]})

    def near_part(self, start: int, end: int) -> pa.Table:
        mine = np.flatnonzero((self.edges[:, 0] >= start) & (self.edges[:, 0] < end))
        mine = mine[np.lexsort((-self.similarity[mine], self.edges[mine, 0]))]
        row, near_row = self.edges[mine].T
        table = {"row": (row - start).astype("i4"), "near_row": near_row, "similarity": self.similarity[mine]}
        return pa.table(table | ({"equal": self.equal[mine]} if self.has_equal else {}))

    def rank(self, keep: str) -> list[int]:
        """The embedded rows in the order of ``keep``."""
        score = {
            "most_pixels": self.pixels.prod(axis=1),
            "largest_file": self.n_bytes,
            "first": np.zeros(len(self.embedded)),
            "score": np.where(self.scored, self.score.astype("f8"), -np.inf),
        }[keep]
        return [int(i) for i in np.lexsort((np.arange(len(score)), -score)) if self.embedded[i]]

    def neighbours(self) -> Mapping[int, dict[int, np.float32]]:
        """What each row is near to, with the similarity: what one of equal rows is near to all are."""
        near: dict[int, dict[int, np.float32]] = {i: {} for i in range(len(self.embedded))}
        same = {h: np.flatnonzero(self.home == h).tolist() for h in np.unique(self.home).tolist()}
        for (a, b), s in zip(self.edges.tolist(), self.similarity, strict=True):
            for i in same[self.home[a]]:
                for j in same[self.home[b]]:
                    near[i][j] = near[j][i] = max(s, near[i].get(j, np.float32(0)))
        for group in same.values():
            for i in group:
                near[i] |= dict.fromkeys(group, np.float32(1))
                del near[i][i]
        return near

    def deduped(
        self, root: Path, executor: Any = None, **settings: Any
    ) -> tuple[list[bytes], pa.Table, dict[str, int], Any]:
        """The bytes of all parts, the decisions with rows of the pool, the counts and the facts."""
        executor = executor or LocalExecutor()
        out = Output(Location(str(root)), executor)
        config = DedupConfig(**{"max_drop_fraction": 1.0, **settings})
        inputs = {"neighbors": self.near} | ({"scores": self.scores} if config.keep == "score" else {})
        counts = dedup.STAGE.run(config, inputs, out, executor)
        parts = [out.artifact.part(i) for i in range(len(self.starts))]
        tables = []
        for (start, _), part in zip(self.spans(), parts, strict=True):
            table = read_table(part)
            rows = pa.array(table["row"].to_numpy().astype("i8") + start)
            tables.append(table.set_column(0, "row", rows))
            assert table["kept"].to_pylist() == (rows.to_numpy() == table["representative"].to_numpy()).tolist()
        return [part.read() for part in parts], pa.concat_tables(tables), counts, out.facts


def cut_small(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Many ranges, blocks and slices where one is enough."""
    monkeypatch.setattr(rank, "GROUP_EDGES", 1 + 10 * seed)
    monkeypatch.setattr(rank, "BLOCK_RECORDS", 1 + 7 * seed)
    monkeypatch.setattr(connect, "RANGE_ROWS", 1 + 20 * seed)
    monkeypatch.setattr(ranked, "SLICE_EDGES", 1 + 9 * seed)
    monkeypatch.setattr(ranked, "SAMPLE_STEP", 3)
    monkeypatch.setattr(likeness, "TASK_ROWS", 1 + 2 * seed)
    monkeypatch.setattr(likeness, "ROWS_AT_ONCE", 1 + seed)


@pytest.mark.parametrize("keep", ["most_pixels", "first", "largest_file", "score"])
@pytest.mark.parametrize("seed", range(4))
def test_one_row_of_every_component_stays_however_rows_are_cut(tmp_path, monkeypatch, seed, keep):
    graph = Graph(tmp_path, seed, copies=seed % 2 == 1)
    component = connected_components(graph.edges, len(graph.embedded))
    best: dict[int, int] = {}
    for row in graph.rank(keep):
        best.setdefault(component[row], row)
    expected = [best[component[row]] for row in np.flatnonzero(graph.embedded)]
    whole, table, counts, facts = graph.deduped(tmp_path / "whole", keep=keep)
    n_kept = len(set(expected))
    assert table["representative"].to_pylist() == expected
    assert counts == {"rows": len(expected), "kept": n_kept, "dropped": len(expected) - n_kept}
    cut_small(monkeypatch, seed)
    again = graph.deduped(tmp_path / "ranges", keep=keep)
    assert (again[0], again[2], again[3]) == (whole, counts, facts)
    monkeypatch.setattr(connect, "ONE_TASK_ROWS", 0)
    again = graph.deduped(tmp_path / "stars", keep=keep)
    assert (again[0], again[2], again[3]) == (whole, counts, facts)


def greedy_by_definition(graph: Graph, keep: str) -> dict[int, tuple[int, np.float32]]:
    """In the order of rank a row is dropped when it is near a kept one: for the most similar of these.

    Equal rows are judged together, when the first of them is.
    """
    near, kept, gone = graph.neighbours(), list[int](), dict[int, tuple[int, np.float32]]()
    first_of: dict[int, int] = {}
    for row in graph.rank(keep):
        first = first_of.setdefault(int(graph.home[row]), row)
        if first != row:
            gone[row] = gone.get(first, (first, np.float32(1)))
        elif some := [k for k in kept if k in near[row]]:
            best = max(some, key=lambda k: (near[row][k], -k))
            gone[row] = best, near[row][best]
        else:
            kept.append(row)
    return gone


def semdedup_by_definition(graph: Graph, keep: str) -> dict[int, tuple[int, np.float32]]:
    """A row goes when it is near one before it: for the most similar; of equal ones the first stands for all."""
    near, gone = graph.neighbours(), dict[int, tuple[int, np.float32]]()
    first_of: dict[int, int] = {}
    for row in graph.rank(keep):
        first = first_of.setdefault(int(graph.home[row]), row)
        if first != row:
            gone[row] = first, np.float32(1)
        elif some := [k for k in first_of.values() if k in near[row]]:
            best = max(some, key=lambda k: (near[row][k], -k))
            gone[row] = best, near[row][best]
    return gone


@pytest.mark.parametrize("keep", ["most_pixels", "score"])
@pytest.mark.parametrize("rule", ["greedy", "semdedup"])
@pytest.mark.parametrize("seed", range(9))
def test_rules_by_rank_are_their_definitions_however_rows_are_cut(tmp_path, monkeypatch, seed, rule, keep):
    graph = Graph(tmp_path, seed, copies=seed % 3 > 0)
    definition = {"greedy": greedy_by_definition, "semdedup": semdedup_by_definition}[rule]
    gone = definition(graph, keep)
    whole, table, counts, facts = graph.deduped(tmp_path / "whole", keep=keep, rule=rule)
    found = {r["row"]: (r["near_row"], r["similarity"]) for r in table.to_pylist() if not r["kept"]}
    assert found == {row: (near, float(similarity)) for row, (near, similarity) in gone.items()}
    assert all(r["representative"] == gone.get(r["row"], (r["row"],))[0] for r in table.to_pylist())
    assert counts["dropped"] == len(gone) > 0
    cut_small(monkeypatch, seed)
    again = graph.deduped(tmp_path / "ranges", keep=keep, rule=rule)
    assert (again[0], again[2], again[3]) == (whole, counts, facts)


def split_by_definition(graph: Graph, keep: str, low: float) -> dict[int, int]:
    """In each component the best stays and drops what is near enough; then the best of the rest, and so on."""
    component = connected_components(graph.edges, len(graph.embedded))
    x = graph.x.astype("f4") / np.linalg.norm(graph.x.astype("f8"), axis=1).astype("f4")[:, None]
    similarity = (x.astype("f8") @ x.astype("f8").T).astype("f4")
    stays: dict[int, int] = {}
    left = graph.rank(keep)
    while left:
        best = left[0]
        mine = [r for r in left if r == best or (component[r] == component[best] and similarity[r, best] >= low)]
        stays |= dict.fromkeys(mine, best)
        left = [r for r in left if r not in stays]
    return stays


@pytest.mark.parametrize("low", [0.5, 0.9])
@pytest.mark.parametrize("seed", range(6))
def test_a_chain_is_cut_where_images_are_not_alike(tmp_path, monkeypatch, seed, low):
    graph = Graph(tmp_path, seed, copies=seed % 2 == 1)
    stays = split_by_definition(graph, "most_pixels", low)
    whole, table, counts, facts = graph.deduped(tmp_path / "whole", max_chain=low)
    assert dict(zip(table["row"].to_pylist(), table["representative"].to_pylist(), strict=True)) == stays
    lowest = facts["groups"]["tightness"]["low"]
    assert lowest >= low or counts["dropped"] == 0
    cut_small(monkeypatch, seed)
    again = graph.deduped(tmp_path / "ranges", max_chain=low)
    assert (again[0], again[2], again[3]) == (whole, counts, facts)


def test_what_is_near_its_representative_is_looked_at_once(tmp_path, monkeypatch):
    graph = Graph(tmp_path, 3)
    _, _, _, facts = before = graph.deduped(tmp_path / "off")
    low = facts["groups"]["tightness"]["low"]
    assert 0 < low < 1
    monkeypatch.setattr(likeness, "send_far", None)  # is not asked for
    after = graph.deduped(tmp_path / "on", max_chain=low)
    assert (after[0], after[3]) == (before[0], before[3])


@pytest.mark.parametrize("rule", ["component", "greedy"])
def test_groups_are_counted_by_size_and_tightness(tmp_path, monkeypatch, rule):
    graph = Graph(tmp_path, 5)
    _, table, counts, facts = graph.deduped(tmp_path / "out", rule=rule)
    sizes: dict[int, list[float]] = {}
    x = graph.x.astype("f8") / np.linalg.norm(graph.x.astype("f8"), axis=1)[:, None]
    for r in table.to_pylist():
        if not r["kept"]:
            to = r["similarity"] if rule == "greedy" else float(x[r["row"]] @ x[r["representative"]])
            sizes.setdefault(r["representative"], []).append(to)
    told, n = facts["groups"], [len(some) + 1 for some in sizes.values()]
    assert (told["n"], told["largest"]) == (len(n), max(n))
    assert sum(k for *_, k in told["sizes"]) == len(n)
    assert all(k == sum(a <= m <= b for m in n) for a, b, k in told["sizes"])
    tight, lowest = told["tightness"], [min(some) for some in sizes.values()]
    assert (tight["n"], tight["share"]) == (len(n), 1.0) and tight["low"] == pytest.approx(min(lowest), abs=1e-6)
    edges = np.linspace(tight["low"], 1, len(tight["bins"]) + 1)
    assert tight["bins"] == np.histogram(np.maximum(lowest, tight["low"]), edges)[0].tolist()
    if rule == "component":
        monkeypatch.setattr(likeness, "SAMPLE_ROWS", counts["dropped"] // 2)
        sampled = graph.deduped(tmp_path / "sample", rule=rule)
        assert sampled[0] == graph.deduped(tmp_path / "all", rule=rule)[0]
        assert sampled[3]["groups"]["sizes"] == told["sizes"]
        assert 0 < sampled[3]["groups"]["tightness"]["n"] < len(n)


@pytest.mark.parametrize("settings", [{"rule": "greedy"}, {"rule": "semdedup"}, {"max_chain": 0.5}])
def test_ray_and_a_second_start_give_the_same_bytes(tmp_path, ray_executor, settings):
    graph = Graph(tmp_path, 4, copies=True)
    whole, _, counts, facts = graph.deduped(tmp_path / "here", **settings)
    there = graph.deduped(tmp_path / "there", ray_executor, **settings)
    assert (there[0], there[2], there[3]) == (whole, counts, facts)
    left = sorted((p for p in (tmp_path / "here").rglob("*") if p.is_file()), key=lambda p: -p.stat().st_mtime_ns)
    for n in (len(left) // 4, len(left) // 2, len(left)):
        for path in left[:n]:  # the last that were made: what is there is what a killed run leaves
            path.unlink(missing_ok=True)
        again = graph.deduped(tmp_path / "here", **settings)
        assert (again[0], again[2], again[3]) == (whole, counts, facts)


def pools(folder: Path) -> dict[str, Any]:
    """Two pools, one of them of two sources, and their union with vectors, of pictures of some sizes."""
    rng = np.random.default_rng(0)
    for name, sides in (("a", (9, 30)), ("b", (20, 12, 16)), ("c", (25, 10))):
        (folder / name).mkdir()
        for i, side in enumerate(sides):
            (folder / name / f"{i}.png").write_bytes(noise_png(rng, side))
    return {
        "old": {"stage": "pool", "source": str(folder / "c"), "part_rows": 1},
        "new": {"stage": "pool", "source": [str(folder / "b"), str(folder / "a")], "part_rows": 2},
        "both": {"stage": "union", "members": ["old", "new"]},
        "old_vec": {"stage": "embed", "pool": "old", "backbone": "pixels"},
        "new_vec": {"stage": "embed", "pool": "new", "backbone": "pixels"},
        "both_vec": {"stage": "union", "members": ["old_vec", "new_vec"], "pool": "both"},
        "near": {"stage": "neighbors", "embeddings": "both_vec", "n_neighbors": 9, "min_similarity": 0.01},
        "old_score": {"stage": "score", "embeddings": "old_vec", "head": str(folder / "head.safetensors")},
        "new_score": {"stage": "score", "embeddings": "both_vec", "head": str(folder / "head.safetensors")},
        "unique": {"stage": "dedup", "neighbors": "near", "rule": "greedy", "max_drop_fraction": 1.0},
    }


def run(steps: dict[str, Any], root: Path) -> dict[str, Artifact]:
    parsed = parse_recipe({"steps": steps}, STAGES)
    results = run_recipe(parsed, Location(str(root)), LocalExecutor(Resources(loader_workers=0)))
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


def test_keep_is_read_from_the_pools_of_a_union(tmp_path):
    write_head(tmp_path / "head.safetensors")
    steps = pools(tmp_path)
    made = run(steps, tmp_path / "root")
    pool = made["both"]
    place = rank.Scores("source_priority", pool, made["both_vec"], origins=tuple(rank.origins_of(pool)))
    score = [rank.score_rows(span, place, np.arange(span[1], span[1] + span[2])).tolist() for span in part_span(pool)]
    assert [i for some in score for i in some] == [0, 0, -1, -1, -1, -2, -2]
    sides = [25, 10, 20, 12, 16, 9, 30]
    scored = [read_table(made["new_score"].part(i))["score"].to_pylist() for i in range(len(pool.parts))]
    best = {
        "most_pixels": int(np.argmax(sides)), "source_priority": 0, "largest_file": int(np.argmax(sides)),
        "score": int(np.argmax([s for some in scored for s in some])),
    }  # fmt: skip
    for keep, first in best.items():
        steps["unique"] = steps.pop("unique") | {"keep": keep} | ({"scores": "new_score"} if keep == "score" else {})
        table = run(steps, tmp_path / "root")["unique"]
        kept = np.concatenate([read_table(table.part(i))["kept"] for i in range(len(table.parts))])
        assert kept[first], keep


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": "score"}, "unique.keep score needs scores: got none"),
        ({"scores": "new_score"}, "unique.scores is for keep score: got it with most_pixels"),
        ({"keep": "score", "scores": "old_score"}, "dedup.scores must be of the pool behind dedup.neighbors"),
        ({"rule": "greedy", "max_chain": 0.5}, "max_chain is for rule component: got 0.5 with greedy"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, words):
    write_head(tmp_path / "head.safetensors")
    steps = pools(tmp_path)
    steps["unique"] = steps.pop("unique") | changes
    with pytest.raises(UserError, match=words):
        run(steps, tmp_path / "root")


def test_parts_with_few_edges_share_a_task():
    spans = [(i, 10 * i, 10) for i in range(5)]
    groups = rank.edge_groups(spans, [1, 2 * rank.GROUP_EDGES, 0, 3, 4])
    assert [[part for part, *_ in group] for group in groups] == [[0], [1], [2, 3, 4]]
