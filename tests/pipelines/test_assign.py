"""``assign``: what it leaves is a hierarchy for new rows, exact, and taken for one by whatever reads hierarchies."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
from test_report import Page
from tiny import recipe

from curation import coarse, labelling
from curation.artifact import Artifact, pool_of, read_table
from curation.drift import AssignConfig, Spread, drift
from curation.embeddings import embedding_parts, read_embeddings
from curation.execute import Device
from curation.hierarchy import ClusterConfig
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.report.page import build_page
from pipelines.report.run import ReportConfig, Run
from pipelines.stage import Output
from pipelines.stages import assign, cluster
from pipelines.stages.cluster import labels_of_level
from pipelines.stages.table import STAGES
from pipelines.why.story import ancestors, tell_why


def run_more(tiny, root, more):
    """The tiny recipe with more steps, in a root where its own are done."""
    tree = recipe(tiny.images)
    parsed = parse_recipe({**tree, "steps": {**tree["steps"], **more}}, STAGES)
    results = run_recipe(parsed, Location(str(root)), LocalExecutor(parsed.resources))
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


NEAR = {"stage": "neighbors", "embeddings": "web_vec", "n_neighbors": 8, "min_similarity": 0.5}
UNIQUE = {"stage": "dedup", "rule": "semdedup", "keep": "farthest", "max_drop_fraction": 1.0}
MORE = {
    "again": {"stage": "assign", "embeddings": "web_vec", "hierarchy": "tree"},
    "twice": {"stage": "assign", "embeddings": "exam_vec", "hierarchy": "again"},
    "balanced_again": {"stage": "sample", "hierarchy": "again", "target": 60},
    "closest_new": {"stage": "sample", "hierarchy": "new_tree", "target": 9, "pick": "closest"},
    "level_new": {"stage": "sample", "hierarchy": "new_tree", "target": 9, "mode": "level", "level": 1},
    "near_again": {"stage": "retrieve", "mode": "cluster", "hierarchy": "again", "seeds": ["exam_vec"], "min_hits": 0,
                   "per_cluster": 3, "max_rows": 30, "level": 1, "target": 12},
    "near_new": {"stage": "retrieve", "mode": "cluster", "hierarchy": "new_tree", "seeds": ["web_vec"], "min_hits": 0,
                 "per_cluster": 2},
    "cells": {**NEAR, "hierarchy": "tree"},
    "cells_again": {**NEAR, "hierarchy": "again"},
    "unique_tree": {**UNIQUE, "neighbors": "cells", "hierarchy": "tree"},
    "unique_again": {**UNIQUE, "neighbors": "cells_again", "hierarchy": "again"},
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tiny, tmp_path_factory):
    """The finished tiny root, and in it more steps that read what ``assign`` left."""
    root = tmp_path_factory.mktemp("assign") / "root"
    shutil.copytree(tiny.root, root, ignore=shutil.ignore_patterns(".lock"))
    return root


@pytest.fixture(scope="module")
def steps(tiny, root):
    return run_more(tiny, root, MORE)


def alone(tmp_path, embeddings, tree, **config):
    """The stage on explicit inputs, and what it left."""
    out = Output(Location(str(tmp_path)), LocalExecutor())
    assign.run(AssignConfig(**config), {"embeddings": embeddings, "hierarchy": tree}, out, LocalExecutor())
    return out


def infos(files):
    return sorted((file.name, file.rows, file.bytes, file.sha256) for file in files)


def test_the_rows_of_the_hierarchy_get_its_own_bytes(steps):
    again, tree = steps["again"], steps["tree"]
    assert infos(again.files) == infos(tree.files) and again.digest == tree.digest
    assert {name: again.facts[name] for name in tree.facts} == tree.facts
    assert (again.stage, again.kind, tree.kind) == ("assign", "cluster", "cluster")
    assert not again.facts["drift"]["drifted"] and again.facts["drift"]["levels"][0]["total_variation"] == 0


def test_so_they_do_where_very_many_centroids_are_met_in_groups(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(coarse, "COARSE_FROM", 20)
    monkeypatch.setattr(coarse, "N_PROBES", 1)
    made = Output(Location(str(tmp_path / "root" / "tree")), LocalExecutor())
    vectors = tiny.artifact("web_vec")
    cluster.run(
        ClusterConfig(n_clusters=(40, 6), n_resamples=0, n_iter=4), {"embeddings": vectors}, made, LocalExecutor()
    )

    class Made(Artifact):
        files, facts = made.files, made.facts

    out = alone(tmp_path / "again", vectors, Made(made.location))
    assert infos(out.files) == infos(made.files)
    assert out.facts["agreement"] == made.facts["agreement"] and set(made.facts["agreement"]) == {"0"}


def test_gpus_leave_the_bytes_of_a_cpu(tiny, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(assign, "device_of", lambda executor: Device("cpu:0", 0.5))
    monkeypatch.setattr(labelling, "assign", None)  # nothing is compared otherwise
    out = alone(tmp_path / "alone", tiny.artifact("web_vec"), tiny.artifact("tree"))
    assert infos(out.files) == infos(steps["again"].files)
    n_rows = sum(part.rows for part in tiny.artifact("web_vec").parts)
    assert out.log == {"assign_gpus": 0.5, "rows_by_torch_gpu": n_rows}


def test_every_new_row_is_in_the_nearest_cluster(tiny):
    made, tree = tiny.artifact("new_tree"), tiny.artifact("tree")
    names = [file.name for file in tree.files if file.name.startswith("centroids-0-")]
    centroids = np.concatenate([read_embeddings(tree.location / name)[1] for name in names]).astype("f8")
    n = 0
    for i, part in enumerate(embedding_parts(tiny.artifact("exam_vec"))):
        rows, x = part.read()
        table = read_table(made.part(i))
        d = ((x[:, None].astype("f8") - centroids) ** 2).sum(-1)
        np.testing.assert_array_equal(table["row"], rows)
        np.testing.assert_array_equal(table["label"], d.argmin(1))
        np.testing.assert_allclose(table["sq_distance"], d.min(1), rtol=1e-4)
        n += len(rows)
    assert made.counts == {"rows": n, "kept": n, "dropped": 0, "bad": 0} and n == 40
    frozen = [infos(f for f in one.files if not f.name.startswith("part-")) for one in (made, tree)]
    assert frozen[0] == frozen[1] and len(frozen[0]) == 3
    assert pool_of(made).digest == tiny.artifact("exam").digest


def test_the_drift_is_that_of_all_rows(tiny):
    made, tree = tiny.artifact("new_tree"), tiny.artifact("tree")
    whole = []
    for one in (tree, made):
        tables = [read_table(one.part(i)) for i in range(len(one.parts))]
        label, distance = (np.concatenate([t[name].to_numpy() for t in tables]) for name in ("label", "sq_distance"))
        whole.append(Spread.zeros(20).add(label, distance))
    expected = drift(AssignConfig(), *whole, [(labels_of_level(tree, 1), 5)])
    found = made.facts["drift"]
    for name in ("old", "new"):  # the order of a sum
        assert found["mean_sq_distance"].pop(name) == pytest.approx(expected["mean_sq_distance"].pop(name))
    assert found == json.loads(json.dumps(expected)) and found["rows"]["new"] == 40
    assert [level["clusters"] for level in found["levels"]] == tree.facts["n_clusters"]


def test_whatever_reads_a_hierarchy_takes_it(steps):
    for ours, theirs in (("balanced_again", "balanced"), ("near_again", "near_clusters"), ("cells_again", "cells"),
                         ("unique_again", "unique_tree")):  # fmt: skip
        assert steps[ours].digest == steps[theirs].digest, ours
        assert steps[ours].counts == steps[theirs].counts
    assert steps["unique_tree"].counts["dropped"] > 0
    assert steps["closest_new"].counts["drawn"] == steps["level_new"].counts["drawn"] == 9
    assert 0 < steps["near_new"].counts["kept"] <= 2 * 20
    assert steps["twice"].digest == steps["new_tree"].digest  # and so does assign itself


def test_why_tells_the_clusters_of_a_new_image(steps, root):
    table = read_table(steps["new_tree"].part(0))
    key = read_table(pool_of(steps["new_tree"]).part(0))["key"][table["row"][0].as_py()].as_py()
    [found] = tell_why(Location(str(root)), key)["found"]
    [told] = [step for step in found["steps"] if step["step"] == "new_tree"]
    assert told["stage"] == "assign" and told["text"].startswith(f"in cluster {table['label'][0]} of 20 (")
    assert told["clusters"][1]["cluster"] == labels_of_level(steps["tree"], 1)[table["label"][0].as_py()]
    line = set(ancestors(steps["closest_new"]))
    assert steps["exam"].location.uri in line and steps["web"].location.uri not in line


def test_the_page_shows_the_drift(tiny, steps):
    def page_of(steps):
        return build_page(Run(steps, ReportConfig(), None, LocalExecutor(Resources())))

    html = page_of({name: steps[name] for name in ("exam", "tree", "exam_vec", "new_tree")})
    words, facts = Page(html).words(), steps["new_tree"].facts["drift"]
    assert facts["verdict"] in words
    assert f"{facts['levels'][1]['total_variation']:.3f}" in words and f"{100 * facts['far']['share']:.1f} %" in words
    assert "new_tree: 40 images in the clusters of tree" in words
    chart = html.split('id="drift"')[1].partition("</svg>")[0]
    assert chart.count('class="bar before"') == chart.count('class="bar after"') == 1
    assert 'id="drift"' not in page_of({name: steps[name] for name in ("exam", "tree", "exam_vec")})


def test_bars_of_the_histogram_stand_between_even_edges(tiny):
    histogram = tiny.artifact("new_tree").facts["drift"]["histogram"]
    steps = {round(b - a, 9) for a, b in pairwise(histogram["edges"])}
    assert len(steps) == 1 and sum(histogram["old"]) == pytest.approx(1) == sum(histogram["new"])


def test_vectors_of_another_backbone_are_refused(tiny, tmp_path):
    words = r"backbone of assign.hierarchy: got pixels, \d+ wide, for .*, 32 wide"
    with pytest.raises(UserError, match=words) as caught:
        alone(tmp_path, tiny.artifact("exam_copy"), tiny.artifact("tree"))
    assert "same backbone" in caught.value.hint and not list(tmp_path.iterdir())


def test_no_new_images_are_refused(tiny, tmp_path):
    class Empty(Artifact):
        starts = np.zeros(1, np.int64)

    with pytest.raises(UserError, match=r"assign\.embeddings must have images: got none"):
        alone(tmp_path, Empty(tiny.artifact("exam_vec").location), tiny.artifact("tree"))


def test_a_hierarchy_whose_centroids_have_changed_is_refused(tiny, tmp_path):
    tree = tiny.artifact("tree")
    shutil.copytree(tree.location.path, tmp_path / "tree")
    at = tmp_path / "tree" / "centroids-0-0000000.parquet"
    at.write_bytes(at.read_bytes() + b"x")
    with pytest.raises(TaskError, match="must be the file that its manifest names: its sha256 differs"):
        alone(tmp_path / "out", tiny.artifact("exam_vec"), Artifact(Location(str(tmp_path / "tree"))))
    assert not (tmp_path / "out" / at.name).exists()


def test_what_is_no_hierarchy_is_refused(tiny):
    tree = recipe(tiny.images)
    bad = {"stage": "assign", "embeddings": "exam_vec", "hierarchy": "web_vec"}
    with pytest.raises(
        UserError, match=r"bad\.hierarchy must name a step of stage cluster: got 'web_vec', a embed step"
    ):
        parse_recipe({**tree, "steps": {**tree["steps"], "bad": bad}}, STAGES)
    bad = {"stage": "union", "members": ["tree", "new_tree"]}
    with pytest.raises(UserError, match=r"bad\.members must name a step of stage pool or embed"):
        parse_recipe({**tree, "steps": {**tree["steps"], "bad": bad}}, STAGES)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"stage": "sample", "mode": "level", "level": 2, "target": 9}, "sample.level must be below .*: got 2 of 2"),
        ({"stage": "retrieve", "mode": "cluster", "level": 2, "seeds": ["web_vec"]}, "retrieve.level must be below"),
    ],
)
def test_a_level_that_is_not_there_is_told(tiny, root, step, words):
    with pytest.raises(UserError, match=words):
        run_more(tiny, root, {"bad": {**step, "hierarchy": "new_tree"}})
