"""Batches of crops in the order of the stream, decoded and cropped ahead by worker processes.

Without torch, so that a worker starts fast. A batch is a pure function of (index, seed, step): the number of workers
changes when it is made, never a byte of it. Crops may also be left to ``training.augment_torch``: a batch then holds
decoded pictures and what was drawn for them.
"""

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from os import _exit
from typing import NamedTuple, cast

import numpy as np

from curation.listing import Root
from curation.mix import MixSpec
from curation.store import Location
from embedding.decode import BadImage, decode_rgb
from training.augment import N_GLOBAL, AugmentConfig, Crops, crop_rng, draw_crops, make_crops
from training.handover import Parcel, close_memory, open_memory, pack, path_of, unpack
from training.reader import Reader
from training.stream import Sample, Stream

_MAX_REPLACED = 256  # samples in a row that may be bad before the stream is taken for broken


class BadSample(NamedTuple):
    """A sample that could not be decoded and was replaced."""

    key: str
    reason: str


class Pictures(NamedTuple):
    """The images of a batch, decoded, and what is to be done to them."""

    pixels: np.ndarray  # uint8, flat: one image after the other, each (height, width, RGB)
    sizes: np.ndarray  # int64 (images, 2): height and width
    drawn: np.ndarray  # records of ``training.augment.CROP`` (crop, image), globals first


class Batch(NamedTuple):
    """One step's crops, crop by crop: uint8 (crop, image, height, width, RGB); or the pictures they are made from."""

    step: int
    globals: np.ndarray | None  # None with ``pictures``
    locals: np.ndarray | None
    keys: list[str]  # of the images seen, slot by slot
    bad: list[BadSample]  # replaced, in order of slots
    components: list[int]  # of the mix, slot by slot; 0 when there is none
    pictures: Pictures | None = None  # when ``LoaderPlan.crops_on`` is "device"


class WorkerDied(RuntimeError):
    """A worker process of the loader ended before its batch was done."""


@dataclass(frozen=True, kw_only=True)
class LoaderPlan:
    """What a worker needs to make any batch; small and picklable. Raises ValueError for slots that are not there."""

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
    slots: tuple[int, int] | None = None  # first and end of the slots of a batch to make; None: all of them
    crops_on: str = "worker"  # or "device": give ``Batch.pictures`` instead of crops
    root: Root | None = None  # where the tars of others are now; None: where they were when they were indexed

    def __post_init__(self) -> None:
        """Raise ValueError naming the field that breaks its rule."""
        first, end = self.slots or (0, self.batch)
        if not 0 <= first < end <= self.batch:
            raise ValueError(f"slots must be a range within 0..{self.batch}: got {first}..{end}")
        if self.crops_on not in ("worker", "device"):
            raise ValueError(f"crops_on must be 'worker' or 'device': got {self.crops_on!r}")


class BatchMaker:
    """Makes the batch of any step; keeps the open groups of the stream, and their tars."""

    def __init__(self, plan: LoaderPlan, reuse: bool = False) -> None:
        """``reuse``: a batch may overwrite the crops of the one before, whose memory costs as much as filling it."""
        self.plan = plan
        self._arrays = _no_crops(plan) if reuse and plan.crops_on == "worker" else None
        self.stream = Stream(
            plan.shards, batch=plan.batch, seed=plan.seed, n_open=plan.n_open, totals=plan.totals, mix=plan.mix
        )
        self._read = Reader(plan.shards, plan.root)

    def __call__(self, step: int) -> Batch:
        """Read, decode and crop the samples of one step."""
        plan = self.plan
        samples = self.stream.batch(step)[slice(*plan.slots or (None,))]
        bad: list[BadSample] = []
        keys = []
        kept = plan.crops_on == "device"
        take = _Kept() if kept else _Cropped(plan, self._arrays or _no_crops(plan))
        for slot, (sample, data) in enumerate(zip(samples, self._read(samples), strict=True)):
            image, key = self._decoded(sample, data, bad)
            height, width = image.shape[:2]
            rng = crop_rng(plan.seed, sample.epoch, sample.number)
            take(slot, image, draw_crops(width, height, plan.augment, plan.n_local, rng))
            keys.append(key)
        components = [sample.component for sample in samples]
        if isinstance(take, _Kept):
            return Batch(step, None, None, keys, bad, components, take.pictures())
        return Batch(step, take.crops.globals, take.crops.locals, keys, bad, components)

    def _decoded(self, sample: Sample, data: bytes, bad: list[BadSample]) -> tuple[np.ndarray, str]:
        """The image of a sample; when it does not decode, of the next one of its component that does."""
        for _ in range(_MAX_REPLACED):
            image = decode_rgb(data)
            if not isinstance(image, BadImage):
                return image, sample.key
            bad.append(BadSample(sample.key, image.reason))
            sample = self.stream.after(sample)
            (data,) = self._read([sample])
        raise ValueError(
            f"one of {_MAX_REPLACED} samples in a row must decode: got none, last {bad[-1]}, in {self.plan.shards}"
        )


