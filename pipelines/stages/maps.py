"""What ``evaluate`` shows of patch tokens, for the report: pictures of a few queries.

    maps.parquet   row_id (int64, position in the pool of queries), label, side (pixels of the network's input), grid
                   (patches along it), and as PNG files of 224 x 224 pixels: image, as the network sees it; components
                   (embedding.maps.pca_rgb); attention (embedding.maps.heat_rgb), null where the network shows none

There is none of a backbone without a network, and it has no rows when the network shows no patches.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.artifact import Artifact, FileInfo, read_table, write_table
from curation.embeddings import EmbeddingsPart, covered_rows
from curation.execute import Executor
from curation.pool import source_of_part
from curation.sources import read_checked
from curation.store import Location
from embedding.config import MODEL_FREE
from embedding.decode import MAX_PIXELS, BadImage, decode_rgb
from pipelines.executor import Resources
from pipelines.rows import by_part, unchanged_images
from pipelines.stage import Output
from pipelines.stages.embed import Model, load_model, resources_of

MAPS = "maps.parquet"
N_IMAGES = 8
SIDE = 224  # pixels of a picture
SCHEMA = pa.schema(
    {"row_id": pa.int64(), "label": pa.string(), "side": pa.int32(), "grid": pa.int32(),
     "image": pa.binary(), "components": pa.binary(), "attention": pa.binary()}
)  # fmt: skip


class First(NamedTuple):
    """The first queries of some parts, as positions in their pool; at most ``N_IMAGES`` of each kind."""

    by_label: dict[str, int]  # the first with each label, in order
    any: list[int]


class Picture(NamedTuple):
    """A query that is shown."""

    row_id: int
    label: str | None
    pixels: np.ndarray  # uint8 (h, w, 3)


def write_maps(
    model: Model, queries: Artifact, asked: Sequence[EmbeddingsPart], out: Output, executor: Executor
) -> None:
    """Have ``maps.parquet`` written, by a worker with the model. asked: the embedded queries, part by part."""
    if model.spec in MODEL_FREE:
        return
    first = executor.reduce(partial(first_of_part, queries=queries), list(enumerate(asked)), earlier).get()
    resources = replace(resources_of(executor), compile=False)  # for so few images it takes longer, and hides q and k
    make = partial(make_drawer, model, resources, queries, out.location)
    out.make_by_workers(make, [tuple(shown(first))], [[MAPS]], resources.gpus)


def first_of_part(item: tuple[int, EmbeddingsPart], queries: Artifact) -> First:
    """The first queries of one part."""
    index, part = item
    rows = covered_rows(part.location)
    labels = read_table(queries.part(index), ["label"])["label"].take(pa.array(rows)).combine_chunks()
    row_ids = rows + queries.starts[index]
    names = labels.drop_null().unique()[:N_IMAGES]
    by_label = {name.as_py(): int(row_ids[labels.index(name).as_py()]) for name in names}
    return First(by_label, row_ids[:N_IMAGES].tolist())


def earlier(a: First, b: First) -> First:
    """The first queries of two runs of parts, ``a`` before ``b``."""
    by_label = list({**b.by_label, **a.by_label}.items())
    return First(dict(sorted(by_label, key=lambda pair: pair[1])[:N_IMAGES]), (a.any + b.any)[:N_IMAGES])


def shown(first: First) -> list[int]:
    """The first query of each label, filled up with the first ones of any; ascending."""
    chosen = list(first.by_label.values())
    return sorted(chosen + [row_id for row_id in first.any if row_id not in chosen][: N_IMAGES - len(chosen)])


def make_drawer(
    model: Model, resources: Resources, queries: Artifact, out: Location
) -> Callable[[tuple[int, ...]], FileInfo]:
    """Load the backbone, then draw."""
    import torch

    from embedding.maps import patch_maps

    torch.set_num_threads(1)
    backbone = load_model(model, resources)

    def draw(row_ids: tuple[int, ...]) -> FileInfo:
        pictures = read_pictures(np.array(row_ids, np.int64), queries)
        found = patch_maps(backbone, [picture.pixels for picture in pictures])
        rows = [] if found is None else drawn_rows(pictures, found.pixels, found.patches, found.attention)
        return write_table(out / MAPS, pa.Table.from_pylist(rows, SCHEMA))

    return draw


def read_pictures(row_ids: np.ndarray, queries: Artifact) -> list[Picture]:
    """Some queries, ascending; they decoded a moment ago, so one that no longer does is passed over."""
    found = []
    for index, rows in by_part(row_ids, queries):
        table = read_table(queries.part(index)).take(pa.array(rows))
        root, image_column = source_of_part(queries, index)
        labels = table["label"].to_pylist()
        with unchanged_images():
            files = list(read_checked(root, table, image_column))
        for row, label, data in zip(rows, labels, files, strict=True):
            pixels = decode_rgb(data, MAX_PIXELS)
            if not isinstance(pixels, BadImage):
                found.append(Picture(int(row + queries.starts[index]), label, pixels))
    return found


def drawn_rows(
    pictures: Sequence[Picture], pixels: np.ndarray, patches: np.ndarray, attention: np.ndarray | None
) -> list[dict[str, object]]:
    """The rows of ``maps.parquet``."""
    from embedding.maps import heat_rgb, pca_rgb

    components = pca_rgb(patches)
    heat = None if attention is None else heat_rgb(attention)
    return [
        {"row_id": picture.row_id, "label": picture.label, "side": pixels.shape[1], "grid": patches.shape[1],
         "image": as_png(pixels[i], Image.Resampling.BICUBIC), "components": as_png(components[i]),
         "attention": None if heat is None else as_png(heat[i])}
        for i, picture in enumerate(pictures)
    ]  # fmt: skip


def as_png(pixels: np.ndarray, resample: Image.Resampling = Image.Resampling.NEAREST) -> bytes:
    """uint8 (h, w, 3) as a PNG file of ``SIDE`` x ``SIDE`` pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE), resample).save(buffer, "PNG")
    return buffer.getvalue()
