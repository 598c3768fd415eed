"""How much an encoder learns of CIFAR-10 on a CPU in a given time: its curve, beside raw pixels and random weights.

    python tests/bench/bench_cifar.py --data FOLDER [--minutes M] [--processes N] [--json FILE]

--data: a folder with train-*.parquet and test-*.parquet (columns image and label), as Hugging Face has them. The
training sees the images of train-*, without labels; k-NN accuracies are of 1,000 test images by 5,000 labelled training
images (``evaluate``), those on the way of 2,000 training images by one another. One row of the curve a tenth of the
run. The number of steps follows
from the minutes by the rate of a first run of 40 steps, so the curve of another machine has other steps; ``--json``
holds the settings. Exits with 1 unless loss and entropy fell and the encoder ends 5 points above random weights.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import arguments, peak_mb, report

from curation.artifact import Artifact, read_table
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

BANK, QUERIES = 5000, 1000
LEAST_GAIN = 0.05  # of accuracy above random weights
PROBE_STEPS = 40
FALL = ("loss", "teacher_entropy")  # nats, over a run
TOLD = (
    "step",
    "dino_loss",
    "ibot_loss",
    "teacher_entropy",
    "usage_perplexity",
    "rank",
    "crop_similarity",
    "knn_accuracy",
)
TRAIN: dict[str, Any] = {
    "preset": "small-images", "vit": {"width": 128, "depth": 4, "heads": 2, "patch_size": 4}, "image_size": 24,
    "n_local": 4, "batch": 64, "lr": 1.5e-3, "final_lr": 1e-5, "warmup_steps": 100, "precision": "bfloat16",
    "augment": {"solarize": 0.0}, "knn_images": 2000,
}  # fmt: skip


def recipe(images: Path, few: Path, n_steps: int, n_processes: int) -> dict[str, Any]:
    """The whole run."""
    warmup = min(TRAIN["warmup_steps"], n_steps // 4)
    own = {"n_steps": n_steps, "warmup_steps": warmup, "knn_every": max(1, n_steps // 10)}
    train = {**TRAIN, **own, "stage": "train", "shards": "shards", "group": TRAIN["batch"] // n_processes}
    steps: dict[str, Any] = {
        "images": {"stage": "pool", "source": str(images / "train-*.parquet"), "part_rows": 8192},
        "bank": {"stage": "pool", "source": str(few / "bank.parquet")},
        "queries": {"stage": "pool", "source": str(few / "queries.parquet")},
        "shards": {"stage": "shards", "pool": "images", "shard_rows": 2500},
        "trained": train,
        "random": {**train, "n_steps": 0, "warmup_steps": 0, "knn_every": 0},
    }
    for name in ("pixels", "random", "trained"):
        steps[f"knn_{name}"] = {"stage": "evaluate", "bank": "bank", "queries": "queries", "backbone": name}
    return {"seed": 0, "steps": steps}


def subset(files: Sequence[Path], n: int, seed: int, out: Path) -> None:
    """Write n rows drawn from some Parquet files."""
    table = pa.concat_tables([pq.read_table(file, columns=["image", "label"]) for file in files])
    pq.write_table(table.take(np.sort(np.random.default_rng(seed).permutation(len(table))[:n])), out)


def run(tree: dict[str, Any], root: Path, n_processes: int, until: str | None = None) -> dict[str, Artifact]:
    """The artifacts of a run."""
    executor = LocalExecutor(Resources(loader_workers=0, train_processes=n_processes, checkpoint_every=200))
    results = run_recipe(parse_recipe(tree, STAGES), Location(str(root)), executor, until)
    return {r.name: Artifact(r.location) for r in results if r.location is not None}


def lines_of(trained: Artifact) -> list[dict[str, Any]]:
    """What a training logged."""
    files = sorted((trained.location / "log").path.glob("metrics-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def main() -> None:
    """Train, evaluate, print, and exit with 1 when nothing was learnt."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.data is None:
        parser.error("--data must be given: a folder with train-*.parquet and test-*.parquet of CIFAR-10")
    with tempfile.TemporaryDirectory(prefix="openlvd-") as name:
        at = Path(name)
        subset(sorted(given.data.glob("train-*.parquet")), BANK, given.seed, at / "bank.parquet")
        subset(sorted(given.data.glob("test-*.parquet")), QUERIES, given.seed, at / "queries.parquet")
        probe = run(recipe(given.data, at, PROBE_STEPS, given.processes), at / "root", given.processes, "trained")
        rates = [line["images_per_second"] for line in lines_of(probe["trained"])]
        n_steps = max(PROBE_STEPS, int(60 * given.minutes * np.median(rates[1:]) / TRAIN["batch"]))
        tree = recipe(given.data, at, n_steps, given.processes)
        made = run(tree, at / "root", given.processes)
        lines = lines_of(made["trained"])
        metrics = read_table(made["trained"].part(0)).to_pydict()
        accuracy = {each: made[f"knn_{each}"].facts for each in ("pixels", "random", "trained")}
    measured = [line for line in lines if line["knn_accuracy"] is not None]
    curve = [{key: line[key] for key in TOLD} for line in measured]
    for line in curve:
        print({key: value if value is None else round(value, 3) for key, value in line.items()}, file=sys.stderr)
    part = max(1, n_steps // 20)
    fell = {key: float(np.mean(metrics[key][:part]) - np.mean(metrics[key][-part:])) for key in FALL}
    ours, pixels, random = (accuracy[name]["accuracy"] for name in ("trained", "pixels", "random"))
    missed = [f"{key} rose by {-by:.3f}" for key, by in fell.items() if by <= 0]
    if ours - random < LEAST_GAIN:
        missed.append(f"k-NN accuracy {ours:.3f} is not {LEAST_GAIN} above that of random weights, {random:.3f}")
    row = {
        "case": "cifar10", "unit": "k-NN accuracy", "ours": ours, "peer": pixels, "peer_name": "raw pixels, 16 x 16",
        "ratio": ours / pixels, "random": random, "rows": BANK + QUERIES, "peak_mb": peak_mb(),
        "steps": n_steps, "minutes": given.minutes, "processes": given.processes,
        "images_per_second": float(np.median([line["images_per_second"] for line in lines[1:]])),
    }  # fmt: skip
    more = {"linear": {name: facts.get("linear_accuracy") for name, facts in accuracy.items()}, "fell": fell,
            "curve": curve, "train": tree["steps"]["trained"]}  # fmt: skip
    code = report([row], given, missed)
    if given.json:
        given.json.write_text(json.dumps([{**json.loads(given.json.read_text())[0], **more}], indent=1) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
