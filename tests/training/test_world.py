"""Two processes over gloo against one with the whole batch; each pair has a time of its own to end in."""

import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from curation.store import Location
from training import trainer
from training.prototype_loss import mean_logits, mean_softmax, sinkhorn_offset
from training.train_step import RANK_EVERY, StepSettings, TrainState, train_step
from training.trainer import TrainResources, train
from training.world import World, joined, share

CPU = torch.device("cpu")
PATIENCE_S = 240


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(name, rank, size, port, *args):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_world; test_world.run_job(*sys.argv[2:])"
    world = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), name, *map(str, args)]
    return subprocess.Popen(command, env=os.environ | world, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def in_two(name, *args):
    """What a function of this file gives in each of two processes."""
    port = free_port()
    processes = [start(name, rank, 2, port, *args) for rank in range(2)]
    try:
        ended = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, err.decode()
    return [pickle.loads(out) for out, _ in ended]


def run_job(name, *args):
    """In a process of its own: the pickled answer goes to stdout."""
    torch.set_num_threads(1)
    answer = globals()[name](*args)
    sys.stdout.buffer.write(pickle.dumps(answer))


def tiny_config(**options):
    from conftest import TINY  # beside this file, which the processes have in their path

    return make_config(TINY, **options)


def make_config(tiny, **options):
    """All that is random and all that is taken over images: stochastic depth, rescale, masks, KoLeo in groups."""
    vit = replace(tiny.vit, drop_path=0.3, rope_rescale=2.0, n_registers=0, layer_scale=0.5)
    defaults = {"vit": vit, "batch": 16, "group": 4, "koleo_group": 2, "clip_norm": 0.5, "koleo_weight": 0.3}
    return replace(tiny, **{**defaults, **options})


# sums


def units(n, d=8, seed=0):
    return F.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)).astype("f4")), dim=-1)


def sums():
    with joined("cpu") as world:
        half = slice(world.rank * 16, world.rank * 16 + 16)
        x, weight = units(32)[half], units(24, seed=1)
        uneven = units(32)[: 5 + 6 * world.rank]
        return {
            "world": (world.rank, world.size),
            "total": world.total(3 + world.rank),
            "sum": world.sum(x),
            "mean": world.mean(x),
            "logsumexp": world.logsumexp(x[0] * 50),
            "no mass": world.logsumexp(torch.full((4,), -torch.inf) if world.rank else torch.zeros(4)),
            "cat": world.cat(x),
            "gather": world.gather({"rank": world.rank}),
            "offset": sinkhorn_offset(x, weight, 0.05, 3, world),
            "mean logits": mean_logits(x, weight, world),
            "mean softmax": mean_softmax(x, weight, torch.zeros(len(weight)), 0.05, world),
            "uneven offset": sinkhorn_offset(uneven, weight, 0.05, 3, world),
            "uneven softmax": mean_softmax(uneven, weight, torch.zeros(len(weight)), 0.05, world),
        }


def test_sums_of_two_processes_are_those_of_one():
    first, second = in_two("sums")
    x, weight = units(32), units(24, seed=1)
    assert (first.pop("world"), second.pop("world")) == ((0, 2), (1, 2))
    for name, value in first.items():  # the same bits in both
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name
    assert first["total"] == 7
    assert first["gather"] == [{"rank": 0}, {"rank": 1}]
    torch.testing.assert_close(first["sum"], x[:16] + x[16:])
    torch.testing.assert_close(first["mean"], (x[:16] + x[16:]) / 2)
    torch.testing.assert_close(first["logsumexp"], torch.logaddexp(x[0] * 50, x[16] * 50))
    torch.testing.assert_close(first["no mass"], torch.zeros(4))
    assert torch.equal(first["cat"], x)
    alone = World()
    bound = {"atol": 1e-6, "rtol": 1e-6}  # 6.1: distributed
    torch.testing.assert_close(first["offset"], sinkhorn_offset(x, weight, 0.05, 3, alone), **bound)
    torch.testing.assert_close(first["mean logits"], mean_logits(x, weight, alone), **bound)
    torch.testing.assert_close(
        first["mean softmax"], mean_softmax(x, weight, torch.zeros(len(weight)), 0.05, alone), **bound
    )
    uneven = torch.cat([x[:5], x[:11]])
    torch.testing.assert_close(first["uneven offset"], sinkhorn_offset(uneven, weight, 0.05, 3, alone), **bound)
    torch.testing.assert_close(
        first["uneven softmax"], mean_softmax(uneven, weight, torch.zeros(len(weight)), 0.05, alone), **bound
    )


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    x = units(3)
    with joined("cpu") as world:
        assert (world.rank, world.size, world.total(3), world.gather("a")) == (0, 1, 3, ["a"])
        assert all(torch.equal(f(x), x) for f in (world.sum, world.mean, world.logsumexp, world.cat))
        world.wait()
    assert not torch.distributed.is_initialized()


