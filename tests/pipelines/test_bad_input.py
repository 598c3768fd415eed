"""What a user gave that cannot be used: one sentence that names it, a hint, exit code 2, and nothing half-written."""

import errno
import json
import os
import re
import signal
import sys
import tempfile
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from curation.store import Location
from embedding.backbone import save_vit
from embedding.hf_weights import save_hf
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines.cli import main
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

N_IMAGES, PART_ROWS = 10, 4


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(N_IMAGES):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def steps_of(source, **vec):
    vec = {"vec": {"stage": "embed", "pool": "web", **vec}} if vec else {}
    return {"web": {"stage": "pool", "source": str(source), "part_rows": PART_ROWS}, **vec}


def run(root, steps, executor=None):
    recipe = parse_recipe({"steps": steps}, STAGES)
    return list(run_recipe(recipe, Location(str(root)), executor or LocalExecutor(recipe.resources)))


def refused(root, steps, words, executor=None):
    """The hint of a run that ends with these words."""
    with pytest.raises(UserError, match=words) as caught:
        run(root, steps, executor)
    assert "\n" not in caught.value.message
    return caught.value.hint


def left_by(root, step):
    """The files of a step but its log and scratch."""
    files = {path.name for path in root.glob(f"{step}/*/*") if path.is_file()}
    return sorted(files - {"run.jsonl"})


@pytest.fixture
def openlvd(tmp_path, monkeypatch, capfd):
    """Runs a command in this process that ends with exit code 2: its sentence and its hint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # what a scheduler's stop does to these tests stays

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["openlvd", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, said = capfd.readouterr()
        assert (ended.value.code, out) == (2, "")
        *_, sentence, between, hint = said.strip().split("\n")
        assert between == ""
        return sentence.removeprefix("error: "), hint.removeprefix("hint: ")

    return command


LONG = "x" * 300
PLACES = {
    "is not there": ("nowhere", "web: no folder or file .*/nowhere$"),
    "leads nowhere": ("dangling", "web: no folder or file .*/dangling$"),
    "leads round": ("loop", "web: no folder or file .*/loop$"),
    "is below a file": ("file.png/images", "web: no folder or file .*/file.png/images$"),
    "has too long a name": (LONG, f"web: cannot read .*/{LONG}: {os.strerror(errno.ENAMETOOLONG)}$"),
    "fits no file": ("*.jpg", r"web: no file that fits .*/\*\.jpg$"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_source_that_leads_to_nothing(tmp_path, name):
    place, words = PLACES[name]
    (tmp_path / "file.png").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    assert "check the path" in refused(tmp_path / "root", steps_of(tmp_path / place), words)
    assert not (tmp_path / "root").exists()


@contextmanager
def without_rights():
    """As a user who may read nothing that is not his, though the tests may run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_read(tmp_path):
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "images")
        source.mkdir(mode=0)
        Path(place).chmod(0o755)
        with without_rights():
            hint = refused(Path(place, "root"), steps_of(source), f"web: cannot read {source}: Permission denied$")
        assert "who may read it" in hint
        assert not Path(place, "root").exists()


def test_a_folder_that_cannot_be_listed(tmp_path, images, monkeypatch):
    """A broken disk is no empty folder."""
    listed = os.scandir

    def broken(path):
        if str(path) == str(images):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", broken)
    assert "check the path" in refused(tmp_path / "root", steps_of(images), f"web: cannot read {images}: Input/output")
    assert not (tmp_path / "root").exists()


def test_a_prefix_that_s3_refuses(tmp_path, on_s3, monkeypatch):
    (on_s3 / "a.png").write(b"x")

    def refuse(self):
        raise PermissionError(f"S3 refused {self}: Access Denied")

    monkeypatch.setattr(Location, "below", refuse)
    hint = refused(tmp_path / "root", steps_of(on_s3), f"web: S3 refused {on_s3}: Access Denied$")
    assert "who may read it" in hint
    assert not (tmp_path / "root").exists()


def test_a_pool_that_is_all_bad(tmp_path, openlvd):
    """It stops at ``max_bad_fraction`` and shows the first reasons."""
    (tmp_path / "bad").mkdir()
    for i in range(9):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"\xff\xd8\xff" * i)
    steps = json.dumps({"steps": steps_of(tmp_path / "bad")})
    (tmp_path / "recipe.yaml").write_text(steps)
    sentence, hint = openlvd("run", "recipe.yaml", "--root", "root")
    start, first, *others = re.split(r"(?<=\)); ", sentence)
    assert start.startswith(
        "step web: at most 0.05 of the images may be bad (max_bad_fraction): got 9 of 9, first 0.jpg ("
    )
    assert [first[:6], len(others)] == ["1.jpg ", 1]
    assert "raise max_bad_fraction" in hint
    assert not [name for name in left_by(tmp_path / "root", "web") if not name.startswith("rejected-")]


VIT = ViTConfig(width=32, depth=1, heads=2, patch_size=8)
HF = ViTConfig(
    width=32, depth=1, heads=2, patch_size=8, position="learned", image_size=16, key_bias=True, n_registers=0
)
PREPROCESS = Preprocess(size=16, crop=16)


