"""The images of some pool rows, to be read in any order, each compared with its key."""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.listing import Root, file_at
from curation.sources import ImageChanged, read_images
from curation.store import Location

# Mean bytes of an image from which they are read where they are. Smaller ones are copied first, in the order of their
# sources: to seek for each of them would cost more than to write them twice.
DIRECT_BYTES = 1 << 16
WHOLE_FILE = -1  # for an offset: the image is all of its file
_COPY = 1 << 20  # bytes copied at a time
_SCRATCH = 0  # number of the scratch file


class Part(NamedTuple):
    """Rows of one part of a pool."""

    root: Root  # what their sources are relative to
    image_column: str  # of Parquet sources
    rows: pa.Table  # columns key (hex sha256), source, offset, n_bytes


class Images(NamedTuple):
    """Where images are, by their number: the rows of one part after those of another."""

    parts: Sequence[Part]
    firsts: np.ndarray  # int64 (n_parts + 1,): number of the first image of each part, and of all
    files: np.ndarray  # int64 (n,): number of the file that holds an image, equal for neighbours in one file
    offsets: np.ndarray  # int64 (n,): where in that file
    lengths: np.ndarray  # int64 (n,): bytes
    digests: bytes  # sha256 of each image
    scratch: io.FileIO

    def read(self, numbers: np.ndarray, out: memoryview, at: np.ndarray) -> None:
        """Read images into ``out``, each to its place ``at``, int64 (n,) in bytes.

        Threads may read at the same time. Raises ImageChanged when one is not what the pool saw,
        FileNotFoundError when its file is gone.
        """
        order = np.lexsort((self.offsets[numbers], self.files[numbers]))  # as a disk likes it
        numbers, at = numbers[order], at[order]
        starts = np.flatnonzero(np.diff(self.files[numbers], prepend=-1)).tolist()  # of runs in one file
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=False):
            run = numbers[start:stop]
            with self._open(int(run[0])) as file:
                where = (run, self.offsets[run], self.lengths[run], at[start:stop])
                for number, offset, length, place in np.stack(where, axis=1).tolist():
                    view = out[place : place + length]
                    n_read = _read_at(file, offset, view)
                    if n_read != length:
                        raise ImageChanged(f"{self._must_hold(number)}: it had {length} bytes and has {n_read}")
                    if hashlib.sha256(view).digest() != self.digests[32 * number : 32 * number + 32]:
                        raise ImageChanged(f"{self._must_hold(number)}: its bytes have changed since")

    def _open(self, number: int) -> AbstractContextManager[io.FileIO]:
        if self.files[number] == _SCRATCH:
            return nullcontext(self.scratch)
        return self._file_of(number).path.open("rb", buffering=0)

    def _file_of(self, number: int) -> Location:
        part = int(np.searchsorted(self.firsts, number, side="right")) - 1
        root, _, rows = self.parts[part]
        return file_at(root, rows["source"][number - int(self.firsts[part])].as_py())

    def _must_hold(self, number: int) -> str:
        return f"{self._file_of(number)} must hold the image that the pool saw"


@contextmanager
def open_images(parts: Sequence[Part]) -> Iterator[Images]:
    """The images of all rows of the parts.

    Large ones on a local disk are read where they are; others are copied here to a scratch file, which is gone
    afterwards. In memory are 60 bytes an image. Raises ImageChanged when one is not as long as the pool saw it.
    """
    files, offsets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    n_files, n_copied = _SCRATCH + 1, 0
    with tempfile.TemporaryFile(prefix="openlvd-", buffering=0) as scratch:
        copy = io.BufferedWriter(scratch, _COPY)
        for part in parts:
            if _is_direct(part):
                sources = part.rows["source"].combine_chunks().dictionary_encode()
                files.append(sources.indices.to_numpy().astype(np.int64) + n_files)
                offsets.append(pc.fill_null(part.rows["offset"], WHOLE_FILE).to_numpy())
                n_files += len(sources.dictionary)
                continue
            ends = n_copied + np.cumsum(_lengths(part))
            files.append(np.full(len(ends), _SCRATCH, np.int64))
            offsets.append(ends - _lengths(part))
            for data in read_images(part.root, part.rows, part.image_column):
                n_copied += copy.write(data)
        copy.detach()
        lengths = [_lengths(part) for part in parts]
        firsts = np.cumsum([0, *map(len, lengths)])
        digests = b"".join(bytes.fromhex("".join(part.rows["key"].to_pylist())) for part in parts)
        every = (np.concatenate(files), np.concatenate(offsets), np.concatenate([*lengths, files[0]]))
        yield Images(parts, firsts, *every, digests, scratch)


def _is_direct(part: Part) -> bool:
    if not part.root.is_local or not part.rows.num_rows or _lengths(part).mean() < DIRECT_BYTES:
        return False
    in_parquet = pc.ends_with(pc.utf8_lower(part.rows["source"]), ".parquet")
    return not pc.any(pc.and_(in_parquet, pc.is_valid(part.rows["offset"]))).as_py()


def _lengths(part: Part) -> np.ndarray:
    lengths: np.ndarray = part.rows["n_bytes"].to_numpy().astype(np.int64)
    return lengths


def _read_at(file: io.FileIO, offset: int, out: memoryview) -> int:
    """Fill ``out`` from the offset. Returns how many bytes there are: fewer at the end, more in a longer file.

    Where the file stands is neither used nor changed: threads share the scratch file.
    """
    if offset == WHOLE_FILE:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes != len(out):
            return n_bytes
        offset = 0
    n_read = 0
    while n_read < len(out) and (n_more := os.preadv(file.fileno(), [out[n_read:]], offset + n_read)):
        n_read += n_more
    return n_read
