"""The part ``train-tiny`` of ``bench_gpu``: a ViT-Ti/4 trained on CIFAR-10 for some minutes, and what it is worth.

The training is a process of its own, with all images on the device. How many steps fit into the time is measured first
and written to ``run.json`` beside the checkpoints; from there on the run is a function of its seed, and a process that
is killed goes on from the last checkpoint, which is at most a minute old. The part starts that process, or finds it
running, and tells what it has measured so far.

    python tests/bench/bench_gpu.py --part train-tiny --pack CIFAR10_FOLDER --data cifar10.npz
    python tests/bench/bench_gpu.py --part train-tiny --data cifar10.npz --folder RUN --out WEIGHTS [--minutes 15]

The same command again waits on, or goes on. Needs torch, numpy, Pillow and safetensors; --pack needs pyarrow.
"""

import argparse
import fcntl
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from common import peak_mb, report
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from curation.store import Location
from embedding.flops import matmul_rate
from embedding.vit_config import ViTConfig
from training import augment_torch
from training.augment import CROP, N_GLOBAL, AugmentConfig, normalise
from training.checkpoint import History, Run, checkpoints, restore_newest, save_checkpoint
from training.config import HeadConfig, TrainConfig
from training.probes import STRENGTHS, choose_strength, held_last, knn_vote, standardise
from training.schedules import sqrt_scaled_lr
from training.throughput import train_flops
from training.train_step import StepSettings, TrainState, train_step

BAR = {"knn": 0.70}
AIM = {"knn": 0.85, "linear": 0.88}
MOST_WEIGHTS = 16e6  # bytes
N_NEIGHBORS = 20
MEASURED = 20.0  # seconds of steps that tell how many fit
STEPS_SHARE = 0.96  # of the time that is left then; the rest is for checkpoints and k-NN
KNN_SECONDS, SAVE_SECONDS = 120.0, 60.0
MAX_BAD_STEPS = 10
PROBE_ITERATIONS = 300  # of L-BFGS
SIDE, LOCAL_SIDE = 32, 16  # pixels
EVALUATED = 2000  # images of a forward
RUN, ROWS, LOG, LOCK, WEIGHTS = "run.json", "rows.json", "log.txt", "lock", "openlvd-tiny.safetensors"
Row = dict[str, Any]


class Plan(NamedTuple):
    """What is asked of a training process."""

    folder: Path
    data: Path
    device: str
    seconds: float
    batch: int
    lr: float | None
    seed: int
    tiny: bool


class Images(NamedTuple):
    """All images on the device: uint8 (N, height, channel, width), the first ``n_train`` to train on."""

    pixels: Tensor
    labels: np.ndarray  # int64 (N,)
    n_train: int
    digest: str


# Data


def pack(source: Path, target: Path) -> None:
    """One file from the Parquet files of a data set: the JPEG bytes as they are, one behind the other."""
    import pyarrow.parquet as pq

    files: list[bytes] = []
    labels: list[int] = []
    n_train = 0
    for split in ("train", "test"):
        for path in sorted(source.glob(f"{split}-*.parquet")):
            table = pq.read_table(path, columns=["image", "label"])
            files += [cell["bytes"] for cell in table["image"].to_pylist()]
            labels += table["label"].to_pylist()
        n_train = n_train or len(files)
    write_images(target, files, labels, n_train)


def write_images(target: Path, files: Sequence[bytes], labels: Sequence[int], n_train: int) -> None:
    """What ``read_images`` reads."""
    offsets = np.cumsum([0, *map(len, files)])
    data = np.frombuffer(b"".join(files), np.uint8)
    with target.open("wb") as file:
        np.savez(file, data=data, offsets=offsets, labels=np.array(labels, np.int64), n_train=np.int64(n_train))


def read_images(path: Path, device: str) -> Images:
    """All of them, decoded."""
    with np.load(path, allow_pickle=False) as file:
        data, offsets, labels, n_train = (file[name] for name in ("data", "offsets", "labels", "n_train"))
    pixels = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for i, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        with Image.open(io.BytesIO(data[start:stop])) as image:
            pixels[i] = np.asarray(image.convert("RGB"))
    on_device = torch.from_numpy(pixels).to(device).transpose(2, 3).contiguous()
    return Images(on_device, labels, int(n_train), sha256(data).hexdigest())


