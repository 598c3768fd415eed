"""A folder without copies, and balanced shards of a folder, in one command each."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tiny import digit

from curation.artifact import Artifact, pool_of
from curation.hierarchy import ClusterConfig
from curation.store import Location
from pipelines import kept, oneliners
from pipelines.engine import read_root, run_recipe
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor
from pipelines.kept import Folder, clean_pieces, plain_name, write_kept
from pipelines.oneliners import default_clusters, threshold
from pipelines.recipe import read_recipe
from pipelines.stages.table import STAGES


def png(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


ODD = ["plain.png", "a folder/with space.png", "ä/ö/ü 😀.PNG", "no suffix", "-dash.png", "[brackets]*?.png",
       "two\nlines.png", 'quo"te,comma.png', "sub/sub/sub/deep.png", "$(echo).png", "tiny.png", "long.png"]  # fmt: skip


def make_photos(folder: Path) -> None:
    """Pictures under odd names, of one pixel and of odd shapes too, with copies and bad files."""
    for i, name in enumerate(ODD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(digit(i)))
    (folder / "tiny.png").write_bytes(png(Image.new("RGB", (1, 1), (9, 200, 30))))
    stripes = np.zeros((3, 900, 3), np.uint8)
    stripes[:, ::2] = (200, 10, 10)
    (folder / "long.png").write_bytes(png(Image.fromarray(stripes)))
    (folder / "zcopies").mkdir()
    digit(0, 64).save(folder / "zcopies" / "larger.jpg", quality=95)
    (folder / "zcopies" / "same.png").write_bytes((folder / "plain.png").read_bytes())
    (folder / "zcopies" / "same2.png").write_bytes((folder / "no suffix").read_bytes())
    (folder / "broken.jpg").write_bytes((folder / "zcopies" / "larger.jpg").read_bytes()[:400])
    (folder / "film.mp4").write_bytes(b"\0" * 100)
    (folder / "empty.png").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(png(digit(30)))
    os.utime(folder / "plain.png", (1_000_000_000, 1_000_000_000))
    os.utime(folder / "no suffix", (1_000_000_000, 1_000_000_000))


KEPT = {*ODD, "zcopies/larger.jpg"} - {"plain.png"}  # the larger copy stays
DROPPED = {
    "plain.png": ("near_copy", "zcopies/larger.jpg"),
    "zcopies/same.png": ("exact_duplicate", "zcopies/larger.jpg"),
    "zcopies/same2.png": ("exact_duplicate", "no suffix"),
    "broken.jpg": ("undecodable", ""),
    "film.mp4": ("undecodable", ""),
    "empty.png": ("undecodable", ""),
}


@pytest.fixture
def photos(tmp_path) -> Path:
    make_photos(tmp_path / "photos")
    return tmp_path / "photos"


def files_of(folder: Path) -> dict[str, bytes]:
    """What a user sees in a folder."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): (folder / name).read_bytes() for name in names if name.parts[0] != ".openlvd"}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {name: (data, (folder / name).stat().st_mtime_ns) for name, data in files_of(folder).items()}


def dedup(source, out, min_similarity=None, backbone="pixels", most=0.5) -> None:
    oneliners.dedup_folder(str(source), str(out), min_similarity, backbone, most, "serial", True)


def balance(source, out, target, n_clusters=None, min_similarity=None, backbone="pixels") -> None:
    oneliners.balance_folder(str(source), str(out), target, min_similarity, backbone, n_clusters, 0.5, "serial", True)


