"""Both executors keep one contract: order, one tree of sums, failures by item, lost workers replaced."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from curation.execute import on_worker
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor


@pytest.fixture(params=["serial", "ray"])
def executor(request):
    return LocalExecutor() if request.param == "serial" else request.getfixturevalue("ray_executor")


def late_first(i: int) -> int:
    time.sleep(0.2 if i == 0 else 0)
    return i * i


def test_results_come_in_the_order_of_the_items(executor):
    assert list(executor.map(late_first, range(30))) == [i * i for i in range(30)]


def add(item: int, much: int) -> int:
    return item + much


def test_shared_values_may_be_references(executor):
    three = executor.reduce(int, ["3"], max)
    assert list(executor.map(add, [1, 2], shared={"much": three})) == [4, 5]
    assert on_worker(executor, partial(add, 1), {"much": three}).get() == 4


def brackets(a: str, b: str) -> str:
    return f"({a}{b})"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10, 28])
def test_sums_are_made_in_a_tree_fixed_by_index(executor, n):
    """Written out by hand for fan_in 3: neighbours are folded from the left, level by level."""
    items = [chr(97 + i) for i in range(n)]
    level = items
    while len(level) > 1:
        groups = [level[i : i + 3] for i in range(0, len(level), 3)]
        level = [group[0] if len(group) == 1 else brackets_of(group) for group in groups]
    assert executor.reduce(str, items, brackets, fan_in=3).get() == level[0]


def brackets_of(group: list[str]) -> str:
    total = group[0]
    for item in group[1:]:
        total = brackets(total, item)
    return total


def test_nothing_cannot_be_reduced(executor):
    with pytest.raises(ValueError, match="at least one item"):
        executor.reduce(str, [], brackets)


def fail_at_three(i: int) -> int:
    if i == 3:
        raise ValueError("three is bad")
    return i


def refuse(i: int) -> int:
    raise UserError("not so", "but so")


def test_a_failure_names_the_item(executor):
    with pytest.raises(TaskError, match="at part 3: ValueError: three is bad"):
        list(executor.map(fail_at_three, range(6)))
    with pytest.raises(TaskError, match="at part 3: ValueError: three is bad"):
        list(executor.map_workers(partial(given, fail_at_three), range(6)))


def given(fn):
    return fn


def test_what_the_user_can_mend_passes_as_it_is(executor):
    with pytest.raises(UserError, match="not so") as caught:
        list(executor.map(refuse, range(2)))
    assert caught.value.hint == "but so"


def no_model():
    raise ValueError("no weights here")


def test_a_model_that_cannot_be_loaded_is_told(executor):
    with pytest.raises(TaskError, match="no weights here"):
        list(executor.map_workers(no_model, range(3)))


def count_makes(folder: Path):
    (folder / f"made-{os.getpid()}-{time.monotonic_ns()}").touch()
    return late_first


def test_a_worker_is_made_once_for_many_items(executor, tmp_path):
    assert list(executor.map_workers(partial(count_makes, tmp_path), range(12))) == [i * i for i in range(12)]
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


def die_once(folder: Path, i: int) -> int:
    if i == 5 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def make_mortal(folder: Path):
    return partial(die_once, folder)


def test_the_item_of_a_lost_worker_is_given_to_another(ray_executor, tmp_path):
    assert list(ray_executor.map_workers(partial(make_mortal, tmp_path), range(20))) == list(range(20))
    assert (tmp_path / "died").exists()


def test_the_item_of_a_lost_task_is_done_again(ray_executor, tmp_path):
    assert list(ray_executor.map(partial(die_once, tmp_path), range(20))) == list(range(20))
    assert (tmp_path / "died").exists()


def die_twice(folder: Path, i: int) -> int:
    deaths = len(list(folder.glob(f"{i}-*")))
    if deaths < 2:
        (folder / f"{i}-{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def make_twice_mortal(folder: Path):
    return partial(die_twice, folder)


def test_what_waits_behind_an_item_that_kills_its_worker_has_not_been_tried(ray_executor, tmp_path):
    """Each needs all its three tries, and each waits behind another that dies."""
    assert list(ray_executor.map_workers(partial(make_twice_mortal, tmp_path), range(5))) == list(range(5))
    assert len(list(tmp_path.iterdir())) == 10


def always_die(i: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return i


def test_an_item_that_kills_every_worker_fails_the_step(ray_executor):
    with pytest.raises(TaskError, match="at part 0: its worker was lost 3 times"):
        list(ray_executor.map_workers(partial(given, always_die), [0]))


def test_a_worker_with_other_versions_is_refused(ray_executor, monkeypatch):
    monkeypatch.setattr(ray_executor, "_setup", ("another machine", False))
    with pytest.raises(UserError, match="the versions and the BLAS core of the driver"):
        list(ray_executor.map(late_first, [1]))
    monkeypatch.setattr(ray_executor, "_pools", {})
    with pytest.raises(UserError, match="the versions and the BLAS core of the driver"):
        list(ray_executor.map_workers(partial(given, late_first), [1]))
    monkeypatch.setattr(ray_executor, "_setup", ("another machine", True))
    assert list(ray_executor.map(late_first, [1])) == [1]


def test_a_failure_in_a_reduction_names_the_item(executor):
    with pytest.raises(TaskError, match="at part 3: ValueError: three is bad"):
        executor.reduce(fail_at_three, range(40), max)


def test_workers_that_no_gpu_is_there_for_are_refused(ray_executor):
    with pytest.raises(UserError, match=r"resources\.gpus must be at most the cluster's: got 1, it has 0"):
        list(ray_executor.map_workers(partial(given, late_first), [1], gpus=1))

    with pytest.raises(UserError, match=r"resources\.gpus must be at most the cluster's: got 0.5, it has 0"):
        list(ray_executor.map(late_first, [1], gpus=0.5))
    with pytest.raises(UserError, match=r"resources\.gpus must be at most the cluster's: got 0.5, it has 0"):
        ray_executor.reduce(late_first, [1], max, gpus=0.5)


def test_in_this_process_a_gpu_needs_no_reservation():
    three, local = LocalExecutor().reduce(int, ["3"], max, gpus=1), LocalExecutor()
    assert list(local.map(add, [1, 2], {"much": three}, gpus=1)) == [4, 5]


ON_GPUS = """
import os
from functools import partial

