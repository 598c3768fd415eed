"""``embed`` is killed at random moments, again and again, and started anew until it is finished: the same bytes, and no
part is done twice. Killed are drivers, without Ray and on it, and workers on Ray while their driver lives."""

import hashlib
import json
import os
import shutil
import signal
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import MARK, living

from curation.store import Location
from embedding.backbone import save_vit
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe, parse_recipe
from pipelines.stages.table import STAGES

N_KILLS = int(os.environ.get("OPENLVD_EMBED_KILLS", "20"))  # of drivers without Ray
N_RAY_KILLS = int(os.environ.get("OPENLVD_EMBED_RAY_KILLS", "1"))  # of drivers on Ray
N_WORKER_KILLS = int(os.environ.get("OPENLVD_EMBED_WORKER_KILLS", "4"))
N_IMAGES, PART_ROWS = 300, 10
N_PARTS = N_IMAGES // PART_ROWS
STEP = "vectors"
ORPHANS_S = 30  # a worker whose driver is dead ends within


@dataclass
class Undisturbed:
    """A run that nobody killed: a pool of noise, and its vectors."""

    root: Path
    recipe: Recipe
    part_seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    folder, rng = tmp_path_factory.mktemp("embed-kills"), np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(N_IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "images" / f"{i:03d}.png")
    save_vit(folder / "vit", ViT(ViTConfig(width=64, depth=4, heads=2, patch_size=4)), Preprocess(size=32, crop=32))
    steps = {
        "web": {"stage": "pool", "source": str(folder / "images"), "part_rows": PART_ROWS},
        STEP: {"stage": "embed", "pool": "web", "backbone": str(folder / "vit")},
    }
    recipe = parse_recipe({"steps": steps, "resources": {"workers": 2}}, STAGES)
    results = list(run_recipe(recipe, Location(str(folder / "root")), LocalExecutor(recipe.resources)))
    return Undisturbed(folder / "root", recipe, results[-1].seconds / N_PARTS)


@pytest.fixture
def new_root(undisturbed, tmp_path) -> Callable[[], Path]:
    """Makes roots where the pool is finished and nothing is embedded."""

    def copy() -> Path:
        root = tmp_path / f"root-{len(list(tmp_path.iterdir()))}"
        return Path(shutil.copytree(undisturbed.root, root, ignore=shutil.ignore_patterns(".lock", STEP)))

    return copy


def parts_of(root: Path) -> dict[str, tuple[int, int]]:
    """The finished parts, and what changes when one is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.glob(f"{STEP}/*/part-*")}


def is_finished(root: Path) -> bool:
    return any(root.glob(f"{STEP}/*/manifest.json"))


def content(root: Path) -> dict[str, str]:
    """Every file of the step but its log, by checksum."""
    files = {path.relative_to(root).as_posix(): path for path in root.glob(f"{STEP}/**/*") if path.is_file()}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items() if p.name != "run.jsonl"}


def images_in_last_run(root: Path) -> int:
    """How many images the run that finished the step has embedded."""
    (log,) = root.glob(f"{STEP}/*/run.jsonl")
    return json.loads(log.read_text().splitlines()[-1]).get("images", 0)


def finish(recipe: Recipe, root: Path, executor: Any, **options: Any) -> None:
    for _ in run_recipe(recipe, Location(str(root)), executor, **options):
        pass


def drive(recipe: Recipe, root: Path, mark: str | None, told: Any) -> None:
    """In another process: a run that tells which parts it has made. mark: it is on Ray, and what it starts has that."""
    if mark:
        os.environ[MARK] = mark
    executor: Any = RayExecutor(recipe.resources) if mark else LocalExecutor(recipe.resources)
    map_workers = executor.map_workers

    def telling(*args: Any) -> Iterator[Any]:
        for made in map_workers(*args):
            told.send(made.files[-1].name)
            yield made

    executor.map_workers = telling
    finish(recipe, root, executor)
    executor.close()


class Driver:
    """A process that runs the recipe, to be killed."""

    def __init__(self, context: Any, work: Any, *args: Any) -> None:
        self._ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=work, args=(*args, theirs))
        self._process.start()
        theirs.close()
        self.told: list[str] = []

    def hear(self, n: int | None = None) -> None:
        """Wait until it has told so many things, or has ended."""
        while n is None or len(self.told) < n:
            try:
                self.told.append(self._ours.recv())
            except EOFError:
                return

    def kill(self, after: float) -> None:
        """SIGKILL it after so many seconds, if it lives."""
        self._process.join(after)
        if self._process.exitcode is None:
            os.kill(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait for its end, and hear what else it had to say."""
        self.hear()
        self._process.join()
        assert self._process.exitcode in (0, -signal.SIGKILL), "the run failed: its words are above"


