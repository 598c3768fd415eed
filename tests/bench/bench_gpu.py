"""Embedding, the search for neighbours, clustering or training, on one NVIDIA GPU: each piece alone, and all together.

Needs torch, Pillow and numpy alone, and no installed package: run it from anywhere in a copy of the repository. Cases
of ``--part embed``:

    matmul      bfloat16 products of square matrices, the best of several sides: the peak that shares refer to
    forward     ViT-L/16 at 224 pixels, random weights, as ``embed`` runs it (bytes in pinned memory in, rows out), for
                several batches, compiled and not; ``ratio`` is the share of the measured peak, products counted by
                ``embedding.flops.vit_flops``
    parity      the rows of the GPU beside those of the CPU for the same files; ``ours`` is the lowest cosine,
                ``centred`` the lowest when the mean row is taken away, ``between`` the mean of different images
    decode      JPEGs of 500 x 375 and some 112 kB to the bytes of a batch, no network; processes as ``embed`` uses
                them, beside as many threads
    end-to-end  such JPEGs from tars on the disk (dropped from the page cache), read by ranges, checked by sha256,
                decoded, embedded: float16 unit rows; beside the slower of forward and decode alone. ``waiting`` is the
                share of the time in which the GPU had no batch
    oom         a batch that does not fit says so, and the next one works

and of ``--part neighbors`` (``gpu_neighbors``):

    matmul      as above
    tile        two tiles of signatures compared, beside their int8 products alone; ``of_peak`` is the share of the peak
    join        10 million rows of width 768, half of them in planted pairs: quantizer, cells, signatures, scan of all
                cells, exact similarities. ``ours`` counts edges/s from vectors to edges; ``ratio`` is the share of the
                peak that products of signatures make up while cells are scanned; ``recall`` is that of planted pairs;
                ``equal``: a cell finds what the definition says
    exact       4,096 queries in a million rows by the torch kernel, beside FAISS on the GPU; ``faiss`` says why not

and of ``--part assign`` (``gpu_assign``):

    matmul      as above
    small       a case that ``curation.nearest`` does too (without numba: all distances, in float64)
    step        the second step of k-means of a million rows of width 1024 and 100,000 clusters: centroids sent, rows
                assigned, sums in float64
    assign      the same rows to the centroids after it; ``ratio`` is the share of the peak that the products of all
                rows and centroids make up. ``agree`` is the share of 20,000 rows with the label that products in
                float64 give, ``farther`` how much farther the centroids of the others are; ``pairs_share`` and
                ``rest_share`` of the rows were decided by two distances, and by all centroids in float32;
                ``host_N_tflops``: from N rows in the memory of the machine to labels there
    kernel      the three highest scores of 65,536 rows alone, by every config of the triton kernel (its numbers are
                those of ``nearest_triton.Config``), beside torch; ``of_peak`` is the share of the peak

of ``--part trainer`` (``gpu_trainer``):

    matmul      as above
    check       two small steps on the GPU and on the CPU; ``off`` is the largest relative difference of what they
                measure, ``ours`` the cosine between what they change
    augment     crops of the GPU beside those of the CPU for the same draws, by both precisions of float32 products
    feed        images/s without a step: crops made on the GPU, and what worker processes decode, or decode and crop
    compute     ViT-L/16, B/16 and S/16 on crops that lie on the GPU; ``ratio`` is MFU, the share of the measured peak;
                ``bar`` and ``aim`` are images/s
    fed         the same from JPEGs, crops made on the GPU or by the workers; ``waiting`` is the share of the time in
                which no batch was there, ``ratio`` that of the rate without files
    prototypes  memory of the losses at 131,072 prototypes, by chunks and by all logits

and ``--part train-tiny`` (``gpu_tiny``): a ViT-Ti/4 trained on CIFAR-10 by the clock, in a process of its own that goes
on from its checkpoint, and what it is worth: k-NN and linear accuracy. Needs safetensors too. Its other options:

    --pack FOLDER    first write --data from the Parquet files of CIFAR-10 (image, label) in FOLDER, and end
    --minutes M      of training; --batch, --lr: as ``gpu_tiny`` says
    --folder FOLDER  where checkpoints are; a second call goes on with them
    --out FOLDER     where the weights come to lie at the end
    --wait SECONDS   until the call returns, while the training goes on

    python tests/bench/bench_gpu.py [--part PART] [--tiny] [--data FOLDER] [--rows N] [--seed S] [--json FILE]

--tiny: small, on the CPU, to see that it runs. --data: a folder of JPEGs; without it pictures with the spectrum of
photographs are made. --json is written after every case. A part ends within 9 minutes.
"""

