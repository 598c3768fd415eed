"""Embeddings on disk: one part file per part of the pool, ``row`` and the vector as bytes.

A vector is a ``fixed_size_binary`` cell with width and dtype in the schema metadata, which Arrow reads without a
copy and which every engine can open (several refuse a file with a float16 column).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.artifact import Artifact, Counts, FileInfo, read_table, write_table
from curation.store import Location, RangeFile

NORM_ATOL = 1e-2  # of a stored unit vector: float16 rounds it by less than a thousandth
BLOCK_ROWS = 4096  # rows meet a kernel in blocks cut at multiples of this: a constant, for the bits depend on it


def embeddings_table(rows: np.ndarray, x: np.ndarray) -> pa.Table:
    """``rows`` int (n,) ascending within the pool's part, ``x`` (n, d) float16 or float32 -> a table to write."""
    if len(rows) != len(x) or x.ndim != 2 or x.dtype not in (np.float16, np.float32):
        raise ValueError(f"embeddings must be float16 or float32 (n, d) for n rows: got {x.dtype} {x.shape}")
    cells = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(x.shape[1] * x.itemsize), len(x), [None, pa.py_buffer(np.ascontiguousarray(x))]
    )
    shape = json.dumps({"width": x.shape[1], "dtype": x.dtype.name}).encode()
    table = pa.table({"row": pa.array(rows, pa.int32()), "embedding": cells})
    return table.replace_schema_metadata({b"embedding": shape})


def write_embeddings(
    location: Location,
    rows: np.ndarray,
    x: np.ndarray,
    counts: Counts | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
) -> FileInfo:
    """Write one part, uncompressed: random bits do not shrink. ``metadata`` says for example what made the vectors."""
    table = embeddings_table(rows, x)
    table = table.replace_schema_metadata({**table.schema.metadata, **(metadata or {})})
    return write_table(location, table, counts, compress=False)


def read_embeddings(location: Location) -> tuple[np.ndarray, np.ndarray]:
    """``rows`` int32 (n,) and ``x`` (n, d) in the dtype on disk, without a copy where the file has one chunk.

    Raises ValueError when the file holds no embeddings.
    """
    table = read_table(location).combine_chunks()
    if b"embedding" not in (table.schema.metadata or {}):
        raise ValueError(f"{location} must hold embeddings: it has {', '.join(table.column_names)}")
    shape = json.loads(table.schema.metadata[b"embedding"])
    dtype = np.dtype(shape["dtype"])
    if table.num_rows == 0:
        return np.zeros(0, np.int32), np.zeros((0, shape["width"]), dtype)
    cells = table["embedding"].chunk(0)
    values = np.frombuffer(cells.buffers()[1], dtype, len(cells) * shape["width"], cells.offset * cells.type.byte_width)
    return table["row"].to_numpy(), values.reshape(len(cells), shape["width"])


def stored_form(location: Location) -> tuple[np.dtype, int]:
    """dtype and width of the vectors of a part file, from its footer alone."""
    schema = pq.read_schema(str(location.path) if location.is_local else RangeFile(location))
    shape = json.loads(schema.metadata[b"embedding"])
    return np.dtype(shape["dtype"]), int(shape["width"])


def covered_rows(location: Location) -> np.ndarray:
    """int32 (n,): the rows of the pool's part that a row-aligned part file covers, without the rest of it."""
    rows: np.ndarray = read_table(location, ["row"])["row"].to_numpy()
    return rows


def row_norms(x: np.ndarray) -> np.ndarray:
    """float32 (n,): the norms of rows float32 (n, d), which a block of a part is divided by to have unit rows."""
    norms: np.ndarray = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64)).astype(np.float32)
    return norms


def stored_norms(x: np.ndarray) -> np.ndarray:
    """float32 (n,): the norms of a part's rows as they are stored, (n, d), those that ``EmbeddingsPart`` divides by."""
    blocks = (x[start : start + BLOCK_ROWS] for start in range(0, len(x) or 1, BLOCK_ROWS))
    return np.concatenate([row_norms(block.astype(np.float32)) for block in blocks])


@dataclass(frozen=True)
class EmbeddingsPart:
    """A part as the kernels see it: float32 blocks, at most one part in memory at a time.

    With ``unit`` every row is scaled to norm 1 in float32, which takes back the rounding to float16, so a cosine
    is a cosine; zeros, NaN and vectors of another length raise ValueError with the file and the row. ``first`` is the
    position of the first covered row among all covered rows of the artifact.
    """

    location: Location
    n_rows: int
    first: int
    unit: bool = True

    def blocks(self) -> Iterator[np.ndarray]:
        """float32 (<= BLOCK_ROWS, d), cut at fixed offsets of the part."""
        x = read_embeddings(self.location)[1]
        for start in range(0, len(x), BLOCK_ROWS):
            yield self._scaled(x[start : start + BLOCK_ROWS], start)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """``rows`` int32 (n,) within the pool's part and ``x`` float32 (n, d), all of it."""
        rows, x = read_embeddings(self.location)
        blocks = [self._scaled(x[start : start + BLOCK_ROWS], start) for start in range(0, len(x), BLOCK_ROWS)]
        return rows, np.concatenate(blocks) if blocks else x.astype(np.float32)

    def _scaled(self, x: np.ndarray, start: int) -> np.ndarray:
        x = x.astype(np.float32)
        if not self.unit:
            return x
        norms = row_norms(x)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_ATOL))  # not <=, so that NaN is bad too
        if len(bad):
            raise ValueError(
                f"{self.location} must hold unit vectors: row {start + bad[0]} of it has norm {norms[bad[0]]:.4g}"
            )
        scaled: np.ndarray = x / norms[:, None]
        return scaled


def embedding_parts(artifact: Artifact) -> list[EmbeddingsPart]:
    """The parts of an embeddings artifact, in order, empty ones too."""
    starts = artifact.starts
    return [EmbeddingsPart(artifact.part(i), part.rows, int(starts[i])) for i, part in enumerate(artifact.parts)]
