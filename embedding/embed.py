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

from embedding.backbone import Backbone
from embedding.decode import MAX_PIXELS, BadImage, decode_reduced, decode_rgb
from embedding.fast_decode import Reduced

# Files a batch: what suits a core's cache. Part of the stage version, since the height of a product changes its bits.
BATCH_IMAGES = 16

_SLICE = 8  # files a thread decodes at a time

Picture = npt.NDArray[np.uint8] | Reduced
Decode = Callable[[bytes], Picture | BadImage]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Embedded(NamedTuple):
    """Unit rows of the images that could be decoded."""

    embeddings: npt.NDArray[np.float32]  # (n_good, width), unit rows
    good: npt.NDArray[np.int64]  # (n_good,), ascending: which image each row belongs to
    bad: dict[int, BadImage]  # the others


@dataclass
class Waited:
    """Seconds a reader had nothing to work on, and seconds in all."""

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
    decode: Decode | None = None,
) -> Iterator[Embedded]:
    """``embed_images`` batch by batch, of files that come one after the other; positions count from the first file.

    threads: how many read and decode ahead while the network works; 0: none, all in turn. They change no byte.
    batch: files a forward; on a CPU it changes the last bits. waited: adds up the time without data.
    decode: in place of ``decode_rgb`` with ``max_pixels``; called by all the threads. Holds two
    batches of prepared images (3 * side ** 2 * 4 bytes each) and, with threads, the files and images of one more.
    Raises ValueError if the backbone gives a row without a direction.
    """
    prepare = partial(_prepare, backbone, decode or partial(decode_rgb, max_pixels=max_pixels))
    files = enumerate(images)
    slices = iter(lambda: list(islice(files, _SLICE)), [])
    prepared = ahead(prepare, slices, threads, threads + -(-batch // _SLICE))
    images_one_by_one = chain.from_iterable(prepared)
    batches = iter(lambda: list(islice(images_one_by_one, batch)), [])
    stacked = ahead(partial(_stack, pinned=backbone.device == "cuda"), batches, min(threads, 1), 1)
    with closing(prepared), closing(stacked):  # the last first: it draws from the other
        for inputs, good, bad in _timed(stacked, waited):
            rows = backbone.forward(inputs) if len(good) else np.zeros((0, backbone.width), np.float32)
            yield Embedded(unit_rows(rows), good, bad)


def decoder(
    name: str, backbone: Backbone, max_pixels: int
) -> tuple[Callable[..., Picture | BadImage], tuple[int | None, ...]]:
    """A decoder of ``EmbedConfig.decoder`` for what a backbone sees: a function, and its arguments behind the data."""
    return (decode_rgb, (max_pixels,)) if name == "full" else (decode_reduced, (backbone.least_side, max_pixels))


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


def _timed(items: Iterator[Result], waited: Waited | None) -> Iterator[Result]:
    waited = waited or Waited()
    start = time.perf_counter()
    while True:
        asked = time.perf_counter()
        item = next(items, None)
        waited.seconds += time.perf_counter() - asked
        if item is None:
            break
        yield item
    waited.total += time.perf_counter() - start


def _prepare(
    backbone: Backbone, decode: Decode, files: Sequence[tuple[int, bytes]]
) -> list[tuple[int, npt.NDArray[np.float32] | BadImage]]:
    prepared: list[tuple[int, npt.NDArray[np.float32] | BadImage]] = []
    for i, data in files:
        pixels = decode(data)
        prepared.append((i, pixels if isinstance(pixels, BadImage) else backbone.prepare(pixels)))
    return prepared


def _stack(
    prepared: Sequence[tuple[int, npt.NDArray[np.float32] | BadImage]], pinned: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], dict[int, BadImage]]:
    """One array of the good images (in memory that a GPU copies from), their positions, and the bad ones."""
    images = [(i, image) for i, image in prepared if not isinstance(image, BadImage)]
    bad = {i: image for i, image in prepared if isinstance(image, BadImage)}
    good = np.array([i for i, _ in images], np.int64)
    if not images:
        return np.zeros(0, np.float32), good, bad
    out = torch.empty((len(images), *images[0][1].shape), dtype=torch.float32, pin_memory=pinned).numpy()
    return np.stack([image for _, image in images], out=out), good, bad
