"""How even classes that nobody labelled are in a balanced sample of a long-tailed pool.

The classes are made long-tailed: the sizes fall exponentially from the first class to the last one, which has --tail
times fewer images. Labels are read to make the pool and to count at the end, by nothing between. Encoders, each of
which has seen the pool at most, no label and no test image:

pixels         16 x 16 averages, as ``embed`` makes them
pixels-pca     the same centred, their first 64 principal components
phash          the perceptual hash
vit-untrained  the network of ``cifar10.yaml`` with its initial weights
vit-trained    the same, trained on the pool by the stage ``train`` with the settings of that recipe for --steps steps

The pool, its shards, the networks and the vectors are made by the stages of the pipeline; clusters and samples by the
kernels of ``cluster`` and ``sample``, in memory. As in that recipe there are 50 images for each cluster of the finest
level, 10 clusters for each of the second and 5 for each of the third one, and 5 resamplings, each of the closest half.

A case is an encoder and a target; of each, a line a way: ``random`` (all images alike), ``one-level`` (the clusters of
one k-means, as many as in the finest level, share evenly), ``balanced`` (from the top down), ``labels`` (the classes
share evenly as far as their images go: nothing can be more even). ``ours`` is how many equal classes have the same
entropy, exp(H), and ``peer`` that of ``random``; ``least`` the images of the smallest class over those of the largest;
``kl`` the divergence from even classes in nats, ``kl_sd`` its standard deviation over the seeds; ``of_each`` the images
of each class, the largest of the pool first. ``same_class`` says what the encoder knows of classes: the share of images
whose nearest other one in the pool is of their class, a mean over the classes. All are means over --seeds seeds of
clusters and samples. There are no floors: this measures an encoder.

    python tests/bench/bench_balance.py [--data FOLDER] [--rows N] [--steps N] [--orders N] [--seed S] [--json FILE]

--data: a folder with train-*.parquet, columns image (bytes) and label, such as CIFAR-10 as the Hugging Face hub has it;
without it the handwritten digits of scikit-learn. --rows: images of the largest class. --orders: pools, of which the
first has the classes in the order of their labels and the others in a random one; each trains its own network.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from common import arguments, peak_mb, report
from threadpoolctl import threadpool_limits

from curation.artifact import Artifact, read_table
from curation.balance import balance
from curation.embeddings import read_embeddings
from curation.hierarchy import hierarchical_kmeans
from curation.sampling import equal_shares, sample_hierarchy
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import SHIPPED, parse_recipe
from pipelines.stages.table import STAGES

TAIL = 200.0
TARGETS = (5000, 1000)
RECIPE = SHIPPED / "cifar10.yaml"
POOL_OF_RECIPE = 50_000  # images that its numbers of clusters are for
COMPONENTS = 64
BLOCK = 2048
PART_ROWS = 4096
FEW_STEPS = 60  # without --data
ENCODERS = ("pixels", "pixels-pca", "phash", "vit-untrained", "vit-trained")
WAYS = ("random", "one-level", "balanced", "labels")


class Images(NamedTuple):
    """Files and their classes."""

    files: list[bytes]
    label: np.ndarray  # int64 (n,)


class Case(NamedTuple):
    """Vectors of a pool, and the classes they are counted by."""

    x: np.ndarray  # float32 (n, d)
    label: np.ndarray  # int64 (n,)


def images_in(folder: Path) -> Images:
    """All training images of a folder."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("train-*.parquet")))
    return Images([cell["bytes"] for cell in table["image"].to_pylist()], table["label"].to_numpy())


def digits() -> Images:
    """Handwritten ones, of scikit-learn."""
    from sklearn.datasets import load_digits

    from pipelines.demo_pool import encode, render

    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    return Images([encode(render(image), "PNG") for image in pixels], found.target.astype(np.int64))


def long_tailed(images: Images, most: int | None, tail: float, order: int, seed: int) -> Images:
    """The pool, in random order, its classes by size: class i has 1 / tail ** (i / (classes - 1)) of class 0."""
    rng = np.random.default_rng([seed, order])
    label, sizes = images.label, np.bincount(images.label)
    most, n = min(most or len(label), int(sizes.min())), len(sizes)
    classes = rng.permutation(n) if order else np.arange(n)
    rows = [
        rng.choice(np.flatnonzero(label == c), max(1, round(most * tail ** (-i / max(n - 1, 1)))), replace=False)
        for i, c in enumerate(classes.tolist())
    ]
    chosen = rng.permutation(np.concatenate(rows))
    return Images([images.files[i] for i in chosen.tolist()], np.argsort(classes)[label[chosen]])