def _no_crops(plan: LoaderPlan) -> Crops:
    """Arrays for the crops of a batch, nothing in them yet."""
    first, end = plan.slots or (0, plan.batch)
    shapes = (N_GLOBAL, plan.global_size), (plan.n_local, plan.local_size)
    return Crops(*(np.empty((n, end - first, side, side, 3), np.uint8) for n, side in shapes))


class _Cropped:
    """The crops of a batch, made as its images come."""

    def __init__(self, plan: LoaderPlan, arrays: Crops) -> None:
        self._sizes, self.crops = (plan.global_size, plan.local_size), arrays

    def __call__(self, slot: int, image: np.ndarray, drawn: np.ndarray) -> None:
        out = Crops(self.crops.globals[:, slot], self.crops.locals[:, slot])
        make_crops(image, drawn, self._sizes, out=out)


class _Kept:
    """The images of a batch as they come."""

    def __init__(self) -> None:
        self._images: list[np.ndarray] = []
        self._drawn: list[np.ndarray] = []

    def __call__(self, slot: int, image: np.ndarray, drawn: np.ndarray) -> None:
        self._images.append(image)
        self._drawn.append(drawn)

    def pictures(self) -> Pictures:
        sizes = np.array([image.shape[:2] for image in self._images], np.int64)
        return Pictures(
            np.concatenate([image.reshape(-1) for image in self._images]), sizes, np.stack(self._drawn, axis=1)
        )


def batches(
    plan: LoaderPlan, start: int, stop: int, n_workers: int = 0, prefetch: int = 4
) -> Generator[Batch, None, None]:
    """The batches of steps start..stop - 1 in order, the same bytes for any ``n_workers`` (0: made here, when asked).

    A sample that does not decode is listed in ``bad`` and replaced: its slot shows the next one of its component that
    does, cropped by the generator of the slot. Memory: prefetch * n_workers + 1 batches, which all processes share and
    which ends with them, and a batch for each worker. Raises WorkerDied when a worker is killed, ValueError when 256
    samples in a row do not decode. Closing the iterator ends the workers; they also end by themselves when this process
    is killed.
    """
    if n_workers == 0:
        yield from map(BatchMaker(plan), range(start, stop))
        return
    pool = ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(plan,))
    ahead: deque[tuple[Future[Parcel], int | None]] = deque()
    try:
        for step in range(start, stop + prefetch * n_workers):
            if step < stop:
                ahead.append(_asked(pool, step))
            if step - start >= prefetch * n_workers:
                yield _taken(*ahead.popleft())
    except BrokenProcessPool as e:
        raise WorkerDied(
            f"all {n_workers} loader workers must live: got one that was killed (out of memory?) before its batch was "
            "done; run again to go on from the last checkpoint, with fewer workers if memory is short"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for _, memory in ahead:
            close_memory(memory)


def _asked(pool: ProcessPoolExecutor, step: int) -> tuple[Future[Parcel], int | None]:
    """The batch to come, and the memory that it comes in."""
    memory = open_memory()
    try:
        return pool.submit(_make_batch, step, path_of(memory)), memory
    except BrokenProcessPool:
        close_memory(memory)
        raise


def _taken(future: Future[Parcel], memory: int | None) -> Batch:
    """The batch when it is done."""
    try:
        return cast(Batch, unpack(future.result(), memory))
    finally:
        close_memory(memory)


_maker: BatchMaker | None = None  # of this worker process


def _start_worker(plan: LoaderPlan) -> None:
    global _maker  # noqa: PLW0603  (the one way a pool has to give its processes a value)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = BatchMaker(plan, reuse=True)  # a batch is copied when it is packed


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        _exit(1)


def _make_batch(step: int, memory: str | None) -> Parcel:
    if _maker is None:
        raise RuntimeError("a batch can be made in a started worker only")
    return pack(_maker(step), memory)
