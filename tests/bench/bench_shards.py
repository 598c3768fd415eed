"""Shards from a selection of one tenth of tars, beside webdataset's TarWriter and beside ``cp``.

Both sides take the images of the same random tenth of the same tars (each image with a caption and metadata), mix them
and write shards of 1000. Ours is the stage ``shards`` in one process: it has the pool and the selection, compares
every image with its key, takes the checksum of every shard, writes an index and syncs each file to the disk. The peer
runs one process a core on a share of the tars; it knows the names of the selected samples, reads them with tarfile
(which skips what is not wanted) or with webdataset (whichever is faster), and checks and syncs nothing.
``ratio_writer`` is the ratio to TarWriter alone, given the place of every member. ``cp`` copies our shards, one after
the other, and syncs them. TMPDIR says where all of it lies; sources are in the page cache.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from common import arguments, interleaved, most_mb, report
from PIL import Image

from curation.artifact import Artifact, read_table
from curation.shards import ShardsConfig
from curation.store import Location
from pipelines.engine import run_recipe
from pipelines.executor import LocalExecutor
from pipelines.recipe import parse_recipe
from pipelines.stage import Output
from pipelines.stages.table import STAGES

CASES = {"shards-110k": (20_000, 110_000, 1000), "shards-2k": (100_000, 2000, 10_000)}  # rows, mean bytes, rows a tar
N_LABELS = 10  # of which one is selected
MIX = 1000  # samples in the peer's shuffle buffer
SHARD_ROWS = ShardsConfig().shard_rows
Samples = Iterator[dict[str, Any]]
READERS: dict[str, tuple[Callable[..., Samples], list[tuple[Any, ...]]]] = {}  # with the shares; known to all processes


def a_jpeg(rng: np.random.Generator) -> bytes:
    """A picture of less than 1 kB."""
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def padded(jpeg: bytes, filling: bytes) -> bytes:
    """The same picture with comments, of which a JPEG file may have any number."""
    chunks = [filling[i : i + 65_533] for i in range(0, len(filling), 65_533)]
    return jpeg[:2] + b"".join(b"\xff\xfe" + struct.pack(">H", len(c) + 2) + c for c in chunks) + jpeg[2:]


def write_tars(folder: Path, case: str, n_rows: int, seed: int, data: Path | None) -> None:
    """Tars as img2dataset writes them: jpg, json and txt of each image. ``data``: a folder of JPEGs to take instead."""
    _, mean, per_tar = CASES[case]
    rng = np.random.default_rng(seed)
    given = sorted(path for path in data.rglob("*") if path.is_file()) if data else []
    folder.mkdir()
    for first in range(0, n_rows, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + per_tar, n_rows)):
                if given:
                    image = padded(given[i % len(given)].read_bytes(), b"%016d" % i)  # every one another
                else:
                    jpeg = a_jpeg(rng)
                    image = padded(jpeg, rng.bytes(max(int(mean * rng.uniform(0.5, 1.5)) - len(jpeg), 16)))
                caption = f'picture number {i}, of which "someone" said: it is naïve'
                facts = {"caption": caption, "url": f"https://example.org/{i}.jpg", "key": f"{i:09d}", "width": 16}
                facts |= {"status": "success", "height": 16, "label": str(rng.integers(N_LABELS))}
                for suffix, content in (
                    ("jpg", image),
                    ("json", json.dumps(facts).encode()),
                    ("txt", caption.encode()),
                ):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def pool_and_selection(folder: Path) -> tuple[Artifact, Artifact]:
    """What the stage starts from."""
    steps = {
        "web": {"stage": "pool", "source": str(folder / "tars")},
        "tenth": {"stage": "select", "pool": "web", "where": "label = '0'"},
    }
    parsed = parse_recipe({"steps": steps}, STAGES)
    done = {r.name: Artifact(r.location) for r in run_recipe(parsed, Location(f"{folder}/root"), LocalExecutor())}
    return done["web"], done["tenth"]


def ours(pool: Artifact, selection: Artifact, out: Path, seed: int) -> None:
    """The stage, without a manifest."""
    executor = LocalExecutor()
    config = ShardsConfig(seed=seed)
    STAGES["shards"].run(config, {"pool": pool, "selection": selection}, Output(Location(str(out)), executor), executor)


def clear(folder: Path) -> None:
    """An empty folder of this name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def peak_of(*args: Any) -> float:
    """The peak memory of ours in a fresh process, in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return float(fresh.apply(_peak_here, args))


def _peak_here(*args: Any) -> float:
    ours(*args)
    return most_mb(os.getpid())


def by_tarfile(tars: Iterable[Path], selected: set[str]) -> Samples:
    """Selected samples; tarfile seeks over the others."""
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            sample: dict[str, Any] = {}
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key in selected:
                    if sample and sample["__key__"] != key:
                        yield sample
                        sample = {}
                    sample["__key__"] = key
                    sample[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
                tar.members = []  # type: ignore[attr-defined]
            if sample:
                yield sample


def by_webdataset(tars: Iterable[Path], selected: set[str]) -> Samples:
    """Selected samples, by webdataset's own reader."""
    wanted = webdataset.WebDataset(
        [str(path) for path in tars],
        shardshuffle=False,
        empty_check=False,
        select_files=lambda name: name.partition(".")[0] in selected,
    )
    for sample in wanted:
        yield {name: data for name, data in sample.items() if name == "__key__" or not name.startswith("__")}


