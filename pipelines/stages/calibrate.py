"""``calibrate``: which threshold tells copies by a descriptor, found on copies of the pool's own images."""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table, write_table
from curation.calibrate import N_THRESHOLDS, Calibration, at_least, false_pairs, pick_thresholds, true_similarities
from curation.embeddings import EmbeddingsPart
from curation.execute import Executor, on_worker
from curation.neighbors import nearest_neighbors
from curation.pool import source_of_part
from curation.selection import selected_rows
from curation.sources import read_checked
from curation.store import Location
from embedding.decode import MAX_PIXELS, BadImage
from embedding.isolate import Call
from embedding.known_copies import TRANSFORMS, CalibrateConfig, known_copies
from pipelines.errors import UserError
from pipelines.executor import Resources
from pipelines.rows import by_part
from pipelines.stage import SCRATCH, SELECTIONS, Inputs, Output, Rows, Stage
from pipelines.stages.embed import (
    Model,
    facts_of,
    load_embedder,
    look,
    resources_of,
    write_part,
)

BLOCK_IMAGES = 32  # that are copied, and then compared, by one task: part of the stage version
CURVE = "curve.parquet"
KINDS = 1 + len(TRANSFORMS)  # files an image: itself, and its copies


class Block(NamedTuple):
    """Some images of the sample."""

    number: int
    row_ids: tuple[int, ...]  # positions in the pool, ascending


class Sample(NamedTuple):
    """Where the images of blocks come from, and where the vectors of their files go."""

    pool: Artifact
    seed: int
    vectors: Location


class Originals(NamedTuple):
    """The images of the sample that are good, with all their copies."""

    row_ids: np.ndarray  # int64 (n,), ascending
    x: np.ndarray  # float32 (n, d), unit rows


