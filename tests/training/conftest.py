"""Shards, images and configs small enough for a test."""

import io
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.mix import MIX_FILE, count_column, spec_of, write_mix
from curation.shards import INDEX_SCHEMA
from curation.store import Location
from embedding.vit_config import ViTConfig
from training.augment import AugmentConfig
from training.config import HeadConfig, TrainConfig

torch.set_num_threads(1)


def encode_png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def write_shards(folder, shards, counts=None, labels=None):
    """shards: a list of lists of (key, encoded bytes). counts, labels: of a key, 1 and none where absent."""
    row_id = 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, samples in enumerate(shards):
        rows, path = [], Path(folder) / f"shard-{i:07d}.tar"
        with tarfile.open(path, "w") as tar:
            for key, data in samples:
                info = tarfile.TarInfo(f"{key}.png")
                info.size = len(data)
                rows.append({"key": key, "row_id": row_id, "offset": tar.offset + 512, "length": len(data),
                             "format": "png", "label": (labels or {}).get(key), "width": 32, "height": 32,
                             "count": (counts or {}).get(key, 1)})  # fmt: skip
                tar.addfile(info, io.BytesIO(data))
                row_id += 1
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), Path(folder) / f"part-{i:07d}.parquet")
    return Location(str(folder))


def write_mixed(shards, counts, homogeneous, heterogeneous):
    """Make a mix of a shard set. counts: of each component, key to repeats, 0 where absent."""
    for entry in shards.list():
        if entry.name.startswith("part-"):
            table = pq.read_table((shards / entry.name).path)
            for name, of_key in counts.items():
                column = pa.array([of_key.get(key, 0) for key in table["key"].to_pylist()], pa.int32())
                table = table.append_column(count_column(name), column)
            pq.write_table(table, (shards / entry.name).path)
    write_mix(MIX_FILE, spec_of(list(counts), homogeneous, heterogeneous), shards)
    return shards


@pytest.fixture
def add_mix():
    return write_mixed


@pytest.fixture
def png():
    return encode_png


@pytest.fixture
def make_shards():
    return write_shards


@pytest.fixture(scope="session")
def digits():
    """1797 handwritten digits as uint8 (n, 32, 32, 3), and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = [Image.fromarray((x / 16 * 255).astype(np.uint8)).resize((32, 32), Image.BICUBIC) for x in data.images]
    return np.stack([np.asarray(image.convert("RGB")) for image in images]), data.target


@pytest.fixture(scope="session")
def digit_shards(digits, tmp_path_factory):
    """The first 600 digits in 3 shards."""
    samples = [(f"{i:05d}", encode_png(image)) for i, image in enumerate(digits[0][:600])]
    return write_shards(tmp_path_factory.mktemp("digits"), [samples[:200], samples[200:400], samples[400:]])


@pytest.fixture(scope="session")
def labelled_digits(digits, tmp_path_factory):
    """119 digits with their labels in 2 shards, and one file that is no image."""
    images, labels = digits
    samples = [(f"{i:03d}", encode_png(images[i])) for i in range(119)] + [("broken", b"no image")]
    of = {f"{i:03d}": str(labels[i]) for i in range(119)} | {"broken": "7"}
    return write_shards(tmp_path_factory.mktemp("labelled"), [samples[:50], samples[50:]], labels=of)


MILD = AugmentConfig(
    global_scale=(0.5, 1), local_scale=(0.2, 0.5), hflip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0
)
TINY = TrainConfig(
    vit=ViTConfig(width=32, depth=2, heads=2, patch_size=8, n_registers=1, layer_scale=None),
    image_size=32, local_size=16, n_local=2, head=HeadConfig(prototypes=64, hidden=64, bottleneck=32),
    ibot_head=HeadConfig(prototypes=48, hidden=40, bottleneck=24),
    momentum=0.9, n_steps=8, batch=8, lr=1e-3, warmup_steps=2, n_open=2, augment=MILD,
)  # fmt: skip


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def run_python():
    """Start a Python of its own on a snippet; returns the process."""

    def start(code, *args):
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