import argparse
import gc
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu_assign
import gpu_neighbors
import gpu_trainer
import numpy as np
import torch
from bench_decode import photographs
from common import arguments, machine, peak_mb, report

from curation.scan_torch import TILE_ROWS
from embedding.embed import Prepare, Waited, embed_stream, preparation
from embedding.flops import matmul_rate, seconds
from embedding.isolate import Processes
from embedding.network import Backbone, Running, too_large, vit_backbone
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

PARTS = ("embed", "neighbors", "assign", "trainer", "train-tiny")
MEAN_BYTES = 112_000  # of a JPEG
FORWARD_AIM = 0.6  # share of the measured peak
RATE_AIM = 2500  # images/s, from files to rows
SHARE_AIM = 0.8  # of the slower of forward and decode
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99}
MAX_PIXELS = 10**8
TAR_IMAGES = 2048
PREPROCESS = Preprocess()
DEADLINE = 470  # seconds from the start after which no case of the part trainer begins that takes a minute
FAILURES = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)  # of a case
Row = dict[str, Any]


class Plan(NamedTuple):
    """How much of everything."""

    device: str
    vit: ViTConfig
    preprocess: Preprocess
    product_sides: tuple[int, ...]
    batches: tuple[int, ...]  # images a forward
    batch: int  # of the end-to-end run
    seconds: float  # a forward is timed for
    photographs: int  # different ones
    rows: int  # images that are decoded or embedded, photographs again and again
    workers: int  # that decode


def full_plan(rows: int | None) -> Plan:
    """For a GPU."""
    vit = ViTConfig(width=1024, depth=24, heads=16, layer_scale=1.0)
    cores = len(os.sched_getaffinity(0))
    return Plan("cuda", vit, PREPROCESS, (4096, 8192, 16384), (64, 128, 256, 512), 256, 3.0, 512, rows or 24_576, cores)


def tiny_plan(rows: int | None) -> Plan:
    """For any machine."""
    vit = ViTConfig(width=64, depth=2, heads=2, layer_scale=1.0)
    return Plan("cpu", vit, Preprocess(size=36, crop=32), (64, 128), (4, 8), 8, 0.05, 8, rows or 48, 3)


