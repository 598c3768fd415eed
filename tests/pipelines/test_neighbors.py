"""Neighbours within clusters, and what SemDeDup makes of them, against the definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_images

from curation.artifact import Artifact, read_table
from curation.embeddings import embedding_parts
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stages import neighbors
from pipelines.stages.edges import Device
from pipelines.stages.table import STAGES


def recipe(images: Path) -> dict[str, Any]:
    return {
        "web": {"stage": "pool", "source": str(images / "web"), "min_side": 8, "part_rows": 32,
                "max_bad_fraction": 0.1},
        "vec": {"stage": "embed", "pool": "web", "backbone": "pixels"},
        "tree": {"stage": "cluster", "embeddings": "vec", "n_clusters": [12], "n_resamples": 0},
        "near": {"stage": "neighbors", "embeddings": "vec", "hierarchy": "tree", "n_neighbors": 64,
                 "min_similarity": 0.8},
        "unique": {"stage": "dedup", "neighbors": "near", "hierarchy": "tree", "rule": "semdedup", "keep": "farthest",
                   "max_drop_fraction": 1.0},
    }  # fmt: skip


def run(steps: dict[str, Any], root: Path, executor: Any = None) -> dict[str, Artifact]:
    parsed = parse_recipe({"steps": steps}, STAGES)
    results = run_recipe(parsed, Location(str(root)), executor or LocalExecutor(Resources(loader_workers=0)))
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neighbors")
    make_images(folder / "images")
    return folder / "images"


@pytest.fixture(scope="module")
def steps(images, tmp_path_factory) -> dict[str, Artifact]:
    return run(recipe(images), tmp_path_factory.mktemp("neighbors-root"))


def whole(steps: dict[str, Artifact]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, labels and distances of all rows."""
    x = np.concatenate([part.read()[1] for part in embedding_parts(steps["vec"])])
    table = [read_table(steps["tree"].part(i)) for i in range(len(steps["tree"].parts))]
    return (
        x,
        np.concatenate([t["label"].to_numpy() for t in table]),
        np.concatenate([t["sq_distance"].to_numpy() for t in table]),
    )


def edges_of(steps: dict[str, Artifact]) -> list[tuple[int, int, float]]:
    found = []
    for i, start in enumerate(steps["web"].starts[:-1].tolist()):
        for edge in read_table(steps["near"].part(i)).to_pylist():
            found.append((start + edge["row"], edge["near_row"], edge["similarity"]))
    return found


def test_edges_are_all_pairs_of_one_cluster(steps):
    x, label, _ = whole(steps)
    similarity = x.astype("f8") @ x.astype("f8").T
    near = (similarity.astype("f4") >= np.float32(0.8)) & (label[:, None] == label[None])
    np.fill_diagonal(near, False)
    found = edges_of(steps)
    assert {(a, b) for a, b, _ in found} == set(zip(*(at.tolist() for at in np.nonzero(near)), strict=True))
    assert len(found) == len({(a, b) for a, b, _ in found})
    assert all(abs(s - similarity[a, b]) < 1e-6 for a, b, s in found)
    across = (similarity >= 0.8) & (label[:, None] != label[None])
    assert across.any(), "a pair across a border should be there to be missed"


def test_semdedup_on_real_images_is_its_definition(steps):
    x, label, distance = whole(steps)
    similarity = x.astype("f8") @ x.astype("f8").T
    gone = set()
    for cluster in np.unique(label):
        members = np.flatnonzero(label == cluster)
        order = members[np.lexsort((members, -distance[members]))]
        for place, j in enumerate(order):
            if (similarity[j, order[:place]].astype("f4") >= np.float32(0.8)).any():
                gone.add(int(j))
    kept = np.concatenate([read_table(steps["unique"].part(i))["kept"] for i in range(len(steps["unique"].parts))])
    assert set(np.flatnonzero(~kept).tolist()) == gone != set()


def test_groups_and_ray_change_no_byte(images, steps, tmp_path, monkeypatch, ray_executor):
    monkeypatch.setattr(neighbors, "GROUP_ROWS", 16)  # ten groups instead of one
    some = run(recipe(images), tmp_path / "groups")
    assert [some[name].digest for name in ("near", "unique")] == [steps[name].digest for name in ("near", "unique")]
    monkeypatch.undo()
    there = run(recipe(images), tmp_path / "ray", ray_executor)
    assert [there[name].digest for name in ("near", "unique")] == [steps[name].digest for name in ("near", "unique")]


def test_torch_writes_the_same_bytes(images, steps, tmp_path, monkeypatch):
    """What runs on a GPU, on this CPU."""
    monkeypatch.setattr(neighbors, "device_of", lambda executor: Device("cpu:0", 0.0))
    there = run({name: step for name, step in recipe(images).items() if name != "unique"}, tmp_path)
    assert there["near"].digest == steps["near"].digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unique": {"hierarchy": None}}, "unique.keep farthest needs a hierarchy: got none"),
        ({"unique": {"keep": "first"}}, "unique.hierarchy is for keep farthest or closest: got it with first"),
        ({"near": {"embeddings": "other"}}, "neighbors.hierarchy must be of neighbors.embeddings"),
        ({"near": {"embeddings": "other", "hierarchy": None}}, "dedup.hierarchy must be of the embeddings behind"),
    ],
)
def test_what_does_not_fit_is_refused(images, tmp_path, changes, words):
    tree = recipe(images)
    tree["some"] = {"stage": "select", "pool": "web", "where": "width > 40"}
    tree["other"] = {"stage": "embed", "pool": "web", "backbone": "pixels", "selection": "some"}
    for step in ("near", "unique"):
        tree[step] = tree.pop(step) | changes.get(step, {})
    with pytest.raises(UserError, match=words):
        run(tree, tmp_path / "root")