def made_images(path: Path, n: int, seed: int) -> None:
    """Discs of two colours on grounds of others, a class for each: something a few steps can be run on."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    files = []
    labels = rng.integers(0, 4, n)
    for label in labels:
        at = rng.uniform(-6, 6, 2)
        disc = np.hypot(x - at[0], y - at[1]) < rng.uniform(5, 9)
        colours = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [210, 210, 40]])[[label, (label + 1) % 4]]
        pixels = np.where(disc[..., None], colours[0], colours[1]) + rng.normal(0, 20, (SIDE, SIDE, 3))
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    write_images(path, files, labels.tolist(), n * 4 // 5)


# Recipe


def recipe(plan: Plan, n_steps: int) -> TrainConfig:
    """DINO, iBOT and KoLeo for images of 32 pixels."""
    width, depth, heads = (32, 2, 2) if plan.tiny else (192, 12, 3)
    k, hidden, bottleneck = (64, 48, 16) if plan.tiny else (4096, 1024, 256)
    head = HeadConfig(prototypes=k, hidden=hidden, bottleneck=bottleneck, norm="fixed")
    augment = AugmentConfig(
        global_scale=(0.3, 1.0), local_scale=(0.1, 0.3), brightness=0.2, contrast=0.2, saturation=0.1, hue=0.05,
        grayscale=0.1, blur=(0.0, 0.0, 0.0), solarize=0.0,
    )  # fmt: skip
    lr = plan.lr or sqrt_scaled_lr(1e-3, plan.batch) / sqrt_scaled_lr(1, 512)
    return TrainConfig(
        vit=ViTConfig(width=width, depth=depth, heads=heads, patch_size=4, n_registers=0, layer_scale=None,
                      drop_path=0.1),
        init_gain=1.0, image_size=SIDE, local_size=LOCAL_SIDE, n_local=6, augment=augment, head=head, ibot_head=head,
        teacher_temperature=0.04, momentum=0.996, koleo_weight=0.1, ibot_weight=1.0, n_steps=n_steps,
        batch=plan.batch, lr=lr, final_lr=lr / 1000, warmup_steps=n_steps // 10, schedule="cosine",
        weight_decay=0.04, precision="bfloat16", seed=plan.seed,
    )  # fmt: skip


def crops_drawn(config: TrainConfig, rng: np.random.Generator) -> np.ndarray:
    """What is done to a batch of square images: records of ``CROP`` (crop, image), as ``augment.draw_crops`` has them.

    All at once, where that draws crop by crop; a shape that does not fit is cut to the image. No blur, no solarize.
    """
    augment, n = config.augment, config.batch
    drawn = np.zeros((N_GLOBAL + config.n_local, n), CROP)
    for crops, scale in ((drawn[:N_GLOBAL], augment.global_scale), (drawn[N_GLOBAL:], augment.local_scale)):
        area = SIDE * SIDE * rng.uniform(*scale, crops.shape)
        low, high = map(math.log, augment.aspect)
        ratio = np.exp(rng.uniform(low, high, crops.shape))
        w, h = (np.rint(np.sqrt(area * r)).clip(1, SIDE).astype(np.int64) for r in (ratio, 1 / ratio))
        left, top = ((rng.random(crops.shape) * (SIDE - side + 1)).astype(np.int64) for side in (w, h))
        crops["box"] = np.stack([left, top, left + w, top + h], axis=-1)
    drawn["flip"] = rng.random(drawn.shape) < augment.hflip
    order = rng.random((*drawn.shape, 4)).argsort(axis=-1)
    drawn["order"] = np.where(rng.random((*drawn.shape, 1)) < augment.jitter, order, -1)
    most = np.array([augment.brightness, augment.contrast, augment.saturation, augment.hue])
    drawn["amount"] = most * rng.uniform(-1, 1, (*drawn.shape, 4)) + np.array([1, 1, 1, 0])
    drawn["gray"] = rng.random(drawn.shape) < augment.grayscale
    drawn["threshold"] = 256
    return drawn


def step_rows(config: TrainConfig, n_train: int, step: int) -> np.ndarray:
    """The images of a step, int64 (batch,): an order drawn for each epoch, one behind the other."""
    first, end = step * config.batch, (step + 1) * config.batch
    parts = []
    for epoch in range(first // n_train, (end - 1) // n_train + 1):
        order = np.random.default_rng([config.seed, epoch, 1]).permutation(n_train)
        parts.append(order[max(0, first - epoch * n_train) : end - epoch * n_train])
    return np.concatenate(parts)


@torch.no_grad()
def step_crops(images: Images, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """The crops of a step, a pure function of config and step: uint8 (crop, image, height, width, RGB)."""
    rows = step_rows(config, images.n_train, step)
    drawn = crops_drawn(config, np.random.default_rng([config.seed, step, 2]))
    canvas = images.pixels[torch.from_numpy(rows).to(images.pixels.device)].float()
    sizes = np.full((config.batch, 2), SIDE)
    # images of one size that are on the device already: ``batched_crops`` takes them from one flat array
    globals_GBhw3, locals_LBhw3 = (
        augment_torch._crops(canvas, sizes, part, side)
        for part, side in ((drawn[:N_GLOBAL], SIDE), (drawn[N_GLOBAL:], LOCAL_SIDE))
    )
    return globals_GBhw3.contiguous(), locals_LBhw3.contiguous()


def crops_ahead(images: Images, config: TrainConfig, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of every step; the next ones are made while a step waits for the device."""
    with ThreadPoolExecutor(1) as thread:
        late = thread.submit(step_crops, images, config, start)
        for step in range(start, stop):
            crops = late.result()
            if step + 1 < stop:
                late = thread.submit(step_crops, images, config, step + 1)
            yield crops


