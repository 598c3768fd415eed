"""The demo's images: real handwritten digits from scikit-learn, laid out the way a crawl, an exam and a bank look.

    crawl/*.jpg, *.png      names that say nothing: a long tail of classes, copies, leaks, a few broken files
    eval/<class>/*.png      the labelled images that an encoder is examined on
    bank/<class>/*.png      the labelled images that vote in k-NN; they share no digit with the other two
    truth.parquet           what was planted, for whoever measures afterwards; no step of a recipe reads it

A copy is re-encoded, rescaled or brightened, never shifted: of these small pictures a shifted copy is further away
than another digit. Digits that nearly equal another one are left out, so that copies are what is near.
"""

import hashlib
import io
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.store import SIDE_PREFIX
from embedding.preprocess import pixel_descriptor

TRUTH = "truth.parquet"
SIDE = 32  # pixels, of an image as it was first put on the web
APART = 0.98  # cosine of pixel descriptors: of two digits at least as near as this one is left out
CLASSES = (3, 7, 0, 5, 9, 4, 2, 8, 6, 1)  # from the most frequent to the rarest in the crawl
N_DIGITS = (128, 126, 126, 124, 118, 100, 72, 44, 22, 10)  # different images in the crawl, by class
N_COPIES = (95, 75, 55, 40, 25, 14, 8, 4, 2, 0)  # varied copies of them: what is popular is posted again
N_LEAKED = (9, 9, 8, 7, 6, 5, 3, 2, 1, 0)  # images of the exam that are in the crawl too
N_EVAL = 25  # images a class
N_BANK = 20  # images a class
N_EXACT = 12  # copies that are the same bytes
N_LEAKED_TWICE = 8  # leaked images that stand in the crawl as two different copies
N_THUMBNAILS = 10  # different images of 16 pixels
N_TINY = 6  # tracking pixels
N_BROKEN = 20  # files that are no image, or a part of one

TRUTH_SCHEMA = pa.schema(
    {
        "source": pa.string(),  # file, relative to crawl/
        "label": pa.string(),  # class; null for what shows no digit
        "digit": pa.int32(),  # which of scikit-learn's images
        "group": pa.int32(),  # files with one number are copies of one another; null for a file without a copy
        "leak_of": pa.string(),  # file, relative to eval/
        "kind": pa.string(),  # original, copy, exact, leak, thumbnail, tiny, broken
    }
)


class File(NamedTuple):
    """One file of the crawl, before it has a name."""

    data: bytes
    kind: str
    digit: int | None = None
    leak_of: str | None = None


@dataclass
class Split:
    """Which digits go where, as numbers of scikit-learn's images."""

    crawl: dict[int, list[int]] = field(default_factory=dict)  # by class
    eval: dict[int, list[int]] = field(default_factory=dict)
    bank: dict[int, list[int]] = field(default_factory=dict)
    spare: list[int] = field(default_factory=list)


def make_demo_pool(folder: Path, seed: int = 0) -> None:
    """Write the images and the planted truth into a new ``folder``, whole or not at all; equal seeds, equal bytes.

    Raises FileExistsError when the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"the demo's pool must be a new folder: {folder} is there")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    rng = np.random.default_rng(seed)
    split = split_digits(pixels, digits.target, rng)
    side = folder.parent / f"{SIDE_PREFIX}{uuid.uuid4().hex}"
    try:
        write_labelled(side / "bank", split.bank, pixels)
        exam = write_labelled(side / "eval", split.eval, pixels)
        files = crawl_files(split, pixels, exam, rng)
        order = rng.permutation(len(files)).tolist()
        write_crawl(side, [files[i] for i in order], digits.target, seed)
        side.rename(folder)
    finally:
        shutil.rmtree(side, ignore_errors=True)


def split_digits(pixels: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Split:
    """Draw each class's digits for bank, exam and crawl, disjoint, from those that are unlike one another."""
    unlike = unlike_digits(pixels)
    split = Split()
    for label, n_crawl in zip(CLASSES, N_DIGITS, strict=True):
        mine = rng.permutation(np.flatnonzero(unlike & (labels == label))).tolist()
        ends = np.cumsum([N_BANK, N_EVAL, n_crawl])
        split.bank[label], split.eval[label], split.crawl[label], rest = (
            mine[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True)
        )
        split.spare += rest
    return split


def unlike_digits(pixels: np.ndarray) -> np.ndarray:
    """bool (n,): false for a digit that is nearly an earlier one; about one in twenty-five is."""
    x = np.stack([pixel_descriptor(np.asarray(render(image))) for image in pixels])
    near = np.tril(x @ x.T >= APART, -1)
    unlike = np.ones(len(x), bool)
    for i in range(len(x)):
        unlike[i] = not (near[i] & unlike).any()
    return unlike


def render(image: np.ndarray, side: int = SIDE) -> Image.Image:
    """An 8 x 8 digit as an RGB picture of ``side`` pixels."""
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def write_labelled(folder: Path, split: dict[int, list[int]], pixels: np.ndarray) -> dict[str, int]:
    """One PNG a digit, in a folder a class. Returns the digit of every file, by path relative to ``folder``."""
    digit_of: dict[str, int] = {}
    for label, digits in split.items():
        (folder / str(label)).mkdir(parents=True)
        for digit in sorted(digits):
            name = f"{label}/{digit:04d}.png"
            (folder / name).write_bytes(encode(render(pixels[digit]), "PNG"))
            digit_of[name] = digit
    return digit_of


