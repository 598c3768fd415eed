import hashlib
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import images as module
from curation.images import Part, open_images
from curation.store import Location

SCHEMA = pa.schema({"key": pa.string(), "source": pa.string(), "offset": pa.int64(), "n_bytes": pa.int64()})


def row(source, offset, data):
    return {
        "key": hashlib.sha256(data).hexdigest(),
        "source": source,
        "offset": offset,
        "n_bytes": len(data),
        "data": data,
    }


def fill(place, rng, n_images=12):
    """Files, a tar and a Parquet file, each as the rows of a part with their bytes."""
    parts = []
    pictures = [[rng.bytes(int(rng.integers(0, 3000))) for _ in range(n_images)] for _ in range(3)]
    for i, data in enumerate(pictures[0]):
        (place / f"{i}.jpg").write(data)
    parts.append([row(f"{i}.jpg", None, data) for i, data in enumerate(pictures[0])])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for data in pictures[1]:
            member = tarfile.TarInfo("x.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        offsets = [member.offset_data for member in tar]
    (place / "t.tar").write(out.getvalue())
    parts.append([row("t.tar", at, data) for at, data in zip(offsets, pictures[1], strict=True)])
    out = io.BytesIO()
    pq.write_table(pa.table({"picture": pa.array(pictures[2], pa.binary())}), out, row_group_size=5)
    (place / "Z.PARQUET").write(out.getvalue())
    parts.append([row("Z.PARQUET", i, data) for i, data in enumerate(pictures[2])])
    return parts


def as_part(place, rows):
    return Part(place, "picture", pa.Table.from_pylist(rows, SCHEMA))


def read(images, numbers):
    """Images by number, each read to a random place."""
    lengths = images.lengths[numbers]
    order = np.random.default_rng(len(numbers)).permutation(len(numbers))
    at = np.empty(len(numbers), np.int64)
    at[order] = np.cumsum(lengths[order]) - lengths[order]
    out = bytearray(int(lengths.sum()))
    images.read(numbers, memoryview(out), at)
    return [bytes(out[a : a + n]) for a, n in zip(at, lengths, strict=True)]


@pytest.mark.parametrize("direct_bytes", [0, 1400, 1 << 16])
def test_images_are_read_in_any_order(place, monkeypatch, direct_bytes):
    monkeypatch.setattr(module, "DIRECT_BYTES", direct_bytes)
    rng = np.random.default_rng(0)
    rows = [part[::step] for part, step in zip(fill(place, rng), (1, 2, 3), strict=True)]
    expected = [r["data"] for part in rows for r in part]
    with open_images([as_part(place, part) for part in rows]) as images:
        every = np.arange(len(expected))
        assert read(images, every) == expected
        subsets = [rng.permutation(every), rng.integers(0, len(every), 50), every[:1], every[:0]]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(read, [images] * 40, subsets * 10))
        assert found == [[expected[i] for i in subset] for subset in subsets * 10]


def test_large_images_on_a_disk_are_not_copied(place, monkeypatch):
    monkeypatch.setattr(module, "DIRECT_BYTES", 1000)
    rows = fill(place, np.random.default_rng(1))
    small = [r for r in rows[1] if r["n_bytes"] < 1000]
    parts = [as_part(place, part) for part in (*rows, small)]
    with open_images(parts) as images:
        copied = [rows[2], small] if place.is_local else [*rows, small]
        assert images.scratch.seek(0, 2) == sum(r["n_bytes"] for part in copied for r in part)
        expected = [r["data"] for part in (*rows, small) for r in part]
        assert read(images, np.arange(len(expected))) == expected


@pytest.mark.parametrize("direct_bytes", [0, 1 << 16])
def test_an_image_that_has_changed_is_named(tmp_path, monkeypatch, direct_bytes):
    monkeypatch.setattr(module, "DIRECT_BYTES", direct_bytes)
    place = Location(str(tmp_path))
    (place / "a.jpg").write(b"1234")
    (place / "t.tar").write(b"-" * 512 + b"5" * 600)
    parts = [as_part(place, [row("a.jpg", None, b"1234")]), as_part(place, [row("t.tar", 512, b"5" * 600)])]

    def read_all():
        with open_images(parts) as images:
            return read(images, np.arange(2))

    assert read_all() == [b"1234", b"5" * 600]
    (place / "a.jpg").write(b"1235")
    with pytest.raises(ValueError, match=r"a.jpg must hold the image that the pool saw: its bytes have changed since"):
        read_all()
    for data in (b"12345", b"123"):
        (place / "a.jpg").write(data)
        words = rf"a.jpg must hold the image that the pool saw: it had 4 bytes and has {len(data)}"
        with pytest.raises(ValueError, match=words):
            read_all()
    (place / "a.jpg").write(b"1234")
    (place / "t.tar").write((place / "t.tar").read()[:700])
    with pytest.raises(ValueError, match=r"t.tar must hold .*: it had 600 bytes and has 188"):
        read_all()
    (place / "t.tar").delete()
    with pytest.raises(FileNotFoundError):
        read_all()
