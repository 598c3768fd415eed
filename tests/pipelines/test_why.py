"""The story of an image agrees with the artifacts, image by image."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path
from test_cli import openlvd
from tiny import digit, noise_png, recipe

from curation.artifact import Artifact, finish, part_name, pool_of, read_table, write_table
from curation.store import Location
from pipelines.engine import read_root, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES
from pipelines.why.clusters import rank_in_cluster
from pipelines.why.run import Run, Seat
from pipelines.why.steps import NOTHING_TO_SAY, TELL
from pipelines.why.story import print_story, tell_why

Story = dict[str, Any]


def run(tree: dict[str, Any], root: Path | Location, until: str | None = None) -> dict[str, Artifact]:
    parsed = parse_recipe(tree, STAGES)
    results = list(run_recipe(parsed, Location(str(root)), LocalExecutor(parsed.resources), until))
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


BASE = (
    "web exam both usable web_copy exam_copy both_copy near unique clean raw first web_vec tree balanced shards score"
)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """The tiny run with one chain of steps, whatever else other tests need there."""
    root = tmp_path_factory.mktemp("why") / "root=1"  # "=" is not to be read as a column
    shutil.copytree(tiny.root, root, ignore=shutil.ignore_patterns(".lock"))
    run({**recipe(tiny.images), "steps": base_steps(tiny.images)}, root)
    return root


def base_steps(images: Path) -> dict[str, Any]:
    steps = recipe(images)["steps"]
    return {name: steps[name] for name in BASE.split()}


@pytest.fixture(scope="module")
def more(tiny, base, tmp_path_factory) -> Path:
    """The same with more steps: other settings of stages, and what works on the union."""
    root = tmp_path_factory.mktemp("why") / "more"
    shutil.copytree(base, root, ignore=shutil.ignore_patterns(".lock"))
    steps = base_steps(tiny.images) | {
        "large": {"stage": "select", "pool": "web", "where": "WIDTH >= 40 and format = 'jpeg'"},
        "alike": {"stage": "neighbors", "embeddings": "web_copy", "n_neighbors": 200, "min_similarity": 0.9},
        "leaks": {"stage": "decontaminate", "embeddings": "web_copy", "reference": "exam_copy", "neighbors": "alike",
                  "mode": "component", "min_similarity": 0.95},
        "akin": {"stage": "neighbors", "embeddings": "both_copy", "n_neighbors": 2, "min_similarity": 0.9},
        "groups": {"stage": "dedup", "neighbors": "akin", "max_drop_fraction": 1.0, "keep": "first"},
        "ranked": {"stage": "dedup", "neighbors": "akin", "max_drop_fraction": 1.0, "keep": "first",
                   "rule": "semdedup"},
        "apart": {"stage": "dedup", "neighbors": "akin", "max_drop_fraction": 1.0, "rule": "greedy"},
        "like": {"stage": "dedup", "neighbors": "akin", "max_drop_fraction": 1.0, "keep": "first", "max_chain": 0.93},
        "closest": {"stage": "sample", "hierarchy": "tree", "target": 40, "pick": "closest"},
        "exam_vec": {"stage": "embed", "pool": "exam", "backbone": "first"},
        "near_exam": {"stage": "retrieve", "mode": "sample", "embeddings": "web_copy", "seeds": ["exam_copy"],
                      "n_neighbors": 2, "target": 30},
        "from_clusters": {"stage": "retrieve", "mode": "cluster", "hierarchy": "tree", "seeds": ["exam_vec"],
                          "min_hits": 2, "per_cluster": 3},
        "capped": {"stage": "retrieve", "mode": "cluster", "hierarchy": "tree", "seeds": ["exam_vec", "web_vec"],
                   "min_hits": 2, "max_rows": 1},
        "some_exam": {"stage": "select", "pool": "exam", "where": "label < '2'"},
        "some_copy": {"stage": "embed", "pool": "exam", "selection": "some_exam", "backbone": "pixels"},
        "two_leaks": {"stage": "decontaminate", "embeddings": "web_copy", "reference": ["some_copy", "exam_copy"],
                      "min_similarity": 0.99},
        "blend": {"stage": "mix", "pool": "both", "components": ["large", "exam"], "homogeneous": {"exam": 0.1},
                  "heterogeneous": {"large": 1.0}},
        "blended": {"stage": "shards", "pool": "both", "selection": "blend", "shard_rows": 20},
    }  # fmt: skip
    run({**recipe(tiny.images), "steps": steps}, root)
    return root


def tell(root: Path | Location, asked: str) -> Story:
    """The one image that is found; all of the story can be said in JSON."""
    story = json.loads(json.dumps(tell_why(Location(str(root)), asked), allow_nan=False))
    assert len(story["found"]) == 1, [found["pool"] for found in story["found"]]
    return story["found"][0]


def said(found: Story, step: str) -> Story:
    """What one step says."""
    [one] = [told for told in found["steps"] if told["step"] == step]
    return one


def artifact(root: Path, step: str) -> Artifact:
    found = read_root(Location(str(root)))[step]
    assert found is not None
    return found


def rows_of(root: Path, step: str) -> list[dict[str, Any]]:
    """Every row of a row-aligned artifact, with its position in the pool."""
    made = artifact(root, step)
    starts = pool_of(made).starts
    return [
        {**row, "position": int(starts[i]) + row["row"]}
        for i in range(len(made.parts))
        for row in read_table(made.part(i)).to_pylist()
    ]


def pool_rows(root: Path, step: str) -> list[dict[str, Any]]:
    pool = artifact(root, step)
    return [row for i in range(len(pool.parts)) for row in read_table(pool.part(i)).to_pylist()]


def vectors(root: Path, step: str) -> dict[int, np.ndarray]:
    """float64 unit vectors of an embeddings artifact by position, from its bytes."""
    found = {}
    for row in rows_of(root, step):
        x = np.frombuffer(row["embedding"], "f2").astype("f4")
        x = x / np.float32(np.sqrt((x.astype("f8") ** 2).sum()))
        found[row["position"]] = x.astype("f8")
    return found


def test_every_stage_has_something_to_say_or_is_known_to_have_nothing():
    assert set(STAGES) == set(TELL) | NOTHING_TO_SAY
    assert not set(TELL) & NOTHING_TO_SAY


def test_an_image_that_was_drawn_is_found_in_its_shard(tiny, base):
    index = read_table(artifact(base, "shards").part(3)).to_pylist()[2]
    found = tell(base, index["key"])
    told = said(found, "shards")
    raw = said(found, "raw")["shard"]
    places = [f"in `{name}` (in {shard}, once an epoch)" for name, shard in (("raw", raw), ("shards", told["shard"]))]
    assert found["verdict"] == f"I{'; '.join(places)[1:]}"
    assert (told["shard"], found["dropped_by"], found["closing"]) == ("shard-0000003.tar", [], [])
    data = Path(told["path"]).read_bytes()[told["offset"] : told["offset"] + told["length"]]
    assert hashlib.sha256(data).hexdigest() == found["key"] == index["key"]
    with tarfile.open(told["path"]) as tar:
        assert tar.getmember(told["member"]).offset_data == told["offset"]
    assert Path(said(found, "web")["path"]).read_bytes() == data
    order = [step["step"] for step in found["steps"]]
    assert order == [name for name in read_root(Location(str(base))) if name in order]
    assert said(found, "balanced")["outcome"] == "kept"


def test_an_image_that_an_expression_drops(more):
    told = said(tell(more, "0050.png"), "large")
    assert (told["outcome"], told["values"]) == ("dropped", {"width": 32, "format": "png"})
    assert told["text"] == "WIDTH >= 40 and format = 'jpeg' is not true (format is png, width is 32)"
    assert said(tell(more, "copy-0004.jpg"), "large")["outcome"] == "kept"


def test_a_step_beside_the_way_to_a_set_does_not_count(more):
    """An image that other steps drop too: each set of shards is explained by what its own rows went through."""
    found = tell(more, "leak-0150.png")
    assert said(found, "leaks")["outcome"] == "dropped"
    assert found["closing"] == [
        "Not in `shards`: dropped by `clean` (decontaminate)",
        "Not in `blended`: dropped by `large` (select)",
    ]
    assert found["dropped_by"] == ["clean", "large"]


def test_a_near_copy_says_of_which_and_how_similar(tiny, base):
    names, x = pool_rows(base, "web"), vectors(base, "web_copy")
    dropped = [row for row in rows_of(base, "unique") if not row["kept"]]
    assert len(dropped) == 10
    for row in dropped[:4]:
        found = tell(base, names[row["position"]]["key"])
        told, stays = said(found, "unique"), names[row["representative"]]
        assert "; not in `shards`: dropped by `unique` (dedup): near copy of copy-00" in found["verdict"]
        assert (found["dropped_by"], found["closing"]) == (["unique"], ["Not in `shards`: dropped by `unique` (dedup)"])
        assert told["representative"]["similarity"] == float(x[row["position"]] @ x[row["representative"]])
        assert told["representative"]["key"] == stays["key"]
        assert Path(told["representative"]["path"]) == tiny.images / "web" / stays["source"]
        assert told["strongest"]["similarity"] == row["similarity"]
        assert [hop["key"] for hop in told["chain"]] == [stays["key"]]
        kept = said(tell(base, stays["source"]), "unique")
        assert (kept["outcome"], kept["component_images"]) == ("kept", 2)
        assert [one["key"] for one in kept["dropped"]] == [found["key"]]
        assert not [step for step in found["steps"] if step["step"] in ("clean", "web_vec", "tree", "balanced")]


def test_a_chain_through_a_component_is_a_shortest_one(more):
    """Over the union, at a similarity that joins what is merely alike; many an edge is known to one end alone."""
    rows, edges = rows_of(more, "groups"), rows_of(more, "akin")
    n, keys = len(rows), [row["key"] for step in ("web", "exam") for row in pool_rows(more, step)]
    strength = {(e["position"], e["near_row"]): e["similarity"] for e in edges}
    strength |= {(b, a): s for (a, b), s in strength.items()}
    a, b = np.array(list(strength)).T
    hops = shortest_path(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)).tocsr(), unweighted=True)
    dropped = [row for row in rows if not row["kept"]]
    far = sorted(dropped, key=lambda row: hops[row["position"], row["representative"]])
    assert hops[far[-1]["position"], far[-1]["representative"]] > 2
    for row in [*far[:2], *far[-3:]]:
        start = row["position"]
        found = tell_why(Location(str(more)), keys[start])["found"][0]
        told = said(found, "groups")
        places = [start, *(hop["row_id"] for hop in told["chain"])]
        assert places[-1] == row["representative"]
        assert len(told["chain"]) == hops[start, row["representative"]]
        for hop, before in zip(told["chain"], places, strict=False):
            assert hop["similarity"] == strength[before, hop["row_id"]]
            assert hop["key"] == keys[hop["row_id"]]
            ways = [
                one for one in range(n) if hops[start, one] == hops[start, before] and (one, hop["row_id"]) in strength
            ]
            assert before == max(ways, key=lambda one: (strength[one, hop["row_id"]], -one))
        assert told["component_images"] == sum(r["representative"] == row["representative"] for r in rows)


def test_an_image_that_an_earlier_one_drops(more):
    """By rule semdedup the nearest earlier image counts, whether or not it stays itself."""
    rows, keys = rows_of(more, "ranked"), [row["key"] for step in ("web", "exam") for row in pool_rows(more, step)]
    x = vectors(more, "web_copy")
    dropped = [row for row in rows if not row["kept"] and row["position"] in x and row["representative"] in x]
    for stays in (True, False):
        row = next(row for row in dropped if rows[row["representative"]]["kept"] == stays)
        told = said(tell_why(Location(str(more)), keys[row["position"]])["found"][0], "ranked")
        earlier = told["representative"]
        assert (earlier["key"], earlier["kept"]) == (keys[row["representative"]], stays)
        assert earlier["similarity"] == float(x[row["position"]] @ x[row["representative"]])
        assert ("and stays" if stays else "and was dropped too") in told["text"]
    kept = next(row for row in rows if row["kept"] and any(r["representative"] == row["position"] for r in dropped))
    told = said(tell_why(Location(str(more)), keys[kept["position"]])["found"][0], "ranked")
    assert told["n_dropped"] == sum(not r["kept"] and r["representative"] == kept["position"] for r in rows)


def test_an_image_that_one_which_stays_drops(more):
    """By rule greedy what an image is dropped for stays."""
    rows, keys = rows_of(more, "apart"), [row["key"] for step in ("web", "exam") for row in pool_rows(more, step)]
    dropped = [row for row in rows if not row["kept"]]
    for row in dropped[:3]:
        told = said(tell_why(Location(str(more)), keys[row["position"]])["found"][0], "apart")
        assert (told["rule"], told["representative"]["key"]) == ("greedy", keys[row["representative"]])
        assert "which comes before it (most_pixels) and stays (similarity 0.9" in told["text"]
        back = said(tell_why(Location(str(more)), keys[row["representative"]])["found"][0], "apart")
        assert back["n_dropped"] == sum(r["representative"] == row["representative"] for r in dropped)
        assert back["text"].startswith("no image that stays and is near it comes before it (most_pixels); ")


def test_an_image_that_max_chain_cuts_off(more):
    """It stays, or is dropped for another that is like it, with the chain that joins the two."""
    rows, groups = rows_of(more, "like"), rows_of(more, "groups")
    keys = [row["key"] for step in ("web", "exam") for row in pool_rows(more, step)]
    cut = [r for r, g in zip(rows, groups, strict=True) if r["representative"] != g["representative"]]
    for kept in (True, False):
        row = next(row for row in cut if row["kept"] == kept)
        told = said(tell_why(Location(str(more)), keys[row["position"]])["found"][0], "like")
        assert (told["outcome"], told["max_chain"]) == ("kept" if kept else "dropped", 0.93)
        n = sum(r["representative"] == row["representative"] for r in rows)
        assert told["component_images"] == n
        if kept:
            assert ("at least 0.93 similar to it" in told["text"]) and (n == 1) == told["text"].startswith("no image")
        else:
            assert told["representative"]["similarity"] >= 0.93
            assert told["chain"][-1]["key"] == keys[row["representative"]]


def test_an_image_of_a_union_is_told_where_it_stands_there(more):
    n_web = len(pool_rows(more, "web"))
    found = tell(more, "1/0151.png")
    place = found["row_id"] + n_web
    assert said(found, "both")["row_id"] == said(found, "both_copy")["row_id"] == place
    assert keys_at(more, "blended", place) == {found["key"]}
    told = said(found, "blended")
    assert (told["outcome"], told["count_of"]) == ("in", {"exam": 1})
    assert found["verdict"].startswith("In the curated set `blended` (in shard-")
    assert said(found, "blend")["count_of"] == {"exam": 1}


def keys_at(root: Path, shards: str, position: int) -> set[str]:
    index = artifact(root, shards)
    rows = [row for i in range(len(index.parts)) for row in read_table(index.part(i)).to_pylist()]
    return {row["key"] for row in rows if row["row_id"] == position}


def test_an_exact_duplicate_goes_on_as_the_file_that_stayed(tiny, base, tmp_path):
    found, other = tell(base, "again.png"), tell(base, "0003.png")
    first, *rest = found["steps"]
    assert (first["outcome"], first["reason"], first["duplicate_of"]) == ("refused", "exact_duplicate", "0003.png")
    assert rest == other["steps"]
    assert found["verdict"] == f"Its bytes went on as 0003.png. {other['verdict']}"
    assert said(other, "web")["copies"] == ["again.png"]
    elsewhere = tmp_path / "holiday.png"
    elsewhere.write_bytes((tiny.images / "web" / "0003.png").read_bytes())
    assert tell(base, str(elsewhere)) == other  # known by its bytes


@pytest.mark.parametrize(
    ("name", "reason"), [("broken.jpg", "undecodable"), ("page.png", "undecodable"), ("tiny.png", "too_small")]
)
def test_a_refused_file_says_why(tiny, base, name, reason):
    found = tell(base, name)
    [told] = found["steps"]
    assert (told["outcome"], told["reason"], told["path"]) == ("refused", reason, f"{tiny.images}/web/{name}")
    assert found["verdict"].startswith(f"Not in the curated set: refused by `web` (pool): {name}, {reason}")
    assert tell(base, found["key"]) == found


def test_a_leak_and_the_exam_image_name_one_another(tiny, base):
    leaks = [row for row in rows_of(base, "clean") if not row["kept"]]
    web, exam = pool_rows(base, "web"), pool_rows(base, "exam")
    assert len(leaks) == 5
    for row in leaks[:2]:
        found = tell(base, web[row["position"]]["source"])
        told, theirs = said(found, "clean"), exam[row["near_row"]]
        assert (told["nearest"]["key"], told["similarity"]) == (theirs["key"], row["similarity"])
        assert Path(told["nearest"]["path"]) == tiny.images / "exam" / theirs["source"]
        assert "; not in `shards`: dropped by `clean` (decontaminate): near " in found["verdict"]
        reference = tell(base, theirs["source"])
        back = said(reference, "clean")
        assert (back["outcome"], back["n_dropped"]) == ("reference", 1)
        assert [one["key"] for one in back["dropped"]] == [found["key"]]
        query, bank = [step for step in reference["steps"] if step["step"] == "score"]
        assert (query["outcome"], bank["outcome"]) == ("query", "bank")
        assert query["label"] == bank["label"] == theirs["label"]
        assert "reference of `clean` (1 image was dropped because of it)" in reference["verdict"]


def test_a_chain_to_a_reference_image(more):
    """Component mode: every pair of the chain is near, the last image is of the reference."""
    web, exam = vectors(more, "web_copy"), vectors(more, "exam_copy")
    names = pool_rows(more, "web")
    far = max(rows_of(more, "leaks"), key=lambda row: row["hops"])
    assert far["hops"] > 1
    told = said(tell(more, names[far["position"]]["source"]), "leaks")
    assert told["hops"] == far["hops"] == len(told["chain"])
    x = web[far["position"]]
    for hop in told["chain"]:
        y = (exam if hop["pool"] == "exam" else web)[hop["row_id"]]
        assert hop["similarity"] == pytest.approx(x @ y, abs=1e-6) and hop["similarity"] >= 0.95
        x = y
    assert [hop["pool"] for hop in told["chain"]] == ["web"] * (far["hops"] - 1) + ["exam"]
    reference = tell(more, told["chain"][-1]["key"])
    direct = [row for row in rows_of(more, "leaks") if row["hops"] == 1 and row["near_row"] == reference["row_id"]]
    assert said(reference, "leaks")["n_dropped"] == len(direct)


def test_the_quota_of_a_cluster_adds_up(more):
    names, rows = pool_rows(more, "web"), rows_of(more, "balanced")
    for row in [next(r for r in rows if not r["kept"]), next(r for r in rows if r["kept"])]:
        found = tell_why(Location(str(more)), names[row["position"]]["key"])["found"][0]
        told = said(found, "balanced")
        own = [r for r in rows if r["cluster"] == row["cluster"]]
        assert told["cluster_images"] == len(own)
        assert told["quota"] == sum(r["count"] for r in own)
        assert told["count"] == row["count"]
        assert told["outcome"] == ("kept" if row["kept"] else "dropped")
        assert f"gave {row['quota']} of {len(own)} images" in told["text"]
        clusters = said(found, "tree")["clusters"]
        assert clusters[0]["images"] == len(own)
        tree = artifact(more, "tree")
        above = read_table(tree.location / "labels-1-0000000.parquet")["label"].to_pylist()
        assert clusters[1]["cluster"] == above[row["cluster"]]
        assert clusters[1]["images"] == sum(above[r["cluster"]] == above[row["cluster"]] for r in rows)


def test_the_closest_are_drawn(more):
    names = pool_rows(more, "web")
    for row in rows_of(more, "closest")[:40:10]:
        told = said(tell_why(Location(str(more)), names[row["position"]]["key"])["found"][0], "closest")
        assert (told["rank"] <= told["quota"]) == row["kept"]


def test_ties_in_a_cluster_go_to_the_lower_row(tmp_path):
    here = Location(str(tmp_path / "tree"))
    files = []
    for part, distances in enumerate(([0.5, 0.5, 0.1], [0.5, 0.2])):
        n = len(distances)
        rows, labels = pa.array(range(n), pa.int32()), pa.array([0, 0, 1][:n], pa.int32())
        table = pa.table({"row": rows, "label": labels, "sq_distance": pa.array(distances, pa.float32())})
        files.append(write_table(here / part_name(part), table))
    tree = finish(here, files, {"stage": "cluster"})
    ranks = [rank_in_cluster(Run({}, LocalExecutor()), tree, Seat(part, row, 0), 0) for part, row in
             ((1, 1), (0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert ranks == [1, 2, 3, 4]


def test_retrieval_names_the_seed_image(more):
    names, seeds = pool_rows(more, "web"), pool_rows(more, "exam")
    rows = rows_of(more, "near_exam")
    got = next(row for row in rows if row["kept"])
    cut = next(row for row in rows if row["near_row"] is not None and not row["kept"])
    not_asked = next(row for row in rows if row["near_row"] is None)
    told = {key: said(tell_why(Location(str(more)), names[row["position"]]["key"])["found"][0], "near_exam")
            for key, row in (("got", got), ("cut", cut), ("not", not_asked))}  # fmt: skip
    assert [told[key]["outcome"] for key in ("got", "cut", "not")] == ["kept", "dropped", "dropped"]
    assert told["got"]["nearest"]["key"] == seeds[got["near_row"]]["key"]
    assert told["got"]["similarity"] == got["similarity"]
    assert told["got"]["seed_pools"] == ["exam_copy"]
    assert "but not among the 30 images of the target" in told["cut"]["text"]
    assert told["not"]["text"] == "no seed image has it among its 2 nearest"
    seed = said(tell_why(Location(str(more)), seeds[got["near_row"]]["key"])["found"][0], "near_exam")
    assert (seed["outcome"], seed["n_retrieved"]) == ("seed", sum(r["near_row"] == got["near_row"] for r in rows))


def test_retrieval_from_clusters(more):
    names, rows = pool_rows(more, "web"), rows_of(more, "from_clusters")
    given = {row["cluster"] for row in rows if row["kept"]}
    left_out = next(row for row in rows if not row["kept"] and row["cluster"] in given)
    too_few = next(row for row in rows if row["cluster"] not in given)
    got = next(row for row in rows if row["kept"])
    texts = [said(tell_why(Location(str(more)), names[row["position"]]["key"])["found"][0], "from_clusters")["text"]
             for row in (left_out, too_few, got)]  # fmt: skip
    n = sum(row["cluster"] == left_out["cluster"] for row in rows)
    assert (
        texts[0]
        == f"its cluster {left_out['cluster']} gave 3 of {n} images; this one was not among them (picked random)"
    )
    assert texts[1] == f"fewer than 3 images of any seed pool lie in its cluster {too_few['cluster']}"
    assert texts[2].startswith(
        f"in cluster {got['cluster']}, where {got['hits']} seed images lie, retrieved for exam_vec"
    )


def test_a_cluster_that_qualifies_and_has_no_place_within_the_cap(more):
    """``capped`` draws one image a seed pool; the quotas of all other clusters are 0, whoever qualifies there."""
    names, rows = pool_rows(more, "web"), rows_of(more, "capped")
    sizes = Counter(row["cluster"] for row in rows)
    qualify = {row["cluster"] for row in rows_of(more, "from_clusters") if row["kept"]}  # for exam_vec, uncapped
    qualify |= {cluster for cluster, n in sizes.items() if n > 2}  # for web_vec, the very rows that were clustered
    given = {row["cluster"] for row in rows if row["kept"]}
    assert 1 <= len(given) <= 2 < len(qualify) and sizes.keys() - qualify
    for cluster in sizes.keys() - given:
        row = next(row for row in rows if row["cluster"] == cluster)
        found = tell(more, names[row["position"]]["key"])
        text = next(told["text"] for told in found["steps"] if told["step"] == "capped")  # then what it seeds
        n = "1 image" if sizes[cluster] == 1 else f"{sizes[cluster]} images"
        if cluster in qualify:
            assert text == (f"its cluster {cluster} gave none of {n}: its quota was 0, because max_rows 1 is shared by "
                            "all clusters that qualify")  # fmt: skip
        else:
            assert text == f"fewer than 3 images of any seed pool lie in its cluster {cluster}"


def test_of_several_references_the_nearest_is_named(more):
    """An image of both is of the first; each reference tells of its own images alone."""
    web, exam = pool_rows(more, "web"), pool_rows(more, "exam")
    seen = set()
    for row in rows_of(more, "two_leaks"):
        if not row["kept"]:
            told, theirs = said(tell(more, web[row["position"]]["source"]), "two_leaks"), exam[row["near_row"]]
            reference = "some_copy" if theirs["label"] < "2" else "exam_copy"
            assert (told["reference"], told["nearest"]["key"]) == (reference, theirs["key"])
            backs = [step for step in tell(more, theirs["source"])["steps"] if step["step"] == "two_leaks"]
            of_each = {back["reference"]: back["n_dropped"] for back in backs}
            assert of_each == ({"some_copy": 1, "exam_copy": 0} if reference == "some_copy" else {"exam_copy": 1})
            assert {back["nearest"]["key"] for back in backs} == {web[row["position"]]["key"]}
            seen.add(reference)
    assert seen == {"some_copy", "exam_copy"}


def test_a_story_of_s3_is_the_same(base, on_s3):
    for path in sorted(p for p in base.rglob("*") if p.is_file() and p.name != ".lock"):
        (on_s3 / f"root/{path.relative_to(base)}").write(path.read_bytes())
    for name in ("leak-0151.png", "0004.png"):
        here = json.dumps(tell_why(Location(str(base)), name))
        there = json.dumps(tell_why(on_s3 / "root", name))
        assert there.replace(str(on_s3 / "root"), str(base)) == here
        assert str(on_s3) in there


def png(i: int, tail: bytes = b"") -> bytes:
    """A picture; bytes after its end change its key alone."""
    out = io.BytesIO()
    digit(i).save(out, "PNG")
    return out.getvalue() + tail


def test_images_in_containers(place):
    """A member of a tar, a row of a table that gives no names, by every way to say it."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for i in range(3):
            data, info = png(i), tarfile.TarInfo(f"deep/{i}.png")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    (place / "in/some.tar").write(tar.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [png(7), png(8)]}), table)
    (place / "in/rows.parquet").write(table.getvalue())
    root = place / "root"
    run({"steps": {"crawl": {"stage": "pool", "source": str(place / "in")}}}, root)
    found = tell(root, "some.tar/deep/1.png")
    told = said(found, "crawl")
    assert (found["source"], found["member"]) == ("some.tar", "deep/1.png")
    assert told["path"] == str(place / "in/some.tar")
    at = told["inside"]["offset"]
    assert tar.getvalue()[at : at + told["n_bytes"]] == png(1)
    assert tell(root, f"{place}/in/some.tar/deep/1.png") == tell(root, hashlib.sha256(png(1)).hexdigest()) == found
    row = tell(root, "rows.parquet/1")
    assert said(row, "crawl")["details"] == [f"{place}/in/rows.parquet (row 1)"]
    assert row["key"] == hashlib.sha256(png(8)).hexdigest()
    for container in ("some.tar", str(place / "in/some.tar")):
        with pytest.raises(UserError, match=r"a path must be of one image: got some.tar of crawl") as e:
            tell(root, container)
        assert e.value.hint == "name one of them, for example some.tar/deep/0.png"


