import json
import math
import sys

import pytest

from curation.store import Location
from training.log import Log
from training.trainer import TrainResources, train

VALUES = {"loss": 1.5, "rank": math.nan, "grad_norm": math.inf, "alarms": ["few"], "lr": 0.0}


def lines(file):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read().decode().splitlines()]


def test_lines_are_json_and_what_is_not_finite_is_null(place):
    with Log(place, 7) as log:
        for step in (7, 9):
            log.add(step, VALUES)
        log.flush()
        assert len(lines(place / "metrics-0000007.jsonl")) == 2
        log.add(11, VALUES)
    expected = {"loss": 1.5, "rank": None, "grad_norm": None, "alarms": ["few"], "lr": 0.0}
    files = sorted(entry.name for entry in place.list() if entry.name.startswith("metrics-"))
    assert len(files) == (1 if place.is_local else 2)  # on S3 one for each time it was flushed
    found = [line for name in files for line in lines(place / name)]
    assert found == [{"step": step, **expected} for step in (7, 9, 11)]


def test_lines_are_there_while_a_run_goes_on(tmp_path):
    log = Log(Location(str(tmp_path / "log")), 0)
    assert lines(log.file) == []
    log.add(0, VALUES)
    assert len(lines(log.file)) == 1


def test_what_was_written_is_kept_when_a_run_fails(place):
    with pytest.raises(KeyboardInterrupt), Log(place, 0) as log:
        log.add(0, VALUES)
        raise KeyboardInterrupt
    assert len(lines(place / "metrics-0000000.jsonl")) == 1


def test_a_process_that_begins_at_the_same_step_begins_its_file_anew(place):
    for _ in range(2):
        with Log(place, 3) as log:
            log.add(3, VALUES)
    assert len(lines(place / "metrics-0000003.jsonl")) == 1


def test_numbers_are_in_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Log(Location(str(tmp_path)), 0) as log:
        for step in (0, 10, 20, 30):
            log.add(step, VALUES | {"loss": 2.0 - step / 100})
    with Log(Location(str(tmp_path)), 20) as log:  # a run that goes on from step 20
        log.add(20, VALUES | {"loss": 0.5})
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert scalars == pytest.approx({0: 2.0, 10: 1.9, 20: 0.5})


def test_tensorboard_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with Log(Location(str(tmp_path)), 0) as log:
        log.add(0, VALUES)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics-0000000.jsonl"]


def test_a_run_writes_a_line_every_few_steps(digit_shards, tiny, tmp_path):
    result = train(tiny, digit_shards, Location(str(tmp_path)), TrainResources(log_every=3))
    written = lines(Location(str(tmp_path / "log" / "metrics-0000000.jsonl")))
    assert [line["step"] for line in written] == [0, 2, 5, 7]  # the first has a rank, the last is the last
    assert written[0]["rank"] == result.metrics["rank"][0]
    for line in written:
        for name in ("loss", "dino_loss", "grad_norm", "usage_perplexity", "skipped"):
            assert line[name] == result.metrics[name][line["step"]]
        assert line["mfu"] is None  # no peak is known of a CPU
        assert line["alarms"].items() <= result.alarms.items()
    for line in written[1:]:  # no step was timed when the first is told
        assert 0 <= line["wait_share"] <= 1 and line["images_per_second"] > 0 and line["seconds_left"] >= 0