# Training


def train(plan: Plan, stop: int | None = None) -> None:
    """Train to the end, from the last checkpoint; stop: after so many steps, as if killed behind a checkpoint."""
    end = time.monotonic() + plan.seconds
    torch.set_num_threads(1)
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("high")
    images = read_images(plan.data, plan.device)
    facts = known(plan, images, end)
    config = recipe(plan, facts["n_steps"])
    state = begun(config, plan.device)
    run = Run(config, images.digest, Location(str(plan.folder)), state, History.empty(config.n_steps))
    at = restore_newest(run)
    facts["curve"] = [point for point in facts["curve"] if point["step"] <= at]
    last, settings, saved, bad = stop or config.n_steps, schedule(config), time.monotonic(), 0
    for step, crops in enumerate(crops_ahead(images, config, at, last), at):
        metrics = train_step(state, *crops, config, settings[step])
        for name, value in metrics._asdict().items():
            run.history.metrics[name][step] = value
        bad = bad + 1 if metrics.skipped else 0
        if bad == MAX_BAD_STEPS:
            raise ArithmeticError(f"a loss must be finite: got {bad} steps in a row that are not, the last {step}")
        done = step + 1
        if done % facts["knn_every"] == 0 or done == config.n_steps:
            measured_now = {name: value for name, value in metrics._asdict().items() if math.isfinite(value)}
            point = {"step": done, "knn": knn(state, images, config), **measured_now}
            facts["curve"].append(point)
            print(json.dumps(point), flush=True)
        took = time.monotonic() - saved
        if took > SAVE_SECONDS or done == last or done % facts["save_every"] == 0:
            rate = (done - at) * config.batch / took
            facts |= {"step": done, "images_per_second": rate, "seconds": facts["seconds"] + took}
            save_checkpoint(run, done)
            write_json(plan.folder / RUN, facts)
            at, saved = done, saved + took
    if stop is None:
        finish(plan, state, images, config, facts)


