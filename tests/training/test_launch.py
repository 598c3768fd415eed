"""Processes that train together, started by one that waits."""

import os
import signal
from functools import partial

import pytest
import torch

from training.launch import ProcessFailed, in_processes
from training.world import joined


def added(value):
    torch.set_num_threads(1)
    with joined("cpu") as world:
        return world.rank, world.size, world.sum(torch.tensor([float(value), float(world.rank)]))


def failing(how):
    with joined("cpu") as world:
        if world.rank == 1 and how == "raise":
            raise ValueError("what went wrong")
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.wait()


def test_the_first_process_gives_the_result():
    rank, size, total = in_processes(2, partial(added, 3))
    assert (rank, size) == (0, 2)
    assert total.tolist() == [6.0, 1.0]
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("how", "words"), [("raise", "ValueError: what went wrong"), ("kill", r"it was killed \(out of memory\?\)")]
)
def test_one_that_fails_ends_all_and_is_named(how, words):
    with pytest.raises(ProcessFailed, match=rf"all 2 processes must live to the end: process \d: .*{words}|gloo"):
        in_processes(2, partial(failing, how))
