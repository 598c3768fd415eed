import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from curation.store import Location
from embedding.vit import ViT
from training import trainer
from training.checkpoint import (
    CheckpointFailed,
    History,
    Run,
    SkippedStep,
    best_accuracy,
    checkpoints,
    load_best,
    restore_newest,
    save_best,
    save_checkpoint,
)
from training.config import HeadConfig
from training.monitor import alarms
from training.train_step import StepSettings, TrainState, train_step
from training.trainer import TrainResources, train

CPU = torch.device("cpu")


def make_run(config, folder, steps=0, seed=0):
    """A run that has taken some steps on noise."""
    run = Run(config, "these shards", folder, TrainState(config, CPU), History.empty(config.n_steps))
    rng = np.random.default_rng(seed)
    for step in range(steps):
        crops = [
            torch.from_numpy(rng.integers(0, 256, (n, config.batch, size, size, 3), dtype=np.uint8))
            for n, size in ((2, config.image_size), (config.n_local, config.local_size))
        ]
        metrics = train_step(run.state, *crops, config, StepSettings(step, 1e-3, 0.05, 0.9, 0.04))
        for name, value in metrics._asdict().items():
            run.history.metrics[name][step] = value
    return run


def tensors(state):
    out = {f"student.{k}": v for k, v in state.student.state_dict().items()}
    out |= {f"teacher.{k}": v for k, v in state.teacher.state_dict().items()}
    for group in state.optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            out |= {f"{key}.{name}": v for key, v in state.optimizer.state[p].items()}
    return out | {"centre": state.centre_K, "ibot_centre": state.ibot_centre_K}


@pytest.mark.parametrize("fields", [{}, {"centering": "softmax", "ibot_head": None}, {"ibot_weight": 0.0}])
def test_all_that_a_step_changes_comes_back_bit_by_bit(tiny, place, fields):
    config = replace(tiny, **fields)
    run = make_run(config, place, steps=3)
    run.history.skipped.append(SkippedStep(1, ["a", "b"]))
    run.history.bad_samples["x"] = "undecodable"
    run.history.alarms["few"] = "step 1: all images fall on 1.3 prototypes"
    run.history.metrics["knn_accuracy"][1] = 0.3
    save_checkpoint(run, 3)
    again = make_run(config, place)
    assert restore_newest(again) == 3
    ours, theirs = tensors(again.state), tensors(run.state)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
    for name, values in run.history.metrics.items():
        np.testing.assert_array_equal(again.history.metrics[name], values, err_msg=name)
    for name in ("skipped", "bad_samples", "alarms"):
        assert getattr(again.history, name) == getattr(run.history, name)


def test_the_file_is_safetensors_that_names_what_it_holds(tiny, tmp_path):
    run = make_run(tiny, Location(str(tmp_path)), steps=1)
    save_checkpoint(run, 1)
    with safe_open(tmp_path / "checkpoint-0000001.safetensors", "pt") as file:
        meta, names = json.loads(file.metadata()["openlvd"]), set(file.keys())
    assert meta["step"] == 1 and meta["config"]["vit"]["width"] == 32
    moments = {f"optimizer.{key}.{name}" for name, _ in run.state.student.named_parameters()
               for key in ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    weights = {f"{part}.{name}" for part in ("student", "teacher") for name, _ in run.state.student.named_parameters()}
    metrics = {f"metrics.{name}" for name in run.history.metrics}
    assert names == moments | weights | metrics | {"centre", "ibot_centre", "history"}


def test_the_newest_stay(tiny, place):
    run = make_run(tiny, place)
    for step in (2, 4, 6, 8):
        save_checkpoint(run, step, keep=3)
    assert checkpoints(place) == [4, 6, 8]
    save_checkpoint(run, 10, keep=1)
    assert checkpoints(place) == [10]


def test_a_torn_one_of_a_later_step_does_not_push_a_whole_one_out(tiny, tmp_path):
    run = make_run(tiny, Location(str(tmp_path)), steps=1)
    for step in (4, 8):
        save_checkpoint(run, step)
    torn = tmp_path / "checkpoint-0000008.safetensors"
    torn.write_bytes(torn.read_bytes()[:500])
    assert restore_newest(run) == 4
    save_checkpoint(run, 6, keep=1)
    assert checkpoints(run.folder) == [6]
    assert restore_newest(run) == 6


def test_another_architecture_is_named_and_changes_nothing(tiny, tmp_path):
    folder = Location(str(tmp_path))
    save_checkpoint(make_run(tiny, folder), 1)
    others = {
        "vit.depth": replace(tiny, vit=replace(tiny.vit, depth=3)),
        "head.prototypes": replace(tiny, head=HeadConfig(prototypes=65, hidden=64, bottleneck=32)),
        "vit.ffn": replace(tiny, vit=replace(tiny.vit, ffn="swiglu")),
    }
    for name, config in others.items():
        run = make_run(config, folder)
        before = {key: value.clone() for key, value in tensors(run.state).items()}
        with pytest.raises(ValueError, match=rf"step 1 must be of the same run: got other train\.{name} \("):
            restore_newest(run)
        assert all(torch.equal(value, before[key]) for key, value in tensors(run.state).items())
    run = make_run(tiny, folder)
    run.data = "others"
    with pytest.raises(ValueError, match="got other the shards"):
        restore_newest(run)
    with pytest.raises(ValueError, match=r"train\.ibot_head\.prototypes \(48 there, None here\)"):
        restore_newest(make_run(replace(tiny, ibot_head=None), folder))


def test_what_is_no_checkpoint_of_ours_is_named(tiny, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "checkpoint-0000003.safetensors")
    with pytest.raises(ValueError, match=r"must have format openlvd-checkpoint-\d+: got None in .*0000003"):
        restore_newest(make_run(tiny, Location(str(tmp_path))))


# a full disk

FULL = """
    import resource, sys
    sys.path.insert(0, sys.argv[3])
    from conftest import TINY
    from curation.store import Location
    from training.checkpoint import CheckpointFailed
    from training.trainer import TrainResources, train

    def fill(step, *_):
        if step == 4:  # from here on no file may be longer: what a full disk says, by another name
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    try:
        train(TINY, Location(sys.argv[1]), Location(sys.argv[2]), TrainResources(checkpoint_every=3), fill)
    except CheckpointFailed as e:
        print(e)
"""


def test_a_full_disk_leaves_the_old_checkpoint(digit_shards, tiny, tmp_path, run_python):
    out = Location(str(tmp_path / "out"))
    process = run_python(FULL, digit_shards.uri, out.uri, Path(__file__).parent)
    said, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert said.count("\n") == 1
    assert "a checkpoint must fit where it is kept: " in said and "checkpoint-0000006.safetensors" in said
    assert "could not be written (" in said and "go on from them" in said
    assert checkpoints(out / "scratch") == [3]
    assert not list((tmp_path / "out" / "scratch").glob(".side*"))  # half a file takes no room
    resumed, whole = (train(tiny, digit_shards, place) for place in (out, Location(str(tmp_path / "whole"))))
    assert resumed.timing.resumed_at == 3
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(resumed.backbone.state_dict()[name], value)


def test_a_folder_that_cannot_be_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointFailed, match="could not be written"):
        save_checkpoint(make_run(tiny, Location(str(tmp_path / "file" / "scratch"))), 1)


