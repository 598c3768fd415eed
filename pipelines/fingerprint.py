"""What decides whether a step is done: its fingerprint, found when its inputs are finished.

A hash of its stage, stage version, config without locations, the content of its inputs, and what was found outside.
So a changed threshold recomputes that step and those below it, and an input that was recomputed to the same bytes
recomputes nothing.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curation.artifact import Artifact, Where, pool_of
from curation.store import Entry, Location
from pipelines.errors import UserError
from pipelines.stage import Stage, Step
from pipelines.stages.table import STAGES

Look = tuple[Sequence[Entry] | None, Any]  # what is outside: its listing, and what the stage made of it


@dataclass(frozen=True)
class Prepared:
    """A step whose inputs are known, so that it is known where its output is."""

    step: Step
    stage: Stage
    inputs: Mapping[str, Artifact]
    found: Any  # what a stage that reads outside has listed
    found_digest: str | None
    fingerprint: str
    location: Location
    placed: bool = False  # at a place of the user's choice, not below the root

    @property
    def locations(self) -> dict[str, Where]:
        """Where the outside sources of this step are, as the recipe says now."""
        given = {name: getattr(self.step.config, name) for name in self.stage.locations}
        return {name: where(uris) for name, uris in given.items() if uris}

    def artifact(self) -> Artifact:
        """The output, done or not; it knows where its own sources and those of its inputs are now."""
        inherited = {f"{name}.{key}": at for name, found in self.inputs.items() for key, at in found.moved.items()}
        return Artifact(self.location, self.locations | inherited)


def where(given: Where) -> Where:
    """One place or several with absolute paths; a list of one is that one."""
    found = [str(Location(uri).resolved()) for uri in ([given] if isinstance(given, str) else given)]
    return found[0] if len(found) == 1 else found


def prepare(
    step: Step,
    done: Mapping[str, Artifact],
    root: Location,
    outside: Mapping[str, Look],
    place: Location | None = None,
) -> Prepared:
    """Find the fingerprint of a step whose inputs are finished. Its output goes to ``place``, or below the root."""
    stage = STAGES[step.stage]
    inputs = {name: done[source] for name, source in step.inputs.items()}
    entries, found = outside.get(step.name, (None, None))
    found_digest = None if entries is None else content_id([list(entry) for entry in entries])
    check_one_pool(step, inputs)
    fingerprint = fingerprint_of(step, inputs, found_digest)
    at = place or root / step.name / fingerprint
    return Prepared(step, stage, inputs, found, found_digest, fingerprint, at, placed=place is not None)


def fingerprint_of(step: Step, inputs: Mapping[str, Artifact], found_digest: str | None) -> str:
    """16 hex digits: what a step makes of these inputs and of what was found outside (None: it reads nothing there)."""
    stage = STAGES[step.stage]
    listed = set(stage.locations) | (set(stage.step_or_value) if found_digest is not None else set())
    identity = {
        "stage": step.stage,
        "version": stage.version,
        # what was listed outside is known by its content, so where it lies does not count
        "config": {k: v for k, v in config_values(step.config).items() if k not in listed},
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
        "through": {path: found.digest for path, found in reached(inputs, stage.through).items()},
        "found": found_digest,
    }
    if stage.reads_all:  # it tells of the steps themselves, not only of what they left
        identity["steps"] = {
            name: [artifact.manifest["fingerprint"], artifact.counts, artifact.facts]
            for name, artifact in inputs.items()
        }
    return content_id(identity)[:16]


def reached(inputs: Mapping[str, Artifact], paths: Sequence[str]) -> dict[str, Artifact]:
    """The inputs of inputs at paths such as ``neighbors.embeddings``; ``seeds.pool`` is one of each seed of a list."""
    found: dict[str, Artifact] = {}
    for path in paths:
        first, *rest = path.split(".")
        for name, artifact in inputs.items():
            if name == first or name.startswith(f"{first}."):
                end: Artifact | None = artifact
                for step in rest:
                    end = end.input(step) if end is not None and end.has_input(step) else None
                if end is not None:
                    found[".".join([name, *rest])] = end
    return found


def check_one_pool(step: Step, inputs: Mapping[str, Artifact]) -> None:
    """Rows of a selection are rows of one pool. Raises UserError when the other inputs are of another."""
    if "selection" not in inputs:
        return
    other = next(name for name in ("pool", "embeddings", "hierarchy") if name in inputs)
    if pool_of(inputs["selection"]).digest != pool_of(inputs[other]).digest:
        raise UserError(
            f"{step.name}.selection must select from the pool of {step.name}.{other}: "
            f"{step.inputs['selection']} selects from another than {step.inputs[other]}",
            "a selection means rows of the pool it was made from",
        )


def look_outside(steps: Sequence[Step]) -> dict[str, Look]:
    """What the steps that read from outside find there, before anything is written. Raises UserError."""
    found: dict[str, Look] = {}
    for step in steps:
        look = STAGES[step.stage].look
        if look is None:
            continue
        try:
            found[step.name] = look(step.config)
        except FileNotFoundError as e:
            raise UserError(f"{step.name}: {e}", "check the path; it is relative to where the command runs") from e
        except OSError as e:
            if not e.filename and not isinstance(e, PermissionError):  # S3 failed, which may pass
                raise
            what = f"cannot read {e.filename}: {e.strerror}" if e.filename else str(e)
            raise UserError(f"{step.name}: {what}", "check the path, and who may read it") from e
    return found


def content_id(value: Any) -> str:
    """sha256 of a JSON-able value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def config_values(config: Any) -> dict[str, Any]:
    """A config as plain values."""
    return dataclasses.asdict(config)
