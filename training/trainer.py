"""From shards to a backbone: the loop around ``train_step``; a kill at any moment leaves no trace in the result."""

import hashlib
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch

from curation.mix import read_mix
from curation.store import Location
from embedding.vit import ViT
from training.checkpoint import History, Run, SkippedStep, restore_newest, save_checkpoint
from training.config import TrainConfig, TrainResources
from training.loader import Batch, LoaderPlan, batches
from training.stream import list_shards, shard_totals
from training.train_step import StepMetrics, StepSettings, TrainState, train_step

__all__ = ["Timing", "TrainConfig", "TrainDiverged", "TrainResources", "TrainResult", "train"]

Progress = Callable[[int, int, str], None]  # step, n_steps, message


class TrainDiverged(RuntimeError):
    """Loss or gradients were not finite for too many steps in a row."""


class Timing:
    """Wall-clock figures of this process; no part of the deterministic result."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of all steps run here
        self.wait_seconds = 0.0  # of them, without a batch
        self.images = 0
        self.resumed_at = 0  # step this process began with

    @property
    def images_per_second(self) -> float:
        """Images of the stream, not crops."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for the loader."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0


@dataclass
class TrainResult:
    """The teacher's backbone and what the run measured."""

    backbone: ViT  # on the CPU, in eval mode
    metrics: dict[str, np.ndarray]  # float64 (n_steps,): the fields of StepMetrics, and replaced samples
    skipped: list[SkippedStep]
    bad_samples: dict[str, str]  # key to reason, of images that did not decode and were replaced
    timing: Timing


def train(
    config: TrainConfig,
    shards: Location,
    out: Location,
    resources: TrainResources | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train on a shard set, going on from the newest checkpoint under ``out / "scratch"``.

    On a CPU the result is the same bytes for any number of workers and any kills. Sets torch's number of threads for
    the process. Raises TrainDiverged, WorkerDied, FileNotFoundError for shards that are not there, and ValueError for
    a checkpoint of another run. With ``n_steps`` 0 the shards are not read.
    """
    resources = resources or TrainResources()
    torch.set_num_threads(resources.threads)
    state = TrainState(config, torch.device(resources.device))
    history, timing = History.empty(config.n_steps), Timing()
    if config.n_steps:
        plan = _plan(config, shards)
        run = Run(config, _digest(shards, plan), out / "scratch", state, history)
        _run_steps(run, plan, resources, timing, progress)
    backbone = state.teacher.backbone.cpu().eval()
    return TrainResult(backbone, history.metrics, history.skipped, history.bad_samples, timing)


def _run_steps(
    run: Run, plan: LoaderPlan, resources: TrainResources, timing: Timing, progress: Progress | None
) -> None:
    """All steps that are left; ``run`` and ``timing`` are changed in place."""
    run.folder.sweep()
    start = timing.resumed_at = restore_newest(run)
    settings, n_steps = schedule(run.config), run.config.n_steps
    stream = _timed(batches(plan, start, n_steps, resources.n_workers, resources.prefetch), timing)
    try:
        for batch in stream:
            metrics = _one_step(run, batch, settings[batch.step])
            done = batch.step + 1
            if progress is not None:
                progress(done, n_steps, _message(metrics, run.config))
            if resources.checkpoint_every and done % resources.checkpoint_every == 0:
                save_checkpoint(run, done)
    finally:
        stream.close()  # ends the workers, whatever happened


def schedule(config: TrainConfig) -> list[StepSettings]:
    """The settings of every step."""
    lr, temperature = config.lr_schedule(), config.temperature_schedule()
    frozen = config.freeze_last_layer_steps
    return [StepSettings(i, float(lr[i]), float(temperature[i]), i < frozen) for i in range(config.n_steps)]


def _one_step(run: Run, batch: Batch, settings: StepSettings) -> StepMetrics:
    """Take the step and write down what it measured. Raises TrainDiverged."""
    config, history, step = run.config, run.history, batch.step
    crops = torch.from_numpy(batch.globals), torch.from_numpy(batch.locals)
    metrics = train_step(run.state, *crops, config, settings)
    for name, value in (*metrics._asdict().items(), ("replaced", float(len(batch.bad)))):
        history.metrics[name][step] = value
    history.bad_samples.update(batch.bad)
    if metrics.skipped:
        history.skipped.append(SkippedStep(step, batch.keys))
    recent = history.metrics["skipped"][max(0, step + 1 - config.max_bad_steps) : step + 1]
    if len(recent) == config.max_bad_steps and recent.all():
        raise TrainDiverged(
            f"at most train.max_bad_steps ({config.max_bad_steps}) steps in a row may have a loss or gradient that is "
            f"not finite: got steps {step + 1 - config.max_bad_steps}..{step}, the last on images "
            f"{', '.join(batch.keys[:3])}, ...; lower train.lr or look at these images"
        )
    return metrics


def _plan(config: TrainConfig, shards: Location) -> LoaderPlan:
    mix = read_mix(shards)
    return LoaderPlan(
        shards=shards,
        totals=shard_totals(shards, list_shards(shards), mix),
        mix=mix,
        batch=config.batch,
        seed=config.seed,
        n_open=config.n_open,
        augment=config.augment,
        global_size=config.image_size,
        local_size=config.local_size,
        n_local=config.n_local,
    )


def _digest(shards: Location, plan: LoaderPlan) -> str:
    """What a checkpoint is compared by; the content of the shards is for the caller's fingerprint to watch."""
    mix = repr(plan.mix).encode() if plan.mix else b""
    return hashlib.sha256(list_shards(shards).tobytes() + plan.totals.tobytes() + mix).hexdigest()


def _timed(source: Generator[Batch, None, None], timing: Timing) -> Generator[Batch, None, None]:
    """The batches of ``source``, with the time taken inside it and outside it written down."""
    before = time.perf_counter()
    try:
        for batch in source:
            got = time.perf_counter()
            timing.wait_seconds += got - before
            yield batch
            now = time.perf_counter()
            timing.seconds += now - before
            timing.images += len(batch.keys)
            before = now
    finally:
        source.close()


def _message(metrics: StepMetrics, config: TrainConfig) -> str:
    """One line for people."""
    k = config.n_prototypes
    parts = (("dino", metrics.dino_loss), ("ibot", metrics.ibot_loss), ("koleo", metrics.koleo_loss))
    on = (True, config.ibot_weight > 0, config.koleo_weight > 0)
    shares = ", ".join(f"{name} {value:.3f}" for (name, value), is_on in zip(parts, on, strict=True) if is_on)
    return (
        f"loss {metrics.loss:.3f} ({shares}), teacher entropy {metrics.teacher_entropy:.3f} of {math.log(k):.3f}, "
        f"prototypes used {metrics.usage_perplexity:.0f} of {k}, lr {metrics.lr:.2g}"
        + (", skipped: not finite" if metrics.skipped else "")
    )
