"""``mix``: several selections of a pool or of its members as one, with the shares of a trainer's batches."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of
from curation.execute import Executor
from curation.mix import MIX_FILE, MixConfig, combine, component_facts, read_mix, spec_of, write_mix, write_mixed
from curation.selection import Selected, read_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, Step, listed, part_span

POOL_PATHS = ("pool", "embeddings.pool", "neighbors.embeddings.pool", "hierarchy.embeddings.pool")  # of a selection


class Component(NamedTuple):
    """A selection, or a pool that stands for all its rows, and where its parts stand in the mixed pool."""

    artifact: Artifact
    is_pool: bool
    first_part: int
    n_parts: int


def run(config: MixConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write every row that is in a component, with its counts, and the shares as ``mix.json`` if there are any."""
    pool: Artifact = inputs["pool"]
    artifacts = listed(inputs, "components", config.components)
    for artifact in artifacts:
        check_unmixed("mix.components", artifact)
    components = [place(name, artifact, pool) for name, artifact in zip(config.components, artifacts, strict=True)]
    spec = spec_of(config.components, config.homogeneous, config.heterogeneous)
    names = [[part_name(i)] for i in range(len(pool.parts))]
    work = partial(write_part, components=components, names=config.components, by_component=spec is not None,
                   out=out.location)  # fmt: skip
    out.make(work, part_span(pool), names)
    if spec is not None:
        out.make(partial(write_mix, spec=spec, out=out.location), [MIX_FILE], [[MIX_FILE]])
        out.facts["mix"] = {"homogeneous": dict(config.homogeneous), "heterogeneous": dict(config.heterogeneous)}
    out.facts["components"], counts = component_facts(config.components, add_counts(file.counts for file in out.files))
    return {**counts, "bad": 0}


def check(name: str, config: MixConfig, inputs: Mapping[str, Step]) -> None:
    """No mix with shares in a mix. Raises UserError before anything runs."""
    refuse_mixes(name, inputs)


def refuse_mixes(name: str, inputs: Mapping[str, Step]) -> None:
    """Whoever decides about rows decides about the components of a mix: its own output has no shares.

    Raises UserError when an input of the step is a mix with shares.
    """
    for key, step in inputs.items():
        if step.stage == "mix" and step.config is not None and (step.config.homogeneous or step.config.heterogeneous):
            raise mix_error(f"{name}.{key.partition('.')[0]}", step.name)


def check_unmixed(key: str, selection: Artifact | None) -> None:
    """As ``refuse_mixes``, of a finished selection."""
    if selection is not None and read_mix(selection.location) is not None:
        raise mix_error(key, str(selection.location))


def mix_error(key: str, got: str) -> UserError:
    """The sentence for a mix where its shares would be lost."""
    return UserError(
        f"{key} must not be a mix with shares, which it would lose: got {got}",
        "put this step before the mix, on a component; only shards and embed read a mix with shares",
    )


def place(name: str, artifact: Artifact, pool: Artifact) -> Component:
    """Where a component stands in the pool. Raises UserError when it is of another pool, or has no rows."""
    own = pool_of(artifact)
    first_part = find_member(pool, own.digest)
    if first_part is None:
        raise UserError(
            f"mix.components must be of the pool {step_name(pool)} or of a member of it: got {name}, which is of "
            f"{step_name(own)}",
            "mix over a union of the components' pools",
        )
    if not sum(part.counts["kept"] for part in artifact.parts):
        raise UserError(
            f"every component of a mix must have at least one row: got none in {name}", "loosen it or leave it out"
        )
    return Component(artifact, artifact.kind == "pool", first_part, len(artifact.parts))


def find_member(pool: Artifact, digest: str) -> int | None:
    """The part at which a pool of this content begins within ``pool``: 0 for itself, None when it is not in it.

    One that is a member twice is meant where it stands first.
    """
    if pool.digest == digest:
        return 0
    first_part = 0
    for member in pool.members:
        found = find_member(member, digest)
        if found is not None:
            return first_part + found
        first_part += len(member.parts)
    return None


def step_name(artifact: Artifact) -> str:
    """The name of the step that left an artifact."""
    return artifact.location.parent.name


def write_part(
    span: tuple[int, int, int], components: Sequence[Component], names: Sequence[str], by_component: bool, out: Location
) -> FileInfo:
    """The rows of one part that are in a component."""
    index, _, n_rows = span
    mixed = combine([selected(component, index - component.first_part, n_rows) for component in components])
    return write_mixed(out / part_name(index), mixed, names, by_component)


def selected(component: Component, part: int, n_rows: int) -> Selected | None:
    """The rows that a component has of one of its parts, None for a part that is not its own."""
    if not 0 <= part < component.n_parts:
        return None
    if component.is_pool:
        return Selected(np.arange(n_rows, dtype=np.int32), np.ones(n_rows, np.int32))
    return read_selection(component.artifact.part(part))


def prefixes(paths: Sequence[str]) -> list[str]:
    """Every path, and the ways there: ``a.b`` gives ``a`` and ``a.b``."""
    pieces = [path.split(".") for path in paths]
    return list(dict.fromkeys(".".join(path[:n]) for path in pieces for n in range(1, len(path) + 1)))


STAGE = Stage(
    version=1,
    config=MixConfig,
    run=run,
    reads={"pool": ("pool",)},
    lists={"components": ("pool", *SELECTIONS)},
    through=tuple(f"components.{path}" for path in prefixes(POOL_PATHS)),
    check=check,
)