import ray

from pipelines.executor import Resources
from pipelines.ray_executor import RayExecutor

def call(i, much=0):
    ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    assert len(ids) == 1, ids
    return os.getpid(), i + much

def brackets(a, b):
    return f"({a}{b})"

def letter(i, pids):
    assert os.getpid() in pids, "no worker with a GPU"
    return chr(97 + i)

def given(fn):
    return fn

ray.init = partial(ray.init, num_gpus=1)  # as if there were one: Ray only counts them
executor = RayExecutor(Resources(workers=4, gpus=0.5))
pids = {pid for pid, _ in executor.map_workers(partial(given, call), range(20), 0.5)}  # they keep the GPU
seen = []
executor.progress = lambda done, total: seen.append((done, total))
ten = executor.reduce(int, ["10"], max)
found = list(executor.map(call, range(20), {"much": ten}, gpus=0.5))
assert [value for _, value in found] == [10 + i for i in range(20)]
assert {pid for pid, _ in found} <= pids and 1 <= len(pids) <= 2, "the workers that are there, half a GPU each"
assert seen[-20:] == [(i + 1, 20) for i in range(20)]
folded = executor.reduce(letter, range(10), brackets, {"pids": pids}, fan_in=3, gpus=0.5)
assert folded.get() == executor.reduce(partial(letter, pids=Everyone()), range(10), brackets, fan_in=3).get()
assert list(executor.map(str, [ten.get()])) == ["10"]
executor.close()
"""
EVERYONE = """
class Everyone:
    def __contains__(self, pid):
        return True
"""


def test_calls_with_gpus_are_made_by_the_workers_that_have_them():
    done = subprocess.run([sys.executable, "-c", EVERYONE + ON_GPUS], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_progress_counts_items(executor):
    seen: list[tuple[int, int]] = []
    executor.progress = lambda done, total: seen.append((done, total))
    list(executor.map(late_first, range(3)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
