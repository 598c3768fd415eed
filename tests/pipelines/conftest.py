"""One tiny run and one Ray for all tests of the pipeline."""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import make_images, recipe

from curation.artifact import Artifact
from curation.store import Location
from pipelines.engine import StepResult, run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe, parse_recipe
from pipelines.stages.table import STAGES

# What a process would import otherwise, each for seconds.
PRELOAD = ["torch._dynamo", "numba", "faiss", "boto3", "sklearn.datasets", "pytest", "curation.loops",
           "embedding.embed", "training.trainer", "pipelines.cli"]  # fmt: skip


@dataclass
class TinyRun:
    """A finished run of the tiny recipe."""

    images: Path
    root: Path
    recipe: Recipe
    results: dict[str, StepResult]

    def artifact(self, step: str, root: Path | None = None) -> Artifact:
        location = self.results[step].location
        assert location is not None
        return Artifact(Location(str(root or self.root)) / step / location.name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    make_images(folder / "images")
    parsed = parse_recipe(recipe(folder / "images"), STAGES)
    executor = LocalExecutor(parsed.resources)
    results = {r.name: r for r in run_recipe(parsed, Location(str(folder / "root")), executor)}
    return TinyRun(folder / "images", folder / "root", parsed, results)


@pytest.fixture
def without(tiny, tmp_path) -> Callable[[str], Path]:
    """A copy of the finished root in which one step has not run yet."""

    def copy(step: str) -> Path:
        root = tmp_path / "root"
        shutil.copytree(tiny.root, root, ignore=shutil.ignore_patterns(".lock"))
        shutil.rmtree(root / step)
        return root

    return copy


@pytest.fixture(scope="session")
def ray_executor() -> Iterator[RayExecutor]:
    """The one Ray of the test run."""
    executor = RayExecutor(Resources(workers=2, loader_workers=0))
    yield executor
    executor.close()


@pytest.fixture(scope="session")
def other_process() -> Any:
    """Processes of their own, to be killed, that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
