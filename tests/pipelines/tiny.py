"""A small pool of real images and a recipe with every stage, for the tests of the pipeline."""

import io
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from embedding.preprocess import PIXELS_WIDTH

N_WEB, N_EXAM = 150, 40
MARK = "OPENLVD_TEST_DRIVER"  # in the environment of everything that a driver starts
AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")  # as the kernel cuts their names


def digit(i: int, side: int = 32) -> Image.Image:
    """One of scikit-learn's handwritten digits as an RGB picture."""
    pixels = (load_digits().images[i] * 255 / 16).astype("u1")
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def make_images(folder: Path) -> None:
    """A crawl with near and exact copies, leaks and broken files, and a labelled exam."""
    target = load_digits().target
    web, exam = folder / "web", folder / "exam"
    web.mkdir(parents=True)
    for i in range(N_WEB):
        digit(i).save(web / f"{i:04d}.png")
    for i in range(0, 40, 4):  # near copies: the picture re-encoded, larger
        digit(i, 48).save(web / f"copy-{i:04d}.jpg", quality=95)
    (web / "again.png").write_bytes((web / "0003.png").read_bytes())
    (web / "broken.jpg").write_bytes((web / "copy-0000.jpg").read_bytes()[:300])
    (web / "page.png").write_bytes(b"<html>not an image</html>")
    digit(7, 4).save(web / "tiny.png")
    for i in range(N_WEB, N_WEB + N_EXAM):
        (exam / str(target[i])).mkdir(parents=True, exist_ok=True)
        digit(i).save(exam / str(target[i]) / f"{i:04d}.png")
    names = [f"{i:04d}.png" for i in range(N_WEB)]
    write_tars(folder / "tars")
    labels = pa.table({"source": names, "label": [str(label) for label in target[:N_WEB]]})
    pq.write_table(labels, folder / "labels.parquet")
    write_head(folder / "head.safetensors")
    for i in range(N_WEB, N_WEB + 5):  # leaks
        digit(i).save(web / f"leak-{i:04d}.png", compress_level=1)


def write_tars(folder: Path) -> None:
    """WebDataset tars of others: eight with seven digits each, one key without an image, and a tar that is cut."""
    folder.mkdir()
    for t in range(8):
        with tarfile.open(folder / f"{t:05d}.tar", "w") as tar:
            for i in range(7 * t, 7 * t + 7):
                out = io.BytesIO()
                digit(i).save(out, "PNG")
                for suffix, data in (("png", out.getvalue()), ("cls", b"%d" % load_digits().target[i])):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            if t == 3:
                tar.addfile(tarfile.TarInfo("9999.txt"))
    whole = (folder / "00005.tar").read_bytes()
    (folder / "00005.tar").write_bytes(whole[: whole.rindex(b"PNG")])


def write_head(path: Path, widths: Sequence[int] = (PIXELS_WIDTH, 8, 1), **metadata: str) -> dict[str, np.ndarray]:
    """A head with random weights, as the stage ``score`` takes it; by default of the backbone "pixels"."""
    rng = np.random.default_rng(0)
    tensors = {}
    for i, (d, h) in enumerate(pairwise(widths)):
        tensors[f"layers.{2 * i}.weight"] = rng.normal(size=(h, d)).astype("f4")
        tensors[f"layers.{2 * i}.bias"] = rng.normal(size=h).astype("f4") / 8
    save_file(tensors, path, metadata={"activation": "gelu", "output": "sigmoid", **metadata})
    return tensors


def noise_png(rng: np.random.Generator, side: int = 24) -> bytes:
    """A picture that does not compress."""
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def answer(process: Any, connection: Any) -> Any:
    """What another process tells us; fails at once when it ends without a word."""
    wait([connection, process.sentinel], timeout=120)
    assert connection.poll(), f"the other process told nothing; exit code {process.exitcode}"
    return connection.recv()


