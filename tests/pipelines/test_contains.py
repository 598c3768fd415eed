"""Is a benchmark in the set that a run has made? Compared with all pairs, with the run's own decisions, and by hand."""

import io
import json
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import N_EXAM, N_WEB, digit

from curation.artifact import Artifact, read_table
from curation.embeddings import embedding_parts
from pipelines.cli import FOUND, app
from pipelines.contains import search
from pipelines.errors import UserError


def ask(capsys, *args) -> tuple[list[dict], dict]:
    """What the command says: the images, and the sum."""
    app(["contains", *map(str, args), "--json"], standalone_mode=False)
    *images, total = map(json.loads, capsys.readouterr().out.splitlines())
    return images, total


def vectors_of(embeddings: Artifact) -> dict[int, np.ndarray]:
    """Unit rows in float64, by position in the pool."""
    starts, found = embeddings.input("pool").starts, {}
    for part, start in zip(embedding_parts(embeddings), starts, strict=False):
        rows, x = part.read()
        found |= dict(zip((rows + start).tolist(), x.astype("f8"), strict=True))
    return found


def kept_of(selection: Artifact, pool: Artifact) -> list[int]:
    """Positions of the kept rows."""
    tables = [read_table(selection.part(i)) for i in range(len(pool.parts))]
    return [int(row + start) for table, start in zip(tables, pool.starts, strict=False)
            for row in table["row"].to_numpy()[table["kept"].to_numpy()].tolist()]  # fmt: skip


@pytest.mark.parametrize("rows", [7, 2048])
def test_answers_are_those_of_a_comparison_of_all_pairs(tiny, capsys, monkeypatch, rows):
    """Of the exam with what is left when leaks were dropped, and with the pool before."""
    monkeypatch.setattr(search, "PART_ROWS", rows)
    web, exam = tiny.artifact("web"), tiny.artifact("exam")
    x, y = vectors_of(tiny.artifact("web_copy")), vectors_of(tiny.artifact("exam_copy"))
    names = [name for i in range(len(exam.parts)) for name in read_table(exam.part(i))["source"].to_pylist()]
    keys = [key for i in range(len(web.parts)) for key in read_table(web.part(i))["key"].to_pylist()]
    kept = kept_of(tiny.artifact("clean"), web)
    for step, low in (("clean", 0.97), ("usable", 0.99), ("unique", 0.95)):
        images, total = ask(capsys, tiny.root, tiny.images / "exam", "--step", step, "--min-similarity", low)
        rows = kept_of(tiny.artifact(step), web)
        score = np.array([[float(x[row] @ y[i]) for row in rows] for i in range(N_EXAM)]).astype("f4")
        best = {names[i]: (rows[score[i].argmax()], score[i].max()) for i in range(N_EXAM)}
        assert [image["image"] for image in images] == names
        for image in images:
            row, similarity = best[image["image"]]
            assert image["similarity"] == pytest.approx(similarity, abs=1e-6)
            assert (image["near"]["row_id"], image["near"]["key"]) == (row, keys[row])
            assert Path(image["near"]["path"]).is_file()
            assert image["answer"] == ("in" if similarity >= np.float32(low) else "no")
        n_in = int((score.max(1) >= np.float32(low)).sum())
        assert (total["images"], total["in"], total["rows"]) == (N_EXAM, n_in, len(rows))
        assert (total["set"], total["min_similarity"], total["similarity_from"]) == (step, low, "--min-similarity")
    assert n_in and len(kept) < len(rows)


