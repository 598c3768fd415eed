from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.store import Location
from embedding.decode import BadImage, decode_rgb
from embedding.preprocess import pixel_descriptor
from pipelines.demo import RECIPE
from pipelines.demo_pool import CLASSES, N_BANK, N_BROKEN, N_EVAL, N_EXACT, TRUTH, make_demo_pool, spoilt
from pipelines.recipe import read_recipe
from pipelines.stages.table import STAGES

FOLDERS = ("crawl", "eval", "bank")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "pool"
    make_demo_pool(folder)
    return folder


@pytest.fixture(scope="module")
def truth(pool):
    return pq.read_table(pool / TRUTH).to_pylist()


def thresholds():
    steps = {step.name: step.config for step in read_recipe(Location(str(RECIPE)), [], STAGES).steps}
    return steps["near"].min_similarity, steps["clean"].min_similarity


def described(paths):
    return np.stack([pixel_descriptor(decode_rgb(path.read_bytes())) for path in paths])


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_truth_lists_every_file_of_the_crawl_once(pool, truth):
    names = [row["source"] for row in truth]
    assert names == sorted(set(names))
    assert set(names) == {path.name for path in files(pool / "crawl")}


def test_classes_have_a_long_tail_and_eval_and_bank_are_even(pool, truth):
    counts = Counter(row["label"] for row in truth if row["label"] is not None)
    ordered = [counts[str(label)] for label in CLASSES]
    assert len(counts) == 10
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[0] >= 20 * ordered[-1]
    for name, n in (("eval", N_EVAL), ("bank", N_BANK)):
        assert Counter(path.parent.name for path in files(pool / name)) == {str(label): n for label in range(10)}


def test_there_is_enough_of_everything(truth):
    kinds = Counter(row["kind"] for row in truth)
    assert len({row["digit"] for row in truth if row["kind"] == "original"}) == kinds["original"] >= 850
    assert len({row["digit"] for row in truth if row["kind"] in ("original", "leak")}) >= 900
    assert kinds["broken"] == N_BROKEN < 0.05 * len(truth)
    assert kinds["exact"] == N_EXACT
    assert max(Counter(row["group"] for row in truth if row["group"] is not None).values()) >= 4


def test_no_digit_stands_in_two_places_but_the_leaks(pool, truth):
    digits = {name: {int(path.stem) for path in files(pool / name)} for name in ("eval", "bank")}
    crawl = {row["digit"] for row in truth if row["digit"] is not None and row["leak_of"] is None}
    leaked = {row["digit"] for row in truth if row["leak_of"] is not None}
    assert not digits["bank"] & (digits["eval"] | crawl | leaked)
    assert not digits["eval"] & crawl
    assert leaked <= digits["eval"]


def test_names_of_the_crawl_say_nothing(pool, truth):
    names = {row["source"].partition(".")[0] for row in truth}
    assert {len(name) for name in names} == {20}
    first = Counter((row["source"][0], row["label"]) for row in truth)
    assert len({label for letter, label in first if letter == "0"}) >= 8  # a letter has images of nearly every class
    assert all(path.parent == pool / "crawl" for path in files(pool / "crawl"))


def test_broken_files_do_not_decode_and_all_others_do(pool, truth):
    for row in truth:
        decoded = decode_rgb((pool / "crawl" / row["source"]).read_bytes())
        assert isinstance(decoded, BadImage) == (row["kind"] == "broken"), row


@pytest.mark.parametrize("number", range(8))
def test_every_way_to_spoil_a_file_spoils_it(pool, truth, number):
    name = next(row["source"] for row in truth if row["kind"] == "original")
    assert isinstance(decode_rgb(spoilt((pool / "crawl" / name).read_bytes(), number)), BadImage)


def test_equal_seeds_give_equal_bytes_and_others_do_not(pool, tmp_path):
    make_demo_pool(tmp_path / "again")
    make_demo_pool(tmp_path / "other", seed=1)
    again, other = (
        {p.relative_to(root): p.read_bytes() for p in files(root)} for root in (tmp_path / "again", tmp_path / "other")
    )
    assert again == {path.relative_to(pool): path.read_bytes() for path in files(pool)}
    assert again != other


def test_a_folder_that_is_there_stays_as_it_is(pool):
    before = files(pool)
    with pytest.raises(FileExistsError, match="must be a new folder"):
        make_demo_pool(pool)
    assert files(pool) == before


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_of_the_recipe_finds_what_was_planted_and_nothing_else(tmp_path, seed):
    folder = tmp_path / "pool"
    make_demo_pool(folder, seed)
    rows = [row for row in pq.read_table(folder / TRUTH).to_pylist() if row["kind"] not in ("broken", "tiny")]
    exam = files(folder / "eval")
    x, e = described([folder / "crawl" / row["source"] for row in rows]), described(exam)
    near, leaked = thresholds()
    digit = np.array([row["digit"] for row in rows])
    large = np.array([row["kind"] != "thumbnail" for row in rows])  # the recipe leaves thumbnails out
    same, found = digit[:, None] == digit, x @ x.T >= near
    np.testing.assert_array_equal(found[large][:, large], same[large][:, large])
    names = np.array([str(path.relative_to(folder / "eval")) for path in exam])
    planted = np.array([row["leak_of"] for row in rows])[:, None] == names
    np.testing.assert_array_equal(x @ e.T >= leaked, planted)
