"""The index of a WebDataset tar that came without one: where its images are, found in one pass over its headers.

A sample is a run of members with one WebDataset key: their name up to the first dot after the last slash. It shows one
image: of its members that begin like an image the first with a suffix of images and nothing between key and suffix
(``a.jpg``), else with such a suffix at the end (``a.seg.png``), else with any other that is not one of metadata
(``a.img``, ``a``). ``.cls`` is its label. Links, folders, and files that systems leave (``._a.jpg``) are no members.
Member names are data, never paths.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.shards import INDEX_SCHEMA, TarFacts, digest_of_ends, with_tar
from curation.tars import METADATA_SUFFIXES, Member, is_compressed, split_key, tar_members, too_long, utf8_text
from embedding.decode import QUIET_PILLOW, BadImage, ImageFacts, inspect_header

LEFT_OUT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # the tar
        pa.field("key", pa.string()),  # null: the tar as a whole
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
BAD_SAMPLES = ("no_image", "undecodable", "too_large")  # reasons that count as bad
BROKEN_TARS = ("truncated", "not_a_tar")  # reasons of a tar as a whole: it may have cost any number of samples
DUPLICATE = "duplicate_key"  # the other reason: nothing is wrong but the name
_IMAGE_SUFFIXES = frozenset("jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm pnm avif".split())
_READ_AHEAD = 1 << 14  # bytes: headers stand apart by an image
_HEAD_BYTES = 1 << 14  # of an image, in which its size is as a rule
_LABEL_BYTES = 1 << 12  # of a .cls, at most
_ROWS_AT_A_TIME = 4096  # of Python values before they become Arrow
_MAGIC = slice(257, 262)  # of the first block of a tar: b"ustar"


class CompressedTarError(ValueError):
    """A tar whose bytes have no offsets."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which tars are indexed, and how much of them may be bad."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    source: str  # folder or S3 prefix with WebDataset tars, one tar, a pattern as in laion/**/*.tar, or a .txt list
    max_bad_fraction: float = 0.05  # share of the samples that may be bad: without an image, or undecodable; also the
    # share of the tars that may break off, or be none

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"index.max_bad_fraction must be in [0, 1]: got {self.max_bad_fraction}")


class TarIndex(NamedTuple):
    """What is in a tar."""

    rows: pa.Table  # INDEX_SCHEMA, with the ``TarFacts`` in its metadata
    left_out: pa.Table  # LEFT_OUT_SCHEMA: samples that are not indexed, and the tar itself where it breaks off
    unused_images: int  # members with a suffix of images beside the one that their sample shows


def index_tar(path: Path, name: str) -> TarIndex:
    """Index the local tar ``path``, which is called ``name``, relative to its source, in one pass.

    Counts are 1, ``row_id`` is the row in this index: there is no pool. What is no sample to train on is left out, with
    a reason: ``no_image``; ``undecodable`` and ``too_large`` as its header says (what is in the pixels shows in
    training); ``duplicate_key`` of all samples of one key but the first. A tar that breaks off, or is none, gives the
    samples before that and a row ``truncated`` or ``not_a_tar``. Memory: the index, some 100 bytes a sample, and an
    image whose size is not in its first 16 KiB. Raises CompressedTarError, OSError.
    """
    rows, left_out, n_unused = _Rows(INDEX_SCHEMA), _Rows(LEFT_OUT_SCHEMA), 0
    broken = ""
    with path.open("rb", buffering=0) as file, QUIET_PILLOW:
        first = file.read(tarfile.BLOCKSIZE)
        if is_compressed(first):
            raise CompressedTarError(f"a tar must be plain, so that its images have offsets: {path} is compressed")
        try:
            for sample in _samples(path, file.fileno()):
                n_unused += max(sample.n_images - 1, 0)
                image = _image_of(sample, file.fileno())
                if isinstance(image, BadImage):
                    left_out.add(name, sample.key, image.reason, image.detail)
                else:
                    member, facts = image
                    rows.add(sample.key, rows.n_rows, member.offset, member.size, facts.format, sample.label,
                             facts.width, facts.height, 1)  # fmt: skip
        except tarfile.TarError as e:
            broken = utf8_text(str(e))
        size = os.fstat(file.fileno()).st_size
        ends = digest_of_ends(lambda offset, length: os.pread(file.fileno(), length, offset), size)
    if broken:
        is_tar = rows.n_rows or left_out.n_rows or not first or first[_MAGIC] == b"ustar"
        left_out.add(name, None, BROKEN_TARS[0 if is_tar else 1], broken)
    table, again = _first_of_keys(rows.table())
    for key in again:
        left_out.add(name, key, DUPLICATE, "an earlier sample of this tar has this key")
    return TarIndex(with_tar(table, TarFacts(name, size, ends)), left_out.table(), n_unused)


