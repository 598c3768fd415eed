"""What the embed stage says while it works: progress in images, times in the log, and a GPU that is too small."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from curation.artifact import Artifact, read_table
from curation.store import Location
from embedding.backbone import save_vit
from embedding.flops import vit_flops
from embedding.network import Backbone
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor, Resources, quiet
from pipelines.recipe import parse_recipe
from pipelines.stages import embed
from pipelines.stages.embed import in_words, rates
from pipelines.stages.table import STAGES

N_IMAGES = 10
POOL = {"stage": "pool", "part_rows": 4}
VEC = {"stage": "embed", "pool": "web", "backbone": "pixels"}


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(N_IMAGES):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype("u1")).save(folder / f"{i}.png")
    return str(folder)


def run(root, images, vec=VEC, on_step=lambda name, stage: quiet, **resources):
    recipe = parse_recipe({"steps": {"web": {**POOL, "source": images}, "vec": vec}}, STAGES)
    results = run_recipe(recipe, Location(str(root)), LocalExecutor(Resources(**resources)), on_step=on_step)
    return {result.name: Artifact(result.location) for result in results}


def test_progress_counts_images(tmp_path, images):
    said = []
    made = run(tmp_path / "root", images, on_step=lambda name, stage: lambda *now: said.append((name, *now)))
    sizes = [part.rows for part in made["web"].parts]
    assert len(sizes) > 1
    mine = [now[1:] for now in said if now[0] == "vec"]
    assert mine == [(int(done), N_IMAGES, "images", "") for done in np.cumsum(sizes)]


def test_progress_of_a_network_tells_how_long_it_waits(tmp_path, images, vit):
    said = []
    vec = {**VEC, "backbone": vit}
    run(tmp_path / "root", images, vec, on_step=lambda name, stage: lambda *now: said.append((name, *now)))
    words = [now[4] for now in said if now[0] == "vec"]
    assert words and all(re.fullmatch(r"\d+% waiting for images", text) for text in words), words


def test_rates_and_waiting_are_in_the_log_and_not_in_the_manifest(tmp_path, images):
    made = run(tmp_path / "root", images)["vec"]
    log = json.loads((made.location / "run.jsonl").read().splitlines()[-1])
    assert log["images"] == N_IMAGES
    assert 0 <= log["waiting_seconds"] <= log["worker_seconds"] <= log["seconds"]
    assert 0 <= log["share_waiting"] <= 1
    assert log["images_per_worker_second"] > 0
    assert "waiting" not in json.dumps(made.manifest)


def test_the_share_of_a_gpu_that_is_used_is_in_the_log(tmp_path, images, vit, monkeypatch):
    """Images/s x FLOPs of an image / FLOP/s of the device, as far as these are known."""
    said = []
    monkeypatch.setattr(embed, "peak_of", lambda backbone: 2e9)
    made = run(tmp_path / "root", images, {**VEC, "backbone": vit},
               on_step=lambda name, stage: lambda *now: said.append((name, *now)))["vec"]  # fmt: skip
    log = json.loads((made.location / "run.jsonl").read().splitlines()[-1])
    of_an_image = vit_flops(ViTConfig(width=32, depth=1, heads=2, patch_size=8), 16)
    want = log["images_per_worker_second"] * of_an_image / 2e9
    assert log["mfu"] == pytest.approx(want, rel=0.02, abs=6e-4)  # the log has three digits
    assert log["measured_peak_tflops"] == 0.002
    assert not {"flops", "flops_in_reach"} & set(log)
    assert "mfu" not in json.dumps(made.manifest)
    assert said[-1][4].endswith("% of the GPU's measured peak")


def test_nothing_is_said_of_a_device_whose_peak_is_not_known(tmp_path, images, vit):
    made = run(tmp_path / "root", images, {**VEC, "backbone": vit})["vec"]
    log = json.loads((made.location / "run.jsonl").read().splitlines()[-1])
    assert log["share_waiting"] > 0 and "mfu" not in log and "flops" not in log


def test_rates_by_hand():
    log = {"images": 300, "worker_seconds": 2.0, "waiting_seconds": 0.5}
    assert rates({}) == rates({"images": 3}) == {}
    assert rates(log) == {"images_per_worker_second": 150, "share_waiting": 0.25}
    log |= {"flops": 3e14, "flops_in_reach": 4e14}  # two workers of one GPU each, of 200 TFLOP/s
    assert rates(log) == {
        "images_per_worker_second": 150, "share_waiting": 0.25, "mfu": 0.75, "measured_peak_tflops": 200
    }  # fmt: skip
    assert in_words(log) == "25% waiting for images, 75% of the GPU's measured peak"
    assert in_words({}) == ""


def test_a_batch_that_does_not_fit_the_gpu_says_what_to_set(tmp_path, images, monkeypatch):
    def forward(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    def full(model, resources):
        return Backbone(3, {}, lambda image: image.mean((0, 1)).astype("f4"), forward)

    monkeypatch.setattr(embed, "load_model", full)
    with pytest.raises(
        UserError, match="step vec: 16 images at a time must fit the memory of the GPU: CUDA out of mem"
    ) as e:
        run(tmp_path / "root", images)
    assert "set resources.batch below 16" in e.value.hint


@pytest.fixture
def vit(tmp_path):
    save_vit(tmp_path / "vit", ViT(ViTConfig(width=32, depth=1, heads=2, patch_size=8)), Preprocess(size=16, crop=16))
    return str(tmp_path / "vit")


def test_speed_settings_change_no_byte(tmp_path, images, vit):
    vec = {**VEC, "backbone": vit}
    settings = [{"loader_workers": 0}, {"loader_workers": 3}, {"batch": 3}, {"compile": True}]
    made = [run(tmp_path / str(i), images, vec, **resources)["vec"] for i, resources in enumerate(settings)]
    assert {artifact.digest for artifact in made} == {made[0].digest}
    assert len({artifact.manifest["fingerprint"] for artifact in made}) == 1


def test_a_batch_of_nothing_is_named():
    with pytest.raises(ValueError, match=r"resources\.batch must be at least 1: got 0"):
        Resources(batch=0)


def test_precision_is_another_backbone(tmp_path, images, vit):
    seen = {}
    for precision in ("float32", "bfloat16"):
        vec = {**VEC, "backbone": vit, "precision": precision, "pooling": "cls+mean"}
        seen[precision] = run(tmp_path / "root", images, vec)["vec"]
        assert seen[precision].manifest["facts"]["backbone"]["precision"] == precision
        assert seen[precision].manifest["facts"]["width"] == 64
    assert seen["float32"].digest != seen["bfloat16"].digest


def test_copies_by_hash_and_pictures_of_one_tone(tmp_path):
    """From files to kept rows: a Hamming radius is a similarity, and a blank picture is no copy of another tone."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(load_sample_images().images):
        photo = Image.fromarray(pixels)
        photo.save(folder / f"{i}-large.png")
        photo.resize((320, 213)).save(folder / f"{i}-small.jpg", quality=60)
        ImageOps.mirror(photo).save(folder / f"{i}-mirrored.png")
    for tone in (0, 1, 2, 255):
        Image.new("L", (40, 30), tone).save(folder / f"tone-{tone}.png")
    Image.new("RGB", (50, 50), "white").save(folder / "white.png")
    steps = {
        "web": {**POOL, "source": str(folder)},
        "vec": {"stage": "embed", "pool": "web", "backbone": "phash", "decoder": "scaled"},
        "near": {"stage": "neighbors", "embeddings": "vec", "min_similarity": 1 - 31 / 128},
        "unique": {"stage": "dedup", "neighbors": "near"},
    }
    recipe = parse_recipe({"steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(tmp_path / "root")), LocalExecutor(Resources(loader_workers=0)))
    made = {result.name: Artifact(result.location) for result in results}
    assert made["vec"].facts["backbone"]["name"] == "phash" and made["vec"].facts["width"] == 256
    kept = []
    for i in range(len(made["web"].parts)):
        rows = read_table(made["web"].part(i), ["source"])
        kept += rows.filter(read_table(made["unique"].part(i))["kept"])["source"].to_pylist()
    left = {"0-large.png", "0-mirrored.png", "1-large.png", "1-mirrored.png", "tone-0.png", "tone-1.png", "tone-2.png"}
    assert set(kept) == left | {"white.png"}
