"""The part ``trainer`` of ``bench_gpu``: steps of DINO with iBOT and KoLeo on one GPU, by ``training.train_step``.

Each shape is trained as published for ImageNet-1k: two crops of 224 pixels and eight of 96, separate heads of 65,536
prototypes balanced by Sinkhorn-Knopp, bfloat16. Rates are of whole steps, images of the stream a second.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
import torch
from gpu_feed import Made, Source, alone, cropped, feeding, flat, has_numba, pictures, write_source
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from embedding.vit_config import ViTConfig
from training.augment import N_GLOBAL, AugmentConfig
from training.augment_torch import batched_crops
from training.config import HeadConfig, TrainConfig
from training.losses import dino_loss, ibot_loss, sinkhorn_knopp
from training.masks import mask_counts
from training.prototype_loss import Targets, dino_prototype_loss, ibot_prototype_loss, sinkhorn_offset
from training.throughput import train_flops
from training.train_step import StepMetrics, StepSettings, TrainState, step_draws, step_masks, train_step
from training.world import World

LEAST_COSINE = 0.999  # of what two steps change on the device and on the CPU, in float32
MOST_OFF = {"float32": 1e-3, "bfloat16": 0.05}  # relative difference of losses and the norm of gradients
MOST_DIFFERENCE = (1, 0.01)  # of 255, largest and mean, between crops of the device and of the reference
CLOSE = 0.02  # relative difference of the loss by chunks and by all logits, products in bfloat16
LR = 1e-4
WARM = 3  # steps before those that are timed
Row = dict[str, Any]


class Shape(NamedTuple):
    """A backbone and how it is trained."""

    name: str
    width: int
    depth: int
    heads: int
    drop_path: float
    batch: int
    bar: float | None = None  # images/s on an H200
    aim: float | None = None  # same
    plain: bool = False  # also without torch.compile


class Size(NamedTuple):
    """How much of everything."""

    shapes: tuple[Shape, ...]
    patch: int  # pixels
    sides: tuple[int, int]  # of crops, pixels
    n_local: int
    prototypes: int
    hidden: int
    bottleneck: int
    group: int  # images whose masks and branches are drawn together
    seconds: float  # a rate is measured for
    workers: int  # processes that decode
    memory: tuple[int, int]  # images and prototypes of the case of that name
    checked: int  # images whose crops are compared


def full_size() -> Size:
    """For a GPU."""
    shapes = (
        Shape("ViT-L/16", 1024, 24, 16, 0.3, 128, bar=300, aim=385, plain=True),
        Shape("ViT-B/16", 768, 12, 12, 0.1, 256),
        Shape("ViT-S/16", 384, 12, 6, 0.1, 256),
    )
    cores = len(os.sched_getaffinity(0))
    return Size(shapes, 16, (224, 96), 8, 65_536, 2048, 256, 64, 8.0, cores, (64, 131_072), 64)


TINY = Size((Shape("tiny", 32, 2, 2, 0.3, 8, bar=1, aim=1, plain=True),), 8, (32, 16), 2, 64, 48, 16, 4, 0.05, 2,
            (8, 2**16), 4)  # fmt: skip


def published(shape: Shape, size: Size) -> TrainConfig:
    """The run of DINOv3's released ViT-L/16 (the preset ``dinov3``), with another backbone."""
    vit = ViTConfig(
        width=shape.width, depth=shape.depth, heads=shape.heads, patch_size=size.patch, n_registers=0,
        rope_rescale=2.0, drop_path=shape.drop_path,
    )  # fmt: skip
    head = HeadConfig(prototypes=size.prototypes, hidden=size.hidden, bottleneck=size.bottleneck, norm="none")
    return TrainConfig(
        vit=vit, image_size=size.sides[0], local_size=size.sides[1], n_local=size.n_local, head=head, ibot_head=head,
        teacher_temperature=0.07, momentum=0.992, batch=shape.batch, group=size.group, decay_tokens=True,
        layer_decay=0.9, patch_embed_lr=0.2, precision="bfloat16",
    )  # fmt: skip


def settings(config: TrainConfig, step: int) -> StepSettings:
    """Of any step: nothing changes from one to the next."""
    return StepSettings(step, LR, config.teacher_temperature, config.momentum, config.weight_decay)


