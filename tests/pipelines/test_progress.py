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


def test_a_step_may_say_what_it_counts_and_more(monkeypatch, capsys):
    now = iter([0.0, 31.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with StepProgress() as shown:
        shown._bar.disable = True
        update = shown.start("vec", "embed")
        update(310, 1000, "images", "12% waiting for images")
        assert shown._bar.tasks[0].fields["rate"] == "10 images/s, 12% waiting for images"
        update(620, 1000, "images")
    assert capsys.readouterr().err.splitlines() == [
        "vec (embed) 310 of 1,000 images, 10 images/s, 69 s left, 12% waiting for images",
        "vec (embed) 620 of 1,000 images, 10 images/s, 38 s left",
    ]


def test_quiet_is_quiet(monkeypatch, capsys):
    run_a_step(monkeypatch, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "a:smile:b"])
def test_names_are_shown_as_they_are(capsys, name):
    StepProgress().say(name)
    assert capsys.readouterr().err == name + "\n"
