"""``union``: several pools, or the embeddings of several pools, as one. Nothing is copied.

The artifact is a list: ``members.json`` says what it is made of, and ``Artifact`` reads the members' parts as its own.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial

from curation.artifact import Artifact, Counts, FileInfo, add_counts, describe, pool_of
from curation.execute import Executor
from curation.store import Location
from curation.union import UnionConfig
from pipelines.errors import UserError
from pipelines.stage import Inputs, Output, Stage, Step, listed

NAME = "members.json"


def check(name: str, config: UnionConfig, inputs: Mapping[str, Step]) -> None:
    """A pool for embeddings, and for them alone. Raises UserError before anything runs."""
    check_pool(name, next(step.kind for key, step in inputs.items() if key.startswith("members.")), "pool" in inputs)


def check_pool(name: str, kind: str, given: bool) -> None:
    """Raise UserError unless a union of embeddings, and no other, names its pool."""
    if kind == "embed" and not given:
        raise UserError(
            f"{name}, a union of embeddings, must name its pool: got none", "add pool: the union of their pools"
        )
    if kind != "embed" and given:
        raise UserError(f"{name}.pool is for a union of embeddings: got it with pools", "leave it out")


def run(config: UnionConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the list of members. For embeddings ``pool`` is the union of their pools, in the same order."""
    members = listed(inputs, "members", config.members)
    pool: Artifact | None = inputs.get("pool")
    check_pool("union", members[0].kind, pool is not None)
    if pool is not None:
        check_embeddings(config.members, members, pool)
        out.facts |= members[0].facts
    out.make(partial(write_members, members=members, out=out.location), [NAME], [[NAME]])
    counts = add_counts(part.counts for member in members for part in member.parts)
    return {"rows": counts["kept"], "kept": counts["kept"], "dropped": 0, "bad": 0}


def check_embeddings(names: Sequence[str], members: Sequence[Artifact], pool: Artifact) -> None:
    """Members of one backbone, and a pool that is the union of theirs. Raises UserError."""
    first = members[0].facts["backbone"]
    for name, member in zip(names, members, strict=True):
        if member.facts["backbone"] != first:
            raise UserError(
                f"embeddings of a union must come from one backbone: got {first['name']} for {names[0]} and "
                f"{member.facts['backbone']['name']} for {name}",
                "embed every member with the same backbone",
            )
    if [member.digest for member in pool.members] != [pool_of(member).digest for member in members]:
        raise UserError(
            f"union.pool must be the union of the pools of {', '.join(names)}, in this order: got {pool.location}",
            "list the pools in the order of the embeddings",
        )


def write_members(name: str, members: Sequence[Artifact], out: Location) -> FileInfo:
    """What the members are, by content: equal members in the same order are an equal union."""
    entries = [{"digest": member.digest, "parts": len(member.parts), "rows": int(member.starts[-1])}
               for member in members]  # fmt: skip
    (out / name).write((json.dumps(entries, indent=1) + "\n").encode())
    return describe(out / name)


STAGE = Stage(
    version=1,
    config=UnionConfig,
    run=run,
    lists={"members": ("pool", "embed")},
    optional={"pool": ("pool",)},
    through=("members.pool",),
    acts_as="members",
    check=check,
)