def recipe_for(folder: Path, steps: int, backbones: Sequence[str], seed: int) -> dict[str, Any]:
    """From the files to the vectors of these. Labels go along in the pool; no step reads them."""
    trained = yaml.safe_load(RECIPE.read_text())["steps"]["first"]
    trained |= {"shards": "shards", "n_steps": steps, "warmup_steps": min(trained["warmup_steps"], steps // 4)}
    networks = {"vit-untrained": {**trained, "n_steps": 0}, "vit-trained": trained}
    made: dict[str, Any] = {
        "pool": {"stage": "pool", "source": f"{folder}/pool-*.parquet", "part_rows": PART_ROWS},
        "shards": {"stage": "shards", "pool": "pool"},
        **{name: networks[name] for name in backbones if name in networks},
    }
    vectors = {f"{name}-vectors": {"stage": "embed", "pool": "pool", "backbone": name} for name in backbones}
    return {"seed": seed, "steps": made | vectors}


def vectors_of(pool: Artifact, vectors: Artifact) -> Case:
    """Of all parts, with the classes that the pool tells."""
    x, label = [], []
    for i in range(len(pool.parts)):
        rows, some = read_embeddings(vectors.part(i))
        x.append(some.astype(np.float32))
        label.append(read_table(pool.part(i), ["label"])["label"].to_numpy(zero_copy_only=False)[rows].astype(np.int64))
    return Case(np.concatenate(x), np.concatenate(label))


def same_class(case: Case) -> float:
    """The share of images whose nearest other one, by cosine, is of their class; a mean over the classes."""
    x, hit = case.x / np.linalg.norm(case.x, axis=1, keepdims=True), np.zeros(len(case.x), bool)
    for first in range(0, len(x), BLOCK):
        at = np.arange(first, min(first + BLOCK, len(x)))
        cosine = x[at] @ x.T
        cosine[at - first, at] = -np.inf  # itself
        hit[at] = case.label[cosine.argmax(axis=1)] == case.label[at]
    found = np.bincount(case.label, hit) / np.maximum(np.bincount(case.label), 1)
    return float(found.mean())


def principal(x: np.ndarray, n_components: int) -> np.ndarray:
    """Rows on the axes of their largest variance, float32 (n, n_components)."""
    centred = x.astype(np.float64) - x.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :n_components]
    return np.asarray(centred @ axes, np.float32)


def encode_all(images: Images, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Case], float]:
    """The vectors of every encoder that is asked for, and the seconds of the training."""
    cells = [{"bytes": data, "path": str(i)} for i, data in enumerate(images.files)]
    pq.write_table(pa.table({"image": cells, "label": images.label}), folder / "pool-00000.parquet")
    wanted = list(dict.fromkeys("pixels" if name == "pixels-pca" else name for name in args.encoders))
    recipe = parse_recipe(recipe_for(folder, args.steps, wanted, args.seed), STAGES)
    executor, done, seconds = LocalExecutor(Resources(loader_workers=1)), dict[str, Artifact](), {}
    begin = time.perf_counter()
    for result in run_recipe(recipe, Location(str(folder / "root")), executor):
        seconds[result.name], begin = time.perf_counter() - begin, time.perf_counter()
        assert result.location is not None, result
        done[result.name] = Artifact(result.location)
    found = {name: vectors_of(done["pool"], done[f"{name}-vectors"]) for name in wanted}
    if "pixels-pca" in args.encoders:
        found["pixels-pca"] = found["pixels"]._replace(x=principal(found["pixels"].x, COMPONENTS))
    return {name: found[name] for name in args.encoders}, seconds.get("vit-trained", 0.0)


def levels_for(n_rows: int) -> list[int]:
    """Clusters of each level, in the proportions of the recipe."""
    of_recipe = yaml.safe_load(RECIPE.read_text())["steps"]["tree"]["n_clusters"]
    levels = [max(2, round(k * n_rows / POOL_OF_RECIPE)) for k in of_recipe]
    return [k for k, below in zip(levels, [n_rows, *levels], strict=False) if k < below]


