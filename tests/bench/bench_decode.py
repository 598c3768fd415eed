"""Decoding to 224 pixels: the decoder ``scaled`` of ``embed`` beside Pillow's full decode, resize and crop.

Cases: ``samples``, JPEGs as they are found; ``large``, JPEGs of 12 megapixels made from them. One thread each, so
images/s are those of one core. ``difference`` is the mean absolute difference of the pixels of the 224 crop to those of
Pillow's, in units of 1/255, over all images of the case, ``worst`` that of the worst image.

    python tests/bench/bench_decode.py --data FOLDER [--rows N] [--seed S] [--json FILE]

--data: a folder of JPEGs; without it pictures with the spectrum of photographs are made.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from common import arguments, interleaved, peak_mb, report
from PIL import Image

from embedding.decode import BadImage, decode_reduced
from embedding.preprocess import Preprocess

ROWS = {"samples": 400, "large": 40}
AIM = {"samples": 1.15, "large": 8.0}  # times Pillow, of photographs
MOST_DIFFERENCE = 1.0  # of 255
LARGE_PIXELS = 12_000_000
PREPARE = Preprocess()  # the shorter side to 256, the middle 224


def ours(data: bytes) -> np.ndarray:
    """The crop by the decoder ``scaled``."""
    picture = decode_reduced(data, PREPARE.least_side)
    assert not isinstance(picture, BadImage), picture
    return PREPARE.cropped(picture)


def pillow(data: bytes, gap: float | None = None) -> np.ndarray:
    """The crop by Pillow from all pixels. gap: its ``reducing_gap``, a faster and less exact way to resize."""
    with Image.open(io.BytesIO(data)) as image:
        whole = image.convert("RGB")
    short = min(whole.size)
    size = (int(PREPARE.size * whole.width / short), int(PREPARE.size * whole.height / short))
    resized = whole.resize(size, Image.Resampling.BICUBIC, reducing_gap=gap)
    left, top = (size[0] - PREPARE.side) // 2, (size[1] - PREPARE.side) // 2
    return np.asarray(resized.crop((left, top, left + PREPARE.side, top + PREPARE.side)))


PEERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow": pillow,
    "Pillow, reducing_gap 2": partial(pillow, gap=2.0),
}


def photographs(n: int, seed: int, quality: int = 90) -> list[bytes]:
    """JPEGs of 500 x 375 of noise whose amplitude falls as that of photographs, 1 / frequency."""
    files = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        fy, fx = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None]
        amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / 500)
        noise = rng.normal(size=(3, 375, 251)) + 1j * rng.normal(size=(3, 375, 251))
        x = np.fft.irfft2(noise * amplitude, (375, 500))
        pixels = (127 + 50 * x / x.std()).clip(0, 255).astype(np.uint8)
        files.append(jpeg(Image.fromarray(pixels.transpose(1, 2, 0).copy()), quality))
    return files


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The file of an image, by default at a camera's quality."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def enlarged(data: bytes) -> bytes:
    """The JPEG at 12 megapixels."""
    with Image.open(io.BytesIO(data)) as image:
        factor = (LARGE_PIXELS / (image.width * image.height)) ** 0.5
        size = (round(image.width * factor), round(image.height * factor))
        return jpeg(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def run_case(case: str, files: Sequence[bytes]) -> dict[str, Any]:
    """Rates and differences of a case."""
    ways = {"ours": ours, **PEERS}
    seconds = interleaved({name: lambda way=way: [way(data) for data in files] for name, way in ways.items()}, 3)
    peer = min(PEERS, key=lambda name: seconds[name])
    differences = [np.abs(ours(data).astype(float) - pillow(data)).mean() for data in files]
    return {
        "case": case,
        "ours": len(files) / seconds["ours"],
        "peer": len(files) / seconds["Pillow"],
        "peer_name": "Pillow full decode, bicubic resize, crop",
        "ratio": seconds["Pillow"] / seconds["ours"],
        "aim": AIM[case],
        "unit": "images/s per core",
        "rows": len(files),
        "peak_mb": peak_mb(),
        "decoder": "scaled",
        "difference": float(np.mean(differences)),
        "worst": float(np.max(differences)),
        "best_pillow": peer,
        "ratio_best_pillow": seconds[peer] / seconds["ours"],
    }


def main(args: argparse.Namespace) -> int:
    """Run both cases. Returns 1 when the pixels differ too much."""
    if args.data:
        files = [path.read_bytes() for path in sorted(args.data.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    else:
        files = photographs(64, args.seed)
    rng = np.random.default_rng(args.seed)
    rows, missed = [], []
    for case, default in ROWS.items():
        n = min(args.rows or default, len(files))
        chosen = [files[i] for i in sorted(rng.choice(len(files), n, replace=False))]
        row = run_case(case, chosen if case == "samples" else [enlarged(data) for data in chosen])
        rows.append(row)
        if row["difference"] > MOST_DIFFERENCE:
            missed.append(f"{case}: difference {row['difference']:.3g}, at most {MOST_DIFFERENCE:g} is allowed")
    return report(rows, args, missed)


if __name__ == "__main__":
    sys.exit(main(arguments(__doc__ or "").parse_args()))
