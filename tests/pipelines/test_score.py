"""Columns for ``select``: those that the pool reckons from the pixels, and those of a head on embeddings."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file
from test_why import said, tell
from tiny import digit, noise_png, write_head

from curation.artifact import Artifact, read_table
from curation.embeddings import embedding_parts
from curation.pool import MEASURES, POOL_SCHEMA
from curation.selection import read_selection
from curation.store import Location
from embedding.decode import decode_rgb
from embedding.measures import measure
from embedding.preprocess import PIXELS_WIDTH
from embedding.score import read_head, score_rows
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES
from pipelines.why.story import tell_why

N = 30


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits, of which every third is larger, one picture of noise and one that is cut off."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        digit(i, 48 if i % 3 == 0 else 32).save(folder / f"{i:03d}.png")
    (folder / "noise.png").write_bytes(noise_png(np.random.default_rng(0), 40))
    (folder / "cut.png").write_bytes(noise_png(np.random.default_rng(1), 40)[:-80])
    return folder


def run_steps(root, **steps):
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    results = list(run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources)))
    return {r.name: Artifact(r.location) for r in results}, {r.name: r.state for r in results}


def base(images, **more):
    """A pool of small parts and the embeddings of its larger images."""
    return {
        "web": {"stage": "pool", "source": str(images), "part_rows": 8, "max_bad_fraction": 0.1, **more},
        "large": {"stage": "select", "pool": "web", "where": "width >= 40"},
        "vectors": {"stage": "embed", "pool": "web", "selection": "large", "backbone": "pixels"},
    }


def columns(artifact):
    return pa.concat_tables([read_table(artifact.part(i)) for i in range(len(artifact.parts))])


def kept_names(steps, name):
    found = []
    for i in range(len(steps["web"].parts)):
        rows = read_selection(steps[name].part(i)).rows
        found += read_table(steps["web"].part(i), ["source"])["source"].take(pa.array(rows)).to_pylist()
    return found


def test_measures_are_columns_of_the_pool_and_known_to_select(images, tmp_path):
    web = base(images, measures=["phash", "entropy", "blur", "brightness"])["web"]
    where = {
        "rich": "blur > 1000 and entropy > 3", "dark": "brightness < 70", "heavy": "bytes > 2000 and bytes = n_bytes",
        "alike": "bit_count(xor(('0x' || phash)::UBIGINT, ('0x' || phash)::UBIGINT)) = 0 and length(phash) = 16",
    }  # fmt: skip
    selects = {name: {"stage": "select", "pool": "web", "where": expression} for name, expression in where.items()}
    steps, _ = run_steps(tmp_path, web=web, **selects)
    table = columns(steps["web"])
    assert table.column_names == [*POOL_SCHEMA.names, *MEASURES]
    found = table.to_pylist()
    assert len(found) == N + 1 and steps["web"].counts["undecodable"] == 1
    for row in found:
        expected = measure(decode_rgb((images / row["source"]).read_bytes()), tuple(MEASURES))
        assert {name: row[name] for name in MEASURES} == {
            name: value if isinstance(value, str) else np.float32(value) for name, value in expected.items()
        }
    tests = {
        "rich": lambda row: row["blur"] > 1000 and row["entropy"] > 3, "dark": lambda row: row["brightness"] < 70,
        "heavy": lambda row: row["n_bytes"] > 2000, "alike": lambda row: True,
    }  # fmt: skip
    for name, test in tests.items():
        wanted = [row["source"] for row in found if test(row)]
        assert kept_names(steps, name) == wanted and wanted, name
    story = tell_why(Location(str(tmp_path)), "noise.png")["found"][0]
    assert story["steps"][0]["blur"] == pytest.approx(found[-1]["blur"])
    assert "blur is " in story["steps"][1]["text"] and "bytes" in story["steps"][3]["values"]


def test_a_pool_without_measures_has_the_bytes_it_had_and_one_of_some_has_these(images, tmp_path):
    steps, _ = run_steps(tmp_path, web=base(images)["web"], some=base(images, measures=["phash", "blur"])["web"])
    assert columns(steps["web"]).schema.names == POOL_SCHEMA.names
    some = columns(steps["some"])
    assert some.column_names == [*POOL_SCHEMA.names, "blur", "phash"]
    assert some.select(POOL_SCHEMA.names).equals(columns(steps["web"]))


@pytest.mark.parametrize(
    ("measures", "words"),
    [
        (["blurr"], r"pool.measures must be of entropy, blur, brightness, phash: got 'blurr'"),
        (["blur", "blur"], r"pool.measures must name each once: got blur, blur"),
    ],
)
def test_a_measure_that_is_none_is_told_when_the_recipe_is_read(images, measures, words):
    with pytest.raises(UserError, match=words):
        parse_recipe({"steps": base(images, measures=measures)}, STAGES)


def test_scores_are_those_of_the_head_block_by_block(tiny):
    scored, vectors = tiny.artifact("scored"), tiny.artifact("web_copy")
    head = read_head((tiny.images / "head.safetensors").read_bytes(), "x")
    assert scored.facts["column"] == "aesthetic" and scored.facts["backbone"] == vectors.facts["backbone"]
    assert scored.counts == {"rows": vectors.counts["kept"], "kept": vectors.counts["kept"], "dropped": 0, "bad": 0}
    values = []
    for i, part in enumerate(embedding_parts(vectors)):
        table = read_table(scored.part(i))
        rows, x = part.read()
        assert table.schema.types == [pa.int32(), pa.float32()] and table["row"].to_pylist() == rows.tolist()
        np.testing.assert_array_equal(table["aesthetic"].to_numpy(), score_rows(x, head))
        values += table["aesthetic"].to_pylist()
    assert 0 < min(values) < max(values) < 1
    kept = columns(tiny.artifact("liked"))["kept"].to_pylist()
    sizes = columns(tiny.artifact("web"))["n_bytes"].to_pylist()
    assert kept == [value > 0.4 and size > 1200 for value, size in zip(values, sizes, strict=True)]
    assert True in kept and False in kept


def test_rows_that_a_score_does_not_cover_are_null(images, tmp_path):
    write_head(tmp_path / "head.safetensors")
    head = str(tmp_path / "head.safetensors")
    steps = {
        **base(images),
        "small": {"stage": "select", "pool": "web", "where": "width < 0"},
        "none": {"stage": "embed", "pool": "web", "selection": "small", "backbone": "pixels"},
        "one": {"stage": "score", "embeddings": "vectors", "head": head},
        "two": {"stage": "score", "embeddings": "none", "head": head, "column": "other"},
        "any": {"stage": "select", "pool": "web", "scores": ["one", "two"], "where": "score between 0 and 1"},
        "not": {"stage": "select", "pool": "web", "scores": ["one"], "where": "not (score between 0 and 1)"},
        "null": {"stage": "select", "pool": "web", "scores": ["two", "one"],
                 "where": "score is null and other is null"},
        "first": {"stage": "select", "pool": "web", "scores": [], "where": "width >= 40"},
    }  # fmt: skip
    made, _ = run_steps(tmp_path / "root", **steps)
    large = [f"{i:03d}.png" for i in range(0, N, 3)] + ["noise.png"]
    assert kept_names(made, "any") == large == kept_names(made, "first")
    assert kept_names(made, "not") == []
    assert kept_names(made, "null") == [f"{i:03d}.png" for i in range(N) if i % 3]
    told = {one["step"]: one for one in tell_why(Location(str(tmp_path / "root")), "noise.png")["found"][0]["steps"]}
    assert told["one"]["outcome"] == "scored" and told["any"]["values"] == {"score": told["one"]["value"]}
    assert told["one"]["text"] == f"score is {told['one']['value']:.6g} (a head on pixels)"
    assert "two" not in told
    told = {one["step"]: one for one in tell_why(Location(str(tmp_path / "root")), "001.png")["found"][0]["steps"]}
    assert told["any"]["outcome"] == "dropped" and told["any"]["text"].endswith("is not true (score is null)")


def test_why_shows_the_score_that_a_selection_used(tiny):
    found = tell(tiny.root, "0003.png")
    value = said(found, "scored")["value"]
    assert said(found, "liked")["values"] == {"aesthetic": value, "bytes": said(found, "web")["n_bytes"]}
    assert f"aesthetic is {value:.6g}" in said(found, "liked")["text"]


def test_a_union_of_embeddings_is_scored_and_selected_from(images, tmp_path):
    write_head(tmp_path / "head.safetensors")
    for i in range(60, 66):
        digit(i).save(tmp_path / f"{i}.png")
    steps = {
        **base(images),
        "more": {"stage": "pool", "source": str(tmp_path / "6*.png")},
        "more_vectors": {"stage": "embed", "pool": "more", "backbone": "pixels"},
        "both": {"stage": "union", "members": ["web", "more"]},
        "both_vectors": {"stage": "union", "members": ["vectors", "more_vectors"], "pool": "both"},
        "scored": {"stage": "score", "embeddings": "both_vectors", "head": str(tmp_path / "head.safetensors")},
        "good": {"stage": "select", "pool": "both", "scores": ["scored"], "where": "score >= 0"},
    }
    made, _ = run_steps(tmp_path / "root", **steps)
    assert made["good"].counts["kept"] == made["scored"].counts["rows"] == N // 3 + 1 + 6
    found = tell_why(Location(str(tmp_path / "root")), "60.png")["found"][0]
    assert said(found, "good")["values"] == {"score": said(found, "scored")["value"]}


def test_a_head_is_known_by_its_content(images, tmp_path):
    steps = base(images)
    write_head(tmp_path / "a.safetensors")
    scored = {"stage": "score", "embeddings": "vectors", "head": str(tmp_path / "a.safetensors")}
    run_steps(tmp_path / "root", **steps, scored=scored)
    shutil.move(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    moved = {**scored, "head": str(tmp_path / "b.safetensors")}
    assert run_steps(tmp_path / "root", **steps, scored=moved)[1]["scored"] == "done before"
    write_head(tmp_path / "b.safetensors", activation="relu")
    assert run_steps(tmp_path / "root", **steps, scored=moved)[1]["scored"] == "done"


def with_head(tmp_path, images, **tensors):
    save_file({name: np.asarray(value, "f4") for name, value in tensors.items()}, tmp_path / "head.safetensors")
    return {
        **base(images),
        "scored": {"stage": "score", "embeddings": "vectors", "head": str(tmp_path / "head.safetensors")},
    }


def test_a_head_of_another_width_is_refused(images, tmp_path):
    steps = with_head(tmp_path, images, weight=np.ones((1, 5)), bias=[0])
    words = f"step scored: score.head must take the vectors of pixels, which have {PIXELS_WIDTH} numbers: got one for 5"
    with pytest.raises(UserError, match=words):
        run_steps(tmp_path / "root", **steps)


def test_a_score_that_is_not_finite_is_refused_by_name(images, tmp_path):
    steps = with_head(tmp_path, images, weight=np.full((1, PIXELS_WIDTH), 3e38), bias=[3e38])
    steps["scored"]["column"] = "quality"
    words = (
        r"step scored: quality must be finite: got -?(inf|nan) for row \d+ of .*part-.*, and so for \d+ of its \d+ rows"
    )
    with pytest.raises(UserError, match=words):
        run_steps(tmp_path / "root", **steps)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "score.head must be a safetensors file: no file .*head.bin"),
        (b"not a head", "head.bin must be a safetensors file: "),
    ],
)
def test_a_head_is_looked_at_before_anything_is_made(images, tmp_path, data, words):
    if data is not None:
        (tmp_path / "head.bin").write_bytes(data)
    steps = base(images) | {"x": {"stage": "score", "embeddings": "vectors", "head": str(tmp_path / "head.bin")}}
    with pytest.raises(UserError, match=words):
        run_steps(tmp_path / "root", **steps)
    assert not (tmp_path / "root").exists()


def test_scores_of_one_name_or_of_another_pool_are_refused(images, tmp_path):
    write_head(tmp_path / "head.safetensors")
    score = {"stage": "score", "embeddings": "vectors", "head": str(tmp_path / "head.safetensors")}
    select = {"stage": "select", "pool": "web", "scores": ["a", "b"], "where": "score > 0"}
    with pytest.raises(UserError, match=r"good.scores must have one column each: got score twice"):
        parse_recipe({"steps": {**base(images), "a": score, "b": score, "good": select}}, STAGES)
    with pytest.raises(UserError, match=r"good.scores must name a step of stage score: got 'vectors', a embed step"):
        parse_recipe({"steps": {**base(images), "good": {**select, "scores": ["vectors"]}}}, STAGES)
    other = {"stage": "pool", "source": str(images), "min_side": 40, "max_bad_fraction": 0.2}
    select = {**select, "pool": "other", "scores": ["a"]}
    with pytest.raises(UserError, match=r"select.scores must be of the pool that is selected from: got a, which"):
        run_steps(tmp_path / "root", **base(images), a=score, other=other, good=select)
    select = {**select, "pool": "web", "where": "scor > 0"}
    with pytest.raises(UserError, match=r"must be an expression over columns: .*scor") as caught:
        run_steps(tmp_path / "root", **base(images), a=score, good=select)
    assert "row_id" in caught.value.hint and "score, bytes;" in caught.value.hint
