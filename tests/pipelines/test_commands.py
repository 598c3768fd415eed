"""Every stage as a command: the same artifact as in a recipe, at a place of the user's choice."""

import dataclasses
import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args, get_type_hints

import pytest
from tiny import STEP_OF_STAGE, digit, recipe

from curation.artifact import Artifact, pool_of
from curation.store import Location
from embedding.vit_config import ViTConfig
from pipelines import engine
from pipelines.cli import INTERRUPTED, app
from pipelines.commands import field_docs, flag, keys_of, kind_text, read_value, settings_of
from pipelines.errors import UserError
from pipelines.executor import Resources
from pipelines.stages.table import STAGES
from training.config import TrainConfig

ALONE = {name: stage for name, stage in STAGES.items() if not stage.reads_all}


def openlvd(*args) -> None:
    app([str(arg) for arg in args], standalone_mode=False)


def options(entry, place) -> list[str]:
    """A step of a recipe as options; ``place(step)`` is the path of an input."""
    stage = STAGES[entry["stage"]]
    args = []
    for key, value in entry.items():
        if key == "stage":
            continue
        is_step = key in {**stage.reads, **stage.optional} or (key in stage.step_or_value and value != "pixels")
        if key in stage.lists:
            for name in [value] if isinstance(value, str) else value:
                args += [flag(key), place(name)]
        elif isinstance(value, bool):
            args += [flag(key) if value else flag(f"no_{key}")]
        else:
            args += [flag(key), place(value) if is_step else value if isinstance(value, str) else json.dumps(value)]
    return args


def without_paths(artifact: Artifact) -> dict:
    manifest = artifact.manifest
    return {**manifest, "inputs": {name: entry["digest"] for name, entry in manifest["inputs"].items()}}


def test_every_stage_alone_gives_the_artifact_of_the_recipe(tiny, tmp_path):
    tree = recipe(tiny.images)
    seen = set()
    for name, entry in tree["steps"].items():
        if entry["stage"] not in ALONE:
            continue
        out = tmp_path / name
        speed = ["--resources-loader-workers", "0"]
        openlvd(entry["stage"], *options(entry, lambda step: str(tmp_path / step)), "--out", out, *speed)
        made = Artifact(Location(str(out)))
        assert without_paths(made) == without_paths(tiny.artifact(name)), name
        assert not (out / "scratch").exists()
        seen.add(entry["stage"])
    assert seen == set(STEP_OF_STAGE) & set(ALONE)


def test_an_input_may_be_a_step_of_a_root_or_a_fingerprint_of_it(tiny, tmp_path, capsys):
    at = tiny.artifact("web_copy").location.uri
    for number, given in enumerate([f"{tiny.root}/web_copy", f"{tiny.root}/web_copy/", at, f"{tiny.root}/./web_copy"]):
        out = tmp_path / str(number)
        openlvd(
            "neighbors", "--embeddings", given, "--n-neighbors", 8, "--min-similarity", 0.99, "--out", out, "--json"
        )
        said = json.loads(capsys.readouterr().out)
        near = Artifact(Location(str(out)))
        assert said["location"] == str(out) and said["state"] == "done" and said["counts"] == near.counts
        assert near.digest == tiny.artifact("near").digest
        assert near.manifest["inputs"]["embeddings"]["path"] == at
        assert pool_of(near).digest == tiny.artifact("web").digest
    openlvd("neighbors", "--embeddings", at, "--n-neighbors", 8, "--min-similarity", 0.99, "--out", tmp_path / "0")
    said = capsys.readouterr().out
    assert "done before" in said and said.splitlines()[-1] == str(tmp_path / "0")


def test_a_link_to_an_artifact_leads_to_its_inputs(tiny, tmp_path):
    (tmp_path / "link").symlink_to(tiny.artifact("near").location.path)
    openlvd("dedup", "--neighbors", tmp_path / "link", "--out", tmp_path / "out")
    assert Artifact(Location(str(tmp_path / "out"))).digest == tiny.artifact("unique").digest


