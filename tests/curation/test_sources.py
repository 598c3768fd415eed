import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import socket
import tarfile
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import sources, tars
from curation.listing import ROOT_FILE, file_at, list_source, source_root
from curation.sources import (
    Unit,
    ahead,
    cut_unit,
    plan_units,
    read_checked,
    read_images,
    read_ranges,
    read_unit,
    split_parquet,
)
from curation.store import S3_REQUESTS, Location, client
from curation.tars import Record, read_tar, split_key

USTAR, PAX, GNU = tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT


def make_tar(members, kind=PAX):
    """The bytes of a tar of (name or TarInfo, data)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_parquet(rows, group=2, schema=None):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), out, row_group_size=group)
    return out.getvalue()


def scan(source, part_rows=4, image_column="image", label_column="label"):
    """The records of a source, as the pool's first pass reads them."""
    listing = list_source(source)
    units = [unit for some in plan_units(listing, part_rows) for unit in split_parquet(some, listing.root, part_rows)]
    return [record for unit in units for record in read_unit(listing.root, unit, image_column, label_column)]


def scan_tar(tmp_path, data, label_column="label"):
    (tmp_path / "x.tar").write_bytes(data)
    return list(read_tar(tmp_path / "x.tar", "x.tar", label_column))


def pool_rows(records):
    """What a pool keeps of records that have data."""
    return pa.table(
        {
            "source": pa.array([r.source for r in records], pa.string()),
            "offset": pa.array([r.offset for r in records], pa.int64()),
            "n_bytes": pa.array([len(r.data) for r in records], pa.int64()),
            "key": pa.array([hashlib.sha256(r.data).hexdigest() for r in records], pa.string()),
        }
    )


# folders


def test_a_folder_is_listed_by_name_without_hidden_files_and_metadata(place):
    images = ["a.jpg", "b [1]/c d.PNG", "b [1]/sub/x", "é/日本.webp", "z#1.tar", "z.parquet"]
    ignored = [".hidden.jpg", "b [1]/.git/x.jpg", "__MACOSX/a.jpg", "c.json", "c.TXT", "b [1]/list.csv", "x.y.sha256"]
    for name in images + ignored:
        (place / name).write(name.encode())
    listing = list_source(place)
    assert [entry.name for entry in listing.entries] == sorted(images) and listing.ignored == len(ignored)
    assert [entry.size for entry in listing.entries] == [len(name.encode()) for name in sorted(images)]


def test_loose_files_are_read_with_their_folder_as_label(place):
    for name in ("a.jpg", "cat/b.jpg", "cat/sub dir/c", "dog/d #1.jpg"):
        (place / name).write(name.encode())
    assert scan(place) == [
        Record("a.jpg", None, None, b"a.jpg"),
        Record("cat/b.jpg", None, None, b"cat/b.jpg", "cat"),
        Record("cat/sub dir/c", None, None, b"cat/sub dir/c", "sub dir"),
        Record("dog/d #1.jpg", None, None, b"dog/d #1.jpg", "dog"),
    ]


def test_links_to_files_are_read(tmp_path):
    (tmp_path / "far.jpg").write_bytes(b"far")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/near.jpg").symlink_to("../far.jpg")
    assert [record.data for record in scan(Location(str(tmp_path / "in")))] == [b"far"]


def test_a_single_file_is_a_source(place):
    (place / "x [1].jpg").write(b"1")
    (place / "x [1].jpg.txt").write(b"no")
    (place / "t.tar").write(make_tar([("a.jpg", b"2")]))
    assert [(r.source, r.data) for r in scan(place / "x [1].jpg")] == [("x [1].jpg", b"1")]
    assert [(r.source, r.data) for r in scan(place / "t.tar")] == [("t.tar", b"2")]
    assert source_root(place / "t.tar") == place and source_root(place) == place
    with pytest.raises(FileNotFoundError, match=r"no folder or file .*nothing"):
        list_source(place / "nothing")


def test_a_single_file_with_a_relative_name_is_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jpg").write_bytes(b"1")
    assert [record.data for record in scan(Location("x.jpg"))] == [b"1"]


NOT_UTF8 = [b"caf\xe9.jpg", b"caf\xe9/a b%20.jpg", "é".encode() + b"\xff.tar", b"\xed\xa0\x80.parquet"]


def test_a_name_that_is_no_utf8_has_a_name_that_leads_back(tmp_path):
    plain = ["caf%E9.jpg", "a%20b.jpg", "x"]
    for name in plain:
        (tmp_path / name).write_bytes(name.encode())
    for name in NOT_UTF8:
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes({".tar": make_tar([("m.jpg", name)]), ".parquet": make_parquet([{"image": name}])}.get(
            path.suffix, name))  # fmt: skip
    root = Location(str(tmp_path))
    listing = list_source(root)
    names = [entry.name for entry in listing.entries]
    assert set(names) == {*plain, "./caf%E9.jpg", "./caf%E9/a%20b%2520.jpg", "./%C3%A9%FF.tar", "./%ED%A0%80.parquet"}
    for entry in listing.entries:
        assert file_at(root, entry.name).path.stat().st_size == entry.size
    records = scan(root)
    assert sorted(r.data for r in records) == sorted([*NOT_UTF8, *(name.encode() for name in plain)])
    assert {r.label for r in records} == {None, "caf%E9"}
    rows = pool_rows(records)
    assert list(read_checked(root, rows)) == [r.data for r in records]
    single = root / os.fsdecode(NOT_UTF8[0])
    assert [(r.source, r.data) for r in scan(single)] == [("./caf%E9.jpg", NOT_UTF8[0])]
    (tmp_path / os.fsdecode(NOT_UTF8[0])).write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"caf\udce9\.jpg must hold the image that the pool saw"):
        list(read_checked(root, rows.filter(pa.array([r.source == "./caf%E9.jpg" for r in records]))))


def test_on_s3_a_name_is_always_as_it_stands(on_s3):
    (on_s3 / "./a%20b.jpg").write(b"1")
    (on_s3 / "c//d.jpg").write(b"2")
    assert [(r.source, r.data) for r in scan(on_s3)] == [("./a%20b.jpg", b"1"), ("c//d.jpg", b"2")]


ODD_NAMES = [
    " leading and trailing ", "-rf", "--help", "a\nb.jpg", "tab\t.jpg", "[x].jpg", "b*.jpg", "c?.jpg", "d#1.jpg",
    "e%41.jpg", "f'\".jpg", "g\\h.jpg", "${HOME}.jpg", "~.jpg", "s3:", "café.jpg", "cafe\u0301.jpg", "x" * 255,
    "日" * 85, "😀.png", "no suffix", "a.jpg.", "COM1", "\x7f\x01.jpg", "\u202ejpg.exe",
]  # fmt: skip


