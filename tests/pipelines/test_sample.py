import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import noise_png

from curation.artifact import Artifact, finish, part_name, read_table, write_table
from curation.draws import Block, draw_rows
from curation.hierarchy import Hierarchy, Level
from curation.sampling import SampleConfig, frequency_quotas, leaf_quotas, sample_hierarchy
from curation.store import Location
from pipelines.engine import read_root, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stage import Output
from pipelines.stages.sample import STAGE
from pipelines.stages.table import STAGES

N_CLUSTERS = (24, 8, 3)


def write_tree(folder, labels, distance, upper, ends):
    """A hierarchy over rows that are cut at ``ends``, as the stage ``cluster`` leaves it."""
    at, files = Location(str(folder)), []
    for i, (a, b) in enumerate(itertools.pairwise([0, *ends, len(labels)])):
        rows = np.arange(b - a, dtype="i4") * 2  # every other row of the pool is covered
        table = pa.table({"row": rows, "label": labels[a:b], "sq_distance": distance[a:b]})
        files.append(write_table(at / part_name(i), table))
    for t, level in enumerate(upper, 1):
        files += [write_table(at / part_name(j, f"labels-{t}"), pa.table({"label": some}))
                  for j, some in enumerate(np.array_split(level, 2))]  # fmt: skip
    facts = {"n_clusters": list(N_CLUSTERS)}
    return finish(at, files, {"stage": "cluster", "facts": facts, "inputs": {}, "counts": {}})


class Drawn:
    """A hierarchy of 500 rows with skewed labels, and samples of it."""

    def __init__(self, folder, seed=0):
        rng = np.random.default_rng(seed)
        self.folder = folder
        self.labels = (N_CLUSTERS[0] * rng.random(500) ** 2).astype("i4")
        self.distance = rng.integers(0, 9, 500).astype("f4")
        self.upper = [rng.integers(0, b, a).astype("i4") for a, b in itertools.pairwise(N_CLUSTERS)]
        self.trees = {
            name: write_tree(folder / name, self.labels, self.distance, self.upper, ends)
            for name, ends in {"one": [], "many": [7, 7, 120, 130, 300, 499]}.items()
        }

    def sample(self, tree="many", name="sample", **config: Any) -> tuple[Artifact, dict[str, Any]]:
        executor = LocalExecutor(Resources())
        out = Output(Location(str(self.folder / f"{name}-{tree}")), executor)
        counts = STAGE.run(SampleConfig(**config), {"hierarchy": self.trees[tree]}, out, executor)
        head = {"stage": "sample", "facts": out.facts, "inputs": {}, "counts": counts, "config": {}}
        return finish(out.location, out.files, head), {"facts": out.facts, "counts": counts}


def rows_of(made):
    return pa.concat_tables([read_table(made.part(i)) for i in range(len(made.parts))])


def column(made, name):
    return rows_of(made)[name].to_numpy()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return Drawn(tmp_path_factory.mktemp("sample"))


MODES = [
    {"target": 120},
    {"target": 900, "max_copies": 3},
    {"target": 130, "pick": "closest"},
    {"target": 130, "mode": "uniform"},
    {"target": 700, "mode": "uniform", "max_copies": 2},
    {"target": 130, "mode": "level"},
    {"target": 130, "mode": "level", "pick": "closest"},
    {"target": 130, "mode": "level", "level": 2},
    {"target": 800, "mode": "level", "level": 1, "max_copies": 2},
    {"target": 150, "mode": "inverse_frequency"},
    {"target": 300, "mode": "inverse_frequency", "level": 1, "max_copies": 4},
    {"target": 10_000, "max_copies": 2},
    {"target": 1, "seed": 5},
]


def named(config):
    return "-".join(f"{key}_{value}" for key, value in config.items())


@pytest.mark.parametrize("config", MODES, ids=named)
def test_a_sample_is_that_of_the_kernels_in_any_parts(drawn, config):
    """Every mode from its definition: which cluster a row is drawn from, what each gives, which rows it draws."""
    given = SampleConfig(**config)
    level = given.level or 0
    path = np.arange(N_CLUSTERS[0])
    for labels in drawn.upper[:level]:
        path = labels[path]
    clusters = np.zeros(500, "i4") if given.mode == "uniform" else path[drawn.labels].astype("i4")
    sizes = np.bincount(clusters, minlength=1 if given.mode == "uniform" else N_CLUSTERS[level])
    if given.mode == "inverse_frequency":
        quotas = frequency_quotas(sizes, given.target, given.seed, given.max_copies)
    else:
        upper = drawn.upper if given.mode == "tree" else []
        quotas = leaf_quotas(sizes, upper, given.target, given.seed, given.max_copies)
    [counts] = draw_rows(
        lambda: [Block(clusters, drawn.distance)], sizes, quotas, given.seed, pick=given.pick,
        level=3 if given.mode == "uniform" else level, max_copies=given.max_copies,
        replace=given.mode == "inverse_frequency",
    )  # fmt: skip
    for tree in ("one", "many"):
        made, told = drawn.sample(tree, named(config), **config)
        np.testing.assert_array_equal(column(made, "count"), counts)
        np.testing.assert_array_equal(column(made, "kept"), counts > 0)
        np.testing.assert_array_equal(column(made, "cluster"), clusters)
        np.testing.assert_array_equal(column(made, "quota"), quotas[clusters])
        total = min(given.target, 500 * given.max_copies)
        assert counts.sum() == told["counts"]["drawn"] == told["facts"]["drawn"] == total
        assert counts.max() <= given.max_copies
        assert told["counts"]["rows"] == 500 == told["counts"]["kept"] + told["counts"]["dropped"]


