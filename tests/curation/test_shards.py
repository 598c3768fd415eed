import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.shards import (
    INDEX_SCHEMA,
    ShardsConfig,
    TarWriter,
    mixed_order,
    plan_groups,
    sample_json,
    shard_bounds,
    tar_header,
    write_sample,
)

ROW = {"key": "k", "source": "a/b.jpg", "member": None, "format": "jpeg", "width": 4, "height": 3, "label": "é",
       "caption": None, "metadata": None, "offset": None}  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10_239, 10_240, 10_241, 8**7 - 1, 8**11 - 1])
def test_a_header_says_to_tarfile_what_tarfile_would_write(size):
    name = hashlib.sha256(b"%d" % size).hexdigest() + ".jpg"
    info = tarfile.TarInfo(name)
    info.size = size
    header = tar_header(name, size)
    assert len(header) == 512
    assert header == info.tobuf(tarfile.USTAR_FORMAT)
    read = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (read.name, read.size, read.mode, read.mtime) == (name, size, 0o644, 0)
    assert (read.uid, read.gid, read.uname, read.gname, read.type) == (0, 0, "", "", tarfile.REGTYPE)


def test_names_and_sizes_that_do_not_fit_are_refused(tmp_path):
    assert tar_header("n" * 100, 1)[:101] == b"n" * 100 + b"0"
    with pytest.raises(ValueError, match=r"a member's name must be at most 100 bytes: got 101 in nnn"):
        tar_header("n" * 101, 1)
    with pytest.raises(ValueError, match="ascii"):
        tar_header("é", 1)

    class Huge(bytes):
        def __len__(self):
            return 8**11

    with TarWriter(tmp_path / "x.tar") as tar:
        with pytest.raises(ValueError, match=r"a member must be smaller than 8 GiB: got 8589934592 bytes in x"):
            tar.add("x", Huge())
        assert tar.size == 0  # nothing was written


@pytest.mark.parametrize("seed", range(8))
def test_tarfile_and_webdataset_read_what_was_written(tmp_path, seed):
    import webdataset

    rng = np.random.default_rng(seed)
    sizes = [0, 1, 511, 512, 513, *rng.integers(0, 3000, int(rng.integers(0, 40))).tolist()]
    samples = {}
    with TarWriter(tmp_path / "x.tar") as tar:
        for i, size in enumerate(sizes):
            data = rng.bytes(size)
            kind = ("jpeg", "png", "tiff", "webp")[i % 4]
            row = {**ROW, "key": hashlib.sha256(b"%d" % i).hexdigest(), "format": kind, "caption": i % 3 and f"é {i}"}
            samples[row["key"]] = (row, data, write_sample(tar, row, data))
    whole = (tmp_path / "x.tar").read_bytes()
    assert len(whole) == tar.size and len(whole) % 10_240 == 0 and whole[-1024:] == b"\0" * 1024
    assert tar.sha256() == hashlib.sha256(whole).hexdigest()
    assert all(whole[at : at + len(data)] == data for _, data, at in samples.values())
    extension = {"jpeg": "jpg", "png": "png", "tiff": "tif", "webp": "webp"}
    expected = {}
    for key, (row, data, _) in samples.items():
        expected[key] = {extension[row["format"]]: data, "json": sample_json(row)}
        if row["caption"]:
            expected[key]["txt"] = row["caption"].encode()
    with tarfile.open(tmp_path / "x.tar") as opened:
        by_tarfile = {member.name: opened.extractfile(member).read() for member in opened}
    assert by_tarfile == {f"{key}.{name}": data for key, files in expected.items() for name, data in files.items()}
    by_webdataset = {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    }
    assert by_webdataset == expected and list(by_webdataset) == list(samples)


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
        tar.add("a", b"1")
        raise ZeroDivisionError
    assert (tmp_path / "x.tar").stat().st_size == 1024  # no end mark


def test_the_json_says_where_an_image_came_from():
    said = json.loads(sample_json({**ROW, "metadata": '{"b": [1, null], "a": "é"}', "row_id": 3}))
    assert said == {
        "key": "k", "source": "a/b.jpg", "member": None, "format": "jpeg", "width": 4, "height": 3, "label": "é",
        "caption": None, "metadata": {"a": "é", "b": [1, None]},
    }  # fmt: skip
    assert "metadata" not in json.loads(sample_json(ROW))
    assert sample_json(ROW) == sample_json(dict(reversed(ROW.items())))
    assert list(said) == sorted(said)


@pytest.mark.parametrize("seed", range(30))
def test_groups_cover_every_part_with_rows_once(seed):
    rng = np.random.default_rng(seed)
    n_selected = (rng.integers(0, 50, int(rng.integers(0, 40))) * (rng.random() < 0.9)).tolist()
    mix_rows = int(rng.integers(1, 200))
    groups = plan_groups(n_selected, mix_rows, seed)
    assert sorted(part for group in groups for part in group) == [i for i, n in enumerate(n_selected) if n]
    rows = [[n_selected[part] for part in group] for group in groups]
    assert all(sum(group) >= mix_rows for group in rows[:-1])
    assert all(sum(group[:-1]) < mix_rows for group in rows)  # no larger than it needs to be
    assert groups == plan_groups(n_selected, mix_rows, seed)


def test_groups_are_a_function_of_the_seed():
    assert plan_groups([5] * 40, 20, 0) != plan_groups([5] * 40, 20, 1)
    order = [part for group in plan_groups([5] * 40, 20, 0) for part in group]
    assert order != sorted(order) and plan_groups([], 5, 0) == plan_groups([0, 0], 5, 0) == []


@pytest.mark.parametrize("n_rows", [0, 1, 2, 9, 10, 11, 99, 100, 101, 12_345])
@pytest.mark.parametrize("shard_rows", [1, 3, 10, 1000])
def test_shards_are_few_and_even(n_rows, shard_rows):
    bounds = shard_bounds(n_rows, shard_rows)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == n_rows and bounds.dtype == np.int64
    assert len(sizes) == -(-n_rows // shard_rows)
    if n_rows:
        assert sizes.min() >= 1 and sizes.max() <= min(sizes.min() + 1, shard_rows)


def test_orders_are_permutations_that_differ_by_seed_and_group():
    orders = [mixed_order(500, seed, group) for seed, group in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(500)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], mixed_order(500, 0, 0))
    assert len(mixed_order(0, 0, 0)) == 0


def test_an_index_has_no_holes_but_for_labels(tmp_path):
    entry = {"key": "k", "row_id": 1, "offset": 512, "length": 9, "format": "png", "label": None, "width": 1,
             "height": 1, "count": 1}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([entry], INDEX_SCHEMA), tmp_path / "ok")
    for name in set(entry) - {"label"}:
        with pytest.raises(pa.ArrowInvalid, match=f"'{name}'"):
            pq.write_table(pa.Table.from_pylist([{**entry, name: None}], INDEX_SCHEMA), tmp_path / "x")


@pytest.mark.parametrize("field", ["shard_rows", "mix_rows"])
def test_settings_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=f"shards.{field} must be at least 1: got 0"):
        ShardsConfig(**{field: 0})
