"""A root as its readers meet it: which steps of its last run are finished, and whether this openlvd can read them."""

import json
from collections.abc import Iterator, Mapping

from curation.artifact import FORMAT, MANIFEST, Artifact
from curation.store import Location
from pipelines.engine import read_notes, read_root
from pipelines.errors import UserError
from pipelines.stages.table import STAGES

MAX_TOLD = 3  # steps in a sentence


def finished_steps(root: Location) -> dict[str, Artifact]:
    """The finished steps of the last run on a root, in the order of its recipe. Reads no manifest.

    Raises UserError when there is no such run, or when none of its steps is finished.
    """
    steps = read_root(root)
    done = {name: step for name, step in steps.items() if step is not None and step.is_complete()}
    if not done:
        raise UserError(f"a step of {root} must be finished: got none of {len(steps)}", "run the recipe first")
    return done


def noted_stages(root: Location) -> dict[str, str]:
    """The stage of every step of the last run on a root, finished or not. Raises UserError."""
    return {name: str(entry["stage"]) for name, entry in read_notes(root.resolved()).items()}


def check_versions(steps: Mapping[str, Artifact]) -> None:
    """Raise UserError unless every finished step is as this openlvd makes it: format, stage and stage version."""
    wrong = [f"{name}, of {what}" for name, step in steps.items() for what in _differences(step)]
    if wrong:
        more = f" and {len(wrong) - MAX_TOLD} more" if len(wrong) > MAX_TOLD else ""
        raise UserError(
            f"every step must be as this openlvd makes it: got {'; '.join(wrong[:MAX_TOLD])}{more}",
            "run the recipe again: what another version has made is made anew",
        )


def _differences(step: Artifact) -> Iterator[str]:
    """What is not as it should be, at most one thing."""
    try:
        manifest = json.loads((step.location / MANIFEST).read())
        found, stage, version = manifest["format"], manifest["stage"], manifest["version"]
    except (KeyError, TypeError, ValueError):
        yield f"a {MANIFEST} that cannot be read"
        return
    if found != FORMAT:
        yield f"format {found}, not {FORMAT}"
    elif stage not in STAGES:
        yield f"the stage {stage} (version {version}), which it does not have"
    elif version != STAGES[stage].version:
        yield f"{stage} version {version}, not {STAGES[stage].version}"
