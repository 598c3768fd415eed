import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from curation.mix import MIX_FILE, spec_of, write_mix
from curation.store import Location
from training.checkpoint import checkpoints
from training.config import HeadConfig
from training.encoder import Encoder
from training.stream import Stream
from training.trainer import TrainDiverged, TrainResources, train


def bits(result):
    tensors = {k: v.numpy().tobytes() for k, v in result.backbone.state_dict().items()}
    return tensors | {k: v.tobytes() for k, v in result.metrics.items()}


def test_a_run_learns(digit_shards, tiny, tmp_path):
    config = replace(
        tiny, vit=replace(tiny.vit, width=64, depth=3), head=HeadConfig(prototypes=256, hidden=128, bottleneck=64),
        ibot_head=HeadConfig(prototypes=256, hidden=128, bottleneck=64), n_steps=80, batch=32, lr=3e-3,
        warmup_steps=10, momentum=0.95, init_gain=1.0,
        augment=replace(tiny.augment, global_scale=(0.85, 1), local_scale=(0.6, 1), aspect=(0.85, 1 / 0.85)),
    )  # fmt: skip
    result = train(config, digit_shards, Location(str(tmp_path)))
    start, end = ({k: v[part].mean() for k, v in result.metrics.items()} for part in (slice(10), slice(-10, None)))
    ln_k = np.log(256)
    assert start["dino_loss"] > ln_k - 0.3
    assert start["ibot_loss"] > (ln_k - 0.3) / 2
    assert end["dino_loss"] < start["dino_loss"] - 0.5
    assert end["ibot_loss"] < start["ibot_loss"] - 0.25
    assert max(end["teacher_entropy"], end["ibot_teacher_entropy"]) < ln_k - 0.5
    assert result.metrics["usage_perplexity"][-10:].min() > 25  # no collapse onto a few prototypes
    assert (result.metrics["skipped"] == 0).all()


@pytest.mark.parametrize("ibot_weight", [1.0, 0.0])
def test_workers_and_restarts_change_no_bit(digit_shards, tiny, tmp_path, ibot_weight):
    tiny = replace(tiny, ibot_weight=ibot_weight)
    whole = train(tiny, digit_shards, Location(str(tmp_path / "whole")))
    assert whole.timing.images == 8 * tiny.batch
    assert 0 < whole.timing.wait_share < 1
    resources = TrainResources(n_workers=1, prefetch=2, checkpoint_every=3)
    steps = []

    def interrupt(step, n_steps, message):
        assert n_steps == 8
        assert "teacher entropy" in message
        assert ("iBOT" in message) == (ibot_weight > 0)
        assert "(DINO " in message
        assert "nan" not in message
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt

    out = Location(str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(tiny, digit_shards, out, resources, interrupt)
    resumed = train(tiny, digit_shards, out, resources, interrupt)
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert resumed.timing.resumed_at == 3
    assert bits(resumed) == bits(whole)
    again = train(tiny, digit_shards, out, resources)  # nothing but the last steps after step 6
    assert bits(again) == bits(whole)
    assert checkpoints(out / "scratch") == [3, 6]


RUN = """
    import sys, torch
    sys.path.insert(0, sys.argv[5])
    from conftest import TINY
    from dataclasses import replace
    from curation.store import Location
    from training.trainer import TrainResources, train
    config = replace(TINY, n_steps=24, n_open=1, centering=sys.argv[3])
    resources = TrainResources(n_workers=int(sys.argv[4]), checkpoint_every=4)
    train(config, Location(sys.argv[1]), Location(sys.argv[2]), resources, lambda *a: print(a[0], flush=True))
"""


@pytest.mark.parametrize(("centering", "before", "after"), [("softmax", 1, 0), ("sinkhorn", 0, 2), ("sinkhorn", 2, 1)])
def test_sigkill_changes_no_bit(labelled_digits, tiny, tmp_path, run_python, centering, before, after):
    """Killed in the middle of a shard (of 50 or 70 images) and of an epoch (of 120); 24 steps show 192.

    The last checkpoint holds all that a step changes, metrics and bad samples: its bytes are theirs.
    """
    config, out = replace(tiny, n_steps=24, n_open=1, centering=centering), Location(str(tmp_path / "out"))
    process = run_python(RUN, labelled_digits.uri, out.uri, centering, before, Path(__file__).parent)
    for line in process.stdout:
        if int(line) >= 10:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    newest = checkpoints(out / "scratch")[-1]
    assert 8 <= newest < 24
    resumed = train(config, labelled_digits, out, TrainResources(n_workers=after, checkpoint_every=4))
    assert resumed.timing.resumed_at == newest
    place = Location(str(tmp_path / "whole"))
    whole = train(config, labelled_digits, place, TrainResources(checkpoint_every=4))
    assert bits(resumed) == bits(whole)
    assert resumed.bad_samples == whole.bad_samples == {"broken": "undecodable"}
    last = "scratch/checkpoint-0000024.safetensors"
    assert (out / last).read() == (place / last).read()


def test_a_torn_checkpoint_is_passed_over(digit_shards, tiny, tmp_path):
    out, resources = Location(str(tmp_path)), TrainResources(checkpoint_every=3)
    whole = train(tiny, digit_shards, out, resources)
    newest = tmp_path / "scratch" / "checkpoint-0000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "scratch" / ".side-left-by-a-kill").write_bytes(b"x")
    resumed = train(tiny, digit_shards, out, resources)
    assert resumed.timing.resumed_at == 3
    assert bits(resumed) == bits(whole)
    assert not list((tmp_path / "scratch").glob(".side*"))


def test_a_checkpoint_of_another_run_is_refused(digit_shards, make_shards, tiny, tmp_path):
    out, resources = Location(str(tmp_path / "out")), TrainResources(checkpoint_every=3)
    train(tiny, digit_shards, out, resources)
    with pytest.raises(ValueError, match=r"got other train.lr \(0.001 there, 0.002 here\)"):
        train(replace(tiny, lr=2e-3), digit_shards, out, resources)
    with pytest.raises(ValueError, match=r"got other train.ibot_weight \(1.0 there, 0.0 here\)"):
        train(replace(tiny, ibot_weight=0.0), digit_shards, out, resources)
    with pytest.raises(ValueError, match="got other the shards"):
        train(tiny, make_shards(tmp_path / "other", [[("a", b"x")]]), out, resources)


def test_no_steps_give_the_initial_weights_without_shards(tiny, tmp_path):
    config = replace(tiny, n_steps=0)
    result = train(config, Location(str(tmp_path / "nowhere")), Location(str(tmp_path)))
    expected = Encoder(config).backbone.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in result.backbone.state_dict().items())
    assert not result.backbone.training
    assert len(result.metrics["loss"]) == 0


