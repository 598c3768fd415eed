"""``train``: a vision encoder from shards. The trainer itself knows nothing of recipes."""

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, describe, part_name, write_table
from curation.execute import Executor
from curation.store import Location
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.embed import executor_gpus
from training.config import TrainConfig, TrainResources

POLL_S = 1.0  # between looks at how far the trainer is
NAMES = ("config.json", "model.safetensors", part_name(0))


def run(config: TrainConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the teacher's backbone, and the metrics of every step as ``part-0000000.parquet``."""
    shards: Artifact = inputs["shards"]
    gpus = executor_gpus(executor)
    resources = getattr(executor, "resources", None)
    speed = TrainResources(
        device="cuda" if gpus else "cpu",
        n_workers=getattr(resources, "loader_workers", 0),
        checkpoint_every=getattr(resources, "checkpoint_every", 1000),
    )
    make = partial(make_trainer, config, shards.location, out.location, speed)
    with shown(out.scratch("progress"), getattr(executor, "progress", None)):
        out.make_by_workers(make, [None], [NAMES], gpus)
    return next(file.counts for file in out.files if file.name == NAMES[-1])


def make_trainer(
    config: TrainConfig, shards: Location, out: Location, speed: TrainResources
) -> Callable[[None], list[FileInfo]]:
    """A worker that trains from the newest checkpoint on."""
    from embedding.backbone import save_vit
    from embedding.preprocess import Preprocess
    from training.trainer import train

    def tell(step: int, n_steps: int, message: str) -> None:
        if step % 10 == 0 or step == n_steps:
            (out / "scratch" / "progress").write(json.dumps([step, n_steps, message]).encode())

    preprocess = Preprocess(
        size=config.image_size, keep_aspect=False, crop=None, mean=config.augment.mean, std=config.augment.std
    )

    def work(_: None) -> list[FileInfo]:
        result = train(config, shards, out, speed, tell)
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            save_vit(folder, result.backbone, preprocess)
            for name in NAMES[:2]:
                (out / name).write((Path(folder) / name).read_bytes())
        skipped = len(result.skipped)
        counts = {"rows": config.n_steps * config.batch, "kept": (config.n_steps - skipped) * config.batch,
                  "dropped": skipped * config.batch, "bad": 0,
                  "skipped_steps": skipped, "replaced_samples": len(result.bad_samples)}  # fmt: skip
        table = pa.table({"step": pa.array(range(config.n_steps), pa.int64()), **result.metrics})
        return [describe(out / NAMES[0]), describe(out / NAMES[1]), write_table(out / NAMES[2], table, counts)]

    return work


@contextmanager
def shown(noted: Location, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Pass on how far the trainer is, which it notes in a file, for it may run on another machine."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLL_S):
            try:
                step, n_steps, _ = json.loads(noted.read())
            except FileNotFoundError:
                continue
            if progress is not None:
                progress(step, n_steps)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


STAGE = Stage(version=3, config=TrainConfig, run=run, reads={"shards": ("shards",)})