def test_what_was_decontaminated_is_in_the_pool_alone_and_the_step_is_named(tiny, capsys):
    """The step's own similarity is asked with; the certificate has the same numbers."""
    images, total = ask(capsys, tiny.root, tiny.images / "exam", "--step", "clean", "--whole-pool")
    low = {"min_similarity": 0.99, "similarity_from": "clean", "embeddings": "web_copy", "backbone": "pixels"}
    assert low.items() <= total.items() and (total["in"], total["dropped"], total["images"]) == (0, 5, N_EXAM)
    dropped = [image for image in images if image["answer"] == "dropped"]
    assert len(dropped) == 5 and all(image["dropped_by"] == ["clean"] for image in dropped)
    for image in dropped:
        assert image["near"]["name"] == f"leak-{Path(image['image']).name}"
        assert f"dropped by `clean` (decontaminate): near {image['image']} of exam" in image["verdict"]
    clean = tiny.artifact("clean")
    known = json.loads((clean.location / "certificate-exam_copy.json").read())
    assert known["images_near"] == 5
    assert max(image["similarity"] for image in images if image["answer"] == "no") < 0.99
    nothing, total = ask(capsys, tiny.root, tiny.images / "exam", "--step", "clean")
    assert {image["answer"] for image in nothing} == {"no"} and "dropped" not in total
    assert max(image["similarity"] for image in nothing) == pytest.approx(known["highest_kept_similarity"], abs=1e-6)


def png(i: int, side: int = 32) -> bytes:
    out = io.BytesIO()
    digit(i, side).save(out, "PNG")
    return out.getvalue()


def make_benchmark(folder: Path, kind: str) -> Path:
    """A known image, one that nothing is like, the first again, and one that is none."""
    noise = io.BytesIO()
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(noise, "PNG")
    files = {"a.png": png(3), "b.png": noise.getvalue(), "c.png": png(3), "d.png": b"none"}
    folder.mkdir()
    if kind == "folder":
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder
    if kind == "tar":
        with tarfile.open(folder / "all.tar", "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return folder / "all.tar"
    pq.write_table(pa.table({"image": list(files.values())}), folder / "all.parquet")
    return folder / "all.parquet"


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_folder_a_tar_or_a_table_of_images(tiny, tmp_path, capsys, kind):
    source = make_benchmark(tmp_path / "benchmark", kind)
    images, total = ask(capsys, tiny.root, source, "--step", "usable")
    prefix = {"folder": "", "tar": "all.tar/", "parquet": "all.parquet/"}[kind]
    names = [prefix + (name if kind != "parquet" else str(i)) for i, name in enumerate(("a.png", "b.png"))]
    assert [(image["image"], image["answer"]) for image in images[:2]] == [(names[0], "in"), (names[1], "no")]
    assert images[0]["near"]["name"] == "0003.png" and images[0]["similarity"] == pytest.approx(1, abs=1e-6)
    assert sorted(image["answer"] for image in images[2:]) == ["again", "unread"]
    sums = {"images": 2, "in": 1, "again": 1, "unread": 1, "set": "usable", "similarity_from": "clean_searched"}
    assert sums.items() <= total.items()  # the last step of the run that compared, for the set itself was not


def test_one_image_and_lines_for_people(tiny, tmp_path, capsys):
    (tmp_path / "odd\nname.png").write_bytes(png(3))
    app(["contains", str(tiny.root), str(tmp_path / "odd\nname.png"), "--step", "clean"], standalone_mode=False)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("in       1.0000  odd\\nname.png (key ") and said[0].endswith(
        f"nearest {tiny.images}/web/0003.png"
    )
    kept = tiny.artifact("clean").counts["kept"]
    assert said[1:] == [
        "",
        "1 of 1 image has a near copy in the curated set `clean`",
        f"({kept:,} images; similarity of at least 0.99 by pixels, as in `clean`)",
    ]


def test_the_exit_code_tells_what_was_found_when_asked_to(tiny, tmp_path, capsys):
    (tmp_path / "known.png").write_bytes(png(3))
    (tmp_path / "leak.png").write_bytes(png(N_WEB + 1))
    ask(capsys, tiny.root, tmp_path / "known.png", "--step", "clean")
    ask(capsys, tiny.root, tmp_path / "leak.png", "--step", "clean", "--fail-if-found")
    with pytest.raises(SystemExit) as caught:
        ask(capsys, tiny.root, tmp_path / "known.png", "--step", "clean", "--fail-if-found")
    assert caught.value.code == FOUND == 3


def test_the_default_set_is_that_of_the_last_shards_of_a_union_too(tiny, tmp_path, capsys):
    """Rows of a mix over unions: an image of a member is found among the vectors of that member."""
    exam = next((tiny.images / "exam").rglob("*.png"))
    images, total = ask(capsys, tiny.root, exam, "--min-similarity", 0.999)
    assert (images[0]["answer"], total["set"]) == ("in", "mixed_shards")
    assert images[0]["near"]["name"] == str(exam.relative_to(tiny.images / "exam"))
    assert total["rows"] == tiny.artifact("mixed").counts["kept"]


def test_ray_answers_the_same_and_work_is_kept(tiny, tmp_path, capsys):
    args = [tiny.root, tiny.images / "exam", "--step", "clean", "--whole-pool", "--work", tmp_path / "work"]
    first = ask(capsys, *args)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("part-*.parquet")}
    command = [sys.executable, "-m", "pipelines.cli", "contains", *map(str, args), "--json", "--executor", "ray"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)  # a Ray of its own
    *images, total = map(json.loads, said.stdout.splitlines())
    assert stamps and (images, total) == first
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_descriptor_that_a_step_trained(tiny, capsys):
    """Its similarity must be given, for no step has compared by it."""
    row, web = kept_of(tiny.artifact("balanced"), tiny.artifact("web"))[0], tiny.artifact("web")  # of equals the first
    name = [name for i in range(len(web.parts)) for name in read_table(web.part(i))["source"].to_pylist()][row]
    args = [tiny.root, tiny.images / "web" / name, "--step", "balanced", "--embeddings", "web_vec"]
    with pytest.raises(
        UserError, match="--min-similarity must be given: no step of this run has compared images by web_vec"
    ):
        ask(capsys, *args)
    images, total = ask(capsys, *args, "--min-similarity", 0.99999)
    assert total["backbone"] == tiny.artifact("web_vec").facts["backbone"]["name"]
    assert images[0]["similarity"] == pytest.approx(1, abs=1e-6) and images[0]["near"]["name"] == name
    assert (images[0]["answer"], total["embeddings"]) == ("in", "web_vec")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--step", "near"], r"--step must name a step of stage shards, .*: got near, a neighbors step"),
        (["--step", "claen"], r"--step must name .*: got claen, no finished step"),
        (["--embeddings", "web"], r"--embeddings must name an embed step: got web, a pool step"),
        (["--min-similarity", "1.5"], r"--min-similarity must be in \(0, 1\]: got 1\.5"),
        (["--address", "here:1", "--executor", "ray"], r"--work must be given with --address: got none"),
    ],
)
def test_mistakes_are_told(tiny, monkeypatch, args, words):
    monkeypatch.setattr("pipelines.contains.command.open_executor", lambda *given: nullcontext())
    with pytest.raises(UserError, match=words):
        app(["contains", str(tiny.root), str(tiny.images / "exam"), *args], standalone_mode=False)