def test_a_batch_that_cannot_be_shared_is_refused_at_the_start(tiny):
    assert share(12, World(1, 3), "train.batch") == 4
    with pytest.raises(ValueError, match=r"train.batch must be a multiple of the number of processes \(3\): got 8"):
        TrainState(tiny, CPU, World(1, 3))
    with pytest.raises(ValueError, match=r"in whole groups of train.group \(8\): got 4"):
        TrainState(tiny, CPU, World(1, 2))


# one step


def crops(config, seed):
    rng = np.random.default_rng(seed)
    sizes = ((2, config.image_size), (config.n_local, config.local_size))
    return [torch.from_numpy(rng.integers(0, 256, (n, config.batch, s, s, 3), dtype=np.uint8)) for n, s in sizes]


def at(step):
    return StepSettings(step, lr=1e-3, teacher_temperature=0.05, momentum=0.9, weight_decay=0.04)


def everything(state):
    out = {f"student.{k}": v.clone() for k, v in state.student.state_dict().items()}
    out |= {f"teacher.{k}": v.clone() for k, v in state.teacher.state_dict().items()}
    for group in state.optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            out |= {f"{key}.{name}": v.clone() for key, v in state.optimizer.state[p].items() if key != "step"}
    return out | {"centre": state.centre_K.clone(), "ibot_centre": state.ibot_centre_K.clone()}


STEPS = (0, 1, RANK_EVERY)
# name, fields of the config, images of a micro-batch of a process
CASES = {
    "sinkhorn": ({}, None),
    "sinkhorn, micro-batches": ({}, 4),
    "softmax": ({"centering": "softmax"}, None),
    "softmax, micro-batches, one head": ({"centering": "softmax", "ibot_head": None, "clip": "parameter"}, 4),
    "no iBOT, no KoLeo": ({"ibot_weight": 0.0, "koleo_weight": 0.0}, None),
}