def test_an_image_in_two_pools_is_told_in_both(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder / "x").mkdir(parents=True)
        (tmp_path / folder / "x" / "1.png").write_bytes(png(1))
    (tmp_path / "b" / "x" / "2.png").write_bytes(png(2))
    steps: dict[str, Any] = {name: {"stage": "pool", "source": str(tmp_path / name)} for name in ("a", "b")}
    steps |= {"all": {"stage": "union", "members": ["a", "b"]}, "shards": {"stage": "shards", "pool": "all"}}
    root = tmp_path / "root"
    run({"steps": steps}, root)
    both = tell_why(Location(str(root)), "x/1.png")["found"]
    assert [found["pool"] for found in both] == ["a", "b"]
    assert [said(found, "shards")["outcome"] for found in both] == ["in", "twin"]  # a key stands in shards once
    assert said(both[1], "shards")["twin"]["path"] == str(tmp_path / "a" / "x" / "1.png")
    assert said(both[1], "shards")["text"].startswith("its bytes are in shard-0000000.tar as those of x/1.png of a, ")
    assert tell(root, "x/2.png")["pool"] == "b"
    monkeypatch.chdir(tmp_path / "b")
    (tmp_path / "a" / "x" / "1.png").unlink()
    by_path = tell_why(Location(str(root)), "../a/x/1.png")["found"]  # the bytes are in both, the path is of one
    assert [found["pool"] for found in by_path] == ["a", "b"]
    assert said(by_path[0], "a")["gone"] is True
    assert said(by_path[0], "a")["details"][0].endswith("/a/x/1.png, which is no longer there")
    (tmp_path / "b" / "x" / "2.png").write_bytes(png(3))
    assert tell(root, "x/2.png")["note"].startswith("the file of this name now has other bytes")


