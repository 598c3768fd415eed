"""A decoder that crashes or hangs costs attempts at one part; the file becomes a rejected row, the same every time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.artifact import Artifact
from curation.store import Location
from embedding.isolate import Processes
from pipelines.isolation import decoding

# Read by every Python that starts with it on its path: a BMP of one width meets a decoder that crashes, two others meet
# one that crashes or hangs when the pool is finished: they are in it, and ``embed`` decodes them.
SITECUSTOMIZE = """
import os, signal, time
from pathlib import Path
from PIL import BmpImagePlugin
from embedding import isolate

isolate.DECODE_SECONDS = 4
isolate._WATCH = isolate.Watch(4)
load = BmpImagePlugin.BmpImageFile.load

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(100)

def planted_load(self):
    if self.width == 33:
        crash()
    if self.width in (34, 35) and list(Path(os.environ["PLANTED_ROOT"]).glob("web/*/manifest.json")):
        crash() if self.width == 34 else time.sleep(100)
    return load(self)

BmpImagePlugin.BmpImageFile.load = planted_load
"""
CRASHED, HUNG = "the decoder crashed", "the decoder hung: more than 4 s"


@pytest.fixture
def place(tmp_path):
    """A folder of images, three of which are fatal, in different parts."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(32):
        rng = np.random.default_rng(i)
        width = {7: 33, 10: 34, 29: 35}.get(i, 40)
        Image.fromarray(rng.integers(0, 256, (40, width, 3), np.uint8)).save(images / f"{i:02d}.bmp")
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    steps = {
        "web": {"stage": "pool", "source": str(images), "part_rows": 8},
        "vectors": {"stage": "embed", "pool": "web", "backbone": "pixels", "max_bad_fraction": 0.1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps({"steps": steps, "resources": {"workers": 2}}))
    return tmp_path


def attempt(place: Path, executor: str) -> int:
    """The exit code of one run, whose root is named like its executor."""
    command = [sys.executable, "-m", "pipelines.cli", "run", "recipe.yaml", "--root", executor]
    path = os.pathsep.join([str(place), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [*command, "--executor", executor], capture_output=True, text=True, check=False, timeout=120,
        cwd=place, env={**os.environ, "PYTHONPATH": path, "PLANTED_ROOT": str(place / executor)},
    )  # fmt: skip
    assert done.returncode <= 0, done.stderr
    return done.returncode


def artifact(place: Path, root: str, step: str) -> Artifact:
    (manifest,) = (place / root / step).glob("*/manifest.json")
    return Artifact(Location(str(manifest.parent)))


def rejected(place: Path, root: str, step: str) -> dict[str, tuple[str, str]]:
    files = sorted(artifact(place, root, step).location.path.glob("rejected-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {row["source"]: (row["reason"], row["detail"]) for row in rows}


def test_a_fatal_file_costs_an_attempt_at_its_part_and_is_rejected(place):
    """Serial, where the process dies each time and the next run goes on; on Ray, where the run does; the same bytes."""
    codes = [attempt(place, "serial") for _ in range(4)]
    assert codes == [-signal.SIGSEGV, -signal.SIGSEGV, -signal.SIGALRM, 0]
    assert attempt(place, "ray") == 0
    for root in ("serial", "ray"):
        assert rejected(place, root, "web") == {"07.bmp": ("undecodable", CRASHED)}
        found = {"10.bmp": ("undecodable", CRASHED), "29.bmp": ("undecodable", HUNG)}
        assert rejected(place, root, "vectors") == found
        assert artifact(place, root, "vectors").counts == {"rows": 31, "kept": 29, "dropped": 0, "bad": 2}
        assert not list(place.glob(f"{root}/*/*/scratch"))
    for step in ("web", "vectors"):
        assert artifact(place, "serial", step).digest == artifact(place, "ray", step).digest
    recipe = json.loads((place / "recipe.yaml").read_text())
    (place / "recipe.yaml").write_text(json.dumps({**recipe, "resources": {"loader_workers": 3}}))
    (place / "serial").rename(place / "before")
    assert [attempt(place, "serial") for _ in range(2)] == [-signal.SIGSEGV, 0]  # ``pool``; ``embed`` has processes
    assert artifact(place, "serial", "vectors").digest == artifact(place, "ray", "vectors").digest


def test_a_note_says_that_somebody_died_with_a_part(tmp_path):
    note = Location(str(tmp_path / "decoding" / "part-0000003"))
    with decoding(note) as call:
        here = call(_process, b"")
        assert note.exists()
    assert not note.exists()
    assert here == os.getpid()
    with pytest.raises(OSError, match="gone"), decoding(note):
        raise OSError("gone")
    assert note.exists()  # the next attempt is careful; that costs time, no byte
    with decoding(note) as call:
        assert call(len, b"abc") == 3
        assert call.__class__.__name__ == "Isolated"
    assert not note.exists()


def test_what_calls_in_other_processes_is_left_to_do_so(tmp_path):
    note = Location(str(tmp_path / "decoding" / "part-0000003"))
    apart = Processes(2)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"), decoding(note, apart) as call:
            assert call is apart and note.exists()
            raise OSError("gone")
    with decoding(note, apart) as call:
        assert call(len, b"abc") == 3
    assert not note.exists()
    apart.close()


def _process(data: bytes) -> int:
    return os.getpid()
