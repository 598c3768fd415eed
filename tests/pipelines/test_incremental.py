"""New images later: a union with what was found before gives what all of them at once give."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import digit, make_images

from curation.artifact import Artifact, read_table
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES
from pipelines.why.story import tell_why

NEAR = {"stage": "neighbors", "n_neighbors": 64, "min_similarity": 0.97}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """What make_images leaves, and a later crawl: larger and equal copies of some of it, and new pictures."""
    folder = tmp_path_factory.mktemp("incremental") / "images"
    make_images(folder)
    later = folder / "later"
    later.mkdir()
    for i in range(1, 60, 3):
        digit(i, 64).save(later / f"large-{i:04d}.jpg", quality=90)
    for i in range(2, 60, 9):
        digit(i).save(later / f"same-{i:04d}.png", compress_level=2)
    for i in range(300, 340):
        digit(i).save(later / f"{i:04d}.png")
    return folder


def steps_of(images: Path, known: bool, **rule: Any) -> dict[str, Any]:
    pool = {"stage": "pool", "min_side": 8, "part_rows": 32, "max_bad_fraction": 0.1}
    pixels = {"stage": "embed", "backbone": "pixels"}
    unique = {"stage": "dedup", "max_drop_fraction": 1.0, **rule}
    steps = {
        "old": {**pool, "source": str(images / "web")},
        "new": {**pool, "source": str(images / "later")},
        "old_vec": {**pixels, "pool": "old"},
        "new_vec": {**pixels, "pool": "new"},
        "both": {"stage": "union", "members": ["old", "new"]},
        "both_vec": {"stage": "union", "members": ["old_vec", "new_vec"], "pool": "both"},
        "old_near": {**NEAR, "embeddings": "old_vec"},
        "old_unique": {**unique, "neighbors": "old_near"},
        "near": {**NEAR, "embeddings": "both_vec"},
        "unique": {**unique, "neighbors": "near"},
    }
    if known:
        steps["near"]["known"] = "old_near"
        steps["unique"]["known"] = "old_unique"
    return {"steps": steps}


def run(tree: dict[str, Any], root: Path) -> dict[str, Artifact]:
    executor = LocalExecutor(Resources(loader_workers=0))
    results = run_recipe(parse_recipe(tree, STAGES), Location(str(root)), executor)
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


def whole(artifact: Artifact, name: str) -> np.ndarray:
    return np.concatenate([read_table(artifact.part(i), [name])[name].to_numpy() for i in range(len(artifact.parts))])


RULES = [
    {"rule": "greedy", "keep": "first"},
    {"rule": "greedy", "keep": "source_priority"},
    {"rule": "greedy", "keep": "most_pixels"},
    {"rule": "component", "keep": "most_pixels"},
    {"rule": "component", "keep": "first"},
    {"rule": "semdedup", "keep": "largest_file"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
def test_with_what_is_known_the_decisions_are_those_of_a_joint_run(images, tmp_path, rule):
    joint = run(steps_of(images, known=False, **rule), tmp_path / "joint")
    later = run(steps_of(images, known=True, **rule), tmp_path / "later")
    assert later["near"].digest == joint["near"].digest
    kept, before = whole(later["unique"], "kept"), whole(later["old_unique"], "kept")
    np.testing.assert_array_equal(kept, whole(joint["unique"], "kept"))
    retracted = whole(later["unique"], "retracted")
    before = np.r_[before, np.zeros(len(kept) - len(before), bool)]
    np.testing.assert_array_equal((before | kept) & ~retracted, kept)
    np.testing.assert_array_equal(retracted, before & ~kept)
    assert later["unique"].counts["retracted"] == retracted.sum()
    assert (before & kept).any() and kept[len(whole(later["old_unique"], "kept")) :].any()
    if rule["rule"] == "greedy" and rule["keep"] in ("first", "source_priority"):
        assert not retracted.any(), "what was kept stays"
    elif "first" not in rule.values():
        assert retracted.any(), "the larger copies that came later win"


def test_an_image_that_is_retracted_is_told_so(images, tmp_path):
    later = run(steps_of(images, known=True, **RULES[2]), tmp_path)
    retracted, kept = whole(later["unique"], "retracted"), whole(later["unique"], "kept")
    pool = later["both"]
    keys = [key for i in range(len(pool.parts)) for key in read_table(pool.part(i))["key"].to_pylist()]
    for rows, is_told in ((retracted, True), (~retracted & ~kept, False)):
        story = json.dumps(tell_why(Location(str(tmp_path)), keys[int(np.flatnonzero(rows)[0])]))
        assert ("; it was kept before later images came" in story) == is_told


def test_only_new_steps_run_when_images_come_later(images, tmp_path):
    rule = RULES[0]
    first = steps_of(images, known=True, **rule)
    old = {"steps": {name: step for name, step in first["steps"].items() if name.startswith("old")}}
    run(old, tmp_path)
    executor = LocalExecutor(Resources(loader_workers=0))
    states = {r.name: r.state for r in run_recipe(parse_recipe(first, STAGES), Location(str(tmp_path)), executor)}
    assert {name for name, state in states.items() if state == "done"} == {
        "new", "new_vec", "both", "both_vec", "near", "unique",
    }  # fmt: skip


def test_decisions_about_other_images_are_refused(images, tmp_path):
    tree = steps_of(images, known=True, rule="greedy", keep="first")
    tree["steps"]["both"]["members"] = ["new", "old"]
    tree["steps"]["both_vec"]["members"] = ["new_vec", "old_vec"]
    with pytest.raises(UserError, match=r"neighbors.known must be of the first members of neighbors.embeddings"):
        run(tree, tmp_path)
    del tree["steps"]["near"]["known"]
    with pytest.raises(UserError, match=r"dedup.known must be of the first members of the union behind dedup.nei"):
        run(tree, tmp_path)