def test_sources_that_are_a_file_a_pattern_or_gone(tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "in" / "x" / f"{i}.png").write_bytes(png(i))
    sources = {"one": "in/x/0.png", "some": "in/*/1.png", "all": "in"}
    steps = {name: {"stage": "pool", "source": str(tmp_path / source)} for name, source in sources.items()}
    root = tmp_path / "root"
    run({"steps": steps}, root)
    assert {
        name: [
            (found["pool"], said(found, found["pool"])["path"])
            for found in tell_why(Location(str(root)), name)["found"]
        ]
        for name in ("0.png", "x/1.png", str(tmp_path / "in" / "x" / "1.png"))
    } == {
        "0.png": [("one", f"{tmp_path}/in/x/0.png"), ("all", f"{tmp_path}/in/x/0.png")],
        "x/1.png": [("some", f"{tmp_path}/in/x/1.png"), ("all", f"{tmp_path}/in/x/1.png")],
        f"{tmp_path}/in/x/1.png": [("some", f"{tmp_path}/in/x/1.png"), ("all", f"{tmp_path}/in/x/1.png")],
    }
    shutil.rmtree(tmp_path / "in")
    gone = [said(found, found["pool"]) for found in tell_why(Location(str(root)), "x/1.png")["found"]]
    assert [(told["path"], told["gone"]) for told in gone] == [(f"{tmp_path}/in/x/1.png", True)] * 2


