import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import embeddings as module
from curation.artifact import describe, finish, part_name, read_table, write_table
from curation.embeddings import (
    BLOCK_ROWS,
    EmbeddingsPart,
    covered_rows,
    embedding_parts,
    embeddings_table,
    read_embeddings,
    write_embeddings,
)
from curation.store import Location


def unit(n, width, seed=0, dtype="f2"):
    x = np.random.default_rng(seed).normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_what_is_written_is_read(tmp_path, seed, dtype):
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(0, 50)), int(rng.integers(1, 40))
    rows, x = np.sort(rng.choice(100, n, replace=False)), unit(n, width, seed, dtype)
    at = Location(str(tmp_path / "x.parquet"))
    info = write_embeddings(at, rows, x, {"rows": n}, {b"backbone": b"tiny"})
    assert (info.rows, info.counts) == (n, {"rows": n}) and describe(at) == info
    read_rows, read = read_embeddings(at)
    np.testing.assert_array_equal(read_rows, rows)
    np.testing.assert_array_equal(read.view(f"u{x.itemsize}"), x.view(f"u{x.itemsize}"))
    assert read.dtype == dtype and read.shape == x.shape and read_rows.dtype == np.int32
    np.testing.assert_array_equal(covered_rows(at), rows)
    assert read_table(at).schema.metadata[b"backbone"] == b"tiny"


def test_any_reader_can_open_the_cells(tmp_path):
    """The cells are plain bytes with width and dtype beside them."""
    x = unit(5, 8)
    write_embeddings(Location(str(tmp_path / "x.parquet")), np.arange(5), x)
    assert pq.read_metadata(tmp_path / "x.parquet").row_group(0).column(1).compression == "UNCOMPRESSED"
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.schema.field("embedding").type == pa.binary(16)
    assert table.schema.metadata[b"embedding"] == b'{"width": 8, "dtype": "float16"}'
    cells = [np.frombuffer(cell.as_py(), "f2") for cell in table["embedding"]]
    np.testing.assert_array_equal(np.stack(cells), x)


def test_slices_and_strides_do_not_matter(tmp_path):
    x = unit(20, 8)
    for i, some in enumerate((x[3:9], x[::2], x[:, ::2], np.asfortranarray(x))):
        at = Location(str(tmp_path / f"{i}.parquet"))
        write_embeddings(at, np.arange(len(some)), some)
        np.testing.assert_array_equal(read_embeddings(at)[1], some)


def test_several_row_groups_are_read_as_one(place, tmp_path):
    x = unit(100, 6)
    pq.write_table(embeddings_table(np.arange(100), x), tmp_path / "x", row_group_size=7)
    (place / "x.parquet").write((tmp_path / "x").read_bytes())
    np.testing.assert_array_equal(read_embeddings(place / "x.parquet")[1], x)


def test_a_slice_of_a_table_is_read_where_it_is(tmp_path, monkeypatch):
    x = unit(100, 6)
    table = embeddings_table(np.arange(100), x)
    for found in (table.slice(10, 5), pa.concat_tables([table.slice(10, 2), table.slice(12, 3)])):
        monkeypatch.setattr(module, "read_table", lambda _, found=found: found)
        rows, read = read_embeddings(Location("anywhere"))
        assert rows.tolist() == [10, 11, 12, 13, 14]
        np.testing.assert_array_equal(read, x[10:15])


@pytest.mark.parametrize(
    "rows, x, words",
    [
        (np.arange(3), np.zeros((2, 4), "f4"), r"for n rows: got float32 \(2, 4\)"),
        (np.arange(2), np.zeros((2, 4), "f8"), r"must be float16 or float32 \(n, d\) for n rows: got float64 \(2, 4\)"),
        (np.arange(2), np.zeros(2, "f4"), r"got float32 \(2,\)"),
    ],
)
def test_what_are_no_embeddings_is_named(rows, x, words):
    with pytest.raises(ValueError, match=words):
        embeddings_table(rows, x)


def test_a_file_without_embeddings_is_named(tmp_path):
    write_table(Location(str(tmp_path / "x.parquet")), pa.table({"row": [1], "label": [2]}))
    with pytest.raises(ValueError, match=r"x.parquet must hold embeddings: it has row, label"):
        read_embeddings(Location(str(tmp_path / "x.parquet")))


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 35])
def test_blocks_are_cut_at_fixed_offsets_and_scaled(tmp_path, monkeypatch, n):
    monkeypatch.setattr(module, "BLOCK_ROWS", 10)
    x = unit(n, 16)
    at = Location(str(tmp_path / "x.parquet"))
    write_embeddings(at, np.arange(n) * 2, x)
    for scaled in (True, False):
        part = EmbeddingsPart(at, n, 0, unit=scaled)
        blocks = list(part.blocks())
        assert [len(block) for block in blocks] == [10] * (n // 10) + [n % 10] * (n % 10 > 0)
        rows, read = part.read()
        assert read.dtype == np.float32 and read.shape == (n, 16) and all(block.dtype == np.float32 for block in blocks)
        np.testing.assert_array_equal(rows, np.arange(n) * 2)
        if n:
            np.testing.assert_array_equal(np.concatenate(blocks), read)
        wide = x.astype("f8")
        expected = wide / np.linalg.norm(wide, axis=1, keepdims=True) if scaled else wide
        np.testing.assert_allclose(read, expected, rtol=2e-7)


def test_scaling_takes_the_rounding_to_float16_back(tmp_path):
    x = unit(1000, 256)
    write_embeddings(Location(str(tmp_path / "x.parquet")), np.arange(1000), x)
    read = EmbeddingsPart(Location(str(tmp_path / "x.parquet")), 1000, 0).read()[1].astype("f8")
    assert np.abs(np.linalg.norm(x.astype("f8"), axis=1) - 1).max() > 1e-5
    assert np.abs(np.linalg.norm(read, axis=1) - 1).max() < 2e-7


def test_parts_are_in_order_with_empty_ones(place):
    at = place / "embed/1"
    files = [write_embeddings(at / part_name(i), np.arange(n), unit(n, 4)) for i, n in enumerate((3, 0, 2))]
    parts = embedding_parts(finish(at, files, {"stage": "embed"}))
    assert [(part.n_rows, part.first) for part in parts] == [(3, 0), (0, 3), (2, 3)]
    assert [len(part.read()[1]) for part in parts] == [3, 0, 2]


def test_the_block_height_is_part_of_the_stage_version():
    assert BLOCK_ROWS == 4096
