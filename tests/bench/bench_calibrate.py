"""Which copies a descriptor tells: recall and precision of each transform at the threshold ``calibrate`` suggests.

Each image has a copy by each transform of ``embedding.known_copies``, the same for all descriptors: the backbones
``phash`` and ``pixels``, ``vit`` (a small ViT with random weights), ``phash64`` (the 64 bits that a pool measures,
cosine 1 - distance / 32) and any ``--backbone``. A case is a descriptor and a transform. ``ours`` is the recall, at the
lowest threshold at which the precision over all transforms is ``--min-precision`` in a pool of ``--pool`` images, else
of the sample; without such a threshold at the most precise one. ``phash<=31`` is ``phash`` at a distance of at most 31
bits, whatever the pool. There is no peer. ``precision`` is none where nothing is found. Last comes the same as a table
in Markdown.

    python tests/bench/bench_calibrate.py [--data FOLDER] [--backbone SPEC ...] [--rows N] [--pool N] [--seed S]
                                          [--json FILE]

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

from curation.calibrate import Calibration, at_least, calibrate, false_pairs, true_similarities
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
FLOORS = {"phash": 0.99, "phash<=31": 0.99, "phash64": 0.95, "pixels": 0.95}  # recall of these
RADIUS = 31  # bits: what the makers of PDQ recommend to begin with
NAMES = ("phash", "phash64", "pixels", "vit")

Describe = Callable[[Sequence[bytes]], np.ndarray]  # files to float32 unit rows (n, d)


def hash_bits(files: Sequence[bytes]) -> np.ndarray:
    """The perceptual hash of 64 bits of each file as a unit vector: a bit is +-1 / 8."""
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


def describe_all(files: Iterable[bytes], seed: int, descriptors: Mapping[str, Describe]) -> dict[str, np.ndarray]:
    """(n, 1 + transforms, d) of each descriptor: images and behind each its copies."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in descriptors}
    for n, data in enumerate(files, 1):
        copies = known_copies(data, seed, n, MAX_PIXELS)
        assert not isinstance(copies, BadImage), copies
        for name, describe in descriptors.items():
            found[name].append(describe([data, *copies]))
    return {name: np.stack(rows) for name, rows in found.items()}


def curves_of(
    vectors: Mapping[str, np.ndarray], min_precision: float, n_rows: int | None
) -> dict[str, tuple[Calibration, int]]:
    """The calibration of each descriptor, and the position of the threshold that is told of."""
    found = {}
    for name, x in vectors.items():
        curve = calibrate(x, n_rows or len(x))
        at = curve.suggest(min_precision)
        found[name] = curve, int(np.nanargmax(curve.precision)) if at is None else at
        if name == "phash":
            found[f"{name}<={RADIUS}"] = at_threshold(x, 1 - RADIUS / 128, n_rows or len(x)), 0
    return found


def at_threshold(x: np.ndarray, threshold: float, n_rows: int) -> Calibration:
    """As ``calibrate``, at this threshold alone."""
    thresholds = np.array([threshold], np.float32)
    true = at_least(true_similarities(x).T, thresholds)
    return Calibration(thresholds, true, false_pairs(x, np.arange(len(x)), x[:, 0], thresholds), len(x), n_rows)


def table(name: str, curve: Calibration, at: int) -> list[dict[str, Any]]:
    """A row a transform, and one for all."""
    recall = [*curve.recall_of_each[:, at].tolist(), float(curve.recall[at])]
    precision = [*curve.precision_of_each[:, at].tolist(), float(curve.precision[at])]
    none = {"peer": None, "peer_name": "", "ratio": None}
    sizes = {"threshold": float(curve.thresholds[at]), "rows": curve.n_images, "peak_mb": peak_mb()}
    return [
        {"case": f"{name} {way}", "ours": r, **none, "unit": "recall", "precision": None if np.isnan(p) else p, **sizes}
        for way, r, p in zip([*TRANSFORMS, "all"], recall, precision, strict=True)
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Recall / precision in percent, a row a transform, a column a descriptor with its threshold."""
    cells = {tuple(row["case"].split()): row for row in rows}
    names = list(dict.fromkeys(name for name, _ in cells))
    heads = [f"{name} ({cells[name, 'all']['threshold']:.3f})" for name in names]
    lines = [["transform", *heads], ["---"] * (len(names) + 1)]
    for way in (*TRANSFORMS, "all"):
        pairs = [(cells[name, way]["ours"], cells[name, way]["precision"]) for name in names]
        lines.append([way, *(f"{100 * r:.1f} / {'-' if p is None else format(100 * p, '.1f')}" for r, p in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bench(args: argparse.Namespace, scratch: Path) -> int:
    """Describe all files and report."""
    named: dict[str, Callable[[], Describe]] = {
        "phash": partial(of_backbone, "phash"),
        "phash64": lambda: hash_bits,
        "pixels": partial(of_backbone, "pixels"),
        "vit": lambda: of_backbone(random_vit(scratch)),
    }
    descriptors = {name: named[name]() for name in args.descriptors}
    descriptors |= {Path(spec).name: of_backbone(spec) for spec in args.backbone}
    found = (path.read_bytes() for path in sorted(args.data.iterdir())) if args.data else None
    files = itertools.islice(found, args.rows) if found else photographs(args.rows or ROWS, args.seed)
    curves = curves_of(describe_all(files, args.seed, descriptors), args.min_precision, args.pool)
    rows = [row for name, (curve, at) in curves.items() for row in table(name, curve, at)]
    low = {f"{name} {way}": floor for name, floor in FLOORS.items() for way in EASY}
    missed = [f"{row['case']}: {row['ours']:.3f} < {low[row['case']]}" for row in rows
              if row["ours"] < low.get(row["case"], 0)]  # fmt: skip
    code = report(rows, args, missed)
    print(f"\n{markdown(rows)}")
    return code


def main() -> int:
    """Parse the arguments and run."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--descriptors", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--backbone", action="append", default=[], help="a model as embed takes it; may be repeated")
    parser.add_argument("--pool", type=int, help="images of the pool that precision is told of; default: the sample")
    parser.add_argument("--min-precision", type=float, default=0.99)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
        return bench(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
