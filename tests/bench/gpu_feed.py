"""What the worker processes of ``gpu_trainer`` do: JPEGs of a file to the crops or the pictures of one batch.

``training.loader`` needs pyarrow for the index of its shards; here the images lie in one file, and what is done to them
is the same: whole batches, decoded and cropped by the same code, handed over in the same memory. Without torch.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedding.decode import BadImage, decode_rgb
from embedding.isolate import Processes
from training.augment import CROP, N_GLOBAL, AugmentConfig, Crops, crop_rng, draw_crops, make_crops
from training.handover import Parcel, close_memory, open_memory, pack, path_of, unpack


class Source(NamedTuple):
    """Images in a file, and what is made of them."""

    path: str
    offsets: np.ndarray  # int64 (images + 1,)
    augment: AugmentConfig
    sides: tuple[int, int]  # of global and local crops, pixels
    n_local: int
    batch: int
    seed: int
    numba: bool  # crops by the reference, else by tensor operations


class Made(NamedTuple):
    """A batch: its crops, or its pictures as ``training.loader.Pictures`` has them."""

    globals: np.ndarray | None  # uint8 (crop, image, height, width, RGB)
    locals: np.ndarray | None
    pixels: np.ndarray | None  # uint8, flat
    sizes: np.ndarray | None
    drawn: np.ndarray | None  # records of ``training.augment.CROP`` (crop, image)


def has_numba() -> bool:
    """Whether the crops of the reference can be made."""
    return find_spec("numba") is not None


def write_source(path: Path, files: Sequence[bytes]) -> np.ndarray:
    """Write the files one behind the other; their offsets."""
    path.write_bytes(b"".join(files))
    return np.cumsum([0, *map(len, files)])


def pictures(source: Source, number: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The decoded images of a batch and what is drawn for them, (crop, image)."""
    images, drawn = [], np.empty((N_GLOBAL + source.n_local, source.batch), CROP)
    with Path(source.path).open("rb") as file:
        for slot in range(source.batch):
            at = (number * source.batch + slot) % (len(source.offsets) - 1)
            file.seek(source.offsets[at])
            image = decode_rgb(file.read(int(source.offsets[at + 1] - source.offsets[at])))
            if isinstance(image, BadImage):
                raise ValueError(f"image {at} must decode: {image}")
            height, width = image.shape[:2]
            rng = crop_rng(source.seed, number, slot)
            drawn[:, slot] = draw_crops(width, height, source.augment, source.n_local, rng)
            images.append(image)
    return images, drawn


def flat(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels one image after the other, and sizes, int64 (images, 2)."""
    sizes = np.array([image.shape[:2] for image in images], np.int64)
    return np.concatenate([image.reshape(-1) for image in images]), sizes


def cropped(images: Sequence[np.ndarray], drawn: np.ndarray, sides: tuple[int, int]) -> Crops:
    """Crops by the reference: uint8 (crop, image, height, width, RGB)."""
    n = len(images)
    out = Crops(*(np.empty((c, n, side, side, 3), np.uint8)
                  for c, side in zip((N_GLOBAL, len(drawn) - N_GLOBAL), sides, strict=True)))  # fmt: skip
    for slot, image in enumerate(images):
        make_crops(image, drawn[:, slot], sides, out=Crops(out.globals[:, slot], out.locals[:, slot]))
    return out


def batch_of_crops(source: Source, number: int, memory: str | None) -> Parcel:
    """In a worker: a batch whose crops are made there; by tensor operations it takes longer."""
    images, drawn = pictures(source, number)
    if source.numba:
        return pack(Made(*cropped(images, drawn, source.sides), None, None, None), memory)
    import torch

    from training.augment_torch import batched_crops

    torch.set_num_threads(1)
    globals_GBhw3, locals_LBhw3 = batched_crops(*flat(images), drawn, source.sides)
    return pack(Made(globals_GBhw3.numpy(), locals_LBhw3.numpy(), None, None, None), memory)


def batch_of_pictures(source: Source, number: int, memory: str | None) -> Parcel:
    """In a worker: a batch that is only decoded."""
    images, drawn = pictures(source, number)
    return pack(Made(None, None, *flat(images), drawn), memory)


WAYS: dict[str, Callable[..., Parcel]] = {"worker": batch_of_crops, "device": batch_of_pictures}


@contextmanager
def feeding(source: Source, crops_on: str, n_workers: int) -> Iterator[Iterator[Made]]:
    """Batch after batch, one ahead for each worker, for the time of the block."""
    processes, threads = Processes(n_workers), ThreadPoolExecutor(n_workers)
    ahead: deque[tuple[Future[Any], int | None]] = deque()
    call: Callable[..., Any] = partial(processes, WAYS[crops_on])

    def batches() -> Iterator[Made]:
        for number in count():
            memory = open_memory()
            ahead.append((threads.submit(call, source, number, path_of(memory)), memory))
            if len(ahead) > n_workers:
                yield taken(*ahead.popleft())

    try:
        yield batches()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        processes.close()
        for _, memory in ahead:
            close_memory(memory)


def taken(future: Future[Any], memory: int | None) -> Made:
    """The batch when it is done."""
    try:
        parcel = future.result()
        if isinstance(parcel, BadImage):
            raise RuntimeError(f"a worker must live: {parcel.detail}")
        made: Made = unpack(parcel, memory)
        return made
    finally:
        close_memory(memory)


def alone(source: Source, crops_on: str, n_workers: int, seconds: float) -> float:
    """Images/s of the workers when nobody trains."""
    with feeding(source, crops_on, n_workers) as batches:
        for _ in range(n_workers):  # processes start, compilers too
            next(batches)
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or n % n_workers:
            next(batches)
            n += 1
        return n * source.batch / (time.perf_counter() - start)
