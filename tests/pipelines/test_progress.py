"""Progress is for people: lines on stderr where there is no terminal, none when asked to be quiet."""

import pytest

from pipelines import progress
from pipelines.progress import StepProgress


def run_a_step(monkeypatch, quiet):
    now = iter([0.0, 10.0, 31.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with StepProgress(quiet) as shown:
        shown._bar.disable = True  # no terminal, whatever the tests run in
        update = shown.start("near", "neighbors")
        for done in (100, 310, 400):
            update(done, 1000)
        shown.stop()
        shown.say("near done")


def test_a_long_step_says_its_rate_and_time_left(monkeypatch, capsys):
    run_a_step(monkeypatch, quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["near (neighbors) 310 of 1,000, 10/s, 69 s left", "near done"]


def test_quiet_is_quiet(monkeypatch, capsys):
    run_a_step(monkeypatch, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "a:smile:b"])
def test_names_are_shown_as_they_are(capsys, name):
    StepProgress().say(name)
    assert capsys.readouterr().err == name + "\n"