class _Sample:
    """The members of one key, as far as they matter: bounded, however many there are."""

    def __init__(self, key: str) -> None:
        self.key = utf8_text(key)
        self.label: str | None = None
        self.candidates: dict[int, Member] = {}  # by rank, the first of each
        self.n_images = 0

    def add(self, member: Member, suffix: str, fd: int) -> None:
        """Take in a member, whose name ends in ``suffix`` after the key."""
        last = suffix.rpartition(".")[2].lower()
        if last == "cls" and member.size <= _LABEL_BYTES:
            self.label = os.pread(fd, member.size, member.offset).decode("utf-8", "replace").strip()
        if f".{last}" in METADATA_SUFFIXES:
            return
        is_image = last in _IMAGE_SUFFIXES
        self.n_images += is_image
        self.candidates.setdefault((1 if "." in suffix else 0) if is_image else 2, member)


def _samples(path: Path, fd: int) -> Iterator[_Sample]:
    """The samples of a tar, also the one that a break cuts. Raises tarfile.TarError after what is before the break."""
    sample, key, broken = _Sample(""), None, None
    members = tar_members(path, _READ_AHEAD)
    while broken is None:
        try:
            member, _ = next(members)
        except StopIteration:
            break
        except tarfile.TarError as e:
            broken = e
            break
        own, suffix = split_key(member.name)
        if own != key:
            if key is not None:
                yield sample
            sample, key = _Sample(own), own
        sample.add(member, suffix, fd)
    if key is not None:
        yield sample
    if broken is not None:
        raise broken


def _image_of(sample: _Sample, fd: int) -> tuple[Member, ImageFacts] | BadImage:
    """The image that a sample shows; why there is none."""
    bad = BadImage("no_image", "no member of this key is an image")
    for rank, member in sorted(sample.candidates.items()):
        facts = _look_at(member, fd)
        if not isinstance(facts, BadImage):
            return member, facts
        if rank < 2 and bad.reason == "no_image":  # a file of another kind that is no image is no bad image
            bad = facts
    return bad


def _look_at(member: Member, fd: int) -> ImageFacts | BadImage:
    """What the header of an image says."""
    if member.is_sparse or too_long(member.size):
        return BadImage("undecodable", too_long(member.size) or "a sparse member of a tar")
    facts = inspect_header(os.pread(fd, min(member.size, _HEAD_BYTES), member.offset))
    if isinstance(facts, BadImage) and facts.reason == "undecodable" and member.size > _HEAD_BYTES:
        return inspect_header(os.pread(fd, member.size, member.offset))
    return facts


def _first_of_keys(table: pa.Table) -> tuple[pa.Table, list[str]]:
    """The first row of every key, and the keys of the others."""
    codes = pc.dictionary_encode(table["key"]).combine_chunks()
    if len(codes) == 0 or len(codes.dictionary) == len(table):
        return table, []
    is_first = np.zeros(len(table), bool)
    is_first[np.unique(codes.indices.to_numpy(), return_index=True)[1]] = True
    again = table["key"].filter(pa.array(~is_first)).to_pylist()
    table = table.filter(pa.array(is_first))
    row_id = table.schema.get_field_index("row_id")
    return table.set_column(row_id, INDEX_SCHEMA.field("row_id"), pa.array(np.arange(len(table)))), again


class _Rows:
    """A table that grows by rows of Python values."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema, self._rows = schema, list[tuple[object, ...]]()
        self._batches: list[pa.RecordBatch] = []
        self.n_rows = 0

    def add(self, *values: object) -> None:
        """Add a row, values in the order of the schema."""
        self._rows.append(values)
        self.n_rows += 1
        if len(self._rows) == _ROWS_AT_A_TIME:
            self._flush()

    def table(self) -> pa.Table:
        """All rows."""
        self._flush()
        return pa.Table.from_batches(self._batches, self._schema)

    def _flush(self) -> None:
        if self._rows:
            columns = zip(self._schema.types, zip(*self._rows, strict=True), strict=True)
            arrays = [pa.array(values, kind) for kind, values in columns]
            self._batches.append(pa.record_batch(arrays, schema=self._schema))
            self._rows = []
