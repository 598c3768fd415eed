"""``torchrun`` starts the command several times: one of them runs the step, all train."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from curation.artifact import Artifact
from curation.store import Location

TRAIN = ["--vit", "{width: 32, depth: 1, heads: 2, patch_size: 8}", "--image-size", "32", "--local-size", "16",
         "--n-local", "1", "--head", "{prototypes: 32, hidden: 32, bottleneck: 16}", "--ibot-head", "null",
         "--n-steps", "4", "--warmup-steps", "1", "--batch", "8", "--group", "4",
         "--resources-loader-workers", "0"]  # fmt: skip


def trained(command, shards, out):
    process = subprocess.run(
        [*command, "train", shards, "--out", str(out), *TRAIN], capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, process.stderr
    return process


def test_two_processes_train_what_one_does(tiny, tmp_path):
    """On tars that have to be indexed first, which the first process does for both."""
    (tmp_path / "tars").mkdir()
    for tar in Path(tiny.artifact("shards").location.path).glob("*.tar"):
        (tmp_path / "tars" / tar.name).write_bytes(tar.read_bytes())
    shards = str(tmp_path / "tars")
    alone = [sys.executable, "-m", "pipelines.cli"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    trained(alone, shards, tmp_path / "alone" / "encoder")
    said = trained([*together, "pipelines.cli"], shards, tmp_path / "together" / "encoder").stderr
    a, b = (Artifact(Location(str(tmp_path / name / "encoder"))) for name in ("alone", "together"))
    assert a.is_complete() and b.is_complete() and a.counts == b.counts
    theirs = load_file(b.location.path / "model.safetensors")
    for name, value in load_file(a.location.path / "model.safetensors").items():
        assert (value - theirs[name]).abs().max() <= 2e-4, name
    assert said.count("is set to:") <= 1
    again = trained([*together, "pipelines.cli"], shards, tmp_path / "together" / "encoder")
    assert "done before" in again.stdout + again.stderr
    lines = (b.location.path / "log" / "metrics-0000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 3
