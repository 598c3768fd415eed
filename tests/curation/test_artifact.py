import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import artifact as module
from curation.artifact import (
    MANIFEST,
    Artifact,
    FileInfo,
    add_counts,
    content_digest,
    describe,
    finish,
    part_name,
    pool_of,
    read_table,
    write_table,
)
from curation.store import Location, file_sha256

HEAD = {"stage": "pool", "version": 1, "config": {}, "inputs": {}, "counts": {"rows": 3}, "facts": {"width": 4}}


def table(n, seed=0):
    rng = np.random.default_rng(seed)
    words = [None if i % 7 == 3 else f"word {i % 5} é" for i in range(n)]
    return pa.table({"a": rng.integers(0, 9, n), "b": pa.array(words, pa.string()), "c": rng.random(n)})


def make(location, sizes, head=None, name="pool/1"):
    """An artifact with parts of these sizes."""
    at = location / name
    files = [write_table(at / part_name(i), table(n, i), {"rows": n, "kept": n}) for i, n in enumerate(sizes)]
    return finish(at, files, {**HEAD, **(head or {})})


def test_the_manifest_makes_the_artifact(place):
    at = place / "pool/1"
    info = write_table(at / part_name(0), table(5))
    assert not Artifact(at).is_complete()
    with pytest.raises(ValueError, match=f"{at.uri} is not finished: it has no manifest.json"):
        _ = Artifact(at).digest
    made = finish(at, [info], HEAD)
    assert made.is_complete() and Artifact(at).is_complete()
    assert Artifact(at).manifest == made.manifest
    assert made.files == [info] and made.stage == "pool" and made.counts == {"rows": 3} and made.facts == {"width": 4}


def test_the_manifest_is_the_last_thing_written(place, monkeypatch):
    """Whatever fails before it, there is no artifact."""
    monkeypatch.setattr(module, "MAX_LISTED_FILES", 1)

    def full(*_, **__):
        raise OSError("disk is full")

    infos = [write_table(place / "pool/1" / part_name(i), table(2)) for i in range(2)]
    monkeypatch.setattr(module, "write_table", full)
    with pytest.raises(OSError, match="disk is full"):
        finish(place / "pool/1", infos, HEAD)
    assert not Artifact(place / "pool/1").is_complete()


@pytest.mark.parametrize(
    "text, words",
    [
        (b'{"format": 2}', "must have format 1: got 2"),
        (b"{}", "must have format 1: got None"),
        (b"[]", "must have format 1: got None"),
        (b'{"format": 1', "manifest.json must be JSON"),
        (b"\xff", "manifest.json must be JSON"),
    ],
)
def test_another_manifest_is_refused(tmp_path, text, words):
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(ValueError, match=words):
        _ = Artifact(Location(str(tmp_path))).manifest


def test_the_files_say_what_is_there(place):
    made = make(place, [3, 0, 8])
    assert [part.name for part in made.parts] == [
        "part-0000000.parquet",
        "part-0000001.parquet",
        "part-0000002.parquet",
    ]
    assert made.starts.tolist() == [0, 3, 3, 11] and made.starts.dtype == np.int64
    for i, part in enumerate(made.parts):
        with made.part(i).local_copy() as path:
            assert (part.bytes, part.sha256) == (path.stat().st_size, file_sha256(path))
        assert part.rows == read_table(made.part(i)).num_rows == part.counts["rows"]


def test_files_are_sorted_and_parts_are_not_all_files(tmp_path):
    place = Location(str(tmp_path))
    infos = [write_table(place / name, table(2)) for name in ("rejected-0000000.parquet", part_name(1), part_name(0))]
    made = finish(place, infos, HEAD)
    assert [file.name for file in made.files] == [part_name(0), part_name(1), "rejected-0000000.parquet"]
    assert [file.name for file in made.parts] == [part_name(0), part_name(1)]


def test_the_digest_is_of_names_and_content_alone(tmp_path):
    first = make(Location(str(tmp_path / "a")), [3, 8])
    other_place = make(Location(str(tmp_path / "b")), [3, 8], {"config": {"x": 1}, "version": 9, "counts": {}})
    assert first.digest == other_place.digest
    assert first.digest != make(Location(str(tmp_path / "c")), [3, 7]).digest
    assert first.digest != make(Location(str(tmp_path / "d")), [8, 3]).digest
    infos = first.files
    assert content_digest(infos[::-1]) == first.digest
    assert content_digest([info._replace(rows=99, counts={"x": 1}) for info in infos]) == first.digest
    assert content_digest([infos[0]._replace(name="other"), infos[1]]) != first.digest
    assert content_digest([infos[0]._replace(sha256="0"), infos[1]]) != first.digest
    assert content_digest([infos[0], infos[0]]) != content_digest([infos[0]])


def test_long_lists_of_files_stand_beside_the_manifest(place, monkeypatch):
    listed = make(place / "listed", [1, 2, 3])
    monkeypatch.setattr(module, "MAX_LISTED_FILES", 2)
    made = make(place / "beside", [1, 2, 3])
    assert made.manifest["files_in"] == "parts.parquet" and "files" not in made.manifest
    assert made.files == listed.files == Artifact(made.location).files
    assert made.digest == listed.digest and made.starts.tolist() == [0, 1, 3, 6]
    assert "parts.parquet" not in [file.name for file in made.files]