class Bench:
    """The cases, the rates that one has from another, and the rows so far."""

    def __init__(self, plan: Plan, files: Sequence[bytes], seed: int, note: Path | None) -> None:
        self.plan, self.files, self.seed, self.note = plan, files, seed, note
        self.rows: list[Row] = []
        self.peak = 0.0  # FLOP/s
        self.forward_rate = 0.0  # images/s, the best at the batch of the end-to-end run
        self.decode_rate = 0.0
        self.missed: list[str] = []
        self.name = torch.cuda.get_device_name() if plan.device == "cuda" else "cpu"
        self.size = gpu_neighbors.FULL if plan.device == "cuda" else gpu_neighbors.TINY
        self.assigned = gpu_assign.FULL if plan.device == "cuda" else gpu_assign.TINY
        self.given: gpu_assign.Given | None = None
        self.trained = gpu_trainer.full_size() if plan.device == "cuda" else gpu_trainer.TINY
        self.start = time.perf_counter()

    def add(self, case: str, aim: float | None = None, aimed: str = "ratio", **fields: Any) -> None:
        """Keep a row; aim: what ``aimed`` must be at least, on a GPU."""
        row = {"case": case, "device": self.name, **fields, "peak_mb": peak_mb()}
        if self.plan.device == "cuda":
            row["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
            if aim is not None:
                row |= {"aim": aim, "missed": not row[aimed] >= aim}
        self.rows.append(row)
        if self.note:
            self.note.write_text(json.dumps([{**row, "machine": machine()} for row in self.rows], indent=1) + "\n")

    @contextmanager
    def backbone(self, precision: str, compiled: bool, device: str | None = None) -> Iterator[Backbone]:
        """The network, for the time of the block."""
        how = Running(device or self.plan.device, precision, compiled)
        try:
            yield vit_backbone(ViT(self.plan.vit, self.seed), {"name": "random"}, self.plan.preprocess, "cls", how)
        finally:
            if self.plan.device == "cuda":
                torch.compiler.reset()
                torch.cuda.empty_cache()

    def matmul(self) -> None:
        """The peak."""
        self.peak = matmul_rate(self.plan.device, self.plan.product_sides)
        self.add("matmul", ours=self.peak / 1e12, peer_name="none", unit="TFLOP/s, bfloat16", rows=0)

    def forward(self) -> None:
        """The network alone."""
        for compiled in (False, True) if self.plan.device == "cuda" else (False,):
            with self.backbone("bfloat16", compiled) as backbone:
                assert backbone.flops is not None
                most = self.peak / backbone.flops
                for batch in self.plan.batches:
                    if compiled:
                        torch.compiler.reset()  # else a second batch is compiled for all of them
                    rate = forward_rate(backbone, batch, self.plan)
                    if batch == self.plan.batch:
                        self.forward_rate = max(self.forward_rate, rate)
                    self.add(
                        "forward", FORWARD_AIM if compiled and batch == self.plan.batch else None,
                        ours=rate, peer=most, peer_name="its products at the measured peak", ratio=rate / most,
                        unit="images/s", rows=batch, compiled=compiled, gflops_an_image=backbone.flops / 1e9,
                    )  # fmt: skip

    def parity(self) -> None:
        """Rows of the GPU beside those of the CPU."""
        files = self.files[:32]
        torch.set_num_threads(self.plan.workers)
        with self.backbone("float32", False, "cpu") as backbone:
            there = embedded(backbone, files, 16)
        torch.set_num_threads(1)
        between = (there @ there.T)[~np.eye(len(there), dtype=bool)].mean()
        for precision, compiled in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
            if compiled and self.plan.device == "cpu":
                continue
            with self.backbone(precision, compiled) as backbone:
                here = embedded(backbone, files, 16)
            lowest, least = cosine(here, there), LEAST_COSINE[precision]
            self.add("parity", ours=lowest, peer=least, peer_name="least allowed", unit="lowest cosine",
                     rows=len(files), precision=precision, compiled=compiled, equal=lowest >= least,
                     centred=cosine(here - here.mean(0), there - there.mean(0)), between=float(between))  # fmt: skip

    def decode(self) -> None:
        """Files to bytes of a batch."""
        for name in ("full", "scaled"):
            rates = {}
            for ways in ("threads", "processes"):
                with decoders(ways, self.plan.workers) as call:
                    n = self.plan.rows // 4
                    files = itertools.islice(itertools.cycle(self.files), n)
                    prepare = partial(call, preparation(name, no_network(self.plan), MAX_PIXELS))
                    list(self.stream(no_network(self.plan), self.files[: 8 * self.plan.workers], prepare))  # they start
                    start = time.perf_counter()
                    list(self.stream(no_network(self.plan), files, prepare))
                    rates[ways] = n / (time.perf_counter() - start)
            if name == "full":
                self.decode_rate = rates["processes"]
            self.add("decode", ours=rates["processes"], peer=rates["threads"], peer_name="threads", unit="images/s",
                     ratio=rates["processes"] / rates["threads"], rows=n, decoder=name,
                     workers=self.plan.workers)  # fmt: skip

    def stream(self, backbone: Backbone, files: Any, prepare: Prepare, waited: Waited | None = None) -> Iterator[Any]:
        """The path of ``embed``."""
        return embed_stream(
            backbone, files, batch=self.plan.batch, threads=self.plan.workers, waited=waited, prepare=prepare
        )

    def end_to_end(self) -> None:
        """Tars to rows."""
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            images = write_tars(Path(folder), self.files, self.plan.rows)
            compiled = self.plan.device == "cuda"
            with self.backbone("bfloat16", compiled) as backbone, decoders("processes", self.plan.workers) as call:
                prepare = partial(call, preparation("full", backbone, MAX_PIXELS))
                for _ in self.stream(backbone, self.files[: 2 * self.plan.batch], prepare):
                    pass  # compilers and processes start
                drop_caches(Path(folder))
                waited, start = Waited(), time.perf_counter()
                stream = self.stream(backbone, read_tars(images), prepare, waited)
                found = [batch.embeddings.astype(np.float16) for batch in stream]
                rate = len(images) / (time.perf_counter() - start)
        assert np.concatenate(found).shape == (len(images), backbone.width)
        slower = min(self.forward_rate, self.decode_rate)
        waiting = waited.seconds / waited.total
        facts = {
            "rows": len(images),
            "workers": self.plan.workers,
            "waiting": waiting,
            "bound": "decoding" if waiting > 0.1 else "the network",
            "mfu": rate * (backbone.flops or 0) / self.peak,
        }
        peer = {"peer": slower, "peer_name": "the slower of forward and decode alone", "ratio": rate / slower}
        self.add("end-to-end", SHARE_AIM, ours=rate, unit="images/s", **peer, **facts)
        self.add("end-to-end-rate", RATE_AIM, "ours", ours=rate, unit="images/s", **facts)

    def oom(self) -> None:
        """A batch that does not fit, in a part of the memory so that it is soon told."""
        if self.plan.device == "cpu":
            return
        with self.backbone("bfloat16", False) as backbone:
            side, sentence = self.plan.preprocess.side, "it fits"
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2e9) / total)
            try:
                backbone.forward(np.zeros((4096, side, side, 3), np.uint8))
            except torch.OutOfMemoryError as e:
                sentence = too_large(4096, e)
            finally:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)
            after = backbone.forward(np.zeros((4, side, side, 3), np.uint8))
        told = sentence.startswith("4096 images at a time must fit the memory of the GPU: CUDA out of memory")
        self.add("oom", ours=sentence, peer_name="none", unit="what is said", rows=4096,
                 equal=told and after.shape == (4, backbone.width))  # fmt: skip

    def tile(self) -> None:
        """Two tiles of a cell."""
        side = TILE_ROWS if self.plan.device == "cuda" else 256
        self.add("tile", **gpu_neighbors.tile(self.plan.device, self.seed, self.peak, side, seconds))

    def join(self) -> None:
        """Vectors to edges."""
        found = gpu_neighbors.join(self.size, self.plan.device, self.seed, self.peak)
        self.add("join", gpu_neighbors.LEAST_RECALL, "recall", **found)

    def exact(self) -> None:
        """The exact search."""
        self.add("exact", **gpu_neighbors.exact(self.size, self.plan.device, self.seed, seconds))

    def small(self) -> None:
        """A small assignment, checked."""
        self.add("small", **gpu_assign.small(self.plan.device, self.seed))

    def step(self) -> None:
        """K-means, two steps."""
        self.given = gpu_assign.given(self.assigned, self.plan.device, self.seed)
        self.add("step", **gpu_assign.kmeans_step(self.given, self.assigned))

    def assign(self) -> None:
        """Rows to centroids."""
        if self.given is None:
            raise ValueError("rows come from the step before: it failed")
        found = gpu_assign.assign(self.given, self.assigned, self.plan.device, self.seed, self.peak, seconds)
        self.add("assign", gpu_assign.RATIO_AIM, **found)

    def kernel(self) -> None:
        """Its products alone."""
        if self.given is None:
            raise ValueError("rows come from the step before: it failed")
        self.add("kernel", **gpu_assign.kernel(self.given, self.plan.device, self.peak, seconds))

    def check(self) -> None:
        """Steps, GPU beside CPU."""
        for row in gpu_trainer.check(self.trained, self.plan.device, self.seed):
            self.add("check", **row)

    def augment(self) -> None:
        """Crops, GPU beside CPU."""
        for row in gpu_trainer.augment_check(self.trained, self.files, self.plan.device, self.seed):
            self.add("augment", **row)

    def feed(self) -> None:
        """The data without the training."""
        for row in gpu_trainer.feed(self.trained, self.files, self.plan.device, self.seed):
            self.add("feed", **row)

    def train(self, shape: gpu_trainer.Shape) -> None:
        """Steps of one backbone."""
        if time.perf_counter() - self.start > DEADLINE:
            raise TimeoutError(f"{shape.name} must begin within {DEADLINE} s: the cases before took longer")
        rows = gpu_trainer.train_shape(shape, self.trained, self.files, self.plan.device, self.seed, self.peak)
        try:
            for case, aim, row in rows:
                self.add(case, aim, "ours", **row)
        finally:
            rows.close()
            self.clear()

    def prototypes(self) -> None:
        """Memory of the losses."""
        self.clear()
        self.add("prototypes", **gpu_trainer.prototype_memory(self.trained, self.plan.device, self.seed))
        self.clear()

    def clear(self) -> None:
        """Give back what ended cases held on the GPU."""
        gc.collect()
        if self.plan.device == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()

    def run(self, part: str) -> None:
        """All cases of a part. One that fails is told, and the others go on: time on such a machine is dear."""
        parts: dict[str, list[Callable[[], None]]] = {
            "embed": [self.matmul, self.forward, self.parity, self.decode, self.end_to_end, self.oom],
            "neighbors": [self.matmul, self.tile, self.join, self.exact],
            "assign": [self.matmul, self.small, self.step, self.assign, self.kernel],
            "trainer": [
                self.matmul,
                self.check,
                self.augment,
                self.feed,
                self.prototypes,
                *(partial(self.train, shape) for shape in self.trained.shapes),
            ],
        }
        for case in parts[part]:
            start, name = time.perf_counter(), getattr(case, "__name__", "train")
            try:
                case()
            except (*FAILURES, *gpu_assign.TRITON_ERRORS) as e:
                self.missed.append(f"{name}: {type(e).__name__}: {e}")
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        self.missed += [
            f"{row['case']}: {row['ours']:.4g} {row['unit']}, ratio {row.get('ratio', 1):.3g}, aim {row['aim']:g}"
            for row in self.rows
            if row.get("missed")
        ]


