"""Batches of crops in the order of the stream, decoded and cropped ahead by worker processes.

Without torch, so that a worker starts fast. A batch is a pure function of (index, seed, step): the number of workers
changes when it is made, never a byte of it.
"""

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from os import _exit
from typing import NamedTuple

import numpy as np

from curation.mix import MixSpec
from curation.store import Location
from embedding.decode import BadImage, decode_rgb
from training.augment import AugmentConfig, Crops, crop_rng, multi_crop
from training.stream import Sample, Stream, read_images

_MAX_REPLACED = 256  # samples in a row that may be bad before the stream is taken for broken


class BadSample(NamedTuple):
    """A sample that could not be decoded and was replaced."""

    key: str
    reason: str


class Batch(NamedTuple):
    """One step's crops, crop by crop: uint8 (crop, image, height, width, RGB)."""

    step: int
    globals: np.ndarray
    locals: np.ndarray
    keys: list[str]  # of the images seen, slot by slot
    bad: list[BadSample]  # replaced, in order of slots
    components: list[int]  # of the mix, slot by slot; 0 when there is none


class WorkerDied(RuntimeError):
    """A worker process of the loader ended before its batch was done."""


@dataclass(frozen=True, kw_only=True)
class LoaderPlan:
    """What a worker needs to make any batch; small and picklable."""

    shards: Location
    totals: np.ndarray  # int64 (n_shards,), of a mix (n_shards, n_components)
    batch: int
    seed: int
    n_open: int
    augment: AugmentConfig
    global_size: int
    local_size: int
    n_local: int
    mix: MixSpec | None = None  # how batches are drawn from components, as ``curation.mix.read_mix`` gives


class BatchMaker:
    """Makes the batch of any step; keeps the open groups of the stream."""

    def __init__(self, plan: LoaderPlan) -> None:
        self.plan = plan
        self.stream = Stream(
            plan.shards, batch=plan.batch, seed=plan.seed, n_open=plan.n_open, totals=plan.totals, mix=plan.mix
        )

    def __call__(self, step: int) -> Batch:
        """Read, decode and crop the samples of one step."""
        samples = self.stream.batch(step)
        bad: list[BadSample] = []
        crops, keys = [], []
        for sample, data in zip(samples, read_images(self.plan.shards, samples), strict=True):
            image, key = self._decoded(sample, data, bad)
            crops.append(self._crops(image, sample))
            keys.append(key)
        global_crops = np.stack([c.globals for c in crops], axis=1)
        local_crops = np.stack([c.locals for c in crops], axis=1)
        return Batch(step, global_crops, local_crops, keys, bad, [sample.component for sample in samples])

    def _decoded(self, sample: Sample, data: bytes, bad: list[BadSample]) -> tuple[np.ndarray, str]:
        """The image of a sample; when it does not decode, of the next one of its component that does."""
        for _ in range(_MAX_REPLACED):
            image = decode_rgb(data)
            if not isinstance(image, BadImage):
                return image, sample.key
            bad.append(BadSample(sample.key, image.reason))
            sample = self.stream.after(sample)
            (data,) = read_images(self.plan.shards, [sample])
        raise ValueError(
            f"one of {_MAX_REPLACED} samples in a row must decode: got none, last {bad[-1]}, in {self.plan.shards}"
        )

    def _crops(self, image: np.ndarray, sample: Sample) -> Crops:
        plan, rng = self.plan, crop_rng(self.plan.seed, sample.epoch, sample.number)
        return multi_crop(image, plan.augment, (plan.global_size, plan.local_size), plan.n_local, rng)


def batches(
    plan: LoaderPlan, start: int, stop: int, n_workers: int = 0, prefetch: int = 4
) -> Generator[Batch, None, None]:
    """The batches of steps start..stop - 1 in order, the same bytes for any ``n_workers`` (0: made here, when asked).

    A sample that does not decode is listed in ``bad`` and replaced: its slot shows the next one of its component that
    does, cropped by the generator of the slot. Memory: prefetch * n_workers + 1 batches. Raises WorkerDied when a
    worker is killed, ValueError when 256 samples in a row do not decode. Closing the iterator ends the workers; they
    also end by themselves when this process is killed.
    """
    if n_workers == 0:
        yield from map(BatchMaker(plan), range(start, stop))
        return
    pool = ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(plan,))
    ahead: deque[Future[Batch]] = deque()
    try:
        for step in range(start, stop + prefetch * n_workers):
            if step < stop:
                ahead.append(pool.submit(_make_batch, step))
            if step - start >= prefetch * n_workers:
                yield ahead.popleft().result()
    except BrokenProcessPool as e:
        raise WorkerDied(
            f"all {n_workers} loader workers must live: got one that was killed (out of memory?) before its batch was "
            "done; run again to go on from the last checkpoint, with fewer workers if memory is short"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_maker: BatchMaker | None = None  # of this worker process


def _start_worker(plan: LoaderPlan) -> None:
    global _maker  # noqa: PLW0603  (the one way a pool has to give its processes a value)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = BatchMaker(plan)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        _exit(1)


def _make_batch(step: int) -> Batch:
    if _maker is None:
        raise RuntimeError("a batch can be made in a started worker only")
    return _maker(step)
