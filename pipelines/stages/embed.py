"""``embed``: a unit vector of every selected image, float16, in the parts of the pool."""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.embeddings import write_embeddings
from curation.execute import Executor
from curation.pool import source_of_part
from curation.selection import selected_rows
from curation.sources import read_checked
from curation.store import Entry, Location, file_sha256
from embedding.config import EmbedConfig
from pipelines.recipe import STEP
from pipelines.stage import SELECTIONS, Inputs, Output, Stage
from pipelines.stages.pool import check_bad

CHUNK = 256  # images whose bytes are in memory at a time: a multiple of embedding.embed.BATCH_IMAGES


class Model(NamedTuple):
    """What makes the vectors: a name or folder, or the artifact of a train step."""

    spec: str
    trained: Artifact | None
    pooling: str
    device: str


class Images(NamedTuple):
    """Where a worker finds the images of a part."""

    pool: Artifact
    selection: Artifact | None
    max_pixels: int
    out: Location


def look(config: EmbedConfig) -> tuple[Sequence[Entry] | None, None]:
    """The weights of a model that no step of the recipe made: name, size and sha256 of its files."""
    if config.backbone in ("pixels", STEP):
        return None, None
    from embedding.backbone import weight_files

    files = weight_files(config.backbone)
    if not files:
        raise FileNotFoundError(f"no model {config.backbone}")
    return [Entry(path.name, path.stat().st_size, file_sha256(path)) for path in files], None


def run(config: EmbedConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``part-*`` (row and vector) and ``rejected-*`` (rows that no longer decode)."""
    pool: Artifact = inputs["pool"]
    gpus = executor_gpus(executor)
    model = Model(config.backbone, inputs.get("backbone"), config.pooling, "cuda" if gpus else "cpu")
    embed_pool(model, pool, inputs.get("selection"), config.max_pixels, out, executor)
    counts = add_counts(file.counts for file in out.files)
    check_bad(config.max_bad_fraction, counts, out)
    return {"rows": counts["rows"], "kept": counts["kept"], "dropped": 0, "bad": counts["bad"]}


def executor_gpus(executor: Executor) -> float:
    """GPUs of a worker with a model, as the resources of the run say."""
    return float(getattr(getattr(executor, "resources", None), "gpus", 0))


def embed_pool(
    model: Model, pool: Artifact, selection: Artifact | None, max_pixels: int, out: Output, executor: Executor
) -> None:
    """Embed the selected rows of a pool into ``out``; its facts say width and backbone."""
    images = Images(pool, selection, max_pixels, out.location)
    items = list(range(len(pool.parts)))
    names = [[part_name(i, "rejected"), part_name(i)] for i in items]
    out.make_by_workers(partial(make_worker, model, images), items, names, executor_gpus(executor))
    out.facts |= facts_of(out.location / part_name(0))


def facts_of(part: Location) -> dict[str, object]:
    """Width, dtype and backbone, as every part says them."""
    metadata = read_table(part, ["row"]).schema.metadata
    shape = json.loads(metadata[b"embedding"])
    return {**shape, "backbone": json.loads(metadata[b"backbone"])}


def make_worker(model: Model, images: Images) -> Callable[[int], list[FileInfo]]:
    """Load the backbone once, then embed part after part."""
    import torch

    from embedding.backbone import load_backbone
    from embedding.embed import embed_images

    torch.set_num_threads(1)
    if model.trained is None:
        backbone = load_backbone(model.spec, pooling=model.pooling, device=model.device)
    else:
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            for name in ("config.json", "model.safetensors"):
                (Path(folder) / name).write_bytes((model.trained.location / name).read())
            backbone = load_backbone(folder, pooling=model.pooling, device=model.device)
    identity = json.dumps(backbone.identity, sort_keys=True).encode()

    def work(index: int) -> list[FileInfo]:
        rows = selected_rows(images.pool, images.selection, index).rows
        table = read_table(images.pool.part(index)).take(pa.array(rows))
        root, image_column = source_of_part(images.pool, index)
        data = read_checked(root, table, image_column)
        vectors, good, rejected = [np.zeros((0, backbone.width), np.float16)], [np.zeros(0, np.int64)], []
        start = 0
        while chunk := list(islice(data, CHUNK)):
            result = embed_images(backbone, chunk, images.max_pixels)
            vectors.append(result.embeddings.astype(np.float16))
            good.append(result.good + start)
            for i, bad in result.bad.items():
                source = table["source"][start + i].as_py()
                rejected.append({"row": int(rows[start + i]), "source": source, **vars(bad)})
            start += len(chunk)
        return write_part(images.out, index, rows[np.concatenate(good)], np.concatenate(vectors), rejected, identity)

    return work


def write_part(
    out: Location, index: int, rows: np.ndarray, x: np.ndarray, rejected: list[dict[str, object]], identity: bytes
) -> list[FileInfo]:
    """The rejected rows, then the vectors."""
    schema = pa.schema({"row": pa.int32(), "source": pa.string(), "reason": pa.string(), "detail": pa.string()})
    bad = write_table(out / part_name(index, "rejected"), pa.Table.from_pylist(rejected, schema))
    counts = {"rows": len(rows) + len(rejected), "kept": len(rows), "bad": len(rejected)}
    return [bad, write_embeddings(out / part_name(index), rows, x, counts, {b"backbone": identity})]


STAGE = Stage(
    version=2,
    config=EmbedConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
    step_or_value={"backbone": ("train",)},
    look=look,
)
