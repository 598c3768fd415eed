"""The training loader beside webdataset from the same shards, and its multi-crop beside plain Pillow.

Cases: ``raw``, encoded bytes of every sample of an epoch, ours in the shuffled order of the stream, webdataset's in the
order of the tar without a shuffle (its fastest), both in this process; ``crops``, decoded and cropped as published (2 x
224, 8 x 96 pixels) in batches of 64, one worker process each, with the same decoder and the same function that makes
crops, webdataset in torch's DataLoader with tensors in shared memory, both from their third batch on; ``scaling`` is
how many times faster ours is with two workers; ``augment``, crops of decoded pictures in one thread, the peer Pillow
with the same draws. ``equal``: the same bytes by key, and the same crops; ``difference``: mean of the crops to
Pillow's, in units of 1/255 (Pillow rounds or cuts after every change, ours once).

    python tests/bench/bench_loader.py [--data FOLDER] [--rows N] [--cases ...] [--seed S] [--json FILE]

--data: a folder of JPEGs; without it pictures with the spectrum of photographs are made. TMPDIR says where shards lie;
they are in the page cache. Two workers need two free cores.
"""

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from bench_decode import photographs
from bench_shards import padded
from common import arguments, interleaved, peak_mb, report
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from curation.shards import INDEX_SCHEMA
from curation.store import Location
from embedding.decode import decode_rgb
from training.augment import N_GLOBAL, AugmentConfig, Crops, crop_rng, draw_crops, make_crops, multi_crop
from training.loader import LoaderPlan, batches
from training.reader import Reader
from training.stream import Stream, list_shards, shard_totals

ROWS = {"raw": 3000, "crops": 960, "augment": 80}
AIM = {"raw": 3.0, "crops": 0.97, "augment": 2.0}
SHARD_ROWS = 500
BATCH = 64
SIDES, N_LOCAL = (224, 96), 8
CONFIG = AugmentConfig()  # as released
WARM = 2  # batches that come before the clock starts: processes begin, and compile
REPEATS = 3
MOST_DIFFERENCE = 2.0  # of 255
N_COMPARED = 2  # batches


def write_shards(folder: Path, files: list[bytes], n_rows: int) -> Location:
    """Tars of JPEGs that differ by a comment, with their index."""
    for shard, first in enumerate(range(0, n_rows, SHARD_ROWS)):
        rows = []
        with tarfile.open(folder / f"shard-{shard:07d}.tar", "w") as tar:
            for i in range(first, min(first + SHARD_ROWS, n_rows)):
                data = padded(files[i % len(files)], b"%09d" % i)
                info = tarfile.TarInfo(f"{i:09d}.jpg")
                info.size = len(data)
                rows.append({"key": f"{i:09d}", "row_id": i, "offset": tar.offset + tarfile.BLOCKSIZE,
                             "length": len(data), "format": "jpeg", "label": None, "width": 0, "height": 0,
                             "count": 1})  # fmt: skip
                tar.addfile(info, io.BytesIO(data))
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / f"part-{shard:07d}.parquet")
    return Location(str(folder))


def tars(shards: Location) -> list[str]:
    """Their paths."""
    return sorted(str(path) for path in shards.path.glob("*.tar"))