def test_names_of_a_list_are_those_of_the_steps_or_given(tiny, tmp_path):
    web, exam = f"{tiny.root}/web", tiny.artifact("exam").location.uri
    openlvd("union", "--members", web, "--members", exam, "--out", tmp_path / "a")
    assert Artifact(Location(str(tmp_path / "a"))).manifest["config"] == {"members": ["web", "exam"]}
    openlvd("union", "--members", f"x={web}", "--members", f"y={web}", "--out", tmp_path / "b")
    assert Artifact(Location(str(tmp_path / "b"))).manifest["config"] == {"members": ["x", "y"]}
    with pytest.raises(UserError, match="--members must have one name each: got 'web'") as caught:
        openlvd("union", "--members", web, "--members", web, "--out", tmp_path / "c")
    assert "NAME=PATH" in caught.value.hint
    shutil.copytree(tiny.artifact("web").location.path, tmp_path / "an odd name")
    with pytest.raises(UserError, match="--members must have names of letters, digits, - and _: got 'an odd name'"):
        openlvd("union", "--members", tmp_path / "an odd name", "--out", tmp_path / "c")


def test_a_command_on_s3(tiny, on_s3):
    for path in sorted(p for p in (tiny.images / "exam").rglob("*.png")):
        (on_s3 / f"images/{path.relative_to(tiny.images / 'exam')}").write(path.read_bytes())
    openlvd("pool", "--source", f"{on_s3}/images", "--part-rows", 16, "--out", f"{on_s3}/pool/")
    openlvd("embed", "--pool", f"{on_s3}/pool/", "--backbone", "pixels", "--out", f"{on_s3}/vectors")
    pool, vectors = Artifact(on_s3 / "pool"), Artifact(on_s3 / "vectors")
    assert pool.digest == tiny.artifact("exam").digest
    assert vectors.digest == tiny.artifact("exam_copy").digest
    assert vectors.manifest["inputs"]["pool"]["path"] == pool.location.uri
    assert not [entry.name for entry in on_s3.list() if entry.name.endswith(".lock") or "scratch" in entry.name]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--out", "o"], "--embeddings must be given: got none"),
        (["--embeddings", "{root}/web_copy", "--out", "o"], "--min-similarity must be given: got none"),
        (["--embeddings", "{root}/web_copy", "--min-similarity", "0.9"], "--out must be given: got none"),
        (["--embeddings", "{root}/web", "--min-similarity", "0.9", "--out", "o"],
         "--embeddings must be an embed artifact: got a pool, {root}/web/"),
        (["--embeddings", "{root}", "--min-similarity", "0.9", "--out", "o"],
         "--embeddings must be a finished artifact"),
        (["--embeddings", "none", "--min-similarity", "0.9", "--out", "o"], "--embeddings must be a finished artifact"),
        (["--embeddings", "{root}/web_copy", "--min-similarity", "1.5", "--out", "o"],
         "neighbors.min_similarity must be in (0, 1]: got 1.5"),
        (["--embeddings", "{root}/web_copy", "--min-similarity", "high", "--out", "o"],
         "neighbors.min_similarity must be a valid number: got 'high'"),
        (["--embeddings", "{root}/web_copy", "--min-similarity", "[", "--out", "o"], "--min-similarity must be YAML"),
        (["--embeddings", "{root}/web_copy", "--min-similarity", "0.9", "--out", "o", "--executor", "dask"],
         "--executor must be serial or ray: got 'dask'"),
        (["--embeddings", "{root}/web_copy", "--min-similarity", "0.9", "--out", "o", "--resources-workers", "-1"],
         "resources.workers must not be negative: got -1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_nothing(tiny, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        openlvd("neighbors", *[arg.format(root=tiny.root) for arg in args])
    assert words.format(root=tiny.root) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_root_is_told_its_steps(tiny, tmp_path):
    with pytest.raises(UserError) as caught:
        openlvd("dedup", "--neighbors", tiny.root, "--out", tmp_path / "o")
    assert "is a root: name one of its steps, web, exam" in caught.value.hint


def test_a_selection_of_another_pool_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"embed.selection must select from the pool of embed.pool"):
        openlvd("embed", "--pool", f"{tiny.root}/exam", "--selection", f"{tiny.root}/usable", "--backbone", "pixels",
                "--out", tmp_path / "o")  # fmt: skip