def forward_rate(backbone: Backbone, batch: int, plan: Plan) -> float:
    """Images/s of the network alone, each batch begun before the rows of the one before are asked for."""
    side = plan.preprocess.side
    inputs = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, pin_memory=plan.device == "cuda").numpy()
    for _ in range(3):
        backbone.forward(inputs)
    start, n, late = time.perf_counter(), 0, backbone.begun(inputs)
    while time.perf_counter() - start < plan.seconds:
        begun = backbone.begun(inputs)
        late.rows()
        late, n = begun, n + 1
    late.rows()
    return (n + 1) * batch / (time.perf_counter() - start)


def embedded(backbone: Backbone, files: Sequence[bytes], batch: int) -> np.ndarray:
    """Unit rows float32 of all files."""
    return np.concatenate([found.embeddings for found in embed_stream(backbone, files, batch=batch)])


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """The lowest between rows of the same number."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float((np.einsum("nd,nd->n", x, y) / norms).min())


def no_network(plan: Plan) -> Backbone:
    """What takes the same inputs into the same memory, and does nothing with them."""

    def ones(inputs: np.ndarray) -> np.ndarray:
        return np.ones((len(inputs), 1), np.float32)

    return Backbone(1, {}, plan.preprocess.cropped, ones, plan.device, least_side=plan.preprocess.least_side)


@contextmanager
def decoders(ways: str, n: int) -> Iterator[Callable[..., Any]]:
    """``call(fn, data)`` in n processes, or in the thread that calls."""
    if ways == "threads":
        yield lambda fn, data: fn(data)
        return
    apart = Processes(n)
    try:
        yield apart
    finally:
        apart.close()


class Place(NamedTuple):
    """Where an image is, as a pool notes it."""

    tar: Path
    offset: int
    n_bytes: int
    sha256: bytes


def write_tars(folder: Path, files: Sequence[bytes], rows: int) -> list[Place]:
    """``rows`` images in tars, the files again and again."""
    places = []
    digests = [hashlib.sha256(data).digest() for data in files]
    for first in range(0, rows, TAR_IMAGES):
        path = folder / f"{first:08d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(rows, first + TAR_IMAGES)):
                data = files[i % len(files)]
                member = tarfile.TarInfo(f"{i:08d}.jpg")
                member.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(member, io.BytesIO(data))
                places.append(Place(path, offset, len(data), digests[i % len(files)]))
    return places


def drop_caches(folder: Path) -> None:
    """Have the files read from the disk next time."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_tars(places: Sequence[Place]) -> Iterator[bytes]:
    """The images in order, each compared with its checksum, as ``embed`` reads those of a pool."""
    for path, group in itertools.groupby(places, lambda place: place.tar):
        with path.open("rb") as file:
            for place in group:
                file.seek(place.offset)
                data = file.read(place.n_bytes)
                if hashlib.sha256(data).digest() != place.sha256:
                    raise ValueError(f"{path} must hold the image that was written: its bytes have changed")
                yield data


