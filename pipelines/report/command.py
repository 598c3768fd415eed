"""``openlvd report``: the page of any run, without a report step in its recipe, and before the run has finished."""

from curation.store import Location
from pipelines.engine import OnStep
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.ray_executor import RayExecutor
from pipelines.report.page import build_page
from pipelines.report.run import ReportConfig, Run
from pipelines.roots import check_versions, finished_steps, noted_stages

PAGE = "report.html"  # below the root, when nothing else is said


def write_page(
    root: Location, out: str | None, title: str | None, executor: LocalExecutor | RayExecutor, on_step: OnStep
) -> Location:
    """Write the page about the last run on a root to ``out``, or into the root, whole or not at all. Returns where.

    It is about the finished steps and names the others; a step that makes a page is no part of it. Raises UserError
    when there is no such root, when no step of it is finished, or when another version of openlvd made one.
    """
    target = Location(out).resolved() if out else root.resolved() / PAGE
    if target.is_local and target.path.is_dir():
        raise UserError(f"--out must be a file: got the folder {target}", f"for example --out {target / PAGE}")
    stages, done = noted_stages(root), finished_steps(root)
    unfinished = {name: stage for name, stage in stages.items() if name not in done}
    shown = {name: step for name, step in done.items() if stages.get(name) != "report"}
    check_versions(shown)
    executor.progress = on_step(target.name, "report")
    config = ReportConfig(title=title) if title else ReportConfig()
    page = build_page(Run(shown, config, None, executor, unfinished))
    put(target, page.encode())
    return target


def put(target: Location, data: bytes) -> None:
    """Write a file. Raises UserError where one cannot be written."""
    try:
        target.write(data)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
        hint = "give --out a file that can be made and written to"
        raise UserError(f"cannot write {target}: {e.strerror or e}", hint) from e