def test_a_typing_mistake_in_a_backbone_is_not_looked_up(tiny, tmp_path):
    with pytest.raises(UserError, match=r"embed.backbone must be pixels") as caught:
        openlvd("embed", "--pool", f"{tiny.root}/exam", "--backbone", "pixel", "--out", tmp_path / "o")
    assert caught.value.hint == "did you mean pixels?"


def test_what_is_at_the_place_is_never_lost(tiny, tmp_path):
    args = ["neighbors", "--embeddings", f"{tiny.root}/web_copy", "--min-similarity", "0.99"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"must be empty: got 1 files, first diary.txt") as caught:
        openlvd(*args, "--out", full)
    assert caught.value.hint == "choose another --out"
    assert [path.name for path in full.iterdir()] == ["diary.txt"]
    done = tmp_path / "done"
    openlvd(*args, "--out", done)
    before = {path.name: path.read_bytes() for path in done.iterdir()}
    with pytest.raises(UserError, match="got a finished neighbors artifact of others, fingerprint"):
        openlvd(*args, "--n-neighbors", "3", "--out", done)
    with pytest.raises(UserError, match="must not be in the source"):
        openlvd("pool", "--source", tiny.images / "exam", "--out", tiny.images / "exam" / "pool")
    assert {path.name: path.read_bytes() for path in done.iterdir()} == before


def test_an_interrupted_command_goes_on_and_its_parts_belong_to_it(tiny, tmp_path, monkeypatch):
    args = ["neighbors", "--embeddings", f"{tiny.root}/web_copy", "--min-similarity", "0.99", "--n-neighbors", "8"]
    out = tmp_path / "out"
    finish = engine.finish

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "finish", stopped)
    assert app([*args, "--out", str(out)], standalone_mode=False) == INTERRUPTED
    monkeypatch.setattr(engine, "finish", finish)
    parts = sorted(out.glob("part-*"))
    assert parts and not (out / "manifest.json").exists()
    (out / "part-0000000.parquet").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in sorted(out.glob("part-*"))}
    with pytest.raises(UserError, match="got parts of others, fingerprint"):
        openlvd(*args[:-1], "3", "--out", out)
    tag = (out / "scratch" / "numerics.json").read_bytes()
    (out / "scratch" / "numerics.json").write_text('{"numpy": "0.1"}')
    with pytest.raises(UserError, match="must hold parts made by machines of one kind"):
        openlvd(*args, "--out", out)
    (out / "scratch" / "numerics.json").write_bytes(tag)
    openlvd(*args, "--out", out)
    assert Artifact(Location(str(out))).digest == tiny.artifact("near").digest
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps


def test_a_failed_command_does_not_keep_its_place(tiny, tmp_path):
    """Before a file was made there is nothing of others to be mixed with."""
    args = ["cluster", "--embeddings", f"{tiny.root}/web_vec", "--n-resamples", "2", "--out", tmp_path / "o" / "tree"]
    with pytest.raises(UserError, match="must be at most the number of rows: got 100000"):
        openlvd(*args, "--n-clusters", "[100000]")
    openlvd(*args, "--n-clusters", "[20, 5]", "--resample-size", "[3, 2]")
    assert Artifact(Location(str(tmp_path / "o" / "tree"))).digest == tiny.artifact("tree").digest