def known(plan: Plan, images: Images, end: float) -> Row:
    """The facts of the run: those of ``run.json``, or new ones, with as many steps as fit in until ``end``."""
    path = plan.folder / RUN
    asked = {"batch": plan.batch, "lr": recipe(plan, 1).lr, "seed": plan.seed, "seconds_asked": plan.seconds}
    if path.exists():
        facts: Row = json.loads(path.read_text())
        if any(facts[name] != value for name, value in asked.items()):
            raise ValueError(f"{path} must be of the same run: got { ({name: facts[name] for name in asked}) }")
        return facts
    rate = measured(plan, images)
    n_steps = 20 if plan.tiny else max(20, int(rate * STEPS_SHARE * (end - time.monotonic())))
    knn_every = 10 if plan.tiny else max(1, int(rate * KNN_SECONDS))
    facts = {**asked, "n_steps": n_steps, "knn_every": knn_every, "save_every": 5 if plan.tiny else 2**62,
             "step": 0, "seconds": 0.0, "images_per_second": rate * plan.batch, "curve": []}  # fmt: skip
    write_json(path, facts)
    return facts


def measured(plan: Plan, images: Images) -> float:
    """Steps a second, in a run that is thrown away."""
    config = recipe(plan, 10**5)
    state, settings = begun(config, plan.device), schedule(config)
    seconds, start, n = 0.1 if plan.tiny else MEASURED, time.perf_counter(), 0
    for step, crops in enumerate(crops_ahead(images, config, 0, config.n_steps)):
        train_step(state, *crops, config, settings[step])
        n += 1
        if step == 4:  # compiled, and caches filled
            start, n = time.perf_counter(), 0
        if step > 4 and time.perf_counter() - start > seconds:
            break
    return n / (time.perf_counter() - start)


def begun(config: TrainConfig, device: str) -> TrainState:
    """The state before the first step."""
    state = TrainState(config, torch.device(device))
    if device == "cuda":
        for block in (*state.student.backbone.blocks, *state.teacher.backbone.blocks):
            block.compile()
    return state


def schedule(config: TrainConfig) -> list[StepSettings]:
    """Of every step: warm-up and a cosine, all else constant."""
    return [
        StepSettings(step, lr, config.teacher_temperature, config.momentum, config.weight_decay)
        for step, lr in enumerate(config.lr_schedule().tolist())
    ]


def finish(plan: Plan, state: TrainState, images: Images, config: TrainConfig, facts: Row) -> None:
    """What the teacher is worth, its weights, and the rows."""
    peak = matmul_rate(plan.device, (64,) if plan.tiny else (4096, 8192))
    rate = facts["step"] * config.batch / facts["seconds"]
    cls, both = features(state, images, config)
    accuracy = {"knn": vote(cls, images)}
    for name, x in (("linear", cls), ("linear-patches", both)):
        accuracy[name] = linear(x, images, plan.seed)
    n_bytes = write_weights(plan.folder / WEIGHTS, state, config, facts, accuracy)
    common = {"rows": config.n_steps * config.batch, "shape": "tiny" if plan.tiny else "ViT-Ti/4", "finished": True}
    rows: list[Row] = [
        {"case": "train", "ours": rate, "peer": peak / train_flops(config), "unit": "images/s", **common,
         "peer_name": "its products at the measured peak", "ratio": rate * train_flops(config) / peak,
         "n_steps": config.n_steps, "batch": config.batch, "lr": config.lr, "seconds": facts["seconds"],
         "weights_mb": n_bytes / 1e6, "equal": n_bytes <= MOST_WEIGHTS},
        *({"case": name, "ours": value, "peer_name": "none", "unit": "accuracy", **common,
           **({} if plan.tiny else {"bar": BAR.get(name), "aim": AIM.get(name)})} for name, value in accuracy.items()),
    ]  # fmt: skip
    write_json(plan.folder / ROWS, rows)


# What it is worth


