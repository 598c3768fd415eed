"""Processes that train together, started by one that waits."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from training.launch import ProcessFailed, in_processes
from training.world import joined


def added(value):
    torch.set_num_threads(1)
    with joined("cpu") as world:
        return world.rank, world.size, world.sum(torch.tensor([float(value), float(world.rank)]))


def failing(how, culprit):
    with joined("cpu") as world:
        if world.rank == culprit and how == "raise":
            raise ValueError("what went wrong")
        if world.rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)
        world.wait()


def test_the_first_process_gives_the_result():
    rank, size, total = in_processes(2, partial(added, 3))
    assert (rank, size) == (0, 2)
    assert total.tolist() == [6.0, 1.0]
    assert "RANK" not in os.environ


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("raise", ValueError, "^what went wrong$"),
        ("kill", ProcessFailed, r"process \d: it was killed \(out of memory\?\)"),
    ],
)
def test_one_that_fails_ends_all_and_its_error_is_raised(how, kind, words, culprit):
    with pytest.raises(kind, match=words):
        in_processes(2, partial(failing, how, culprit))


ORPHAN = """
    import sys, time
    from training.launch import in_processes
    sys.path.insert(0, sys.argv[1])
    from test_launch import noted
    from functools import partial
    if __name__ == "__main__":
        in_processes(2, partial(noted, sys.argv[2]))
"""


def noted(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def test_they_end_when_their_parent_is_killed(run_python, tmp_path):
    parent = run_python(ORPHAN, Path(__file__).parent, tmp_path)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
