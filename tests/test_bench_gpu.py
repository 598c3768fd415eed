"""The script for a machine with a GPU runs with torch, Pillow and numpy alone, here small and on the CPU."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = Path(__file__).parent / "bench" / "bench_gpu.py"
BLOCKED = (
    "boto3 botocore curation.artifact duckdb faiss huggingface_hub jinja2 numba openlvd pipelines pyarrow pydantic ray "
    "rich safetensors scipy sklearn threadpoolctl transformers typer webdataset yaml"
).split()
ALONE = """
    import runpy, sys
    sys.path[:] = [place for place in sys.path if "editable" not in place and place != {root!r}]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.modules.update(dict.fromkeys({blocked}))
    sys.argv = [{script!r}, "--tiny", "--rows", "24", "--json", {out!r}]
    sys.path.insert(0, {folder!r})
    runpy.run_path({script!r}, run_name="__main__")
"""


def test_it_runs_with_torch_pillow_and_numpy_alone(tmp_path):
    out = tmp_path / "rows.json"
    code = textwrap.dedent(ALONE).format(
        root=str(SCRIPT.parents[2]), blocked=BLOCKED, script=str(SCRIPT), out=str(out), folder=str(SCRIPT.parent)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    cases = ["matmul", *["forward"] * 2, *["parity"] * 2, *["decode"] * 2, "end-to-end", "end-to-end-rate"]
    assert [row["case"] for row in rows] == cases
    assert all(row["ours"] > 0 and row["device"] == "cpu" and row["machine"] for row in rows)
    assert {row["precision"]: row["equal"] for row in rows if row["case"] == "parity"} == {
        "float32": True, "bfloat16": True
    }  # fmt: skip
    assert all(0 <= row["waiting"] <= 1 and row["rows"] == 24 for row in rows if "waiting" in row)
    assert not any("aim" in row for row in rows)  # those are for a GPU