@torch.no_grad()
def features(state: TrainState, images: Images, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The teacher's CLS tokens, and these with the mean of the patches: float32 (N, D) and (N, 2 D)."""
    backbone = state.teacher.backbone
    out = []
    for part in images.pixels.split(EVALUATED):  # type: ignore[no-untyped-call]
        tokens = backbone(normalise(part.transpose(2, 3), config.augment.mean, config.augment.std))
        out.append(torch.cat([tokens.cls.float(), tokens.patches.float().mean(dim=1)], dim=1))
    both = torch.cat(out)
    return both[:, : config.vit.width], both


def knn(state: TrainState, images: Images, config: TrainConfig) -> float:
    """Share of the test images that their nearest training images classify right."""
    return vote(features(state, images, config)[0], images)


def vote(x_ND: Tensor, images: Images) -> float:
    """The same of features: cosine, 20 nearest, weights of ``probes.knn_vote``."""
    unit = F.normalize(x_ND, dim=-1)
    bank, labels = unit[: images.n_train], images.labels
    right = 0
    for start in range(images.n_train, len(unit), EVALUATED):
        top = (unit[start : start + EVALUATED] @ bank.T).topk(min(N_NEIGHBORS, len(bank)))
        near = labels[top.indices.cpu().numpy()]
        voted = knn_vote(near, top.values.cpu().numpy(), int(labels.max()) + 1)
        right += int((voted == labels[start : start + EVALUATED]).sum())
    return right / (len(unit) - images.n_train)


def linear(x_ND: Tensor, images: Images, seed: int) -> float:
    """Accuracy of a linear classifier, chosen and fitted as ``probes.fit_probe`` does, on the device."""
    n = images.n_train
    x, device = x_ND.cpu().numpy().astype(np.float32), x_ND.device
    order, n_fit = held_last(images.labels[:n], seed)
    mean, scale = standardise(train_rows := x[:n][order])
    rows, test = torch.from_numpy(train_rows).to(device), torch.from_numpy((x[n:] - mean) / scale).to(device)
    labels = torch.from_numpy(images.labels).to(device)
    known_labels = labels[:n][torch.from_numpy(order).to(device)]

    def n_right(strength: float) -> int:
        weight = fit_linear(rows[:n_fit], known_labels[:n_fit], strength)
        return int((scores(weight, rows[n_fit:]).argmax(dim=1) == known_labels[n_fit:]).sum())

    strength = choose_strength(STRENGTHS, n_right, n - n_fit)
    weight = fit_linear(rows, known_labels, strength)
    return float((scores(weight, test).argmax(dim=1) == labels[n:]).float().mean())


def fit_linear(x_ND: Tensor, labels_N: Tensor, strength: float) -> Tensor:
    """Multinomial logistic regression, float32 (D + 1, c), the bias last: sum of the losses + strength / 2 |w|^2."""
    n, d = x_ND.shape
    weight = torch.zeros(d + 1, int(labels_N.max()) + 1, device=x_ND.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight], max_iter=PROBE_ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(scores(weight, x_ND), labels_N) + strength / (2 * n) * weight[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with precise():
        search.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()


def scores(weight: Tensor, x_ND: Tensor) -> Tensor:
    """(N, c)."""
    return x_ND @ weight[:-1] + weight[-1]


@contextmanager
def precise() -> Iterator[None]:
    """Products of float32 in float32."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)


def write_weights(path: Path, state: TrainState, config: TrainConfig, facts: Row, accuracy: dict[str, float]) -> int:
    """The teacher's backbone, float16, with its recipe and figures; bytes written."""
    from safetensors.torch import save_file

    tensors = {name: value.half().cpu().contiguous() for name, value in state.teacher.backbone.state_dict().items()}
    told = {"vit": asdict(config.vit), "train": asdict(config), "facts": facts, "accuracy": accuracy}
    side = path.with_suffix(".side")
    save_file(tensors, side, metadata={"openlvd": json.dumps(told)})
    side.replace(path)
    return path.stat().st_size


def teacher_of(folder: Path) -> dict[str, Tensor]:
    """The weights that ``write_weights`` wrote."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return tensors


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    side = path.with_suffix(".side")
    side.write_text(json.dumps(value, indent=1) + "\n")
    side.replace(path)


# The process and who waits for it


def main(args: argparse.Namespace) -> int:
    """Pack; or start the training, or find it, wait, and report. Returns 1 when it failed or a bar is missed."""
    if args.pack:
        pack(args.pack, args.data)
        return 0
    plan = plan_of(args)
    plan.folder.mkdir(parents=True, exist_ok=True)
    if not plan.data.exists():
        made_images(plan.data, args.rows or 200, args.seed)
    if not (plan.folder / ROWS).exists():
        start(plan)
    done = waited(plan.folder, args.wait)
    rows = told(plan, done)
    if args.out and done:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, ROWS, RUN):
            (args.out / name).write_bytes((plan.folder / name).read_bytes())
    missed = [] if done or running(plan.folder) else ["train-tiny: it ended before its last step: see log.txt"]
    missed += [f"{row['case']}: {row['ours']:.3f}, bar {row['bar']}"
               for row in rows if row.get("bar") and not row["ours"] >= row["bar"]]  # fmt: skip
    return report(rows, args, missed)


def plan_of(args: argparse.Namespace) -> Plan:
    """Of the arguments."""
    folder = args.folder or Path(tempfile.gettempdir()) / "openlvd-train-tiny"
    if args.data is None and not args.tiny:
        raise SystemExit("--part train-tiny must be given --data FILE.npz, which --pack writes: got none")
    device, batch = ("cpu", 8) if args.tiny else ("cuda", args.batch)
    return Plan(folder.resolve(), (args.data or folder / "made.npz").resolve(), device, 60 * args.minutes, batch,
                args.lr, args.seed, args.tiny)  # fmt: skip


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """The lock of the process that trains there, taken, as a file descriptor; None when a process has it."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def running(folder: Path) -> bool:
    """Whether a process trains there."""
    with locked(folder) as lock:
        return lock is None


def start(plan: Plan) -> None:
    """The training, unless it runs; in a session of its own, so that it outlives this process. It has the lock then."""
    given = json.dumps({**plan._asdict(), "folder": str(plan.folder), "data": str(plan.data)})
    places = [place for place in sys.path if place]
    with locked(plan.folder) as lock, (plan.folder / LOG).open("ab") as log:
        if lock is not None:
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), given],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            )  # fmt: skip


