"""What a join of neighbours takes at a size nobody measures on a laptop, from what ``bench_neighbors.py`` measured.

    python tests/bench/bench_neighbors.py --json measured.json
    python tests/bench/plan_neighbors.py measured.json [--rows 1.3e9] [--width 512] [--gpu-tflops 400]

The data is that of the bench, which is the hardest there is for cells: partners lie in directions of their own, from
a cosine of .6 on. Images of the world and a threshold above .9 need a fraction of the cells.

What is assumed, and printed with the plan: a row must lie in ``nprobe`` ~ nlist ** a cells for the same recall, with
``a`` from the two sizes of case growth; seconds a pair of signatures, and bytes a row of what is shuffled, are those
measured; assignment is a matrix product, its rate that of the measured one. Of the numbers of cells the one with the
least work is planned. ``gpu_hours`` are the FLOPs of both as bf16 products at --gpu-tflops, which is not measured here.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.cells import MAX_CELLS, SAMPLE_BYTES

SIGNATURE_BYTES, COORDINATES = 136, 512  # of a member of a cell; of a signature
PAPER_GPU_HOURS = 2 * 24 * 160  # "less than two days on 160 V100": Oquab et al., DINOv2 (2024), appendix A.4
CELLS = [1 << n for n in range(9, 1 + MAX_CELLS.bit_length()) if 1 << n <= MAX_CELLS]


def measured(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the two cases."""
    found = {row["case"]: row for row in rows}
    return found["join-1m"], found["growth"]


def plan(join: Mapping[str, Any], growth: Mapping[str, Any], n_rows: float, width: int, nlist: int) -> dict[str, float]:
    """Bytes and core-seconds of a join, two cores having been measured."""
    cores = 2
    exponent = math.log(growth["nprobe_many"] / growth["nprobe_few"]) / math.log(4)
    nprobe = join["nprobe"] * (nlist / join["nlist"]) ** exponent
    pairs = n_rows**2 * nprobe**2 / nlist / 2
    measured_pairs = join["rows"] ** 2 * join["nprobe"] ** 2 / join["nlist"] / 2
    products = n_rows * nlist * width
    measured_products = join["rows"] * join["nlist"] * join["width"]
    by_row = n_rows / join["rows"]
    candidates = sum(join[f"{kind}_bytes"] for kind in ("found", "lists", "wanted")) * by_row
    vectors = join["vectors_bytes"] * by_row * width / join["width"]
    return {
        "nlist": nlist,
        "nprobe": nprobe,
        "exponent": exponent,
        "embeddings": 2 * n_rows * width,
        "members": SIGNATURE_BYTES * n_rows * nprobe,
        "candidates": candidates,
        "vectors": vectors,
        "assign": cores * join["assign"] * products / measured_products,
        "scan": cores * join["scan"] * pairs / measured_pairs,
        "verify": cores * join["verify"] * by_row * width / join["width"],
        "measure": cores * join["measure"] * by_row * width / join["width"],
        "flops": 2 * products + 2 * COORDINATES * pairs,
    }


def main() -> int:
    """Print the plan with the least work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="what bench_neighbors.py wrote with --json, both cases")
    parser.add_argument("--rows", type=float, default=1.3e9)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--gpu-tflops", type=float, default=400.0, help="bf16, an assumption")
    args = parser.parse_args()
    join, growth = measured(json.loads(args.measured.read_text()))
    plans = [plan(join, growth, args.rows, args.width, nlist) for nlist in CELLS]
    best = min(plans, key=lambda p: p["assign"] + p["scan"])
    hours = {phase: best[phase] / 3600 for phase in ("assign", "scan", "verify", "measure")}
    terabytes = {kind: best[kind] / 1e12 for kind in ("embeddings", "members", "candidates", "vectors")}
    shuffled = sum(terabytes[kind] for kind in ("members", "candidates", "vectors"))
    lines = [
        f"{args.rows:.3g} rows of width {args.width}, edges from .6 on at a recall of {join['recall']:.3f}",
        f"{best['nlist']} cells, {best['nprobe']:.0f} of each row (nprobe ~ nlist ** {best['exponent']:.2f})",
        "",
        f"embeddings, float16                  {terabytes['embeddings']:8.2f} TB, read 5 times (equal rows, sample and",
        "                                                 recall, assignment, verification from both ends)",
        f"signatures in cells (base + queries) {terabytes['members']:8.2f} TB, written and read once",
        f"candidates                           {terabytes['candidates']:8.2f} TB",
        f"vectors to where they are compared   {terabytes['vectors']:8.2f} TB",
        f"written and read for the shuffles    {2 * shuffled:8.2f} TB in all",
        "",
        *(f"{phase:<10} {value:10.0f} core-hours" for phase, value in hours.items()),
        f"{'all':<10} {sum(hours.values()):10.0f} core-hours: {sum(hours.values()) / 1000:.1f} h on 1,000 cores",
        f"as bf16 products {best['flops']:.2g} FLOP: {best['flops'] / args.gpu_tflops / 1e12 / 3600:.1f} GPU-hours at "
        f"{args.gpu_tflops:.0f} TFLOP/s (assumed); the paper took up to {PAPER_GPU_HOURS} of a V100",
        "",
        f"largest process measured: {join['peak_mb']:.0f} MB; a quantizer is trained on {SAMPLE_BYTES / 1e9:.2f} GB,",
        "which is the most that is added at this size",
    ]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