def test_images_or_a_root_that_are_not_there(tiny, tmp_path):
    with pytest.raises(UserError, match="images: "):
        app(["contains", str(tiny.root), str(tmp_path / "none"), "--step", "clean"], standalone_mode=False)
    with pytest.raises(UserError, match="must be the root of a run"):
        app(["contains", str(tmp_path), str(tiny.images / "exam")], standalone_mode=False)


def test_other_weights_than_the_run_had_are_refused(tiny, tmp_path, monkeypatch):
    real = Artifact.facts.fget
    uri = tiny.artifact("web_copy").location.uri

    def facts(self):
        known = real(self)
        return {**known, "backbone": {"name": "pixels", "weights": "others"}} if self.location.uri == uri else known

    monkeypatch.setattr(Artifact, "facts", property(facts))
    with pytest.raises(UserError, match="must be embedded as web_copy was, by pixels: got other weights or settings"):
        app(["contains", str(tiny.root), str(tiny.images / "exam"), "--step", "clean"], standalone_mode=False)


def test_nothing_is_left_behind(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(Path(tiny.root).rglob("*"))
    ask(capsys, tiny.root, tiny.images / "exam", "--step", "clean")
    assert not list(tmp_path.iterdir()) and sorted(Path(tiny.root).rglob("*")) == before
