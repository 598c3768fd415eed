"""From shards to a backbone: the loop around ``train_step``; a kill at any moment leaves no trace in the result."""

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curation.listing import Root
from curation.mix import read_mix
from curation.store import Location
from embedding.flops import matmul_rate
from embedding.vit import ViT
from training.augment_torch import batched_crops
from training.begin import begin_with
from training.checkpoint import (
    History,
    Run,
    SkippedStep,
    best_accuracy,
    load_best,
    restore_newest,
    save_best,
    save_checkpoint,
)
from training.config import TrainConfig, TrainResources
from training.knn import LabelledImages
from training.loader import Batch, LoaderPlan, batches
from training.log import Log
from training.monitor import alarms, doubts
from training.stream import list_shards, shard_totals
from training.throughput import Timing, train_flops
from training.train_step import StepMetrics, StepSettings, TrainState, pieces, train_step
from training.world import World, joined

__all__ = ["Timing", "TrainConfig", "TrainDiverged", "TrainResources", "TrainResult", "train"]

Progress = Callable[[int, int, str], None]  # step, n_steps, message
Say = Callable[[str], None]  # a sentence for people, once
CHECKPOINT_SECONDS = 300.0  # between checkpoints at most, where there are any: what a kill may cost
LOG = "log"  # the folder of metrics.jsonl and TensorBoard's event files, beside the result


class TrainDiverged(RuntimeError):
    """Loss or gradients were not finite for too many steps in a row."""


@dataclass
class TrainResult:
    """The teacher's backbone and what the run measured."""

    backbone: ViT  # on the CPU, in eval mode
    step: int  # after which the backbone was so
    metrics: dict[str, np.ndarray]  # float64 (n_steps,): the fields of StepMetrics, replaced samples, knn_accuracy
    skipped: list[SkippedStep]
    bad_samples: dict[str, str]  # key to reason, of images that did not decode and were replaced
    alarms: dict[str, str] = field(default_factory=dict)  # what was odd, by kind: "doubt 1", or of ``monitor.alarms``
    timing: Timing = field(default_factory=Timing)


def train(
    config: TrainConfig,
    shards: Location,
    out: Location,
    resources: TrainResources | None = None,
    progress: Progress | None = None,
    weights: str | None = None,
    root: Root | None = None,
    say: Say | None = None,
) -> TrainResult:
    """Train on a shard set, going on from the newest checkpoint under ``out / "scratch"``.

    progress is told every step, say what is odd: doubts at the start, an alarm when its kind is first seen; and where
    the run goes on. weights: where those that ``config.init`` names are; None: just there. root: where tars of others
    are, see ``training.stream.locate_tar``.

    Alone, or with the other processes that ``torchrun`` or ``training.launch`` started: each has its share of every
    batch, and the first one writes. On a CPU the result is the same bytes for any number of loader workers and any
    kills. Sets torch's number of threads for the process. Raises TrainDiverged, WorkerDied, CheckpointFailed,
    FileNotFoundError for shards that are not there, and ValueError for a checkpoint of another run, or weights to begin
    with of another shape. With ``n_steps`` 0 the shards are not read.
    """
    resources = resources or TrainResources()
    torch.set_num_threads(resources.threads)
    with joined(resources.device) as world:
        state = _begin(config, resources, world, weights or config.init)
        history, timing = History.empty(config.n_steps), Timing()
        step = config.n_steps
        if config.n_steps:
            plan = _plan(config, shards, world, resources.crops_on, root)
            run = Run(config, _digest(shards, plan), out / "scratch", state, history)
            job = _Job(run, plan, resources, timing, out / LOG, progress, say or _silent)
            _run_steps(job)
            world.wait()  # until the first process has written what all may read
        backbone = state.teacher.backbone.cpu().eval()
        if config.result == "best" and config.n_steps:
            step = load_best(out / "scratch", backbone)
        return TrainResult(
            backbone, step, history.metrics, history.skipped, history.bad_samples, history.alarms, timing
        )


