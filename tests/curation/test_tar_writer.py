import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest

from curation import tar_writer
from curation.pool import POOL_SCHEMA
from curation.tar_writer import TarWriter, lay_out, sample_jsons, tar_headers
from curation.tars import json_text

ROW = {"key": "k", "source": "a/b.jpg", "member": None, "format": "jpeg", "width": 4, "height": 3, "label": "é",
       "caption": None, "metadata": None, "offset": None, "n_bytes": 0}  # fmt: skip
ODD = ["", "plain", 'say "yes"', "back\\slash", "é", "\U0001f600", "a\nb\t\0c", "\x7f", "\u2028", "x" * 511, "x" * 5000]


def table(rows):
    return pa.Table.from_pylist(rows, POOL_SCHEMA)


def said_of(row):
    """What a sample's JSON is, by its definition."""
    fields = {name: row[name] for name in ("key", "source", "member", "format", "width", "height", "label", "caption")}
    if row["metadata"]:
        fields["metadata"] = json.loads(row["metadata"])
    return json.dumps(fields, sort_keys=True)


def random_rows(rng, n_rows):
    def text():
        return None if rng.random() < 0.3 else "".join(rng.choice(ODD, rng.integers(0, 4)))

    rows = []
    for i in range(n_rows):
        metadata = json_text(json.dumps({text() or "a": text(), "b": [float(rng.normal()), None, {"c": 1}]}).encode())
        rows.append({
            **ROW, "key": hashlib.sha256(b"%d" % i).hexdigest(), "format": ("jpeg", "png", "tiff", "webp")[i % 4],
            "source": text() or "s", "member": text(), "label": text(), "caption": text(), "width": i,
            "metadata": metadata if rng.random() < 0.7 else None,
            "n_bytes": int(rng.choice([0, 1, 511, 512, 513, 1024, rng.integers(0, 3000)])),
        })  # fmt: skip
    return rows


def write(path, rows, images):
    """As the stage does. Returns the writer and where the images are."""
    layout = lay_out(rows)
    with TarWriter(path) as tar:
        for first, stop in layout.pieces():
            piece = np.full(layout.n_bytes(first, stop), 255, np.uint8)
            assert len(piece) <= layout.largest_piece()
            for at, image in zip(layout.fill(first, stop, piece), images[first:stop], strict=True):
                piece[at : at + len(image)] = np.frombuffer(image, np.uint8)
            tar.put(piece.data)
    return tar, (layout.images * 512).tolist()


def test_headers_say_to_tarfile_what_tarfile_would_write():
    sizes = [0, 1, 511, 512, 513, 10_239, 10_240, 10_241, 8**7 - 1, 8**11 - 1]
    names = [hashlib.sha256(b"%d" % size).hexdigest() + ".jpg" for size in sizes[1:]] + ["n" * 100]
    headers = tar_headers(pa.array(names, pa.large_string()), np.array(sizes))
    for name, size, header in zip(names, sizes, headers, strict=True):
        info = tarfile.TarInfo(name)
        info.size = size
        assert header.tobytes() == info.tobuf(tarfile.USTAR_FORMAT)
        read = tarfile.TarInfo.frombuf(header.tobytes(), "ascii", "strict")
        assert (read.name, read.size, read.mode, read.mtime) == (name, size, 0o644, 0)
        assert (read.uid, read.gid, read.uname, read.gname, read.type) == (0, 0, "", "", tarfile.REGTYPE)


def test_names_and_sizes_that_do_not_fit_are_refused():
    def head(name, size):
        return tar_headers(pa.array(["fine", name], pa.large_string()), np.array([1, size]))

    with pytest.raises(ValueError, match=r"a member's name must be at most 100 bytes: got 101 bytes in nnn"):
        head("n" * 101, 1)
    with pytest.raises(ValueError, match=r"a member's name must be ASCII: got é"):
        head("é", 1)
    with pytest.raises(ValueError, match=r"a member must be smaller than 8 GiB: got 8589934592 bytes in x"):
        head("x", 8**11)


