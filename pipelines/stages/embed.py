"""``embed``: a unit vector of every selected image, float16, in the parts of the pool."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from embedding.config import MODEL_FREE, EmbedConfig
from embedding.isolate import Call, Processes
from pipelines.errors import UserError
from pipelines.executor import Resources
from pipelines.isolation import decoding
from pipelines.recipe import STEP
from pipelines.rows import unchanged_images
from pipelines.stage import SCRATCH, SELECTIONS, Inputs, Output, Rows, Stage, Timed
from pipelines.stages.pool import check_bad

if TYPE_CHECKING:
    from embedding.decode import BadImage
    from embedding.embed import Embedded, Prepare, Waited
    from embedding.network import Backbone

MODEL_HINT = "a model is a folder as its makers published it, with its config, preprocessing and *.safetensors, or the \
name of one on the Hugging Face hub"
MOST_THREADS = 2  # that decode in the process of a network; more are processes, see ``embedding.isolate``


class Model(NamedTuple):
    """What makes the vectors: a name or folder, or the artifact of a train step."""

    spec: str
    trained: Artifact | None
    pooling: str
    precision: str = "float32"
    decoder: str = "full"


class Embedder(NamedTuple):
    """A loaded backbone, and how files become its vectors."""

    backbone: "Backbone"
    identity: bytes  # of backbone and decoder, as parts of embeddings say it
    prepare: "Prepare"
    batch: int  # files a forward
    threads: int  # that read and decode ahead
    apart: Processes | None  # in place of threads that decode

    @contextmanager
    def decoding(self, note: Location) -> Iterator[Call]:
        """What calls decoders while the part of this note is in work, see ``pipelines.isolation``.

        Raises UserError for a batch that does not fit the GPU.
        """
        with unchanged_images(), decoding(note, self.apart) as call, fits_gpu(self.batch):
            yield call

    def vectors(
        self, files: Iterable[bytes], call: Call, waited: "Waited | None" = None
    ) -> "tuple[np.ndarray, np.ndarray, dict[int, BadImage]]":
        """``as_stored`` of files that come one after the other, decoded through ``call``."""
        from embedding.embed import embed_stream

        found = embed_stream(
            self.backbone,
            files,
            batch=self.batch,
            threads=self.threads,
            waited=waited,
            prepare=lambda file: call(self.prepare, file),
        )
        return as_stored(found, self.backbone.width)


class Images(NamedTuple):
    """Where a worker finds the images of a part."""

    pool: Artifact
    selection: Artifact | None
    max_pixels: int
    out: Location


def look(config: EmbedConfig) -> tuple[Sequence[Entry] | None, None]:
    """The weights of a model that no step of the recipe made: name, size and sha256 of its files."""
    if config.backbone in (*MODEL_FREE, STEP):
        return None, None
    from embedding.backbone import weight_files

    try:
        files = weight_files(config.backbone)
    except ValueError as e:
        raise UserError(str(e), MODEL_HINT) from e
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
    make = partial(make_worker, model, images, resources)
    tell = in_words if model.spec not in MODEL_FREE else lambda log: ""  # which waits for nothing else
    out.make_by_workers(make, items, names, resources.gpus, Rows("images", sizes, tell))
    out.log |= rates(out.log)
    for sums in ("flops", "flops_in_reach"):
        out.log.pop(sums, None)
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


def load_embedder(model: Model, max_pixels: int, resources: Resources) -> Embedder:
    """What a worker embeds with, loaded once. Raises UserError for a model that cannot be loaded."""
    import torch

    from embedding.embed import BATCH_IMAGES, preparation

    torch.set_num_threads(1)
    try:
        backbone = load_model(model, resources)
    except ValueError as e:
        raise UserError(str(e), MODEL_HINT) from e
    named = {} if model.decoder == "full" else {"decoder": model.decoder}
    threads = resources.loader_workers
    return Embedder(
        backbone,
        identity=json.dumps({**backbone.identity, **named}, sort_keys=True).encode(),
        prepare=preparation(model.decoder, backbone, max_pixels),
        batch=BATCH_IMAGES if backbone.device == "cpu" else resources.batch,  # on a CPU it would change bits
        threads=threads,
        apart=Processes(threads) if threads > MOST_THREADS else None,
    )


def make_worker(model: Model, images: Images, resources: Resources) -> Callable[[int], Timed]:
    """Load the backbone once, then embed part after part. Raises UserError when a batch does not fit the GPU."""
    from embedding.embed import Waited

    embedder = load_embedder(model, images.max_pixels, resources)
    peak = peak_of(embedder.backbone)

    def work(index: int) -> Timed:
        rows = selected_rows(images.pool, images.selection, index).rows
        table = read_table(images.pool.part(index)).take(pa.array(rows))
        root, image_column = source_of_part(images.pool, index)
        data = read_checked(root, table, image_column)
        waited = Waited()
        note = images.out / SCRATCH / "decoding" / part_name(index)
        with embedder.decoding(note) as call:
            good, x, bad = embedder.vectors(data, call, waited)
        rejected = [{"row": int(rows[i]), "source": table["source"][i].as_py(), **vars(why)} for i, why in bad.items()]
        files = write_part(images.out, index, rows[good], x, rejected, embedder.identity)
        return Timed(files, waited.log(len(rows)) | used(embedder.backbone, len(good), peak * waited.total))

    return work


def as_stored(found: "Iterable[Embedded]", width: int) -> "tuple[np.ndarray, np.ndarray, dict[int, BadImage]]":
    """The batches of a part: which images are good, their vectors as float16, and the others."""
    good, x = [np.zeros(0, np.int64)], [np.zeros((0, width), np.float16)]
    bad: dict[int, BadImage] = {}
    for batch in found:
        good.append(batch.good)
        x.append(batch.embeddings.astype(np.float16))
        bad |= batch.bad
    return np.concatenate(good), np.concatenate(x), bad


@contextmanager
def fits_gpu(batch: int) -> Iterator[None]:
    """Raise UserError for a batch that the memory of a GPU does not hold."""
    import torch

    from embedding.network import too_large

    try:
        yield
    except torch.OutOfMemoryError as e:
        hint = f"set resources.batch below {batch}, or embed.precision: bfloat16"
        raise UserError(too_large(batch, e), hint) from e


def peak_of(backbone: "Backbone") -> float:
    """The measured FLOP/s of the GPU of a backbone; 0 on a CPU, and for one whose FLOPs are not known."""
    from embedding.flops import matmul_rate

    return matmul_rate(backbone.device) if backbone.device != "cpu" and backbone.flops else 0.0


def used(backbone: "Backbone", n: int, in_reach: float) -> dict[str, float]:
    """FLOPs that n images took and that the GPU would have had time for; nothing when that is not known."""
    return {"flops": float(n * backbone.flops), "flops_in_reach": in_reach} if backbone.flops and in_reach else {}


def rates(log: Mapping[str, float]) -> dict[str, float]:
    """What the sums over parts say of a worker: images/s, and the share of its time in which its network had none.

    On a GPU also ``mfu``, the share of its peak that the network's products make up, and that peak in TFLOP/s: of
    bfloat16 products, measured when the worker starts.
    """
    took = log.get("worker_seconds")
    if not took:
        return {}
    told = {"images_per_worker_second": log["images"] / took, "share_waiting": log["waiting_seconds"] / took}
    if in_reach := log.get("flops_in_reach"):
        told |= {"mfu": log["flops"] / in_reach, "measured_peak_tflops": in_reach / took / 1e12}
    return told


def in_words(log: Mapping[str, float]) -> str:
    """The shares of ``rates`` for people."""
    told = rates(log)
    words = {"share_waiting": "waiting for images", "mfu": "of the GPU's measured peak"}
    return ", ".join(f"{told[name]:.0%} {text}" for name, text in words.items() if name in told)


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
