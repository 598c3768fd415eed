"""Damaged files of every kind through ``pool`` and ``embed``: no crash, no hang, no lost row, the same bytes twice.

``OPENLVD_FUZZ`` says how many mutants, 300 if it does not; ``make soak`` takes more.
"""

import io
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.artifact import Artifact, read_table
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared" / "data"
N_MUTANTS = int(os.environ.get("OPENLVD_FUZZ", "300"))
BATCH = 500  # mutants of one process
SECONDS = 120  # for a batch, twice: it takes some ten
MAX_RSS = 1 << 20  # kB of such a process: torch and a few pictures of at most MAX_PIXELS
MAX_PIXELS = 4_000_000
CONTAINERS = (".tar", ".parquet")


def picture(side: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    x = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((side, side * 3 // 4)))
    return Image.fromarray((x // 2 + rng.integers(0, 30, x.shape)).astype("u1"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def made_images() -> dict[str, bytes]:
    """Small images in every format and many of its ways."""
    a, b = picture(64, 0), picture(64, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.asarray(a.convert("L")).astype("u2") * 257)
    real = Image.fromarray(np.asarray(a.convert("L")).astype("f4") / 255)
    many = {"save_all": True, "append_images": [b]}
    made = {
        "a.jpg": encoded(a, "JPEG", exif=exif),
        "prog.jpg": encoded(a, "JPEG", progressive=True, icc_profile=b"icc" * 50),
        "rst.jpg": encoded(a, "JPEG", restart_marker_rows=1, quality=90),
        "cmyk.jpg": encoded(a.convert("CMYK"), "JPEG"),
        "mpo.jpg": encoded(a, "MPO", **many),
        "a.png": encoded(a, "PNG", exif=exif),
        "p.png": encoded(a.quantize(16), "PNG", transparency=3),
        "la.png": encoded(a.convert("LA"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "anim.png": encoded(a, "PNG", **many),
        "a.gif": encoded(a, "GIF"),
        "anim.gif": encoded(a.quantize(16), "GIF", transparency=2, **many),
        "a.webp": encoded(a, "WEBP", exif=exif),
        "less.webp": encoded(a.convert("RGBA"), "WEBP", lossless=True),
        "anim.webp": encoded(a, "WEBP", **many),
        "a.bmp": encoded(a, "BMP"),
        "p.bmp": encoded(a.quantize(16), "BMP"),
        "a.ppm": encoded(a, "PPM"),
        "deep.tif": encoded(deep, "TIFF"),
        "real.tif": encoded(real, "TIFF"),
    }
    for packed in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"{packed}.tif"] = encoded(a, "TIFF", compression=packed, exif=exif)
    made["fax.tif"] = encoded(a.convert("1"), "TIFF", compression="group4")
    if "AVIF" in Image.SAVE:
        made["a.avif"] = encoded(a, "AVIF")
    return made


def made_containers(images: dict[str, bytes]) -> dict[str, bytes]:
    """Tars of every kind and Parquet files, of some of the images."""
    some = list(images.items())[::3]
    made: dict[str, bytes] = {}
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            for i, (name, data) in enumerate(some):
                long = "" if kind == tarfile.USTAR_FORMAT else "é" * 60 + "/"
                for member, content in ((f"{long}{i}{Path(name).suffix}", data), (f"{long}{i}.json", b'{"label": 1}')):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        made[f"{kind}.tar"] = out.getvalue()
    cells = [{"bytes": data, "path": name} for name, data in some]
    for name, column in (("plain", [data for _, data in some]), ("struct", cells)):
        table = pa.table({"image": column, "label": range(len(some)), "text": [name for name, _ in some]})
        for packed in ("none", "snappy"):
            out = io.BytesIO()
            pq.write_table(table, out, row_group_size=3, compression=packed)
            made[f"{name}-{packed}.parquet"] = out.getvalue()
    return made


def real_files() -> dict[str, bytes]:
    """Real images, where there are some: the smallest of a sample, and odd ones."""
    sample = sorted((SHARED / "imagenet-sample").glob("*.JPEG"), key=lambda path: path.stat().st_size)[:20]
    odd = [path for path in sorted((SHARED / "odd-images").glob("*")) if path.suffix != ".json"]
    return {path.name: path.read_bytes() for path in sample + odd if path.stat().st_size < 100_000}


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Data with one to four damages, near its ends more often than elsewhere."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        size = max(len(out), 1)
        at = int(rng.choice([rng.integers(size), rng.integers(min(size, 64)), max(0, size - rng.integers(1, 600))]))
        n = int(rng.choice([1, 2, 4, 16, 512, 4096]))
        kind = int(rng.integers(10))
        if kind == 0:  # bits
            for i in rng.integers(0, size, int(rng.integers(1, 9))):
                out[i : i + 1] = bytes(v ^ (1 << int(rng.integers(8))) for v in out[i : i + 1])
        elif kind == 1:  # cut
            del out[at:]
        elif kind == 2:  # the rest of another file
            out[at:] = other[int(rng.integers(max(len(other), 1))) :]
        elif kind == 3:  # a block twice
            out[at:at] = out[at : at + n]
        elif kind == 4:  # a block gone
            del out[at : at + n]
        elif kind == 5:  # zeros, as of a hole in a file
            out[at : at + n] = bytes(len(out[at : at + n]))
        elif kind == 6:  # numbers at the edge of what a field holds
            width = int(rng.choice([1, 2, 4, 8]))
            number = int(rng.choice([0, 1, 127, 128, 255, (1 << 8 * width) - 1, 1 << (8 * width - 1)]))
            out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, ("little", "big")[int(rng.integers(2))])
        elif kind == 7:
            out[at : at + n] = rng.bytes(n)
        elif kind == 8:  # a block of another file in the middle
            out[at:at] = other[:n]
        else:
            out += rng.bytes(n)
    return repaired(bytes(out), rng)


def repaired(data: bytes, rng: np.random.Generator) -> bytes:
    """Half of the time with checksums that are right, so that what stands behind them is looked at."""
    if rng.random() < 0.5:
        return data
    out = bytearray(data)
    if out.startswith(b"\x89PNG"):
        at = 8
        while at + 12 <= len(out):
            end = at + 8 + int.from_bytes(out[at : at + 4])
            out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end])) if end + 4 <= len(out) else b""
            at = end + 4
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % (sum(out[at : at + 512]) % (1 << 18))
    return bytes(out)


def write_mutants(folder: Path, first: int, n: int) -> None:
    """Some whole files and ``n`` mutants, the same for the same numbers."""
    images = made_images() | real_files()
    containers = made_containers(images)
    folder.mkdir()
    for name in ("a.png", "a.jpg", "a.webp"):
        (folder / f"whole-{name}").write_bytes(images[name])
    names = [*images, *(name for name in containers for _ in range(3))]  # as many as images, in a crawl of all kinds
    files = images | containers
    for i in range(first, first + n):
        rng = np.random.default_rng([7, i])
        name, other = names[int(rng.integers(len(names)))], names[int(rng.integers(len(names)))]
        (folder / f"{i:07d}-{name}").write_bytes(mutate(files[name], files[other], rng))


def run_pool(folder: Path, root: Path) -> None:
    steps = {
        "web": {
            "stage": "pool", "source": str(folder), "max_bad_fraction": 1.0, "part_rows": 64, "max_pixels": MAX_PIXELS,
        },
        "vec": {"stage": "embed", "pool": "web", "backbone": "pixels"},
    }  # fmt: skip
    recipe = parse_recipe({"resources": {"loader_workers": 0}, "steps": steps}, STAGES)
    for _ in run_recipe(recipe, Location(str(root)), LocalExecutor(recipe.resources)):
        pass


def check_run(folder: Path, root: Path) -> Counter[str]:
    """What came of every file, by reason. Every loose file is one row, and no row is lost."""
    [web], [vec] = ([Artifact(Location(str(path)))] for step in ("web", "vec") for path in (root / step).iterdir())
    kept = [row for i in range(len(web.parts)) for row in read_table(web.part(i)).to_pylist()]
    files = [file.name for file in web.files if file.name.startswith("rejected-")]
    rejected = [row for name in files for row in read_table(web.location / name).to_pylist()]
    counts = web.counts
    assert counts["rows"] == counts["kept"] + counts["dropped"] + counts["bad"]
    assert (counts["kept"], counts["dropped"] + counts["bad"]) == (len(kept), len(rejected))
    assert [row["row_id"] for row in kept] == list(range(len(kept)))
    found = Counter(row["source"] for row in kept + rejected)
    loose = {path.name for path in folder.iterdir() if path.suffix not in CONTAINERS}
    assert {name: n for name, n in found.items() if not name.endswith(CONTAINERS)} == dict.fromkeys(loose, 1)
    assert vec.counts == {"rows": len(kept), "kept": len(kept), "dropped": 0, "bad": 0}
    return Counter(row["reason"] for row in rejected) + Counter(kept=len(kept))


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a run but its logs and its notes of when and where."""
    names = [path for path in root.rglob("*.parquet") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in names}


@pytest.mark.timeout(60 + SECONDS * 2 * -(-N_MUTANTS // BATCH))
def test_damaged_files_are_told_and_never_stop_a_pool(tmp_path):
    outcomes: Counter[str] = Counter()
    for first in range(0, N_MUTANTS, BATCH):
        folder, roots = tmp_path / f"web-{first}", [tmp_path / f"{name}-{first}" for name in "ab"]
        write_mutants(folder, first, min(BATCH, N_MUTANTS - first))
        started = time.monotonic()
        run = subprocess.run(
            [sys.executable, __file__, str(folder), *map(str, roots)],
            capture_output=True, text=True, check=False, timeout=SECONDS * 2, cwd=REPO,
        )  # fmt: skip
        assert run.returncode == 0, f"{folder}: exit code {run.returncode}: {run.stderr[-5000:]}"
        outcomes += check_run(folder, roots[0])
        assert contents(roots[0]) == contents(roots[1])
        assert int(run.stdout.split()[-1]) < MAX_RSS, f"{folder}: {run.stdout} kB"
        if N_MUTANTS > BATCH:
            print(f"{first + BATCH}: {time.monotonic() - started:.0f} s, {run.stdout.strip()} kB, {dict(outcomes)}")
            for path in sorted(tmp_path.rglob("*"), reverse=True):  # a soak would fill the disk
                path.rmdir() if path.is_dir() else path.unlink()
    assert {"kept", "undecodable", "too_large", "exact_duplicate"} <= set(outcomes), outcomes
    assert outcomes["kept"] > N_MUTANTS / 20 and outcomes["undecodable"] > N_MUTANTS / 5


def main() -> None:
    """Run the same pool into two roots and say how much memory that took at most, in kB."""
    import torch

    torch.set_num_threads(1)
    folder, *roots = map(Path, sys.argv[1:])
    for root in roots:
        run_pool(folder, root)
    status = Path("/proc/self/status").read_text()  # not getrusage: that tells the peak of the parent too
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
