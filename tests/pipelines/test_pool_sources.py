"""Pools of several sources, of lists, and of what img2dataset leaves: on to embeddings, shards and the story."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import digit

from curation.artifact import Artifact, read_table
from curation.embeddings import read_embeddings
from curation.store import Location
from pipelines.commands import read_value
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages import pool as stage
from pipelines.stages.table import STAGES
from pipelines.why.story import tell_why


def jpeg(i):
    out = io.BytesIO()
    digit(i).save(out, "JPEG")
    return out.getvalue()


def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet_of(rows, schema=None, group=None):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), out, row_group_size=group)
    return out.getvalue()


def fill(place: Location, files):
    for name, data in files.items():
        (place / name).write(data)


def steps_of(source, **pool):
    return {
        "web": {"stage": "pool", "source": source, "part_rows": 4, **pool},
        "vectors": {"stage": "embed", "pool": "web", "backbone": "pixels"},
        "shards": {"stage": "shards", "pool": "web", "shard_rows": 100},
    }


def run_steps(root, steps):
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    results = run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources))
    return {result.name: (Artifact(result.location), result.state) for result in results}


def make(root, source, **pool):
    return {name: artifact for name, (artifact, _) in run_steps(root, steps_of(source, **pool)).items()}


def rows_of(artifact, prefix="part"):
    names = [file.name for file in artifact.files if file.name.startswith(prefix) and file.name.endswith(".parquet")]
    return [row for name in names for row in read_table(artifact.location / name).to_pylist()]


def vectors(artifact):
    return np.concatenate([read_embeddings(artifact.part(i))[1] for i in range(len(artifact.parts))])


def in_shards(shards):
    """The bytes of every member by key and suffix."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(shards.location.path.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


@pytest.fixture
def sources(tmp_path, on_s3):
    """A folder, a tar on S3, a Parquet file and a list, with six images, two of them exact copies."""
    here = Location(str(tmp_path / "in"))
    fill(here, {"folder/b.jpg": jpeg(1), "folder/cat/a.jpg": jpeg(2), "folder/b.txt": b"a one"})
    fill(on_s3, {"x.tar": tar_of([("dog/x.jpg", jpeg(3)), ("dog/x.json", b'{"n": 1}'), ("dog/y.jpg", jpeg(1))])})
    fill(here, {"p/a.parquet": parquet_of([{"image": jpeg(4), "caption": "c"}, {"image": jpeg(5), "caption": None}])})
    fill(here, {"l/u/0.jpg": jpeg(6), "l/u/1.jpg": jpeg(2), "l/u/2.jpg": jpeg(7), "l/all.txt": b"u/0.jpg\nu/1.jpg\n"})
    return [f"{here}/folder", f"{on_s3}/x.tar", f"{here}/p/*.parquet", f"{here}/l/all.txt"]


@pytest.mark.parametrize("rows, many, n_tasks", [(1, 1024, 11 + 5 + 1), (2, 8, 6 + 5 + 1), (1, 7, 3 + 3 + 1)])
def test_units_scanned_in_pieces_give_the_same_bytes(tmp_path, monkeypatch, rows, many, n_tasks):
    """Folders and Parquet files are cut for the scan where units are few; copies are found across pieces."""
    place = Location(str(tmp_path / "in"))
    fill(place, {f"a/{i}.jpg": jpeg(i % 7) for i in range(10)} | {"a/bad.jpg": b"no", "a/3.txt": b"three"})
    fill(place, {"b.parquet": parquet_of([{"image": jpeg(5 + i % 4)} for i in range(9)], group=2)})
    fill(place, {"c.tar": tar_of([("c/x.jpg", jpeg(1)), ("c/y.jpg", jpeg(11))])})

    def pool(name):
        [result] = run_recipe(
            parse_recipe({"steps": {"web": {**steps_of(str(place))["web"], "max_bad_fraction": 0.5}}}, STAGES),
            Location(str(tmp_path / name)),
            LocalExecutor(),
        )
        return Artifact(result.location)

    whole = pool("whole")
    scanned = []
    monkeypatch.setattr(stage, "SCAN_ROWS", rows)
    monkeypatch.setattr(stage, "MANY_UNITS", many)
    monkeypatch.setattr(stage, "scan", lambda task, scan=stage.scan, **rest: scanned.append(task) or scan(task, **rest))
    assert pool("pieces").digest == whole.digest
    assert len(scanned) == n_tasks
    assert whole.counts["exact_duplicate"] == 11 and whole.counts["bad"] == 1 and whole.counts["kept"] == 10