def test_the_tree_is_what_one_call_in_memory_gives(drawn):
    levels = [Level(None, drawn.labels, drawn.distance), *(Level(None, labels) for labels in drawn.upper)]
    rng = np.random.default_rng(11)
    seed = int(np.random.default_rng(11).integers(2**32))
    made, _ = drawn.sample(name="memory", target=170, seed=seed, pick="closest")
    rows = sample_hierarchy(Hierarchy(levels), 170, rng, "closest")
    np.testing.assert_array_equal(np.repeat(np.arange(500), column(made, "count")), rows)


def test_modes_are_as_even_as_they_promise(drawn):
    """Uniform keeps the shape; one level evens that level; the tree evens the top more than any flat sample."""
    told = {
        mode: drawn.sample(name=f"even-{mode}", target=150, mode=mode)[1]["facts"]["levels"]
        for mode in ("tree", "level", "uniform", "inverse_frequency")
    }
    for levels in told.values():
        assert levels[0]["before"] == told["tree"][0]["before"]
    effective = {mode: [level["after"]["effective"] for level in levels] for mode, levels in told.items()}
    assert effective["level"][0] > effective["inverse_frequency"][0] > effective["uniform"][0]
    assert effective["tree"][2] == max(found[2] for found in effective.values())
    assert abs(effective["uniform"][0] - told["tree"][0]["before"]["effective"]) < 4


def test_facts_are_those_of_the_rows(drawn):
    """Cluster sizes of every level before and after, against numpy on the rows themselves."""
    for name, config in {"tree": {}, "uniform": {"mode": "uniform"}, "flat": {"mode": "level", "level": 1}}.items():
        made, told = drawn.sample(name=f"facts-{name}", target=160, **config)
        facts, counts = told["facts"], column(made, "count")
        nodes = drawn.labels
        for t, n in enumerate(N_CLUSTERS):
            nodes = nodes if t == 0 else drawn.upper[t - 1][nodes]
            before, after = np.bincount(nodes, minlength=n), np.bincount(nodes, counts, minlength=n).astype(int)
            level, filled = facts["levels"][t], before > 0
            assert level["clusters"] == filled.sum()
            for sizes, found in ((before[filled], level["before"]), (after[filled], level["after"])):
                p = sizes[sizes > 0] / sizes.sum()
                entropy = -(p * np.log(p)).sum()
                assert found["images"] == sizes.sum()
                assert found["effective"] == pytest.approx(np.exp(entropy))
                assert found["kl_to_uniform"] == pytest.approx(np.log(len(sizes)) - entropy, abs=1e-12)
                gaps = abs(sizes[:, None] - sizes[None]).sum()
                assert found["gini"] == pytest.approx(gaps / (2 * len(sizes) * sizes.sum()))
                assert found["at_ranks"] == np.sort(sizes)[::-1][np.array(level["ranks"]) - 1].tolist()
                assert [list(some) for some in found["sizes"]] == [
                    [low, high, int(((sizes >= low) & (sizes <= high)).sum())] for low, high, _ in found["sizes"]
                ]


def test_a_target_above_the_pool_is_told(drawn):
    _, told = drawn.sample(name="above", target=501)
    assert told["facts"]["target"] == 501 and told["facts"]["drawn"] == 500
    assert told["counts"]["kept"] == 500


def test_an_interrupted_run_draws_once(drawn, monkeypatch):
    """The draw is whole in scratch: a run that goes on reads it, and says the same."""
    made, told = drawn.sample(name="again", target=99, mode="uniform")
    first = {file.name: file.sha256 for file in made.files}
    (made.location / part_name(2)).delete()
    monkeypatch.setattr("pipelines.stages.sample.draw_rows", None)
    again, retold = drawn.sample(name="again", target=99, mode="uniform")
    assert {file.name: file.sha256 for file in again.files} == first and retold == told