def our_bytes(shards: Location, n_rows: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of each sample of the first epoch; the last batch is cut."""
    stream, read = Stream(shards, batch=BATCH, seed=seed), Reader(shards)
    for step in range(-(-n_rows // BATCH)):
        samples = stream.batch(step)[: n_rows - step * BATCH]
        yield from zip((s.key for s in samples), read(samples), strict=True)


def their_bytes(shards: Location) -> Iterator[tuple[str, bytes]]:
    """The same of webdataset."""
    for sample in webdataset.WebDataset(tars(shards), shardshuffle=False):
        yield sample["__key__"], sample["jpg"]


def count(samples: Iterable[object]) -> int:
    """Go through all of them, holding one at a time."""
    return sum(1 for _ in samples)


def raw(files: list[bytes], n_rows: int, seed: int, folder: Path) -> dict[str, Any]:
    """Encoded samples."""
    shards = write_shards(folder, files, n_rows)
    ways = {"ours": partial(our_bytes, shards, n_rows, seed), "peer": partial(their_bytes, shards)}
    seconds = interleaved({name: lambda way=way: count(way()) for name, way in ways.items()}, REPEATS + 2)
    mean = sum(map(len, files)) / len(files)
    return {
        "ours": n_rows / seconds["ours"],
        "peer": n_rows / seconds["peer"],
        "peer_name": "webdataset, no shuffle, no decoding",
        "unit": "samples/s",
        "mean_kb": mean / 1000,
        "equal": {k: hash(v) for k, v in ways["ours"]()} == {k: hash(v) for k, v in ways["peer"]()},
    }


def their_crops(sample: dict[str, Any]) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What webdataset's worker does to a sample, with our decoder and our crops."""
    crops = multi_crop(decode_rgb(sample["jpg"]), CONFIG, SIDES, N_LOCAL, crop_rng(0, 0, int(sample["__key__"])))
    return sample["__key__"], torch.from_numpy(crops.globals), torch.from_numpy(crops.locals)


def stacked(samples: list[tuple[str, torch.Tensor, torch.Tensor]]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """A batch as ours is: crop by crop."""
    keys, globals_, locals_ = zip(*samples, strict=True)
    return list(keys), torch.stack(globals_, dim=1), torch.stack(locals_, dim=1)


def their_loader(shards: Location) -> Iterator[object]:
    """webdataset with one worker process."""
    data = webdataset.WebDataset(tars(shards), shardshuffle=False).map(their_crops).batched(BATCH, stacked)
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))


def steady_rate(make: Callable[[], Iterator[object]]) -> float:
    """Images a second from the third batch on."""
    loader = make()
    for _ in range(WARM):
        next(loader)
    start = time.perf_counter()
    n = count(loader)
    return n * BATCH / (time.perf_counter() - start)


