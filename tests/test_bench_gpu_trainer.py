"""The parts of the GPU benchmark that train, on the CPU: what they make and what they go on from."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

import gpu_tiny  # noqa: E402
import gpu_trainer  # noqa: E402

from training.augment import make_crops  # noqa: E402
from training.probes import fit_probe, linear_predict  # noqa: E402

SCRIPT = ROOT / "tests" / "bench" / "bench_gpu.py"
FREE = ("n_steps", "lr", "warmup_steps", "schedule", "batch", "weight_decay", "final_weight_decay", "final_momentum",
        "teacher_temperature_start", "teacher_temperature_steps", "freeze_last_layer_steps")  # fmt: skip


def test_the_run_that_is_timed_is_the_published_one():
    preset = yaml.safe_load((ROOT / "pipelines" / "presets" / "dinov3.yaml").read_text())
    preset["vit"] |= yaml.safe_load((ROOT / "pipelines" / "presets" / "vit-l.yaml").read_text())["vit"]
    size = gpu_trainer.full_size()
    ours = dataclasses.asdict(gpu_trainer.published(size.shapes[0], size))
    for name, value in preset.items():
        if isinstance(value, dict):
            assert {key: ours[name][key] for key in value} == value
        elif name not in FREE:
            assert ours[name] == value, name


def test_live_bytes_are_those_that_live_at_once():
    with gpu_trainer.LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b + 1
        view = c.view(10, 100)
        view.add_(1)
    assert live.most == 2 * 4000
    assert live.now == 2 * 4000


@pytest.fixture
def plan(tmp_path):
    gpu_tiny.made_images(tmp_path / "made.npz", 120, 0)
    return gpu_tiny.Plan(tmp_path / "run", tmp_path / "made.npz", "cpu", 1.0, 8, None, 0, True)


def test_drawn_crops_keep_to_their_ranges(plan):
    config = dataclasses.replace(gpu_tiny.recipe(plan, 100), batch=400)
    drawn = gpu_tiny.crops_drawn(config, np.random.default_rng(0))
    left, top, right, bottom = np.moveaxis(drawn["box"], -1, 0)
    assert min(left.min(), top.min()) == 0
    assert max(right.max(), bottom.max()) == 32
    assert (right > left).all() and (bottom > top).all()
    share = (right - left) * (bottom - top) / 32**2
    for part, (low, high) in ((share[:2], config.augment.global_scale), (share[2:], config.augment.local_scale)):
        assert low * 0.85 < part.min() < low * 1.15
        assert high * 0.85 < part.max() < high * 1.15
    changed = drawn["order"][..., 0] >= 0
    assert changed.mean() == pytest.approx(config.augment.jitter, abs=0.04)
    assert (np.sort(drawn["order"][changed], axis=-1) == np.arange(4)).all()
    assert (drawn["order"][~changed] == -1).all()
    assert drawn["flip"].mean() == pytest.approx(0.5, abs=0.04)
    assert drawn["amount"][..., 0].min() == pytest.approx(0.8, abs=0.01)
    assert np.abs(drawn["amount"][..., 3]).max() == pytest.approx(0.05, abs=0.001)


def test_crops_of_a_step_are_those_of_the_reference(plan):
    images, config = gpu_tiny.read_images(plan.data, "cpu"), gpu_tiny.recipe(plan, 100)
    made = gpu_tiny.step_crops(images, config, 7)
    rows = gpu_tiny.step_rows(config, images.n_train, 7)
    drawn = gpu_tiny.crops_drawn(config, np.random.default_rng([config.seed, 7, 2]))
    for slot, row in enumerate(rows):
        crops = make_crops(images.pixels[row].transpose(1, 2).numpy(), drawn[:, slot], (32, 16))
        for expected, part in zip(crops, made, strict=True):
            assert np.abs(expected.astype(int) - part[:, slot].numpy()).max() <= 1


def test_an_epoch_shows_every_image_once(plan):
    config = dataclasses.replace(gpu_tiny.recipe(plan, 100), batch=30)
    order = np.concatenate([gpu_tiny.step_rows(config, 96, step) for step in range(16)]).reshape(5, 96)
    assert (np.sort(order, axis=1) == np.arange(96)).all()
    assert len(np.unique(order[:, 0])) > 1


def test_the_linear_probe_is_that_of_the_evaluation():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 900)
    x = rng.normal(size=(5, 20))[labels] + rng.normal(size=(900, 20)) * 2.5
    images = gpu_tiny.Images(torch.zeros(900), labels, 600, "")
    ours = gpu_tiny.linear(torch.from_numpy(x).float(), images, 0)
    probe, _ = fit_probe(x[:600], labels[:600])
    assert ours == pytest.approx((linear_predict(probe, x[600:]) == labels[600:]).mean(), abs=1 / 300 + 1e-9)
    assert 0.4 < ours < 0.9


def test_a_killed_training_goes_on_with_the_same_bits(plan):
    weights = []
    for stops in ([None], [10, 15, None]):
        folder = plan.folder.with_name(f"run-{len(stops)}")
        folder.mkdir()
        for stop in stops:
            gpu_tiny.train(plan._replace(folder=folder), stop)
        weights.append(gpu_tiny.teacher_of(folder))
        facts = json.loads((folder / gpu_tiny.RUN).read_text())
        assert [point["step"] for point in facts["curve"]] == [10, 20]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert len(weights[0]) > 20
    with pytest.raises(ValueError, match=r"must be of the same run: got .*'seed': 0"):
        gpu_tiny.train(plan._replace(folder=folder, seed=1))


def test_a_second_call_waits_for_the_training_of_the_first(tmp_path):
    def call(wait):
        given = ["--part", "train-tiny", "--tiny", "--wait", wait, "--folder", tmp_path / "run", "--out",
                 tmp_path / "out", "--json", tmp_path / "rows.json"]  # fmt: skip
        done = subprocess.run([sys.executable, SCRIPT, *map(str, given)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "rows.json").read_text())

    (first,) = call(0)
    assert not first["finished"]
    assert not (tmp_path / "out").exists()
    rows = {row["case"]: row for row in call(200)}
    assert list(rows) == ["train", "knn", "linear", "linear-patches"]
    assert (tmp_path / "run" / "log.txt").read_text().count("from step 0") == 1
    assert rows["train"]["finished"] and rows["train"]["n_steps"] == 20 and rows["train"]["ratio"] > 0
    assert rows["knn"]["ours"] > 0.5  # colours tell the classes
    assert (tmp_path / "out" / gpu_tiny.WEIGHTS).stat().st_size < gpu_tiny.MOST_WEIGHTS