def test_steps_that_are_not_finite_are_counted_and_stop_the_run(digit_shards, tiny, tmp_path, monkeypatch):
    import training.train_step as module

    original, bad_steps, n = module.dino_prototype_loss, {2, 4, 5}, iter(range(100))

    def sometimes_nan(*args):
        found = original(*args)
        return found._replace(loss=found.loss * (np.nan if next(n) in bad_steps else 1))

    monkeypatch.setattr(module, "dino_prototype_loss", sometimes_nan)
    config = replace(tiny, max_bad_steps=3)
    result = train(config, digit_shards, Location(str(tmp_path / "a")))
    assert [s.step for s in result.skipped] == [2, 4, 5]
    assert all(len(s.keys) == tiny.batch for s in result.skipped)
    np.testing.assert_array_equal(np.flatnonzero(result.metrics["skipped"]), [2, 4, 5])
    n = iter(range(100))
    bad_steps.add(3)
    with pytest.raises(TrainDiverged, match=r"train.max_bad_steps \(3\) .* got steps 2..4"):
        train(config, digit_shards, Location(str(tmp_path / "b")))


def test_bad_samples_are_listed_and_survive_a_restart(make_shards, tiny, tmp_path, digits, png):
    samples = [(f"{i}", png(image)) for i, image in enumerate(digits[0][:20])] + [("broken", b"no image")]
    shards = make_shards(tmp_path / "shards", [samples])
    out, resources = Location(str(tmp_path / "out")), TrainResources(checkpoint_every=4)
    first = train(tiny, shards, out, resources)
    assert first.bad_samples == {"broken": "undecodable"}
    stream = Stream(shards, batch=8, seed=tiny.seed, n_open=tiny.n_open)
    expected = [sum(s.key == "broken" for s in stream.batch(step)) for step in range(8)]
    np.testing.assert_array_equal(first.metrics["replaced"], expected)
    (tmp_path / "out/scratch/checkpoint-0000008.safetensors").unlink()
    again = train(tiny, shards, out, resources)
    assert again.timing.resumed_at == 4
    assert again.bad_samples == first.bad_samples
    assert bits(again) == bits(first)


def test_imports_without_the_optional_parts(run_python):
    code = """
        import sys
        for name in ("ray", "faiss", "pydantic", "boto3", "webdataset", "pipelines", "transformers", "tensorboard"):
            sys.modules[name] = None
        import training.loader, training.probes, training.trainer
    """
    process = run_python(code)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_a_mix_is_trained_on_and_another_mix_is_another_run(make_shards, add_mix, tiny, tmp_path, digits, png):
    keys = [f"{i}" for i in range(20)]
    shards = make_shards(tmp_path / "shards", [[(key, png(digits[0][int(key)])) for key in keys]])
    counts = {"low": dict.fromkeys(keys[:10], 1), "high": dict.fromkeys(keys[10:], 1)}
    add_mix(shards, counts, {}, {"low": 0.5, "high": 0.5})
    out, resources = Location(str(tmp_path / "out")), TrainResources(checkpoint_every=4)
    first = train(tiny, shards, out, resources)
    assert bits(train(tiny, shards, out, resources)) == bits(first)
    write_mix(MIX_FILE, spec_of(["low", "high"], {}, {"low": 0.4, "high": 0.6}), shards)
    with pytest.raises(ValueError, match="must be of the same run: got other the shards"):
        train(tiny, shards, out, resources)
