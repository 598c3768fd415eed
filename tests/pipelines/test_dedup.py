"""Rule ``component`` of ``dedup`` on small random graphs, in one task and over row ranges, against its definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.artifact import Artifact, finish, part_name, read_table, write_table
from curation.components import connected_components
from curation.dedup import DedupConfig
from curation.embeddings import write_embeddings
from curation.store import Location
from pipelines.executor import LocalExecutor
from pipelines.stage import Output
from pipelines.stages import connect, dedup


def artifact(root: Path, stage: str, tables: list[Any], **inputs: Artifact) -> Artifact:
    """Parts as a finished step; embeddings are given as rows and vectors."""
    at = Location(str(root / stage / "0"))
    files = [
        write_embeddings(at / part_name(i), *table) if stage == "embed" else write_table(at / part_name(i), table)
        for i, table in enumerate(tables)
    ]
    made_from = {key: {"path": f"{a.location.parent.name}/0", "digest": a.digest} for key, a in inputs.items()}
    return finish(at, files, {"stage": stage, "config": {}, "facts": {}, "inputs": made_from, "counts": {}})


class Graph:
    """Rows in parts that may be empty, some not embedded, with edges among the others."""

    def __init__(self, root: Path, seed: int):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(20, 300))
        cuts = np.sort(rng.integers(0, n + 1, 8))
        self.starts, self.ends = [0, *cuts.tolist()], [*cuts.tolist(), n]
        self.pixels = rng.integers(1, int(rng.choice([3, 100])), (n, 2))
        self.embedded = rng.random(n) < 0.9
        there = np.flatnonzero(self.embedded)
        pairs = np.unique(there[rng.integers(0, len(there), (int(rng.integers(0, n)), 2))], axis=0)
        self.edges = pairs[pairs[:, 0] != pairs[:, 1]]
        self.similarity = rng.random(len(self.edges)).astype("f4")
        pool = artifact(root, "pool", [self.pool_part(a, b) for a, b in self.spans()])
        embeddings = artifact(root, "embed", [self.embed_part(a, b) for a, b in self.spans()], pool=pool)
        self.near = artifact(root, "neighbors", [self.near_part(a, b) for a, b in self.spans()], embeddings=embeddings)

    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.ends, strict=True))

    def pool_part(self, start: int, end: int) -> pa.Table:
        width, height = self.pixels[start:end].astype("i4").T
        return pa.table({"row_id": np.arange(start, end), "width": width, "height": height})

    def embed_part(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero(self.embedded[start:end])
        return rows, np.ones((len(rows), 1), "f2")

    def near_part(self, start: int, end: int) -> pa.Table:
        mine = np.flatnonzero((self.edges[:, 0] >= start) & (self.edges[:, 0] < end))
        mine = mine[np.lexsort((-self.similarity[mine], self.edges[mine, 0]))]
        row, near_row = self.edges[mine].T
        return pa.table({"row": (row - start).astype("i4"), "near_row": near_row, "similarity": self.similarity[mine]})

    def deduped(self, root: Path, keep: str) -> tuple[list[bytes], list[int], dict[str, int]]:
        """The bytes of all parts, what stays for each embedded row, and the counts."""
        out = Output(Location(str(root)), LocalExecutor())
        config = DedupConfig(keep=keep, max_drop_fraction=1.0)
        counts = dedup.STAGE.run(config, {"neighbors": self.near}, out, LocalExecutor())
        parts = [out.artifact.part(i) for i in range(len(self.starts))]
        tables = [read_table(part) for part in parts]
        for (start, _), table in zip(self.spans(), tables, strict=True):
            stays = table["row"].to_numpy() + start == table["representative"].to_numpy()
            assert table["kept"].to_pylist() == stays.tolist()
        return [part.read() for part in parts], [r for t in tables for r in t["representative"].to_pylist()], counts


@pytest.mark.parametrize("keep", ["most_pixels", "first"])
@pytest.mark.parametrize("seed", range(8))
def test_one_row_of_every_component_stays_however_rows_are_cut(tmp_path, monkeypatch, seed, keep):
    graph = Graph(tmp_path, seed)
    component = connected_components(graph.edges, len(graph.embedded))
    area = graph.pixels.prod(axis=1) * (keep == "most_pixels")
    best = {c: -row for _, row, c in sorted(zip(area, -np.arange(len(area)), component, strict=True))}
    expected = [best[component[row]] for row in np.flatnonzero(graph.embedded)]
    whole, stays, counts = graph.deduped(tmp_path / "whole", keep)
    n_kept = len(set(expected))
    assert stays == expected
    assert counts == {"rows": len(expected), "kept": n_kept, "dropped": len(expected) - n_kept}
    monkeypatch.setattr(dedup, "GROUP_EDGES", 1 + 10 * seed)
    monkeypatch.setattr(connect, "RANGE_ROWS", 1 + 20 * seed)
    assert graph.deduped(tmp_path / "ranges", keep) == (whole, stays, counts)
    monkeypatch.setattr(connect, "ONE_TASK_ROWS", 0)
    assert graph.deduped(tmp_path / "stars", keep) == (whole, stays, counts)


def test_parts_with_few_edges_share_a_task():
    spans = [(i, 10 * i, 10) for i in range(5)]
    groups = dedup.edge_groups(spans, [1, 2 * dedup.GROUP_EDGES, 0, 3, 4])
    assert [[part for part, *_ in group] for group in groups] == [[0], [1], [2, 3, 4]]