def test_a_name_that_is_no_utf8(tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "in" / name).write_bytes(png(5))
    root = tmp_path / "root"
    run({"steps": {"web": {"stage": "pool", "source": str(tmp_path / "in")}}}, root)
    found = tell(root, "./caf%E9.png")
    assert said(found, "web")["path"] == str(tmp_path / "in" / name)
    assert tell(root, str(tmp_path / "in" / name)) == found
    out = io.StringIO()
    print_story({"found": [found], "not_done": []}, Console(file=out))
    assert f"{tmp_path}/in/caf\\udce9.png" in out.getvalue().splitlines()[4]


def test_several_keys_that_start_alike(tmp_path):
    seen: dict[str, bytes] = {}
    base = png(0)
    for i in range(1 << 16):
        data = base + i.to_bytes(4, "big")
        start = hashlib.sha256(data).hexdigest()[:6]
        if start in seen:
            break
        seen[start] = data
    (tmp_path / "in").mkdir()
    for name, content in (("a.png", data), ("b.png", seen[start])):
        (tmp_path / "in" / name).write_bytes(content)
    run({"steps": {"web": {"stage": "pool", "source": str(tmp_path / "in")}}}, tmp_path / "root")
    keys = sorted(hashlib.sha256(content).hexdigest() for content in (data, seen[start]))
    with pytest.raises(UserError, match=f"got '{start}', which {keys[0]}, {keys[1]} start with"):
        tell(tmp_path / "root", start)
    length = next(n for n in range(6, 64) if keys[0][:n] != keys[1][:n])
    assert tell(tmp_path / "root", keys[0][:length].upper())["key"] == keys[0]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("0" * 64, "searched were web (169 candidates), exam (40 candidates)"),
        ("kopy-0008.jpg", "the nearest names are copy-0008.jpg, "),
        ("abc", "a key needs at least 6 digits; searched were web"),
        ("", "a key needs at least 6 digits; searched were web"),
        ("s3://", "searched were web"),
        ("a\0b", "searched were web"),
        ("\udcff.png", "searched were web"),
    ],
)
def test_an_image_that_is_not_in_the_run(base, asked, hint):
    with pytest.raises(UserError, match="why needs a key or a path of an image of the run: got ") as e:
        tell(base, asked)
    assert hint in e.value.hint


