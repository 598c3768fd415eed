"""Whatever a crawl holds has its outcome in a pool, and no file is lost: rows = kept + dropped + bad."""

import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.artifact import Artifact, read_table
from curation.listing import file_at
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

REPO = Path(__file__).parents[2]
ODD_IMAGES = REPO.parent / "shared" / "data" / "odd-images"


def image(seed: int, kind: str = "PNG", side: int = 40) -> bytes:
    """A picture of its own for every seed."""
    x = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(x).save(out, kind)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claim_png(width: int, height: int, beside: bytes = b"") -> bytes:
    """A PNG of a few bytes that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + beside + data + chunk(b"IEND", b"")


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet_of(rows: list[dict[str, object]], group: int = 2) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=group)
    return out.getvalue()


def run_steps(root: Path, source: Path, **config: object) -> tuple[Artifact, Artifact]:
    """The pool of a folder and its embeddings."""
    steps = {
        "web": {"stage": "pool", "source": str(source), "max_bad_fraction": 1.0, "part_rows": 7, **config},
        "vec": {"stage": "embed", "pool": "web", "backbone": "pixels"},
    }
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    made = [r.location for r in run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources))]
    return Artifact(made[0]), Artifact(made[1])


def outcomes(pool: Artifact) -> dict[tuple[str, str | None], str]:
    """ "keep", or the reason, of every row by source and member; each is there once, and they add up."""
    found: dict[tuple[str, str | None], str] = {}
    rejected = [file.name for file in pool.files if file.name.startswith("rejected-")]
    tables = [read_table(pool.part(i)) for i in range(len(pool.parts))]
    rows = [row for table in tables for row in table.to_pylist()]
    for row in rows + [row for name in rejected for row in read_table(pool.location / name).to_pylist()]:
        assert (row["source"], row["member"]) not in found, row
        found[row["source"], row["member"]] = row.get("reason") or "keep"
    counts = pool.counts
    assert counts["rows"] == len(found) == counts["kept"] + counts["dropped"] + counts["bad"]
    assert counts["kept"] == len(rows)
    assert counts["bad"] == sum(reason in ("undecodable", "too_large") for reason in found.values())
    return found


def check_embedded(pool: Artifact, vectors: Artifact) -> None:
    """Every kept row has a vector: its bytes were found again, and were those of its key."""
    assert vectors.counts == {"rows": pool.counts["kept"], "kept": pool.counts["kept"], "dropped": 0, "bad": 0}


def crawl() -> dict[str, tuple[bytes, str]]:
    """Loose files by name, each with its outcome."""
    whole = image(0, "JPEG")
    names = ["a b.jpg", "[1].jpg", "#1.jpg", "50%.jpg", "what?.jpg", "*.jpg", "'\".jpg", "a\nb.jpg", "-rf.jpg",
             "x" * 251 + ".jpg", "日本.jpg", "café.jpg", "cafe\u0301.jpg", "no suffix", "photo.txt.jpg",
             "deep/er/and/../x.jpg".replace("/../", "/"), "s3:/bucket/x.jpg", "x.tar/inside.jpg"]  # fmt: skip
    files = {name: (image(100 + i, ("JPEG", "PNG", "WEBP", "GIF")[i % 4]), "keep") for i, name in enumerate(names)}
    return {
        **files,
        "whole.jpg": (whole, "keep"),
        "whole again.png": (whole, "exact_duplicate"),
        "cut.jpg": (whole[: len(whole) // 2], "undecodable"),
        "cut and filled.jpg": (whole[: len(whole) // 2].ljust(len(whole), b"\0"), "undecodable"),
        "empty.jpg": (b"", "undecodable"),
        "page.jpg": (b"<!doctype html><title>404</title>", "undecodable"),
        "script.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "undecodable"),
        "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        "icon.ico": (image(1, "ICO"), "undecodable"),
        "film.mp4": (b"\0\0\0\x18ftypmp42" + bytes(1000), "undecodable"),
        "stray.zip": (b"PK\3\4" + bytes(100), "undecodable"),
        "no size.png": (claim_png(0, 0), "undecodable"),
        "long claim.png": (claim_png(2**31 - 1, 1), "too_large"),
        "large claim.png": (claim_png(60_000, 60_000), "too_large"),
        "hollow.png": (claim_png(13_000, 13_000), "undecodable"),
        "small.png": (image(2, side=5), "too_small"),
        "strip.png": (claim_png(33, 1), "too_small"),
        "text bomb.png": (
            claim_png(10, 3, chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(50_000_000), 9))), "too_small",
        ),
    }  # fmt: skip


HIDDEN = [".DS_Store", "._whole.jpg", ".git/objects/x.jpg", ".ipynb_checkpoints/a.jpg", "Thumbs.db", "__MACOSX/a.jpg",
          "notes.txt", "a.json", "labels.csv", "sub/.hidden.jpg"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("odd") / "crawl [1] 100%"
    for name, (data, _) in crawl().items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    for name in HIDDEN:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(image(3))
    (place / "empty" / "er").mkdir(parents=True)
    (place / "link.jpg").symlink_to("whole.jpg")
    (place / "lost.jpg").symlink_to("nowhere")
    (place / "round.jpg").symlink_to("round.jpg")
    (place / "up").symlink_to("..")
    os.mkfifo(place / "pipe.jpg")
    (place / os.fsdecode(b"caf\xe9.jpg")).write_bytes(image(4))
    return place


@pytest.mark.timeout(120)
def test_loose_files_have_their_outcomes(folder, tmp_path):
    pool, vectors = run_steps(tmp_path, folder, min_side=8, max_aspect_ratio=8)
    want = {(name, None): reason for name, (_, reason) in crawl().items()}
    want |= {("link.jpg", None): "keep", ("lost.jpg", None): "undecodable", ("round.jpg", None): "undecodable"}
    want["./caf%E9.jpg", None] = "keep"
    same = ["link.jpg", "whole again.png", "whole.jpg"]  # the first of them by name stays
    want |= {(name, None): "exact_duplicate" if i else "keep" for i, name in enumerate(same)}
    assert outcomes(pool) == want
    assert pool.counts["ignored_files"] == len(HIDDEN) + 2  # a link to a folder, a pipe
    check_embedded(pool, vectors)
    root = Location(str(folder))
    for i in range(len(pool.parts)):
        for row in read_table(pool.part(i)).to_pylist():
            assert file_at(root, row["source"]).path.stat().st_size == row["n_bytes"]


def test_a_name_is_told_in_every_rejected_row(folder, tmp_path):
    """What is listed as rejected can be found again, and the detail says nothing of where the source lies."""
    pool, _ = run_steps(tmp_path, folder, min_side=8, max_aspect_ratio=8)
    for file in pool.files:
        if file.name.startswith("rejected-"):
            for row in read_table(pool.location / file.name).to_pylist():
                assert os.path.lexists(file_at(Location(str(folder)), row["source"]).path), row
                assert row["detail"] and str(folder) not in row["detail"]
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other, symlinks=True, ignore=shutil.ignore_patterns("pipe.jpg"))
    moved, _ = run_steps(tmp_path / "again", other, min_side=8, max_aspect_ratio=8)
    assert moved.digest == pool.digest


def containers() -> dict[str, tuple[bytes, dict[str | None, str]]]:
    """Tars and Parquet files by name, each with the outcomes of its members."""
    a, b, c, d = (image(10 + i) for i in range(4))
    whole = tar_of(("a.png", a), ("b.png", b))
    link, device = tarfile.TarInfo("link.png"), tarfile.TarInfo("device.png")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    long = "é" * 120 + "/" + "y" * 150 + ".png"
    spoilt = bytearray(tar_of(*((f"{i}.png", image(40 + i)) for i in range(4)), kind=tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=io.BytesIO(bytes(spoilt))) as tar:
        spoilt[tar.getmembers()[2].offset + 3] ^= 255
    rows: list[dict[str, object]] = [{"image": image(60 + i), "n": i} for i in range(4)]
    torn = bytearray(parquet_of(rows))
    at = pq.ParquetFile(io.BytesIO(bytes(torn))).metadata.row_group(0).column(0).data_page_offset
    torn[at : at + 20] = bytes(20)
    structs = [{"image": {"bytes": image(70 + i), "path": f"p/{i}.png"}} for i in range(2)]
    return {
        "plain.tar": (whole, {"a.png": "keep", "b.png": "keep"}),
        "empty.tar": (tar_of(), {}),
        "no bytes.tar": (b"", {None: "undecodable"}),
        "no tar.tar": (a, {None: "undecodable"}),
        "packed.tar": (gzip.compress(whole), {None: "undecodable"}),
        "cut.tar": (tar_of(("c.png", c), ("d.png", d))[:-12_000], {"c.png": "keep", None: "undecodable"}),
        "spoilt.tar": (bytes(spoilt), {"0.png": "keep", "1.png": "keep", None: "undecodable"}),
        "names.tar": (
            tar_of(("/etc/x.png", image(20)), ("../../up.png", image(21)), (long, image(22)), (link, b""),
                   (device, b""), ("._a.png", b"resource fork"), ("note.json", b"{}")),
            {"/etc/x.png": "keep", "../../up.png": "keep", long: "keep"},
        ),
        "inside.tar": (
            tar_of(("in.tar", whole), ("e.png", image(23)), ("cut.png", a[:99])),
            {"in.tar": "undecodable", "e.png": "keep", "cut.png": "undecodable"},
        ),
        "two.tar": (
            tar_of(("f.png", image(24))) + tar_of(("g.png", image(25)), ("h.png", a)),
            {"f.png": "keep", "g.png": "keep", "h.png": "exact_duplicate"},
        ),
        "structs.parquet": (parquet_of(structs), {"p/0.png": "keep", "p/1.png": "keep"}),
        "one null.parquet": (parquet_of([{"image": b""}]), {None: "undecodable"}),
        "urls.parquet": (parquet_of([{"url": "http://x/y.jpg", "key": 1}]), {None: "undecodable"}),
        "paths.parquet": (parquet_of([{"image": "a.jpg"}]), {None: "undecodable"}),
        "no parquet.parquet": (b"PAR1 and no more", {None: "undecodable"}),
    }  # fmt: skip


def test_members_of_containers_have_their_outcomes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    want = {}
    for name, (data, members) in containers().items():
        (source / name).write_bytes(data)
        want |= {(name, member): reason for member, reason in members.items()}
    before = sorted(path for path in tmp_path.rglob("*"))
    pool, vectors = run_steps(tmp_path / "root", source)
    # a copy is kept where it stands first: "inside.tar" ... "plain.tar" ... "two.tar"
    assert outcomes(pool) == want
    check_embedded(pool, vectors)
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "root")) == before


def test_rows_of_parquet_are_told_apart_by_their_number(tmp_path):
    """Plain bytes have no names: null cells, and a row group that cannot be read."""
    rows: list[dict[str, object]] = [{"image": image(60 + i), "n": i} for i in range(6)]
    rows[5]["image"] = None
    data = bytearray(parquet_of(rows))
    at = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(1).column(0).data_page_offset
    data[at : at + 20] = bytes(20)
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    pool, vectors = run_steps(tmp_path / "root", tmp_path / "a.parquet")
    offsets = [read_table(pool.part(i), ["offset"])["offset"].to_pylist() for i in range(len(pool.parts))]
    assert offsets == [[0, 1, 4]]
    [rejected] = [read_table(pool.location / f.name) for f in pool.files if f.name.startswith("rejected-")]
    assert len(rejected) == 2 and rejected["detail"][0].as_py().startswith("rows 2 to 3: ")
    assert pool.counts["rows"] == 5 and pool.counts["bad"] == 2
    check_embedded(pool, vectors)


@pytest.mark.skipif(not ODD_IMAGES.is_dir(), reason="needs the folder of odd images; the tests above make their own")
def test_the_folder_of_odd_images_has_its_outcomes(tmp_path):
    expected = json.loads((ODD_IMAGES / "expected.json").read_text("utf-8"))
    pool, vectors = run_steps(tmp_path, ODD_IMAGES, **expected["rules"])
    found = {source: reason for (source, _), reason in outcomes(pool).items()}
    want = {name: file["outcome"].removeprefix("reject:") for name, file in expected["files"].items()}
    copies = ("plain.jpg", "exact-copy-of-plain.jpg")
    assert sorted(found[name] for name in copies) == sorted(want[name] for name in copies)  # one of the two stays
    assert {n: v for n, v in found.items() if n not in copies} == {n: v for n, v in want.items() if n not in copies}
    check_embedded(pool, vectors)


BASELINE_AND_BOMBS = """
import sys
from pathlib import Path
from test_odd_files import outcomes, run_steps
import torch
torch.set_num_threads(1)
def peak():  # of this process alone: getrusage tells that of its parent too, before it became this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
folder = Path(sys.argv[1])
run_steps(folder / "root", folder / "plain")
before = peak()
pool, _ = run_steps(folder / "root2", folder / "bombs")
assert set(outcomes(pool).values()) == {"keep", "too_large", "undecodable"}, outcomes(pool)
print(peak() - before)
"""


def bombs() -> dict[str, bytes]:
    """Files that would like to be large in memory."""
    progressive = io.BytesIO()
    Image.new("RGB", (64, 64)).save(progressive, "JPEG", progressive=True)
    jpeg = bytearray(progressive.getvalue())
    at = jpeg.find(b"\xff\xc2")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 13_000, 13_000)
    packed = zlib.compress(bytes(150_000_000))
    frames = io.BytesIO()
    Image.new("P", (500, 500)).save(frames, "GIF")
    gif = frames.getvalue()
    frame = gif[gif.index(b",\0\0\0\0") : -1]
    claims = tarfile.TarInfo("claims.png")
    claims.size = 1 << 40
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 36
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1 << 30, 16) + bytes(100)
    return {
        **{f"{i}.png": claim_png(60_000, 60_000 + i) for i in range(4)},
        **{f"hollow-{i}.png": claim_png(13_000, 13_000 + i) for i in range(4)},
        "long.png": claim_png(170_000_000, 1),
        "high.png": claim_png(1, 170_000_000),
        "progressive.jpg": bytes(jpeg),
        **{f"{kind.decode()}.png": image(3)[:33] + chunk(kind, body + packed) + image(3 + i)[33:]
           for i, (kind, body) in enumerate([(b"zTXt", b"c\0\0"), (b"iTXt", b"c\0\1\0\0\0"), (b"iCCP", b"c\0\0")])},
        "frames.gif": gif[:-1] + frame * 5_000 + b";",
        "screen.gif": gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:],
        "bitmap.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 13_000, 13_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "pixmap.ppm": b"P6 13000 13000 255\n",
        "tags.tif": tiff,
        "claims.tar": claims.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
        "pax.tar": pax.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
    }  # fmt: skip


@pytest.mark.timeout(200)
def test_memory_stays_flat_on_bombs(tmp_path):
    for name in ("plain", "bombs"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}-plain.png").write_bytes(image(i, side=500))
    for name, data in bombs().items():
        (tmp_path / "bombs" / name).write_bytes(data)
    for name, size in (("film.mp4", 5 << 30), ("zeros.tar", 300 << 20)):  # files of holes
        with (tmp_path / "bombs" / name).open("wb") as file:
            file.truncate(size)
    code = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(Path(__file__).parent)!r}]\n{BASELINE_AND_BOMBS}"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    assert int(run.stdout) < 100_000  # kB; one of them decoded, or read whole, would take more
