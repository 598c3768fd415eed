"""Samples as the blocks of a tar, and a writer that hashes what it writes.

A tar is made of blocks of 512 bytes. All but the images themselves - headers, the JSON and the caption of each sample -
is built for many samples at once; the length of every image is known beforehand, so its bytes are read straight to
their place between these blocks.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 512  # bytes, the unit of a tar
RECORD = 10_240  # bytes, a tar's length is a multiple of this
PIECE = 1 << 23  # bytes built, hashed and written at a time, unless one sample has more: they stay in the cache

EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"}  # others are their format's name
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)  # fields of a header
_ESCAPED = np.array([chr(c) in '"\\' or not " " <= chr(c) <= "~" for c in range(256)])  # bytes, in a JSON string
_ZEROS = pa.array(["\0" * n for n in range(BLOCK)], pa.large_string())


class Layout(NamedTuple):
    """The members of samples in a tar that begins with the first of them; places are counted in blocks."""

    blocks: np.ndarray  # uint8 (m, 512): all but the images, in the order of the tar
    at: np.ndarray  # int64 (m,), ascending: where they stand
    starts: np.ndarray  # int64 (n + 1,): where each sample starts, and the end of the last
    images: np.ndarray  # int64 (n,): where the bytes of each image start
    lengths: np.ndarray  # int64 (n,): bytes of each image

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Samples first to stop, as many at a time as ``PIECE`` holds, at least one."""
        first, n_samples = 0, len(self.lengths)
        while first < n_samples:
            most = int(np.searchsorted(self.starts, self.starts[first] + PIECE // BLOCK, side="right")) - 1
            stop = min(max(most, first + 1), n_samples)
            yield first, stop
            first = stop

    def largest_piece(self) -> int:
        """The length of the largest piece in bytes."""
        return max(self.n_bytes(first, stop) for first, stop in self.pieces())

    def n_bytes(self, first: int, stop: int) -> int:
        """The length of samples first to stop."""
        return int(self.starts[stop] - self.starts[first]) * BLOCK

    def fill(self, first: int, stop: int, out: np.ndarray) -> np.ndarray:
        """Write all but the images of samples first to stop into ``out``. Returns where those go, int64 in bytes.

        ``out`` uint8 (bytes of these samples,). The rest of an image's last block is zeroed.
        """
        start, end = self.starts[[first, stop]]
        lo, hi = np.searchsorted(self.at, (start, end))
        in_blocks = out.reshape(-1, BLOCK)
        odd = self.lengths[first:stop] % BLOCK > 0
        in_blocks[(self.images[first:stop] - start + self.lengths[first:stop] // BLOCK)[odd]] = 0
        in_blocks[self.at[lo:hi] - start] = self.blocks[lo:hi]
        places: np.ndarray = (self.images[first:stop] - start) * BLOCK
        return places


def lay_out(rows: pa.Table) -> Layout:
    """The members of samples: ``<key>.<extension>``, ``<key>.json`` and, with a caption, ``<key>.txt``.

    ``rows`` are pool rows: columns key, source, member, format, width, height, label, caption, metadata, n_bytes.
    Raises ValueError for a name or a size that a header cannot hold. Holds about 4 kB a sample.
    """
    keys, captions = _text(rows["key"]), _text(rows["caption"])
    captioned = _true(pc.greater(pc.binary_length(captions), 0))
    lengths = rows["n_bytes"].to_numpy().astype(np.int64)
    jsons, texts = sample_jsons(rows), captions.filter(pa.array(captioned))
    (json_blocks, n_json), (text_blocks, n_text) = _blocks_of(jsons), _blocks_of(texts)
    n_image = -(-lengths // BLOCK)
    n_after = np.zeros(len(keys), np.int64)  # blocks of the caption with its header
    n_after[captioned] = 1 + n_text
    starts = np.concatenate([[0], np.cumsum(2 + n_image + n_json + n_after)]).astype(np.int64)
    json_at = starts[:-1] + 1 + n_image
    text_at = (json_at + 1 + n_json)[captioned]
    names = [_named(keys, _extensions(rows["format"])), _named(keys, "json"), _named(keys.filter(captioned), "txt")]
    sizes = np.concatenate([lengths, _lengths(jsons), _lengths(texts)])
    headers = tar_headers(pa.concat_arrays(names), sizes)
    at = np.concatenate([starts[:-1], json_at, text_at, _each(json_at + 1, n_json), _each(text_at + 1, n_text)])
    order = np.argsort(at)
    blocks = np.concatenate([headers, json_blocks, text_blocks])[order]
    return Layout(blocks, at[order], starts, starts[:-1] + 1, lengths)


def tar_headers(names: pa.Array, sizes: np.ndarray) -> np.ndarray:
    """uint8 (n, 512): ustar headers of regular files: mode 644, no owner, no time.

    names: strings (n,), ASCII of at most 100 bytes; sizes: int64 (n,), bytes. Raises ValueError.
    """
    n_bytes = pc.binary_length(names)
    _check(names, pc.string_is_ascii(names), "a member's name must be ASCII")
    _check(names, pc.less_equal(n_bytes, 100), "a member's name must be at most 100 bytes", n_bytes)
    _check(names, pa.array(sizes < 8**11), "a member must be smaller than 8 GiB", pa.array(sizes))
    one = np.zeros(BLOCK, np.uint8)
    one[100:155] = np.frombuffer(
        b"0000644\0" + b"0000000\0" * 2 + b"0" * 11 + b"\0" + b"0" * 11 + b"\0" + b" " * 7, "u1"
    )
    one[155:157] = np.frombuffer(b" 0", np.uint8)
    one[257:265] = np.frombuffer(b"ustar\x0000", np.uint8)
    heads = np.tile(one, (len(sizes), 1))
    heads[:, _NAME] = _bytes_of(pc.ascii_rpad(names, 100, "\0")).reshape(-1, 100)
    heads[:, _SIZE] = _octal(sizes, 11)
    heads[:, _CHECKSUM] = _octal(heads.sum(axis=1, dtype=np.int64), 6)  # of the header with blanks in its place
    heads[:, _CHECKSUM.stop] = 0
    return heads


def sample_jsons(rows: pa.Table) -> pa.Array:
    """large_string (n,): what travels beside each image: where it came from and what was said of it.

    ``rows`` as in ``lay_out``; the metadata of a pool are JSON as ``json.dumps`` writes it, with sorted keys, and so
    is what comes back.
    """
    metadata = _text(rows["metadata"])
    told = pc.greater(pc.binary_length(metadata), 0)
    fields = {
        **{
            name: _json_strings(_text(rows[name])) for name in ("key", "source", "member", "format", "label", "caption")
        },
        **{name: pc.fill_null(_text(rows[name]), "null") for name in ("width", "height")},
    }
    pieces: list[Any] = []
    for name in sorted([*fields, "metadata"]):
        comma = ", " if pieces else "{"
        if name == "metadata":
            pieces.append(pc.if_else(pc.fill_null(told, False), _join(f', "{name}": ', metadata), ""))
        else:
            pieces += [f'{comma}"{name}": ', fields[name]]
    return _join(*pieces, "}")


class TarWriter:
    """Writes a tar to a local path, piece by piece, and hashes it on the way. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0  # bytes so far

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.put(memoryview(bytes(2 * BLOCK + -(self.size + 2 * BLOCK) % RECORD)))
        self._file.close()

    def put(self, data: memoryview) -> None:
        """Append whole blocks."""
        self._hash.update(data)
        self.size += len(data)
        while data:
            data = data[self._file.write(data) :]

    def sha256(self) -> str:
        """The checksum of everything written; call it after the context has ended."""
        return self._hash.hexdigest()


def _text(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array of large_string."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.cast(pa.large_string())


def _join(*pieces: Any) -> pa.Array:
    """Strings put together row by row; null where one is null."""
    return pc.binary_join_element_wise(*(pa.scalar(p, pa.large_string()) if isinstance(p, str) else p for p in pieces),
                                       pa.scalar("", pa.large_string()))  # fmt: skip


def _json_strings(texts: pa.Array) -> pa.Array:
    """Each string as JSON, ASCII alone; null as ``null``."""
    quoted = _join('"', texts, '"')
    odd = _ESCAPED[_bytes_of(texts)]
    if odd.any():
        offsets = _offsets(texts)
        n_odd = np.concatenate([[0], np.cumsum(odd)])[offsets - offsets[0]]
        mask = pa.array(np.diff(n_odd) > 0)
        escaped = pa.array(map(json.dumps, texts.filter(mask).to_pylist()), pa.large_string())
        quoted = pc.replace_with_mask(quoted, mask, escaped)
    return pc.fill_null(quoted, "null")


def _extensions(formats: pa.ChunkedArray) -> pa.Array:
    names = _text(formats).dictionary_encode()
    extensions = [EXTENSIONS.get(name, name) for name in names.dictionary.to_pylist()]
    return pa.array(extensions, pa.large_string()).take(names.indices)


def _named(keys: pa.Array, extension: pa.Array | str) -> pa.Array:
    return _join(keys, ".", extension)


def _true(mask: pa.Array) -> np.ndarray:
    """bool (n,): False where null."""
    found: np.ndarray = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
    return found


def _lengths(texts: pa.Array) -> np.ndarray:
    """int64 (n,): bytes of each string, 0 for null."""
    found: np.ndarray = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _bytes_of(texts: pa.Array) -> np.ndarray:
    """uint8: the bytes of all strings, one after the other."""
    data, offsets = texts.buffers()[2], _offsets(texts)
    return np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]


def _offsets(texts: pa.Array) -> np.ndarray:
    """int64 (n + 1,): where each string starts in the buffer, and the end of the last."""
    if not len(texts):
        return np.zeros(1, np.int64)
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _blocks_of(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Each string in whole blocks, the rest zeros: uint8 (m, 512), and how many blocks each has, int64 (n,)."""
    lengths = _lengths(texts)
    padded = _join(texts, _ZEROS.take(pa.array(-lengths % BLOCK)))
    return _bytes_of(padded).reshape(-1, BLOCK), -(-lengths // BLOCK)


def _each(starts: np.ndarray, n_blocks: np.ndarray) -> np.ndarray:
    """int64: ``starts[i], starts[i] + 1, ...``, ``n_blocks[i]`` of them, for every i."""
    before = np.cumsum(n_blocks) - n_blocks
    return np.repeat(starts - before, n_blocks) + np.arange(n_blocks.sum())


def _octal(values: np.ndarray, n_digits: int) -> np.ndarray:
    """uint8 (n, n_digits): the digits of each value as text."""
    digits: np.ndarray = (values[:, None] >> np.arange(3 * (n_digits - 1), -1, -3) & 7).astype(np.uint8) + ord("0")
    return digits


def _check(names: pa.Array, good: pa.Array, rule: str, got: pa.Array | None = None) -> None:
    """Raise ValueError with the first name that is not good, and what it has."""
    if pc.all(good).as_py() is not False:
        return
    first = pc.index(good, False).as_py()
    what = names[first] if got is None else f"{got[first]} bytes in {names[first]}"
    raise ValueError(f"{rule}: got {what}")
