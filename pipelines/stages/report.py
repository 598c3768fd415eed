"""``report``: one HTML page about all steps above it."""

from collections.abc import Sequence

from curation.artifact import Artifact, Counts, describe
from curation.execute import Executor
from curation.store import Entry, Location, file_sha256
from pipelines.report.page import build_page
from pipelines.report.run import ReportConfig, Run
from pipelines.stage import FOUND, Inputs, Output, Stage

PAGE = "index.html"


def look(config: ReportConfig) -> tuple[Sequence[Entry] | None, Location | None]:
    """The file of labels, if one is given: its size and what is in it, not where it lies."""
    if not config.labels:
        return None, None
    location = Location(config.labels).resolved()
    entry = location.entry()
    with location.local_copy() as path:
        return [Entry("labels", entry.size, file_sha256(path))], location


def run(config: ReportConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``index.html``."""
    steps = {name: artifact for name, artifact in inputs.items() if isinstance(artifact, Artifact)}
    page = out.location / PAGE
    page.write(build_page(Run(steps, config, inputs.get(FOUND), executor)).encode())
    out.files.append(describe(page))
    return {"rows": len(steps), "kept": len(steps), "dropped": 0, "bad": 0}


STAGE = Stage(version=6, config=ReportConfig, run=run, reads_all=True, locations=("labels",), look=look)
