"""A pool from Parquet, from tars and from a folder, beside a plain loop; and the driver's memory at a million images.

Cases ``parquet``, ``tars``, ``folder``: the same small JPEGs in the three layouts: Parquet as Hugging Face writes it
(``image`` with bytes and path, ``label``, row groups of 100), tars of 10,000 by webdataset's TarWriter (jpg and cls), a
folder a class. Ours is the stage ``pool`` by ``run_recipe`` on Ray with 2 workers (``--executor ray``); ``serial`` is
what the command does unless it is told otherwise, one process, run once. The peer is what one would write: a
``multiprocessing.Pool`` of 2 reads the same files (a container an item, or files 256 at a time), of every image takes
the sha256 and decodes it to its last pixel (Pillow's ``open`` and ``load``: a broken file must be noticed), for its
format and size, reads its label, leaves out later copies and writes one Parquet table. Ours decodes as well; it also
checks that a JPEG has its end, turns the size upright, keeps the metadata, notes where every image is, goes on after a
kill, and syncs what it writes. The processes of both are started before the clock starts; listing is on the clock.
``equal``: same keys, formats, sizes, lengths and labels.

Case ``tiny-1m``: a million distinct JPEGs of some 350 bytes in tars of 10,000, on Ray with 2 workers, beside a tenth of
the same tars: ``driver_mb`` may be at most 30 MB more (``growth_mb``). ``equal``: every image is in the pool.

``driver_mb`` is the peak memory of the process that runs the recipe, ``worker_mb`` that of the largest worker, both in
a fresh process with fresh workers; ``peak_mb`` is the larger. TMPDIR says where all of it lies.

    python tests/bench/bench_pool.py [--data FOLDER] [--rows N] [--cases ...] [--seed S] [--json FILE]

--data: a folder of Parquet files with ``image: {bytes, path}`` and ``label``; without it pictures are made.
--rows: of every case; by default 60,000, and 1,000,000 of ``tiny-1m``.
"""

import argparse
import hashlib
import io
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from common import arguments, interleaved, most_mb, ray_workers, report
from PIL import Image

from curation.artifact import Artifact, read_table
from curation.store import Location
from embedding.decode import MAX_PIXELS
from embedding.measures import scan_image
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor, Resources
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import parse_recipe
from pipelines.stages.table import STAGES

ROWS, TINY_ROWS = 60_000, 1_000_000
WORKERS = 2
PER_TAR = 10_000
ROW_GROUP = 100  # rows, of images on the Hugging Face hub
N_LABELS = 10
LEAST_RATIOS = {"parquet": 0.7, "tars": 1.2, "folder": 0.6}
MOST_GROWTH_MB = 30.0  # of the driver, from a tenth of the rows to all
FILES_AT_A_TIME = 256
COLUMNS = ("key", "format", "width", "height", "n_bytes", "label")
Row = tuple[Any, ...]  # in the order of COLUMNS


def pictures(args: argparse.Namespace) -> tuple[list[bytes], list[int]]:
    """JPEGs and labels."""
    n_rows = args.rows or ROWS
    if args.data:
        tables = [pq.read_table(path, columns=["image", "label"]) for path in sorted(args.data.glob("*.parquet"))]
        table = pa.concat_tables(tables).slice(0, n_rows).combine_chunks()
        return table["image"].combine_chunks().field("bytes").to_pylist(), table["label"].to_pylist()
    rng = np.random.default_rng(args.seed)
    return [a_jpeg(rng) for _ in range(n_rows)], rng.integers(N_LABELS, size=n_rows).tolist()


def a_jpeg(rng: np.random.Generator) -> bytes:
    """A smooth picture of 32 x 32, about 900 bytes."""
    out = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    coarse.resize((32, 32), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def write_parquet(folder: Path, images: list[bytes], labels: list[int]) -> None:
    """Six files."""
    folder.mkdir()
    n = -(-len(images) // 6)
    for k, first in enumerate(range(0, len(images), n)):
        some = slice(first, first + n)
        names = [f"{i:06d}.jpg" for i in range(first, min(first + n, len(images)))]
        struct = pa.StructArray.from_arrays([pa.array(images[some]), pa.array(names)], ["bytes", "path"])
        table = pa.table({"image": struct, "label": pa.array(labels[some])})
        pq.write_table(table, folder / f"train-{k:05d}-of-00006.parquet", row_group_size=ROW_GROUP)


def write_tars(folder: Path, images: list[bytes], labels: list[int]) -> None:
    """As img2dataset and others write them."""
    folder.mkdir()
    for first in range(0, len(images), PER_TAR):
        with webdataset.TarWriter(str(folder / f"{first // PER_TAR:05d}.tar")) as tar:
            for i in range(first, min(first + PER_TAR, len(images))):
                tar.write({"__key__": f"{i:09d}", "jpg": images[i], "cls": labels[i]})


def write_folder(folder: Path, images: list[bytes], labels: list[int]) -> None:
    """A folder a class."""
    for label in set(labels):
        (folder / str(label)).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label) / f"{i:06d}.jpg").write_bytes(image)


