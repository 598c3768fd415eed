"""Tars of others: what the stage ``index`` says of them, and ``openlvd train PATH`` on a folder of them."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny import TRAIN

from curation.artifact import Artifact, read_table
from curation.store import Location
from pipelines.cli import app
from pipelines.commands import with_flag
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES
from pipelines.train_command import default_place, facts_of, short_name
from training.stream import Stream, locate_tar, read_images

SETTINGS = ["--n-steps", "2", "--batch", "8", "--vit", "{width: 32, depth: 1, heads: 2}", "--n-local", "1"]


def png(seed, side=24):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path):
    """Three tars with ten samples each, in a folder and one below it, beside what is no tar."""
    for t, name in enumerate(("a.tar", "b.tar", "more/c.tar")):
        members = [m for i in range(10) for m in ((f"{i:03d}.png", png(10 * t + i)), (f"{i:03d}.cls", b"%d" % (i % 3)))]
        write_tar(tmp_path / "tars" / name, members)
    (tmp_path / "tars" / "README.md").write_text("mine")
    (tmp_path / "tars" / "stray.png").write_bytes(png(99))
    return tmp_path / "tars"


def index(tmp_path, source, root="root", **settings):
    steps = {"found": {"stage": "index", "source": str(source), **settings}}
    recipe = parse_recipe({"steps": steps}, STAGES)
    (result,) = run_recipe(recipe, Location(str(tmp_path / root)), LocalExecutor(recipe.resources))
    return Artifact(result.location), result


def openlvd(*args):
    app([str(arg) for arg in args], standalone_mode=False)


def images_of(artifact, n):
    stream = Stream(artifact.location, batch=n)
    return set(read_images(artifact.location, stream.batch(0)))


def test_every_image_of_every_tar_is_read_where_it_is(tmp_path, tars):
    found, result = index(tmp_path, tars)
    assert result.counts == {"rows": 30, "kept": 30, "dropped": 0, "bad": 0, "seen_per_epoch": 30, "unused_images": 0,
                             "shards": 3, "broken_tars": 0, "ignored_files": 2}  # fmt: skip
    assert images_of(found, 30) == {png(i) for i in range(30)}
    assert [locate_tar(found.location, i).uri for i in range(3)] == [
        f"{tars}/{name}" for name in ("a.tar", "b.tar", "more/c.tar")
    ]
    assert found.kind == "shards" and found.stage == "index"
    assert sum(file.bytes for file in found.files) < sum(path.stat().st_size for path in tars.rglob("*.tar")) / 2
    assert read_table(found.part(1), ["label"])["label"].to_pylist()[:4] == ["0", "1", "2", "0"]


@pytest.mark.parametrize(("source", "n"), [("a.tar", 10), ("*.tar", 20), ("**/*.tar", 30), ("list.txt", 20)])
def test_a_source_is_a_tar_a_pattern_or_a_list(tmp_path, tars, source, n):
    (tars / "list.txt").write_text("b.tar\nmore/c.tar\n")
    found, result = index(tmp_path, tars / source)
    assert result.counts["kept"] == n
    assert len(images_of(found, n)) == n


def test_tars_on_s3(tars, on_s3, tmp_path):
    for path in tars.rglob("*.tar"):
        (on_s3 / f"tars/{path.relative_to(tars)}").write(path.read_bytes())
    there, _ = index(tmp_path, f"{on_s3}/tars", "there")
    here, _ = index(tmp_path, tars, "here")
    assert there.digest == here.digest  # neither times nor ETags are in it
    assert images_of(there, 30) == {png(i) for i in range(30)}
    openlvd("train", f"{on_s3}/tars", *SETTINGS, "--out", f"{on_s3}/encoder", "--resources-loader-workers", 0)
    assert Artifact(on_s3 / "encoder").counts["rows"] == 16


def test_tars_that_move_are_the_same(tmp_path, tars):
    """Their index is of the names below the source; what is trained on it is found again."""
    first, _ = index(tmp_path, tars)
    shutil.copytree(tars, tmp_path / "elsewhere", copy_function=shutil.copy2)
    shutil.rmtree(tars)
    second, result = index(tmp_path, tmp_path / "elsewhere")
    assert (result.state, second.location) == ("done before", first.location)
    other, result = index(tmp_path, tmp_path / "elsewhere", "other")
    assert (result.state, other.digest) == ("done", first.digest)


def test_new_tars_are_noticed(tmp_path, tars):
    first, _ = index(tmp_path, tars)
    write_tar(tars / "d.tar", [("1.png", png(50))])
    second, result = index(tmp_path, tars)
    assert (result.state, result.counts["kept"]) == ("done", 31)
    assert second.digest != first.digest


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


BROKEN = ("truncated", "not_a_tar")
BAD = {
    "cut": (cut, {"truncated": 1}, 1),
    "no bytes": (lambda path: path.write_bytes(b""), {"truncated": 1}, 0),
    "no tar": (lambda path: path.write_text("<html>" * 200), {"not_a_tar": 1}, 0),
    "no samples": (lambda path: write_tar(path, []), {}, 0),
    "no image": (lambda path: write_tar(path, [("a.txt", b"x"), ("b.png", png(101))]), {"no_image": 1}, 1),
    "no good image": (lambda path: write_tar(path, [("a.png", b"x"), ("b.png", png(101))]), {"undecodable": 1}, 1),
    "one key twice": (
        lambda path: write_tar(path, [("a.png", png(101)), ("b.png", png(102)), ("a.png", png(103))]),
        {"duplicate_key": 1},
        2,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_counted_and_listed(tmp_path, tars, name):
    spoil, reasons, kept = BAD[name]
    spoil(tars / "b.tar")
    broken = sum(reasons.get(reason, 0) for reason in BROKEN)
    found, result = index(tmp_path, tars, max_bad_fraction=0.4 if broken else 0.1)
    counts = result.counts
    bad = sum(n for reason, n in reasons.items() if reason not in ("duplicate_key", *BROKEN))
    assert (counts["kept"], counts["bad"], counts["broken_tars"]) == (20 + kept, bad, broken)
    assert counts["dropped"] == reasons.get("duplicate_key", 0)
    assert counts["rows"] == counts["kept"] + counts["bad"] + counts["dropped"]
    listed = read_table(found.part(1, "rejected")).to_pylist()
    assert {row["reason"]: 1 for row in listed} == reasons
    assert all(row["source"] == "b.tar" and row["detail"] for row in listed)
    assert len(images_of(found, 200)) == 20 + kept


def refused(words, tmp_path, source, **settings):
    with pytest.raises(UserError, match=words) as caught:
        index(tmp_path, source, **settings)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value.hint


def test_too_much_that_is_bad_stops(tmp_path, tars):
    write_tar(tars / "b.tar", [("a.txt", b"x"), ("b.json", b"{}"), ("c.png", png(1))])
    words = r"may be bad \(max_bad_fraction\): got 2 of 23, first b.tar \(no member of this key is an image\); b.tar"
    assert "raise max_bad_fraction" in refused(words, tmp_path, tars)
    assert index(tmp_path, tars, max_bad_fraction=0.1)[1].counts["bad"] == 2


@pytest.mark.parametrize("name", ["cut", "no tar"])
def test_too_many_tars_that_break_off_stop(tmp_path, tars, name):
    """However many samples the others hold: nobody knows what they have cost."""
    BAD[name][0](tars / "b.tar")
    words = (
        r"at most 0.05 of the tars may break off or be none \(max_bad_fraction\): got 1 of 3, first b.tar \(tar .+\)$"
    )
    assert "raise max_bad_fraction" in refused(words, tmp_path, tars)
    counts = index(tmp_path, tars, max_bad_fraction=0.34)[1].counts
    assert (counts["broken_tars"], counts["bad"], counts["shards"]) == (1, 0, 3)


def test_no_sample_at_all_stops(tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", [])
    hint = refused(r"at least one sample: got none in 1 of .*/tars$", tmp_path, tmp_path / "tars")
    assert "an image in a tar" in hint


@pytest.mark.parametrize("name", ["c.tar.gz", "c.tgz"])
def test_compressed_tars_are_refused(tmp_path, tars, name):
    with tarfile.open(tars / name, "w:gz") as tar:
        tar.add(tars / "stray.png")
    assert "gunzip" in refused(rf"must hold plain tars: got compressed {name} in", tmp_path, tars)
    assert "gunzip" in refused(rf"compressed .*{name}", tmp_path, tars / name)
    (tars / name).rename(tars / "c.tar")
    assert "gunzip" in refused(r"tars/c.tar must be a plain tar: it is compressed$", tmp_path, tars)


def test_a_folder_without_tars_is_refused(tmp_path, tars):
    shutil.rmtree(tars / "more")
    for path in tars.glob("*.tar"):
        path.unlink()
    assert "pool and shards" in refused(r"must hold WebDataset tars: got none in .*/tars$", tmp_path, tars)
    refused(r"no folder or file .*/nowhere$", tmp_path, tmp_path / "nowhere")
    assert not (tmp_path / "root").exists()


def test_shards_with_an_index_of_their_own_are_refused(tmp_path, tiny):
    """One that is not finished would be trained on without its counts."""
    made = tiny.artifact("raw").location
    assert "trained on as they are" in refused("must hold tars without an index", tmp_path, made)


def test_a_tar_that_goes_while_it_is_indexed(tmp_path, tars):
    (tars / "d.tar").symlink_to("nowhere")
    assert "put it back" in refused(
        r"tars/d.tar must be one of the tars: it cannot be read: it is gone", tmp_path, tars
    )


def test_an_index_is_made_a_tar_a_task_and_goes_on(tmp_path, tars):
    """What a stopped step has left of it is not made again."""
    found, _ = index(tmp_path, tars)
    stamps = {path.name: path.stat().st_mtime_ns for path in found.location.path.glob("*.parquet")}
    (found.location.path / "manifest.json").unlink()
    (found.location.path / "scratch").mkdir()
    shutil.copy(found.location.path / "run.jsonl", tmp_path)
    (found.location.path / "part-0000001.parquet").unlink()
    from pipelines.engine import NUMERICS, numerics_tag

    (found.location.path / "scratch" / NUMERICS).write_bytes(numerics_tag())
    _, result = index(tmp_path, tars)
    now = {path.name: path.stat().st_mtime_ns for path in found.location.path.glob("*.parquet")}
    assert {name for name in stamps if stamps[name] != now[name]} == {
        "part-0000001.parquet",
        "rejected-0000001.parquet",
    }
    assert result.counts["kept"] == 30


# openlvd train PATH


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_folder_of_tars_is_all_that_train_needs(tars, here, capfd):
    """In steps of our own, for a test; what is suggested is said, with its reason."""
    speed = ["--resources-loader-workers", "0"]
    openlvd("train", tars, *SETTINGS, *speed)
    said = capfd.readouterr().err
    encoder, (made,) = Artifact(Location(str(here / "tars-encoder"))), (here / "tars-index").iterdir()
    assert f"the encoder goes to {here}/tars-encoder" in said
    assert f"{tars} has no index, so one was made: 30 images in 3 tars, at {made}" in said
    assert "for 30 images on a CPU" in said
    assert '\n  head {"prototypes": 16, "hidden": 256, "bottleneck": 64}: few, for 30 images' in said
    config = encoder.manifest["config"]
    assert (config["image_size"], config["local_size"], config["n_steps"], config["batch"]) == (24, 12, 2, 8)
    assert config["vit"]["width"] == 32 and config["vit"]["patch_size"] == 4 and config["n_local"] == 1
    assert config["augment"]["blur"] == [0.0, 0.0, 0.0]
    assert encoder.manifest["inputs"]["shards"]["path"] == str(made)
    openlvd("train", tars, *SETTINGS, *speed)
    said = capfd.readouterr()
    assert "was indexed before" in said.err and "done before" in said.out
    openlvd("train", made, *SETTINGS, *speed, "--out", "again")
    assert Artifact(Location(str(here / "again"))).digest == encoder.digest
    assert sorted(path.name for path in here.iterdir()) == ["again", "tars-encoder", "tars-index"]


def test_a_preset_counts_as_given(tars, here, capfd):
    (here / "mine.yaml").write_text("{n_steps: 1, batch: 4, vit: {width: 32, depth: 1}, warmup_steps: 0}")
    openlvd("train", tars, "--preset", "mine.yaml", "--vit", "{heads: 2, depth: 2}", "--n-local", "1")
    said = capfd.readouterr().err
    assert "for 30 images on a CPU, beside mine.yaml what depends on the data is set to:" in said
    config = Artifact(Location(str(here / "tars-encoder"))).manifest["config"]
    assert [config["vit"][key] for key in ("width", "depth", "heads", "patch_size")] == [32, 2, 2, 16]
    assert (config["n_steps"], config["batch"], config["image_size"]) == (1, 4, 32)
    assert config["vit"]["layer_scale"] == 1e-5 and config["init_gain"] is None
    assert "  n_steps" not in said and "  image_size 32: " in said


def test_a_shorter_run_has_a_shorter_warm_up_than_its_preset(tars, here, capfd):
    (here / "mine.yaml").write_text("{n_steps: 1000, warmup_steps: 500, batch: 4, head: {prototypes: 32}}")
    openlvd("train", tars, "--preset", "mine.yaml", "--vit", "{heads: 2, width: 32, depth: 1}", "--n-steps", "4")
    assert Artifact(Location(str(here / "tars-encoder"))).manifest["config"]["warmup_steps"] == 2
    assert "  warmup_steps 2: 500 of 1,000 in the preset, so as many of 4" in capfd.readouterr().err


INIT_STEPS = ["--n-steps", "2", "--batch", "8", "--n-local", "1", "--resources-loader-workers", "0"]


def test_a_training_begins_with_what_another_has_left(tars, here, capfd):
    """The artifact, its files alone, and its export: none of them needs its shape told again."""
    shape = "{width: 32, depth: 1, heads: 2, n_registers: 1}"
    openlvd("train", tars, *INIT_STEPS, "--vit", shape, "--out", "first")
    first = Artifact(Location(str(here / "first")))
    (here / "files").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "files" / name).write_bytes((first.location / name).read())
    openlvd("export", "first", "--out", "exported")
    digests = set()
    for init in ("first", "./files", "exported"):
        openlvd("train", tars, *INIT_STEPS, "--init", init, "--n-steps", "0", "--out", f"from-{Path(init).name}")
        made = Artifact(Location(str(here / f"from-{Path(init).name}")))
        vit = made.manifest["config"]["vit"]
        assert [vit[key] for key in ("width", "depth", "n_registers", "layer_scale")] == [32, 1, 1, None]
        assert "vit {" in (said := capfd.readouterr().err) and "the shape of what the training begins with" in said
        theirs = load_file(first.location.path / "model.safetensors")
        for name, value in load_file(made.location.path / "model.safetensors").items():
            assert (value - theirs[name]).abs().max() == 0, (init, name)
        digests.add(made.manifest["fingerprint"])
    assert len(digests) == 3


def test_learned_positions_come_to_the_crops(tars, here):
    shape = "{width: 32, depth: 1, heads: 2, position: learned, image_size: 24, key_bias: true, norm_eps: 1.0e-6}"
    openlvd("train", tars, *INIT_STEPS, "--vit", shape, "--out", "first")
    openlvd("export", "first", "--out", "exported")
    openlvd("train", tars, *INIT_STEPS, "--init", "exported", "--image-size", "32", "--local-size", "16", "--out", "o")
    vit = Artifact(Location(str(here / "o"))).manifest["config"]["vit"]
    assert (vit["position"], vit["image_size"], vit["n_registers"], vit["key_bias"]) == ("learned", 32, 4, True)


@pytest.mark.parametrize("init", ["first", "exported"])
def test_another_shape_is_told_before_anything_is_made(tars, here, init):
    openlvd("train", tars, *INIT_STEPS, "--vit", "{width: 32, depth: 1, heads: 2}", "--out", "first")
    openlvd("export", "first", "--out", "exported")
    init = str(here / init)
    words = rf"backbone of the shape of train.vit: {init} has width 32 \(64 here\), depth 1 \(2 here\)$"
    sizes = ["--warmup-steps", "0", "--image-size", "24", "--local-size", "12", "--out", "o"]
    vit = "{width: 64, depth: 2, heads: 2, patch_size: 4, layer_scale: null}"
    for how in ([tars], ["--shards", next((here / "tars-index").iterdir())]):
        with pytest.raises(UserError, match=words) as caught:
            openlvd("train", *how, *INIT_STEPS, *sizes, "--vit", vit, "--init", init)
        assert caught.value.hint.startswith("set train.vit: {width: 32, depth: 1}; ")
    assert not (here / "o").exists()


def test_another_shape_is_told_when_a_recipe_is_read():
    steps = {
        "web": {"stage": "pool", "source": "photos"},
        "raw": {"stage": "shards", "pool": "web"},
        "first": {"stage": "train", "shards": "raw", "vit": {"n_registers": 0}},
        "second": {"stage": "train", "shards": "raw", "init": "first"},
    }
    with pytest.raises(UserError, match=r"train.vit: first has n_registers 0 \(4 here\)$") as caught:
        parse_recipe({"steps": steps}, STAGES)
    assert caught.value.hint.startswith("set train.vit: {n_registers: 0}; ")
    steps["second"]["vit"] = {"n_registers": 0, "drop_path": 0.3}
    assert len(parse_recipe({"steps": steps}, STAGES).steps) == 4


def test_bad_samples_are_told_with_the_way_to_allow_them(tars, here):
    write_tar(tars / "d.tar", [(f"{i}.png", b"not one") for i in range(20)])
    with pytest.raises(UserError, match="max_bad_fraction") as caught:
        openlvd("train", tars, *SETTINGS)
    words = f": openlvd index {tars} --max-bad-fraction X --out I, then openlvd train I"
    assert caught.value.hint.endswith(words)


def test_one_tar_is_one(tars, here, capfd):
    openlvd("train", tars / "a.tar", *SETTINGS)
    assert " images in 1 tar, at " in capfd.readouterr().err


def test_torchrun_starts_processes_itself(tars, here, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"torchrun starts the processes itself.* must be 1: got 2"):
        openlvd("train", tars, *SETTINGS, "--resources-train-processes", "2")
    assert list(here.iterdir()) == []


def test_new_tars_are_another_training(tars, here):
    openlvd("train", tars, *SETTINGS)
    write_tar(tars / "d.tar", [("1.png", png(50))])
    with pytest.raises(UserError, match="tars-encoder must be empty or of these inputs and settings") as caught:
        openlvd("train", tars, *SETTINGS)
    assert caught.value.hint == "choose another --out"
    openlvd("train", tars, *SETTINGS, "--out", "other")
    assert len(list((here / "tars-index").iterdir())) == 2


def test_train_takes_a_step_of_a_root_by_its_place(tiny, tmp_path, here, capfd):
    """The suggestion is for what is not given; with the flag all of it is a recipe's."""
    openlvd("train", f"{tiny.root}/raw", *SETTINGS)
    encoder = Artifact(Location(str(here / "raw-encoder")))
    assert encoder.manifest["inputs"]["shards"]["digest"] == tiny.artifact("raw").digest
    assert encoder.manifest["config"]["image_size"] == 32
    args = [text for key, value in TRAIN.items() for text in (f"--{key.replace('_', '-')}", json.dumps(value))]
    openlvd("train", "--shards", f"{tiny.root}/raw", *args, "--out", "as-in-a-recipe")
    assert Artifact(Location(str(here / "as-in-a-recipe"))).digest == tiny.artifact("first").digest
    assert sorted(path.name for path in here.iterdir()) == ["as-in-a-recipe", "raw-encoder"]


