"""What is asked: which set of a run, compared by which descriptor, from which similarity on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from curation.artifact import Artifact
from curation.embeddings import EmbeddingsPart, embedding_parts
from curation.store import Location
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import did_you_mean, or_list
from pipelines.roots import check_versions, finished_steps
from pipelines.stage import SELECTIONS
from pipelines.why.run import Run, leaves
from pipelines.why.story import ancestors

SETS = ("shards", *SELECTIONS)  # stages that say which images go on


class Descriptor(NamedTuple):
    """What makes images comparable, and what is known of its threshold."""

    step: str  # the name of the embed step, or of the union of several
    vectors: Artifact
    min_similarity: float | None  # of a step that compared by it; None when no step did
    said_by: str = ""  # that step


class SetPart(NamedTuple):
    """A part of the pool that a set was chosen from, and the vectors of its rows."""

    number: int
    start: int  # position of its first row in the pool
    vectors: EmbeddingsPart
    embeddings: Artifact  # that they are of
    rejected: Location  # rows of the part that could not be embedded


@dataclass(frozen=True)
class Target:
    """A set of a run, and how images are compared with it."""

    run: Run  # looks into artifacts in this process
    name: str  # of the step that chose the set
    pool: Artifact
    selection: Artifact | None  # None: the whole pool
    descriptor: Descriptor
    min_similarity: float
    parts: tuple[SetPart, ...]


def find_target(root: Location, step: str | None, embeddings: str | None, min_similarity: float | None) -> Target:
    """The set of ``step`` (or the last one of the recipe) and its vectors by ``embeddings`` (or what its run compared
    by). Raises UserError when the run does not have that, or when only the user can know the similarity.
    """
    done = finished_steps(root)
    check_versions(done)
    run = Run(done, LocalExecutor())
    name = find_set(done, step)
    chosen = done[name]
    descriptor = find_descriptor(run, chosen, embeddings)
    similarity = descriptor.min_similarity if min_similarity is None else min_similarity
    if similarity is None:
        raise UserError(
            f"--min-similarity must be given: no step of this run has compared images by {descriptor.step}",
            "a threshold belongs to a descriptor; openlvd calibrate finds one on your own images",
        )
    if not 0 < similarity <= 1:
        raise UserError(f"--min-similarity must be in (0, 1]: got {similarity}", "it is a cosine")
    selection = chosen if chosen.stage != "shards" else chosen.input("selection") if has_selection(chosen) else None
    pool = run.pool(chosen)
    parts = tuple(parts_of(run, pool, descriptor))
    return Target(run, name, pool, selection, descriptor, similarity, parts)


def has_selection(step: Artifact) -> bool:
    """Whether a set of shards was made of a selection."""
    return step.has_input("selection")


def find_set(done: Mapping[str, Artifact], step: str | None) -> str:
    """The step that chose the set. Raises UserError."""
    sets = [name for name, artifact in done.items() if artifact.stage in SETS]
    if step is None:
        if not sets:
            raise UserError(
                f"a step that chooses images must be finished: got none of stage {or_list(SETS)}",
                "run the recipe first",
            )
        shards = [name for name in sets if done[name].stage == "shards"]
        return (shards or sets)[-1]
    if step not in sets:
        got = f"a {done[step].stage} step" if step in done else "no finished step"
        raise UserError(
            f"--step must name a step of stage {or_list(SETS)}: got {step}, {got}", did_you_mean(step, sets)
        )
    return step


def find_descriptor(run: Run, chosen: Artifact, embeddings: str | None) -> Descriptor:
    """The named embed step, or what the set was decontaminated by, or deduplicated. Raises UserError."""
    known = list(compared_by(run, chosen))
    if embeddings is None:
        if known:
            return known[0]
        vectors = {name: step for name, step in run.steps.items() if step.kind == "embed"}
        if len({str(step.facts["backbone"]) for step in vectors.values()}) == 1:
            return Descriptor(next(iter(vectors)), next(iter(vectors.values())), None)
        some = f": {', '.join(vectors)}" if vectors else ""
        raise UserError(
            "--embeddings must be given: no step of this run has looked for copies",
            f"name the embed step to compare by{some or '; this run has none'}",
        )
    step = run.steps.get(embeddings)
    if step is None or step.kind != "embed":
        names = [name for name, one in run.steps.items() if one.kind == "embed"]
        got = f"a {step.kind} step" if step is not None else "no finished step"
        raise UserError(
            f"--embeddings must name an embed step: got {embeddings}, {got}", did_you_mean(embeddings, names)
        )
    same = [one for one in known if one.vectors.facts["backbone"] == step.facts["backbone"]]
    return same[0]._replace(step=embeddings) if same else Descriptor(embeddings, step, None)


def compared_by(run: Run, chosen: Artifact) -> Iterator[Descriptor]:
    """What the steps of a run compared images by: those that the set went through first, decontaminate before dedup,
    later steps before earlier ones."""
    line = set(ancestors(chosen))
    for through in (True, False):
        for stage in ("decontaminate", "dedup"):
            for name, step in reversed(list(run.steps.items())):
                if step.stage == stage and (step.location.uri in line) == through:
                    judge = step if stage == "decontaminate" else step.input("neighbors")
                    vectors = judge.input("embeddings")
                    yield Descriptor(run.name(vectors), vectors, judge.manifest["config"]["min_similarity"], name)


def leaf_of(vectors: Artifact) -> Artifact:
    """The first artifact that a union of embeddings is made of; embeddings are their own."""
    return leaf_of(vectors.members[0]) if vectors.members else vectors


def parts_of(run: Run, pool: Artifact, descriptor: Descriptor) -> Iterator[SetPart]:
    """The vectors of every part of the pool, or of the pools that a union is made of. Raises UserError.

    Of several embed steps of one pool the one with most rows counts.
    """
    backbone, starts = descriptor.vectors.facts["backbone"], pool.starts.tolist()
    embedded = [step for step in run.steps.values() if step.stage == "embed" and step.facts["backbone"] == backbone]
    for leaf, first in leaves(pool):
        fitting = [step for step in embedded if run.pool(step).digest == leaf.digest]
        if not fitting:
            raise UserError(
                f"every image of the set must have a vector by {backbone['name']}: got none of {run.name(leaf)}",
                f"embed {run.name(leaf)} as {descriptor.step} is, or name other vectors with --embeddings",
            )
        best = max(fitting, key=lambda step: int(step.starts[-1]))
        for index, vectors in enumerate(embedding_parts(best)):
            yield SetPart(first + index, starts[first + index], vectors, best, best.part(index, "rejected"))
