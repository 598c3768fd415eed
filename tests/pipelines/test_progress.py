"""Progress is for people: lines on stderr where there is no terminal, none when asked to be quiet."""

import io
import re

import pytest
from rich.console import Console

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
        update(620, 1000, "images")
        fields = shown._bar.tasks[0].fields
        assert (fields["speed"], fields["left"], fields["words"]) == ("10 images/s", "0:00:38 left", "")
    assert capsys.readouterr().err.splitlines() == [
        "vec (embed) 310 of 1,000 images, 12% waiting for images",
        "vec (embed) 620 of 1,000 images, 10 images/s, 38 s left",
    ]


@pytest.mark.parametrize("noted", [None, 5400, 5000])
def test_a_step_that_goes_on_is_as_fast_as_it_is_now(monkeypatch, capsys, noted):
    """What was done before counts neither for the rate nor for the time left, even told too high at first."""
    told = [(0.0, noted)] if noted else []
    told += [(100.0, 5000), (150.0, 5100), (200.0, 5200)]
    now = iter([0.0, *(at for at, _ in told)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with StepProgress() as shown:
        shown._bar.disable = True
        update = shown.start("first", "train")
        for _, done in told:
            update(done, 10_000, "steps")
    lines = capsys.readouterr().err.splitlines()
    pace = (1, 4800) if noted == 5000 else (2, 2400)
    assert lines[-1] == "first (train) 5,200 of 10,000 steps, {} steps/s, {} s left".format(*pace)
    assert lines[0] == "first (train) 5,000 of 10,000 steps"


WORDS = (
    "loss 12.345 (dino 8.123, ibot 4.222), teacher entropy 8.123 of 8.318, prototypes used 3999 of 4096, "
    "k-NN 45.6%, 12345 images/s, MFU 43%, waiting 12%, lr 0.00091"
)


@pytest.mark.parametrize("width", [80, 100, 150])
def test_words_leave_bar_numbers_and_time_left_alone(monkeypatch, width):
    """On a terminal all of them are seen, each line within its width."""
    now = iter([0.0, 10.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    shown = StepProgress()
    live = progress._Live(Console(file=out, force_terminal=True, width=width, color_system=None), disable=True)
    shown._bar = live
    update = shown.start("pretrained_long_name", "train")
    for done in (12_000, 12_050):
        update(done, 120_000, "steps", WORDS)
    live.console.print(*live.get_renderables())
    first, *rest = out.getvalue().splitlines()
    shape = r"pretrained_long_name \(train\) [━╸][━╸╺ ]* 12050/120000 1 steps/s \d:\d\d:\d\d 29:59:10 left *"
    assert re.fullmatch(shape, first), first
    assert " ".join(" ".join(rest).split()) == WORDS
    assert all(len(line) <= width for line in (first, *rest))


def test_quiet_is_quiet(monkeypatch, capsys):
    run_a_step(monkeypatch, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "a:smile:b"])
def test_names_are_shown_as_they_are(capsys, name):
    StepProgress().say(name)
    assert capsys.readouterr().err == name + "\n"
