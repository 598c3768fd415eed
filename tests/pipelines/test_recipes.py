"""Every recipe that comes with the package runs, in miniature: other sources, backbones and sizes, the same steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import TRAIN, digit

from curation.artifact import Artifact, read_table
from curation.store import Location
from embedding.config import MODEL_FREE
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import SHIPPED, Recipe, read_recipe
from pipelines.stages.table import STAGES

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
N_WEB, N_SEEDS = 150, 8

# What makes a recipe small, beside other backbones and a small training. All are settings that a user would change too.
SIZES: dict[str, list[str]] = {
    "lvd142m": [
        "near.min_similarity=0.99", "clean.min_similarity=0.97",
        "clusters.n_clusters=[12]", "near_clusters.min_hits=1", "near_clusters.per_cluster=6",
        "near_clusters.max_rows=10",
    ],
    "lvd1689m": ["tree.n_clusters=[40, 20, 10, 6, 3]", "tree.n_splits=[4, 2, 2, 1, 1]",
                 "tree.resample_size=[1, 2, 2, 2, 2]", "tree.n_resamples=2", "balanced.target=60"],
    "vo2024": ["tree.n_clusters=[40, 20, 10, 4]", "tree.n_splits=[4, 2, 1, 1]", "tree.resample_size=[1, 2, 2, 2]",
               "tree.n_resamples=2", "balanced.target=60"],
    "semdedup": ["clusters.n_clusters=[8]"],
    "dedup_phash": ["fit.n_images=20"],
    "datacomp_image_based": ["clusters.n_clusters=[30]"],
    "clusters10k": ["clusters.n_clusters=[20]", "balanced.target=60"],
}  # fmt: skip
OTHERS = ("demo", "cifar10")  # tests of their own


def write_images(folder: Path, tree: dict[str, Any]) -> None:
    """Digits for every pool: a crawl with near copies and leaks, and a few images of each trusted set."""
    first = N_WEB
    for name, step in tree["steps"].items():
        if step["stage"] != "pool":
            continue
        at = folder / step["source"]
        at.mkdir(parents=True, exist_ok=True)
        n = N_WEB if name == "web" else N_SEEDS
        start = 0 if name == "web" else first
        for i in range(start, start + n):
            digit(i).save(at / f"{i:04d}.png")
        first += 0 if name == "web" else n
    web = folder / "data/web"
    for i in range(0, 40, 4):
        digit(i, 48).save(web / f"copy-{i:04d}.jpg", quality=95)
    for i in range(N_WEB, N_WEB + 3):  # of the first pool after the web: benchmarks, where there are any
        digit(i).save(web / f"leak-{i:04d}.png", compress_level=1)


def small(name: str, folder: Path) -> Recipe:
    """The recipe with miniature settings, through the same door as --set."""
    tree = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    write_images(folder, tree)
    overrides = list(SIZES[name])
    for step, entry in tree["steps"].items():
        if entry["stage"] == "pool":
            overrides += [f"{step}.source={folder / entry['source']}", f"{step}.part_rows=64"]
        if entry["stage"] == "embed" and entry["backbone"] not in MODEL_FREE:
            overrides.append(f"{step}.backbone=pixels")
        if entry["stage"] == "train":
            vit = {**TRAIN["vit"], "n_registers": 0, "layer_scale": None}
            changes = {**TRAIN, "vit": vit, "freeze_last_layer_steps": 1, "teacher_temperature_start": 0.04,
                       "teacher_temperature_steps": 3, "augment": {}, "precision": "float32", "n_local": 1,
                       "group": 16}  # fmt: skip
            overrides += [f"{step}.{key}={json.dumps(value)}" for key, value in changes.items()]
    return read_recipe(Location(name), overrides, STAGES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Artifact]]:
    """Every recipe, run once."""
    found = {}
    for name in SIZES:
        folder = tmp_path_factory.mktemp(name)
        recipe = small(name, folder)
        executor = LocalExecutor(Resources(loader_workers=0))
        results = run_recipe(recipe, Location(str(folder / "root")), executor)
        found[name] = {r.name: Artifact(r.location) for r in results if r.location is not None}
    return found


def test_all_are_tested():
    assert set(NAMES) == {*SIZES, *OTHERS}


def keys_of(pool: Artifact) -> list[str]:
    return [key for i in range(len(pool.parts)) for key in read_table(pool.part(i))["key"].to_pylist()]


def kept_keys(pool: Artifact, selection: Artifact) -> set[str]:
    keys = keys_of(pool)
    starts = selection_starts(pool)
    found = set()
    for i, start in enumerate(starts):
        for row in read_table(selection.part(i), ["row", "kept"]).to_pylist():
            if row["kept"]:
                found.add(keys[start + row["row"]])
    return found


def selection_starts(pool: Artifact) -> list[int]:
    return [int(start) for start in pool.starts[:-1]]


def shard_keys(shards: Artifact) -> list[str]:
    return [key for i in range(len(shards.parts)) for key in read_table(shards.part(i))["key"].to_pylist()]


@pytest.mark.parametrize("name", list(SIZES))
def test_a_recipe_runs_to_its_page(runs, name):
    steps = runs[name]
    page = (steps["page"].location / "index.html").read().decode()
    assert page.lower().startswith("<!doctype html>")
    keys = shard_keys(steps["shards"])
    assert len(keys) == len(set(keys)) > 0


def test_lvd142m_is_what_was_retrieved_and_the_sets_as_they_are(runs):
    s = runs["lvd142m"]
    retrieved = set().union(*(kept_keys(s["web"], s[name]) for name in ("near_4", "near_32", "near_clusters")))
    as_is = set(keys_of(s["imagenet22k"])) | set(keys_of(s["mapillary"])) | set(keys_of(s["gldv2"]))
    assert set(shard_keys(s["shards"])) == retrieved | as_is
    clean = kept_keys(s["web"], s["clean"])
    assert retrieved <= clean < kept_keys(s["web"], s["unique"])
    assert s["near_4"].counts["nominal"] == 4 * 2 * N_SEEDS
    assert s["near_32"].counts["nominal"] == 32 * N_SEEDS
    assert s["clean"].counts["dropped"] >= 3


def test_lvd1689m_mixes_its_batches(runs):
    s = runs["lvd1689m"]
    assert s["mixed"].facts["mix"]["homogeneous"] == {"imagenet1k": 0.1}
    assert len(s["tree"].facts["n_clusters"]) == 5
    everything = kept_keys(s["web"], s["balanced"]) | kept_keys(s["web"], s["near_seeds"])
    for name in ("imagenet1k", "imagenet22k", "mapillary"):
        everything |= set(keys_of(s[name]))
    assert set(shard_keys(s["shards"])) == everything
    assert s["balanced"].counts["kept"] == 60


def test_vo2024_takes_its_target_evenly(runs):
    s = runs["vo2024"]
    assert len(shard_keys(s["shards"])) == 60
    assert len(s["tree"].facts["n_clusters"]) == 4


def test_semdedup_drops_copies(runs):
    s = runs["semdedup"]
    assert 10 <= s["unique"].counts["dropped"] < N_WEB


def test_dedup_phash_drops_the_planted_copies(runs):
    """Those and no more, and of each pair the smaller goes: ten digits are there again, larger and encoded anew."""
    s = runs["dedup_phash"]
    kept = kept_sources(s["web"], s["unique"])
    copied = range(0, 40, 4)
    assert s["unique"].counts["dropped"] == len(copied)
    assert all(f"copy-{i:04d}.jpg" in kept and f"{i:04d}.png" not in kept for i in copied)
    assert s["fit"].facts["backbone"] == s["web_hash"].facts["backbone"]


def kept_sources(pool: Artifact, selection: Artifact) -> set[str]:
    found: set[str] = set()
    for i in range(len(pool.parts)):
        kept = read_table(selection.part(i))["kept"]
        found |= set(read_table(pool.part(i), ["source"]).filter(kept)["source"].to_pylist())
    return found


def test_datacomp_keeps_whole_clusters(runs):
    s = runs["datacomp_image_based"]
    tables = [
        (read_table(s["clusters"].part(i))["label"].to_pylist(), read_table(s["kept"].part(i))["kept"].to_pylist())
        for i in range(len(s["clusters"].parts))
    ]
    labels = [label for some, _ in tables for label in some]
    kept = [flag for _, some in tables for flag in some]
    whole = {label for label, flag in zip(labels, kept, strict=True) if flag}
    assert all((label in whole) == flag for label, flag in zip(labels, kept, strict=True))
    assert 0 < len(whole) < 30


def test_clusters10k_is_a_union_of_two_selections(runs):
    s = runs["clusters10k"]
    both = kept_keys(s["web"], s["balanced"]) | kept_keys(s["web"], s["near_seeds"])
    assert set(shard_keys(s["shards"])) == both
    assert s["balanced"].counts["kept"] == 60


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_and_where_it_is_from(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    if name not in OTHERS and name != "clusters10k":
        assert ("github.com/facebook/ThreatExchange" if name == "dedup_phash" else "arXiv") in text
    assert all(len(line) <= 120 for line in text.splitlines())
