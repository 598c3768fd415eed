"""How two images of a component are joined: the shortest chain of near pairs between them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from curation.artifact import Artifact, read_table
from curation.execute import Executor

MAX_REACHED = 1_000_000  # images that a search may reach: 20 bytes each

# One edge from an image that has been reached.
STEP = np.dtype([("to", "<i8"), ("before", "<i8"), ("similarity", "<f4")])


class Hop(NamedTuple):
    """One image of a chain."""

    position: int  # in the pool
    similarity: float  # to the image before it


def shortest_chain(
    near: Artifact, starts: np.ndarray, parts: Sequence[int], start: int, goal: int, executor: Executor
) -> list[Hop] | None:
    """The fewest hops from one image to another along the edges of ``near``, in either direction; the last is ``goal``.

    ``starts``: positions of the parts' first rows; ``parts``: those where the edges of the component start. Of several
    ways to an image the strongest last edge counts, then the lowest row. None when there is no chain among the first
    MAX_REACHED images, or none at all.
    """
    rings: list[np.ndarray] = []  # what each hop reached, STEP ascending by ``to``
    seen, frontier = np.array([start]), np.array([start])
    while goal not in frontier:
        work = partial(steps_of_part, near=near, starts=starts)
        found = list(executor.map(work, parts, shared={"seen": seen, "frontier": frontier}))
        ring = strongest(np.concatenate([np.zeros(0, STEP), *found]))
        rings.append(ring)
        frontier = ring["to"]
        seen = np.union1d(seen, frontier)
        if not len(frontier) or len(seen) > MAX_REACHED:
            return None
    return walk_back(rings, goal)


def steps_of_part(index: int, near: Artifact, starts: np.ndarray, seen: np.ndarray, frontier: np.ndarray) -> np.ndarray:
    """STEP (n,): the best edge of a part from the frontier to each image not yet seen; edges count both ways."""
    table = read_table(near.part(index), ["row", "near_row", "similarity"])
    row, near_row = table["row"].to_numpy() + starts[index], table["near_row"].to_numpy()
    found = []
    for before, to in ((row, near_row), (near_row, row)):
        new = np.isin(before, frontier) & ~np.isin(to, seen)
        steps = np.empty(int(new.sum()), STEP)
        steps["to"], steps["before"] = to[new], before[new]
        steps["similarity"] = table["similarity"].to_numpy()[new]
        found.append(steps)
    return strongest(np.concatenate(found))


def strongest(steps: np.ndarray) -> np.ndarray:
    """Of each image the strongest edge, ties to the lowest row before it; ascending by image."""
    order = np.lexsort((steps["before"], -steps["similarity"], steps["to"]))
    ordered = steps[order]
    new = np.ones(len(ordered), bool)
    new[1:] = ordered["to"][1:] != ordered["to"][:-1]
    best: np.ndarray = ordered[new]
    return best


def walk_back(rings: Sequence[np.ndarray], goal: int) -> list[Hop]:
    """The chain to ``goal``, from what each hop reached."""
    chain: list[Hop] = []
    for ring in reversed(rings):
        step = ring[np.searchsorted(ring["to"], goal)]
        chain.append(Hop(goal, float(step["similarity"])))
        goal = int(step["before"])
    return chain[::-1]