def test_a_pool_of_several_sources_goes_all_the_way(sources, tmp_path):
    made = make(tmp_path / "root", sources)
    rows = rows_of(made["web"])
    assert [(row["row_id"], row["source"], row["member"], row["label"], row["caption"]) for row in rows] == [
        (0, "0/b.jpg", None, None, "a one"), (1, "0/cat/a.jpg", None, "cat", None),
        (2, "1/x.tar", "dog/x.jpg", "dog", None), (3, "2/a.parquet", None, None, "c"),
        (4, "2/a.parquet", None, None, None), (5, "3/u/0.jpg", None, "u", None),
    ]  # fmt: skip
    assert [(row["source"], row["member"], row["duplicate_of"]) for row in rows_of(made["web"], "rejected")] == [
        ("1/x.tar", "dog/y.jpg", "0/b.jpg"), ("3/u/1.jpg", None, "0/cat/a.jpg"),
    ]  # fmt: skip
    assert made["web"].manifest["locations"]["source"] == sources
    found = in_shards(made["shards"])
    assert {key: files["jpg"] for key, files in found.items()} == {
        row["key"]: jpeg(i) for row, i in zip(rows, (1, 2, 3, 4, 5, 6), strict=True)
    }
    alone = np.concatenate([vectors(make(tmp_path / str(i), at)["vectors"]) for i, at in enumerate(sources)])
    np.testing.assert_array_equal(vectors(made["vectors"]), alone[[0, 1, 2, 4, 5, 6]])


def test_every_image_of_several_sources_has_its_place(sources, tmp_path):
    made = make(tmp_path / "root", sources)
    root, here = Location(str(tmp_path / "root")), tmp_path / "in"
    places = [f"{here}/folder/b.jpg", f"{here}/folder/cat/a.jpg", sources[1], f"{here}/p/a.parquet",
              f"{here}/p/a.parquet", f"{here}/l/u/0.jpg"]  # fmt: skip
    for row, place in zip(rows_of(made["web"]), places, strict=True):
        [told] = tell_why(root, row["key"])["found"]
        assert told["steps"][0]["path"] == place and "gone" not in told["steps"][0]
        if row["member"] is None and row["offset"] is None:  # by its name here, there, and in its source
            for asked in (row["source"], place, row["source"].partition("/")[2]):
                assert tell_why(root, asked)["found"] == [told]
    (here / "l/all.txt").unlink()
    [told] = tell_why(root, "3/u/0.jpg")["found"]
    assert told["steps"][0]["path"] == f"{here}/l/u/0.jpg"


def test_the_page_shows_images_of_several_sources(sources, tmp_path):
    steps = {**steps_of(sources), "page": {"stage": "report"}}
    page, _ = run_steps(tmp_path / "root", steps)["page"]
    text = next(page.location.path.glob("*.html")).read_text()
    assert "3/u/1.jpg" in text and "same bytes as 0/cat/a.jpg" in text


def test_several_sources_that_have_moved_are_the_same_pool(sources, tmp_path, on_s3):
    made = make(tmp_path / "root", sources)
    shutil.move(tmp_path / "in", tmp_path / "there")
    (on_s3 / "moved/x.tar").write((on_s3 / "x.tar").read())
    moved = [at.replace(f"{tmp_path}/in", f"{tmp_path}/there") for at in sources]
    moved[1] = f"{on_s3}/moved/x.tar"
    steps = {**steps_of(moved), "shards": {"stage": "shards", "pool": "web", "shard_rows": 2}}
    again = run_steps(tmp_path / "root", steps)
    assert [again[name][1] for name in ("web", "vectors", "shards")] == ["done before", "done before", "done"]
    assert in_shards(again["shards"][0]) == in_shards(made["shards"])
    other = run_steps(tmp_path / "root", steps_of([moved[1], moved[0], *moved[2:]]))
    assert other["web"][1] == "done"  # another order is another pool


def test_one_source_in_a_list_is_that_source(tmp_path):
    fill(Location(str(tmp_path)), {"in/a.jpg": jpeg(0), "in/b.jpg": jpeg(1)})
    made = [make(tmp_path / str(i), at)["web"] for i, at in enumerate([f"{tmp_path}/in", [f"{tmp_path}/in"]])]
    manifests = [(artifact.location / "manifest.json").read() for artifact in made]
    assert manifests[0] == manifests[1] and made[0].location.name == made[1].location.name
    assert made[1].manifest["locations"] == {"source": f"{tmp_path}/in"}