def test_odd_names_are_names(tmp_path):
    """Among them two that look alike, in two Unicode forms."""
    for name in ODD_NAMES:
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.jpg").write_bytes(name.encode() + b"/")
    root = Location(str(tmp_path))
    records = scan(root)
    want = {name: name.encode() for name in ODD_NAMES} | {f"in/{n}/x.jpg": n.encode() + b"/" for n in ODD_NAMES}
    assert {r.source: r.data for r in records} == want and len(records) == len(want)
    assert list(read_checked(root, pool_rows(records))) == [r.data for r in records]


def test_links_that_lead_nowhere_or_round_are_entries_that_cannot_be_read(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "far.jpg").write_bytes(b"far")
    (inside / "a.jpg").write_bytes(b"near")
    links = {"b.jpg": "a.jpg", "c.jpg": "../out/far.jpg", "d.jpg": "nowhere", "e.jpg": "e.jpg", "t.tar": "nowhere",
             "p.parquet": "nowhere", "round": ".", "out": "../out", "sub/up": "..", "x.txt": "nowhere",
             "dev": "/dev/zero", "sub/run.json": "nowhere"}  # fmt: skip
    for name, target in links.items():
        (inside / name).symlink_to(target)
    listing = list_source(Location(str(inside)))
    assert listing.ignored == 6  # three links to folders, metadata twice, a device
    records = scan(Location(str(inside)))
    gone = "cannot be read: it is gone, or a link that leads nowhere"
    assert {r.source: r.data or r.detail for r in records} == {
        "a.jpg": b"near", "b.jpg": b"near", "c.jpg": b"far", "d.jpg": gone,
        "e.jpg": f"cannot be read: {os.strerror(errno.ELOOP)}", "t.tar": gone, "p.parquet": gone,
    }  # fmt: skip
    (inside / "d.jpg").unlink()
    (inside / "d.jpg").symlink_to("a.jpg")
    stamps = [{e.name: e.stamp for e in found.entries} for found in (listing, list_source(Location(str(inside))))]
    assert {name for name in stamps[0] if stamps[0][name] != stamps[1][name]} == {"d.jpg"}


@pytest.mark.timeout(30)
def test_pipes_and_sockets_are_never_opened(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"1")
    os.mkfifo(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "c.tar")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("d.jpg")
        listing = list_source(Location(str(tmp_path)))
    assert [entry.name for entry in listing.entries] == ["a.jpg"] and listing.ignored == 3
    with pytest.raises(ValueError, match=r"b\.jpg must be a folder or a file: it is a pipe"):
        list_source(Location(str(tmp_path / "b.jpg")))


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