def test_describe_says_what_write_table_said(place):
    for n, counts in ((0, None), (5, {"rows": 5, "kept": 2}), (3, {})):
        info = write_table(place / "x #1.parquet", table(n), counts)
        assert describe(place / "x #1.parquet") == info
        assert info.counts == (counts or {})
    (place / "shard.tar").write(b"123")
    assert describe(place / "shard.tar")[:3] == ("shard.tar", 0, 3)


def test_describe_of_a_file_from_elsewhere(tmp_path):
    pq.write_table(table(4), tmp_path / "x.parquet", store_schema=False)
    info = describe(Location(str(tmp_path / "x.parquet")))
    assert (info.rows, info.counts) == (4, {})


@pytest.mark.parametrize("compress", [True, False])
def test_equal_values_give_equal_bytes(tmp_path, compress):
    whole = table(10_000)
    cut = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 4000), whole.slice(4001)])
    longer = pa.concat_tables([table(3), whole]).combine_chunks().slice(3)  # the same rows at an offset
    infos = [
        write_table(Location(str(tmp_path / f"{i}.parquet")), t, {"rows": 1}, compress)
        for i, t in enumerate((whole, cut, longer, table(10_000)))
    ]
    assert len({info.sha256 for info in infos}) == 1
    assert read_table(Location(str(tmp_path / "1.parquet"))).equals(whole)
    assert write_table(Location(str(tmp_path / "other.parquet")), table(10_000, 1)).sha256 != infos[0].sha256


def test_tables_keep_their_metadata_and_give_single_columns(place):
    write_table(place / "x.parquet", table(3).replace_schema_metadata({b"mine": b"1"}), {"rows": 3})
    read = read_table(place / "x.parquet", ["c", "a"])
    assert sorted(read.column_names) == ["a", "c"] and read.schema.metadata[b"mine"] == b"1"
    with pytest.raises(FileNotFoundError):
        read_table(place / "none.parquet")


def test_a_write_that_fails_leaves_no_part(place, monkeypatch):
    def broken(table, where, **_):
        where.write_bytes(b"half")
        raise OSError("disk is full")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="disk is full"):
        write_table(place / "x.parquet", table(3))
    assert place.list() == []


def test_an_input_is_found_and_must_not_have_changed(place):
    pool = make(place, [3, 2])
    entry = {"path": "pool/1", "digest": pool.digest}
    above = make(place, [3, 2], {"stage": "embed", "inputs": {"pool": entry}}, name="embed/7")
    assert above.has_input("pool") and not above.has_input("selection")
    assert above.input("pool").location == pool.location and above.input("pool").digest == pool.digest
    with pytest.raises(KeyError):
        above.input("selection")
    make(place, [3, 3])  # the pool is made anew
    with pytest.raises(ValueError, match=r"pool/1 must have the content .*embed/7 was made from: its digest differs"):
        above.input("pool")
    (place / "pool/1" / MANIFEST).delete()
    with pytest.raises(ValueError, match="pool/1 is not finished"):
        above.input("pool")


def test_the_pool_of_an_artifact_is_found_along_its_inputs(tmp_path):
    place = Location(str(tmp_path))
    last = make(place, [2])
    for stage, name in (
        ("embed", "pool"),
        ("neighbors", "embeddings"),
        ("dedup", "neighbors"),
        ("shards", "selection"),
    ):
        inputs = {name: {"path": "/".join(last.location.uri.split("/")[-2:]), "digest": last.digest}}
        last = make(place, [1], {"stage": stage, "inputs": inputs}, name=f"{stage}/1")
    assert pool_of(last).location == place / "pool/1"
    alone = make(place, [1], {"stage": "train"}, name="train/1")
    with pytest.raises(ValueError, match="train/1 must describe the rows of a pool: a train artifact does not"):
        pool_of(alone)


def test_outside_sources_may_have_moved(tmp_path):
    made = make(Location(str(tmp_path)), [1], {"locations": {"source": "/old"}})
    assert made.outside("source") == (Location("/old"),)
    assert Artifact(made.location, {"source": "s3://new/x"}).outside("source") == (Location("s3://new/x"),)
    several = make(Location(str(tmp_path / "several")), [1], {"locations": {"source": ["/old", "s3://old/x"]}})
    assert several.outside("source") == (Location("/old"), Location("s3://old/x"))
    assert Artifact(several.location, {"source": ["/new", "/x"]}).outside("source") == (
        Location("/new"),
        Location("/x"),
    )


def test_only_the_place_travels(tmp_path):
    made = make(Location(str(tmp_path)), [1] * 50)
    assert len(made.files) == 50
    data = pickle.dumps(Artifact(made.location, {"source": "/new"}))
    assert pickle.loads(data).moved == {"source": "/new"}
    assert len(pickle.dumps(made)) < 400 and pickle.loads(pickle.dumps(made)).files == made.files


def test_equal_work_gives_an_equal_manifest(tmp_path):
    texts = [(make(Location(str(tmp_path / name)), [3, 1]).location / MANIFEST).read() for name in "ab"]
    assert texts[0] == texts[1] and json.loads(texts[0])["format"] == 1


def test_counts_add_up_in_order_of_appearance():
    assert list(add_counts([{"b": 1}, {"a": 2, "b": 3}, {}]).items()) == [("b", 4), ("a", 2)]


def test_part_names_have_seven_digits():
    assert part_name(12) == "part-0000012.parquet" and part_name(3, "labels-1") == "labels-1-0000003.parquet"
    assert FileInfo("a", 1, 2, "3", {}).rows == 1
