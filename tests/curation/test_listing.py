"""Lists of files, several sources, and what stands beside an image."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.listing import (
    Roots,
    file_at,
    is_list,
    join_listings,
    list_source,
    root_of,
    source_root,
)
from curation.sources import plan_units, read_images, read_unit, split_parquet
from curation.store import Location, client


def names(listing):
    return [entry.name for entry in listing.entries]


def read(listing, part_rows=100, image_column="image"):
    units = [unit for some in plan_units(listing, part_rows) for unit in split_parquet(some, listing.root, part_rows)]
    return [record for unit in units for record in read_unit(listing.root, unit, image_column, "label")]


def fill(place, **files):
    for name, data in files.items():
        (place / name).write(data.encode())


# lists


def test_a_list_names_files_below_its_folder(place):
    for name in ("in/b.jpg", "in/sub/a.jpg", "in/c.jpg", "in/.hidden.jpg", "in/not listed.jpg", "in/x.json"):
        (place / name).write(name.encode())
    (place / "in/some.txt").write(
        b"\xef\xbb\xbfsub/a.jpg\r\n\n./b.jpg\nsub/../b.jpg\n.hidden.jpg\n x.json\n".replace(b" ", b"")
    )
    listing = list_source(place / "in/some.txt")
    assert names(listing) == [".hidden.jpg", "b.jpg", "sub/a.jpg"]  # sorted, each once; hidden ones are meant
    assert listing.ignored == 1 and listing.root == source_root(place / "in/some.txt") == place / "in"
    assert listing.entries[1] == (place / "in/b.jpg").entry()
    assert [(r.source, r.data, r.label) for r in read(listing)] == [
        (".hidden.jpg", b"in/.hidden.jpg", None), ("b.jpg", b"in/b.jpg", None), ("sub/a.jpg", b"in/sub/a.jpg", "sub")
    ]  # fmt: skip


def test_a_list_in_another_order_gives_the_same_pool(place):
    for name in ("a", "b", "c"):
        (place / name).write(name.encode())
    (place / "1.txt").write(b"a\nb\nc")
    (place / "2.txt").write(b"c\na\nb\na\n")
    assert list_source(place / "1.txt") == list_source(place / "2.txt")


def test_a_list_of_absolute_paths_is_of_the_disk(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a.jpg").write_bytes(b"a")
    (tmp_path / "all.txt").write_text(f"{tmp_path}/far/a.jpg\n")
    listing = list_source(Location(str(tmp_path / "all.txt")))
    assert names(listing) == [f"{tmp_path}/far/a.jpg".lstrip("/")]
    assert listing.root == source_root(Location(str(tmp_path / "all.txt"))) == Location("/")
    assert [(r.data, r.label) for r in read(listing)] == [(b"a", "far")]


def test_a_list_on_a_disk_of_objects_on_s3(on_s3, tmp_path):
    fill(on_s3, **{"x/a.jpg": "a", "y/b.jpg": "b"})
    (tmp_path / "all.txt").write_text(f"{on_s3}/y/b.jpg\n{on_s3}/x/a.jpg\n")
    listing = list_source(Location(str(tmp_path / "all.txt")))
    assert [(r.source, r.data) for r in read(listing)] == [
        (f"{on_s3}/{name}".removeprefix("s3://bucket/"), name[2].encode()) for name in ("x/a.jpg", "y/b.jpg")
    ]


def test_a_list_of_names_that_are_no_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"1")
    (tmp_path / "all.txt").write_bytes(b"caf\xe9.jpg\n")
    listing = list_source(Location(str(tmp_path / "all.txt")))
    assert names(listing) == ["./caf%E9.jpg"] and [r.data for r in read(listing)] == [b"1"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a.jpg\n\ngone.jpg\nlost.jpg\n", r"must list files .*: got 2 of 3 that are not, first gone\.jpg in line 3"),
        ("a.jpg\nsub\n", "got 1 of 2 that are not, first sub in line 2"),
        ("a.jpg/b.jpg", "got 1 of 1 that are not"),
        ("a.jpg\n../a.jpg", r"must hold paths below its folder, .*: line 2 is \.\./a\.jpg"),
        ("a.jpg\n/etc/passwd", "line 2 is /etc/passwd"),
        ("a.jpg\ns3://bucket/x", "line 2 is s3://bucket/x"),
        ("s3://bucket/x\ns3://other/x", "line 2 is s3://other/x"),
        (".", r"line 1 is \."),
    ],
)  # fmt: skip
def test_a_list_that_names_what_is_no_file_is_refused(tmp_path, lines, words):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "all.txt").write_text(lines)
    with pytest.raises(ValueError, match=words):
        list_source(Location(str(tmp_path / "all.txt")))


def test_what_is_no_list(place):
    """A folder that is called like one, a list that is not there, and no line at all."""
    (place / "x.txt/a.jpg").write(b"a")
    assert not is_list(place / "x.txt") and names(list_source(place / "x.txt")) == ["a.jpg"]
    with pytest.raises(FileNotFoundError, match=r"no folder or file .*none\.txt"):
        list_source(place / "none.txt")
    (place / "empty.txt").write(b"\n")
    assert list_source(place / "empty.txt").entries == []


# several sources


def test_several_sources_are_one_after_the_other(tmp_path, on_s3):
    here = Location(str(tmp_path))
    fill(here, **{"one/b.jpg": "1", "one/cat/a.jpg": "2", "list/x.jpg": "4", "list/y.jpg": "5", "list/l.txt": "y.jpg"})
    (here / "one" / os.fsdecode(b"z\xe9.jpg")).write(b"3")
    fill(on_s3, **{"a.jpg": "0", "a.txt": "a caption"})
    sources = [on_s3, here / "one", here / "list/l.txt"]
    listing = join_listings([list_source(source) for source in sources])
    assert names(listing) == ["0/a.jpg", "1/b.jpg", "1/cat/a.jpg", "1/./z%E9.jpg", "2/y.jpg"]
    assert listing.root == root_of(sources) == Roots((on_s3, here / "one", here / "list"))
    assert not listing.root.is_local and Roots((here,)).is_local and listing.ignored == 0
    records = read(listing, 2)
    assert [(r.source, r.data, r.label, r.caption) for r in records] == [
        ("0/a.jpg", b"0", None, "a caption"), ("1/b.jpg", b"1", None, None), ("1/cat/a.jpg", b"2", "cat", None),
        ("1/./z%E9.jpg", b"3", None, None), ("2/y.jpg", b"5", None, None),
    ]  # fmt: skip
    rows = {"source": names(listing), "offset": pa.array([None] * 5, pa.int64()), "n_bytes": [1] * 5}
    assert list(read_images(listing.root, pa.table(rows))) == [b"0", b"1", b"2", b"3", b"5"]


def test_one_source_in_a_list_is_that_source(place):
    fill(place, **{"a.jpg": "1", "a.txt": "2"})
    listing = list_source(place)
    assert join_listings([listing]) is listing and root_of([place]) == place


def test_eleven_sources_keep_their_order(tmp_path):
    sources = [Location(str(tmp_path / str(i))) for i in range(11)]
    for i, source in enumerate(sources):
        fill(source, **{"a.jpg": str(i)})
    listing = join_listings([list_source(source) for source in sources])
    assert [r.data for r in read(listing, 3)] == [str(i).encode() for i in range(11)]
    assert file_at(listing.root, "10/a.jpg") == sources[10] / "a.jpg"


# what stands beside an image


def test_captions_and_metadata_stand_beside_their_image(place):
    note = {"label": "cat", "caption": "never", "n": 1}
    files = {"a.jpg": "1", "a.txt": "text", "a.JSON": json.dumps(note), "b.v2.jpg": "2",
             "b.v2.json": '{"caption": "c"}', "b.txt": "of nobody", "dog/c.png": "3", "dog/c.jpg": "4",
             "dog/c.txt": "both", "dog/d.jpg": "5", "dog/d.cls": "7\n", "dog/d.json": "{", "e.jpg": "6",
             ".x/e.txt": "no",
             "t.txt": "no"}  # fmt: skip
    fill(place, **files)
    listing = list_source(place)
    assert names(listing) == ["a.jpg", "b.v2.jpg", "dog/c.jpg", "dog/c.png", "dog/d.jpg", "e.jpg"]
    assert {entry.name for entry in listing.sides} == {
        "a.txt", "a.JSON", "b.v2.json", "dog/c.txt", "dog/d.cls", "dog/d.json"
    }  # fmt: skip
    assert listing.ignored == 3
    expected = [
        ("cat", "text", json.dumps(note, sort_keys=True)), (None, "c", '{"caption": "c"}'), ("dog", "both", None),
        ("dog", "both", None), ("7", None, None), (None, None, None),
    ]  # fmt: skip
    for part_rows in (1, 3, 100):
        assert [(r.label, r.caption, r.metadata) for r in read(listing, part_rows)] == expected


def test_captions_belong_to_the_images_that_a_pattern_means(place):
    fill(place, **{"a.jpg": "1", "a.txt": "one", "b.png": "2", "b.txt": "two", "x.txt": "none"})
    listing = list_source(place / "*.jpg")
    assert names(listing) == ["a.jpg"] and [e.name for e in listing.sides] == ["a.txt"] and listing.ignored == 0
    both = list_source(place / "?.*")
    assert names(both) == ["a.jpg", "b.png"] and len(both.sides) == 2 and both.ignored == 1


def test_a_caption_that_cannot_be_read_does_not_cost_the_image(tmp_path):
    place = Location(str(tmp_path))
    fill(place, **{"a.jpg": "1", "a.txt": "2"})
    listing = list_source(place)
    (tmp_path / "a.txt").unlink()
    assert [(r.data, r.caption) for r in read(listing)] == [(b"1", None)]


# img2dataset


def table_bytes(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def test_the_tables_of_img2dataset_are_no_images(place):
    table = table_bytes([{"url": "u", "status": "success"}])
    for name in ("0/00000", "0/00001", "0/00002", "0/00003", "other"):
        (place / f"{name}.parquet").write(table)
    for name in ("0/00000", "0/00001", "0/00003"):
        (place / f"{name}_stats.json").write(b"{}")
    (place / "0/00000.tar").write(b"")
    (place / "0/00001/000010000.jpg").write(b"")
    (place / "0/00002.tar").write(b"")  # without its stats it may be anything
    listing = list_source(place)
    assert names(listing) == [
        "0/00000.tar", "0/00001/000010000.jpg", "0/00002.parquet", "0/00002.tar", "0/00003.parquet", "other.parquet"
    ]  # fmt: skip
    assert listing.ignored == 5
    assert names(list_source(place / "**/*.parquet")) == ["0/00002.parquet", "0/00003.parquet", "other.parquet"]


@pytest.mark.parametrize("column", ["jpg", "png", "webp", "image_bytes", "bytes"])
def test_an_image_column_is_known_by_name_and_type(place, column):
    rows = [{"image_url": "x", column: b"1", "txt": "t"}, {"image_url": "y", column: None, "txt": None}]
    (place / "a.parquet").write(table_bytes(rows))
    records = read(list_source(place))
    assert [(r.data, r.detail) for r in records] == [(b"1", ""), (b"", "")]
    assert json.loads(records[0].metadata) == {"image_url": "x", "txt": "t"}
    rows = pa.table({"source": ["a.parquet"], "offset": [0], "n_bytes": [1]})
    assert list(read_images(place, rows)) == [b"1"]
    [lost] = read(list_source(place), image_column="photo")  # a name that was given is not guessed
    assert lost.data is None and "must have a column 'photo'" in lost.detail


def test_a_column_of_the_name_without_bytes_is_none(place):
    (place / "a.parquet").write(table_bytes([{"jpg": "a.jpg", "webp": {"path": "a"}, "bytes": b"1"}]))
    assert [r.data for r in read(list_source(place))] == [b"1"]
    (place / "a.parquet").write(table_bytes([{"jpg": "a.jpg"}]))
    [lost] = read(list_source(place))
    assert lost.detail == "must have a column 'image' (image_column) with image bytes: it has jpg"
    with pytest.raises(ValueError, match="must have the column 'image'"):
        list(read_images(place, pa.table({"source": ["a.parquet"], "offset": [0], "n_bytes": [1]})))


def test_what_was_not_downloaded_says_why(place):
    rows = [
        {"jpg": b"1", "status": "success", "error_message": None},
        {"jpg": None, "status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"},
        {"jpg": None, "status": "failed_to_resize", "error_message": None},
        {"jpg": None, "status": "success", "error_message": None},
        {"jpg": None, "status": None, "error_message": None},
    ]
    (place / "00000.parquet").write(table_bytes(rows))
    (place / "00000_stats.json").write(b"{}")
    records = read(list_source(place))
    assert [(r.offset, r.data, r.reason, r.detail) for r in records] == [
        (0, b"1", "", ""), (1, None, "not_downloaded", "HTTP Error 404: Not Found"),
        (2, None, "not_downloaded", "failed_to_resize"), (3, b"", "", ""), (4, b"", "", ""),
    ]  # fmt: skip


def test_a_list_asks_s3_for_what_it_names_alone(on_s3, monkeypatch):
    fill(on_s3, **{"a.jpg": "a", "b.jpg": "b", "l.txt": "a.jpg\n"})
    monkeypatch.setattr(client(), "get_paginator", None)
    assert names(list_source(on_s3 / "l.txt")) == ["a.jpg"]