MISTAKES = {
    "none": ([], "PATH must be given: got none"),
    "twice": (["a", "--shards", "b"], "PATH and --shards are one input: got a and b"),
    "nowhere": (["nowhere"], "no folder or file .*/nowhere$"),
    "root": (["{root}"], "--shards must be a finished artifact: got {root}"),
    "other": (["{root}/web"], "--shards must be a shards artifact: got a pool"),
    "key": (["{root}/raw", "--vit", "{{widht: 3}}"], "train.vit has no key 'widht'"),
    "shape": (["{root}/raw", "--vit", "{{width: 33}}"], "vit.width must be a multiple of vit.heads: got 33 and 4"),
    "zero": (["{root}/raw", "--vit", "{{patch_size: 0}}"], "vit.patch_size must be at least 1: got 0"),
    "kind": (["{root}/raw", "--vit", "{{width: wide}}"], "train.vit.width must be a valid integer: got 'wide'"),
    "number": (["{root}/raw", "--n-steps", "many"], "train.n_steps must be a valid integer: got 'many'"),
    "images": (["{images}/web"], "must hold WebDataset tars: got none"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_train_are_one_sentence_and_leave_nothing(tiny, here, name):
    args, words = MISTAKES[name]
    words = words.format(root=tiny.root)
    with pytest.raises(UserError, match=words):
        openlvd("train", *[arg.format(root=tiny.root, images=tiny.images) for arg in args])
    assert list(here.iterdir()) == []


def test_a_shard_that_changed_after_its_index(tmp_path, tars, here):
    openlvd("index", tars, "--out", "index")
    (tars / "b.tar").write_bytes((tars / "b.tar").read_bytes() + bytes(512))
    command = [sys.executable, "-m", "pipelines.cli", "train", "--shards", "index", "--out", "out"]
    train = ["--n-steps", "1", "--warmup-steps", "0", "--vit", "{width: 32, depth: 1, heads: 2}", "--batch", "4",
             "--image-size", "32", "--local-size", "16", "--head", "{hidden: 16, bottleneck: 16}"]  # fmt: skip
    whole = (tars / "a.tar").read_bytes()
    done = subprocess.run([*command, *train], capture_output=True, text=True, check=False)
    words = r"tars/b.tar must be the shard that its index is of: it had \d+ bytes and has \d+"
    assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
    assert "hint: put the tar back as it was" in done.stderr
    (tars / "b.tar").write_bytes(whole)  # of the same size, with other images
    done = subprocess.run([*command, *train], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "b.tar must be the shard that its index is of: it has other bytes" in done.stderr
    (tars / "b.tar").unlink()
    done = subprocess.run([*command, *train], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "tars/b.tar must be the shard that its index is of: it is gone" in done.stderr


def test_places_are_named_after_the_path(tmp_path, monkeypatch):
    folder = tmp_path / "cc3m.v2"
    (folder / "deep").mkdir(parents=True)
    (folder / "x.tar").write_bytes(b"")
    (folder / "some.txt").write_text("x.tar")
    monkeypatch.chdir(tmp_path)
    for text, name in {
        "cc3m.v2": "cc3m-v2", "cc3m.v2/": "cc3m-v2", "cc3m.v2/*.tar": "cc3m-v2", "cc3m.v2/x.tar": "x",
        "cc3m.v2/some.txt": "some", "s3://bucket/a b/": "a-b", "/": "shards",
    }.items():  # fmt: skip
        assert short_name(text) == name, text
    assert default_place("cc3m.v2", "encoder").uri == str(tmp_path / "cc3m-v2-encoder")
    assert default_place("s3://bucket/x", "encoder").uri == str(tmp_path / "x-encoder")
    monkeypatch.chdir(folder / "deep")
    assert default_place("..", "encoder").uri == str(tmp_path / "cc3m-v2-encoder")


def test_the_facts_of_an_index(tmp_path):
    """The median of some parts; empty ones have no sizes."""
    for t in range(40):
        write_tar(
            tmp_path / "tars" / f"{t:02d}.tar",
            [(f"{i}.png", png(i, side=10 + t % 3)) for i in range(3)] if t % 2 else [],
        )
    found, _ = index(tmp_path, tmp_path / "tars")
    assert facts_of(found) == (60, 11)


def test_one_input_needs_no_flag(tiny, tmp_path):
    openlvd("neighbors", f"{tiny.root}/web_copy", "--n-neighbors", 8, "--min-similarity", 0.99, "--out", tmp_path / "o")
    assert Artifact(Location(str(tmp_path / "o"))).digest == tiny.artifact("near").digest
    openlvd("index", tiny.images / "tars", "--max-bad-fraction", 0.2, "--out", tmp_path / "i")
    assert Artifact(Location(str(tmp_path / "i"))).digest == tiny.artifact("found").digest
    for name, key in {"pool": "source", "embed": "pool", "dedup": "neighbors", "train": "shards"}.items():
        stage = STAGES[name]
        assert with_flag(stage, {"path": "x", key: None})[key] == "x"
    for name in ("union", "decontaminate", "retrieve", "mix", "assign"):
        with pytest.raises(Exception, match="unexpected extra argument"):
            openlvd(name, "x", "--out", tmp_path / "n")