@pytest.fixture
def open_place():
    """A folder that any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_may_not_be_read_is_a_record(open_place):
    for name in ("a.jpg", "b.jpg", "c.tar", "d.parquet", "shut/x.jpg", "blind/x.jpg"):
        (open_place / name).parent.mkdir(exist_ok=True)
        (open_place / name).write_bytes(b"1")
    modes = {"b.jpg": 0, "c.tar": 0, "d.parquet": 0, "shut": 0, "blind": 0o444}
    for name, mode in modes.items():
        (open_place / name).chmod(mode)
    root = Location(str(open_place))
    with without_rights():
        records = scan(root)
        (open_place / "nothing").exists()
    shut = f"cannot be read: {os.strerror(errno.EACCES)}"
    assert {r.source: r.data or r.detail for r in records} == {
        "a.jpg": b"1", "b.jpg": shut, "c.tar": shut, "d.parquet": shut, "shut": shut, "blind/x.jpg": shut,
    }  # fmt: skip
    open_place.chmod(0o000)
    try:
        with without_rights(), pytest.raises(PermissionError):
            list_source(root)
    finally:
        open_place.chmod(0o755)
        (open_place / "shut").chmod(0o755)
        (open_place / "blind").chmod(0o755)


@pytest.mark.parametrize("name", ["a.jpg", "a.tar", "a.parquet"])
def test_a_file_that_vanishes_after_it_was_listed_is_a_record(place, name):
    (place / name).write(make_tar([("x.jpg", b"1")]) if name == "a.tar" else make_parquet([{"image": b"1"}]))
    (place / "b.jpg").write(b"2")
    listing = list_source(place)
    (place / name).delete()
    units = [u for some in plan_units(listing, 1) for u in split_parquet(some, place, 1)]
    records = [r for unit in units for r in read_unit(place, unit, "image", "label")]
    assert [(r.source, r.data) for r in records] == [(name, None), ("b.jpg", b"2")]
    assert records[0].detail == "cannot be read: it is gone, or a link that leads nowhere"


def test_a_file_that_vanishes_while_it_is_listed_is_not_there(tmp_path, monkeypatch):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"1")
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda p, **k: (Path(p).name == "a.jpg" and Path(p).unlink(), real(p, **k))[1])
    assert [entry.name for entry in list_source(Location(str(tmp_path))).entries] == ["b.jpg"]


@pytest.mark.parametrize("name", ["a.jpg", "a.tar", "a.parquet"])
@pytest.mark.parametrize("error", [OSError("S3 failed"), PermissionError("S3 refused"), TimeoutError()])
def test_reading_that_fails_for_now_is_no_bad_image(on_s3, monkeypatch, name, error):
    """Else a broken connection would leave images out of a pool for good."""
    (on_s3 / name).write(make_parquet([{"image": b"1"}]))
    listing = list_source(on_s3)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Location, "read", fail)
    monkeypatch.setattr(Location, "local_copy", fail)
    with pytest.raises(type(error)):
        for unit in plan_units(listing, 1):
            list(read_unit(on_s3, split_parquet(unit, on_s3, 1)[0], "image", "label"))


def test_a_file_longer_than_any_image_is_not_read(place, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 1000)
    (place / "a.jpg").write(b"1" * 1000)
    (place / "b.mp4").write(b"1" * 1001)
    (place / "c.tar").write(make_tar([("x.mp4", b"2" * 1001), ("y.jpg", b"3" * 1000)]))
    assert [(r.source, r.data and len(r.data), r.detail) for r in scan(place)] == [
        ("a.jpg", 1000, ""), ("b.mp4", None, "1001 bytes, more than 1000"),
        ("c.tar", None, "1001 bytes, more than 1000"), ("c.tar", 1000, ""),
    ]  # fmt: skip


def test_what_systems_leave_in_folders_is_ignored(place):
    left = [".DS_Store", "._a.jpg", "x/._a.jpg", ".ipynb_checkpoints/a.jpg", "Thumbs.db", "x/thumbs.db", "desktop.ini",
            "__MACOSX/x/._a.jpg", ".Trash-1000/b.jpg"]  # fmt: skip
    for name in [*left, "x/a.jpg", "a..jpg", "thumbs.jpg"]:
        (place / name).write(b"1")
    listing = list_source(place)
    assert [entry.name for entry in listing.entries] == ["a..jpg", "thumbs.jpg", "x/a.jpg"]
    assert listing.ignored == len(left)


@pytest.mark.parametrize("part_rows", [1, 2, 3, 100])
def test_units_cover_the_listing_in_order(place, part_rows):
    names = ["a.jpg", "b.jpg", "c.jpg", "d.tar", "e.jpg", "f.PARQUET", "g.parquet", "h.jpg", "i.jpg", "j.gz"]
    for name in names:
        (place / name).write(b"")
    units = plan_units(list_source(place), part_rows)
    assert [name for unit in units for name in unit.names] == names
    assert [unit.kind for unit in units if unit.kind != "files"] == ["tar", "parquet", "parquet"]
    assert all(len(unit.names) <= part_rows if unit.kind == "files" else len(unit.names) == 1 for unit in units)
    if part_rows == 3:
        assert [unit.names for unit in units] == [
            ("a.jpg", "b.jpg", "c.jpg"), ("d.tar",), ("e.jpg",), ("f.PARQUET",), ("g.parquet",),
            ("h.jpg", "i.jpg", "j.gz"),
        ]  # fmt: skip


def test_what_runs_wrote_below_the_source_is_ignored(place):
    images = ["a.jpg", "runs.jpg", "mine/run.json.jpg", "other/b.jpg"]
    written = ["runs/run.json", "runs/web/0123/part-0000000.parquet", "runs/shards/4567/shard-0000000.tar", "x/y/z.jpg"]
    for name in images + written:
        (place / name).write(b"")
    for name in ("runs/run.json", "x/run.json"):
        (place / name).write(json.dumps({"seed": 0, "steps": {}}).encode())
    for name in ("other/run.json", "mine/run.json"):  # somebody else's files of this name
        (place / name).write(b"{" if name < "n" else b'{"lr": 1}')
    listing = list_source(place)
    assert [entry.name for entry in listing.entries] == sorted(images) and listing.ignored == 7
    with pytest.raises(ValueError, match=r"runs must not be the root of a run, .*: it holds run\.json"):
        list_source(place / "runs")
    assert list_source(place / "runs/shards").entries  # what a run made may be a source
    assert ROOT_FILE == "run.json"


@pytest.mark.parametrize("name", ["a.zip", "a.tgz", "b/A.TAR.GZ"])
def test_compressed_archives_are_refused(place, name):
    (place / name).write(b"2")
    for source in (place, place / name):
        with pytest.raises(ValueError, match=f"must be unpacked to .tar or to files: 1 in .*, first .*{name[-4:]}$"):
            list_source(source)
    (place / "x.jpg").write(b"1")
    assert len(list_source(place).entries) == 2  # one bad file among images, which the pool will count


# tars


@pytest.mark.parametrize("kind", [USTAR, PAX, GNU])
def test_a_tar_gives_what_tarfile_gives(tmp_path, kind):
    rng = np.random.default_rng(0)
    members = [(f"d{i % 3}/é {i:03d}.jpg", rng.bytes(int(rng.integers(0, 2000)))) for i in range(50)]
    data = make_tar(members, kind)
    records = scan_tar(tmp_path, data)
    assert [(r.member, r.data) for r in records] == members
    assert all(data[r.offset : r.offset + len(r.data)] == r.data for r in records)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [member.offset_data for member in tar] == [r.offset for r in records]


def test_keys_and_images_are_those_that_webdataset_finds(tmp_path):
    import webdataset

    members = [
        ("v1.2/a.b.c/0001.jpg", b"1"), ("v1.2/a.b.c/0001.cls", b"7"), ("v1.2/a.b.c/0002.seg.png", b"2"),
        ("v1.2/a.b.c/0002.jpg", b"3"), ("./0003.JPG", b"4"), ("./0003.json", b"{}"), ("é/ü ü.png", b"5"),
    ]  # fmt: skip
    ours = [(split_key(r.member), r.data) for r in scan_tar(tmp_path, make_tar(members))]
    theirs = [
        ((sample["__key__"], name), data)
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
        for name, data in sample.items()
        if not name.startswith("__") and name not in ("json", "cls")
    ]
    assert [((key, suffix.lower()), data) for (key, suffix), data in ours] == theirs
    assert (
        split_key("a/b") == ("a/b", "")
        and split_key(".x.jpg") == ("", "x.jpg")
        and split_key("a.b/c.d.e")
        == (
            "a.b/c",
            "d.e",
        )
    )


def test_side_files_of_a_key_go_to_all_its_images(tmp_path):
    note = {"label": "cat", "caption": "from json", "n": 1}
    records = scan_tar(
        tmp_path,
        make_tar(
            [
                ("a.json", json.dumps(note).encode()), ("a.jpg", b"1"), ("a.seg.png", b"2"), ("a.txt", b"from text"),
                ("b.jpg", b"3"), ("b.json", json.dumps(note).encode()), ("c.jpg", b"4"), ("c.cls", b" 12\n"),
                ("d.jpg", b"5"), ("e.txt", b"nobody's"), ("f.jpg", b"6"), ("f.json", b'{"text": "t", "label": 3}'),
                ("f.cls", b"x"), ("a.jpg", b"7"), ("g.JPG", b"8"), ("g.JSON", b'{"label": "upper"}'),
            ]
        ),
    )  # fmt: skip
    assert [(r.data, r.label, r.caption) for r in records] == [
        (b"1", "cat", "from text"), (b"2", "cat", "from text"), (b"3", "cat", "from json"), (b"4", "12", None),
        (b"5", None, None), (b"6", "3", "t"), (b"7", None, None),
        (b"8", "upper", None),
    ]  # fmt: skip
    assert json.loads(records[0].metadata) == note and records[3].metadata is None


def test_without_a_label_the_folder_in_the_tar_is_one(tmp_path):
    members = [
        ("c3/12.jpg", b"1"), ("./train/c4/13.jpg", b"2"), ("./14.jpg", b"3"), ("../15.jpg", b"4"), ("/16.jpg", b"5"),
        ("c5/17.jpg", b"6"), ("c5/17.cls", b"7"), ("c5/18.jpg", b"8"), ("c5/18.json", b'{"label": "cat"}'),
        ("c6/19.jpg", b"9"), ("c6/19.json", b'{"n": 1}'), ("20.jpg", b"10"),
    ]  # fmt: skip
    labels = [record.label for record in scan_tar(tmp_path, make_tar(members))]
    assert labels == ["c3", "c4", None, None, None, "7", "cat", "c6", None]


def test_the_label_column_is_looked_up_in_the_metadata(tmp_path):
    note = b'{"species": ["a", 1], "label": "no"}'
    [record] = scan_tar(tmp_path, make_tar([("a.jpg", b"1"), ("a.json", note), ("a.cls", b"no")]), "species")
    assert record.label == '["a", 1]'
    [record] = scan_tar(tmp_path, make_tar([("a.jpg", b"1"), ("a.json", note), ("a.cls", b"yes")]), "genus")
    assert record.label == "yes"


@pytest.mark.parametrize(
    "note", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"[1, 2]", b"null", b'"text"', b'{"label": null}']
)
def test_odd_metadata_does_not_cost_the_image(tmp_path, note):
    [record] = scan_tar(tmp_path, make_tar([("a.jpg", b"1"), ("a.json", note), ("a.txt", b"\xff caption")]))
    assert record.data == b"1" and record.label is None and record.caption == "\ufffd caption"


def test_text_always_fits_a_table(tmp_path):
    """Half surrogates from JSON, and names that are no UTF-8."""
    name = os.fsdecode(b"caf\xe9.jpg")
    key = os.fsdecode(b"caf\xe9")
    note = b'{"label": "\\ud800", "caption": "x\\udfff"}'
    [record] = scan_tar(tmp_path, make_tar([(name, b"1"), (f"{key}.json", note)], GNU))
    assert (record.member, record.label, record.caption) == ("caf?.jpg", "?", "x?")
    pa.array([record.member, record.label, record.caption, record.metadata], pa.string())


def test_names_are_data_and_never_paths(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["/etc/passwd.jpg", "../../up.jpg", "a/../../b.jpg", "C:\\x.jpg", "~/x.jpg", "-rf.jpg", "$(x).jpg"]
    data = make_tar([(name, name.encode()) for name in names])
    before = sorted(tmp_path.rglob("*"))
    records = scan_tar(tmp_path / "in", data)
    assert [r.member for r in records] == names and [r.data for r in records] == [name.encode() for name in names]
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "in/x.tar"]


def test_what_is_no_regular_file_is_left_out(tmp_path):
    members = [("a.jpg", b"1")]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        info = tarfile.TarInfo(f"odd{kind.decode()}.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        members.append((info, b""))
    members.append(("b.jpg", b"2"))
    assert [r.data for r in scan_tar(tmp_path, make_tar(members))] == [b"1", b"2"]


def test_a_sparse_member_is_a_bad_record_and_what_follows_is_read(tmp_path):
    data = make_tar([("a.jpg", b"1")], GNU)[:1024]
    info = tarfile.TarInfo("s.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    head = bytearray(info.tobuf(GNU))
    head[386:410] = b"00000010000\0" + b"00000001000\0"  # 512 bytes at offset 4096 ...
    head[483:495] = b"00010000000\0"  # ... of 2 MiB
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    data += bytes(head) + b"s" * 512 + make_tar([("b.jpg", b"2")], GNU)
    records = scan_tar(tmp_path, data)
    assert [(r.member, r.data, r.detail) for r in records] == [
        ("a.jpg", b"1", ""),
        ("s.jpg", None, "a sparse member of a tar"),
        ("b.jpg", b"2", ""),
    ]


def test_a_spoilt_sparse_map_ends_a_tar(tmp_path):
    """tarfile lets the ValueError of its parser pass."""
    info = tarfile.TarInfo("s.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
    records = scan_tar(tmp_path, make_tar([("a.jpg", b"1"), (info, b"x" * 2000), ("b.jpg", b"2")]))
    assert [r.data for r in records] == [b"1", None]
    assert records[1].detail.startswith("tar breaks off after 1 members: ")


def test_an_empty_tar_has_no_records_and_an_empty_file_is_no_tar(tmp_path):
    assert scan_tar(tmp_path, make_tar([])) == []
    [record] = scan_tar(tmp_path, b"")
    assert record.data is None and record.detail.startswith("tar breaks off after 0 members: ")
    [record] = scan_tar(tmp_path, b"GIF89a" * 1000)
    assert record.data is None and record.detail.startswith("tar breaks off after 0 members: ")


@pytest.mark.parametrize("kind", [USTAR, PAX, GNU])
def test_a_cut_tar_gives_every_whole_member_and_says_that_it_is_cut(tmp_path, kind):
    rng = np.random.default_rng(0)
    names = ["a.jpg", "b.jpg", "b.json", "c" * 150 + "/d.jpg" if kind != USTAR else "c.jpg", "é.jpg", "f.jpg"]
    members = [(name, b"{}" if name.endswith("json") else rng.bytes(size)) for name, size in
               zip(names, (300, 512, 2, 1025, 0, 5000), strict=True)]  # fmt: skip
    data = make_tar(members, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [(m.name, m.offset_data + m.size) for m in tar]
    end_mark = (ends[-1][1] + 511) // 512 * 512 + 512
    cuts = {0, 1, *rng.integers(0, len(data), 60).tolist(), *range(0, len(data), 512)}
    cuts |= {max(0, at + d) for _, at in ends for d in (-1, 0, 1)} | {end_mark - 1, end_mark, end_mark + 1}
    for cut in sorted(cuts):
        records = scan_tar(tmp_path, data[:cut])
        whole = [name for name, end in ends if end <= cut and not name.endswith("json")]
        if cut < end_mark:
            last = records.pop()
            assert last.data is None and last.member is None and last.detail.startswith("tar breaks off after "), cut
        if cut and not records:
            assert not [name for name, end in ends if end <= cut]
        if "é.jpg" in whole and len(records) < len(whole):  # an empty member ends with its header
            whole.remove("é.jpg")
        assert [r.member for r in records] == whole, cut
        assert all(r.data == dict(members)[r.member] for r in records)


def test_a_spoilt_header_ends_a_tar_with_a_record(tmp_path):
    data = bytearray(make_tar([(f"{i}.jpg", bytes([i]) * 600) for i in range(6)], USTAR))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        at = [member.offset for member in tar]
    for i in range(6):
        spoilt = data.copy()
        spoilt[at[i] + 3] ^= 255
        records = scan_tar(tmp_path, bytes(spoilt))
        assert [r.data for r in records] == [bytes([k]) * 600 for k in range(i)] + [None]
        assert records[-1].detail.startswith(f"tar breaks off after {i} members: ")


def with_checksum(head):
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return head


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [b"0", b"5", b"x", b"L", b"S", b"Z"])
@pytest.mark.parametrize("size", [-512, -513, -1024, -(1 << 40), 1 << 40, 1 << 62, 1 << 85])
def test_a_size_that_cannot_be_ends_a_tar(tmp_path, kind, size):
    """Negative sizes lead back to where one was: tarfile alone would go round for ever."""
    data = bytearray(make_tar([(f"{i}.jpg", bytes([i]) * 600) for i in range(3)], USTAR))
    head = data[1536:2048]
    head[156:157] = kind
    head[124:136] = (size % (1 << 96)).to_bytes(12) if size < 0 else b"\x80" + size.to_bytes(11)
    data[1536:2048] = with_checksum(head)
    records = scan_tar(tmp_path, bytes(data))
    assert records[0].data == b"\0" * 600
    assert records[-1].data is None and records[-1].detail.startswith("tar breaks off after ")


def odd_tar(rng, kind):
    """A tar of this format, or by webdataset, with names, sizes, times, types and pax headers of all sorts."""
    if kind == "webdataset":
        import webdataset

        out = io.BytesIO()
        writer = webdataset.TarWriter(out)
        for i in range(3):
            writer.write({"__key__": f"{i:04d}", "jpg": rng.bytes(int(rng.choice([0, 5, 512, 700]))), "cls": i})
        writer.close()
        return out.getvalue()
    names = ["a/%d.jpg", "%d.png", "d/" * 60 + "%d.jpg", "é%d.jpg", ".h%d.jpg", "__MACOSX/%d.jpg", "%d.cls"]
    names += ["x" * 110 + "%d.webp"] if kind != USTAR else []
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for i in range(int(rng.integers(7))):
            info = tarfile.TarInfo(str(rng.choice(names)) % i)
            data = rng.bytes(int(rng.choice([0, 1, 30, 511, 512, 513, 1500])))
            info.mtime = float(rng.choice([0, 1.5, 1.7e9, 1.7e9 + 0.1])) if kind == PAX else 5
            info.uid = int(rng.choice([0, 1000, 3_000_000] if kind != USTAR else [0]))
            info.type = bytes(rng.choice([b"0", b"0", b"0", b"0", b"\0", b"5", b"2", b"7"])) or b"\0"
            info.linkname = "q" if info.type == b"2" else ""
            info.size = len(data) if info.type not in b"52" else 0
            tar.addfile(info, io.BytesIO(data) if info.size else None)
    return out.getvalue()


def spoilt(data, rng):
    """Cut, with bytes of headers changed, mostly with a checksum that is right, or followed by more."""
    data = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.25 else data)
    fields = [(0, 40), (0, 100), (100, 160), (124, 136), (148, 156), (156, 157), (329, 345), (345, 500), (0, 512)]
    for _ in range(int(rng.integers(4)) if len(data) >= 512 else 0):
        block = int(rng.integers(len(data) // 512)) * 512
        data[block + int(rng.integers(*fields[rng.integers(len(fields))]))] = rng.choice(
            list(b"\0 017=x\ngLSV\x80\xff")
        )
        if rng.random() < 0.8:
            data[block : block + 512] = with_checksum(data[block : block + 512])
    return bytes(data) * int(rng.choice([1, 1, 1, 2])) + bytes(int(rng.choice([0, 0, 0, 600])))


@pytest.mark.parametrize("kind", [USTAR, PAX, GNU, "webdataset"])
@pytest.mark.parametrize("seed", range(10))
def test_headers_read_here_and_by_tarfile_give_the_same(tmp_path, monkeypatch, seed, kind):
    rng = np.random.default_rng(seed)
    whole = odd_tar(rng, kind)
    cuts = [whole[: r.offset + len(r.data)] for r in scan_tar(tmp_path, whole) if r.data is not None]
    for data in [whole, *cuts, *(spoilt(whole, rng) for _ in range(12))]:
        assert scan_tar(tmp_path, data) == scan_by_tarfile(tmp_path, monkeypatch, data)


@pytest.mark.parametrize("kind", [b"x", b"g"])
@pytest.mark.parametrize(
    "size, records",
    [
        (28, b"28 mtime=1795280771.6901999\n"), (40, b"20 mtime=1795280771\n20 atime=1795280771\n"), (0, None),
        (0, b""), (20, b"00 mtime=1795280771\n"), (20, b"21 mtime=1795280771\n"), (20, b"19 mtime=1795280771\n"),
        (12, b"12 size=600\n"), (38, b"20 mtime=1795280771\n18 path=again.jpg\n"), (12, b"12 mtime=1-2\n"),
        (20, b"20 mtime=1795280771\n18 path=again.jpg\n"), (600, b"20 mtime=1795280771\n"),
        (21, b"20 mtime=1795280771\n"), (10, b"20 mtime=1795280771\n"), (18, b"18 path=again.jpg\n"),
    ],
)  # fmt: skip
def test_pax_headers_say_what_tarfile_reads_in_them(tmp_path, monkeypatch, size, records, kind):
    data = make_tar([("a.jpg", b"1" * 700), ("b.jpg", b"2" * 700), ("c.jpg", b"3")], USTAR)
    head = bytearray(data[:512])
    head[124:136], head[156:157] = b"%011o\0" % size, kind
    block = b"" if records is None else records.ljust(512, b"\0")
    data = data[:1536] + bytes(with_checksum(head)) + block + data[1536:]
    found = scan_tar(tmp_path, data)
    assert found == scan_by_tarfile(tmp_path, monkeypatch, data) and found[0].data == b"1" * 700


def scan_by_tarfile(tmp_path, monkeypatch, data):
    """Without the headers that we read ourselves."""
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_plain_member", lambda file, at: None)
        return scan_tar(tmp_path, data)


@pytest.mark.parametrize("kind", [USTAR, GNU, "webdataset"])
def test_plain_headers_are_read_without_tarfile(tmp_path, monkeypatch, kind):
    data = make_tar([(f"{i}.jpg", b"1") for i in range(5)], kind) if kind != "webdataset" else None
    data = data or odd_tar(np.random.default_rng(0), kind)
    asked, ask = [], tars._ByTarfile.member
    monkeypatch.setattr(tars._ByTarfile, "member", lambda self, at: asked.append(at) or ask(self, at))
    records = scan_tar(tmp_path, data)
    assert len(records) in (3, 5) and len(asked) == 1 and not data[asked[0] :].strip(b"\0")  # only for the end


def test_tars_one_after_the_other_are_read_to_the_last(tmp_path):
    one = make_tar([("a.jpg", b"1"), ("b.jpg", b"2" * 700)], USTAR)
    two = make_tar([("a.jpg", b"3"), ("é" * 80 + ".jpg", b"4")], PAX)
    three = make_tar([("c.jpg", b"5")], GNU)
    data = one + bytes(3 * 512) + two + make_tar([]) + three + bytes(10240)
    records = scan_tar(tmp_path, data)
    assert [r.data for r in records] == [b"1", b"2" * 700, b"3", b"4", b"5"]
    assert all(data[r.offset : r.offset + len(r.data)] == r.data for r in records)
    lone = one[: one.rindex(b"2") // 512 * 512 + 512] + bytes(512) + two  # one block of zeros between
    assert [r.data for r in scan_tar(tmp_path, lone)] == [b"1", b"2" * 700, b"3", b"4"]


def test_what_follows_a_tar_and_is_none_is_told(tmp_path):
    whole = make_tar([("a.jpg", b"1")])
    for more in (b"garbage", b"x" * 2000, bytes(5000) + b"\1"):
        records = scan_tar(tmp_path, whole + more)
        assert [r.data for r in records] == [b"1", None]
        assert records[1].detail.startswith("tar breaks off after 1 members: ")


def test_the_end_of_zeros_is_found_across_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_ZEROS_AT_A_TIME", 1024)
    one, two = make_tar([("a.jpg", b"1")]), make_tar([("b.jpg", b"2")])
    for n in range(9):
        assert [r.data for r in scan_tar(tmp_path, one + bytes(512 * n) + two)] == [b"1", b"2"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_one_record_that_says_so(tmp_path, pack):
    [record] = scan_tar(tmp_path, pack(make_tar([("a.jpg", b"1")])))
    assert record.data is None and record.detail == "tar breaks off after 0 members: it is compressed"


def test_a_tar_in_a_tar_and_members_of_one_name(tmp_path):
    inner = make_tar([("x.jpg", b"never")])
    members = [("a.jpg", b"1"), ("in.tar", inner), ("a.jpg", b"2"), ("a.jpg", b"1")]
    records = scan_tar(tmp_path, make_tar(members))
    assert [(r.member, r.data) for r in records] == members
    assert len({r.offset for r in records}) == 4


def test_what_systems_leave_in_tars_is_ignored(tmp_path):
    left = ["._a.jpg", "x/._b.jpg", "Thumbs.db", "__MACOSX/a.jpg", ".DS_Store"]
    members = [("a.jpg", b"1"), *((name, b"no") for name in left), ("a.txt", b"still a's")]
    members += [("./.cache/c.jpg", b"3"), ("../d.jpg", b"4")]
    records = scan_tar(tmp_path, make_tar(members))
    assert [(r.data, r.caption) for r in records] == [(b"1", "still a's"), (b"3", None), (b"4", None)]


@pytest.mark.timeout(60)
def test_garbage_never_raises_and_costs_nothing_before_it(tmp_path):
    """Random bytes in headers whose checksum is right: what stands before them is found."""
    rng = np.random.default_rng(1)
    for kind in (USTAR, PAX, GNU):
        names = [f"{'é' * 60}/{'d' * 60}/{i}.jpg" if kind != USTAR else f"{i}.jpg" for i in range(4)]
        data = make_tar([(name, bytes([i + 1]) * 700) for i, name in enumerate(names)], kind)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            ends = [(m.offset_data + m.size, m.name) for m in tar]
        heads = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        for _ in range(80):
            spoilt = bytearray(data)
            at = int(rng.choice(heads))
            where = at + int(rng.choice([0, 100, 124, 130, 135, 148, 156, 157, 257, 345, 483, 512, 520, 530]))
            spoilt[where : where + 4] = rng.bytes(4)
            if where < at + 512:
                spoilt[at : at + 512] = with_checksum(spoilt[at : at + 512])
            records = scan_tar(tmp_path, bytes(spoilt[: len(data)]))
            found = [r.member for r in records if r.data is not None]
            before = [name for end, name in ends if end <= at]
            assert found[: len(before)] == before


# Parquet


HF = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        ("text", pa.string()),
    ]
)


def test_parquet_of_hugging_face(place):
    rows = [{"image": {"bytes": b"%d" % i, "path": f"{i}.jpg"}, "label": i, "text": f"text {i}"} for i in range(5)]
    rows += [{"image": {"bytes": None, "path": "x"}, "label": None, "text": None}, {"image": None}]
    (place / "a b.parquet").write(make_parquet(rows, 2, HF))
    records = scan(place)
    assert [(r.member, r.offset, r.data, r.label, r.caption) for r in records] == [
        *((f"{i}.jpg", i, b"%d" % i, str(i), f"text {i}") for i in range(5)), ("x", 5, b"", None, None),
        (None, 6, b"", None, None),
    ]  # fmt: skip
    assert json.loads(records[2].metadata) == {"label": 2, "text": "text 2"} and records[0].source == "a b.parquet"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(2), pa.dictionary(pa.int8(), pa.binary())])
def test_parquet_with_plain_bytes(place, kind):
    table = pa.table({"picture": pa.array([b"aa", b"bb", None], kind), "class": ["x", "y", "z"]})
    out = io.BytesIO()
    pq.write_table(table, out)
    (place / "a.parquet").write(out.getvalue())
    records = scan(place, image_column="picture", label_column="class")
    assert [(r.member, r.data, r.label) for r in records] == [(None, b"aa", "x"), (None, b"bb", "y"), (None, b"", "z")]
    assert list(read_images(place, pool_rows(records), "picture")) == [b"aa", b"bb", b""]


def test_parquet_without_other_columns_and_without_rows(tmp_path):
    place = Location(str(tmp_path))
    (place / "a.parquet").write(make_parquet([{"image": b"1"}]))
    assert scan(place) == [Record("a.parquet", None, 0, b"1")]
    (place / "a.parquet").write(make_parquet([], schema=pa.schema({"image": pa.binary()})))
    assert scan(place) == []


@pytest.mark.parametrize(
    "row, words",
    [
        ({"picture": b"1", "label": 2},
         "must have a column 'image' (image_column) with image bytes: it has picture, label"),
        ({"image": "a.jpg"}, "rows 0 to 0: an image column must be binary or a struct with binary 'bytes': got string"),
        ({"image": {"path": "x"}}, "must be binary or a struct with binary 'bytes': got struct<path: string>"),
        ({"image": [b"1"]}, "got list"),
        ({"image": None}, "got null"),
    ],
)  # fmt: skip
def test_parquet_without_images_is_a_record(tmp_path, row, words):
    (tmp_path / "a.parquet").write_bytes(make_parquet([row]))
    (tmp_path / "b.jpg").write_bytes(b"2")
    record, other = scan(Location(str(tmp_path)))
    assert (record.source, record.data, other.data) == ("a.parquet", None, b"2")
    assert words in record.detail


@pytest.mark.parametrize("cut", [0, 3, 50, -1])
def test_a_broken_parquet_file_is_a_record(place, cut):
    (place / "a.parquet").write(make_parquet([{"image": b"1"}])[:cut])
    (place / "b.jpg").write(b"2")
    record, other = scan(place)
    assert (record.source, record.data, other.data) == ("a.parquet", None, b"2")
    assert record.detail.startswith("must be a Parquet file: ") and str(place) not in record.detail


def test_a_broken_row_group_costs_its_rows_alone(place):
    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(2000), "label": i} for i in range(12)]
    whole = make_parquet(rows, 3)
    meta = pq.ParquetFile(io.BytesIO(whole)).metadata
    spoilt = bytearray(whole)
    at = meta.row_group(1).column(0).data_page_offset
    spoilt[at : at + 30] = bytes(30)  # the header of a page
    (place / "a.parquet").write(bytes(spoilt))
    records = scan(place)
    good = [r for r in records if r.data is not None]
    assert [(r.offset, r.data) for r in good] == [(i, rows[i]["image"]) for i in range(12) if not 3 <= i < 6]
    [bad] = [r for r in records if r.data is None]
    assert bad.detail.startswith("rows 3 to 5: ") and records.index(bad) == 3
    table = pool_rows(good)
    assert list(read_checked(place, table)) == [r.data for r in good]
    (place / "a.parquet").write(whole)
    table = pool_rows(scan(place))
    (place / "a.parquet").write(bytes(spoilt))
    with pytest.raises(ValueError, match=r"a\.parquet must hold the images that the pool saw: "):
        list(read_images(place, table))


def test_odd_cells_do_not_cost_the_image(tmp_path):
    """Text that is no UTF-8, times that Python cannot tell, names that stand twice."""
    bad_text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 4], "<i4")), pa.py_buffer(b"\xffabc"))
    table = pa.table(
        {
            "image": [b"1", b"2"],
            "caption": bad_text,
            "at": pa.array([1, 10**18 + 1], pa.timestamp("ns")),
            "far": pa.array([2**62, 0], pa.timestamp("us")),
            "n": pa.array([float("nan"), 1.0]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    records = scan(Location(str(tmp_path)))
    assert [(r.data, r.caption) for r in records] == [(b"1", None), (b"2", "abc")]
    note = json.loads(records[1].metadata)
    assert note["at"] == "2001-09-09 01:46:40.000000001" and note["far"].startswith("1970-01-01")
    twice = pa.Table.from_arrays([pa.array([b"1"]), pa.array([b"2"])], ["image", "image"])
    pq.write_table(twice, tmp_path / "a.parquet")
    [record] = scan(Location(str(tmp_path)))
    assert record.data is None and record.detail == "rows 0 to 0: must have one column 'image': it has 2"


@pytest.mark.parametrize("seed", range(15))
def test_runs_of_row_groups_cover_every_row_once(tmp_path, seed):
    rng = np.random.default_rng(seed)
    schema = pa.schema({"image": pa.binary()})
    sizes = rng.integers(0, 7, int(rng.integers(1, 9))).tolist()
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for size in sizes:
            writer.write_table(pa.table({"image": [rng.bytes(3) for _ in range(size)]}, schema), row_group_size=100)
    whole = pq.read_table(tmp_path / "a.parquet")["image"].to_pylist()
    root, part_rows = Location(str(tmp_path)), int(rng.integers(1, 12))
    units = split_parquet(Unit("parquet", ("a.parquet",)), root, part_rows)
    records = [record for unit in units for record in read_unit(root, unit, "image", "label")]
    assert [(r.offset, r.data) for r in records] == list(enumerate(whole))
    assert all(len(list(read_unit(root, unit, "image", "label"))) <= max(part_rows, 7) for unit in units)
    assert [unit.first for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    other = Unit("tar", ("a.tar",))
    assert split_parquet(other, root, part_rows) == [other]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("part_rows", [5, 100])
def test_the_pieces_of_a_unit_have_its_records(tmp_path, part_rows, rows):
    place = Location(str(tmp_path))
    for i in range(7):
        (place / f"a/{i}.jpg").write(b"%d" % i)
    (place / "a/1.txt").write(b"one")
    (place / "a/6.json").write(b'{"label": "six"}')
    (place / "b.tar").write(make_tar([(f"{i}.jpg", b"t%d" % i) for i in range(3)]))
    (place / "c.parquet").write(make_parquet([{"image": b"p%d" % i, "label": i} for i in range(7)], 2))
    (place / "d.parquet").write(b"no")
    listing = list_source(place)
    n_pieces = {"files": 0, "tar": 0, "parquet": 0}
    for whole in plan_units(listing, part_rows):
        for unit in split_parquet(whole, place, part_rows):
            pieces = cut_unit(unit, place, rows)
            n_pieces[unit.kind] += len(pieces)
            records = [record for piece in pieces for record in read_unit(place, piece, "image", "label")]
            assert records == list(read_unit(place, unit, "image", "label"))
            assert all(len(piece.names) <= rows for piece in pieces)
    assert n_pieces["tar"] == 1 and (n_pieces["parquet"] == 5 if rows <= 2 else True)
    assert n_pieces["files"] == sum(-(-n // rows) for n in ([5, 2] if part_rows == 5 else [7]))


# reading again


@pytest.fixture(scope="module")
def every_kind():
    rng = np.random.default_rng(0)
    files = {f"loose/{i} [x].jpg": rng.bytes(50 + i) for i in range(6)}
    for t in range(2):
        files[f"t {t}.tar"] = make_tar([(f"k{i}.{s}", rng.bytes(int(rng.integers(0, 3000)))) for i in range(12)
                                        for s in ("jpg", "json", "seg.png")])  # fmt: skip
        rows = [{"image": {"bytes": rng.bytes(int(rng.integers(0, 99))), "path": f"{i}"}, "label": i} for i in range(9)]
        files[f"z{t}.parquet"] = make_parquet(rows, 4, HF)
    return files


def test_images_are_read_again_as_they_were_scanned(place, every_kind, monkeypatch):
    monkeypatch.setattr(sources, "COALESCE_GAP", 2000)
    monkeypatch.setattr(sources, "COALESCE_BYTES", 9000)
    for name, data in every_kind.items():
        (place / name).write(data)
    records = scan(place)
    assert len(records) == 6 + 2 * 24 + 2 * 9
    rng = np.random.default_rng(0)
    subsets = [np.arange(len(records)), np.array([], int), np.array([30])]
    subsets += [np.sort(rng.choice(len(records), 30, replace=False)) for _ in range(3)]
    subsets += [rng.permutation(len(records))[:30], rng.integers(0, len(records), 20)]
    table = pool_rows(records)
    for subset in subsets:
        rows = table.take(pa.array(subset))
        expected = [records[i].data for i in subset]
        assert list(read_images(place, rows)) == expected
        assert list(read_checked(place, rows)) == expected


def test_an_image_that_has_changed_is_named(place):
    (place / "a.jpg").write(b"1234")
    (place / "t.tar").write(make_tar([("x.jpg", b"5678"), ("y.jpg", b"1" * 600)]))
    (place / "z.parquet").write(make_parquet([{"image": b"90"}, {"image": b"12"}]))
    table = pool_rows(scan(place))
    assert len(list(read_checked(place, table))) == 5
    (place / "a.jpg").write(b"1235")
    assert next(read_images(place, table.slice(0, 1))) == b"1235"
    with pytest.raises(ValueError, match=r"a.jpg must hold the image that the pool saw: its bytes have changed since"):
        list(read_checked(place, table))
    (place / "a.jpg").write(b"12345")
    with pytest.raises(ValueError, match=r"a.jpg must hold the image that the pool saw: it had 4 bytes and has 5"):
        list(read_images(place, table))
    (place / "t.tar").write((place / "t.tar").read()[:1700])
    with pytest.raises(ValueError, match=r"t.tar must hold .*: it had 600 bytes and has 164"):
        list(read_images(place, table.slice(1, 2)))
    (place / "z.parquet").write(make_parquet([{"image": b"90"}]))
    with pytest.raises(ValueError, match=r"z.parquet must have row 1: it has 1 rows"):
        list(read_images(place, table.slice(3)))
    (place / "a.jpg").delete()
    with pytest.raises(FileNotFoundError):
        list(read_images(place, table.slice(0, 1)))


def test_a_run_of_row_groups_fetches_no_more_than_it_needs(on_s3, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(20_000)} for _ in range(40)]
    (on_s3 / "a.parquet").write(make_parquet(rows, 4))
    real, asked = Location.read, []
    monkeypatch.setattr(Location, "read", lambda self, *a: asked.append(len(d := real(self, *a))) or d)
    units = split_parquet(Unit("parquet", ("a.parquet",)), on_s3, 8)
    assert len(units) == 5 and sum(asked) < 200_000  # the footer, out of 800,000 bytes
    asked.clear()
    records = list(read_unit(on_s3, units[2], "image", "label"))
    assert [r.data for r in records] == [row["image"] for row in rows[16:24]]
    assert sum(asked) < 400_000
    asked.clear()
    assert list(read_images(on_s3, pool_rows(records[:1]))) == [rows[16]["image"]]
    assert sum(asked) < 300_000


def test_ranges_that_nearly_touch_are_one_request_of_bounded_size(on_s3, monkeypatch):
    monkeypatch.setattr(sources, "COALESCE_GAP", 10)
    monkeypatch.setattr(sources, "COALESCE_BYTES", 100)
    data = bytes(range(256)) * 2
    (on_s3 / "x").write(data)
    real, asked = client().get_object, []
    monkeypatch.setattr(client(), "get_object", lambda **k: asked.append(k.get("Range")) or real(**k))
    offsets, lengths = [0, 25, 60, 90, 95, 300, 290, 310], [20, 30, 0, 5, 96, 150, 5, 1]
    found = list(read_ranges(on_s3 / "x", offsets, lengths))
    assert found == [data[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
    assert asked == ["bytes=0-59", "bytes=90-94", "bytes=95-190", "bytes=300-449", "bytes=290-294", "bytes=310-310"]


# several requests at a time


class Requests:
    """Reads that note how many are on their way and how many bytes nobody has taken."""

    def __init__(self, sizes):
        self.sizes, self.lock, self.now, self.most, self.bytes, self.most_bytes = sizes, threading.Lock(), 0, 0, 0, 0

    def read(self, i):
        with self.lock:
            self.now, self.bytes = self.now + 1, self.bytes + self.sizes[i]
            self.most, self.most_bytes = max(self.most, self.now), max(self.most_bytes, self.bytes)
        time.sleep(0.002 * (i % 3))
        with self.lock:
            self.now -= 1
        if self.sizes[i] == 13:
            raise OSError(f"broken {i}")
        return i


def test_what_is_asked_for_ahead_comes_in_order_within_bounds(monkeypatch):
    monkeypatch.setattr(sources, "AHEAD_BYTES", 50)
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(1, 12, 100).tolist(), 70, 90, *[1] * 60]
    requests = Requests(sizes)
    for i, got in enumerate(ahead((partial(requests.read, i) for i in range(len(sizes))), sizes)):
        assert got == i
        with requests.lock:
            requests.bytes -= sizes[i]
    assert 2 < requests.most <= S3_REQUESTS and 50 < requests.most_bytes <= 90  # one that is larger goes alone
    assert list(ahead([], [])) == []


def test_an_error_comes_in_its_turn_and_nothing_is_left_running():
    requests = Requests([1] * 5 + [13] + [1] * 200)
    got = []
    with pytest.raises(OSError, match="broken 5"):
        for i in ahead((partial(requests.read, i) for i in range(206)), requests.sizes):
            got.append(i)
    assert got == [0, 1, 2, 3, 4] and requests.now == 0 and requests.bytes < 60
    first = ahead((partial(requests.read, i) for i in range(206)), requests.sizes)
    assert next(first) == 0
    first.close()  # as when a step stops
    assert requests.now == 0


def test_loose_files_on_s3_are_asked_for_together(on_s3, monkeypatch):
    """As many as one process may, in the scan and when they are read again; the same records as one by one."""
    for i in range(40):
        (on_s3 / f"{i % 4}/{i:02d}.jpg").write(bytes([i]) * (i + 1))
    (on_s3 / "1/05.txt").write(b"five")
    (on_s3 / "3/39.json").write(b'{"n": 39}')
    listing = list_source(on_s3)
    real, lock, now, most = Location.read, threading.Lock(), [0], [0]

    def slow(self, *args):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        try:
            return real(self, *args)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(Location, "read", slow)
    client().delete_object(Bucket=on_s3.bucket, Key=f"{on_s3.key}/2/22.jpg")
    [unit] = plan_units(listing, 100)
    records = list(read_unit(on_s3, unit, "image", "label"))
    assert 4 < most[0] <= S3_REQUESTS
    order = sorted(range(40), key=lambda i: (i % 4, i))
    assert [r.source for r in records] == [f"{i % 4}/{i:02d}.jpg" for i in order]
    assert [r.data for r in records] == [None if i == 22 else bytes([i]) * (i + 1) for i in order]
    assert [(r.source, r.caption, r.metadata) for r in records if r.caption or r.metadata] == [
        ("1/05.jpg", "five", None), ("3/39.jpg", None, '{"n": 39}'),
    ]  # fmt: skip
    most[0] = 0
    there = [record for record in records if record.data is not None]
    assert list(read_checked(on_s3, pool_rows(there))) == [record.data for record in there]
    assert 4 < most[0] <= S3_REQUESTS
