"""How images reach the shards changes no byte of them."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from tiny import noise_png

from curation import images, tar_writer
from curation.artifact import Artifact, read_table
from curation.shards import ShardsConfig
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.errors import UserError
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stage import Output
from pipelines.stages import shards
from pipelines.stages.table import STAGES

N_TARS, N_IMAGES = 4, 30


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Artifact:
    """Tars of pictures with captions and metadata."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "tars").mkdir()
    rng = np.random.default_rng(0)
    for t in range(N_TARS):
        with tarfile.open(folder / f"tars/{t}.tar", "w") as tar:
            for i in range(N_IMAGES):
                said = {"caption": f'a "picture" of né {i}' if i % 3 else "", "label": str(i % 7), "url": "u" * 30 * i}
                for suffix, data in (("png", noise_png(rng, 8 + i)), ("json", json.dumps(said).encode())):
                    member = tarfile.TarInfo(f"{t}-{i:02d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    parsed = parse_recipe({"steps": {"web": {"stage": "pool", "source": str(folder / "tars")}}}, STAGES)
    (done,) = run_recipe(parsed, Location(str(folder / "root")), LocalExecutor())
    return Artifact(done.location)


def write(pool: Artifact, out) -> dict[str, str]:
    """The checksums of all files of the stage, as the manifest will say and as they are."""
    executor = LocalExecutor()
    output = Output(Location(str(out)), executor)
    config = ShardsConfig(shard_rows=13, mix_rows=50)
    counts = STAGES["shards"].run(config, {"pool": pool}, output, executor)
    assert counts["kept"] == N_TARS * N_IMAGES
    told = {file.name: file.sha256 for file in output.files}
    assert told == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    return told


@pytest.mark.parametrize("name", ["direct", "copied", "one thread", "many threads", "small pieces"])
def test_shards_are_the_same_however_they_are_written(pool, tmp_path, monkeypatch, name):
    expected = write(pool, tmp_path / "plain")
    if name in ("direct", "copied"):
        monkeypatch.setattr(images, "DIRECT_BYTES", 0 if name == "direct" else 1 << 40)
    elif name == "small pieces":
        monkeypatch.setattr(tar_writer, "PIECE", 4096)
    else:
        monkeypatch.setattr(shards, "N_THREADS", 1 if name == "one thread" else 5)
    assert write(pool, tmp_path / "other") == expected


def test_webdataset_finds_every_image_under_its_key(pool, tmp_path):
    import webdataset

    write(pool, tmp_path)
    rows = {row["key"]: row for i in range(len(pool.parts)) for row in read_table(pool.part(i)).to_pylist()}
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    seen = set()
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        row = rows[sample["__key__"]]
        seen.add(row["key"])
        assert hashlib.sha256(sample["png"]).hexdigest() == row["key"]
        assert sample.get("txt", b"").decode() == (row["caption"] or "")
        said = json.loads(sample["json"])
        assert said["metadata"] == json.loads(row["metadata"]) and said["member"] == row["member"]
    assert seen == set(rows)


@pytest.mark.parametrize("direct_bytes", [0, 1 << 40])
def test_a_shard_with_an_image_that_has_changed_is_not_written(pool, tmp_path, monkeypatch, direct_bytes):
    monkeypatch.setattr(images, "DIRECT_BYTES", direct_bytes)
    row = read_table(pool.part(1)).to_pylist()[3]
    tar = pool.outside("source")[0].path / row["source"]
    whole = tar.read_bytes()
    try:
        tar.write_bytes(whole[: row["offset"]] + b"\0" + whole[row["offset"] + 1 :])
        with pytest.raises(UserError, match=rf"{row['source']} must hold the image that the pool saw: its bytes have"):
            write(pool, tmp_path)
    finally:
        tar.write_bytes(whole)
    indexes = [read_table(Location(str(path)))["key"].to_pylist() for path in tmp_path.glob("part-*")]
    assert not any(row["key"] in keys for keys in indexes)
    assert len(list(tmp_path.glob("*.tar"))) == len(indexes)
