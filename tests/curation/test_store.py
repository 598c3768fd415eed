import hashlib
import io
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from curation import s3, store
from curation.store import SIDE_PREFIX, Conflict, Entry, Location, RangeFile, client, file_sha256

NAMES = ["a.txt", "b/c d.txt", "b/[x](1) {y}*?.txt", "é/日本 🐟.jpg", "p#q%20&r=s+t.tar", "b/deep/er/x", "'quo\"te's;"]


def names(location):
    return [entry.name for entry in location.list()]


def test_what_is_written_is_read_in_every_kind_of_name(place):
    for i, name in enumerate(NAMES):
        (place / name).write(f"{i} of {name}".encode())
    for i, name in enumerate(NAMES):
        assert (place / name).read() == f"{i} of {name}".encode()
        assert (place / name).exists() and (place / name).name == name.rpartition("/")[2]
        assert (place / name).parent / (place / name).name == place / name
    assert names(place) == sorted(NAMES)
    assert names(place / "b") == sorted(name[2:] for name in NAMES if name.startswith("b/"))


def test_ranges_are_slices(place):
    data = bytes(range(200))
    (place / "x").write(data)
    for offset, length in [(0, 10), (5, None), (0, None), (190, 50), (199, 1), (200, 5), (500, 5), (500, None), (3, 0)]:
        expected = data[offset:] if length is None else data[offset : offset + length]
        assert (place / "x").read(offset, length) == expected
    (place / "empty").write(b"")
    assert (place / "empty").read() == (place / "empty").read(0, 10) == b""


def test_a_range_file_is_a_file(place):
    data = bytes(range(200))
    (place / "x").write(data)
    file, oracle = RangeFile(place / "x"), io.BytesIO(data)
    assert file.readable() and file.seekable() and not file.writable()
    rng = np.random.default_rng(0)
    for _ in range(60):
        whence = int(rng.integers(0, 3))
        offset = int(rng.integers(0, 250)) if whence == 0 else int(rng.integers(0, 60)) * (1 if whence == 1 else -1)
        assert file.seek(offset, whence) == oracle.seek(offset, whence) == file.tell()
        size = int(rng.integers(-1, 90))
        assert file.read(size) == oracle.read(size) and file.tell() == oracle.tell()
    with pytest.raises(FileNotFoundError):
        RangeFile(place / "none")


def test_a_listing_is_sorted_with_sizes_and_stamps(place):
    for name, size in [("b", 3), ("a/z", 0), ("a.b", 7), ("Z", 1)]:
        (place / name).write(b"x" * size)
    entries = place.list()
    assert [(entry.name, entry.size) for entry in entries] == [("Z", 1), ("a.b", 7), ("a/z", 0), ("b", 3)]
    assert (place / "b").entry() == next(entry for entry in entries if entry.name == "b")


def test_a_stamp_changes_with_the_content(place):
    (place / "x").write(b"one")
    before = (place / "x").entry()
    (place / "x").write(b"two")
    if place.is_local:
        os.utime(place.path / "x", ns=(1, 1))  # a clock may be too coarse for two writes
    assert (place / "x").entry().stamp != before.stamp


def test_a_folder_is_no_prefix(place):
    for name in ("a/b/x", "a/bc", "a/bc.d/y", "a/b.txt"):
        (place / name).write(b"1")
    assert names(place / "a/b") == ["x"]
    assert (place / "a/b").is_folder() and not (place / "a/b.tx").is_folder() and not (place / "a/bc").is_folder()
    assert not (place / "a/b.tx").exists() and (place / "a/bc").exists()
    (place / "a/b").delete()
    assert names(place / "a") == ["b.txt", "bc", "bc.d/y"]


def test_delete_takes_a_file_a_folder_or_nothing(place):
    for i in range(3):
        (place / f"d/{i}/[x] #.txt").write(b"1")
    (place / "d/0/[x] #.txt").delete()
    (place / "nothing").delete()
    assert names(place) == ["d/1/[x] #.txt", "d/2/[x] #.txt"]
    (place / "d").delete()
    assert names(place) == [] and not (place / "d").is_folder()


