"""``train``: a vision encoder from shards. The trainer itself knows nothing of recipes."""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, describe, part_name, write_table
from curation.execute import Executor
from curation.listing import Root, root_of
from curation.store import Entry, Location, file_sha256
from pipelines.errors import UserError
from pipelines.recipe import STEP
from pipelines.stage import Inputs, Output, Stage
from pipelines.stages.begin import check_model, check_step
from pipelines.stages.embed import MODEL_HINT, resources_of
from pipelines.stages.index import unchanged_shards
from training.config import TrainConfig, TrainResources

if TYPE_CHECKING:
    from training.trainer import TrainResult

POLL_S = 1.0  # between looks at how far the trainer is
PROGRESS, SAID = "progress", "said"  # in scratch: how far it is, and the sentences it has for people
NAMES = ("config.json", "model.safetensors", part_name(0))
FACTS = "facts"  # in scratch: what the trainer says of the run beside its counts
LISTED = 1000  # bad samples that facts name


def look(config: TrainConfig) -> tuple[Sequence[Entry] | None, None]:
    """The weights to begin with that no step of the recipe made: name, size and sha256 of their files."""
    if config.init in (None, STEP):
        return None, None
    from embedding.backbone import weight_files

    try:
        files = weight_files(config.init)
        check_model(config)
    except ValueError as e:
        raise UserError(str(e), MODEL_HINT) from e
    return [Entry(path.name, path.stat().st_size, file_sha256(path)) for path in files], None


def run(config: TrainConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write the teacher's backbone, and the metrics of every step as ``part-0000000.parquet``."""
    job, resources = train_job(config, inputs, out.location, executor), resources_of(executor)
    gpus = resources.gpus and max(resources.gpus, resources.train_processes)
    with shown(out.location, getattr(executor, "progress", None)):
        out.make_by_workers(partial(make_trainer, job), [None], [NAMES], gpus)
    facts = out.scratch(FACTS)
    out.facts |= json.loads(facts.read()) if facts.exists() else {}
    return next(file.counts for file in out.files if file.name == NAMES[-1])


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a worker needs to train."""

    config: TrainConfig
    shards: Location
    out: Location
    speed: TrainResources
    n_processes: int
    init: Artifact | None
    root: Root | None  # where the tars of others are now
    noted: list[float] = field(default_factory=lambda: [0.0])  # when it was last noted how far the trainer is
    said: list[str] = field(default_factory=list)  # sentences for people, by this process

    def train(self) -> "TrainResult":
        """Train in this process, which may be one of several. Raises what ``training.trainer.train`` raises."""
        from training.trainer import train

        if self.init is None:
            return train(self.config, self.shards, self.out, self.speed, self.tell, root=self.root, say=self.say)
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            for name in NAMES[:2]:
                (Path(folder) / name).write_bytes((self.init.location / name).read())
            return train(self.config, self.shards, self.out, self.speed, self.tell, folder, self.root, self.say)

    def tell(self, step: int, n_steps: int, message: str) -> None:
        """Note how far the trainer is, every few seconds."""
        now = time.monotonic()
        if now - self.noted[0] > POLL_S or step == n_steps:
            self.noted[0] = now
            with suppress(OSError):  # it is for the eye alone
                (self.out / "scratch" / PROGRESS).write(json.dumps([step, n_steps, message]).encode())

    def say(self, text: str) -> None:
        """Note a sentence for people."""
        self.said.append(text)
        with suppress(OSError):
            (self.out / "scratch" / SAID).write(json.dumps(self.said).encode())


def train_job(config: TrainConfig, inputs: Inputs, out: Location, executor: Executor) -> TrainJob:
    """A training as the inputs of the step and the resources of the run say."""
    shards: Artifact = inputs["shards"]
    resources = resources_of(executor)
    return TrainJob(
        config=config,
        shards=shards.location,
        out=out,
        speed=TrainResources(
            device="cuda" if resources.gpus else "cpu",
            n_workers=resources.loader_workers,
            checkpoint_every=resources.checkpoint_every,
            micro_batch=resources.micro_batch,
            crops_on=resources.crops_on,
            compile=resources.compile and resources.gpus > 0,
        ),
        n_processes=resources.train_processes,
        init=inputs.get("init"),
        root=root_of(shards.outside("source")) if shards.stage == "index" else None,
    )


def make_trainer(job: TrainJob) -> Callable[[None], list[FileInfo]]:
    """A worker that trains from the newest checkpoint on."""
    from embedding.backbone import save_vit
    from embedding.preprocess import Preprocess
    from training.launch import in_processes

    config, out = job.config, job.out
    preprocess = Preprocess(
        size=config.image_size, keep_aspect=False, crop=None, mean=config.augment.mean, std=config.augment.std
    )

    def work(_: None) -> list[FileInfo]:
        with unchanged_shards():
            result = in_processes(job.n_processes, job.train) if job.n_processes > 1 else job.train()
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            save_vit(folder, result.backbone, preprocess)
            for name in NAMES[:2]:
                (out / name).write((Path(folder) / name).read_bytes())
        (out / "scratch" / FACTS).write(json.dumps(facts_of(result)).encode())
        skipped = len(result.skipped)
        counts = {"rows": config.n_steps * config.batch, "kept": (config.n_steps - skipped) * config.batch,
                  "dropped": skipped * config.batch, "bad": 0,
                  "skipped_steps": skipped, "replaced_samples": len(result.bad_samples)}  # fmt: skip
        table = pa.table({"step": pa.array(range(config.n_steps), pa.int64()), **result.metrics})
        return [describe(out / NAMES[0]), describe(out / NAMES[1]), write_table(out / NAMES[2], table, counts)]

    return work


def facts_of(result: "TrainResult") -> dict[str, Any]:
    """What the page says of a training beside its curves: nothing that depends on time or workers."""
    return {
        "step": result.step,
        "alarms": dict(sorted(result.alarms.items())),
        "skipped": [{"step": skipped.step, "keys": skipped.keys} for skipped in result.skipped],
        "replaced": dict(sorted(result.bad_samples.items())[:LISTED]),
    }


@contextmanager
def shown(out: Location, progress: Callable[[int, int, str, str], None] | None) -> Iterator[None]:
    """Pass on how far the trainer is and what it says, which it notes in files, for it may run on another machine."""
    stop, n_told = threading.Event(), 0
    for name in (PROGRESS, SAID):
        (out / "scratch" / name).delete()  # of the run before

    def look() -> None:
        nonlocal n_told
        with suppress(FileNotFoundError):
            for text in json.loads((out / "scratch" / SAID).read())[n_told:]:
                n_told += 1
                print(text, file=sys.stderr, flush=True)
        with suppress(FileNotFoundError):
            step, n_steps, message = json.loads((out / "scratch" / PROGRESS).read())
            if progress is not None:
                progress(step, n_steps, "steps", message)

    def poll() -> None:
        while not stop.wait(POLL_S):
            look()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


STAGE = Stage(
    version=4,
    config=TrainConfig,
    run=run,
    reads={"shards": ("shards",)},
    step_or_value={"init": ("train",)},
    check=check_step,
    has_presets=True,
    look=look,
)
