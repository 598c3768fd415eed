"""A mix of selections, from the selections to the batches of a trainer."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import N_EXAM, TRAIN, make_images

from curation.artifact import Artifact, pool_of, read_table
from curation.mix import MIX_FILE, read_mix
from curation.store import Location
from pipelines.engine import run_alone, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES
from training.stream import Stream

N_SAME = 8  # images of the exam that are in the other pool too, byte for byte
SHARES = {"homogeneous": {"few": 0.25}, "heterogeneous": {"balanced": 0.5, "jpeg": 0.2, "few": 0.3}}


def run(tree: dict[str, Any], root: Path) -> dict[str, Artifact]:
    parsed = parse_recipe({"steps": tree}, STAGES)
    results = list(run_recipe(parsed, Location(str(root)), LocalExecutor(Resources(loader_workers=0))))
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


def steps_of(images: Path) -> dict[str, Any]:
    """Pools that overlap, their union, and selections of the pools and, where they are alike, of the union."""
    some = "label in ('3', '5', '7')"
    return {
        "web": {"stage": "pool", "source": str(images / "web"), "min_side": 8, "part_rows": 32,
                "max_bad_fraction": 0.1},
        "exam": {"stage": "pool", "source": str(images / "exam"), "part_rows": 16},
        "both": {"stage": "union", "members": ["web", "exam"]},
        "jpeg": {"stage": "select", "pool": "web", "where": "format = 'jpeg'"},
        "few": {"stage": "select", "pool": "exam", "where": some},
        "both_jpeg": {"stage": "select", "pool": "both", "where": "format = 'jpeg'"},
        "both_few": {"stage": "select", "pool": "both", "where": some},
        "vec": {"stage": "embed", "pool": "web", "backbone": "pixels"},
        "tree": {"stage": "cluster", "embeddings": "vec", "n_clusters": [8], "n_resamples": 0},
        "balanced": {"stage": "sample", "hierarchy": "tree", "target": 260, "max_copies": 3},
        "none": {"stage": "select", "pool": "exam", "where": "width > 999"},
        "near": {"stage": "neighbors", "embeddings": "vec", "n_neighbors": 8, "min_similarity": 0.99},
        "unique": {"stage": "dedup", "neighbors": "near"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mix-images") / "images"
    make_images(folder)
    for i, path in enumerate(sorted((folder / "exam").rglob("*.png"))[:: N_EXAM // N_SAME]):
        (folder / "web" / f"same-{i}.png").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def steps(images, tmp_path_factory) -> dict[str, Artifact]:
    mix = {"stage": "mix", "pool": "both"}
    clean = {"stage": "decontaminate", "embeddings": "vec", "reference": "exam_vec", "min_similarity": 0.97}
    near = {"stage": "retrieve", "embeddings": "vec", "seeds": ["exam_vec"], "mode": "sample", "n_neighbors": 3}
    tree = steps_of(images) | {
        "mixed": {**mix, "components": ["balanced", "jpeg", "few"], **SHARES},
        "joined": {**mix, "components": ["few", "balanced"]},
        "by_member": {**mix, "components": ["jpeg", "few"], "heterogeneous": {"jpeg": 0.5, "few": 0.5}},
        "by_union": {**mix, "components": ["both_jpeg", "both_few"],
                     "heterogeneous": {"both_jpeg": 0.5, "both_few": 0.5}},
        "whole": {**mix, "components": ["exam", "unique", "both"], "homogeneous": {"exam": 0.1},
                  "heterogeneous": {"unique": 0.5, "both": 0.5}},
        "shards": {"stage": "shards", "pool": "both", "selection": "mixed", "shard_rows": 30, "mix_rows": 60},
        "plain": {"stage": "shards", "pool": "both", "selection": "joined", "shard_rows": 30},
        "everything": {"stage": "shards", "pool": "both", "shard_rows": 60},
        "all": {"stage": "shards", "pool": "both", "selection": "whole", "shard_rows": 60},
        "exam_vec": {"stage": "embed", "pool": "exam", "backbone": "pixels"},
        "pictures": {"stage": "select", "pool": "web", "selection": "balanced", "where": "format = 'png'"},
        "picture_shards": {"stage": "shards", "pool": "web", "selection": "pictures"},
        "clean": {**clean, "selection": "balanced"},
        "clean_components": {**clean, "selection": "balanced", "mode": "component"},
        "near_exam": {**near, "selection": "balanced"},
        "in_clusters": {"stage": "retrieve", "hierarchy": "tree", "seeds": ["exam_vec"], "selection": "balanced",
                        "mode": "cluster", "min_hits": 0, "per_cluster": 9},
        "near_unique": {**near, "selection": "unique"},
        "model": {"stage": "train", "shards": "shards", **TRAIN, "n_steps": 3},
    }  # fmt: skip
    return run(tree, tmp_path_factory.mktemp("mix-root"))


def rows_of(selection: Artifact, *columns: str) -> dict[int, tuple[int, ...]]:
    """The kept rows by their position in the selection's own pool, with columns (1 for a count that is not there)."""
    found = {}
    for i, start in enumerate(pool_of(selection).starts[:-1].tolist()):
        table = read_table(selection.part(i)).to_pylist()
        found |= {start + r["row"]: tuple(r.get(c, 1) for c in columns) for r in table if r["kept"]}
    return found


