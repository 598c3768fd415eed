"""The embed stage on two cores, end to end, beside a plain DataLoader loop and beside the network alone.

Cases: ``loader``, files to vectors with a ViT so narrow (64) that decoding takes more than the network, the stage on
Ray with two workers and the decoder ``scaled`` beside the best of a DataLoader loop over workers (0, 1, 2) x math
threads (1, 2), same network, same batch, Pillow's full decode; ``forward``, a ViT-Ti (192), the stage beside the same
two workers that compute the network alone on images prepared before. Where the network takes most of the time nobody
is faster than the network. ``cosine`` is the lowest between the vectors of the stage and of the loop. Processes are
started and models are loaded before the clock starts for the loop; the stage loads its model within it.

    python tests/bench/bench_embed.py [--data FOLDER] [--rows N] [--cases ...] [--width D] [--seed S] [--json FILE]

--data: a folder of JPEGs; without it pictures with the spectrum of photographs are made.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import photographs
from bench_shards import padded
from common import arguments, interleaved, peak_mb, report
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from curation.artifact import Artifact
from curation.embeddings import read_embeddings
from curation.store import Location
from embedding.backbone import load_vit, save_vit
from embedding.embed import BATCH_IMAGES
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.engine import run_recipe
from pipelines.executor import Resources
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

ROWS = {"loader": 1200, "forward": 240}
WIDTHS = {"loader": 64, "forward": 192}
DECODER = "scaled"
WORKERS = 2  # cores
REPEATS = 3
FLOORS = {"loader": 1.1, "forward": 0.85}
LEAST_COSINE = 0.999
PREPROCESS = Preprocess()


class Files(Dataset[torch.Tensor]):
    """What the data set of a plain loop is: open, convert, resize, crop, normalise."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Float32 (3, 224, 224)."""
        image = Image.open(self.paths[i]).convert("RGB")
        short = min(image.size)
        size = (PREPROCESS.size * image.width // short, PREPROCESS.size * image.height // short)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - PREPROCESS.side) // 2, (size[1] - PREPROCESS.side) // 2
        pixels = np.asarray(image.crop((left, top, left + PREPROCESS.side, top + PREPROCESS.side)), np.float32) / 255
        normal = (pixels - np.float32(PREPROCESS.mean)) / np.float32(PREPROCESS.std)
        return torch.from_numpy(normal.transpose(2, 0, 1).copy())


def loop(folder: Path, model: Path, workers: int) -> Callable[[int], np.ndarray]:
    """The plain loop with its processes and model ready: called with a number of threads, it gives unit rows."""
    vit = load_vit(model)[0].requires_grad_(False)
    many = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    loader = DataLoader(Files(folder), batch_size=BATCH_IMAGES, num_workers=workers, **many)

    def run(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            rows = [torch.nn.functional.normalize(vit(batch).cls).half().numpy() for batch in loader]
        torch.set_num_threads(1)
        return np.concatenate(rows)

    return run


def make_forward(model: Path) -> Callable[[int], float]:
    """A worker that computes the network alone: called with a number of batches, it gives a value to wait for."""
    torch.set_num_threads(1)
    vit = load_vit(model)[0].requires_grad_(False)
    x = torch.zeros(BATCH_IMAGES, 3, PREPROCESS.side, PREPROCESS.side)

    def work(n: int) -> float:
        with torch.inference_mode():
            return sum(float(vit(x).cls[0, 0]) for _ in range(n))

    return work


class Ours:
    """The pool, made once, and the embed stage as a recipe runs it."""

    def __init__(self, executor: RayExecutor, folder: Path, model: Path, root: Path, n_files: int) -> None:
        part_rows = BATCH_IMAGES * max(1, -(-n_files // (BATCH_IMAGES * 4 * WORKERS)))  # a few parts a worker
        steps = {
            "web": {"stage": "pool", "source": str(folder), "part_rows": part_rows},
            "vec": {"stage": "embed", "pool": "web", "backbone": str(model), "decoder": DECODER},
        }
        self.recipe, self.executor, self.root = parse_recipe({"steps": steps}, STAGES), executor, root
        self.n_parts = len(self.run("web").parts)

    def run(self, until: str = "vec") -> Artifact:
        """Make the vectors anew."""
        shutil.rmtree(self.root / "vec", ignore_errors=True)
        results = list(run_recipe(self.recipe, Location(str(self.root)), self.executor, until=until))
        assert results[-1].location is not None
        return Artifact(results[-1].location)

    def vectors(self) -> np.ndarray:
        """The rows of all parts, in the order of the pool."""
        made = self.run()
        return np.concatenate([read_embeddings(made.part(i))[1] for i in range(self.n_parts)])


def best_loop(folder: Path, model: Path) -> tuple[str, Callable[[], np.ndarray]]:
    """The quickest of the plain loops, each run twice, the second time on the clock."""
    seconds, runs = {}, {}
    for workers in range(WORKERS + 1):
        run = loop(folder, model, workers)
        for threads in range(1, WORKERS + 1):
            name = f"DataLoader, {workers} workers, {threads} threads"
            runs[name] = partial(run, threads)
            runs[name]()
            start = time.perf_counter()
            runs[name]()
            seconds[name] = time.perf_counter() - start
            print(f"{name}: {len(list(folder.iterdir())) / seconds[name]:.1f} images/s", file=sys.stderr)
    best = min(seconds, key=seconds.__getitem__)
    return best, runs[best]


def make_files(folder: Path, rows: int, data: Path | None, seed: int) -> None:
    """JPEGs that differ from one another: those found, again with a comment when they are too few, or made ones."""
    folder.mkdir()
    found = [path.read_bytes() for path in sorted(data.iterdir())] if data else photographs(min(rows, 320), seed)
    for i in range(rows):
        image = found[i % len(found)]
        (folder / f"{i:06d}.jpg").write_bytes(padded(image, b"%016d" % i) if i >= len(found) else image)


def run_case(case: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One row of the table."""
    width, rows = args.width or WIDTHS[case], args.rows or ROWS[case]
    folder, model = scratch / "images", scratch / "model"
    make_files(folder, rows, args.data, args.seed)
    save_vit(model, ViT(ViTConfig(width=width, heads=width // 64, layer_scale=0.1)), PREPROCESS)
    name, peer = best_loop(folder, model) if case == "loader" else ("DataLoader", partial(loop(folder, model, 0), 1))
    executor = RayExecutor(Resources(workers=WORKERS, loader_workers=args.threads))
    try:
        ours = Ours(executor, folder, model, scratch / "root", rows)
        n_batches = -(-rows // BATCH_IMAGES)
        alone = partial(executor.map_workers, partial(make_forward, model), [1] * n_batches)
        ways = {"ours": ours.run, "peer": peer if case == "loader" else lambda: list(alone())}
        seconds = interleaved(ways, REPEATS)
        cosine = matched(ours.vectors(), peer())
    finally:
        executor.close()
    n_peer = rows if case == "loader" else n_batches * BATCH_IMAGES
    return {
        "case": case,
        "ours": rows / seconds["ours"],
        "peer": n_peer / seconds["peer"],
        "peer_name": name if case == "loader" else f"the ViT alone, {WORKERS} workers",
        "ratio": rows / seconds["ours"] / (n_peer / seconds["peer"]),
        "unit": "images/s",
        "rows": rows,
        "width": width,
        "decoder": DECODER,
        "peak_mb": peak_mb(),
        "cosine": cosine,
    }


def matched(ours: np.ndarray, peer: np.ndarray) -> float:
    """The lowest cosine of a row of the loop and its row of the stage: both are in the order of the file names."""
    assert ours.shape == peer.shape, (ours.shape, peer.shape)
    return float(np.einsum("nd,nd->n", ours.astype(np.float32), peer.astype(np.float32)).min())


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--width", type=int, help="of the ViT, 12 blocks deep, 64 channels a head")
    parser.add_argument("--threads", type=int, default=1, help="resources.loader_workers of the stage")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, missed = [], []
    for case in args.cases:
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            rows.append(row := run_case(case, args, Path(folder)))
        if row["ratio"] < FLOORS[case]:
            missed.append(f"{case}: {row['ratio']:.2f} < {FLOORS[case]}")
        if not row["cosine"] >= LEAST_COSINE:
            missed.append(f"{case}: cosine {row['cosine']:.5f} < {LEAST_COSINE}")
    return report(rows, args, missed)


if __name__ == "__main__":
    sys.exit(main())