LISTENING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pipelines.cli import main; main()"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_goes_on_to_the_same_bytes(tmp_path, number):
    """Killed in the middle of a pool of many parts, then run again; one run at a time on a place."""
    (tmp_path / "images").mkdir()
    for i in range(1500):
        digit(i).save(tmp_path / "images" / f"{i:04d}.png")
    args = ["pool", "--source", str(tmp_path / "images"), "--part-rows", "10", "--out"]
    openlvd(*args, tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "-c", LISTENING, *args, str(tmp_path / "out")], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("scratch/scan/part-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    with pytest.raises(UserError, match="another run works on"):
        openlvd(*args, tmp_path / "out")
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "interrupted\n\nhint: finished parts are kept" in said or number == signal.SIGKILL
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("scratch/scan/part-*")}
    assert 5 <= len(there) < 150
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = subprocess.run([sys.executable, "-m", "pipelines.cli", *args, str(tmp_path / "out")], check=False)
    assert again.returncode == 0
    assert Artifact(Location(str(tmp_path / "out"))).digest == Artifact(Location(str(tmp_path / "whole"))).digest


def test_every_setting_has_its_meaning_in_the_help():
    missing = [
        f"{name}.{field.name}"
        for name, stage in ALONE.items()
        for field in dataclasses.fields(stage.config)
        if not field_docs(stage.config)[field.name].text
    ]
    assert missing == []


HEADINGS = ["backbone", "crops", "heads and targets", "iBOT", "KoLeo", "optimiser", "order and stops",
            "measuring on the way"]  # fmt: skip


def configs() -> list[type]:
    """Of every stage, and those within them."""
    found = [stage.config for stage in STAGES.values()] + [Resources]
    for config in found:
        kinds = [one for kind in get_type_hints(config).values() for one in (kind, *get_args(kind))]
        found += [kind for kind in kinds if dataclasses.is_dataclass(kind) and kind not in found]
    return found


def test_headings_are_those_of_the_trainer_alone():
    for config in configs():
        docs = field_docs(config)
        sections = list(dict.fromkeys(docs[field.name].section for field in dataclasses.fields(config)))
        assert sections == (HEADINGS if config is TrainConfig else [""]), config


def test_no_help_is_cut_off_or_goes_on_with_another():
    """Of every comment in the source each word is in the help of one field, or in a heading."""
    for config in configs():
        docs = field_docs(config)
        lines = inspect.getsource(config).splitlines()
        said = [line.split("# ", 1)[1].split() for line in lines if "  # " in line or line.lstrip().startswith("# ")]
        said = [words for words in said if not {"fmt:", "read"} & {words[0]}]
        texts = " ".join(docs[field.name].text for field in dataclasses.fields(config)).split()
        headings = [words for words in said if " ".join(words).partition(":")[0] in HEADINGS]
        assert texts == [word for words in said if words not in headings for word in words], config
        for field in dataclasses.fields(config):
            text = docs[field.name].text
            assert not [one for one in HEADINGS[2:] if text.endswith(one)], (config, field.name)
            assert text.split()[-1:] not in [["the"], ["a"], ["released"]], (config, field.name)
            assert text.count("(") == text.count(")") or "[" in text, (config, field.name)
            assert text.count('"') % 2 == 0, (config, field.name)


def test_the_keys_of_a_setting_have_their_meaning():
    keys = keys_of(ViTConfig)
    for field in dataclasses.fields(ViTConfig):
        assert f"{field.name} ({field_docs(ViTConfig)[field.name].text})" in keys
    assert "()" not in keys and "one draw for all images of one size" in keys


def test_a_wrong_resource_is_told_its_option(tiny, tmp_path):
    with pytest.raises(UserError, match=r"resources.crops_on must be 'worker' or 'device': got 'gpu'") as caught:
        openlvd("train", f"{tiny.root}/raw", "--resources-crops-on", "gpu", "--out", tmp_path / "o")
    assert caught.value.hint.startswith("give another --resources-crops-on: it is the trainer's crops")