def keys_of(pool: Artifact) -> list[str]:
    return [key for i in range(len(pool.parts)) for key in read_table(pool.part(i), ["key"])["key"].to_pylist()]


def index_of(shards: Artifact) -> list[dict[str, Any]]:
    return [row for i in range(len(shards.parts)) for row in read_table(shards.part(i)).to_pylist()]


def expected_counts(steps: dict[str, Artifact]) -> dict[int, tuple[int, ...]]:
    """Of every row of the union that is in a component: its counts in balanced, jpeg and few."""
    n_web = int(steps["web"].starts[-1])
    expected: dict[int, list[int]] = {}
    for c, (name, first) in enumerate((("balanced", 0), ("jpeg", 0), ("few", n_web))):
        for row, (count,) in rows_of(steps[name], "count").items():
            expected.setdefault(first + row, [0, 0, 0])[c] = count
    return {row: tuple(counts) for row, counts in expected.items()}


def test_a_mix_is_the_counts_of_its_components(steps):
    expected = expected_counts(steps)
    assert rows_of(steps["mixed"], "count:balanced", "count:jpeg", "count:few") == expected
    assert rows_of(steps["mixed"], "count") == {row: (max(counts),) for row, counts in expected.items()}
    assert max(max(counts) for counts in expected.values()) > 1
    assert read_table(steps["mixed"].part(0)).column_names[3:] == ["count:balanced", "count:jpeg", "count:few"]
    counts = steps["mixed"].counts
    assert counts == {"rows": len(expected), "kept": len(expected), "dropped": 0, "bad": 0}
    sums = np.array(list(expected.values()))
    assert steps["mixed"].facts["components"] == {
        name: {"rows": int((sums[:, c] > 0).sum()), "samples": int(sums[:, c].sum())}
        for c, name in enumerate(("balanced", "jpeg", "few"))
    }
    assert steps["mixed"].facts["mix"] == SHARES


def counted(steps: dict[str, Artifact], name: str) -> dict[int, int]:
    """The count of every row that a step made from ``balanced`` looked at; 0 where it was not kept."""
    found = {}
    for i, start in enumerate(steps["web"].starts[:-1].tolist()):
        for row in read_table(steps[name].part(i)).to_pylist():
            assert (row["count"] > 0) == row["kept"], row
            found[start + row["row"]] = row["count"]
    return found


@pytest.mark.parametrize("name", ["pictures", "clean", "clean_components", "near_exam", "in_clusters"])
def test_counts_go_on(steps, name):
    """What a sample drew several times is as often in what is selected from it."""
    drawn = {row: count for row, (count,) in rows_of(steps["balanced"], "count").items()}
    found = counted(steps, name)
    assert set(found) == set(drawn)
    kept = {row: count for row, count in found.items() if count}
    assert kept == {row: drawn[row] for row in kept}
    assert max(kept.values()) > 1 and len(kept) < len(drawn)


def test_counts_reach_the_shards(steps):
    found = sum(counted(steps, "pictures").values())
    assert steps["picture_shards"].counts["seen_per_epoch"] == found > steps["pictures"].counts["kept"]


def test_a_selection_without_counts_gets_none(steps):
    assert "count" not in read_table(steps["near_unique"].part(0)).column_names