def crops(files: list[bytes], n_rows: int, seed: int, folder: Path) -> dict[str, Any]:
    """Batches of crops from worker processes."""
    n_steps = max(n_rows // BATCH, WARM + N_COMPARED)
    shards = write_shards(folder, files, n_steps * BATCH)
    plan = LoaderPlan(
        shards=shards,
        totals=shard_totals(shards, list_shards(shards)),
        batch=BATCH,
        seed=seed,
        n_open=16,
        augment=CONFIG,
        global_size=SIDES[0],
        local_size=SIDES[1],
        n_local=N_LOCAL,
    )
    ways: dict[str, Callable[[], Iterator[object]]] = {
        "ours": partial(batches, plan, 0, n_steps, n_workers=1),
        "peer": partial(their_loader, shards),
        "two": partial(batches, plan, 0, n_steps, n_workers=2),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS):
        for name, way in sorted(ways.items(), reverse=repeat % 2 == 1):
            rates[name].append(steady_rate(way))
    ours, peer, two = (statistics.median(rates[name]) for name in ("ours", "peer", "two"))
    return {
        "ours": ours,
        "peer": peer,
        "peer_name": "webdataset in a DataLoader, 1 worker, same decoder and crops",
        "unit": "images/s",
        "scaling": two / ours,
        "equal": crops_are_equal(plan, dict(their_bytes(shards))),
    }


def crops_are_equal(plan: LoaderPlan, data: dict[str, bytes]) -> bool:
    """Whether batches hold what the function of webdataset's worker makes of the bytes that webdataset reads."""
    stream = Stream(plan.shards, batch=plan.batch, seed=plan.seed, n_open=plan.n_open)
    for batch in batches(plan, 0, N_COMPARED, n_workers=1):
        for slot, sample in enumerate(stream.batch(batch.step)):
            rng = crop_rng(plan.seed, sample.epoch, sample.number)
            made = multi_crop(decode_rgb(data[sample.key]), CONFIG, SIDES, N_LOCAL, rng)
            theirs = batch.globals[:, slot], batch.locals[:, slot]
            if not all(np.array_equal(a, b) for a, b in zip(made, theirs, strict=True)):
                return False
    return True


def pillow_crops(image: np.ndarray, drawn: np.ndarray, sides: tuple[int, int]) -> Crops:
    """The crops as plain Pillow makes them."""
    source = Image.fromarray(image)
    made = [np.asarray(pillow_crop(source, d, sides[i >= N_GLOBAL])) for i, d in enumerate(drawn)]
    return Crops(np.stack(made[:N_GLOBAL]), np.stack(made[N_GLOBAL:]))


def pillow_crop(source: Image.Image, drawn: np.void, side: int) -> Image.Image:
    """One of them."""
    crop = source.resize((side, side), Image.Resampling.BICUBIC, box=drawn["box"].tolist())
    if drawn["flip"]:
        crop = ImageOps.mirror(crop)
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for change in drawn["order"].tolist():
        if 0 <= change < 3:
            crop = enhance[change](crop).enhance(float(drawn["amount"][change]))
        elif change == 3:
            hue, saturation, value = crop.convert("HSV").split()
            turned = np.asarray(hue).astype(np.int16) + round(256 * float(drawn["amount"][3]))
            crop = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
    if drawn["gray"]:
        crop = crop.convert("L").convert("RGB")
    if drawn["radius"]:
        crop = crop.filter(ImageFilter.GaussianBlur(float(drawn["sigma"])))
    return ImageOps.solarize(crop, int(drawn["threshold"])) if drawn["threshold"] < 256 else crop


def augment(files: list[bytes], n_rows: int, seed: int, folder: Path) -> dict[str, Any]:
    """Crops of decoded pictures."""
    images = [decode_rgb(data) for data in files[:n_rows]]
    assert all(isinstance(image, np.ndarray) for image in images), "a file does not decode"

    def draw(i: int) -> np.ndarray:
        return draw_crops(images[i].shape[1], images[i].shape[0], CONFIG, N_LOCAL, crop_rng(seed, 0, i))

    ways = {"ours": make_crops, "peer": pillow_crops}
    cases = {n: lambda f=f: [f(image, draw(i), SIDES) for i, image in enumerate(images)] for n, f in ways.items()}
    seconds = interleaved(cases, REPEATS + 2)
    apart = [
        np.abs(a.astype(np.int16) - b).mean()
        for i, image in enumerate(images)
        for a, b in zip(make_crops(image, draw(i), SIDES), pillow_crops(image, draw(i), SIDES), strict=True)
    ]
    return {
        "ours": len(images) / seconds["ours"],
        "peer": len(images) / seconds["peer"],
        "peer_name": "plain Pillow, same draws",
        "unit": "images/s per core",
        "rows": len(images),
        "difference": float(np.mean(apart)),
    }


RUN = {"raw": raw, "crops": crops, "augment": augment}


def main() -> int:
    """Run the cases that are asked for. Returns 1 when bytes or crops differ, or pixels differ too much."""
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", nargs="+", choices=RUN, default=list(RUN))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = sorted(p for p in args.data.iterdir() if p.suffix.lower() in (".jpg", ".jpeg")) if args.data else []
    files = [path.read_bytes() for path in found] or photographs(160, args.seed)
    rows, missed = [], []
    for case in args.cases:
        n_rows = args.rows or ROWS[case]
        with tempfile.TemporaryDirectory(prefix="openlvd-") as folder:
            figures = RUN[case](files, n_rows, args.seed, Path(folder))
        ratio = figures["ours"] / figures["peer"]
        rows.append({"case": case, "ratio": ratio, "aim": AIM[case], "rows": n_rows, "peak_mb": peak_mb()} | figures)
        if figures.get("difference", 0) > MOST_DIFFERENCE:
            missed.append(f"{case}: difference {figures['difference']:.3g}, at most {MOST_DIFFERENCE:g} is allowed")
    return report(rows, args, missed)


if __name__ == "__main__":
    sys.exit(main())