def summary(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def dropped_of(out: Path) -> dict[str, dict[str, str]]:
    with (out / ".openlvd" / "dropped.csv").open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("part_rows", [2048, 3])
def test_a_folder_without_copies(photos, tmp_path, capsys, monkeypatch, part_rows):
    monkeypatch.setattr(oneliners, "PART_ROWS", part_rows)
    before = snapshot(photos)
    dedup(photos, tmp_path / "kept")
    said = summary(capsys)
    assert files_of(tmp_path / "kept") == {name: before[name][0] for name in KEPT}
    assert snapshot(photos) == before
    assert {name: (row["reason"], row["copy_of"]) for name, row in dropped_of(tmp_path / "kept").items()} == DROPPED
    assert float(dropped_of(tmp_path / "kept")["plain.png"]["similarity"]) >= 0.99
    assert (said["images_found"], said["bad"], said["exact_copies"], said["near_copies"], said["kept"]) == (
        18,
        3,
        2,
        1,
        12,
    )
    assert said["files_copied"] == 12 and said["ignored_files"] == 1 and "refused" not in said
    assert (tmp_path / "kept" / "no suffix").stat().st_mtime == 1_000_000_000
    assert "<html" in Path(said["report"]).read_text() and said["report"] == str(tmp_path / "kept/.openlvd/report.html")
    assert not (tmp_path / "kept" / ".openlvd" / "dropped").exists()


def test_descriptors_of_copies_have_a_threshold_of_their_own():
    assert [threshold(name, None) for name in ("pixels", "phash")] == [0.99, 1 - 2 * 31 / 256]
    assert threshold("phash", 0.9) == 0.9
    with pytest.raises(UserError, match="--min-similarity must be given with --backbone some/model: got none"):
        threshold("some/model", None)


def test_the_similarity_is_that_of_the_two_files(photos, tmp_path):
    dedup(photos, tmp_path / "kept")
    row = dropped_of(tmp_path / "kept")["plain.png"]
    steps = read_root(Location(str(tmp_path / "kept" / ".openlvd")))
    folder = Folder(steps["images"], steps["vectors"], steps["unique"], tmp_path / "kept", Location("."))
    source = [row["source"] for row in pq.read_table(steps["images"].part(0).path).to_pylist()]
    a, b = source.index("plain.png"), source.index(row["copy_of"])
    own, both = kept.vectors_at(np.array([a]), folder), kept.vectors_at(np.array(sorted([a, b])), folder)
    assert float(row["similarity"]) == pytest.approx(float(both[0] @ both[1]), abs=1e-4)
    np.testing.assert_array_equal(own[0], both[sorted([a, b]).index(a)])


def test_again_nothing_is_new_and_the_recipe_is_done(photos, tmp_path, capsys):
    dedup(photos, tmp_path / "kept")
    before = snapshot(tmp_path / "kept")
    capsys.readouterr()
    dedup(photos, tmp_path / "kept")
    assert snapshot(tmp_path / "kept") == before
    said = summary(capsys)
    assert (said["files_copied"], said["files_there"]) == (0, 12)
    recipe = read_recipe(Location(str(tmp_path / "kept/.openlvd/recipe.yaml")), [], STAGES)
    results = list(run_recipe(recipe, Location(recipe.root or ""), LocalExecutor(recipe.resources)))
    assert {result.state for result in results} == {"done before"}


def test_new_photos_are_picked_up_and_what_the_user_did_stays(photos, tmp_path, capsys):
    out = tmp_path / "kept"
    dedup(photos, out)
    (out / "no suffix").write_bytes(b"edited by the user")
    (out / "mine.txt").write_text("a note")
    (out / "-dash.png").unlink()
    (photos / "new" / "dir").mkdir(parents=True)
    digit(40).save(photos / "new" / "dir" / "new.png")
    digit(8, 96).save(photos / "better.png")  # of sub/sub/sub/deep.png, which is a copy now
    digit(0, 128).save(photos / "best.png")  # and of copies/larger.jpg
    before = snapshot(out)
    capsys.readouterr()
    dedup(photos, out)
    found, said = files_of(out), summary(capsys)
    gone = {"sub/sub/sub/deep.png", "zcopies/larger.jpg"}
    assert set(found) == (KEPT - gone) | {"mine.txt", "new/dir/new.png", "better.png", "best.png"}
    assert found["no suffix"] == b"edited by the user" and found["mine.txt"] == b"a note"
    untouched = set(before) - gone
    assert {name: at for name, at in snapshot(out).items() if name in untouched} == {n: before[n] for n in untouched}
    assert not (out / "sub").exists() and not (out / "zcopies").exists()
    assert (said["files_copied"], said["files_edited"], said["files_removed"]) == (4, 1, 2)
    assert dropped_of(out)["plain.png"]["copy_of"] == dropped_of(out)["zcopies/same.png"]["copy_of"] == "best.png"


def test_what_is_no_longer_in_the_source_stays_in_the_copy(photos, tmp_path, capsys):
    """A camera's card: it is emptied, and its next pictures have the names of the first."""
    out = tmp_path / "kept"
    dedup(photos, out)
    first = files_of(out)
    for name in ("no suffix", "-dash.png", "sub/sub/sub/deep.png"):
        (photos / name).unlink()
    digit(50).save(photos / "-dash.png")
    capsys.readouterr()
    dedup(photos, out)
    found, said = files_of(out), summary(capsys)
    first["zcopies/same2.png"] = first.pop("no suffix")  # the image has another name now
    new = (photos / "-dash.png").read_bytes()
    assert found == first | {f"{hashlib.sha256(new).hexdigest()}.png": new}
    assert (said["files_left"], said["files_removed"]) == (1, 1)
    dedup(photos, out)
    assert files_of(out) == found


def test_other_settings_are_another_choice_of_the_same_files(photos, tmp_path):
    out = tmp_path / "kept"
    dedup(photos, out, min_similarity=1.0)
    assert set(files_of(out)) == KEPT | {"plain.png"}
    dedup(photos, out)
    assert set(files_of(out)) == KEPT
    dedup(photos, out, min_similarity=1.0)
    assert set(files_of(out)) == KEPT | {"plain.png"}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("part_rows", [2048, 2])
def test_images_of_containers_have_safe_names(tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(oneliners, "PART_ROWS", part_rows)
    photos, images = tmp_path / "photos", [png(digit(i)) for i in range(14)]
    (photos / "x").mkdir(parents=True)
    members = ["../../evil.png", "/etc/passwd.png", "./a/fine.png", "twice.png", "twice.png", "node", "node/below.png",
               "..", "p/" + "n" * 300 + ".png"]  # fmt: skip
    with tarfile.open(photos / "x" / "some.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in zip(members, images, strict=False):
            add(tar, name, data)
    rest = images[len(members) :]
    pq.write_table(pa.table({"image": rest[:2]}), photos / "bare.parquet")
    cells = [
        {"bytes": data, "path": path} for data, path in zip(rest[2:], ("../up.png", "in/p.png", None), strict=True)
    ]
    pq.write_table(pa.table({"image": cells}), photos / "named.parquet")
    dedup(photos, tmp_path / "out" / "kept", min_similarity=1.0)
    found = files_of(tmp_path / "out" / "kept")
    assert sorted(found.values()) == sorted(images)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
    by_data = {data: name for name, data in found.items()}
    names = [by_data[data] for data in images]
    keys = [hashlib.sha256(data).hexdigest() for data in images]
    at = "x/some.tar/"
    assert names[:3] == [at + "evil.png", at + "etc/passwd.png", at + "a/fine.png"]
    assert names[3:6] == [f"{at}{key}.png" for key in keys[3:6]]  # two of one name, and a file that is a folder too
    assert names[6:9] == [at + "node/below.png", f"{at}{keys[7]}.png", f"{at}{keys[8]}.png"]
    assert names[9:11] == [f"bare.parquet/{key}.png" for key in keys[9:11]]
    assert names[11:] == ["named.parquet/up.png", "named.parquet/in/p.png", f"named.parquet/{keys[13]}.png"]


def test_no_name_leads_out_or_is_one_that_no_file_can_have():
    rng = random.Random(0)
    pieces = ["", ".", "..", "a", "b.png", "~", "c:", "\\", "x" * 254, "ü" * 128, "\0", "-", " ", "*"]
    for _ in range(3000):
        row = {
            "source": "/".join(rng.choices(pieces, k=rng.randint(1, 9))),
            "member": "/".join(rng.choices(pieces, k=rng.randint(0, 9))) or None,
            "offset": rng.choice([None, 0]),
            "key": "ab" * 32,
            "format": "jpeg",
        }
        if not clean_pieces(row["source"]) or "\0" in row["source"]:
            continue  # no file of a source is called so
        name = plain_name(row)
        split = name.split("/")
        assert not name.startswith("/") and not {"", ".", ".."} & set(split) and "\0" not in name
        assert max(len(piece.encode()) for piece in split) <= 255 and len(name.encode()) <= 1200


def test_a_link_in_the_copy_leads_nowhere(photos, tmp_path):
    dedup(photos, tmp_path / "kept")
    (tmp_path / "kept" / "sub" / "sub" / "sub" / "deep.png").unlink()
    (tmp_path / "kept" / "sub" / "sub" / "sub").rmdir()
    (tmp_path / "kept" / "sub" / "sub" / "sub").symlink_to(photos)
    with pytest.raises(TaskError, match="a link leads to"):
        dedup(photos, tmp_path / "kept")
    assert not (photos / "deep.png").exists()


def test_an_earlier_file_behind_a_link_is_not_removed(tmp_path):
    """The user put a link where a copy was: what it leads to may be the only one of its kind."""
    photos, out = tmp_path / "photos", tmp_path / "kept"
    for i, name in enumerate(("sub/a", "b", "c")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        digit(i).save(photos / f"{name}.png")
        digit(i, 64).save(photos / f"{name}-larger.png")  # stays when the two are copies
    before = snapshot(photos)
    dedup(photos, out, min_similarity=1.0)
    assert set(files_of(out)) == set(before)
    shutil.rmtree(out / "sub")
    (out / "sub").symlink_to(photos / "sub")
    (out / "b.png").unlink()
    (out / "b.png").symlink_to(photos / "b.png")
    dedup(photos, out)
    assert snapshot(photos) == before
    assert (out / "sub").is_symlink() and (out / "b.png").is_symlink() and not (out / "c.png").exists()


def test_files_do_not_wait_for_the_page(photos, tmp_path, monkeypatch):
    """Nor does a threshold near 1 stop it, where float32 has fewer values than the histogram has bins."""

    def stopped(*_):
        raise TaskError("no page today")

    (photos / "again.png").write_bytes(png(digit(1), compress_level=1))  # the pixels of "a folder/with space.png"
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "report", dataclasses.replace(STAGES["report"], run=stopped))
        with pytest.raises(TaskError, match="no page today"):
            dedup(photos, tmp_path / "kept", min_similarity=0.999999)
    assert len(files_of(tmp_path / "kept")) == 13 and (tmp_path / "kept/.openlvd/dropped.csv").exists()
    assert not (tmp_path / "kept/.openlvd/report.html").exists()
    dedup(photos, tmp_path / "kept", min_similarity=0.999999)
    page = (tmp_path / "kept/.openlvd/report.html").read_text()
    assert "strongest similarity of 1 dropped images, from 0.999999 to 1" in page


def test_photos_on_s3(photos, tmp_path, on_s3):
    (photos / "two\nlines.png").unlink()  # the S3 of the tests has no such keys
    for name, data in files_of(photos).items():
        (on_s3 / f"photos/{name}").write(data)
    dedup(on_s3 / "photos", tmp_path / "kept")
    assert files_of(tmp_path / "kept") == {n: (photos / n).read_bytes() for n in KEPT - {"two\nlines.png"}}
    assert {name: (row["reason"], row["copy_of"]) for name, row in dropped_of(tmp_path / "kept").items()} == DROPPED
    with pytest.raises(UserError, match="KEPT must be a local folder: got s3://"):
        dedup(photos, on_s3 / "kept")


def test_names_that_only_an_object_store_can_have(tmp_path, on_s3):
    images = {name: png(digit(i)) for i, name in enumerate(["a", "a/b.png", "a//b.png", "c//d.png"])}
    for name, data in images.items():
        (on_s3 / f"photos/{name}").write(data)
    dedup(on_s3 / "photos", tmp_path / "kept", min_similarity=1.0)
    own = {name: f"{hashlib.sha256(data).hexdigest()}.png" for name, data in images.items()}
    assert files_of(tmp_path / "kept") == {
        own["a"]: images["a"],  # the name of a folder
        f"a/{own['a/b.png']}": images["a/b.png"],  # two that would be one
        f"a/{own['a//b.png']}": images["a//b.png"],
        "c/d.png": images["c//d.png"],
    }


def openlvd(*args, **options):
    return subprocess.Popen([sys.executable, "-m", "pipelines.cli", *map(str, args)], **options)


def test_killed_and_started_again_it_is_as_if_nothing_was(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "kept"
    photos.mkdir()
    for i in range(800):
        (photos / f"{i:04d}.png").write_bytes(png(digit(i)))
    dedup(photos, tmp_path / "whole", min_similarity=1.0)
    args = ["dedup-folder", photos, "--out", out, "--min-similarity", "1.0"]
    for least in (0, 1, 100):  # in the steps, and twice between the files
        process = openlvd(*args, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(out.glob("*.png"))) >= least and (out / ".openlvd" / "run.json").exists():
                break
            time.sleep(0.002)
        process.kill()
        process.wait(timeout=60)
        assert len(list(out.glob("*.png"))) < 800
    done = openlvd(*args, stdout=subprocess.PIPE, text=True)
    said = done.communicate(timeout=120)[0].splitlines()
    assert done.returncode == 0
    assert said[-1].split() == ["report", str(out / ".openlvd" / "report.html")]
    assert said[0].split() == ["images", "found", "800"]
    assert files_of(out) == files_of(tmp_path / "whole")
    one, other = ((at / ".openlvd" / "dropped.csv").read_bytes() for at in (out, tmp_path / "whole"))
    assert one == other
    assert not list(out.rglob(".side-*"))


def test_ray_writes_the_same_files(photos, tmp_path, monkeypatch, ray_executor):
    monkeypatch.setattr(oneliners, "PART_ROWS", 3)
    dedup(photos, tmp_path / "kept")
    steps = read_root(Location(str(tmp_path / "kept" / ".openlvd")))
    folder = Folder(
        steps["images"], steps["vectors"], steps["unique"], tmp_path / "other", Location(str(tmp_path / "root"))
    )
    write_kept(folder, ray_executor)
    assert files_of(tmp_path / "other") == files_of(tmp_path / "kept")
    assert (tmp_path / "root" / "dropped.csv").read_bytes() == (tmp_path / "kept/.openlvd/dropped.csv").read_bytes()


def test_places_that_would_mix_with_something_else_are_refused(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    (tmp_path / "link").symlink_to(photos)
    for out, words in [
        (photos / "kept", "KEPT and PHOTOS must not be in one another"),
        (photos, "KEPT and PHOTOS must not be in one another"),
        (tmp_path, "KEPT and PHOTOS must not be in one another"),
        (tmp_path / "link" / "kept", "KEPT and PHOTOS must not be in one another"),
        (tmp_path / "full", "KEPT must be empty or made by openlvd dedup-folder: got .* with 1 files, first diary.txt"),
        (tmp_path / "full" / "diary.txt", "KEPT must be a folder: got .*, a file"),
    ]:
        with pytest.raises(UserError, match=words):
            dedup(photos, out)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["diary.txt"]
    assert not (photos / ".openlvd").exists() and not (tmp_path / ".openlvd").exists()
    dedup(photos, tmp_path / "kept")
    (tmp_path / "others").mkdir()
    digit(1).save(tmp_path / "others" / "a.png")
    with pytest.raises(UserError, match=r"KEPT must be empty or made by openlvd dedup-folder from .*others: got"):
        dedup(tmp_path / "others", tmp_path / "kept")
    with pytest.raises(UserError, match="--out must be empty or made by openlvd balance-folder from"):
        balance(photos, tmp_path / "kept", 3)
    with pytest.raises(UserError, match="no folder or file"):
        dedup(tmp_path / "nowhere", tmp_path / "new")


def test_a_threshold_belongs_to_a_descriptor(photos, tmp_path):
    with pytest.raises(
        UserError, match="--min-similarity must be given with --backbone owner/model: got none"
    ) as caught:
        dedup(photos, tmp_path / "kept", backbone="owner/model")
    assert "SSCD" in caught.value.hint
    assert not (tmp_path / "kept").exists()


def test_most_files_bad_or_most_of_them_copies_is_a_mistake(photos, tmp_path):
    for i in range(30):
        (photos / f"{i}.bin").write_bytes(b"no image %d" % i)
    with pytest.raises(UserError, match=r"at most 0.5 of the images may be bad"):
        dedup(photos, tmp_path / "kept")
    many = tmp_path / "many"
    many.mkdir()
    for i in range(5):
        digit(1, 32 + i).save(many / f"{i}.png")
    with pytest.raises(UserError, match=r"at most 0.5 of the rows may be dropped"):
        dedup(many, tmp_path / "one")
    assert files_of(tmp_path / "one") == {}
    dedup(many, tmp_path / "one", most=0.9)
    assert set(files_of(tmp_path / "one")) == {"4.png"}


def test_balanced_shards_of_a_folder(tiny, tmp_path, capsys):
    out = tmp_path / "shards"
    balance(tiny.images / "web", out, 60)
    told = capsys.readouterr()
    said = json.loads(told.out.splitlines()[-1])
    assert "the descriptor pixels knows layout, not content" in told.err
    shards = Artifact(Location(str(out)))
    assert pool_of(shards).counts["rows"] == said["images_found"]
    moved = Artifact(Location(str(shutil.copytree(out, tmp_path / "a" / "b"))))
    assert pool_of(moved).location.uri.startswith(str(tmp_path / "a"))  # with its root it can be moved
    assert shards.stage == "shards" and shards.counts["kept"] == said["drawn"] == 60
    names = []
    for tar in sorted(out.glob("shard-*.tar")):
        with tarfile.open(tar) as file:
            names += [name for name in file.getnames() if not name.endswith(".json")]
    assert len(names) == len(set(names)) == 60
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "manifest.json", "part-0000000.parquet", "run.jsonl", "shard-0000000.tar"]  # fmt: skip
    kept_images = said["kept"]
    assert said["images_found"] == kept_images + said["bad"] + said["exact_copies"] + said["near_copies"]
    assert said["clusters"] == " > ".join(str(n) for n in reversed(default_clusters(kept_images)))
    assert Path(said["report"]) == out / ".openlvd" / "report.html" and Path(said["report"]).exists()


def test_balanced_shards_are_found_again_by_every_command(tiny, tmp_path, capsys):
    out = tmp_path / "shards"
    balance(tiny.images / "web", out, 20, [4])
    before = snapshot(out)
    balance(tiny.images / "web", out, 20, [4])
    assert snapshot(out) == before
    root = out / ".openlvd"
    recipe = read_recipe(Location(str(root / "recipe.yaml")), [], STAGES)
    results = list(run_recipe(recipe, Location(recipe.root or ""), LocalExecutor(recipe.resources)))
    assert {result.state for result in results} == {"done before"}
    assert read_root(Location(str(root)))["shards"].location.uri == str(out)


def test_a_finished_set_and_its_notes_stay_as_they_are(tiny, tmp_path):
    """What would be another set is told before anything is written."""
    photos, out = tmp_path / "photos", tmp_path / "shards"
    shutil.copytree(tiny.images / "web", photos)
    balance(photos, out, 20)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    clusters = yaml.safe_load((out / ".openlvd/recipe.yaml").read_text())["steps"]["concepts"]["n_clusters"]
    for change, words in [
        ({"target": 10}, r"made with --target 10: got .*, a finished set made with --target 20"),
        ({"n_clusters": [4]}, rf"made with --n-clusters \[4\]: got .* with --n-clusters {re.escape(str(clusters))}"),
        ({"min_similarity": 0.9}, r"made with --min-similarity 0.9: got .* with --min-similarity 0.99"),
        ({"backbone": str(tmp_path), "min_similarity": 0.99}, r"made with --backbone .*: got .* with --backbone pixel"),
    ]:
        with pytest.raises(UserError, match=f"--out must be empty or {words}"):
            balance(photos, out, **{"target": 20, **change})
    digit(77).save(photos / "new.png")
    with pytest.raises(UserError, match=r"of the images that are in .*photos now: got .*, a finished set of others"):
        balance(photos, out, 20)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (photos / "new.png").unlink()
    for n_clusters in (None, clusters):
        balance(photos, out, 20, n_clusters)
        assert {path: path.read_bytes() for path in before} == before


def test_mistakes_are_told_before_the_work_and_by_the_option(tiny, tmp_path):
    photos, out = tiny.images / "web", tmp_path / "o"
    for work, words in [
        (partial(balance, photos, out, 0), r"--target must be at least 1: got 0"),
        *[(partial(balance, photos, out, 5, wrong), r"--n-clusters") for wrong in ("abc", 100, [], [3, 5], [2.5])],
        (partial(balance, photos, out, 5, min_similarity=2.0), r"--min-similarity must be in \(0, 1\]: got 2.0"),
        (partial(dedup, photos, out, 2.0), r"--min-similarity must be in \(0, 1\]: got 2.0"),
        (partial(dedup, photos, out, most=3.0), r"--max-drop-fraction must be in \(0, 1\]: got 3.0"),
        (partial(dedup, photos, out, 0.9, "pixel"), r"--backbone must be pixels, .*: got 'pixel'"),
    ]:
        with pytest.raises(UserError, match=rf"\A{words}") as caught:
            work()
        assert "step" not in caught.value.hint
        command = "balance-folder" if work.func is balance else "dedup-folder"
        assert caught.value.hint in (f"openlvd {command} --help says what every option takes", "did you mean pixels?")
    assert not out.exists()


def test_balanced_shards_on_s3(photos, on_s3):
    balance(photos, on_s3 / "shards", 5)
    assert Artifact(on_s3 / "shards").counts["kept"] == 5
    names = {entry.name for entry in on_s3.list()}
    assert {"shards/manifest.json", "shards/shard-0000000.tar", "shards/.openlvd/report.html"} <= names
    with pytest.raises(UserError, match="--out and PHOTOS must not be in one another"):
        balance(on_s3 / "shards", on_s3 / "shards" / "again", 5)


def test_default_clusters_are_some_that_k_means_can_make():
    assert default_clusters(5000) == [500, 50] and default_clusters(150) == [15, 2] and default_clusters(1) == [1]
    for n in range(1, 3000):
        found = default_clusters(n)
        ClusterConfig(n_clusters=tuple(found))
        assert min(found) >= min(2, n) and max(found) <= n


def test_nothing_is_written_for_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder or file"):
        dedup(tmp_path / "nowhere", tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []
