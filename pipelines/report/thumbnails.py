"""Small pictures of images of a pool, inside the page as data: a bounded number of them, whatever the pool's size."""

import base64
import io
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.artifact import Artifact, read_table
from curation.execute import Executor
from curation.listing import Root, file_at
from curation.pool import source_of_part
from curation.sources import read_images
from embedding.decode import MAX_PIXELS, BadImage, decode_rgb
from pipelines.rows import by_part

THUMB_SIDE = 96  # pixels, the longer side at most
PNG_SIDE = 48  # up to here without loss


class Thumb(NamedTuple):
    """One picture and what stands with it."""

    uri: str  # data:image/...; empty when the image could not be read
    name: str  # of the file, relative to its source
    size: str  # "640 x 480"


def make_thumbs(pool: Artifact, row_ids: Iterable[int], executor: Executor) -> dict[int, Thumb]:
    """A thumbnail of every row, by row id. Reads the parts that hold them, and nothing else."""
    wanted = np.unique(np.array(list(row_ids), np.int64))
    made: dict[int, Thumb] = {}
    for some in executor.map(partial(thumbs_of_part, pool=pool), list(by_part(wanted, pool))):
        made |= some
    return made


def thumbs_of_part(item: tuple[int, np.ndarray], pool: Artifact) -> dict[int, Thumb]:
    """Thumbnails of some rows of one part."""
    index, rows = item
    table = read_table(pool.part(index)).take(pa.array(rows))
    root, column = source_of_part(pool, index)
    made = {}
    for i, row_id in enumerate((rows + pool.starts[index]).tolist()):
        row = table.slice(i, 1)
        facts = row.to_pylist()[0]
        data = next(present(root, row, column), b"")
        name = f"{facts['source']}/{facts['member']}" if facts["member"] else facts["source"]
        made[row_id] = Thumb(encode_thumb(data), name, f"{facts['width']} x {facts['height']}")
    return made


def present(root: Root, row: pa.Table, column: str) -> Iterator[bytes]:
    """The bytes of one image, nothing if its file has gone since: a page is no reason to fail."""
    try:
        yield from read_images(root, row, column)
    except (FileNotFoundError, ValueError):
        return


def rejected_thumb(root: Root, source: str, member: str | None) -> str:
    """A thumbnail of a file that the pool refused, if it is a file of its own and shows anything."""
    if member is not None or source.lower().endswith((".tar", ".parquet")):
        return ""
    try:
        return encode_thumb(file_at(root, source).read())
    except OSError:
        return ""


def encode_thumb(data: bytes) -> str:
    """An image file as a data URI of at most ``THUMB_SIDE`` pixels; empty when it does not decode."""
    pixels = decode_rgb(data, MAX_PIXELS)
    if isinstance(pixels, BadImage):
        return ""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB_SIDE, THUMB_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= PNG_SIDE else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