def test_a_changed_caption_is_noticed(tmp_path):
    place = Location(str(tmp_path / "in"))
    fill(place, {"a.jpg": jpeg(0), "a.txt": b"one", "note.txt": b"one"})
    assert run_steps(tmp_path / "root", steps_of(str(place)))["web"][1] == "done"
    fill(place, {"note.txt": b"another"})
    assert run_steps(tmp_path / "root", steps_of(str(place)))["web"][1] == "done before"
    fill(place, {"a.txt": b"two"})
    web, state = run_steps(tmp_path / "root", steps_of(str(place)))["web"]
    assert state == "done" and [row["caption"] for row in rows_of(web)] == ["two"]


# img2dataset

N = 6


def downloads():
    """What img2dataset notes of some URLs; the last could not be fetched."""
    rows = []
    for i in range(N):
        status = {"status": "success", "error_message": None}
        if i == N - 1:
            status = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
        rows.append({"caption": f"text {i}", "url": f"http://x/{i}", "key": f"{i:09d}", **status, "width": 32,
                     "height": 32, "original_width": None if i == N - 1 else 640, "exif": "{}"})  # fmt: skip
    return rows


def write_img2dataset(place: Location, form: str):
    """One shard as its writers leave it: the notes of all rows in Parquet, images of those that were fetched."""
    rows = downloads()
    images = [jpeg(i) for i in range(N - 1)] + [None]
    fill(place, {"00000_stats.json": json.dumps({"count": N}).encode()})
    if form == "parquet":
        fill(place, {"00000.parquet": parquet_of([{**r, "jpg": d} for r, d in zip(rows, images, strict=True)])})
        return
    fill(place, {"00000.parquet": parquet_of(rows)})
    members = []
    for row, data in zip(rows, images, strict=True):
        if data is not None:
            note = json.dumps(row, indent=4).encode()
            members += [(f"{row['key']}.{s}", d) for s, d in
                        (("jpg", data), ("txt", row["caption"].encode()), ("json", note))]  # fmt: skip
    if form == "files":
        fill(place, {f"00000/{name}": data for name, data in members})
    else:
        fill(place, {"00000.tar": tar_of(members)})


@pytest.mark.parametrize("form", ["files", "webdataset", "parquet"])
def test_the_output_of_img2dataset_travels_to_the_shards(place, tmp_path, form):
    write_img2dataset(place, form)
    made = make(tmp_path / "root", str(place), max_bad_fraction=0.0)  # a page that is gone is no bad image
    counts = made["web"].counts
    assert (counts["kept"], counts["bad"]) == (N - 1, 0)
    assert counts["ignored_files"] == (1 if form == "parquet" else 2)
    rows, notes = rows_of(made["web"]), downloads()
    assert [row["caption"] for row in rows] == [f"text {i}" for i in range(N - 1)]
    assert [json.loads(row["metadata"]) for row in rows] == notes[: N - 1]
    rejected = [(row["reason"], row["detail"]) for row in rows_of(made["web"], "rejected")]
    assert rejected == ([("not_downloaded", "HTTP Error 404: Not Found")] if form == "parquet" else [])
    assert counts.get("not_downloaded", 0) == len(rejected)
    found = in_shards(made["shards"])
    for row, note in zip(rows, notes, strict=False):
        files = found[row["key"]]
        assert files["jpg"] == jpeg(row["row_id"]) and files["txt"].decode() == note["caption"]
        assert note.items() <= json.loads(files["json"]).items() or note in json.loads(files["json"]).values()


