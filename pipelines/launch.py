"""Runs a recipe with an executor of the user's choice and shows its progress."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from curation.store import Location
from pipelines.engine import StepResult, run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources
from pipelines.progress import StepProgress
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe
from pipelines.stage import HEAD_COUNTS


def run_steps(
    recipe: Recipe, root: Location, executor: str, address: str | None, until: str | None = None, quiet: bool = False
) -> Iterator[StepResult]:
    """Run a recipe with progress on stderr; each step's result as it is there."""
    with open_executor(executor, address, recipe.resources) as engine, StepProgress(quiet) as progress:
        yield from run_shown(recipe, root, engine, progress, until)


def run_shown(
    recipe: Recipe,
    root: Location,
    engine: LocalExecutor | RayExecutor,
    progress: StepProgress,
    until: str | None = None,
    places: Mapping[str, Location] | None = None,
    told: Collection[str] = (),
) -> Iterator[StepResult]:
    """Run a recipe on an open executor; each step's result as it is there, with a line unless it is ``told``."""
    for result in run_recipe(recipe, root, engine, until, progress.start, progress.say, places):
        progress.stop()
        if result.name not in told:
            progress.say(result_line(result))
        yield result


@contextmanager
def open_executor(name: str, address: str | None, resources: Resources) -> Iterator[LocalExecutor | RayExecutor]:
    """The executor of a run, closed at its end."""
    if name not in ("serial", "ray"):
        raise UserError(f"--executor must be serial or ray: got {name!r}", "ray uses every core, serial only this one")
    if name == "serial" and address:
        raise UserError("--address needs --executor ray: got serial", "add --executor ray")
    engine = LocalExecutor(resources) if name == "serial" else RayExecutor(resources, address or "local")
    try:
        yield engine
    finally:
        engine.close()


def result_line(result: StepResult) -> str:
    """One step in one line."""
    order = [*HEAD_COUNTS, *(name for name in result.counts if name not in HEAD_COUNTS)]
    counts = " ".join(f"{name} {result.counts[name]:,}" for name in order if name in result.counts)
    time = f" {result.seconds:.1f} s" if result.seconds else ""
    return f"{result.name:<12} {result.stage:<14} {result.state}{time}  {counts}"