@pytest.mark.parametrize(
    ("config", "words", "hint"),
    [
        ({"level": 0}, "balanced.level must be left out in mode 'tree': got 0", "modes level and inverse_frequency"),
        ({"mode": "level", "level": 2}, "balanced.level must be below the number of levels .*: got 2 of 2", "finest"),
        ({"mode": "uniform", "pick": "closest"}, "balanced.pick must be random in mode 'uniform': got", "level 0"),
        ({"mode": "level", "level": 1, "pick": "closest"}, "balanced.pick must be random in .* above level 0", "dist"),
        ({"max_per_source": 3, "max_per_label": 3}, "balanced must have at most one of max_per_source", "sample twice"),
        ({"mode": "inverse_frequency", "max_per_label": 3}, "must have no cap in mode 'inverse_frequency'", "level"),
        ({"target": 0}, "sample.target must be at least 1: got 0", ""),
        ({"max_per_source": 0}, "sample.max_per_source must be at least 1: got 0", ""),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, config, words, hint):
    with pytest.raises(UserError, match=words) as found:
        parse_recipe(steps_of(tmp_path, {"stage": "sample", "hierarchy": "tree", "target": 9, **config}), STAGES)
    assert hint in str(found.value.hint)


def test_a_level_that_a_named_hierarchy_lacks_is_named(drawn):
    with pytest.raises(UserError, match=r"sample\.level must be below the number of levels .* got 3 of 3"):
        drawn.sample(name="lacks", target=5, mode="level", level=3)


def steps_of(folder, sample):
    pool = {"stage": "pool", "part_rows": 16}
    return {
        "steps": {
            "a": {**pool, "source": str(folder / "a")},
            "b": {**pool, "source": str(folder / "b")},
            "both": {"stage": "union", "members": ["a", "b"]},
            "a_vec": {"stage": "embed", "pool": "a", "backbone": "pixels"},
            "b_vec": {"stage": "embed", "pool": "b", "backbone": "pixels"},
            "both_vec": {"stage": "union", "members": ["a_vec", "b_vec"], "pool": "both"},
            "tree": {"stage": "cluster", "embeddings": "both_vec", "n_clusters": [8, 3], "n_resamples": 0},
            "balanced": sample,
        }
    }


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Two pools: 70 images of three classes and 10 of none, and 30 of one class."""
    folder = tmp_path_factory.mktemp("pools")
    rng = np.random.default_rng(0)
    for pool, classes in {"a": {"x": 40, "y": 20, "z": 10, "": 10}, "b": {"x": 30}}.items():
        for label, n in classes.items():
            (folder / pool / label).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                (folder / pool / label / f"{label}{i}.png").write_bytes(noise_png(rng))
    return folder


CAPS = [
    {"max_per_source": 15},
    {"max_per_label": 12},
    {"max_per_label": 12, "pick": "closest"},
    {"max_per_label": 15, "max_copies": 2, "target": 70},
    {"max_per_label": 9, "mode": "uniform"},
    {"max_per_label": 9, "mode": "level", "level": 1},
]


@pytest.mark.parametrize("config", CAPS, ids=named)
def test_caps_hold_and_others_fill_the_target(pools, tmp_path, config):
    config = {"target": 45, **config}
    steps = steps_of(pools, {"stage": "sample", "hierarchy": "tree", **config})
    root = Location(str(pools / "root"))
    for _ in run_recipe(parse_recipe(steps, STAGES), root, LocalExecutor(Resources())):
        pass
    done = read_root(root)
    made, tree = done["balanced"], done["tree"]
    pool = [read_table(done["both"].part(i)) for i in range(len(made.parts))]
    label = np.array([x for part in pool for x in part["label"].to_pylist()], object)
    counts = column(made, "count")
    cap = config.get("max_per_label", config.get("max_per_source"))
    group = np.repeat(["a", "b"], [80, 30]) if "max_per_source" in config else label
    per_group = {name: int(counts[group == name].sum()) for name in set(group) - {None}}
    copies = config.get("max_copies", 1)
    closed = [name for name, n in per_group.items() if n == cap]
    assert max(per_group.values()) == cap and counts.max() <= copies
    open_rows = ~np.isin(group, closed)
    assert counts.sum() == min(config["target"], cap * len(closed) + copies * open_rows.sum())
    assert made.counts["drawn"] == made.facts["drawn"] == counts.sum()
    # every cluster gives what it says, and those of the tree share what is left as evenly as can be
    clusters, quota = column(made, "cluster"), column(made, "quota")
    for cluster in np.unique(clusters):
        assert set(quota[clusters == cluster]) == {counts[clusters == cluster].sum()}
    if config.get("mode") is None:
        labels = np.concatenate([read_table(tree.part(i), ["label"])["label"].to_numpy() for i in range(len(pool))])
        upper = read_table(tree.location / "labels-1-0000000.parquet")["label"].to_numpy()
        held, sizes = (np.bincount(labels, x, minlength=8).astype(int) for x in (counts * ~open_rows, open_rows))
        expected = leaf_quotas(sizes, [upper], config["target"], 0, copies, held)
        np.testing.assert_array_equal(np.bincount(labels, counts, minlength=8), expected)


def test_a_label_that_changed_draws_again(pools):
    """The pool is an input of the sample, although it reads it through the hierarchy."""
    assert "hierarchy.embeddings.pool" in STAGE.through


def test_too_many_labels_are_names(pools, monkeypatch):
    monkeypatch.setattr("pipelines.stages.sample.MAX_GROUPS", 2)
    steps = steps_of(pools, {"stage": "sample", "hierarchy": "tree", "target": 8, "max_per_label": 3})
    with pytest.raises(UserError, match="must be for at most 2 labels: got 3"):
        for _ in run_recipe(parse_recipe(steps, STAGES), Location(str(pools / "root")), LocalExecutor(Resources())):
            pass