def living(marks: list[str]) -> list[str]:
    """The processes that drivers with these marks have started, and that have not ended.

    But not Ray's two agents, which do none of our work: when their cluster died while it started, they look for it for
    a minute before they end.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ, name = (folder / "environ").read_bytes(), (folder / "comm").read_text().strip()
        except OSError:  # it has just ended, or is another user's
            continue
        if name not in AGENTS and any(f"{MARK}={mark}".encode() in environ.split(b"\0") for mark in marks):
            found.append(f"{folder.name} {name}")
    return found


TRAIN = {
    "vit": {"width": 32, "depth": 2, "heads": 2, "patch_size": 8}, "image_size": 32, "local_size": 16, "n_local": 2,
    "init_gain": 1.0, "head": {"prototypes": 64, "hidden": 32, "bottleneck": 16},
    "ibot_head": {"prototypes": 32, "hidden": 32, "bottleneck": 16}, "n_steps": 6, "warmup_steps": 1, "batch": 16,
}  # fmt: skip


def recipe(folder: Path, part_rows: int = 16) -> dict[str, Any]:
    """Every stage at least once, as a parsed recipe."""
    pixels = {"stage": "embed", "backbone": "pixels"}
    return {
        "seed": 0,
        "resources": {"loader_workers": 0, "checkpoint_every": 2},
        "steps": {
            "web": {
                "stage": "pool", "source": str(folder / "web"), "min_side": 8, "part_rows": part_rows,
                "max_bad_fraction": 0.1,
            },
            "exam": {"stage": "pool", "source": str(folder / "exam"), "part_rows": part_rows},
            "both": {"stage": "union", "members": ["web", "exam"]},
            "usable": {"stage": "select", "pool": "web", "where": "width >= 24"},
            "web_copy": {**pixels, "pool": "web", "selection": "usable"},
            "exam_copy": {**pixels, "pool": "exam"},
            "both_copy": {"stage": "union", "members": ["web_copy", "exam_copy"], "pool": "both"},
            "near": {"stage": "neighbors", "embeddings": "web_copy", "n_neighbors": 8, "min_similarity": 0.99},
            "unique": {"stage": "dedup", "neighbors": "near"},
            "clean": {
                "stage": "decontaminate", "embeddings": "web_copy", "selection": "unique", "reference": "exam_copy",
                "min_similarity": 0.99,
            },
            "raw": {"stage": "shards", "pool": "web", "selection": "usable", "shard_rows": 16, "mix_rows": 40},
            "found": {"stage": "index", "source": str(folder / "tars"), "max_bad_fraction": 0.2},
            "first": {"stage": "train", "shards": "raw", **TRAIN},
            "web_vec": {"stage": "embed", "pool": "web", "selection": "clean", "backbone": "first"},
            "tree": {"stage": "cluster", "embeddings": "web_vec", "n_clusters": [20, 5], "n_resamples": 2,
                     "resample_size": [3, 2]},
            "split_tree": {"stage": "cluster", "embeddings": "web_vec", "n_clusters": [20, 5], "n_splits": [4, 1],
                           "n_resamples": 2, "resample": "random", "weights": "size", "metric": "cosine"},
            "near_seeds": {
                "stage": "retrieve", "mode": "sample", "embeddings": "web_copy", "selection": "unique",
                "seeds": ["exam_copy", "both_copy"], "n_neighbors": 3, "max_rows": 70, "target": 60,
            },
            "exam_vec": {"stage": "embed", "pool": "exam", "backbone": "first"},
            "new_tree": {"stage": "assign", "embeddings": "exam_vec", "hierarchy": "tree"},
            "near_clusters": {
                "stage": "retrieve", "mode": "cluster", "hierarchy": "tree", "seeds": ["exam_vec"], "min_hits": 0,
                "per_cluster": 3, "max_rows": 30, "level": 1, "target": 12,
            },
            "balanced": {"stage": "sample", "hierarchy": "tree", "target": 60},
            "shards": {"stage": "shards", "pool": "web", "selection": "balanced", "shard_rows": 8, "mix_rows": 20},
            "more": {"stage": "union", "members": ["both", "exam"]},
            "mixed": {"stage": "mix", "pool": "more", "components": ["balanced", "exam", "more"],
                      "homogeneous": {"exam": 0.1}, "heterogeneous": {"balanced": 0.7, "more": 0.3}},
            "mixed_shards": {"stage": "shards", "pool": "more", "selection": "mixed", "shard_rows": 16,
                             "mix_rows": 40},
            "score": {"stage": "evaluate", "backbone": "first", "bank": "exam", "queries": "exam", "n_neighbors": 5},
            "alike": {"stage": "neighbors", "embeddings": "web_copy", "n_neighbors": 200, "min_similarity": 0.9},
            "near_cells": {"stage": "neighbors", "embeddings": "web_copy", "n_neighbors": 8, "min_similarity": 0.9,
                           "method": "cells", "nlist": 8, "min_recall": 0.9, "recall_queries": 60},
            "clean_components": {
                "stage": "decontaminate", "embeddings": "web_copy", "reference": "exam_copy", "neighbors": "alike",
                "mode": "component", "min_similarity": 0.95,
            },
            "some_exam": {"stage": "select", "pool": "exam", "where": "label < '2'"},
            "some_copy": {**pixels, "pool": "exam", "selection": "some_exam"},
            "clean_searched": {
                "stage": "decontaminate", "embeddings": "web_copy", "reference": ["some_copy", "exam_copy"],
                "mode": "component", "min_similarity": 0.95,
            },
            "scored": {"stage": "score", "embeddings": "web_copy", "head": str(folder / "head.safetensors"),
                       "column": "aesthetic"},
            "liked": {"stage": "select", "pool": "web", "scores": ["scored"],
                      "where": "aesthetic > 0.4 and bytes > 1200"},
            "fit": {"stage": "calibrate", "pool": "web", "selection": "usable", "backbone": "first", "n_images": 40},
            "page": {"stage": "report", "labels": str(folder / "labels.parquet")},
        },
    }  # fmt: skip


# One step of each stage: the contract is shown on these.
STEP_OF_STAGE = {
    "pool": "web", "union": "both_copy", "select": "usable", "embed": "web_vec", "neighbors": "near", "dedup": "unique",
    "decontaminate": "clean", "retrieve": "near_seeds", "cluster": "tree", "sample": "balanced", "mix": "mixed",
    "shards": "shards", "index": "found", "train": "first", "evaluate": "score", "report": "page",
    "score": "scored", "calibrate": "fit", "assign": "new_tree",
}  # fmt: skip

# Steps that show the contract on what a stage does in another mode.
EXTRA_STEPS = (
    "clean_components", "clean_searched", "liked", "mixed_shards", "near_cells", "near_clusters", "split_tree",
)  # fmt: skip