def made_photographs(n: int, seed: int) -> list[bytes]:
    """Photographs of some ``MEAN_BYTES``, made by all cores."""
    quality = min(range(80, 96), key=lambda q: abs(np.mean([len(x) for x in photographs(4, seed, q)]) - MEAN_BYTES))
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        shares = pool.starmap(photographs, [(-(-n // cores), seed + 1 + i, quality) for i in range(cores)])
    return list(itertools.chain.from_iterable(shares))[:n]


def main(args: argparse.Namespace) -> int:
    """Run all cases and report. Returns 1 when an aim or a floor is missed."""
    torch.set_num_threads(1)
    if args.part == "train-tiny":
        import gpu_tiny  # it needs safetensors

        return gpu_tiny.main(args)
    plan = (tiny_plan if args.tiny else full_plan)(args.rows)
    files: list[bytes] = []
    if args.part in ("neighbors", "assign"):
        bench = Bench(plan, files, args.seed, args.json)
        bench.size = bench.size._replace(rows=args.rows or bench.size.rows)
        bench.assigned = bench.assigned._replace(rows=args.rows or bench.assigned.rows)
        bench.run(args.part)
        return report(bench.rows, args, bench.missed)
    if args.data:
        paths = sorted(path for path in args.data.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        files = [path.read_bytes() for path in paths[: plan.photographs]]
    else:
        files = made_photographs(plan.photographs, args.seed)  # before the GPU is used: processes are forked
    print(f"{len(files)} JPEGs of {np.mean([len(data) for data in files]):,.0f} bytes on average", file=sys.stderr)
    bench = Bench(plan, files, args.seed, args.json)
    bench.run(args.part)
    return report(bench.rows, args, bench.missed)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--part", choices=PARTS, default="embed")
    parser.add_argument("--pack", type=Path, help="train-tiny: a folder with CIFAR-10's Parquet files")
    parser.add_argument("--minutes", type=float, default=15.0, help="train-tiny: of training")
    parser.add_argument("--batch", type=int, default=512, help="train-tiny: images a step")
    parser.add_argument("--lr", type=float, help="train-tiny: peak rate; default: .001 * sqrt(batch / 512)")
    parser.add_argument("--folder", type=Path, help="train-tiny: where checkpoints are")
    parser.add_argument("--out", type=Path, help="train-tiny: where the weights come to lie")
    parser.add_argument("--wait", type=float, default=560.0, help="train-tiny: seconds until the call returns")
    sys.exit(main(parser.parse_args()))