def test_facts_that_are_numbers_are_told(tiny, tmp_path, capsys):
    entry = recipe(tiny.images)["steps"]["score"]
    args = options(entry, lambda step: f"{tiny.root}/{step}")
    openlvd("evaluate", *args, "--out", tmp_path / "o")
    facts = tiny.artifact("score").facts
    assert f"\naccuracy: k-NN {facts['accuracy']:.2%}" in capsys.readouterr().out
    openlvd("evaluate", *args, "--out", tmp_path / "o", "--json")
    told = json.loads(capsys.readouterr().out)["facts"]
    assert told == {key: value for key, value in facts.items() if isinstance(value, int | float)}
    assert told["accuracy"] == facts["accuracy"]


def test_comments_are_read_as_they_are_meant():
    docs = field_docs(TrainConfig)
    assert docs["init_gain"].text.endswith("a width of about 256: a short run then spends its steps on growing them")
    assert docs["init_gain"].section == "backbone"  # the heading below is no part of it
    assert (docs["vit"].section, docs["image_size"].section, docs["ibot_weight"].section) == (
        "backbone",
        "crops",
        "iBOT",
    )


@pytest.mark.parametrize("name", ALONE)
def test_help_has_its_panels_and_every_option(name, capsys):
    openlvd(name, "--help")
    said = capsys.readouterr().out
    stage = ALONE[name]
    assert ("Inputs:" in said) == bool(stage.reads or stage.optional or stage.lists or stage.step_or_value)
    assert "\nRun:\n" in said and "--out URI" in said
    wanted = [*stage.reads, *stage.optional, *stage.lists, *stage.step_or_value, *(f.name for f in settings_of(stage))]
    assert [key for key in wanted if f"  {flag(key)} " not in said] == []
    assert max(map(len, said.splitlines())) <= 80


def test_options_of_a_stage_do_not_meet():
    own = {"out", "executor", "address", "as_json"}
    for name, stage in ALONE.items():
        keys = [
            *stage.reads,
            *stage.optional,
            *stage.lists,
            *stage.step_or_value,
            *(f.name for f in settings_of(stage)),
        ]
        assert len(keys) == len(set(keys)), name
        assert not own & set(keys) and not [key for key in keys if key.startswith("resources_")], name


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("1e-3", float, 0.001), ("12", int, 12), ("[9, 2]", tuple[int, ...], [9, 2]), ("null", float | None, None),
        ("0012", str, "0012"), ("null", str, "null"), ("null", str | None, None), ("{a: 1e-3}", dict, {"a": "1e-3"}),
        ('{"a": 1e-3}', dict, {"a": 0.001}), ("x > 3: y", str, "x > 3: y"), ("[a, b]", tuple[str, ...], ["a", "b"]),
    ],
)  # fmt: skip
def test_values_are_read_by_the_type_of_their_field(text, kind, value):
    assert read_value(text, kind, "--x", "stage") == value


def test_kinds_in_words():
    assert kind_text(tuple[int, ...] | None) == "[INT, ...]|null"
    assert kind_text(tuple[float, float]) == "[NUMBER, NUMBER]"
    assert kind_text(dict[str, float]) == "{KEY: NUMBER}"


def test_a_config_in_a_config_is_a_mapping(tiny, tmp_path):
    args = options(recipe(tiny.images)["steps"]["first"], lambda step: f"{tiny.root}/{step}")
    openlvd("train", *args, "--augment", "{hflip: 0.0, jitter: 0.0}", "--out", tmp_path / "out")
    augment = Artifact(Location(str(tmp_path / "out"))).manifest["config"]["augment"]
    assert (augment["hflip"], augment["jitter"], augment["grayscale"]) == (0.0, 0.0, 0.2)
    with pytest.raises(UserError, match=r"train.augment"):
        openlvd("train", *args, "--augment", "{hflop: 1}", "--out", tmp_path / "none")
