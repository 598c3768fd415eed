"""``embed``: a unit vector of every selected image, float16, in the parts of the pool."""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
from pipelines.errors import UserError
from pipelines.executor import Resources
from pipelines.isolation import decoding
from pipelines.recipe import STEP
from pipelines.stage import SCRATCH, SELECTIONS, Inputs, Output, Stage, Timed
from pipelines.stages.pool import check_bad

if TYPE_CHECKING:
    from embedding.backbone import Backbone


class Model(NamedTuple):
    """What makes the vectors: a name or folder, or the artifact of a train step."""

    spec: str
    trained: Artifact | None
    pooling: str
    precision: str = "float32"
    decoder: str = "full"


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
    model = Model(config.backbone, inputs.get("backbone"), config.pooling, config.precision, config.decoder)
    embed_pool(model, pool, inputs.get("selection"), config.max_pixels, out, executor)
    counts = add_counts(file.counts for file in out.files)
    check_bad(config.max_bad_fraction, counts, out)
    return {"rows": counts["rows"], "kept": counts["kept"], "dropped": 0, "bad": counts["bad"]}


def resources_of(executor: Executor) -> Resources:
    """The speed settings of the run."""
    resources: Resources = getattr(executor, "resources", None) or Resources()
    return resources


def executor_gpus(executor: Executor) -> float:
    """GPUs of a worker with a model, as the resources of the run say."""
    return resources_of(executor).gpus


def embed_pool(
    model: Model, pool: Artifact, selection: Artifact | None, max_pixels: int, out: Output, executor: Executor
) -> None:
    """Embed the selected rows of a pool into ``out``; its facts say width and backbone."""
    images = Images(pool, selection, max_pixels, out.location)
    items = list(range(len(pool.parts)))
    names = [[part_name(i, "rejected"), part_name(i)] for i in items]
    resources = resources_of(executor)
    covered = pool if selection is None or not selection.is_complete() else selection
    sizes = [part.rows for part in covered.parts]
    out.make_by_workers(partial(make_worker, model, images, resources), items, names, resources.gpus, sizes)
    if took := out.log.get("worker_seconds"):
        out.log["images_per_worker_second"] = round(out.log["images"] / took, 2)
        out.log["share_waiting"] = round(out.log["waiting_seconds"] / took, 3)
    out.facts |= facts_of(out.location / part_name(0))


def facts_of(part: Location) -> dict[str, object]:
    """Width, dtype and backbone, as every part says them."""
    metadata = read_table(part, ["row"]).schema.metadata
    shape = json.loads(metadata[b"embedding"])
    return {**shape, "backbone": json.loads(metadata[b"backbone"])}


def load_model(model: Model, resources: Resources) -> "Backbone":
    """The backbone of a worker, on a GPU if the resources give it one."""
    from embedding.backbone import load_backbone

    load = partial(
        load_backbone,
        pooling=model.pooling,
        precision=model.precision,
        device="cuda" if resources.gpus else "cpu",
        compiled=resources.compile,
    )
    if model.trained is None:
        return load(model.spec)
    with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).write_bytes((model.trained.location / name).read())
        return load(folder)


def make_worker(model: Model, images: Images, resources: Resources) -> Callable[[int], Timed]:
    """Load the backbone once, then embed part after part. Raises UserError when a batch does not fit the GPU."""
    import torch

    from embedding.embed import BATCH_IMAGES, Waited, decoder, embed_stream

    torch.set_num_threads(1)
    backbone = load_model(model, resources)
    batch = BATCH_IMAGES if backbone.device == "cpu" else resources.batch  # on a CPU it would change bits
    decode, arguments = decoder(model.decoder, backbone, images.max_pixels)
    named = {} if model.decoder == "full" else {"decoder": model.decoder}
    identity = json.dumps({**backbone.identity, **named}, sort_keys=True).encode()

    def work(index: int) -> Timed:
        rows = selected_rows(images.pool, images.selection, index).rows
        table = read_table(images.pool.part(index)).take(pa.array(rows))
        root, image_column = source_of_part(images.pool, index)
        data = read_checked(root, table, image_column)
        vectors, good, rejected = [np.zeros((0, backbone.width), np.float16)], [np.zeros(0, np.int64)], []
        waited = Waited()
        try:
            with decoding(images.out / SCRATCH / "decoding" / part_name(index)) as call:
                for found in embed_stream(
                    backbone, data, batch=batch, threads=resources.loader_workers, waited=waited,
                    decode=lambda image: call(decode, image, *arguments),
                ):  # fmt: skip
                    vectors.append(found.embeddings.astype(np.float16))
                    good.append(found.good)
                    rejected += [
                        {"row": int(rows[i]), "source": table["source"][i].as_py(), **vars(bad)}
                        for i, bad in found.bad.items()
                    ]
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"{batch} images at a time must fit the memory of the GPU: {str(e).partition('. ')[0]}",
                f"set resources.batch below {batch}, or embed.precision: bfloat16",
            ) from e
        files = write_part(images.out, index, rows[np.concatenate(good)], np.concatenate(vectors), rejected, identity)
        return Timed(files, waited.log(len(rows)))

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
    version=3,
    config=EmbedConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
    step_or_value={"backbone": ("train",)},
    look=look,
)