def waited(folder: Path, seconds: float) -> bool:
    """Until the process has ended or time is up; whether there are rows. What it says meanwhile goes to stderr."""
    end = time.monotonic() + seconds
    with (folder / LOG).open() as log:
        while time.monotonic() < end and running(folder):
            time.sleep(0.2)
            print(log.read(), end="", file=sys.stderr, flush=True)
        print(log.read(), end="", file=sys.stderr, flush=True)
    return (folder / ROWS).exists()


def told(plan: Plan, done: bool) -> list[Row]:
    """The rows, or how far it is."""
    device = torch.cuda.get_device_name() if plan.device == "cuda" else "cpu"
    if done:
        rows: list[Row] = json.loads((plan.folder / ROWS).read_text())
    else:
        path = plan.folder / RUN
        nothing: Row = {"images_per_second": 0.0, "step": 0, "seconds": 0.0, "n_steps": 0, "curve": []}
        facts = json.loads(path.read_text()) if path.exists() else nothing
        rows = [{"case": "train", "ours": facts["images_per_second"], "peer_name": "none", "unit": "images/s",
                 "rows": facts["step"] * plan.batch, "finished": False, "seconds": facts["seconds"],
                 "n_steps": facts["n_steps"], "knn": [point["knn"] for point in facts["curve"]][-1:]}]  # fmt: skip
    return [{**row, "device": device, "peak_mb": peak_mb()} for row in rows]


def child(given: str) -> None:
    """The training process."""
    fields = json.loads(given)
    plan = Plan(**{**fields, "folder": Path(fields["folder"]), "data": Path(fields["data"])})
    print(f"from step {max(checkpoints(Location(str(plan.folder))), default=0)}", flush=True)
    train(plan)


if __name__ == "__main__":
    child(sys.argv[1])