def test_a_hugging_face_folder_without_its_preprocessing(tmp_path, images, openlvd):
    """Told before the pool is looked at."""
    save_hf(tmp_path / "model", ViT(HF), PREPROCESS)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    (tmp_path / "recipe.yaml").write_text(json.dumps({"steps": steps_of(images, backbone="model")}))
    sentence, hint = openlvd("run", "recipe.yaml", "--root", "root")
    assert sentence.startswith(
        "a Hugging Face backbone must come with its preprocessing: no preprocessor_config.json in"
    )
    assert "a model is a folder as its makers published it" in hint
    assert not (tmp_path / "root").exists()


FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "a backbone folder must hold config.json: .*/model does not"),
    "spoilt config": (lambda f: (f / "config.json").write_text("{"), "config.json must be a JSON object: "),
    "spoilt preprocessing": (
        lambda f: (f / "preprocessor_config.json").write_text("[]"),
        "preprocessor_config.json must be a JSON object as transformers writes it: ",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold its weights as \\*.safetensors"),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("stage", ["embed", "evaluate"])
def test_a_model_folder_that_lacks_something(tmp_path, images, name, stage):
    change, words = FOLDERS[name]
    save_hf(tmp_path / "model", ViT(HF), PREPROCESS)
    change(tmp_path / "model")
    steps = steps_of(images)
    steps["last"] = {"stage": stage, "backbone": str(tmp_path / "model")}
    steps["last"] |= {"pool": "web"} if stage == "embed" else {"bank": "web", "queries": "web"}
    assert "a model is a folder" in refused(tmp_path / "root", steps, words)
    assert not (tmp_path / "root").exists()


def test_a_torchscript_file_that_is_not_there(tmp_path, images):
    refused(tmp_path / "root", steps_of(images, backbone=str(tmp_path / "sscd_x.pt")), "no file .*/sscd_x.pt$")
    assert not (tmp_path / "root").exists()


WEIGHTS = {
    "missing": (lambda t, name: t.pop(name), "1 are missing, first {}$"),
    "unexpected": (lambda t, name: t.update({"layernorm.x": torch.ones(1)}), "1 too many, first layernorm.x$"),
    "misshapen": (lambda t, name: t.update({name: torch.ones(3)}), r"{} must be \(32,\): got \(3,\)$"),
}


@pytest.mark.parametrize(("kind", "damage"), [*product(("own", "hugging face"), WEIGHTS), ("own, on ray", "missing")])
def test_weights_that_do_not_match_the_config(tmp_path, images, kind, damage, request):
    save, config, name = (save_hf, HF, "layernorm.bias") if kind == "hugging face" else (save_vit, VIT, "norm.bias")
    save(tmp_path / "model", ViT(config), PREPROCESS)
    change, words = WEIGHTS[damage]
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors, name)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    steps = steps_of(images, backbone=str(tmp_path / "model"))
    executor = request.getfixturevalue("ray_executor") if kind == "own, on ray" else None
    hint = refused(tmp_path / "root", steps, f"step vec: .*/model.* must hold .*: {words.format(name)}", executor)
    assert "a model is a folder" in hint
    assert left_by(tmp_path / "root", "vec") == []


def spoil(path):
    """Other bytes, while size and time say that nothing happened."""
    facts = path.stat()
    path.write_bytes(path.read_bytes()[:-9] + b"something")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def lengthen(path):
    facts = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


CHANGES = {
    "other bytes": (spoil, "its bytes have changed since"),
    "another size": (lengthen, r"it had \d+ bytes and has \d+"),
    "gone": (Path.unlink, "it is gone"),
}


@pytest.mark.parametrize("stage", ["embed", "shards"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_image_that_changed_after_its_pool(tmp_path, images, openlvd, change, stage):
    """The parts before it are kept; a run of the recipe looks anew at what has another size or time."""
    spoilt, words = CHANGES[change]
    run(tmp_path / "root", steps_of(images))
    (pool,) = (tmp_path / "root" / "web").iterdir()
    spoilt(images / "5.png")
    step = {"stage": stage, "pool": "web"} | ({"backbone": "pixels"} if stage == "embed" else {"mix_rows": 4})
    arguments = {"embed": ["--backbone", "pixels"], "shards": []}[stage]
    sentence, hint = openlvd(stage, "--pool", pool, *arguments, "--out", "made")
    assert re.search(f"{images}/5.png must hold the image that the pool saw: {words}$", sentence)
    assert "put the old file back, or make the pool anew" in hint
    assert not (tmp_path / "made" / "manifest.json").exists()
    if stage == "embed":
        assert [path.name for path in (tmp_path / "made").glob("part-*")] == ["part-0000000.parquet"]
    if change != "other bytes":  # of which a listing sees nothing
        last = run(tmp_path / "root", steps_of(images) | {"last": step})[-1]
        assert last.counts["rows"] == N_IMAGES - (change == "gone")
        return
    refused(tmp_path / "root", steps_of(images) | {"last": step}, f"step last: .*5.png must hold .*: {words}$")
    assert left_by(tmp_path / "root", "last").count("manifest.json") == 0
    os.utime(images / "5.png")
    assert run(tmp_path / "root", steps_of(images) | {"last": step})[-1].state == "done"


def test_an_image_that_changed_is_named_on_ray_too(tmp_path, images, ray_executor):
    run(tmp_path / "root", steps_of(images))
    spoil(images / "5.png")
    steps = steps_of(images, backbone="pixels")
    words = "step vec: .*/5.png must hold the image that the pool saw: its bytes have changed since$"
    assert "make the pool anew" in refused(tmp_path / "root", steps, words, ray_executor)
    assert "manifest.json" not in left_by(tmp_path / "root", "vec")