def facts(data: bytes, label: str) -> Row:
    """What the plain loop finds out about an image."""
    key = hashlib.sha256(data).hexdigest()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return key, str(image.format).lower(), image.width, image.height, len(data), label


def of_parquet(path: Path) -> list[Row]:
    """The images of a Parquet file, a batch at a time."""
    with pq.ParquetFile(path) as file:
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        return [facts(row["image"]["bytes"], str(row["label"])) for row in rows]


def of_tar(path: Path) -> list[Row]:
    """The images of a tar, by tarfile."""
    found: list[Row] = []
    with tarfile.open(path, "r:") as tar:
        sample: dict[str, bytes] = {}
        for member in tar:
            sample[member.name.rpartition(".")[2]] = tar.extractfile(member).read()  # type: ignore[union-attr]
            tar.members = []  # type: ignore[attr-defined]
            if len(sample) == 2:
                found.append(facts(sample["jpg"], sample["cls"].decode()))
                sample = {}
    return found


def of_file(path: str) -> list[Row]:
    """An image of a folder."""
    data = Path(path).read_bytes()
    return [facts(data, os.path.basename(os.path.dirname(path)))]  # noqa: PTH119, PTH120 - sooner


def peer(processes: Pool, read: Callable[[Any], list[Row]], list_items: Callable[[], Iterable[Any]], out: Path) -> None:
    """The plain loop, with its files listed and its table written."""
    items = list(list_items())
    kept: dict[str, Row] = {}
    chunk = FILES_AT_A_TIME if read is of_file else 1
    for rows in processes.imap(read, items, chunksize=chunk):
        for row in rows:
            kept.setdefault(row[0], row)
    columns = zip(COLUMNS, zip(*kept.values(), strict=True), strict=True)
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns}), out)


def files_below(folder: Path, kind: str) -> list[str]:
    """The names of all files of a kind, sorted."""
    found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]  # noqa: PTH118
    return sorted(path for path in found if path.endswith(kind))


LAYOUTS: dict[str, tuple[Callable[[Path, list[bytes], list[int]], None], Callable[[Any], list[Row]], str]] = {
    "parquet": (write_parquet, of_parquet, ".parquet"),
    "tars": (write_tars, of_tar, ".tar"),
    "folder": (write_folder, of_file, ".jpg"),
}


def ours(source: Path, root: Path, executor: LocalExecutor | RayExecutor) -> Artifact:
    """The stage, as a recipe runs it."""
    recipe = parse_recipe({"steps": {"web": {"stage": "pool", "source": str(source)}}}, STAGES)
    [result] = run_recipe(recipe, Location(str(root)), executor)
    assert result.location is not None
    return Artifact(result.location)


def rows_of(table: pa.Table) -> set[Row]:
    """What is compared."""
    return set(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))


def memory_of(source: Path, root: Path) -> dict[str, float]:
    """Peak memory in MB, and seconds, of ours on Ray in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return dict(fresh.apply(_memory_here, (source, root)))


def _memory_here(source: Path, root: Path) -> dict[str, float]:
    executor = RayExecutor(Resources(workers=WORKERS))
    try:
        started_on(executor)
        seconds = seconds_of(partial(ours, source, root, executor))
        workers = [most_mb(pid) for pid in ray_workers()]
        return {"driver_mb": most_mb(os.getpid()), "worker_mb": max(workers), "seconds": seconds}
    finally:
        executor.close()


def started_on(executor: RayExecutor) -> None:
    """Have the workers started, and what a scan needs imported there."""
    image = a_jpeg(np.random.default_rng(0))
    limits = {"max_pixels": MAX_PIXELS, "min_side": 1, "max_aspect_ratio": 1.0}
    for fn, item in ((time.sleep, 0.3), (partial(scan_image, **limits), image)):
        for _ in executor.map(fn, [item] * 4 * WORKERS):
            pass


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def clear(folder: Path, name: str) -> None:
    """Remove what a run has made."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / f"{name}.parquet").unlink(missing_ok=True)