@pytest.mark.parametrize("stage", ["select", "decontaminate", "retrieve", "mix"])
def test_a_mix_with_shares_is_not_undone(steps, images, tmp_path, stage):
    """In a recipe, and where the mix is only an artifact. Without shares it is a selection like any other."""
    tree = {name: steps_of(images)[name] for name in ("web", "exam", "both", "jpeg", "few")}
    tree["vec"] = {"stage": "embed", "pool": "both", "backbone": "pixels"}
    tree["exam_vec"] = {**tree["vec"], "pool": "exam"}
    step = {
        "select": {"pool": "both", "selection": "mixed", "where": "width > 9"},
        "decontaminate": {"embeddings": "vec", "reference": "exam_vec", "selection": "mixed", "min_similarity": 1.0,
                          "max_drop_fraction": 1.0},
        "retrieve": {"embeddings": "vec", "seeds": ["vec"], "selection": "mixed", "mode": "sample", "n_neighbors": 2},
        "mix": {"pool": "both", "components": ["few", "mixed"]},
    }[stage]  # fmt: skip
    key = "components" if stage == "mix" else "selection"
    mixed = {"stage": "mix", "pool": "both", "components": ["jpeg", "few"]}
    shares = {"heterogeneous": {"jpeg": 0.5, "few": 0.5}}
    words = f"last.{key} must not be a mix with shares, which it would lose: got mixed"
    with pytest.raises(UserError, match=words) as caught:
        parse_recipe({"steps": {**tree, "mixed": {**mixed, **shares}, "last": {"stage": stage, **step}}}, STAGES)
    assert "before the mix" in caught.value.hint
    last = parse_recipe({"steps": {**tree, "mixed": mixed, "last": {"stage": stage, **step}}}, STAGES).steps[-1]
    there = run({**tree, "mixed": mixed}, tmp_path / "root")
    assert run_alone(last, there, Location(str(tmp_path / "out")), LocalExecutor()).counts["rows"]
    there["mixed"] = run({**tree, "mixed": {**mixed, **shares}}, tmp_path / "root")["mixed"]
    with pytest.raises(UserError, match=rf"{stage}\.{key} must not be a mix with shares.*: got .*/mixed/"):
        run_alone(last, there, Location(str(tmp_path / "other")), LocalExecutor())


def test_without_shares_a_mix_is_a_union(steps):
    expected = {row: (max(balanced, few),) for row, (balanced, _, few) in expected_counts(steps).items()}
    assert rows_of(steps["joined"], "count") == {row: count for row, count in expected.items() if count[0]}
    assert read_table(steps["joined"].part(0)).column_names == ["row", "kept", "count"]
    assert read_mix(steps["joined"].location) is None and "mix" not in steps["joined"].facts
    assert read_mix(steps["plain"].location) is None
    assert "count" in index_of(steps["plain"])[0] and "count:few" not in index_of(steps["plain"])[0]


def test_selections_of_members_are_those_of_the_union(steps):
    ours = rows_of(steps["by_member"], "count", "count:jpeg", "count:few")
    assert ours == rows_of(steps["by_union"], "count", "count:both_jpeg", "count:both_few")
    assert [part.rows for part in steps["by_member"].parts] == [part.rows for part in steps["by_union"].parts]


def test_a_pool_stands_for_all_its_rows(steps):
    n_web, n_both = int(steps["web"].starts[-1]), int(steps["both"].starts[-1])
    unique = set(rows_of(steps["unique"]))
    assert rows_of(steps["whole"], "count:exam", "count:unique", "count:both") == {
        row: (int(row >= n_web), int(row in unique), 1) for row in range(n_both)
    }


@pytest.mark.parametrize("name", ["plain", "shards", "everything", "all"])
def test_a_key_stands_in_shards_once_and_the_first_stays(steps, name):
    """Its copies drop out, and leave it what they had of each component."""
    selection = {"plain": "joined", "shards": "mixed", "all": "whole"}.get(name)
    keys, columns = keys_of(steps["both"]), ["count"]
    spec = read_mix(steps[name].location)
    columns += spec.columns if spec else []
    before = dict.fromkeys(range(len(keys)), (1,)) if selection is None else rows_of(steps[selection], *columns)
    first: dict[str, int] = {}
    most: dict[str, np.ndarray] = {}
    for row, counts in sorted(before.items()):
        first.setdefault(keys[row], row)
        most[keys[row]] = np.maximum(most.get(keys[row], 0), counts)
    index = index_of(steps[name])
    found = {row["key"]: (row["row_id"], [row[c] for c in columns]) for row in index}
    assert found == {key: (row, most[key].tolist()) for key, row in first.items()}
    counts = steps[name].counts
    assert counts["duplicates"] == counts["dropped"] == len(before) - len(first) == counts["rows"] - counts["kept"]
    assert counts["duplicates"] > 0 and len(index) == len(found) == counts["kept"]
    assert counts["seen_per_epoch"] == sum(row["count"] for row in index)
    if name == "everything":
        assert counts["duplicates"] == N_SAME


