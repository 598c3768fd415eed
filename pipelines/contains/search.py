"""The vectors of the images that are asked for, and for each the nearest row of a set, or of the whole pool.

A task reads one part of the pool and all the images, a part at a time; what it finds are 12 bytes an image and place,
merged on the workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, read_table
from curation.embeddings import EmbeddingsPart, covered_rows, embedding_parts
from curation.execute import Executor, Ref
from curation.neighbors import Neighbors, merge_block
from curation.pool import PoolConfig
from curation.selection import selected_rows
from curation.store import Location
from embedding.config import EmbedConfig
from pipelines.contains.target import SetPart, Target, leaf_of
from pipelines.engine import OnStep, finish_step
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.fingerprint import look_outside, prepare
from pipelines.lock import lock_root
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import STEP, structure
from pipelines.rows import by_part, rows_covered
from pipelines.stage import Step
from pipelines.stages.certificate import NEAREST
from pipelines.why.find import name_of
from pipelines.why.run import place_of

PART_ROWS = 2048  # images of a piece of work: a benchmark is some thousand images, and every core is to have some
NAME_COLUMNS = ["key", "source", "member", "offset"]


class Asked(NamedTuple):
    """The images that are asked for."""

    pool: Artifact
    vectors: Artifact


class Found(NamedTuple):
    """The nearest row of each image that was embedded, one part of the images after the other."""

    in_set: np.ndarray  # NEAREST (n,), or (0,) when nothing was looked at
    in_pool: np.ndarray  # the same of all rows with a vector, or (0,) when nobody asked for it
    rows: int  # of the set that were searched
    unread: int  # of the set that could not be embedded


class Answer(NamedTuple):
    """What is to say of one image. JSON-able."""

    image: str  # its name below the source
    key: str
    similarity: float | None  # to the nearest image; None when there is none
    near: dict[str, Any] | None  # that image: name, key, row_id, path and, in a container, inside
    answer: str  # "in": that image is near and in the set; "dropped": near, and of the pool alone; "no": not near


def embed_asked(
    target: Target, images: Location, backbone: str | None, work: Location, executor: LocalExecutor | RayExecutor,
    on_step: OnStep,
) -> Asked:  # fmt: skip
    """List and embed the images as the run embedded its own, into ``work``, which keeps what is done.

    ``backbone``: where the weights are now, if not where the run found them. Raises UserError, also when other weights
    make other vectors.
    """
    leaf = leaf_of(target.descriptor.vectors)
    config: EmbedConfig = structure(EmbedConfig, leaf.manifest["config"], target.descriptor.step)
    config = replace(config, max_bad_fraction=1.0, backbone=backbone or config.backbone)
    pool = PoolConfig(source=images.uri, min_side=1, max_aspect_ratio=1e9, max_pixels=config.max_pixels,
                      max_bad_fraction=1.0, part_rows=PART_ROWS)  # fmt: skip
    reads = {"pool": "images"} | ({"backbone": "backbone"} if config.backbone == STEP else {})
    steps = [Step("images", "pool", pool, {}), Step("vectors", "embed", config, reads)]
    outside = look_outside(steps)
    done = {"backbone": leaf.input("backbone")} if config.backbone == STEP else {}
    with lock_root(work, lambda text: None):
        for step in steps:
            done[step.name] = finish_step(prepare(step, done, work, outside), work, executor, on_step)[0]
    mine, theirs = done["vectors"].facts["backbone"], leaf.facts["backbone"]
    if mine != theirs:
        raise UserError(
            f"the images must be embedded as {target.descriptor.step} was, by {theirs['name']}: "
            f"got other weights or settings of {mine['name']}",
            "name the weights that the run used with --backbone",
        )
    return Asked(done["images"], done["vectors"])


def search(target: Target, asked: Asked, whole_pool: bool, executor: Executor) -> Ref[Found]:
    """The nearest row of every image that was embedded; one task holds 50 bytes an image and place."""
    queries = tuple(embedding_parts(asked.vectors))
    work = partial(search_part, pool=target.pool, selection=target.selection, queries=queries, whole_pool=whole_pool)
    return executor.reduce(work, target.parts, merge_found)


def search_part(
    part: SetPart, pool: Artifact, selection: Artifact | None, queries: Sequence[EmbeddingsPart], whole_pool: bool
) -> Found:
    """What one part of the pool has. Raises UserError when a row of the set was never to be embedded."""
    rows, x = part.vectors.read()
    chosen = selected_rows(pool, selection, part.number).rows
    undecoded = np.isin(chosen, covered_rows(part.rejected))
    chosen = chosen[~undecoded]
    at = rows_covered(chosen, rows, part.embeddings, pool if selection is None else selection)
    start = np.int64(part.start)
    in_set = nearest_of(queries, x[at], chosen + start)
    in_pool = nearest_of(queries, x, rows + start) if whole_pool else np.zeros(0, NEAREST)
    return Found(in_set, in_pool, len(chosen), int(undecoded.sum()))


def nearest_of(queries: Sequence[EmbeddingsPart], x: np.ndarray, row_ids: np.ndarray) -> np.ndarray:
    """NEAREST (n,) of all queries among rows x (m, d); (0,) without rows."""
    if not len(x):
        return np.zeros(0, NEAREST)
    found = [np.zeros(0, NEAREST)]
    for part in queries:
        _, y = part.read()
        best = merge_block(y, x, row_ids, Neighbors.none_yet(len(y), 1))
        found.append(np.empty(len(y), NEAREST))
        found[-1]["row_id"], found[-1]["similarity"] = best.row_ids[:, 0], best.similarity[:, 0]
    return np.concatenate(found)


def merge_found(a: Found, b: Found) -> Found:
    """What earlier parts and later ones have; of equal similarities the earlier row counts."""
    return Found(nearer(a.in_set, b.in_set), nearer(a.in_pool, b.in_pool), a.rows + b.rows, a.unread + b.unread)


def nearer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """NEAREST: of each image the nearer of two rows."""
    if not len(a) or not len(b):
        return a if len(a) else b
    return np.where(b["similarity"] > a["similarity"], b, a)


def totals_of(found: Found) -> tuple[int, int]:
    """Rows of the set that were searched, and that could not be embedded."""
    return found.rows, found.unread


def answers_of_part(index: int, asked: Asked, pool: Artifact, min_similarity: float, found: Found) -> list[Answer]:
    """What is to say of the images of one part."""
    parts = embedding_parts(asked.vectors)
    rows = covered_rows(parts[index].location)
    names = read_table(asked.pool.part(index), NAME_COLUMNS).take(pa.array(rows)).to_pylist()
    mine = slice(parts[index].first, parts[index].first + len(rows))
    low, best = np.float32(min_similarity), found.in_set[mine]
    if not len(found.in_set):
        best = np.full(len(rows), np.array((-1, -np.inf), NEAREST))
    answer = np.where(best["similarity"] >= low, "in", "no").astype("U7")
    if len(found.in_pool):
        elsewhere = found.in_pool[mine]
        dropped = (answer == "no") & (elsewhere["similarity"] >= low)
        answer[dropped], best = "dropped", np.where(dropped, elsewhere, best)
    near = places_of(best["row_id"][best["row_id"] >= 0], pool)
    return [
        Answer(name_of(values), values["key"], None if row_id < 0 else float(similarity), near.get(row_id), word)
        for values, (row_id, similarity), word in zip(names, best.tolist(), answer.tolist(), strict=True)
    ]


def places_of(row_ids: np.ndarray, pool: Artifact) -> Mapping[int, dict[str, Any]]:
    """Name, key and place of some rows of a pool, by position. Reads the parts that hold them."""
    found = {}
    for part, rows in by_part(np.unique(row_ids), pool):
        table = read_table(pool.part(part), NAME_COLUMNS).take(pa.array(rows))
        for row, values in zip(rows.tolist(), table.to_pylist(), strict=True):
            position = row + int(pool.starts[part])
            known = {"row_id": position, "key": values["key"], "name": name_of(values)}
            found[position] = known | place_of(pool, part, values)
    return found