@pytest.mark.parametrize("seed", range(8))
def test_tarfile_and_webdataset_read_what_was_written(tmp_path, monkeypatch, seed):
    import webdataset

    rng = np.random.default_rng(seed)
    monkeypatch.setattr(tar_writer, "PIECE", int(rng.choice([512, 5000, 50_000, 1 << 23])))
    rows = random_rows(rng, int(rng.integers(1, 40)))
    images = [rng.bytes(row["n_bytes"]) for row in rows]
    tar, places = write(tmp_path / "x.tar", table(rows), images)
    whole = (tmp_path / "x.tar").read_bytes()
    assert len(whole) == tar.size and len(whole) % 10_240 == 0 and whole[-1024:] == b"\0" * 1024
    assert tar.sha256() == hashlib.sha256(whole).hexdigest()
    assert all(whole[at : at + len(image)] == image for at, image in zip(places, images, strict=True))
    extension = {"jpeg": "jpg", "png": "png", "tiff": "tif", "webp": "webp"}
    expected, by_hand = {}, io.BytesIO()
    with tarfile.open(fileobj=by_hand, mode="w", format=tarfile.USTAR_FORMAT) as other:
        for row, image in zip(rows, images, strict=True):
            files = {extension[row["format"]]: image, "json": said_of(row).encode()}
            files |= {"txt": row["caption"].encode()} if row["caption"] else {}
            expected[row["key"]] = files
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{row['key']}.{suffix}")
                info.size = len(data)
                other.addfile(info, io.BytesIO(data))
    assert whole == by_hand.getvalue()  # byte by byte what tarfile writes
    by_webdataset = {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    }
    assert by_webdataset == expected and list(by_webdataset) == [row["key"] for row in rows]


def test_pieces_are_as_large_as_they_may_be(monkeypatch):
    monkeypatch.setattr(tar_writer, "PIECE", 8192)
    layout = lay_out(table([{**ROW, "n_bytes": size} for size in (100, 100, 100, 9000, 100, 20_000, 3000, 3000)]))
    pieces = list(layout.pieces())
    assert pieces[0][0] == 0 and pieces[-1][1] == 8
    assert [first for first, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
    for first, stop in pieces:
        assert layout.n_bytes(first, stop) <= 8192 or stop == first + 1
        assert stop == 8 or layout.n_bytes(first, stop + 1) > 8192


def test_an_empty_tar_is_a_tar(tmp_path):
    with TarWriter(tmp_path / "x.tar"):
        pass
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getmembers() == []
    out = io.BytesIO()
    tarfile.open(fileobj=out, mode="w").close()
    assert (tmp_path / "x.tar").read_bytes() == out.getvalue()


def test_a_writer_that_fails_leaves_no_whole_tar(tmp_path):
    with pytest.raises(ZeroDivisionError), TarWriter(tmp_path / "x.tar") as tar:
        tar.put(memoryview(bytes(1024)))
        raise ZeroDivisionError
    assert (tmp_path / "x.tar").stat().st_size == 1024  # no end mark


@pytest.mark.parametrize("seed", range(5))
def test_the_json_says_where_an_image_came_from(seed):
    rows = random_rows(np.random.default_rng(seed), 60)
    assert sample_jsons(table(rows)).to_pylist() == [said_of(row) for row in rows]
    chunks = [table(rows[:7]), table(rows[7:])]
    assert sample_jsons(pa.concat_tables(chunks).slice(3, 20)).to_pylist() == [said_of(row) for row in rows[3:23]]


def test_what_was_not_said_is_null_and_metadata_are_left_out():
    (said,) = sample_jsons(table([ROW])).to_pylist()
    assert json.loads(said) == {name: ROW[name] for name in ROW if name not in ("metadata", "offset", "n_bytes")}
    assert list(json.loads(said)) == sorted(json.loads(said))