def by_place(places: Iterable[tuple[Path, str, dict[str, tuple[int, int]]]]) -> Samples:
    """Selected samples, the members of which somebody has found before."""
    for path, key, members in places:
        with path.open("rb") as file:
            sample: dict[str, Any] = {"__key__": key}
            for suffix, (offset, size) in members.items():
                file.seek(offset)
                sample[suffix] = file.read(size)
            yield sample


def mixed(samples: Samples, rng: random.Random) -> Samples:
    """As far as webdataset mixes: by a buffer."""
    buffer: list[dict[str, Any]] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) >= MIX:
            at = rng.randrange(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def write_peer(samples: Samples, out: Path, share: int) -> None:
    """Shards by webdataset: bytes as they are, no times."""
    rng = random.Random(share)
    tar = None
    for n_written, sample in enumerate(mixed(samples, rng)):
        if n_written % SHARD_ROWS == 0:
            if tar:
                tar.close()
            tar = webdataset.TarWriter(str(out / f"{share}-{n_written:09d}.tar"), encoder=False, mtime=0)
        tar.write(sample)
    if tar:
        tar.close()


def one_share(reader: str, share: int, out: Path) -> None:
    """What one process of the peer does."""
    read, shares = READERS[reader]
    write_peer(read(*shares[share]), out, share)


def peer(processes: Any, reader: str, out: Path) -> None:
    """All shares at once, a process each."""
    n_shares = len(READERS[reader][1])
    processes.starmap(one_share, [(reader, share, out) for share in range(n_shares)], chunksize=1)


def copy(source: Path, target: Path) -> None:
    """``cp`` of the tars, on the disk when it ends as ours are."""
    tars = sorted(source.glob("*.tar"))
    subprocess.run(["cp", *map(str, tars), str(target)], check=True)
    subprocess.run(["sync", *(str(target / tar.name) for tar in tars)], check=True)


def find_members(tars: Iterable[Path], selected: set[str]) -> Iterator[tuple[Path, str, dict[str, tuple[int, int]]]]:
    """Where the members of the selected samples are."""
    for path in tars:
        found: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key in selected:
                    found.setdefault(key, {})[suffix] = (member.offset_data, member.size)
        yield from ((path, key, members) for key, members in found.items())


def read_back(folder: Path) -> dict[str, tuple[str, bytes, bytes]]:
    """(key, image, caption) by the image's sha256, as webdataset reads a folder of shards."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        found[hashlib.sha256(sample["jpg"]).hexdigest()] = (sample["__key__"], sample["jpg"], sample["txt"])
    return found


def is_equal(our: Path, their: Path, n_kept: int) -> bool:
    """Whether webdataset finds the same images and captions in both, ours under their keys."""
    mine, others = read_back(our), read_back(their)
    same = {key: sample[1:] for key, sample in mine.items()} == {key: sample[1:] for key, sample in others.items()}
    return same and len(mine) == n_kept and all(key == sample[0] for key, sample in mine.items())


def run_case(case: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    n_rows = args.rows or CASES[case][0]
    write_tars(folder / "tars", case, n_rows, args.seed, args.data)
    pool, selection = pool_and_selection(folder)
    tables = [(read_table(pool.part(i), ["member"]), read_table(selection.part(i))) for i in range(len(pool.parts))]
    members = [m for a, b in tables for m in a["member"].take(b.filter(b["kept"])["row"]).to_pylist()]
    selected = {member.partition(".")[0] for member in members}
    tars = sorted((folder / "tars").glob("*.tar"))
    n_cores = len(os.sched_getaffinity(0))
    shares = [(tars[i::n_cores], selected) for i in range(min(n_cores, len(tars)))]
    READERS["tarfile"], READERS["webdataset"] = (by_tarfile, shares), (by_webdataset, shares)
    READERS["writer"] = (by_place, [(list(find_members(*share)),) for share in shares])
    clear(folder / "ours")
    peak = peak_of(pool, selection, folder / "ours", args.seed)
    with multiprocessing.get_context("fork").Pool(n_cores) as processes:
        seconds = interleaved(
            {
                "ours": partial(ours, pool, selection, folder / "ours", args.seed),
                **{name: partial(peer, processes, name, folder / name) for name in READERS},
                "cp": partial(copy, folder / "ours", folder / "cp"),
            },
            args.repeats,
            lambda name: clear(folder / name),
        )
    best = min("tarfile", "webdataset", key=seconds.__getitem__)
    equal = all(is_equal(folder / "ours", folder / name, len(selected)) for name in READERS)
    return {
        "case": case,
        "ours": len(selected) / seconds["ours"],
        "peer": len(selected) / seconds[best],
        "peer_name": f"webdataset TarWriter, read by {best}, {n_cores} processes",
        "ratio": seconds[best] / seconds["ours"],
        "ratio_writer": seconds["writer"] / seconds["ours"],
        "ratio_cp": seconds["cp"] / seconds["ours"],
        "unit": "images/s",
        "rows": len(selected),
        "mb": sum(path.stat().st_size for path in (folder / "ours").glob("*.tar")) / 1e6,
        "peak_mb": peak,
        "equal": equal,
    }


def main() -> int:
    """Run the cases that are asked for."""
    parser = arguments(str(__doc__))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        with tempfile.TemporaryDirectory(prefix=f"{case}-") as folder:
            rows.append(run_case(case, args, Path(folder)))
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
