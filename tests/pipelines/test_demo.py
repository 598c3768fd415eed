import io
import json
import shutil

import pytest
from rich.console import Console

from curation.store import Location
from pipelines.demo import POOL, RUN, Found, last_screen, run_demo, verdict
from pipelines.demo_pool import TRUTH
from pipelines.engine import read_root
from pipelines.errors import UserError

FAST = [
    f"{step}.{key}={value}"
    for step in ("first", "second")
    for key, value in (("n_steps", 4), ("warmup_steps", 1), ("batch", 16), ("n_local", 1))
]


def demo(root, capsys):
    run_demo(Location(str(root)), FAST, "serial", True)
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def summary(root, capsys):
    return demo(root, capsys)


def test_what_was_planted_is_found_in_the_run_itself(root, summary):
    assert summary["duplicates"]["precision"] >= 0.95 and summary["duplicates"]["recall"] >= 0.98
    assert summary["leaks"]["recall"] == 1
    assert summary["duplicates"]["planted"] > 300 and summary["leaks"]["planted"] > 50
    steps = read_root(Location(str(root / RUN)))
    exact = steps["web"].counts["exact_duplicate"]
    assert summary["duplicates"]["dropped"] == steps["unique"].counts["dropped"] + exact
    assert summary["leaks"]["dropped"] == steps["clean"].counts["dropped"]


def test_every_number_is_that_of_an_artifact(root, summary):
    steps = read_root(Location(str(root / RUN)))
    assert [row["step"] for row in summary["steps"]] == list(steps)
    for row in summary["steps"]:
        counts = steps[row["step"]].counts
        assert [row[key] for key in ("rows", "kept", "dropped", "bad")] == [
            counts.get(key) for key in ("rows", "kept", "dropped", "bad")
        ]
    assert summary["accuracy"] == {name: steps[name].facts["accuracy"] for name in summary["accuracy"]}
    assert summary["classes"]["curated"]["images"] == steps["balanced"].counts["kept"]
    assert summary["classes"]["raw"]["ratio"] >= 20
    assert 'id="classes"' in (steps["page"].location / "index.html").read().decode()
    assert summary["report"] == str(steps["page"].location / "index.html")


def test_the_pool_is_not_written_again_and_nothing_is_made_twice(root, summary, capsys):
    written = {path: path.stat().st_mtime_ns for path in (root / POOL).rglob("*")}
    again = demo(root, capsys)
    assert {row["state"] for row in again["steps"]} == {"done before"}
    assert {path: path.stat().st_mtime_ns for path in (root / POOL).rglob("*")} == written
    assert {**again, "steps": 0} == {**summary, "steps": 0}


def test_without_the_truth_every_decision_is_the_same(root, summary, tmp_path, capsys):
    shutil.copytree(root / POOL, tmp_path / POOL)
    (tmp_path / POOL / TRUTH).unlink()
    blind = demo(tmp_path, capsys)
    assert not blind["planted_truth"] and "duplicates" not in blind and "classes" not in blind
    seeing, unseeing = (read_root(Location(str(at / RUN))) for at in (root, tmp_path))
    for name in seeing:
        assert (seeing[name].digest == unseeing[name].digest) == (name != "page"), name
    assert "truth.parquet is absent" in printed(blind)


def printed(summary):
    screen = io.StringIO()
    Console(width=80, file=screen).print(last_screen(summary))
    return screen.getvalue()


def test_the_last_screen_fits_80_columns_and_says_it_all(summary):
    text = printed({**summary, "report": "page.html"})
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for words in ("near-duplicates", "leaks of the exam", "effective classes", "raw pixels", "page.html", "precision"):
        assert words in text
    for row in summary["steps"]:
        assert f"{row['step']} ({row['stage']})" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.9, 0.5, 0.6, 0.7), ("does not beat raw pixels", "Both trained", "better than", "+10.0 points")),
        ((0.4, 0.5, 0.6, 0.45), ("beats raw pixels", "Not every", "worse than", "-15.0 points")),
        ((0.6, 0.5, 0.6, 0.6), ("does not beat raw pixels", "Both trained", "as good as", "+0.0 points")),
    ],
)
def test_accuracies_are_put_into_plain_words(values, words):
    said = verdict(dict(zip(("knn_pixels", "knn_random", "knn_first", "knn_second"), values, strict=True)))
    assert all(word in said for word in words)


def test_precision_and_recall_are_of_the_files_counted():
    found = Found(planted=10, gone=9, dropped=12, right=6).as_plain()
    assert (found["precision"], found["recall"]) == (0.5, 0.9)


def test_the_demo_needs_a_local_folder():
    with pytest.raises(UserError, match=r"--root must be a local folder: got s3://bucket/x"):
        run_demo(Location("s3://bucket/x"), [], "serial", False)
