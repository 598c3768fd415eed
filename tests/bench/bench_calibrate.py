"""Which copies a descriptor tells: recall and precision of each transform at the threshold ``calibrate`` suggests.

Each image has a copy by each transform of ``embedding.known_copies``, the same for all descriptors: ``phash`` (its 64
bits, cosine 1 - distance / 32), ``pixels``, ``vit`` (a small ViT with random weights) and any ``--backbone``. A case is
a descriptor and a transform. ``ours`` is the recall, at the lowest threshold at which the precision over all transforms
is ``--min-precision``, for a pool that is the sample; without such a threshold at the most precise one. There is no
peer. ``precision`` is none where nothing is found.

    python tests/bench/bench_calibrate.py [--data FOLDER] [--backbone SPEC ...] [--rows N] [--seed S] [--json FILE]

--data: a folder of images; without it pictures with the spectrum of photographs are made.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import photographs
from common import arguments, peak_mb, report

from curation.calibrate import Calibration, calibrate
from embedding.backbone import load_backbone, save_vit
from embedding.decode import MAX_PIXELS, BadImage, decode_rgb
from embedding.embed import embed_images
from embedding.known_copies import TRANSFORMS, known_copies
from embedding.measures import measure
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig

ROWS = 200
EASY = ("jpeg", "webp", "half", "larger")  # encoded anew or rescaled: what any descriptor of copies must find
FLOORS = {"phash": 0.95, "pixels": 0.95}  # recall of these

Describe = Callable[[Sequence[bytes]], np.ndarray]  # files to float32 unit rows (n, d)


def hash_bits(files: Sequence[bytes]) -> np.ndarray:
    """The perceptual hash of each file as a unit vector: a bit is +-1 / 8."""
    rows = []
    for data in files:
        pixels = decode_rgb(data)
        assert not isinstance(pixels, BadImage), pixels
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(str(measure(pixels, ["phash"])["phash"])), np.uint8))
        rows.append((bits * 2.0 - 1) / 8)
    return np.array(rows, np.float32)


def of_backbone(spec: str) -> Describe:
    """What a backbone makes of files."""
    backbone = load_backbone(spec)
    return lambda files: embed_images(backbone, files).embeddings


def random_vit(folder: Path) -> str:
    """The folder of a ViT that was never trained."""
    save_vit(folder, ViT(ViTConfig(width=192, depth=6, heads=3, layer_scale=0.1)), Preprocess(size=128, crop=112))
    return str(folder)


def describe_all(
    files: Iterable[bytes], seed: int, descriptors: Mapping[str, Describe]
) -> tuple[int, dict[str, np.ndarray]]:
    """How many images there are, and (n, 1 + transforms, d) of each descriptor: images and behind each its copies."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in descriptors}
    n = 0
    for n, data in enumerate(files, 1):
        copies = known_copies(data, seed, n, MAX_PIXELS)
        assert not isinstance(copies, BadImage), copies
        for name, describe in descriptors.items():
            found[name].append(describe([data, *copies]))
    return n, {name: np.stack(rows) for name, rows in found.items()}


def table(name: str, curve: Calibration, min_precision: float) -> list[dict[str, Any]]:
    """A row a transform, and one for all."""
    at = curve.suggest(min_precision)
    at = int(np.nanargmax(curve.precision)) if at is None else at
    recall = [*curve.recall_of_each[:, at].tolist(), float(curve.recall[at])]
    precision = [*curve.precision_of_each[:, at].tolist(), float(curve.precision[at])]
    none = {"peer": None, "peer_name": "", "ratio": None}
    sizes = {"threshold": float(curve.thresholds[at]), "rows": curve.n_images, "peak_mb": peak_mb()}
    return [
        {"case": f"{name} {way}", "ours": r, **none, "unit": "recall", "precision": None if np.isnan(p) else p, **sizes}
        for way, r, p in zip([*TRANSFORMS, "all"], recall, precision, strict=True)
    ]


def bench(args: argparse.Namespace, scratch: Path) -> int:
    """Describe all files and report."""
    named: dict[str, Callable[[], Describe]] = {
        "phash": lambda: hash_bits,
        "pixels": partial(of_backbone, "pixels"),
        "vit": lambda: of_backbone(random_vit(scratch)),
    }
    descriptors = {name: named[name]() for name in args.descriptors}
    descriptors |= {Path(spec).name: of_backbone(spec) for spec in args.backbone}
    found = (path.read_bytes() for path in sorted(args.data.iterdir())) if args.data else None
    files = itertools.islice(found, args.rows) if found else photographs(args.rows or ROWS, args.seed)
    n, vectors = describe_all(files, args.seed, descriptors)
    rows = [row for name, x in vectors.items() for row in table(name, calibrate(x, n), args.min_precision)]
    low = {f"{name} {way}": floor for name, floor in FLOORS.items() for way in EASY}
    missed = [f"{row['case']}: {row['ours']:.3f} < {low[row['case']]}" for row in rows
              if row["ours"] < low.get(row["case"], 0)]  # fmt: skip
    return report(rows, args, missed)


def main() -> int:
    """Parse the arguments and run."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--descriptors", nargs="*", choices=["phash", "pixels", "vit"],
                        default=["phash", "pixels", "vit"])  # fmt: skip
    parser.add_argument("--backbone", action="append", default=[], help="a model as embed takes it; may be repeated")
    parser.add_argument("--min-precision", type=float, default=0.99)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
        return bench(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