def run(config: CalibrateConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write ``part-*`` (similarities of each image to its copies) and ``CURVE``; what is suggested is a fact."""
    pool: Artifact = inputs["pool"]
    n_rows, blocks = draw_blocks(config, pool, inputs.get("selection"), executor)
    model = Model(config.backbone, inputs.get("backbone"), config.pooling, config.precision, config.decoder)
    vectors = embed_blocks(model, Sample(pool, config.seed, out.scratch("vectors")), blocks, out, executor)
    originals = on_worker(executor, read_originals, {"blocks": blocks, "vectors": vectors})
    names = [[part_name(block.number)] for block in blocks]
    out.make(partial(write_images, vectors=vectors, out=out.location), blocks, names, {"originals": originals})
    counts = add_counts(file.counts for file in out.files)
    if counts["kept"] < 2:
        raise UserError(
            f"calibrate needs at least 2 images that decode: got {counts['kept']} of {counts['rows']}",
            "raise n_images, or loosen the selection above it",
        )
    true = np.concatenate(list(executor.map(read_similarities, [out.location / name for [name] in names])))
    thresholds = pick_thresholds(true, N_THRESHOLDS)
    work, shared = partial(count_false, vectors=vectors), {"originals": originals, "thresholds": thresholds}
    false: np.ndarray = executor.reduce(work, blocks, operator.add, shared).get()
    curve = Calibration(thresholds, at_least(true.T, thresholds), false, len(true), n_rows)
    out.files.append(write_table(out.location / CURVE, curve_table(curve)))
    out.facts |= facts_of_curve(curve, config.min_precision)
    return counts


def draw_blocks(
    config: CalibrateConfig, pool: Artifact, selection: Artifact | None, executor: Executor
) -> tuple[int, list[Block]]:
    """How many rows are drawn from, and the drawn ones in blocks cut at fixed places. Raises UserError without two."""
    sizes = [part.rows for part in pool.parts] if selection is None else [p.counts["kept"] for p in selection.parts]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    n_rows = int(starts[-1])
    if n_rows < 2:
        raise UserError(f"calibrate needs at least 2 images: got {n_rows}", "loosen the selection above it")
    rng = np.random.default_rng([config.seed])
    drawn = np.sort(rng.choice(n_rows, min(config.n_images, n_rows), replace=False))
    part = np.searchsorted(starts, drawn, side="right") - 1
    items = [(i, drawn[part == i] - starts[i]) for i in np.unique(part).tolist()]
    picked = executor.map(partial(pick_rows, pool=pool, selection=selection), items)
    row_ids = np.concatenate(list(picked)).tolist()
    cuts = range(0, len(row_ids), BLOCK_IMAGES)
    return n_rows, [Block(i, tuple(row_ids[at : at + BLOCK_IMAGES])) for i, at in enumerate(cuts)]


def pick_rows(item: tuple[int, np.ndarray], pool: Artifact, selection: Artifact | None) -> np.ndarray:
    """int64 (n,): positions in the pool of the n-th selected rows of a part."""
    index, which = item
    row_ids: np.ndarray = selected_rows(pool, selection, index).rows[which] + pool.starts[index]
    return row_ids


def embed_blocks(model: Model, sample: Sample, blocks: Sequence[Block], out: Output, executor: Executor) -> Location:
    """The vectors of all images and their copies, in scratch; ``out`` comes to know what made them."""
    side, resources = Output(sample.vectors, executor), resources_of(executor)
    names = [[part_name(block.number, "rejected"), part_name(block.number)] for block in blocks]
    sizes = Rows("images", [len(block.row_ids) for block in blocks], lambda log: "")
    side.make_by_workers(partial(make_worker, model, sample, resources), blocks, names, resources.gpus, sizes)
    out.facts |= facts_of(sample.vectors / part_name(0))
    return sample.vectors


def make_worker(model: Model, sample: Sample, resources: Resources) -> Callable[[Block], list[FileInfo]]:
    """Load the backbone once, then copy and embed block after block, as the step ``embed`` embeds what it reads."""
    from embedding.embed import ahead

    embedder = load_embedder(model, MAX_PIXELS, resources)
    threads = embedder.threads

    def work(block: Block) -> list[FileInfo]:
        sources: list[str] = []
        note = sample.vectors / SCRATCH / "decoding" / part_name(block.number)
        with embedder.decoding(note) as call:
            make = partial(files_of_image, call=call, seed=sample.seed)
            with closing(ahead(make, read_images_of(block, sample.pool, sources), threads, threads + 1)) as made:
                good, x, bad = embedder.vectors(chain.from_iterable(made), call)
        rejected = [{"row": i, "source": sources[i // KINDS], **vars(why)} for i, why in bad.items()]
        return write_part(sample.vectors, block.number, good, x, rejected, embedder.identity)

    return work


def read_images_of(block: Block, pool: Artifact, sources: list[str]) -> Iterator[tuple[int, bytes]]:
    """Row id and file of each image of a block, in order; their sources are noted."""
    for index, rows in by_part(np.array(block.row_ids), pool):
        table = read_table(pool.part(index)).take(pa.array(rows))
        root, column = source_of_part(pool, index)
        sources += table["source"].to_pylist()
        yield from zip((rows + pool.starts[index]).tolist(), read_checked(root, table, column), strict=True)


def files_of_image(image: tuple[int, bytes], call: Call, seed: int) -> list[bytes]:
    """An image and its copies; so many times itself, when it is bad."""
    row_id, data = image
    copies: list[bytes] | BadImage = call(known_copies, data, seed, row_id, MAX_PIXELS)
    return [data] * KINDS if isinstance(copies, BadImage) else [data, *copies]


def read_vectors(location: Location) -> tuple[np.ndarray, np.ndarray]:
    """int64 (n,): which images of a block are good, with all their copies; float32 (n, KINDS, d) unit rows of them."""
    at, x = EmbeddingsPart(location, 0, 0).read()
    whole = np.flatnonzero(np.bincount(at // KINDS) == KINDS)
    return whole, x[np.isin(at // KINDS, whole)].reshape(-1, KINDS, x.shape[1])


def read_originals(blocks: Sequence[Block], vectors: Location) -> Originals:
    """The good images of all blocks: 4 bytes a number of the sample's vectors, and two blocks more."""
    found = []
    for block in blocks:
        images, x = read_vectors(vectors / part_name(block.number))
        found.append((np.array(block.row_ids)[images], x[:, 0].copy()))
    return Originals(*(np.concatenate(some) for some in zip(*found, strict=True)))


def write_images(block: Block, vectors: Location, out: Location, originals: Originals) -> FileInfo:
    """One part: of each image the similarity of its copies, and the nearest other image; or why it is bad."""
    images, x = read_vectors(vectors / part_name(block.number))
    own = np.searchsorted(originals.row_ids, np.array(block.row_ids, np.int64)[images])
    near = nearest_neighbors(x[:, 0], originals.x, 1, own)
    good = {
        "near_row": pa.array(originals.row_ids[near.row_ids[:, 0]]),
        "near_similarity": pa.array(near.similarity[:, 0]),
        **dict(zip(TRANSFORMS, map(pa.array, true_similarities(x).T), strict=True)),
    }
    n = len(block.row_ids)
    is_good = np.isin(np.arange(n), images)
    place = pa.array(np.maximum(is_good.cumsum() - 1, 0), mask=~is_good)  # null: no image, so nulls
    table = pa.table({"row_id": pa.array(block.row_ids, pa.int64()), **{k: v.take(place) for k, v in good.items()}})
    why = reasons_of_block(vectors / part_name(block.number, "rejected"))
    for name in ("reason", "detail"):
        table = table.append_column(name, pa.array([why.get(i, {}).get(name) for i in range(n)], pa.string()))
    counts = {"rows": n, "kept": len(images), "dropped": 0, "bad": n - len(images)}
    return write_table(out / part_name(block.number), table, counts)


def reasons_of_block(rejected: Location) -> dict[int, dict[str, str]]:
    """Why images of a block are bad: what is said of their first bad file."""
    return {row["row"] // KINDS: row for row in reversed(read_table(rejected).to_pylist())}


def read_similarities(part: Location) -> np.ndarray:
    """float32 (n, k): how similar the copies of the good images of a part are to them."""
    table = read_table(part, [*TRANSFORMS]).drop_null()
    return np.stack([table[name].to_numpy() for name in TRANSFORMS], axis=1)


def count_false(block: Block, vectors: Location, originals: Originals, thresholds: np.ndarray) -> np.ndarray:
    """The false pairs of a block's images and their copies."""
    images, x = read_vectors(vectors / part_name(block.number))
    own = np.searchsorted(originals.row_ids, np.array(block.row_ids, np.int64)[images])
    return false_pairs(x, own, originals.x, thresholds)


def curve_table(curve: Calibration) -> pa.Table:
    """A row a threshold: pairs in the sample, and what they say of the pool, of all copies and of each transform."""
    whole = {
        "threshold": curve.thresholds,
        "true_pairs": curve.true_pairs.sum(axis=0),
        "false_pairs_of_images": curve.false_pairs[0],
        "false_pairs_of_copies": curve.false_pairs[1:].sum(axis=0),
        "recall": curve.recall,
        "precision": curve.precision,
        "false_per_image": curve.false_per_image,
    }
    each = zip(TRANSFORMS, curve.recall_of_each, curve.precision_of_each, strict=True)
    split = {f"{what}_{name}": y for name, *both in each for what, y in zip(("recall", "precision"), both, strict=True)}
    return pa.table({name: pa.array(y, from_pandas=True) for name, y in (whole | split).items()})  # nan: null


def facts_of_curve(curve: Calibration, min_precision: float) -> dict[str, Any]:
    """What the manifest says: the sample, the suggested threshold with what it gives, and sentences about it."""
    facts = {"n_images": curve.n_images, "n_rows": curve.n_rows, "unseen_per_image": curve.unseen_per_image}
    at = curve.suggest(min_precision)
    if at is None:
        best = f"{curve.precision.max():.4f} at most" if len(curve.thresholds) else "no copy is similar at all"
        verdict = f"No threshold has a precision of {min_precision:g} in a pool of {curve.n_rows:,}: {best}."
        return {**facts, "suggested": None, "verdict": verdict, "sure": True}
    threshold = float(str(curve.thresholds[at]))  # the shortest number that is this float32
    recall, precision = float(curve.recall[at]), float(curve.precision[at])
    verdict = (
        f"A min_similarity of {threshold} finds {100 * recall:.1f} % of the known copies, "
        f"with a precision of {precision:.4f} in a pool of {curve.n_rows:,}."
    )
    needed = images_to_be_sure(curve, recall, min_precision)
    if needed > curve.n_images:
        verdict += (
            f" That is not sure: where {curve.n_images:,} images show no false pair, each image of such a pool may "
            f"still have {curve.unseen_per_image:.2g}; n_images: {needed} would tell."
        )
    suggested = {
        "threshold": threshold,
        "recall": recall,
        "precision": precision,
        "false_per_image": float(curve.false_per_image[at]),
        "recall_of_each": dict(zip(TRANSFORMS, curve.recall_of_each[:, at].tolist(), strict=True)),
    }
    return {**facts, "suggested": suggested, "verdict": verdict, "sure": needed <= curve.n_images}


def images_to_be_sure(curve: Calibration, recall: float, min_precision: float) -> int:
    """How large a sample must be for its false pairs to show that this precision is missed, at this recall."""
    allowed = recall * (1 - min_precision) / min_precision  # false pairs an image
    sizes = range(2, curve.n_rows + 1)
    return sizes[bisect_left(sizes, True, key=lambda n: curve._replace(n_images=n).unseen_per_image <= allowed)]


STAGE = Stage(
    version=1,
    config=CalibrateConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
    step_or_value={"backbone": ("train",)},
    look=look,
)