def count(case: Case, levels: Sequence[int], targets: Sequence[int], seed: int) -> dict[tuple[int, str], np.ndarray]:
    """Images of each class, int64 (classes,), of each target and way, for one seed."""
    n_resamples = yaml.safe_load(RECIPE.read_text())["steps"]["tree"]["n_resamples"]
    one = hierarchical_kmeans(case.x, levels[:1], np.random.default_rng(seed), n_resamples=0)
    tree = hierarchical_kmeans(case.x, levels, np.random.default_rng(seed), n_resamples)
    n_classes, found = int(case.label.max()) + 1, {}
    for target in targets:
        rng = np.random.default_rng([seed, target])
        rows = {
            "random": rng.choice(len(case.x), target, replace=False),
            "one-level": sample_hierarchy(one, target, rng),
            "balanced": sample_hierarchy(tree, target, rng),
        }
        for way, drawn in rows.items():
            assert len(np.unique(drawn)) == target, (way, target)
            found[target, way] = np.bincount(case.label[drawn], minlength=n_classes)
        found[target, "labels"] = equal_shares(np.bincount(case.label), target, rng)
    return found


def table(
    name: str, counts: dict[tuple[int, str], list[np.ndarray]], known: float, **told: Any
) -> list[dict[str, Any]]:
    """The rows of an encoder."""
    even = {key: [balance(sizes, np.ones(1, np.int64)) for sizes in some] for key, some in counts.items()}
    effective = {key: float(np.mean([one["effective"] for one in some])) for key, some in even.items()}
    rows = []
    for (target, way), some in counts.items():
        kl = [one["kl_to_uniform"] for one in even[target, way]]
        rows.append({
            "case": f"{name} {target} {way}", "ours": effective[target, way], "peer": effective[target, "random"],
            "peer_name": "random", "ratio": effective[target, way] / effective[target, "random"], "unit": "classes",
            "least": float(np.mean([sizes.min() / sizes.max() for sizes in some])), "kl": float(np.mean(kl)),
            "kl_sd": float(np.std(kl)), "same_class": known, "drawn": target, **told, "threads": 1,
            "of_each": np.mean(some, axis=0).round(1).tolist(), "peak_mb": peak_mb(),
        })  # fmt: skip
    return rows


def bench(args: argparse.Namespace) -> int:
    """Make pools, vectors, clusters and samples, and report."""
    images = images_in(args.data) if args.data else digits()
    counts: dict[str, dict[tuple[int, str], list[np.ndarray]]] = {name: {} for name in args.encoders}
    known: dict[str, list[float]] = {name: [] for name in args.encoders}
    sizes, train_seconds = [], []
    for order in range(args.orders):
        pool = long_tailed(images, args.rows, args.tail, order, args.seed)
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            cases, seconds = encode_all(pool, Path(folder), args)
        train_seconds.append(seconds)
        for name, case in cases.items():
            n_rows = len(case.x)
            sizes.append(n_rows)
            known[name].append(same_class(case))
            levels = args.n_clusters or levels_for(n_rows)
            targets = sorted({min(target, n_rows // 2) for target in args.targets}, reverse=True)
            for seed in range(args.seed, args.seed + args.seeds):
                for key, drawn in count(case, levels, targets, seed).items():
                    counts[name].setdefault(key, []).append(drawn)
            print(f"{name}: pool {np.bincount(case.label).tolist()}, {levels} clusters", file=sys.stderr)
    told = {"rows": max(sizes), "tail": args.tail, "seeds": args.seeds, "orders": args.orders, "n_clusters": levels}
    if "vit-trained" in args.encoders:
        told |= {"steps": args.steps, "train_s": float(np.mean(train_seconds))}
    tables = [table(name, counts[name], float(np.mean(known[name])), **told) for name in args.encoders]
    code = report([row for rows in tables for row in rows], args)
    for target in args.targets:
        if target not in targets:
            print(f"a sample of {target} was asked for: the pool has {n_rows}, so half of it was drawn at most")
    return code


def main() -> int:
    """Parse the arguments and run."""
    parser = arguments(str(__doc__))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--tail", type=float, default=TAIL, help="images of the largest class for each of the smallest")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="images of a sample")
    parser.add_argument("--n-clusters", type=int, nargs="+", help="of each level, instead of the recipe's proportions")
    parser.add_argument("--steps", type=int, help="of the training; default: the recipe's, few without --data")
    parser.add_argument("--seeds", type=int, default=3, help="clusterings and samples that all figures are means of")
    parser.add_argument("--orders", type=int, default=1)
    args = parser.parse_args()
    if args.steps is None:
        args.steps = yaml.safe_load(RECIPE.read_text())["steps"]["first"]["n_steps"] if args.data else FEW_STEPS
    with threadpool_limits(1):
        return bench(args)


if __name__ == "__main__":
    sys.exit(main())