def run_layout(
    case: str, args: argparse.Namespace, data: tuple[list[bytes], list[int]], folder: Path
) -> dict[str, Any]:
    """One row of the table."""
    write, read, kind = LAYOUTS[case]
    source = folder / "in"
    write(source, *data)
    memory = memory_of(source, folder / "fresh")
    out = folder / "peer.parquet"
    executor = RayExecutor(Resources(workers=WORKERS))
    try:
        started_on(executor)
        with multiprocessing.get_context("spawn").Pool(WORKERS) as processes:
            processes.map(time.sleep, [0.2] * WORKERS)
            seconds = interleaved(
                {
                    "ours": partial(ours, source, folder / "ours", executor),
                    "peer": partial(peer, processes, read, partial(files_below, source, kind), out),
                },
                args.repeats,
                partial(clear, folder),
            )
    finally:
        executor.close()
    serial = seconds_of(partial(ours, source, folder / "serial", LocalExecutor()))
    pool = ours(source, folder / "ours", LocalExecutor())  # done before
    found = rows_of(pa.concat_tables(read_table(pool.part(i), COLUMNS) for i in range(len(pool.parts))))
    n_rows = len(data[0])
    return {
        "case": case,
        "ours": n_rows / seconds["ours"],
        "peer": n_rows / seconds["peer"],
        "peer_name": f"sha256 and Pillow in a multiprocessing.Pool of {WORKERS}",
        "ratio": seconds["peer"] / seconds["ours"],
        "serial": n_rows / serial,
        "unit": "images/s",
        "rows": n_rows,
        "peak_mb": max(memory["driver_mb"], memory["worker_mb"]),
        "driver_mb": memory["driver_mb"],
        "worker_mb": memory["worker_mb"],
        "equal": found == rows_of(pq.read_table(out)) and len(found) == len(set(data[0])),
    }


def write_tiny(folder: Path, n_rows: int) -> list[Path]:
    """Tars of JPEGs that differ in a comment, each member of two blocks; made for a tar at once."""
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out, "JPEG")
    jpeg = out.getvalue()
    image = jpeg[:2] + b"\xff\xfe\x00\x0b" + b"0" * 9 + jpeg[2:]  # a comment of nine digits
    head = tarfile.TarInfo("0" * 9 + ".jpg")
    head.size = len(image)
    template = head.tobuf(tarfile.USTAR_FORMAT) + image.ljust(tarfile.BLOCKSIZE, b"\0")
    folder.mkdir()
    tars = []
    for first in range(0, n_rows, PER_TAR):
        n = min(PER_TAR, n_rows - first)
        digits = np.frombuffer("".join(f"{i:09d}" for i in range(first, first + n)).encode(), np.uint8).reshape(n, 9)
        blocks = np.tile(np.frombuffer(template, np.uint8), (n, 1))
        blocks[:, :9] = blocks[:, tarfile.BLOCKSIZE + 6 : tarfile.BLOCKSIZE + 15] = digits
        blocks[:, 148:156] = ord(" ")
        sums = blocks[:, : tarfile.BLOCKSIZE].sum(axis=1, dtype=np.int64)
        blocks[:, 148:156] = np.frombuffer(b"".join(b"%06o\0 " % total for total in sums), np.uint8).reshape(n, 8)
        tars.append(folder / f"{first // PER_TAR:05d}.tar")
        with tars[-1].open("wb") as file:
            file.write(blocks)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    return tars


def run_tiny(case: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The last row of the table."""
    n_rows = args.rows or TINY_ROWS
    tars = write_tiny(folder / "in", n_rows)
    few = tars[: max(1, len(tars) // 10)]
    for name, some in (("few", few), ("all", tars)):
        (folder / "in" / f"{name}.txt").write_text("".join(f"{path.name}\n" for path in some))
    memory = {name: memory_of(folder / "in" / f"{name}.txt", folder / name) for name in ("few", "all")}
    pool = ours(folder / "in" / "all.txt", folder / "all", LocalExecutor())  # done before
    n_few = min(len(few) * PER_TAR, n_rows)
    return {
        "case": case,
        "ours": n_rows / memory["all"]["seconds"],
        "peer": n_few / memory["few"]["seconds"],
        "peer_name": f"the same, {n_few:,} of them",
        "ratio": n_rows / memory["all"]["seconds"] / (n_few / memory["few"]["seconds"]),
        "unit": "images/s",
        "rows": n_rows,
        "peak_mb": max(memory["all"]["driver_mb"], memory["all"]["worker_mb"]),
        "driver_mb": memory["all"]["driver_mb"],
        "worker_mb": memory["all"]["worker_mb"],
        "growth_mb": round(memory["all"]["driver_mb"] - memory["few"]["driver_mb"], 1),
        "equal": pool.counts["kept"] == n_rows,
    }


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    cases = [*LAYOUTS, "tiny-1m"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # on a busy machine the peer would have the right of way
    data = pictures(args) if set(args.cases) & set(LAYOUTS) else ([], [])
    rows, missed = [], []
    for case in args.cases:
        with tempfile.TemporaryDirectory(prefix=f"{case}-") as scratch:
            run = partial(run_layout, case, args, data) if case in LAYOUTS else partial(run_tiny, case, args)
            rows.append(row := run(Path(scratch)))
        if not row["ratio"] >= LEAST_RATIOS.get(case, 0.0):
            missed.append(f"{case}: {row['ratio']:.2f} of the peer, less than {LEAST_RATIOS[case]}")
        if not row.get("growth_mb", 0.0) <= MOST_GROWTH_MB:
            missed.append(f"{case}: the driver grew by {row['growth_mb']} MB, more than {MOST_GROWTH_MB}")
    return report(rows, args, missed)


if __name__ == "__main__":
    sys.exit(main())