def steps(config, micro, world):
    state, metrics = TrainState(config, CPU, world), []
    share = slice(world.rank * config.batch // world.size, (world.rank + 1) * config.batch // world.size)
    for step in STEPS:
        mine = [x[:, share] for x in crops(config, step)]
        metrics.append(train_step(state, *mine, config, at(step), micro))
    return everything(state), metrics


def all_steps():
    with joined("cpu") as world:
        return {name: steps(tiny_config(**fields), micro, world) for name, (fields, micro) in CASES.items()}


@pytest.fixture(scope="module")
def both():
    return in_two("all_steps")


def assert_close(theirs, ours):
    """Weights and moments within 2e-5 of one another, or 2e-3 of their size: the rounding of sums, through Adam."""
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_processes_is_one_of_one(both, tiny, name):
    fields, _ = CASES[name]
    state, metrics = steps(make_config(tiny, **fields), None, World())
    for theirs, their_metrics in (answer[name] for answer in both):
        assert_close(theirs, state)
        np.testing.assert_allclose(np.array(their_metrics), np.array(metrics), rtol=2e-4, atol=1e-6)
        assert np.isfinite([m.rank for m in (their_metrics[0], their_metrics[2])]).all()
    first, second = (answer[name][0] for answer in both)
    assert all(torch.equal(first[key], second[key]) for key in first)  # no process drifts away
    moved = TrainState(make_config(tiny, **fields), CPU).student.state_dict()
    assert not torch.equal(moved["head.prototypes"], state["student.head.prototypes"])


# steps that are not finite


BAD = [(where, micro) for where in ("loss", "softmax", "gradient") for micro in (8, 4)]


def bad_config(make, where):
    return make(centering="softmax" if where == "softmax" else "sinkhorn")


def all_bad_steps():
    with joined("cpu") as world:
        return {case: a_bad_step(world, *case) for case in BAD}


def a_bad_step(world, where, micro):
    """One good step, one with a NaN in the last micro-batch of the second process alone, one good step."""
    config = bad_config(tiny_config, where)
    state, seen, last = TrainState(config, CPU, world), [], 8 // micro - 1
    share = slice(world.rank * 8, world.rank * 8 + 8)
    for step in range(3):
        calls, hook = iter(range(9)), None
        if step == 1 and world.rank == 1 and where == "gradient":
            token = state.student.backbone.cls_token
            hook = token.register_hook(lambda g, calls=calls: g * (torch.nan if next(calls) == last else 1))
        elif step == 1 and world.rank == 1:
            mlp = state.student.head.mlp
            hook = mlp.register_forward_hook(lambda *a, calls=calls: a[2] * (torch.nan if next(calls) == last else 1))
        before = everything(state)
        metrics = train_step(state, *[x[:, share] for x in crops(config, step)], config, at(step), micro)
        seen.append((metrics.skipped, all(torch.equal(v, before[k]) for k, v in everything(state).items())))
        if hook is not None:
            hook.remove()
    return seen, everything(state)


@pytest.fixture(scope="module")
def bad_steps_of_both():
    return in_two("all_bad_steps")


@pytest.mark.parametrize(("where", "micro"), BAD)
def test_what_is_not_finite_in_one_process_skips_the_step_in_both(bad_steps_of_both, tiny, where, micro):
    (first, mine), (second, theirs) = (answer[where, micro] for answer in bad_steps_of_both)
    assert first == second == [(0.0, False), (1.0, True), (0.0, False)]
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    config = bad_config(partial(make_config, tiny), where)
    state = TrainState(config, CPU)
    for step in (0, 2):  # as if the bad one had not been
        train_step(state, *crops(config, step), config, at(step))
    assert_close(mine, everything(state))


# a whole run


RUN = {"n_steps": 8, "knn_every": 8, "knn_images": 60, "result": "best"}


def a_run(shards, out):
    """With the best encoder, that of the last step, written late, as on a slow disk."""
    save_best = trainer.save_best
    trainer.save_best = lambda *args: (time.sleep(0.5), save_best(*args))
    resources = TrainResources(checkpoint_every=5, micro_batch=4)
    return facts(train(tiny_config(**RUN), Location(shards), Location(out), resources))


def facts(result):
    return {
        "backbone": dict(result.backbone.state_dict()),
        "step": result.step,
        "metrics": result.metrics,
        "bad": result.bad_samples,
        "alarms": result.alarms,
        "resumed": result.timing.resumed_at,
    }


def assert_alike(theirs, ours, resumed):
    assert theirs["resumed"] == resumed
    for name in ("step", "bad", "alarms"):
        assert theirs[name] == ours[name]
    assert_close(theirs["backbone"], ours["backbone"])
    for name, value in ours["metrics"].items():
        np.testing.assert_allclose(theirs["metrics"][name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.timeout(900)  # it starts four processes
def test_a_run_of_two_processes_is_one_of_one_and_goes_on_from_its_checkpoint(labelled_digits, tiny, tmp_path):
    def alone(name):
        resources = TrainResources(checkpoint_every=5)
        return facts(train(make_config(tiny, **RUN), labelled_digits, Location(str(tmp_path / name)), resources))

    one = alone("one")
    assert one["bad"] == {"broken": "undecodable"}
    assert one["step"] == 8
    first, second = in_two("a_run", labelled_digits.uri, tmp_path / "two")
    assert_alike(first, one, 0)
    assert np.isnan(second["metrics"]["knn_accuracy"]).all()  # the first process alone looks for neighbours
    assert_alike(second | {"metrics": first["metrics"]}, one, 0)
    for name in one["metrics"].keys() - {"knn_accuracy"}:
        np.testing.assert_array_equal(first["metrics"][name], second["metrics"][name])
    assert all(torch.equal(first["backbone"][name], second["backbone"][name]) for name in first["backbone"])
    assert_alike(alone("two"), one, 5)  # two processes left this checkpoint, and one goes on
    third, fourth = in_two("a_run", labelled_digits.uri, tmp_path / "one")
    assert_alike(third, one, 5)
    assert_alike(fourth | {"metrics": third["metrics"]}, one, 5)