def kill_again_and_again(
    undisturbed: Undisturbed, new_root: Any, start: Callable[[Path], Driver], n_kills: int, settle: Callable[[], None]
) -> None:
    """Kills come after some parts, and up to the time of two more. The last run on each root goes on to its end."""
    rng, at, expected = np.random.default_rng(n_kills), [], content(undisturbed.root)
    most_parts = -(-N_PARTS // (n_kills + 1))
    while len(at) < n_kills:
        root, told = new_root(), Counter[str]()
        while not is_finished(root):
            before, driver = parts_of(root), start(root)
            if len(at) < n_kills:
                driver.hear(int(rng.integers(most_parts + 1)))
                driver.kill(after=rng.uniform(0, 2 * undisturbed.part_seconds))
            driver.end()
            settle()
            at += [] if is_finished(root) else [len(parts_of(root))]
            told.update(driver.told)
            assert before.items() <= parts_of(root).items(), "a finished part was written again"
        assert images_in_last_run(root) == (N_PARTS - len(before)) * PART_ROWS, "finished parts were read again"
        assert max(told.values()) == 1, "a part was done twice"
        assert content(root) == expected
    assert len(set(at)) > n_kills / 4, "all kills came at the same few moments"


def test_a_driver_without_ray(undisturbed, new_root, other_process):
    def start(root: Path) -> Driver:
        return Driver(other_process, drive, undisturbed.recipe, root, None)

    kill_again_and_again(undisturbed, new_root, start, N_KILLS, settle=lambda: None)


def test_a_driver_on_ray(undisturbed, new_root, other_process):
    """Its workers may finish what they have in hand; what there is when they have ended is not done again."""
    marks: list[str] = []

    def start(root: Path) -> Driver:
        marks.append(uuid.uuid4().hex)
        return Driver(other_process, drive, undisturbed.recipe, root, marks[-1])

    def settle() -> None:
        end = time.monotonic() + ORPHANS_S
        while left := living(marks):
            assert time.monotonic() < end, f"processes of dead drivers live on: {left}"
            time.sleep(0.05)

    kill_again_and_again(undisturbed, new_root, start, N_RAY_KILLS, settle)


class WorkerKiller:
    """Told how far a run on Ray is, it kills busy workers now and then, and looks which parts are there."""

    def __init__(self, root: Path, n_kills: int, rng: np.random.Generator) -> None:
        self.root, self._n_kills, self._rng = root, n_kills, rng
        self._next_at = PART_ROWS
        self.n_killed = 0
        self.seen: defaultdict[str, set[Any]] = defaultdict(set)

    def __call__(self, done: int, total: int, *_: str) -> None:
        busy = [pid for pid, name in workers().items() if name.endswith(".do")]
        if self._next_at <= done < total and busy and self.n_killed < self._n_kills:
            os.kill(int(self._rng.choice(busy)), signal.SIGKILL)
            self.n_killed += 1
            self._next_at = done + PART_ROWS * int(self._rng.integers(2, 9))
        for name, stamp in parts_of(self.root).items():
            self.seen[name].add(stamp)


def test_workers_while_their_driver_lives(undisturbed, new_root, ray_executor):
    """A kill costs at most the one part that a worker has in hand: all others are written once."""
    rng, n_left = np.random.default_rng(N_WORKER_KILLS), N_WORKER_KILLS
    while n_left:
        killer = WorkerKiller(new_root(), n_left, rng)
        finish(undisturbed.recipe, killer.root, ray_executor, on_step=lambda *_, tell=killer: tell)
        assert content(killer.root) == content(undisturbed.root)
        assert images_in_last_run(killer.root) == N_IMAGES
        assert sum(len(stamps) - 1 for stamps in killer.seen.values()) <= killer.n_killed
        n_left -= killer.n_killed


def workers() -> dict[int, str]:
    """The actors on the Ray that this process has started: process and name, which ends in ``.do`` during an item."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            number, rest = (folder / "stat").read_text().split(" (", 1)
        except OSError:  # it has just ended
            continue
        name, facts = rest.rsplit(") ", 1)
        found[int(number)] = (name, int(facts.split()[1]))
    raylets = {number for number, (name, parent) in found.items() if (name, parent) == ("raylet", os.getpid())}
    return {n: name for n, (name, parent) in found.items() if parent in raylets and name.startswith("ray::_Worker")}