# the best


def test_the_best_is_a_backbone_and_its_step(tiny, place):
    run = make_run(tiny, place, steps=2)
    with pytest.raises(FileNotFoundError):
        load_best(place, ViT(tiny.vit))
    save_best(run, 2, 0.5)
    assert best_accuracy(run.folder) == 0.5
    vit = ViT(tiny.vit, seed=9)
    assert load_best(place, vit) == 2
    for name, value in run.state.teacher.backbone.state_dict().items():
        assert torch.equal(vit.state_dict()[name], value)
    assert checkpoints(place) == []  # no checkpoint to go on from, nor one of those that make room


@pytest.fixture
def scripted(monkeypatch):
    """The k-NN accuracies of all measured steps; keeps what the teacher was after each step."""
    seen = {}

    def script(values):
        measure = trainer._measure

        class Images:
            def __init__(self, *_):
                pass

            def accuracy(self, backbone, device):
                return next(self.values)

        def measured(job, images, step):
            images.values = iter([values[step]])
            seen[step + 1] = {k: v.clone() for k, v in job.run.state.teacher.backbone.state_dict().items()}
            measure(job, images, step)

        monkeypatch.setattr(trainer, "LabelledImages", Images)
        monkeypatch.setattr(trainer, "_measure", measured)
        return seen

    return script


ACCURACIES = {1: 0.2, 3: 0.5, 5: 0.4, 7: 0.5}  # of steps 2, 4, 6 and 8; the first of equals is the best


def stop_at(last):
    def progress(step, *_):
        if step == last:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("stop", [None, 3, 4, 5, 7])
def test_the_best_is_kept_whenever_a_run_is_cut(digit_shards, tiny, tmp_path, scripted, stop):
    config = replace(tiny, knn_every=2, result="best")
    out, resources = Location(str(tmp_path)), TrainResources(checkpoint_every=3)
    seen = scripted(ACCURACIES)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            train(config, digit_shards, out, resources, stop_at(stop))
    result = train(config, digit_shards, out, resources)
    assert result.timing.resumed_at == ((stop - 1) // 3 * 3 if stop else 0)
    assert result.step == 4
    for name, value in seen[4].items():
        assert torch.equal(result.backbone.state_dict()[name], value)
    measured = [ACCURACIES.get(step, math.nan) for step in range(8)]
    np.testing.assert_array_equal(result.metrics["knn_accuracy"], measured)
    last = train(replace(config, result="last"), digit_shards, Location(str(tmp_path / "last")), resources)
    assert last.step == 8
    for name, value in seen[8].items():
        assert torch.equal(last.backbone.state_dict()[name], value)


# alarms


def test_alarms_outlive_a_restart(digit_shards, tiny, tmp_path, monkeypatch):
    """A run that was cut says what the whole one says, though the reason lies before the checkpoint."""

    def once(step, metrics, config):
        return alarms(step, metrics, config) | ({"few": "one prototype"} if step == 1 else {})

    monkeypatch.setattr(trainer, "alarms", once)
    out, resources = Location(str(tmp_path / "out")), TrainResources(checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, digit_shards, out, resources, stop_at(5))
    resumed = train(tiny, digit_shards, out, resources)
    whole = train(tiny, digit_shards, Location(str(tmp_path / "whole")), resources)
    assert resumed.timing.resumed_at == 3
    assert whole.alarms["few"] == "step 1: one prototype"
    assert resumed.alarms == whole.alarms