def crawl_files(split: Split, pixels: np.ndarray, exam: dict[str, int], rng: np.random.Generator) -> list[File]:
    """Every file of the crawl, in the order of its kinds."""
    originals = [File(first_bytes(pixels[d], rng), "original", d) for c in CLASSES for d in split.crawl[c]]
    copies = [
        File(varied(pixels[digit], rng), "copy", digit)
        for label, n_copies in zip(CLASSES, N_COPIES, strict=True)
        for digit in popular(split.crawl[label], n_copies, rng)
    ]
    often = sum(N_DIGITS[:5])  # of the five most frequent classes, so that the tail stays long
    exact = [originals[i]._replace(kind="exact") for i in rng.choice(often, N_EXACT, replace=False)]
    thumbnails = [
        File(encode(render(pixels[digit], 16), "PNG"), "thumbnail", digit)
        for digit in rng.choice(split.spare[: 2 * N_THUMBNAILS], N_THUMBNAILS, replace=False).tolist()
    ]
    tiny = [File(encode(Image.new("RGB", (1, 1), (40 * i, 0, 0)), "PNG"), "tiny") for i in range(N_TINY)]
    broken = [File(spoilt(first_bytes(pixels[split.spare[i]], rng), i), "broken") for i in range(N_BROKEN)]
    return [*originals, *copies, *leaked_files(split, pixels, exam, rng), *exact, *thumbnails, *tiny, *broken]


def popular(digits: list[int], n_copies: int, rng: np.random.Generator) -> list[int]:
    """Which digits are copied: half of the copies go to a tenth of the digits."""
    few = digits[: max(1, len(digits) // 10)]
    n_few = n_copies // 2
    return [*rng.choice(few, n_few).tolist(), *rng.choice(digits, n_copies - n_few).tolist()]


def leaked_files(split: Split, pixels: np.ndarray, exam: dict[str, int], rng: np.random.Generator) -> list[File]:
    """Copies of exam images: every fourth the same bytes, the others varied, some of them twice."""
    name_of = {digit: name for name, digit in exam.items()}
    digits = [d for label, n in zip(CLASSES, N_LEAKED, strict=True) for d in split.eval[label][:n]]
    files = []
    for i, digit in enumerate([*digits, *digits[:N_LEAKED_TWICE]]):
        same = i % 4 == 0 and i < len(digits)
        data = encode(render(pixels[digit]), "PNG") if same else varied(pixels[digit], rng)
        files.append(File(data, "leak", digit, name_of[digit]))
    return files


def first_bytes(image: np.ndarray, rng: np.random.Generator) -> bytes:
    """A digit as it was first put on the web: PNG or JPEG."""
    if rng.random() < 0.5:
        return encode(render(image), "PNG")
    return encode(render(image), "JPEG", int(rng.integers(88, 97)))


def varied(image: np.ndarray, rng: np.random.Generator) -> bytes:
    """A copy as sites make them: one or two of rescaled and brightened, and always encoded anew as JPEG."""
    picture = render(image)
    kind = int(rng.integers(4))
    if kind in (1, 3):
        side = int(rng.choice([40, 48, 56, 64]))
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    if kind in (2, 3):
        gain, lift = rng.uniform(1.0, 1.12), rng.uniform(4, 16)
        picture = picture.point(lambda v: min(255, round(v * gain + lift)))
    return encode(picture, "JPEG", int(rng.integers(70, 96)))


def encode(picture: Image.Image, kind: str, quality: int = 95) -> bytes:
    """The bytes of a PNG or JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()


def spoilt(data: bytes, number: int) -> bytes:
    """What a crawler keeps by mistake: a cut-off file, an error page, nothing, noise after a good header."""
    page = f"<html><head><title>404 Not Found</title></head><body>{number}</body></html>".encode()
    return (data[: len(data) * 2 // 3 - number], page, b"", data[:24] + page)[number % 4]


def write_crawl(folder: Path, files: list[File], labels: np.ndarray, seed: int) -> None:
    """Write the files under names that say nothing, and what is known of them beside the folder."""
    (folder / "crawl").mkdir(parents=True)
    n_same = np.bincount([file.digit for file in files if file.digit is not None], minlength=len(labels))
    rows = []
    for i, file in enumerate(files):
        suffix = "png" if file.data.startswith(b"\x89PNG") else "jpg"
        name = f"{hashlib.sha256(f'{seed}/{i}'.encode()).hexdigest()[:20]}.{suffix}"
        (folder / "crawl" / name).write_bytes(file.data)
        label = None if file.digit is None else str(labels[file.digit])
        group = file.digit if file.digit is not None and n_same[file.digit] > 1 else None
        rows.append({"source": name, "label": label, "digit": file.digit, "group": group,
                     "leak_of": file.leak_of, "kind": file.kind})  # fmt: skip
    rows.sort(key=lambda row: str(row["source"]))
    pq.write_table(pa.Table.from_pylist(rows, TRUTH_SCHEMA), folder / TRUTH)