def test_what_is_absent_is_a_file_not_found(place):
    assert not place.exists() and not place.is_folder() and place.list() == []
    with pytest.raises(FileNotFoundError):
        (place / "x").read()
    with pytest.raises(FileNotFoundError):
        (place / "x").read(3, 4)
    with pytest.raises(FileNotFoundError):
        (place / "x").entry()
    with pytest.raises(FileNotFoundError), (place / "x").local_copy() as path:
        path.read_bytes()


def test_a_write_that_fails_leaves_nothing(place, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (place / "old").write(b"old")
    for name in ("new", "old"):
        with pytest.raises(ZeroDivisionError), (place / name).side_file() as side:
            side.write_bytes(b"half")
            raise ZeroDivisionError
    assert names(place) == ["old"] and (place / "old").read() == b"old"
    assert not list(tmp_path.rglob(f"{SIDE_PREFIX}*"))


def test_no_reader_sees_half_a_file(place):
    """A file gets its name at the end: it is not there while it is being written."""
    with (place / "x").side_file() as side:
        side.write_bytes(b"1")
        assert not (place / "x").exists() and place.list() == []
    assert (place / "x").read() == b"1" and not side.exists()


def test_write_new_loses_against_what_is_there(place):
    (place / "lock").write_new(b"first")
    with pytest.raises(Conflict):
        (place / "lock").write_new(b"second")
    assert (place / "lock").read() == b"first" and names(place) == ["lock"]
    (place / "lock").delete()
    (place / "lock").write_new(b"third")
    assert (place / "lock").read() == b"third"


def test_write_over_replaces_what_has_the_stamp(on_s3):
    lock = on_s3 / "x"
    with pytest.raises(FileNotFoundError):
        lock.write_over(b"0", "0" * 32)
    lock.write_new(b"1")
    stamp = lock.write_over(b"2", lock.entry().stamp)
    assert (lock.read(), lock.entry().stamp) == (b"2", stamp)
    lock.write(b"3")
    with pytest.raises(Conflict):
        lock.write_over(b"4", stamp)
    assert lock.read() == b"3"


def test_of_many_at_once_one_makes_the_new_file(place):
    won = []

    def try_it(i):
        try:
            (place / "lock").write_new(str(i).encode())
            won.append(i)
        except Conflict:
            pass

    threads = [threading.Thread(target=try_it, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (place / "lock").read() == str(won[0]).encode()


def test_a_local_copy_has_the_bytes_and_goes_away(place):
    (place / "x #1").write(b"data")
    with (place / "x #1").local_copy() as path:
        assert path.read_bytes() == b"data" and file_sha256(path) == hashlib.sha256(b"data").hexdigest()
    assert path.exists() == place.is_local
    with pytest.raises(KeyError), (place / "x #1").local_copy():  # what the block raises passes, on S3 too
        raise KeyError


def test_a_sweep_removes_what_a_killed_writer_left(place):
    (place / "a [1]/x").write(b"1")
    if place.is_local:
        (place.path / "a [1]" / f"{SIDE_PREFIX}123").write_bytes(b"half")
        assert names(place) == ["a [1]/x"]  # never listed
    place.sweep()
    assert names(place) == ["a [1]/x"]
    if place.is_local:
        assert list((place.path / "a [1]").iterdir()) == [place.path / "a [1]/x"]
    (place / "none").sweep()


def test_a_location_travels(place):
    (place / "x").write(b"1")
    assert pickle.loads(pickle.dumps(place / "x")).read() == b"1"
    assert str(place / "x") == f"{place.uri}/x" and place / "" == place


def test_links_to_files_are_read_and_broken_ones_are_not_listed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/x").write_bytes(b"123")
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to("../far/x")
    (tmp_path / "near/broken").symlink_to("nowhere")
    near = Location(str(tmp_path / "near"))
    assert [(entry.name, entry.size) for entry in near.list()] == [("link", 3)]
    (tmp_path / "again").symlink_to("far")
    Location(str(tmp_path / "again")).delete()
    assert (tmp_path / "far/x").exists() and not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "uri, parent, name",
    [
        ("a", ".", "a"), ("a/b", "a", "b"), ("/a", "/", "a"), ("/a/b/", "/a", "b"), ("s3://k/a/b", "s3://k/a", "b"),
        ("s3://k/a", "s3://k", "a"), ("s3://k", "s3://k", "k"), ("s3://k/", "s3://k/", "k"),
    ],
)  # fmt: skip
def test_parents(uri, parent, name):
    assert Location(uri).parent.uri == parent and Location(uri).name == name


def test_resolved_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location("x").resolved() == Location(str(tmp_path / "x"))
    assert Location("~/x").resolved() == Location(str(Path.home() / "x"))
    assert Location("s3://b/x").resolved() == Location("s3://b/x")


@pytest.mark.parametrize(
    "uri, words",
    [
        ("", "a path or s3://bucket/key: got an empty string"),
        ("gs://a/b", "a path or s3://bucket/key: got gs://a/b"),
        ("file:///a", "got file:///a"),
        ("s3://", "on S3 must be s3://bucket/key: got s3://"),
        ("s3:///key", "on S3 must be s3://bucket/key: got s3:///key"),
    ],
)
def test_what_is_no_location_is_named(uri, words):
    with pytest.raises(ValueError, match=words):
        Location(uri)


def test_an_upload_is_one_put_or_whole_parts(on_s3, tmp_path):
    data = os.urandom(1 << 20) * 9  # above 8 MiB boto3 sends parts
    (on_s3 / "big").write(data)
    assert (on_s3 / "big").entry().stamp.endswith("-2") and (on_s3 / "big").read() == data
    with (on_s3 / "big").local_copy() as path:
        assert path.read_bytes() == data


def test_an_upload_that_breaks_off_vanishes(on_s3, monkeypatch):
    sent = []

    def broken(**kwargs):
        sent.append(kwargs["PartNumber"])
        raise client().exceptions.ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 500}}, "UploadPart")

    monkeypatch.setattr(client(), "upload_part", broken)
    monkeypatch.setattr(s3, "FIRST_WAIT_S", 0.001)
    with pytest.raises(OSError, match=f"S3 .* {on_s3.uri}/big"):
        (on_s3 / "big").write(b"x" * (9 << 20))
    assert sent and on_s3.list() == []
    assert not client().list_multipart_uploads(Bucket="bucket").get("Uploads")


