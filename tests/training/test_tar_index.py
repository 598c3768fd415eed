import hashlib
import io
import json
import random
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from curation.shards import INDEX_SCHEMA, digest_of_ends, tar_facts
from training.tar_index import LEFT_OUT_SCHEMA, CompressedTarError, IndexConfig, index_tar


def picture(kind="jpeg", size=(20, 10), **how):
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind, **how)
    return out.getvalue()


def write_tar(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


JPEG, PNG = picture(), picture("png", (7, 9))


def seen(index):
    return [(r["key"], r["label"], r["format"], r["width"], r["height"]) for r in index.rows.to_pylist()]


def left(index):
    return [(r["key"], r["reason"]) for r in index.left_out.to_pylist()]


def test_the_index_of_a_tar_of_others(tmp_path):
    members = [
        ("dir/a.jpg", JPEG), ("dir/a.cls", b"7\n"), ("dir/a.json", b"{}"),
        ("b.txt", b"alone"), ("b.json", b"{}"),
        ("c.seg.png", PNG), ("c.jpg", JPEG), ("c.CLS", b"cat"),
        ("../d.JPEG", JPEG),
        ("e.png", JPEG),  # told by its bytes
        ("f.seg.png", PNG), ("f.mp3", b"sound"),
        ("g.img", PNG), ("h", PNG), ("dir/._a.jpg", b"of a system"),
        ("i.png", b"broken"), ("i.jpg", JPEG), ("j.mp3", b"sound"), ("k.jpg", b"\xff\xd8\xff broken"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    index = index_tar(path, "some/x.tar")
    assert index.rows.schema.equals(INDEX_SCHEMA) and index.left_out.schema.equals(LEFT_OUT_SCHEMA)
    assert seen(index) == [
        ("dir/a", "7", "jpeg", 20, 10), ("c", "cat", "jpeg", 20, 10), ("../d", None, "jpeg", 20, 10),
        ("e", None, "jpeg", 20, 10), ("f", None, "png", 7, 9), ("g", None, "png", 7, 9), ("h", None, "png", 7, 9),
    ]  # fmt: skip
    assert left(index) == [("b", "no_image"), ("i", "undecodable"), ("j", "no_image"), ("k", "undecodable")]
    assert index.unused_images == 2  # of c and i
    assert tar_facts(index.rows.schema.metadata) == (
        "some/x.tar", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    )  # fmt: skip
    assert index.rows["row_id"].to_pylist() == list(range(7)) and set(index.rows["count"].to_pylist()) == {1}
    data = path.read_bytes()
    found = [data[r["offset"] : r["offset"] + r["length"]] for r in index.rows.to_pylist()]
    assert found == [JPEG, JPEG, JPEG, JPEG, PNG, PNG, PNG]


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 1 << 18])
def test_a_tar_is_known_by_its_ends(size):
    """At most 64 KiB of each, all of it where they meet; a changed byte shows there."""
    data, asked = bytearray(random.Random(0).randbytes(size)), []
    ends = 1 << 16

    def digest():
        return digest_of_ends(lambda at, n: asked.append((at, n)) or bytes(data[at : at + n]), size)

    expected = data if size <= 2 * ends else data[:ends] + data[-ends:]
    first = digest()
    assert first == hashlib.sha256(expected).hexdigest()
    assert len(asked) == (1 if size <= 2 * ends else 2) and all(n <= 2 * ends for _, n in asked)
    for at in {0, min(ends, size) - 1, max(size - ends, 0), size - 1} if size else ():
        data[at] ^= 1
        assert digest() != first
        data[at] ^= 1


def test_every_way_to_write_a_tar_gives_the_same_index(tmp_path):
    members = [
        (f"{'long/' * 40}{i:03d}.{kind}", data) for i in range(9) for kind, data in (("png", PNG), ("cls", b"3"))
    ]
    found = [
        seen(index_tar(write_tar(tmp_path / f"{kind}.tar", members, format=kind), "x"))
        for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 9


def test_against_the_tar_module(tmp_path):
    """Random tars: the members that tarfile finds, grouped by hand."""
    rng = random.Random(0)
    for trial in range(20):
        keys = [f"{rng.choice(['', 'a/', 'b/c/'])}{i}" for i in range(rng.randint(0, 30))]
        members = [
            (f"{key}.{suffix}", data)
            for key in keys
            for suffix, data in rng.sample(
                [("png", PNG), ("jpg", JPEG), ("cls", b"5"), ("txt", b"t")], rng.randint(1, 4)
            )
        ]
        path = write_tar(tmp_path / f"{trial}.tar", members)
        images = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                if suffix in ("png", "jpg"):
                    images.setdefault(key, (member.offset_data, member.size))
        index = index_tar(path, "x")
        rows = {r["key"]: (r["offset"], r["length"]) for r in index.rows.to_pylist()}
        assert rows == images and list(rows) == [key for key in keys if key in images]
        assert left(index) == [(key, "no_image") for key in keys if key not in images]
        labels = {key.removesuffix(".cls"): "5" for key, _ in members if key.endswith(".cls")}
        assert {r["key"]: r["label"] for r in index.rows.to_pylist()} == {key: labels.get(key) for key in images}


def test_a_key_that_comes_again_is_left_out(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.jpg", PNG), ("c.png", PNG), ("a.png", PNG)]
    )
    index = index_tar(path, "x")
    assert [row[0] for row in seen(index)] == ["a", "b", "c"]
    assert index.rows["row_id"].to_pylist() == [0, 1, 2]
    assert index.rows["format"].to_pylist() == ["jpeg", "jpeg", "png"]
    assert left(index) == [("a", "duplicate_key")] * 2
    assert tar_facts(index.rows.schema.metadata) is not None


def test_a_tar_that_is_cut_keeps_what_is_before(tmp_path):
    """At every length: the samples whose image is whole, and one row that says so."""
    members = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", JPEG), ("cls", b"%d" % i))]
    data = write_tar(tmp_path / "x.tar", members).read_bytes()
    rows = index_tar(tmp_path / "x.tar", "x").rows.to_pylist()
    end = (len(members) * 2) * 512 + 4 * (-(-len(JPEG) // 512) - 1) * 512
    for cut in [0, *range(300, end + 600, 173), end - 512, end]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        index = index_tar(tmp_path / "cut.tar", "cut.tar")
        whole = [row for row in rows if row["offset"] + row["length"] <= cut]
        if cut < end + 512:
            *_, last = index.left_out.to_pylist()
            assert (last["key"], last["reason"]) == (None, "truncated"), cut
            assert "breaks off" in last["detail"]
        assert [{**row, "label": ""} for row in index.rows.to_pylist()] == [{**row, "label": ""} for row in whole], cut


def test_tars_that_are_none_or_empty(tmp_path):
    empty = index_tar(write_tar(tmp_path / "e.tar", []), "e")
    assert (len(empty.rows), left(empty)) == (0, [])
    for data, reason in ((b"", "truncated"), (b"<html>" * 300, "not_a_tar"), (JPEG, "not_a_tar"), (b"x", "not_a_tar")):
        (tmp_path / "x.tar").write_bytes(data)
        index = index_tar(tmp_path / "x.tar", "x")
        assert (len(index.rows), left(index)) == (0, [(None, reason)]), data
    for kind in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / "c.tar", f"w:{kind}") as tar:
            tar.add(tmp_path / "e.tar", "a.jpg")
        with pytest.raises(CompressedTarError, match=r"must be plain, .* c\.tar is compressed|c\.tar is compressed"):
            index_tar(tmp_path / "c.tar", "x")
    with pytest.raises(FileNotFoundError):
        index_tar(tmp_path / "none.tar", "x")


def test_a_size_behind_a_long_header_is_found(tmp_path):
    """Profiles and previews stand before the size, for more than the first read."""
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    long = picture("jpeg", (40, 30), icc_profile=bytes(60_000), exif=exif)
    tagged = picture("tiff", (50, 60))
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)).save(noise, "tiff")
    path = write_tar(tmp_path / "x.tar", [("a.jpg", long), ("b.tif", tagged), ("c.tif", noise.getvalue())])
    assert [row[-2:] for row in seen(index_tar(path, "x"))] == [(30, 40), (50, 60), (80, 90)]


def test_no_pixel_is_decoded_and_no_image_read_whole(tmp_path, monkeypatch):
    import os

    big = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(big, "png")
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", big.getvalue()) for i in range(20)])
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append(n) or pread(fd, n, at))
    monkeypatch.setattr(Image.Image, "load", None)
    assert len(index_tar(path, "x").rows) == 20
    assert sum(asked) < path.stat().st_size / 10


def test_members_of_one_key_take_no_memory(tmp_path):
    """However many there are."""
    peaks = {}
    for n in (300, 300, 3000):  # the first one warms up
        write_tar(tmp_path / "one.tar", [("a.0.png", PNG), *((f"a.{i}.png", b"") for i in range(1, n))])
        tracemalloc.start()
        index = index_tar(tmp_path / "one.tar", "x")
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(index.rows), index.unused_images) == (1, n - 1)
    assert peaks[3000] < peaks[300] + 50_000


def test_names_that_are_no_utf8(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("caf\udce9.png", PNG)], format=tarfile.GNU_FORMAT)
    assert [row[0] for row in seen(index_tar(path, "x"))] == ["caf?"]


def test_labels_are_text(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("a.png", PNG), ("a.cls", b"\xff 3 "), ("b.png", PNG), ("b.cls", b"9" * 10_000)]
    )
    assert [row[1] for row in seen(index_tar(path, "x"))] == ["� 3", None]
    json.dumps(index_tar(path, "x").rows.to_pylist())


def test_a_config_has_a_share():
    with pytest.raises(ValueError, match=r"index.max_bad_fraction must be in \[0, 1\]: got 1.5"):
        IndexConfig(source="x", max_bad_fraction=1.5)