def _begin(config: TrainConfig, resources: TrainResources, world: World, weights: str | None) -> TrainState:
    """The state before the first step."""
    device = torch.device(resources.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in float32
    state = TrainState(config, device, world)
    pieces(state.n_images, resources.micro_batch, config)  # raises now rather than at the first step
    if config.init is not None and weights is not None:
        begin_with(state.student.backbone, weights, config.image_size)
        state.teacher.backbone.load_state_dict(state.student.backbone.state_dict())
    if resources.compile:
        for block in (*state.student.backbone.blocks, *state.teacher.backbone.blocks):
            block.compile()
    return state


@dataclass
class _Job:
    """A run with all that watches it; of several processes the first alone has ``progress`` and writes."""

    run: Run
    plan: LoaderPlan
    resources: TrainResources
    timing: Timing
    log: Location
    progress: Progress | None
    say: Say

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.run.state.world.rank == 0


def _run_steps(job: _Job) -> None:
    """All steps that are left; the run is changed in place."""
    run, config, resources, world = job.run, job.run.config, job.resources, job.run.state.world
    if job.leads:
        run.folder.sweep()
    world.wait()
    start = job.timing.resumed_at = restore_newest(run)
    if len(set(starts := world.gather(start))) > 1:
        raise ValueError(
            f"all processes must go on from one checkpoint: got steps {starts} in {run.folder}; the output must be a "
            "place that all machines see"
        )
    if start and job.leads:
        job.say(f"goes on after step {start} of {config.n_steps}")
    _alarm(job, {f"doubt {i}": text for i, text in enumerate(doubts(config, int(job.plan.totals.sum())), 1)})
    images = LabelledImages(job.plan.shards, config, job.plan.root) if config.knn_every and job.leads else None
    settings, n_steps, saved = schedule(config), config.n_steps, time.monotonic()
    with ExitStack() as stack:
        reporter = stack.enter_context(_reporting(job, start)) if job.leads else None
        stream = _timed(batches(job.plan, start, n_steps, resources.n_workers, resources.prefetch), job)
        stack.callback(stream.close)  # ends the workers, whatever happened
        for batch in stream:
            metrics = _one_step(job, batch, settings[batch.step])
            done = batch.step + 1
            if images is not None and (done % config.knn_every == 0 or done == n_steps):
                _measure(job, images, batch.step)
            if reporter is not None:
                reporter.tell(batch.step, metrics)
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                if resources.checkpoint_every and (late or done % resources.checkpoint_every == 0):
                    save_checkpoint(run, done, resources.keep_checkpoints)
                    saved = time.monotonic()
                    reporter.log.flush()


def schedule(config: TrainConfig) -> list[StepSettings]:
    """The settings of every step."""
    columns = (config.lr_schedule(), config.temperature_schedule(), config.momentum_schedule(),
               config.weight_decay_schedule())  # fmt: skip
    lrs, temperatures, momenta, decays = (column.tolist() for column in columns)
    frozen, still = config.freeze_last_layer_steps, config.init_frozen_steps
    return [
        StepSettings(i, lrs[i], temperatures[i], momenta[i], decays[i], i < frozen, i < still)
        for i in range(config.n_steps)
    ]


def _one_step(job: _Job, batch: Batch, settings: StepSettings) -> StepMetrics:
    """Take the step and write down what it measured. Raises TrainDiverged."""
    state, config, history, step = job.run.state, job.run.config, job.run.history, batch.step
    metrics = train_step(state, *_crops(batch, config, state.device), config, settings, job.resources.micro_batch)
    bad = _everybody(state.world, batch.bad)
    for name, value in (*metrics._asdict().items(), ("replaced", float(len(bad)))):
        history.metrics[name][step] = value
    history.bad_samples.update(dict(bad))
    if metrics.skipped:
        history.skipped.append(SkippedStep(step, _everybody(state.world, batch.keys)))
    _alarm(job, {kind: f"step {step}: {text}" for kind, text in alarms(step, metrics, config).items()})
    recent = history.metrics["skipped"][max(0, step + 1 - config.max_bad_steps) : step + 1]
    if len(recent) == config.max_bad_steps and recent.all():
        raise TrainDiverged(
            f"at most train.max_bad_steps ({config.max_bad_steps}) steps in a row may have a loss or gradient that is "
            f"not finite: got steps {step + 1 - config.max_bad_steps}..{step}, the last on images "
            f"{', '.join(batch.keys[:3])}, ...; lower train.lr or look at these images"
        )
    return metrics


def _alarm(job: _Job, found: Mapping[str, str]) -> None:
    """Note what is odd, by kind; what is so for the first time is said."""
    known = job.run.history.alarms
    for kind, text in found.items():
        if kind not in known and job.leads:
            job.say(text)
        known[kind] = text


def _silent(_: str) -> None:
    """Say nothing."""


def _crops(batch: Batch, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The crops of a batch, made here of its pictures when the loader has not made them."""
    if batch.pictures is not None:
        return batched_crops(*batch.pictures, (config.image_size, config.local_size), device)
    if batch.globals is None or batch.locals is None:
        raise ValueError("a batch must have crops or pictures: got neither")
    return torch.from_numpy(batch.globals), torch.from_numpy(batch.locals)


def _everybody(world: World, some: list[Any]) -> list[Any]:
    """The lists of all processes, one behind the other; told only when one is not empty."""
    if not world.total(len(some)):
        return []
    return [item for part in world.gather(list(some)) for item in part]


def _measure(job: _Job, images: LabelledImages, step: int) -> None:
    """k-NN accuracy of the teacher after a step; the best one so far is kept."""
    run = job.run
    known = run.history.metrics["knn_accuracy"]
    kept = best_accuracy(run.folder) if run.config.result == "best" else -1.0
    known[step] = images.accuracy(run.state.teacher.backbone, run.state.device)
    if run.config.result == "best" and known[step] > kept:
        save_best(run, step + 1, float(known[step]))


class _Reporter:
    """Tells people and programs how a run goes."""

    def __init__(self, job: _Job, log: Log) -> None:
        self.job, self.log = job, log
        self.flops = train_flops(job.run.config) * job.run.config.batch  # of a step
        cuda = job.resources.device.startswith("cuda")
        self.peak = matmul_rate(job.resources.device) * job.run.state.world.size if cuda else math.nan
        self.before = job.timing.copy()

    def tell(self, step: int, metrics: StepMetrics) -> None:
        """One step is done."""
        job, config = self.job, self.job.run.config
        accuracy = job.run.history.metrics["knn_accuracy"][step]
        last = step + 1 == config.n_steps
        rare = math.isfinite(accuracy) or math.isfinite(metrics.rank)  # measured in few steps: none is left out
        if (step + 1) % job.resources.log_every == 0 or last or rare:
            recent, self.before = job.timing.since(self.before), job.timing.copy()
            rate = recent.steps / recent.seconds if recent.seconds else math.nan
            values = metrics._asdict() | {
                "knn_accuracy": float(accuracy),
                "images_per_second": recent.images_per_second,
                "wait_share": recent.wait_share,
                "mfu": rate * self.flops / self.peak,
                "seconds_left": (config.n_steps - step - 1) / rate if rate else math.nan,
                "alarms": dict(job.run.history.alarms),
            }
            self.log.add(step, values)
        if job.progress is not None:
            job.progress(step + 1, config.n_steps, self.message(metrics))

    def message(self, metrics: StepMetrics) -> str:
        """One line for people."""
        job, config = self.job, self.job.run.config
        k = config.head.prototypes
        parts = (("DINO", metrics.dino_loss), ("iBOT", metrics.ibot_loss), ("KoLeo", metrics.koleo_loss))
        on = (True, config.ibot_weight > 0, config.koleo_weight > 0)
        shares = ", ".join(f"{name} {value:.3f}" for (name, value), is_on in zip(parts, on, strict=True) if is_on)
        measured = job.run.history.metrics["knn_accuracy"]
        known = measured[np.isfinite(measured)]
        rate = job.timing.steps / job.timing.seconds if job.timing.seconds else math.nan
        mfu = rate * self.flops / self.peak
        said = [
            f"loss {metrics.loss:.3f} ({shares})",
            f"teacher entropy {metrics.teacher_entropy:.3f} of {math.log(k):.3f}",
            f"prototypes used {metrics.usage_perplexity:.0f} of {k}",
            f"k-NN {known[-1]:.1%}" if len(known) else "",
            f"{job.timing.images_per_second:.0f} images/s",
            f"MFU {mfu:.0%}" if math.isfinite(mfu) else "",
            f"waiting {job.timing.wait_share:.0%}",
            f"lr {metrics.lr:.2g}",
            "skipped: not finite" if metrics.skipped else "",
        ]
        return ", ".join(filter(None, said))


@contextmanager
def _reporting(job: _Job, start: int) -> Iterator[_Reporter]:
    with Log(job.log, start) as log:
        yield _Reporter(job, log)


def _plan(config: TrainConfig, shards: Location, world: World, crops_on: str, root: Root | None) -> LoaderPlan:
    mix = read_mix(shards)
    share = config.batch // world.size
    return LoaderPlan(
        shards=shards,
        totals=shard_totals(shards, list_shards(shards), mix, root),
        mix=mix,
        batch=config.batch,
        slots=(world.rank * share, (world.rank + 1) * share),
        seed=config.seed,
        n_open=config.n_open,
        augment=config.augment,
        global_size=config.image_size,
        local_size=config.local_size,
        n_local=config.n_local,
        crops_on=crops_on,
        root=root,
    )


def _digest(shards: Location, plan: LoaderPlan) -> str:
    """What a checkpoint is compared by; the content of the shards is for the caller's fingerprint to watch."""
    mix = repr(plan.mix).encode() if plan.mix else b""
    return hashlib.sha256(list_shards(shards).tobytes() + plan.totals.tobytes() + mix).hexdigest()


def _timed(source: Generator[Batch, None, None], job: _Job) -> Generator[Batch, None, None]:
    """The batches of ``source``, with the time taken inside it and outside it written down."""
    timing, before = job.timing, time.perf_counter()
    try:
        for batch in source:
            got = time.perf_counter()
            timing.wait_seconds += got - before
            yield batch
            now = time.perf_counter()
            timing.seconds += now - before
            timing.images += job.run.config.batch
            timing.steps += 1
            before = now
    finally:
        source.close()
