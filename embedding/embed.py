"""Image files to unit rows: decode, prepare, embed, in batches cut at fixed places."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from embedding.decode import MAX_PIXELS, BadImage, decode_reduced, decode_rgb
from embedding.network import Backbone, Inputs
from embedding.preprocess import decode_prepared

# Files a batch: what suits a core's cache. Part of the stage version, since the height of a product changes its bits.
BATCH_IMAGES = 16

_SLICE = 8  # files a thread decodes at a time

Prepare = Callable[[bytes], npt.NDArray[Any] | BadImage]  # a file to an input of a network

Item = TypeVar("Item")
Result = TypeVar("Result")


class Embedded(NamedTuple):
    """Unit rows of the images that could be decoded."""

    embeddings: npt.NDArray[np.float32]  # (n_good, width), unit rows
    good: npt.NDArray[np.int64]  # (n_good,), ascending: which image each row belongs to
    bad: dict[int, BadImage]  # the others


@dataclass
class Waited:
    """Seconds in which a network had nothing to work on, and seconds in all."""

    seconds: float = 0.0
    total: float = 0.0

    def log(self, images: int) -> dict[str, float]:
        """What is told of a part with ``images`` files; it can be added up over parts."""
        return {"images": images, "worker_seconds": self.total, "waiting_seconds": self.seconds}


def unit_rows(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Rows of x (n, d) divided by their L2 norm, float32.

    Raises ValueError for a row that has no direction: norm 0, or a value that is not finite.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind not in "fiu":
        raise ValueError(f"rows must be an array of numbers (n, d): got {x.dtype} {x.shape}")
    norms = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    bad = np.flatnonzero(~((norms > 0) & (norms < np.inf)))  # negated, so that NaN is bad too
    if len(bad):
        raise ValueError(
            f"rows must have a finite norm above 0: {len(bad)} of {len(x)} do not, "
            f"first row {bad[0]} has norm {norms[bad[0]]}"
        )
    unit: npt.NDArray[np.float32] = (x / norms[:, None]).astype(np.float32)
    return unit


def embed_images(backbone: Backbone, images: Sequence[bytes], max_pixels: int = MAX_PIXELS) -> Embedded:
    """Unit rows of image files; a file that cannot be decoded is listed with its reason.

    Batches are cut every ``BATCH_IMAGES`` files, bad ones included, so the result depends on the list alone:
    cut a list at multiples of that number and the bytes stay the same. Raises ValueError if the backbone gives a row
    without a direction.
    """
    found = list(embed_stream(backbone, images, max_pixels))
    rows = [np.zeros((0, backbone.width), np.float32), *(part.embeddings for part in found)]
    good = [np.zeros(0, np.int64), *(part.good for part in found)]
    return Embedded(
        np.concatenate(rows), np.concatenate(good), {i: bad for part in found for i, bad in part.bad.items()}
    )


def embed_stream(
    backbone: Backbone,
    images: Iterable[bytes],
    max_pixels: int = MAX_PIXELS,
    *,
    batch: int = BATCH_IMAGES,
    threads: int = 0,
    waited: Waited | None = None,
    prepare: Prepare | None = None,
) -> Iterator[Embedded]:
    """``embed_images`` batch by batch, of files that come one after the other; positions count from the first file.

    threads: how many read and decode ahead while the network works; 0: none, all in turn. They change no byte.
    batch: files a forward; on a CPU it changes the last bits. waited: adds up the time, when all is read.
    prepare: in place of ``preparation("full", ...)``; called by all the threads. Holds three batches of prepared
    images (of a network 3 * side ** 2 bytes each) and, with threads, the files and images of one more. The rows of a
    batch are asked for when the next has begun, so that a GPU has work meanwhile. Raises ValueError if the backbone
    gives a row without a direction.
    """
    prepare = prepare or preparation("full", backbone, max_pixels)
    files = enumerate(images)
    slices = iter(lambda: list(islice(files, _SLICE)), [])
    prepared = ahead(partial(_prepare, prepare), slices, threads, threads + -(-batch // _SLICE))
    images_one_by_one = chain.from_iterable(prepared)
    batches = iter(lambda: list(islice(images_one_by_one, batch)), [])
    stacked = ahead(partial(_stack, pinned=backbone.device == "cuda"), batches, min(threads, 1), 1)
    waited, start = waited or Waited(), time.perf_counter()
    with closing(prepared), closing(stacked):  # the last first: it draws from the other
        begun = ((backbone.begun(inputs), good, bad) for inputs, good, bad in stacked)
        for found, good, bad in _one_behind(begun):
            rows = found.rows()
            waited.seconds -= found.seconds()
            yield Embedded(unit_rows(rows), good, bad)
    took = time.perf_counter() - start
    waited.seconds, waited.total = waited.seconds + took, waited.total + took


def preparation(decoder: str, backbone: Backbone, max_pixels: int) -> Prepare:
    """What makes an input of a file, by a decoder of ``EmbedConfig``; it can be sent to another process."""
    scaled = partial(decode_reduced, least_side=backbone.least_side, max_pixels=max_pixels)
    decode = partial(decode_rgb, max_pixels=max_pixels) if decoder == "full" else scaled
    return partial(decode_prepared, prepare=backbone.prepare, decode=decode)


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, window: int
) -> Generator[Result, None, None]:
    """``work(item)`` of every item, in order, by threads that run at most ``window`` items ahead of the reader.

    The items are drawn by the threads too, one at a time. threads 0: in turn, in this thread. What drawing or working
    raises is raised here.
    """
    if threads == 0:
        yield from map(work, items)
        return
    numbered, lock = enumerate(items), Lock()

    def one() -> tuple[int, Result] | None:
        with lock:  # which of them draws an item is chance, so it says its number
            drawn = next(numbered, None)
        return None if drawn is None else (drawn[0], work(drawn[1]))

    pool = ThreadPoolExecutor(threads)
    try:
        waiting = deque(pool.submit(one) for _ in range(window))
        ready: dict[int, Result] = {}
        n_next = 0
        while waiting:  # to the last: one that was too late for an item says nothing of the others
            if (done := waiting.popleft().result()) is not None:
                ready[done[0]] = done[1]
                waiting.append(pool.submit(one))
            while n_next in ready:
                yield ready.pop(n_next)
                n_next += 1
    finally:
        pool.shutdown(cancel_futures=True)


def _one_behind(items: Iterator[Result]) -> Iterator[Result]:
    """Every item when the next has been drawn."""
    late = next(items, None)
    while late is not None:
        following = next(items, None)
        yield late
        late = following


def _prepare(prepare: Prepare, files: Sequence[tuple[int, bytes]]) -> list[tuple[int, Inputs | BadImage]]:
    return [(i, prepare(data)) for i, data in files]


def _stack(
    prepared: Sequence[tuple[int, Inputs | BadImage]], pinned: bool
) -> tuple[Inputs, npt.NDArray[np.int64], dict[int, BadImage]]:
    """One array of the good images (in memory that a GPU copies from), their positions, and the bad ones."""
    images = [(i, image) for i, image in prepared if not isinstance(image, BadImage)]
    bad = {i: image for i, image in prepared if isinstance(image, BadImage)}
    good = np.array([i for i, _ in images], np.int64)
    if not images:
        return np.zeros(0, np.float32), good, bad
    first = images[0][1]
    dtype = torch.from_numpy(np.zeros(0, first.dtype)).dtype
    out = torch.empty((len(images), *first.shape), dtype=dtype, pin_memory=pinned).numpy()
    return np.stack([image for _, image in images], out=out), good, bad
