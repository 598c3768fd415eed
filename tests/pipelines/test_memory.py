"""The memory of a step is the same at 4 and at 32 parts of one size."""

import io
import multiprocessing
import resource
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import EXTRA_STEPS, STEP_OF_STAGE, TRAIN, answer, noise_png, write_head

from curation import cells, decontaminate, seed_sample
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.recipe import parse_recipe
from pipelines.stages import cluster, hops, join, split
from pipelines.stages.table import STAGES

pytestmark = pytest.mark.timeout(900)  # the fixture runs every step at both sizes, each in a process of its own
PART_ROWS = 256
FEW, MANY = 4, 32
SLACK_MB = 10.0  # of 26 MB more images, 12 MB more vectors; up to 8 MB were seen by chance late in a full run


def write_tars(folder: Path, n_tars: int) -> None:
    """Tars of one part each, with pictures of 2 kB that do not compress."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(n_tars)
    for t in range(n_tars):
        with tarfile.open(folder / f"{t:03d}.tar", "w") as tar:
            for i in range(PART_ROWS):
                for suffix, data in (("png", noise_png(rng, 32)), ("cls", b"ab"[i % 2 : i % 2 + 1])):
                    member = tarfile.TarInfo(f"{t:03d}-{i:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def recipe(folder: Path) -> dict[str, Any]:
    pool = {"stage": "pool", "part_rows": PART_ROWS}
    return {
        "steps": {
            "web": {**pool, "source": str(folder / "web")},
            "exam": {**pool, "source": str(folder / "exam")},
            "both": {"stage": "union", "members": ["web", "exam"]},
            "usable": {"stage": "select", "pool": "web", "where": "width >= 24"},
            "web_vec": {"stage": "embed", "pool": "web", "selection": "usable", "backbone": "pixels"},
            "exam_vec": {"stage": "embed", "pool": "exam", "backbone": "pixels"},
            "near": {"stage": "neighbors", "embeddings": "web_vec", "n_neighbors": 4, "min_similarity": 0.99},
            "unique": {"stage": "dedup", "neighbors": "near"},
            "clean": {"stage": "decontaminate", "embeddings": "web_vec", "selection": "unique",
                      "reference": "exam_vec", "min_similarity": 0.99},
            "near_cells": {"stage": "neighbors", "embeddings": "web_vec", "n_neighbors": 4, "min_similarity": 0.9,
                           "method": "cells", "nlist": 16, "nprobe": 2, "recall_queries": 50},
            # pictures of noise are hardly alike: from here on they are all joined, in two hops
            "alike": {"stage": "neighbors", "embeddings": "web_vec", "n_neighbors": 8, "min_similarity": 0.07},
            "clean_components": {"stage": "decontaminate", "embeddings": "web_vec", "reference": "exam_vec",
                                 "neighbors": "alike", "mode": "component", "min_similarity": 0.07,
                                 "max_drop_fraction": 1.0},
            "clean_searched": {"stage": "decontaminate", "embeddings": "web_vec", "reference": "exam_vec",
                               "mode": "component", "min_similarity": 0.07, "max_drop_fraction": 1.0},
            "tree": {"stage": "cluster", "embeddings": "web_vec", "n_clusters": [16, 4], "n_resamples": 1,
                     "resample_size": [4, 2], "n_iter": 3},
            "split_tree": {"stage": "cluster", "embeddings": "web_vec", "n_clusters": [64, 4], "n_splits": [8, 1],
                           "n_resamples": 0, "n_iter": 3},
            "new_tree": {"stage": "assign", "embeddings": "web_vec", "hierarchy": "tree"},
            "near_seeds": {"stage": "retrieve", "mode": "sample", "embeddings": "web_vec", "selection": "usable",
                           "seeds": ["exam_vec"], "n_neighbors": 40, "max_rows": 300, "target": 200},
            "near_clusters": {"stage": "retrieve", "mode": "cluster", "hierarchy": "tree", "seeds": ["exam_vec"],
                              "min_hits": 0, "per_cluster": 100, "max_rows": 300, "level": 1, "target": 200},
            "balanced": {"stage": "sample", "hierarchy": "tree", "target": 900},
            "mixed": {"stage": "mix", "pool": "both", "components": ["balanced", "both"],
                      "homogeneous": {"balanced": 0.1}, "heterogeneous": {"balanced": 0.7, "both": 0.3}},
            "shards": {"stage": "shards", "pool": "web", "shard_rows": 64, "mix_rows": PART_ROWS},
            "mixed_shards": {"stage": "shards", "pool": "both", "selection": "mixed", "shard_rows": 64,
                             "mix_rows": PART_ROWS},
            "found": {"stage": "index", "source": str(folder / "web")},
            "first": {"stage": "train", "shards": "shards", **TRAIN},
            "scored": {"stage": "score", "embeddings": "web_vec", "head": str(folder / "head.safetensors")},
            "liked": {"stage": "select", "pool": "web", "scores": ["scored"], "where": "score > 0.5 and width > 0"},
            "score": {"stage": "evaluate", "backbone": "pixels", "bank": "web", "queries": "exam", "linear_rows": 256},
            "fit": {"stage": "calibrate", "pool": "web", "selection": "usable", "backbone": "pixels", "n_images": 96},
            "page": {"stage": "report"},
        }
    }  # fmt: skip


def peak_of(tree: dict[str, Any], root: str, step: str, told: Any) -> None:
    """In a fresh process: run one step, tell the peak of the resident memory and what it was before, in MB."""
    seed_sample.MIN_SEED_ROWS = 512  # k-means seeds on a sample of bounded size: here both pools are above it
    cells.GROUP_ROWS, cells.SLICE_ROWS, join.RUN_PAIRS = 512, 256, 512  # so are the pieces of a join
    split.PIECE_BYTES = split.ALONE_BYTES = 1 << 18  # and those of first clusters, or their parts
    cluster.AGREEMENT_ROWS = 16  # of 16 parts at most
    hops.FRONTIER_ROWS, decontaminate.FOLD_PAIRS = 64, 1024  # a hop is searched and joined in pieces of bounded size
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what is freed, by chance more or less of it,
    pa.set_cpu_count(1)  # and so does the heap of each of its threads
    pa.set_io_thread_count(1)
    parsed = parse_recipe(tree, STAGES)
    executor = LocalExecutor(Resources(loader_workers=0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in run_recipe(parsed, Location(root), executor, step):
        pass
    told.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[int, dict[str, float]]:
    """Peak memory of every step at both sizes, in MB above that of a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    found: dict[int, dict[str, float]] = {}
    for n_parts in (FEW, MANY):
        folder = tmp_path_factory.mktemp(f"memory-{n_parts}")
        write_tars(folder / "web", n_parts)
        write_head(folder / "head.safetensors")
        for label in "ab":
            (folder / "exam" / label).mkdir(parents=True)
            for i in range(8):
                (folder / "exam" / label / f"{i}.png").write_bytes(noise_png(np.random.default_rng(i + ord(label))))
        tree = recipe(folder)
        found[n_parts] = {}
        for step in tree["steps"]:
            ours, theirs = context.Pipe()
            process = context.Process(target=peak_of, args=(tree, str(folder / "root"), step, theirs))
            process.start()
            found[n_parts][step] = answer(process, ours)
            process.join()
    return found


STEPS = {**STEP_OF_STAGE, "embed": "web_vec", "union": "both", **{step: step for step in EXTRA_STEPS}}


@pytest.mark.parametrize("stage", [*sorted(STAGES), *EXTRA_STEPS])
def test_memory_does_not_grow_with_the_parts(peaks, stage):
    few, many = peaks[FEW][STEPS[stage]], peaks[MANY][STEPS[stage]]
    assert many < few + SLACK_MB, f"{stage}: {few:.1f} MB at {FEW} parts, {many:.1f} MB at {MANY}"
