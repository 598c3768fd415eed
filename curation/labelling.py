"""Every row of a part with its nearest centroid, by a CPU with what it knows from before, or by what a GPU has left.

With GPUs there are two passes. Workers that have one label the rows, all centroids compared, and leave the labels in
the memories of the parts. The tasks of a CPU find them there and do with them what they do with their own.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from curation import coarse
from curation.coarse import CentroidGroups, CoarseTarget, group_centroids
from curation.execute import CPU, Device, Executor, Ref, SerialExecutor, local_values, on_worker, stored
from curation.nearest import Bounds, Target, assign
from curation.nearest_torch import ROWS, TorchTarget, torch_target
from curation.rows import Rows


class Memory(Protocol):
    """Where the bounds of a part lie from one step to the next; a place that travels with the part. What it holds saves
    work and changes no bit, so it may be lost; labels made on a GPU are lost with it, and made again by the next
    attempt."""

    def load(self) -> tuple[bytes, Bounds] | None:
        """What was saved last and its tag, which tells for what centroids it is true; None when there is nothing."""
        ...

    def save(self, tag: bytes, bounds: Bounds) -> None:
        """Replace what is there."""
        ...


@dataclass
class Held:
    """Bounds in this process, 8 bytes a row: for an executor that does everything here."""

    tag: bytes = b""
    bounds: Bounds | None = None

    def load(self) -> tuple[bytes, Bounds] | None:
        """As ``Memory``."""
        return None if self.bounds is None else (self.tag, self.bounds)

    def save(self, tag: bytes, bounds: Bounds) -> None:
        """As ``Memory``."""
        self.tag, self.bounds = tag, bounds


class Member(NamedTuple):
    """A part and the memory of its bounds."""

    part: Rows
    memory: Memory | None = None


class Step(NamedTuple):
    """What a worker needs to assign the rows of a part: centroids, and how they came from those before."""

    centroids: np.ndarray  # float32 (k, d)
    drift: np.ndarray | None = None  # float64 (k,), see ``moved_by``
    tag: bytes = b""  # of the centroids, and of the device
    tag_before: bytes = b""  # of those that bounds are known for
    collects_far: bool = False  # sums have the rows that empty clusters may take
    device: Device = CPU  # that compares rows and centroids


def step_to(centroids: np.ndarray, device: Device = CPU) -> Step:
    """How rows of which nothing is known are assigned to centroids."""
    return Step(centroids, tag=tag_of(centroids, device), device=device)


def tag_of(centroids: np.ndarray, device: Device = CPU) -> bytes:
    """32 bytes that tell centroids from others, and labels by one device from those by another."""
    tag = hashlib.sha256(centroids.tobytes())
    tag.update(b"" if device.name == CPU.name else device.name.encode())
    return tag.digest()


def step_shared(step: Step, executor: Executor, members: Sequence[Member]) -> dict[str, Any]:
    """What tasks that assign the rows of members share: the step, and the groups of very many centroids, made on a
    worker. On a GPU there are no groups, and the labels of all members are in their memories when this returns."""
    if step.device.name != CPU.name:
        there = stored(executor, step)
        for _ in executor.map_workers(partial(labeller, there), in_loads(members), step.device.gpus):
            pass
        return {"step": there}
    if len(step.centroids) < coarse.COARSE_FROM:
        return {"step": step}
    return {"step": step, "groups": on_worker(executor, group_centroids, {"centroids": step.centroids})}


def in_loads(members: Sequence[Member]) -> list[list[Member]]:
    """Neighbours that have as many rows together as keep a GPU busy; those without rows are left out. Raises ValueError
    where a member has no memory."""
    loads, n_rows = list[list[Member]](), ROWS
    for member in members:
        if not member.part.n_rows:
            continue
        if member.memory is None:
            raise ValueError("labels that a GPU makes must have a memory to lie in: got a part without one")
        if n_rows >= ROWS:
            loads.append([])
            n_rows = 0
        loads[-1].append(member)
        n_rows += member.part.n_rows
    return loads


def labeller(step: Ref[Step]) -> Callable[[Sequence[Member]], None]:
    """What a worker labels members by: the centroids are on its device from the first one to the last."""
    held = step.get()
    return partial(label_members, target=torch_target(held.centroids, held.device.name), tag=held.tag)


def label_members(members: Sequence[Member], target: TorchTarget, tag: bytes) -> None:
    """Leave the labels of members in their memories, unless all are there. Holds ROWS rows twice, and a part."""
    if all(known_under(tag, member) is not None for member in members):
        return
    blocks = itertools.chain.from_iterable(member.part.blocks() for member in members)
    labels = np.concatenate([target.assign(x)[0] for x in joined(blocks, ROWS)])
    ends = np.cumsum([member.part.n_rows for member in members])
    for member, own in zip(members, np.split(labels, ends[:-1]), strict=True):
        assert member.memory is not None, "in_loads has seen it"
        member.memory.save(tag, Bounds(own, np.zeros(len(own), np.float32)))  # of others nothing is known


def known_under(tag: bytes, member: Member) -> Bounds | None:
    """What the memory of a member has for the centroids of this tag."""
    held = None if member.memory is None else member.memory.load()
    return held[1] if held is not None and held[0] == tag else None


def joined(blocks: Iterable[np.ndarray], n_rows: int) -> Iterator[np.ndarray]:
    """Blocks, neighbours in one array as long as they have at most ``n_rows`` rows together."""
    held: list[np.ndarray] = []
    for block in blocks:
        if held and sum(map(len, held)) + len(block) > n_rows:
            yield np.concatenate(held)
            held = []
        held.append(block)
    if held:
        yield np.concatenate(held)


def assigned_blocks(
    member: Member, step: Step, groups: CentroidGroups | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of a part with their labels and squared distances; at the end what is known then goes to its memory.
    With ``groups`` rows are assigned through them, and nothing is known. Raises ValueError where a GPU should have left
    labels in the memory and none are there."""
    part, memory = member
    if groups is not None:
        probed = CoarseTarget(groups)
        for x in part.blocks():
            yield x, *probed.assign(x)
        return
    tag, known = (None if memory is None else memory.load()) or (b"", None)
    if known is not None and tag == step.tag:
        yield from labelled_blocks(part, known.labels, step.centroids)
        return
    if step.device.name != CPU.name and part.n_rows:
        raise ValueError(f"labels made on {step.device.name} must be in the memory of their part: they were lost")
    if step.drift is None or tag != step.tag_before:
        known = None
    target = Target(step.centroids, None if known is None else step.drift)
    bounds, start = [], 0
    for x in part.blocks():
        at = slice(start, start + len(x))
        found = assign(x, target, None if known is None else Bounds(known.labels[at], known.lower[at]))
        start = at.stop
        if memory is not None:
            bounds.append(found.bounds)
        yield x, found.labels, found.sq_distance
    if memory is not None and bounds:
        memory.save(step.tag, Bounds(*map(np.concatenate, zip(*bounds, strict=True))))


def labelled_blocks(
    part: Rows, labels: np.ndarray, centroids: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``assigned_blocks`` of a part whose rows have their labels."""
    from curation import loops

    start = 0
    for x in part.blocks():
        own = labels[start : start + len(x)].copy()
        start += len(x)
        yield x, own, loops.row_sq_distances(x, centroids, own)


def assign_member(member: Member, step: Step, groups: CentroidGroups | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each row of a part: labels int32 (n,) and squared distances float32 (n,)."""
    part = member.part
    labels, sq_distance = np.empty(part.n_rows, np.int32), np.empty(part.n_rows, np.float32)
    start = 0
    for _, some, distances in assigned_blocks(member, step, groups):
        at = slice(start, start + len(some))
        labels[at], sq_distance[at] = some, distances
        start = at.stop
    return labels, sq_distance


def assign_part(part: Rows, centroids: np.ndarray, device: Device = CPU) -> tuple[np.ndarray, np.ndarray]:
    """``assign_member`` of a part of which nothing is known, all in this process."""
    member = Member(part, None if device.name == CPU.name else Held())
    return assign_member(member, **local_values(step_shared(step_to(centroids, device), SerialExecutor(), [member])))
