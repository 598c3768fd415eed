"""What the passes of ``retrieve`` have in common: the job that every task knows, its scratch files, and the plan.

What the passes hand to one another lies in scratch files, so an interrupted step goes on where it was:

    near/<seed part>-<group>   sample: the nearest rows of every seed image among some parts of the pool
    hits/<seed part>           sample: what they hit, shuffled to the parts of the pool; cluster: as one list
    found/<part>               sample: rows of a part that seed pools ask for
    members/<part>             rows of groups that are cut, shuffled to the task that finds the cut
    claims/<part>              rows of a part that seed pools retrieve
    draft                      with a target: the rows that stay, shuffled to the parts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from curation.artifact import Artifact
from curation.embeddings import EmbeddingsPart, covered_rows
from curation.retrieve import CLAIM, Pairs, RetrieveConfig
from curation.selection import read_selection
from curation.store import Location
from pipelines.rows import rows_covered
from pipelines.stage import SCRATCH
from pipelines.stages.neighbors import based_parts

Span = tuple[int, int, int]  # part, position of its first row in the pool, rows


class SeedPart(NamedTuple):
    """A part of a seed pool."""

    name: str  # of its scratch files
    pool: int  # index of the seed pool
    start: int  # position of its first row in its pool
    vectors: EmbeddingsPart


@dataclass(frozen=True)
class Job:
    """What every task needs to know."""

    config: RetrieveConfig
    source: Artifact  # has the rows that may be retrieved: embeddings, or a hierarchy
    embeddings: Artifact
    before: Artifact | None  # the selection
    seeds: tuple[SeedPart, ...]
    out: Location

    def aside(self, folder: str, name: str) -> Location:
        """A scratch file."""
        return self.out / SCRATCH / folder / name


class Plan(NamedTuple):
    """What is drawn from where."""

    pairs: Pairs
    seen: np.ndarray | None  # HIT of every pair; None in mode sample
    clusters: np.ndarray  # int64 (n_pools,), that qualify
    n_rows: np.ndarray  # int64 (n_pools,), rows in them
    most: int  # seed images of one pool in one cluster


def seed_parts(pools: Sequence[Artifact]) -> tuple[SeedPart, ...]:
    """The parts of all seed pools that have images."""
    return tuple(
        SeedPart(f"{j:02d}-{i:07d}", j, start, part)
        for j, seeds in enumerate(pools)
        for i, (start, part) in enumerate(based_parts(seeds))
        if part.n_rows
    )


def looked_at(index: int, covered: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows of a part that may be retrieved, where they stand among the covered ones, and how many are bad."""
    if job.before is None:
        return covered, np.arange(len(covered)), 0
    chosen = read_selection(job.before.part(index)).rows
    undecoded = np.isin(chosen, covered_rows(job.embeddings.part(index, "rejected")))
    chosen = chosen[~undecoded]
    return chosen, rows_covered(chosen, covered, job.source, job.before), int(undecoded.sum())


def read_claims(folder: str, index: int, job: Job) -> np.ndarray:
    """The CLAIMs of a part in a scratch file."""
    return np.frombuffer(job.aside(folder, str(index)).read(), CLAIM)


def part_names(spans: Sequence[Span]) -> list[str]:
    """The names of the scratch files of parts."""
    return [str(index) for index, _, _ in spans]
