"""``calibrate``: similarities as ``embed`` and ``neighbors`` have them, the draw, what is suggested, and the page."""

import re

import numpy as np
import pyarrow as pa
import pytest
from test_report import Page, page_of
from tiny import digit

from curation.artifact import Artifact, read_table
from curation.calibrate import calibrate
from curation.store import Location
from embedding.backbone import load_backbone
from embedding.embed import embed_images
from embedding.known_copies import TRANSFORMS, known_copies
from pipelines.cli import app
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages import calibrate as stage
from pipelines.stages.embed import MOST_THREADS
from pipelines.stages.table import STAGES

N = 45
SIDE = 80  # pixels of what is larger than the others
TWIN = (7, 20)  # pictures that are the same, in files that are not


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits in colour, of which every fifth is larger."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        digit(TWIN[0] if i == TWIN[1] else i, SIDE if i % 5 == 4 else 32).save(
            folder / f"{i:03d}.png", compress_level=9 if i == TWIN[1] else 1
        )
    return folder


def run_steps(root, loader_workers=0, **steps):
    recipe = parse_recipe({"resources": {"loader_workers": loader_workers}, "steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources))
    return {result.name: Artifact(result.location) for result in results}


def tree(images, **config):
    return {
        "web": {"stage": "pool", "source": str(images), "part_rows": 8},
        "small": {"stage": "select", "pool": "web", "where": "width < 80"},
        "fit": {"stage": "calibrate", "pool": "web", "backbone": "pixels", "n_images": N, **config},
    }


def columns(artifact):
    return pa.concat_tables([read_table(artifact.part(i)) for i in range(len(artifact.parts))])


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    more = {
        "vectors": {"stage": "embed", "pool": "web", "backbone": "pixels"},
        "near": {"stage": "neighbors", "embeddings": "vectors", "n_neighbors": 1, "min_similarity": 1e-6},
    }
    return run_steps(tmp_path_factory.mktemp("root"), **tree(images), **more)


@pytest.fixture(scope="module")
def x(images):
    """float32 (N, 13, d): the images and their copies, by the kernels alone, rounded as they are stored."""
    found = []
    for i, path in enumerate(sorted(images.iterdir())):
        data = path.read_bytes()
        files = [data, *known_copies(data, 0, i, 10**6)]
        found.append(embed_images(load_backbone("pixels"), files).embeddings.astype("f2").astype("f4"))
    return np.stack([rows / np.linalg.norm(rows.astype("f8"), axis=1, keepdims=True) for rows in found]).astype("f4")


def test_similarities_are_those_of_the_files_that_were_made(made, x):
    table = columns(made["fit"])
    assert table["row_id"].to_pylist() == list(range(N)) and len(made["fit"].parts) == 2
    for kind, name in enumerate(TRANSFORMS, 1):
        expected = np.einsum("nd,nd->n", x[:, 0].astype("f8"), x[:, kind].astype("f8"))
        np.testing.assert_allclose(table[name].to_numpy(), expected, atol=3e-7)
    assert table["jpeg"].to_numpy().mean() > 0.98 > table["flip"].to_numpy().mean()


def test_nearest_others_are_those_of_the_stage_neighbors(made):
    table, strongest = columns(made["fit"]), dict[int, tuple[int, float]]()
    for i in range(len(made["near"].parts)):
        for edge in read_table(made["near"].part(i)).to_pylist():  # the strongest of a row comes first
            row_id = int(made["web"].starts[i]) + edge["row"]
            strongest.setdefault(row_id, (edge["near_row"], edge["similarity"]))
    names = ("row_id", "near_row", "near_similarity")
    found = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    expected = [(row_id, *strongest[row_id]) for row_id in sorted(strongest)]
    for twin in TWIN:  # equal rows have similarity 1 there, here what the sum gives
        expected[twin] = (*expected[twin][:2], found[twin][2])
    assert found == expected
    assert found[TWIN[0]] == (*TWIN, pytest.approx(1))


def test_the_curve_is_that_of_the_kernel_and_the_facts_are_its_suggestion(made, x):
    expected, fit = calibrate(x, n_rows=N), made["fit"]
    table = read_table(fit.location / stage.CURVE)
    at = np.searchsorted(table["threshold"].to_numpy(), 0.9), np.searchsorted(expected.thresholds, 0.9)
    for name in ("recall", "precision", "false_per_image"):
        np.testing.assert_allclose(table[name].to_numpy(), getattr(expected, name), atol=0.03)
        assert table[name][at[0]].as_py() == pytest.approx(getattr(expected, name)[at[1]], abs=0.01)
    for kind, name in enumerate(TRANSFORMS):
        np.testing.assert_allclose(table[f"recall_{name}"].to_numpy(), expected.recall_of_each[kind], atol=0.03)
        np.testing.assert_allclose(table[f"precision_{name}"].to_numpy(), expected.precision_of_each[kind], atol=0.03)
    assert fit.facts["n_images"] == fit.facts["n_rows"] == N == fit.counts["kept"]
    assert fit.facts["backbone"] == made["vectors"].facts["backbone"]


def test_the_suggestion_is_a_row_of_the_curve(images, tmp_path):
    fit = run_steps(tmp_path, **tree(images, min_precision=0.8))["fit"]
    table = read_table(fit.location / stage.CURVE)
    precise = table["precision"].to_numpy() >= 0.8
    at, best = int(np.flatnonzero(precise)[0]), fit.facts["suggested"]
    assert 0 < at < precise.sum() + at and not precise[:at].any()
    assert np.float32(best["threshold"]) == table["threshold"].to_numpy()[at]
    for name in ("recall", "precision", "false_per_image"):
        assert best[name] == table[name][at].as_py()
    assert best["recall_of_each"] == {name: table[f"recall_{name}"][at].as_py() for name in TRANSFORMS}
    assert best["recall"] == pytest.approx(np.mean(list(best["recall_of_each"].values())))
    said = f"A min_similarity of {best['threshold']} finds {100 * best['recall']:.1f} % of the known copies"
    assert fit.facts["sure"] and fit.facts["verdict"].startswith(said)


def test_pictures_that_are_there_twice_spoil_precision_and_are_shown_first(made):
    """Their copies are as near to the other file: no threshold parts them, and the page shows the pair."""
    facts = made["fit"].facts
    assert facts["suggested"] is None
    assert facts["verdict"].startswith("No threshold has a precision of 0.99 in a pool of 45: 0.")
    html = page_of({name: made[name] for name in ("web", "fit")})
    section = html[html.index('id="thresholds"') : html.index('id="backbones"')]
    assert facts["verdict"] in section and "no threshold" in html
    assert re.findall(r'alt="(?:other )?image ([^"]*)"', section)[:2] == ["007.png", "020.png"]
    assert re.findall(r"<b>(\d\.\d{4})</b>", section)[0] == "1.0000"
    assert section.count("<img") == 12


def test_the_page_has_the_table_and_the_curves(images, tmp_path):
    made = run_steps(tmp_path, **tree(images, min_precision=0.8))
    html = page_of({name: made[name] for name in ("web", "fit")})
    page, best = Page(html), made["fit"].facts["suggested"]
    rows = {row[0]: row[1:] for row in page.cells}
    for name, recall in best["recall_of_each"].items():
        assert rows[name.replace("_", " ")][0] == f"{100 * recall:.1f} %"
    assert rows["all"] == [f"{100 * best['recall']:.1f} %", f"{100 * best['precision']:.1f} %"]
    lines = re.findall(r'<polyline class="curve (\w+)" points="([^"]*)"', html)
    heights = {name: [float(point.split(",")[1]) for point in points.split()] for name, points in lines}
    assert set(heights) == {"precision", "recall"}
    assert heights["recall"] == sorted(heights["recall"])  # lower and lower, as y grows downwards
    assert 'class="level"' in html and f"from {best['threshold']:.4g} on" in html


def test_a_sample_is_drawn_from_the_selection_by_seed(images, tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        config = {"selection": "small", "n_images": 20, "seed": seed}
        made = run_steps(tmp_path / str(len(drawn)), **tree(images, **config))
        drawn.append(columns(made["fit"])["row_id"].to_pylist())
        assert made["fit"].facts["n_rows"] == made["small"].counts["kept"] == 36
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(rows == sorted(set(rows)) and len(rows) == 20 and all(i % 5 != 4 for i in rows) for rows in drawn)
    facts = made["fit"].facts
    assert not facts["sure"] and "n_images: " in facts["verdict"]


def test_images_that_do_not_decode_are_counted_and_left_out(images, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "MAX_PIXELS", SIDE * SIDE - 1)
    fit = run_steps(tmp_path, **tree(images))["fit"]
    table = columns(fit).to_pylist()
    bad = [row for row in table if row["reason"]]
    assert [row["row_id"] for row in bad] == [i for i in range(N) if i % 5 == 4]
    assert {row["reason"] for row in bad} == {"too_large"} and all("80x80" in row["detail"] for row in bad)
    assert all(row["jpeg"] is row["near_row"] is None for row in bad)
    assert all(row["jpeg"] > 0 and row["near_row"] % 5 != 4 for row in table if not row["reason"])
    assert fit.counts == {"rows": N, "kept": 36, "dropped": 0, "bad": 9} and fit.facts["n_images"] == 36


@pytest.mark.parametrize("loader_workers", [2, 3])
def test_threads_and_processes_that_copy_and_decode_change_no_byte(made, images, tmp_path, loader_workers):
    assert (loader_workers > MOST_THREADS) == (loader_workers == 3)  # one of each kind
    assert run_steps(tmp_path, loader_workers, **tree(images))["fit"].digest == made["fit"].digest


@pytest.mark.parametrize(("where", "n"), [("width < 0", 0), ("source = '003.png'", 1)])
def test_one_image_is_too_few(images, tmp_path, where, n):
    steps = tree(images, selection="small")
    steps["small"]["where"] = where
    with pytest.raises(UserError, match=f"step fit: calibrate needs at least 2 images: got {n}"):
        run_steps(tmp_path, **steps)


def test_one_good_image_is_too_few(images, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "MAX_PIXELS", 1)
    with pytest.raises(UserError, match="calibrate needs at least 2 images that decode: got 0 of 45"):
        run_steps(tmp_path, **tree(images))


def test_the_command_says_what_it_found(made, tmp_path, capsys):
    args = ["calibrate", "--pool", made["web"].location.uri, "--backbone", "pixels", "--n-images", str(N)]
    app([*args, "--out", str(tmp_path / "out")], standalone_mode=False)
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [made["fit"].facts["verdict"], "", str(tmp_path / "out")]
    assert Artifact(Location(str(tmp_path / "out"))).digest == made["fit"].digest