def random_crops(config: TrainConfig, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 (crop, image, height, width, RGB), globals and locals."""
    random = torch.Generator(device).manual_seed(seed)
    shapes = [(N_GLOBAL, config.image_size), (config.n_local, config.local_size)]
    globals_GBhw3, locals_LBhw3 = (
        torch.randint(0, 256, (n, config.batch, side, side, 3), dtype=torch.uint8, device=device, generator=random)
        for n, side in shapes
    )
    return globals_GBhw3, locals_LBhw3


def compile_blocks(state: TrainState) -> None:
    """As ``train.resources.compile`` does."""
    for block in (*state.student.backbone.blocks, *state.teacher.backbone.blocks):
        block.compile()


def plain_blocks(state: TrainState) -> None:
    """Without ``compile_blocks``."""
    for block in (*state.student.backbone.blocks, *state.teacher.backbone.blocks):
        block._compiled_call_impl = None


# Checks: the device beside the CPU


def check(size: Size, device: str, seed: int) -> Iterator[Row]:
    """Two small steps on the device and on the CPU; ``ours`` is the cosine between what they change."""
    shape = Shape("check", 64, 3, 2, 0.3, 16)
    small = size._replace(sides=(32, 16), patch=8, n_local=4, prototypes=512, hidden=128, group=8)
    config = replace(published(shape, small), precision="float32", seed=seed, init_gain=1.0)
    config = replace(config, vit=replace(config.vit, layer_scale=1.0))  # else images hardly differ
    there, moved = two_steps(config, "cpu", False)
    for precision, compiled in (("float32", False), ("float32", True), ("bfloat16", False)):
        if compiled and device == "cpu":
            continue
        here, ours = two_steps(replace(config, precision=precision), device, compiled)
        off = largest_off(here, there)
        cosine = float(F.cosine_similarity(ours, moved, dim=0))
        exact = precision == "float32"
        yield {"ours": cosine, "peer": LEAST_COSINE if exact else 0.0, "peer_name": "least allowed",
               "unit": "cosine of two steps", "rows": config.batch, "precision": precision, "compiled": compiled,
               "off": off, "equal": off <= MOST_OFF[precision] and (cosine >= LEAST_COSINE or not exact)}  # fmt: skip


def two_steps(config: TrainConfig, device: str, compiled: bool) -> tuple[list[StepMetrics], Tensor]:
    """What they measure, and how far they move all parameters, float64 on the CPU."""
    crops = random_crops(config, "cpu", config.seed)
    state = TrainState(config, torch.device(device))
    before = parameters(state)
    if compiled:
        compile_blocks(state)
    found = [train_step(state, *crops, config, settings(config, step)) for step in range(2)]
    return found, parameters(state) - before


def parameters(state: TrainState) -> Tensor:
    """Of the student, flat."""
    return torch.cat([p.detach().double().cpu().flatten() for p in state.student.parameters()])


def largest_off(here: Sequence[StepMetrics], there: Sequence[StepMetrics]) -> float:
    """The largest relative difference of losses and the norm of the gradients."""
    names = ("loss", "dino_loss", "ibot_loss", "koleo_loss", "teacher_entropy", "grad_norm")
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(here, there, strict=True) for name in names]
    return float(np.max([abs(a - b) / abs(b) for a, b in pairs]))  # nan if one is


def augment_check(size: Size, files: Sequence[bytes], device: str, seed: int) -> Iterator[Row]:
    """Crops of the device beside the reference; without numba beside the CPU's tensors. ``ours``: pixels alike."""
    with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
        source = source_of(size, files, Path(folder), size.checked, seed)
        images, drawn = pictures(source, 0)
    expected = (
        [torch.from_numpy(x) for x in cropped(images, drawn, size.sides)]
        if source.numba
        else batched_crops(*flat(images), drawn, size.sides)
    )
    was = torch.get_float32_matmul_precision()
    for precision in ("highest", "high") if device == "cuda" else ("highest",):  # "high" is set where one trains
        torch.set_float32_matmul_precision(precision)
        try:
            made = batched_crops(*flat(images), drawn, size.sides, device)
        finally:
            torch.set_float32_matmul_precision(was)
        off = torch.cat([(a.int() - b.cpu().int()).abs().flatten() for a, b in zip(expected, made, strict=True)])
        most, mean = int(off.max()), float(off.float().mean())
        row = {"ours": float((off == 0).float().mean()), "peer": 1.0, "unit": "share of pixels alike",
               "peer_name": "make_crops" if source.numba else "tensors on the CPU", "rows": len(images),
               "most_off": most, "mean_off": mean, "matmul_precision": precision}  # fmt: skip
        fits = most <= MOST_DIFFERENCE[0] and mean <= MOST_DIFFERENCE[1]
        yield row | ({"equal": fits} if precision == "highest" else {"within": fits})


# Data


def source_of(size: Size, files: Sequence[bytes], folder: Path, batch: int, seed: int) -> Source:
    """The files in a folder, for batches of so many."""
    path = folder / "images"
    offsets = write_source(path, files)
    return Source(str(path), offsets, AugmentConfig(), size.sides, size.n_local, batch, seed, has_numba())


def feed(size: Size, files: Sequence[bytes], device: str, seed: int) -> Iterator[Row]:
    """What workers give when nobody trains, and what the device crops."""
    batch = size.shapes[0].batch
    with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
        source = source_of(size, files, Path(folder), batch, seed)
        images, drawn = pictures(source, 0)
        pixels, sizes = flat(images)
        facts = {"unit": "images/s", "rows": batch, "workers": size.workers}
        some = size.seconds / 4
        rate = batch * timed(lambda: batched_crops(pixels, sizes, drawn, size.sides, device), some, device)
        row: Row = {"ours": rate, **facts, "what": "crops on the device", "peer_name": "none"}
        if source.numba:
            n = min(8, batch)
            core = n * timed(lambda: cropped(images[:n], drawn[:, :n], size.sides), some, "cpu")
            row |= {"peer": core, "peer_name": "make_crops, one core", "ratio": rate / core}
        yield row
        rates = {way: alone(source, way, size.workers, size.seconds / 2) for way in ("device", "worker")}
    for way, rate in rates.items():
        what = "decoded and cropped" if way == "worker" else "decoded"
        peer = {"peer": rates["worker"], "peer_name": "decoded and cropped", "ratio": rate / rates["worker"]}
        yield {"ours": rate, **peer, **facts, "what": what, "numba": source.numba}


def timed(work: Callable[[], object], seconds: float, device: str) -> float:
    """Calls a second."""
    for _ in range(2):
        work()
    wait(device)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        n += 1
    wait(device)
    return n / (time.perf_counter() - start)


def wait(device: str) -> None:
    """Until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


# Steps


def train_shape(
    shape: Shape, size: Size, files: Sequence[bytes], device: str, seed: int, peak: float
) -> Generator[tuple[str, float | None, Row], None, None]:
    """Case, aim and row of each: crops that lie on the device, then crops that come from files."""
    config, state = begun(shape, size, device, seed)
    shape, compiled, best = shape._replace(batch=config.batch), False, 0.0
    error = None
    for now in (False, True) if shape.plain and device == "cuda" else (device == "cuda",):
        if now:
            compile_blocks(state)
        try:
            row = compute(state, config, size, device, seed, peak)
        except RuntimeError as e:  # of compilers, of many kinds
            if not now:
                raise
            plain_blocks(state)
            error = f"{type(e).__name__}: {str(e)[:300]}"
            row = compute(state, config, size, device, seed, peak)
            now = False  # noqa: PLW2901
        compiled, best = now, max(best, row["ours"])
        row |= {"shape": shape.name, "compiled": now, "bar": shape.bar, "compile_error": error}
        yield "compute", shape.aim if now or error else None, row
    for crops_on in ("device", "worker"):
        row = fed(state, config, size, files, crops_on, device, seed)
        row |= {"peer": best, "peer_name": "crops on the device", "ratio": row["ours"] / best, "shape": shape.name,
                "compiled": compiled, "bar": shape.bar, "mfu": row["ours"] * train_flops(config) / peak}  # fmt: skip
        yield "fed", shape.aim if crops_on == "device" else None, row


def begun(shape: Shape, size: Size, device: str, seed: int) -> tuple[TrainConfig, TrainState]:
    """Config and state at the batch of the shape, or half of it where that does not fit."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # as ``training.trainer`` does
    config = replace(published(shape, size), seed=seed)
    with suppress(torch.OutOfMemoryError):
        state = TrainState(config, torch.device(device))
        train_step(state, *random_crops(config, device, seed), config, settings(config, 1))
        return config, state
    state = None  # type: ignore[assignment]  # what it holds goes
    torch.cuda.empty_cache()
    config = replace(config, batch=shape.batch // 2)
    return config, TrainState(config, torch.device(device))


def compute(state: TrainState, config: TrainConfig, size: Size, device: str, seed: int, peak: float) -> Row:
    """Steps on crops that lie on the device."""
    crops = random_crops(config, device, seed)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for step in range(1, 1 + WARM):
        metrics = train_step(state, *crops, config, settings(config, step))
    wait(device)
    warm_up, start, n, skipped = time.perf_counter() - start, time.perf_counter(), 0, 0.0
    while time.perf_counter() - start < size.seconds:
        metrics = train_step(state, *crops, config, settings(config, 1 + WARM + n))
        skipped, n = skipped + metrics.skipped, n + 1
    wait(device)
    step_seconds = (time.perf_counter() - start) / n
    rate, flops = config.batch / step_seconds, train_flops(config)
    return {"ours": rate, "peer": peak / flops, "peer_name": "its products at the measured peak",
            "ratio": rate * flops / peak, "unit": "images/s", "rows": config.batch, "step_ms": 1e3 * step_seconds,
            "tflops": rate * flops / 1e12, "gflops_an_image": flops / 1e9, "warm_up_s": warm_up, "skipped": skipped,
            "loss": metrics.loss, "equal": math.isfinite(metrics.loss), **host(state, config)}  # fmt: skip


def host(state: TrainState, config: TrainConfig) -> Row:
    """Milliseconds of a step in which masks and branches are drawn: the device may wait for them."""
    device = state.device
    masks = timed(lambda: step_masks(config, 1, device), 0.2, device.type)
    images = (0, config.batch)
    draws = timed(lambda: step_draws(config, state.student.backbone, 1, images), 0.2, device.type)
    return {"masks_ms": 1e3 / masks, "draws_ms": 1e3 / draws}


def fed(
    state: TrainState, config: TrainConfig, size: Size, files: Sequence[bytes], crops_on: str, device: str, seed: int
) -> Row:
    """Steps on crops that come from files."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
        source = source_of(size, files, Path(folder), config.batch, seed)
        with feeding(source, crops_on, size.workers) as batches:
            for step in range(1, 1 + size.workers):
                train_step(state, *crops_of(next(batches), size, device), config, settings(config, step))
            wait(device)
            start, n, waited = time.perf_counter(), 0, 0.0
            while time.perf_counter() - start < size.seconds or n % size.workers:  # workers end together
                before = time.perf_counter()
                made = next(batches)
                waited += time.perf_counter() - before
                step = 1 + size.workers + n
                train_step(state, *crops_of(made, size, device), config, settings(config, step))
                n += 1
            wait(device)
            took = time.perf_counter() - start
    return {"ours": n * config.batch / took, "unit": "images/s", "rows": n * config.batch, "crops_on": crops_on,
            "waiting": waited / took, "workers": size.workers, "numba": source.numba}  # fmt: skip


def crops_of(made: Made, size: Size, device: str) -> tuple[Tensor, Tensor]:
    """Crops as a step takes them."""
    if made.globals is not None and made.locals is not None:
        return torch.from_numpy(made.globals), torch.from_numpy(made.locals)
    assert made.pixels is not None and made.sizes is not None and made.drawn is not None
    return batched_crops(made.pixels, made.sizes, made.drawn, size.sides, device)


# Memory of the prototypes


class Given(NamedTuple):
    """Bottleneck vectors of student and teacher, and prototypes."""

    student_SBd: Tensor
    teacher_Nd: Tensor
    student_Md: Tensor
    teacher_Md: Tensor
    weight_M: Tensor
    weight_Kd: Tensor  # of the student
    teacher_Kd: Tensor


def prototype_memory(size: Size, device: str, seed: int) -> Row:
    """The most that both losses and their gradients hold, by chunks and by all logits; megabytes."""
    images, k = size.memory
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    given = vectors(size, images, k, device, seed)
    chunked, few = most_bytes(lambda: by_chunks(given, images, dtype), device)
    plain, many = most_bytes(lambda: by_all_logits(given, images, dtype), device)
    off = abs(chunked[0] - plain[0]) / plain[0]
    cosine = min(float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
                 for a, b in zip(chunked[1], plain[1], strict=True))  # fmt: skip
    logits = (given.student_SBd.shape[0] * images + len(given.student_Md)) * k * 4
    return {"ours": few / 1e6, "peer": many / 1e6, "peer_name": "all logits", "ratio": many / few, "unit": "MB",
            "rows": images, "prototypes": k, "patches": len(given.student_Md), "student_logits_mb": logits / 1e6,
            "loss": chunked[0], "off": off, "gradient_cosine": cosine,
            "equal": off <= CLOSE and cosine >= LEAST_COSINE}  # fmt: skip


def vectors(size: Size, images: int, k: int, device: str, seed: int) -> Given:
    """Random ones of length 1, in the numbers of a step."""
    random = torch.Generator(device).manual_seed(seed)
    n_patches = (size.sides[0] // size.patch) ** 2
    counts = mask_counts(N_GLOBAL * images, n_patches, 0.5, (0.1, 0.5))
    m, d = int(counts.sum()), size.bottleneck

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, d, device=device, generator=random), dim=-1)

    weight_M = torch.from_numpy(np.repeat(1 / counts, counts).astype(np.float32)).to(device)
    student = [unit(N_GLOBAL + size.n_local, images), unit(m), unit(k)]
    x_SBd, x_Md, w_Kd = (x.requires_grad_() for x in student)
    return Given(x_SBd, unit(N_GLOBAL * images), x_Md, unit(m), weight_M, w_Kd, unit(k))


Loss = tuple[float, list[Tensor]]  # and its gradients


def by_chunks(given: Given, images: int, dtype: torch.dtype) -> Loss:
    """The losses as the trainer has them."""
    offsets = [
        sinkhorn_offset(x, given.teacher_Kd, 0.07, 3, World(), dtype) for x in (given.teacher_Nd, given.teacher_Md)
    ]
    cls = Targets(given.teacher_Nd, given.teacher_Kd, offsets[0], 0.07)
    patches = Targets(given.teacher_Md, given.teacher_Kd, offsets[1], 0.07)
    dino = dino_prototype_loss(given.student_SBd, given.weight_Kd, cls, 0.1, dtype).loss
    ibot = ibot_prototype_loss(
        given.student_Md, given.weight_Kd, patches, given.weight_M, N_GLOBAL * images, 0.1, dtype
    ).loss
    return with_gradients(dino + ibot, given)


def by_all_logits(given: Given, images: int, dtype: torch.dtype) -> Loss:
    """The losses as released code has them."""

    def logits(x: Tensor, weight_Kd: Tensor) -> Tensor:
        return F.linear(x.to(dtype), weight_Kd.to(dtype)).float()

    cls = sinkhorn_knopp(logits(given.teacher_Nd, given.teacher_Kd), 0.07).view(N_GLOBAL, images, -1)
    dino = dino_loss(logits(given.student_SBd, given.weight_Kd), cls, 0.1)
    patches = sinkhorn_knopp(logits(given.teacher_Md, given.teacher_Kd), 0.07)
    z_MK = logits(given.student_Md, given.weight_Kd)
    return with_gradients(dino + ibot_loss(z_MK, patches, given.weight_M, N_GLOBAL * images, 0.1), given)


def with_gradients(loss: Tensor, given: Given) -> Loss:
    """Both."""
    asked = [given.student_SBd, given.student_Md, given.weight_Kd]
    return float(loss.detach()), list(torch.autograd.grad(loss, asked))


def most_bytes(work: Callable[[], Loss], device: str) -> tuple[Loss, int]:
    """What work gives, and the most that it holds beside what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = work()
        return out, torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        return work(), live.most


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storage of tensors that are made and not yet let go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(x, Tensor)}  # fmt: skip
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), there)
        return out

    def _add(self, storage: torch.UntypedStorage, there: set[int]) -> None:
        place, n = storage.data_ptr(), storage.nbytes()
        if n and place not in there and place not in self.known:
            self.known.add(place)
            self.now += n
            self.most = max(self.most, self.now)
            finalize(storage, self._drop, place, n)

    def _drop(self, place: int, n: int) -> None:
        self.known.discard(place)
        self.now -= n