def test_an_unfinished_run_is_told_so_far(tiny, tmp_path):
    root = tmp_path / "root"
    tree = {"steps": base_steps(tiny.images)}
    run(tree, root, until="unique")
    story = tell_why(Location(str(root)), "0001.png")
    assert story["not_done"] == [name for name in tree["steps"] if name not in read_done(root)]
    assert story["found"][0]["verdict"] == "In what `unique` has chosen so far (it has no near copy)"
    [dropped] = tell_why(Location(str(root)), "0004.png")["found"]
    assert dropped["dropped_by"] == ["unique"]
    out = io.StringIO()
    print_story(story, Console(file=out, highlight=False, emoji=False))
    assert out.getvalue().splitlines()[-1] == f"Not done yet: {', '.join(story['not_done'])}"


def read_done(root: Path) -> list[str]:
    return [name for name, step in read_root(Location(str(root))).items() if step is not None]


def test_an_image_without_a_vector(tmp_path):
    """The pool has it, but it is too large for the step that embeds, and no later step sees it."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(noise_png(rng, 24 if i else 32))
    steps = {
        "web": {"stage": "pool", "source": str(tmp_path / "in")},
        "vec": {"stage": "embed", "pool": "web", "backbone": "pixels", "max_bad_fraction": 0.5, "max_pixels": 24 * 24},
        "near": {"stage": "neighbors", "embeddings": "vec", "min_similarity": 0.99},
        "unique": {"stage": "dedup", "neighbors": "near"},
        "shards": {"stage": "shards", "pool": "web", "selection": "unique"},
    }
    run({"steps": steps}, tmp_path / "root")
    found = tell(tmp_path / "root", "0.png")
    assert [(step["step"], step["outcome"]) for step in found["steps"]] == [("web", "kept"), ("vec", "rejected")]
    assert found["verdict"].startswith("Not in the curated set `shards`: rejected by `vec` (embed): too_large, 32x32")
    kept = tell(tmp_path / "root", "1.png")
    assert said(kept, "near")["text"] == "no image is near it (similarity of at least 0.99)"
    assert kept["verdict"] == "In the curated set `shards` (in shard-0000000.tar, once an epoch)"


def test_what_is_no_run_or_has_no_pool(tmp_path):
    with pytest.raises(UserError, match="must be the root of a run"):
        tell(tmp_path, "0001.png")
    (tmp_path / "run.json").write_text('{"seed": 0, "steps": {"web": {"stage": "pool", "path": null}}}')
    with pytest.raises(UserError, match=r"a step of .* must be finished: got none of 1"):
        tell(tmp_path, "0001.png")


def test_a_root_of_another_version_is_refused(tiny, without):
    manifest = without("page") / "unique" / tiny.artifact("unique").location.name / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": ', '"version": 1000'))
    with pytest.raises(UserError, match="must be as this openlvd makes it: got unique, of dedup version 1000"):
        tell(manifest.parents[2], "0001.png")


def test_a_page_that_is_not_written_leaves_nothing_open(without):
    root = without("page")
    story = tell_why(Location(str(root)), "0004.png")
    assert story["not_done"] == ["page"]
    assert "so far" not in story["found"][0]["verdict"]


def test_names_are_shown_as_they_are_and_never_cut(tmp_path):
    odd = "a [bold]b :smile: \x1b[31m" + "long-" * 20 + ".png"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / odd).write_bytes(png(4))
    root = tmp_path / "root"
    run({"steps": {"web": {"stage": "pool", "source": str(tmp_path / "in")}}}, root)
    story = tell_why(Location(str(root)), odd)
    assert story["found"][0]["source"] == odd
    shown = str(tmp_path / "in" / odd.replace("\x1b", "\\x1b"))
    for is_terminal in (True, False):
        out = io.StringIO()
        print_story(story, Console(file=out, width=50, force_terminal=is_terminal, color_system=None))
        lines = out.getvalue().splitlines()
        assert "\x1b[31m" not in out.getvalue()
        if is_terminal:
            assert max(map(len, lines)) <= 50
            assert shown.replace(" ", "") in "".join(line.strip() for line in lines).replace(" ", "")
        else:
            assert any(line.strip() == shown for line in lines)


def test_the_command(tiny, base, tmp_path):
    said_ = openlvd("why", str(base), "0004.png", "--json", cwd=tmp_path)
    assert said_.returncode == 0, said_.stderr
    assert json.loads(said_.stdout) == json.loads(json.dumps(tell_why(Location(str(base)), "0004.png")))
    plain = openlvd("why", str(base), "0004.png", cwd=tmp_path)
    assert plain.stdout.splitlines()[0].startswith("0004.png in the pool web, key ")
    assert plain.stdout.splitlines()[-1] == "Not in `shards`: dropped by `unique` (dedup)"
    assert str(tiny.images / "web" / "copy-0004.jpg") in plain.stdout
    wrong = openlvd("why", str(base), "no.png", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: why needs a key or a path of an image of the run: got 'no.png'\n\nhint: ")
