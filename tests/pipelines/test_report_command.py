"""``openlvd report``: the page of any root, what it says of an unfinished run, and what it refuses."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from test_report import Page, page_of, table_below

from curation.artifact import FORMAT
from curation.store import Location
from pipelines.cli import main
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.report.command import write_page
from pipelines.report.run import ReportConfig
from pipelines.roots import check_versions, finished_steps
from pipelines.stages.table import STAGES


@pytest.fixture
def root(tiny, tmp_path) -> Path:
    """A copy of the finished root."""
    shutil.copytree(tiny.root, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def openlvd(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # what it does to SIGTERM is not for this process

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["openlvd", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def page_at(root: Location, out: str | None = None, title: str | None = None) -> str:
    return write_page(root, out, title, LocalExecutor(), lambda *_: lambda *_: None).read().decode()


def shown(tiny):
    """The steps that a page of the whole run is about."""
    return {name: tiny.artifact(name) for name, result in tiny.results.items() if result.stage != "report"}


def run_until(tiny, root: Path, step: str) -> None:
    """As if the root were new, and its last run had been stopped after a step."""
    (root / "run.json").unlink()
    for _ in run_recipe(tiny.recipe, Location(str(root)), LocalExecutor(), step):
        pass


def edit_manifest(tiny, root: Path, step: str, **values) -> None:
    path = tiny.artifact(step, root).location.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_page_of_a_finished_root_is_that_of_its_steps(tiny, root, openlvd):
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    code, said, _ = openlvd("report", root, "--title", "My <images>")
    assert (code, said) == (0, f"{root}/report.html\n")
    html = (root / "report.html").read_text()
    assert html == page_of(shown(tiny), title="My <images>")
    assert "My &lt;images&gt;" in html and "not finished" not in html
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "report.html"}
    assert after == before


def test_out_says_where_the_page_goes(tiny, root, tmp_path, openlvd):
    out = tmp_path / "pages/one.html"
    assert openlvd("report", root, "--out", out)[:2] == (0, f"{out}\n")
    assert f"<title>{ReportConfig().title}</title>" in out.read_text()
    assert not (root / "report.html").exists() and [path.name for path in out.parent.iterdir()] == ["one.html"]


def test_a_root_on_s3_has_the_page_of_a_local_one(tiny, root, on_s3):
    for path in root.rglob("*"):
        if path.is_file():
            (on_s3 / str(path.relative_to(root))).write(path.read_bytes())
    assert page_at(on_s3) == page_at(Location(str(root)))
    assert (on_s3 / "report.html").exists()


def test_the_page_of_an_unfinished_run_says_what_is_to_do(tiny, root):
    run_until(tiny, root, "clean")
    names = list(tiny.results)
    n_done = names.index("clean") + 1
    done, left = names[:n_done], names[n_done:]
    html = page_at(Location(str(root)))
    page = Page(html)
    said = f"This run is not finished. {n_done} of {len(names)} steps are, and this page is about them. "
    assert f"{said}Still to do: {', '.join(left)}." in page.words()
    rows = {row[0]: row for row in table_below(page, "step")}
    assert len(rows) == len(names)
    for name in left:  # on a phone the stage stands below the name
        stage = tiny.results[name].stage
        assert rows[f"{name}{stage}, not finished"][1:] == [stage, "", "", "", "", "", "not finished"]
    svg = html[html.index('<svg class="graph"') : html.index("</svg>", html.index('<svg class="graph"'))]
    boxes = re.findall(r'<rect class="box (\w+)".*?<text class="name"[^>]*>([^<]*)<.*?"count"[^>]*>([^<]*)<', svg)
    assert sorted(name for _, name, _ in boxes) == sorted(names)
    assert {name for kind, name, _ in boxes if kind == "missing"} == set(left)
    assert {name for _, name, words in boxes if words == "not finished"} == set(left)
    assert len(done) + len(left) == len(boxes)


def test_an_artifact_that_was_deleted_is_not_finished(tiny, root):
    shutil.rmtree(root / "score")
    assert "Still to do: score." in Page(page_at(Location(str(root)))).words()
    assert "score" not in finished_steps(Location(str(root)))


def test_the_page_of_a_run_that_goes_on_is_written_anew(tiny, root):
    run_until(tiny, root, "near")
    first = page_at(Location(str(root)))
    run_until(tiny, root, list(tiny.results)[-1])
    assert "not finished" in first and page_at(Location(str(root))) == page_of(shown(tiny))


def refused(openlvd, *args):
    """The sentence and the hint of a refusal."""
    code, out, err = openlvd("report", *args)
    message, empty, hint = err.strip().splitlines()
    assert (code, out, empty) == (2, "", "")
    return message.removeprefix("error: "), hint.removeprefix("hint: ")


def test_a_root_without_a_finished_step_is_refused(tiny, root, openlvd):
    noted = json.loads((root / "run.json").read_text())
    nothing = {name: {**entry, "path": None} for name, entry in noted["steps"].items()}
    (root / "run.json").write_text(json.dumps({**noted, "steps": nothing}))
    message = f"a step of {root} must be finished: got none of {len(nothing)}"
    assert refused(openlvd, root) == (message, "run the recipe first")
    assert not (root / "report.html").exists()


def test_what_is_no_root_is_refused(tmp_path, openlvd):
    for missing in (tmp_path, tmp_path / "none"):
        assert refused(openlvd, missing)[0] == f"{missing} must be the root of a run: it has no run.json"
    for other in ("{", "[]", "{}", '{"steps": 7}', '{"steps": {"a": 1}}', '{"steps": {"a": {}}}'):
        (tmp_path / "run.json").write_text(other)
        expected = f"{tmp_path} must be the root of a run: its run.json does not say the steps of one"
        assert refused(openlvd, tmp_path)[0] == expected


def test_steps_of_another_version_are_refused_by_name(tiny, root, openlvd):
    now = STAGES["pool"].version
    edit_manifest(tiny, root, "web", version=now - 1)
    (root / "report.html").write_text("the page of yesterday")
    said = f"every step must be as this openlvd makes it: got web, of pool version {now - 1}, not {now}"
    assert refused(openlvd, root) == (said, "run the recipe again: what another version has made is made anew")
    edit_manifest(tiny, root, "usable", stage="choose", version=9)
    edit_manifest(tiny, root, "near", format=FORMAT + 1)
    said += "; usable, of the stage choose (version 9), which it does not have"
    said += f"; near, of format {FORMAT + 1}, not {FORMAT}"
    assert refused(openlvd, root)[0] == said
    (tiny.artifact("score", root).location.path / "manifest.json").write_text("{")
    assert refused(openlvd, root)[0] == f"{said} and 1 more"
    with pytest.raises(UserError, match=r"got score, of a manifest\.json that cannot be read$"):
        check_versions({"score": tiny.artifact("score", root)})
    assert (root / "report.html").read_text() == "the page of yesterday"


def test_the_version_of_a_page_that_a_run_made_does_not_matter(tiny, root):
    edit_manifest(tiny, root, "page", version=0)
    assert page_at(Location(str(root))) == page_of(shown(tiny))


def test_a_place_that_cannot_be_written_to_is_refused(tiny, root, tmp_path, openlvd):
    message, hint = refused(openlvd, root, "--out", tmp_path)
    assert (message, hint) == (
        f"--out must be a file: got the folder {tmp_path}",
        f"for example --out {tmp_path}/report.html",
    )
    (tmp_path / "file").write_text("")
    message, hint = refused(openlvd, root, "--out", tmp_path / "file/page.html")
    assert message.startswith(f"cannot write {tmp_path}/file/page.html: ") and "--out" in hint
    assert "must be a path or s3://bucket/key" in refused(openlvd, root, "--out", "gs://bucket/page.html")[0]