def test_shards_say_what_each_component_has(steps):
    index = index_of(steps["shards"])
    assert steps["shards"].facts["components"] == {
        name: {"rows": sum(row[f"count:{name}"] > 0 for row in index),
               "samples": sum(row[f"count:{name}"] for row in index)}
        for name in ("balanced", "jpeg", "few")
    }  # fmt: skip
    assert not any(":" in name for name in steps["shards"].counts)
    assert [name for name in index[0] if name.startswith("count")] == [
        "count", "count:balanced", "count:jpeg", "count:few"]  # fmt: skip
    same = [steps[name].location / MIX_FILE for name in ("mixed", "shards")]
    assert same[0].read() == same[1].read()
    assert MIX_FILE in [file.name for file in steps["shards"].files]


def test_a_trainer_draws_as_the_mix_says_from_the_folder_alone(steps):
    """Ratios to one image in every batch, each image of a component once before any comes again."""
    shards = steps["shards"].location
    stream = Stream(shards, batch=20, seed=0, n_open=2)
    index = {row["key"]: row for row in index_of(steps["shards"])}
    alone = 0
    seen: dict[tuple[int, int], list[str]] = {}
    for step in range(200):
        samples = stream.batch(step)
        by_component = Counter(s.component for s in samples)
        assert by_component in ({2: 20}, {0: 10, 1: 4, 2: 6})
        alone += by_component[2] == 20
        for s in samples:
            seen.setdefault((s.component, s.epoch), []).append(s.key)
    assert 25 < alone < 75
    names = ("balanced", "jpeg", "few")
    for (component, epoch), keys in seen.items():
        counts = Counter({key: row[f"count:{names[component]}"] for key, row in index.items()})
        last = (component, epoch + 1) not in seen
        assert Counter(keys) <= counts if last else Counter(keys) == +counts
    assert steps["model"].counts["kept"] == 3 * TRAIN["batch"]


def test_other_shares_are_other_shards(images, steps, tmp_path):
    """The rows are the same, so only ``mix.json`` can tell."""
    tree = steps_of(images)
    tree["mixed"] = {"stage": "mix", "pool": "both", "components": ["balanced", "jpeg", "few"],
                     "homogeneous": {"few": 0.5}, "heterogeneous": SHARES["heterogeneous"]}  # fmt: skip
    tree["shards"] = {"stage": "shards", "pool": "both", "selection": "mixed", "shard_rows": 30, "mix_rows": 60}
    there = run(tree, tmp_path / "root")
    for name in ("mixed", "shards"):
        ours, theirs = ({(file.name, file.sha256) for file in some[name].files} for some in (steps, there))
        assert {file for file, _ in ours ^ theirs} == {MIX_FILE}
        assert there[name].digest != steps[name].digest


def test_parts_of_a_union_of_unions(images, tmp_path):
    """A member that stands in it twice is meant where it stands first."""
    tree = steps_of(images)
    tree["more"] = {"stage": "union", "members": ["exam", "both"]}
    tree["mixed"] = {"stage": "mix", "pool": "more", "components": ["exam", "jpeg", "both_few"]}
    there = run(tree, tmp_path / "root")
    n_exam = int(there["exam"].starts[-1])
    rows = {*range(n_exam), *(n_exam + r for name in ("jpeg", "both_few") for r in rows_of(there[name]))}
    assert set(rows_of(there["mixed"])) == rows


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            {"pool": "web", "components": ["jpeg", "few"]},
            "mix.components must be of the pool web or of a member of it: got few, which is of exam",
        ),
        ({"components": ["jpeg", "none"]}, "every component of a mix must have at least one row: got none in none"),
        ({"components": ["jpeg", "jpeg"]}, "wrong.components must name a step once: got 'jpeg' twice"),
        ({"components": ["vec"]}, "wrong.components must name a step of stage pool, .* got 'vec', a embed step"),
        ({"components": ["jpeg"], "homogeneous": {"jpeg": 0}}, "mix.homogeneous must be above 0 and finite: got 0.0"),
        ({"components": ["jpeg"], "homogeneous": {"jpeg": float("nan")}}, "above 0 and finite: got nan for jpeg"),
        ({"components": ["jpeg"], "heterogeneous": {"jpeg": 0.5}}, "mix.heterogeneous must sum to 1: got 0.5"),
        (
            {"components": ["jpeg"], "heterogeneous": {"jpeg": "much"}},
            "wrong.heterogeneous.jpeg must be a valid number",
        ),
        ({"components": ["jpeg"], "heterogeneous": ["jpeg"]}, "wrong.heterogeneous must be"),
    ],
)
def test_a_mix_that_cannot_be_is_one_sentence(images, tmp_path, step, words):
    tree = {**steps_of(images), "wrong": {"stage": "mix", "pool": "both", **step}}
    with pytest.raises(UserError, match=words):
        run(tree, tmp_path / "root")
