"""A union of pools or of embeddings is read like any other, and nothing is copied."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_images

from curation.artifact import Artifact, pool_of, read_table
from curation.embeddings import embedding_parts
from curation.selection import read_selection
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.report.thumbnails import make_thumbs
from pipelines.stages.table import STAGES


def run(tree: dict[str, Any], root: Path) -> dict[str, Artifact]:
    executor = LocalExecutor(Resources(loader_workers=0))
    parsed = parse_recipe(tree, STAGES)
    results = list(run_recipe(parsed, Location(str(root)), executor))
    # as the engine would hand them on, and as they come back from a root
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


def steps_of(images: Path) -> dict[str, Any]:
    pixels = {"stage": "embed", "backbone": "pixels"}
    return {
        "web": {"stage": "pool", "source": str(images / "web"), "min_side": 8, "part_rows": 32,
                "max_bad_fraction": 0.1},
        "exam": {"stage": "pool", "source": str(images / "exam"), "part_rows": 16},
        "web_vec": {**pixels, "pool": "web"},
        "exam_vec": {**pixels, "pool": "exam"},
        "both": {"stage": "union", "members": ["web", "exam"]},
        "both_vec": {"stage": "union", "members": ["web_vec", "exam_vec"], "pool": "both"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("union-images")
    make_images(folder / "images")
    return folder / "images"


@pytest.fixture(scope="module")
def steps(images, tmp_path_factory) -> dict[str, Artifact]:
    tree = steps_of(images)
    tree["both_again"] = {"stage": "embed", "pool": "both", "backbone": "pixels"}
    tree["near"] = {"stage": "neighbors", "embeddings": "both_vec", "n_neighbors": 8, "min_similarity": 0.99}
    tree["unique"] = {"stage": "dedup", "neighbors": "near", "keep": "first"}
    tree["tree"] = {"stage": "cluster", "embeddings": "both_vec", "n_clusters": [12], "n_resamples": 0}
    tree["shards"] = {"stage": "shards", "pool": "both", "selection": "unique", "shard_rows": 50}
    tree["more"] = {"stage": "union", "members": ["both", "exam"]}
    n_web = run({"steps": {"web": tree["web"]}}, tmp_path_factory.mktemp("web-root"))["web"].counts["kept"]
    tree["late"] = {"stage": "select", "pool": "both", "where": f"row_id >= {n_web + 3} or row_id % 7 = 0"}
    return run({"steps": tree}, tmp_path_factory.mktemp("union-root"))


def test_rows_stand_one_member_after_the_other(steps):
    both, web, exam = steps["both"], steps["web"], steps["exam"]
    assert both.starts.tolist() == [*web.starts.tolist(), *(exam.starts[1:] + web.starts[-1]).tolist()]
    sizes = [read_table(both.part(i)).num_rows for i in range(len(both.parts))]
    assert np.cumsum([0, *sizes]).tolist() == both.starts.tolist()
    assert both.counts["rows"] == both.counts["kept"] == len(web_and_exam(steps))
    assert [entry.name for entry in both.location.list()] == ["manifest.json", "members.json", "run.jsonl"]


def web_and_exam(steps: dict[str, Artifact]) -> list[str]:
    pools = [steps["web"], steps["exam"]]
    tables = [read_table(pool.part(i), ["key"]) for pool in pools for i in range(len(pool.parts))]
    return [key for table in tables for key in table["key"].to_pylist()]


def test_the_union_of_embeddings_is_the_embeddings_of_the_union(steps):
    pairs = zip(embedding_parts(steps["both_vec"]), embedding_parts(steps["both_again"]), strict=True)
    for ours, theirs in pairs:
        assert ours.first == theirs.first
        for a, b in zip(ours.read(), theirs.read(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert steps["both_vec"].facts["backbone"] == steps["both_again"].facts["backbone"]
    assert pool_of(steps["both_vec"]).digest == pool_of(steps["tree"]).digest == steps["both"].digest


def test_joint_dedup_finds_copies_across_members(steps):
    """Five images of the exam were planted among the others: the ones that come first stay."""
    both, n_web = steps["both"], int(steps["web"].starts[-1])
    across = 0
    for i, start in enumerate(both.starts[:-1].tolist()):
        for row in read_table(steps["unique"].part(i)).to_pylist():
            if not row["kept"] and start + row["row"] >= n_web > row["representative"]:
                across += 1
    assert across == 5


def test_a_select_sees_the_row_ids_of_the_union(steps):
    """Not those of the member, which begin at 0 again."""
    n_web, n_both = int(steps["web"].starts[-1]), int(steps["both"].starts[-1])
    kept = []
    for i, start in enumerate(steps["both"].starts[:-1].tolist()):
        kept += (start + read_selection(steps["late"].part(i)).rows).tolist()
    assert kept == [row for row in range(n_both) if row >= n_web + 3 or row % 7 == 0]


def test_shards_of_a_union_hold_its_rows(steps):
    keys = web_and_exam(steps)
    index = [row for i in range(len(steps["shards"].parts)) for row in read_table(steps["shards"].part(i)).to_pylist()]
    assert len(index) == steps["unique"].counts["kept"]
    assert all(keys[row["row_id"]] == row["key"] for row in index)


def test_a_union_of_a_union_is_flat(steps):
    more = steps["more"]
    assert len(more.parts) == len(steps["both"].parts) + len(steps["exam"].parts)
    member, index = more.member(len(more.parts) - 1)
    assert (member.location, index) == (steps["exam"].location, len(steps["exam"].parts) - 1)
    with pytest.raises(IndexError):
        more.member(len(more.parts))


def test_a_union_is_what_is_in_it(images, steps, tmp_path):
    """Equal members in the same order have the same digest, wherever they lie; another order is another union."""
    tree = steps_of(images)
    tree["turned"] = {"stage": "union", "members": ["exam", "web"]}
    there = run({"steps": tree}, tmp_path / "root")
    assert there["both"].digest == steps["both"].digest != there["turned"].digest


def test_a_moved_source_is_found_through_a_union(images, tmp_path):
    """The pools are done; the images have moved since, and the recipe says where to."""
    tree = {"steps": steps_of(images)}
    root = tmp_path / "root"
    run(tree, root)
    moved = tmp_path / "moved"
    moved.mkdir()
    images.rename(moved / "images")
    try:
        tree = {"steps": steps_of(moved / "images")}
        tree["steps"]["shards"] = {"stage": "shards", "pool": "both", "shard_rows": 50}
        assert run(tree, root)["shards"].counts["kept"] > 0
    finally:
        (moved / "images").rename(images)


@pytest.mark.parametrize(
    ("name", "step", "words"),
    [
        ("mixed", {"members": ["web", "exam_vec"]}, r"mixed.members must be steps of one kind: got web, a pool step"),
        ("twice", {"members": ["web", "web"]}, r"twice.members must name a step once: got 'web' twice"),
        ("none", {"members": []}, r"none.members must be a list of earlier steps: got \[\]"),
        ("word", {"members": "web"}, r"word.members must be a list of earlier steps: got 'web'"),
        ("lost", {"members": ["web_vec", "exam_vec"]}, r"must name its pool: got none"),
        ("order", {"members": ["exam_vec", "web_vec"], "pool": "both"}, r"union of the pools of exam_vec, web_vec"),
        ("other", {"members": ["web_vec", "mean_vec"], "pool": "both"}, r"must come from one backbone: got pixels for"),
        ("poolpool", {"members": ["web", "exam"], "pool": "both"}, r"poolpool.pool is for a union of embeddings"),
    ],
)
def test_what_does_not_belong_together_is_refused(images, tmp_path, name, step, words):
    tree = steps_of(images)
    if name == "other":
        tree["exam_shards"] = {"stage": "shards", "pool": "exam"}
        tree["model"] = {"stage": "train", "shards": "exam_shards",
                         "vit": {"width": 32, "depth": 1, "heads": 2, "patch_size": 8},
                         "image_size": 32, "local_size": 16, "n_steps": 0, "warmup_steps": 0}  # fmt: skip
        tree["mean_vec"] = {"stage": "embed", "pool": "exam", "backbone": "model"}
    tree[name] = {"stage": "union", **step}
    with pytest.raises(UserError, match=words):
        run({"steps": tree}, tmp_path / "root")


def test_the_list_of_members_names_no_place(steps):
    text = (steps["both"].location / "members.json").read().decode()
    assert [set(entry) for entry in json.loads(text)] == [{"digest", "parts", "rows"}] * 2


def test_a_picture_is_found_in_the_second_member(steps):
    both = steps["both"]
    last = int(both.starts[-1]) - 1
    thumb = make_thumbs(both, [last], LocalExecutor(Resources()))[last]
    assert thumb.uri.startswith("data:image/png") and thumb.name.endswith(".png")
    assert thumb.size == "32 x 32"