def test_columns_of_every_kind_travel_as_json(place, tmp_path):
    """Hugging Face's layout with what a table may hold; its JSON is read by any reader."""
    from datetime import UTC, date, datetime, timedelta
    from decimal import Decimal

    columns = {
        "text": (pa.large_string(), "long"),
        "tags": (pa.list_(pa.string()), ["a", None]),
        "objects": (pa.struct([("box", pa.list_(pa.float32(), 4)), ("id", pa.int64())]),
                    {"box": [0, 1, 2, 0.5], "id": 7}),
        "scores": (pa.map_(pa.string(), pa.float64()), [("a", 0.5)]),
        "price": (pa.decimal128(10, 2), Decimal("12.50")),
        "when": (pa.timestamp("us", "UTC"), datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)),
        "day": (pa.date32(), date(2020, 1, 2)),
        "lasts": (pa.duration("s"), timedelta(days=1)),
        "nan": (pa.float64(), float("nan")),
        "deep": (pa.list_(pa.float64()), [float("inf"), 1.0]),
        "half": (pa.float16(), np.float16(0.5)),
        "kind": (pa.dictionary(pa.int8(), pa.string()), "b"),
        "old": (pa.binary(), "é".encode()),
        "mask": (pa.binary(), jpeg(1)),
        "other": (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"bytes": jpeg(2), "path": "m.jpg"}),
        "none": (pa.null(), None),
    }  # fmt: skip
    table = pa.table({"image": [{"bytes": jpeg(0), "path": "0.jpg"}]})
    for name, (kind, value) in columns.items():
        table = table.append_column(name, pa.array([value], kind))
    out = io.BytesIO()
    pq.write_table(table, out)
    fill(place, {"train-00000-of-00001.parquet": out.getvalue()})
    made = make(tmp_path / "root", str(place))
    [row] = rows_of(made["web"])
    assert row["caption"] == "long" and row["member"] == "0.jpg"
    told = json.loads(row["metadata"], parse_constant=pytest.fail)
    assert told == {
        "text": "long", "tags": ["a", None], "objects": {"box": [0, 1, 2, 0.5], "id": 7}, "scores": [["a", 0.5]],
        "price": "12.50", "when": "2020-01-02 03:04:05+00:00", "day": "2020-01-02", "lasts": "1 day, 0:00:00",
        "nan": None, "deep": [None, 1.0], "half": 0.5, "kind": "b", "old": "é", "mask": None,
        "other": {"bytes": None, "path": "m.jpg"}, "none": None,
    }  # fmt: skip
    [files] = in_shards(made["shards"]).values()
    written = json.loads(files["json"], parse_constant=pytest.fail)
    assert told.items() <= written.items() or told in written.values()


# mistakes


def stop(tmp_path, source, words):
    with pytest.raises(UserError, match=words):
        make(tmp_path / "root", source)
    assert not (tmp_path / "root/web").exists()


def test_mistakes_in_sources_are_told_before_anything_is_written(tmp_path):
    place = Location(str(tmp_path / "in"))
    fill(place, {"one/a.jpg": jpeg(0), "two/x.json": b"{}", "l.txt": b"one/a.jpg\none/b.jpg\n", "none.txt": b""})
    stop(tmp_path, [f"{place}/one", f"{place}/two"], "in/two must hold images, tars or Parquet files: got none")
    stop(tmp_path, [f"{place}/one", f"{place}/three"], "web: no folder or file .*/in/three")
    stop(
        tmp_path,
        [f"{place}/one", f"{place}/two/../one/"],
        "pool.source must name every source once: got .*/in/two/../one twice",
    )
    stop(tmp_path, f"{place}/l.txt", r"in/l\.txt must list files .*: got 1 of 2 that are not, first one/b\.jpg in")
    stop(tmp_path, f"{place}/none.txt", r"in/none\.txt must hold images, tars or Parquet files: got none")
    stop(tmp_path, f"{place}/l-.txt", r"no folder or file .*l-\.txt")
    stop(tmp_path, [], r"pool\.source must name at least one source, each by a path: got \(\)")
    stop(tmp_path, [f"{place}/one", ""], "pool.source must name at least one source")
    stop(tmp_path, 3, "^web.source must be a valid string: got 3")
    stop(tmp_path, [3], "^web.source")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("photos", "photos"), ("2024", "2024"), ("a: b", "a: b"), ("null", "null"), ("[0-9]*.tar", "[0-9]*.tar"),
        ("[a, s3://b/c]", ["a", "s3://b/c"]), ('["a", "b c"]', ["a", "b c"]), ("*.jpg", "*.jpg"),
        ("[a]/*[b]", "[a]/*[b]"),
    ],
)  # fmt: skip
def test_sources_on_the_command_line(text, value):
    assert read_value(text, str | tuple[str, ...], "--source", "pool") == value


def test_the_folder_of_a_test_is_left_alone(tmp_path):
    """Nothing is written where images are, whatever the form of the source."""
    place = Location(str(tmp_path / "in"))
    fill(place, {"a.jpg": jpeg(0), "a.txt": b"x", "all.txt": b"a.jpg\na.txt\n"})
    before = {path: path.stat().st_mtime_ns for path in Path(str(place)).rglob("*")}
    made = make(tmp_path / "root", f"{place}/all.txt")
    assert [row["caption"] for row in rows_of(made["web"])] == ["x"]
    assert {path: path.stat().st_mtime_ns for path in Path(str(place)).rglob("*")} == before