def test_more_objects_than_one_page(on_s3, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_KEYS", 10)
    for i in range(25):
        client().put_object(Bucket="bucket", Key=f"{on_s3.key}/{i:04d}", Body=b"")
    client().put_object(Bucket="bucket", Key=f"{on_s3.key}/folder/", Body=b"")
    assert names(on_s3) == [f"{i:04d}" for i in range(25)]
    on_s3.delete()
    assert on_s3.list() == [] and not on_s3.is_folder()


def test_what_s3_refuses_is_an_os_error_with_the_place(s3, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no object s3://other/x: .*NoSuchBucket"):
        Location("s3://other/x").is_folder()
    with pytest.raises(OSError, match=r"s3://other/x.*NoSuchBucket"):
        Location("s3://other/x").write(b"1")
    assert not Location("s3://other/x").exists() and not Location("s3://other").exists()

    def refuse(**_):
        raise client().exceptions.ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")

    monkeypatch.setattr(client(), "get_object", refuse)
    with pytest.raises(PermissionError, match="S3 refused s3://bucket/x"):
        Location(f"{s3}/x").read()


def test_objects_that_are_not_deleted_are_said(on_s3, monkeypatch):
    (on_s3 / "x").write(b"1")
    monkeypatch.setattr(client(), "delete_objects", lambda **_: {"Errors": [{"Key": "x", "Code": "AccessDenied"}]})
    with pytest.raises(OSError, match=r"did not delete 1 objects.*AccessDenied"):
        on_s3.delete()


def test_entries_compare_by_name_first():
    assert sorted([Entry("b", 1, ""), Entry("a", 2, "")])[0].name == "a"
    assert store.SIDE_PREFIX.startswith(".")  # hidden from anybody else's listing
