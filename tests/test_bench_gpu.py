"""The script for a machine with a GPU runs with torch, Pillow and numpy alone, here small and on the CPU."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

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
    sys.argv = [{script!r}, "--tiny", *{given}, "--json", {out!r}]
    sys.path.insert(0, {folder!r})
    runpy.run_path({script!r}, run_name="__main__")
"""


def run_alone(folder: Path, *given: str) -> list[dict[str, Any]]:
    """The rows of a run with torch, Pillow and numpy alone."""
    out = folder / "rows.json"
    place = {"root": str(SCRIPT.parents[2]), "script": str(SCRIPT), "folder": str(SCRIPT.parent), "out": str(out)}
    code = textwrap.dedent(ALONE).format(blocked=BLOCKED, given=given, **place)
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    assert all(row["ours"] > 0 and row["device"] == "cpu" and row["machine"] for row in rows)
    assert not any("aim" in row for row in rows)  # those are for a GPU
    return rows


def test_embedding_runs_with_torch_pillow_and_numpy_alone(tmp_path):
    rows = run_alone(tmp_path, "--rows", "24")
    cases = ["matmul", *["forward"] * 2, *["parity"] * 2, *["decode"] * 2, "end-to-end", "end-to-end-rate"]
    assert [row["case"] for row in rows] == cases
    assert {row["precision"]: row["equal"] for row in rows if row["case"] == "parity"} == {
        "float32": True, "bfloat16": True
    }  # fmt: skip
    assert all(0 <= row["waiting"] <= 1 and row["rows"] == 24 for row in rows if "waiting" in row)


def test_the_search_for_neighbours_runs_with_torch_and_numpy_alone(tmp_path):
    rows = {row["case"]: row for row in run_alone(tmp_path, "--part", "neighbors", "--rows", "4000")}
    assert list(rows) == ["matmul", "tile", "join", "exact"]
    join, exact = rows["join"], rows["exact"]
    assert join["equal"] and join["rows"] == 4000 and join["cells_scanned"] == join["nlist"] == 64
    assert join["recall"] > 0.97 and 2 * 1000 * 0.97 < join["edges"] < join["candidates"]
    assert join["pairs"] < 4000**2
    assert exact["equal"] and exact["faiss"].startswith("ModuleNotFoundError: import of faiss halted")


def test_assignment_runs_with_torch_and_numpy_alone(tmp_path):
    rows = {row["case"]: row for row in run_alone(tmp_path, "--part", "assign", "--rows", "2500")}
    assert list(rows) == ["matmul", "small", "step", "assign", "kernel"]
    small, assign = rows["small"], rows["assign"]
    assert small["equal"] and small["ours"] == 1 and small["peer_name"] == "every distance in float64"
    assert assign["equal"] and assign["rows"] == rows["step"]["rows"] == 2500 and assign["kernel"] == "torch"
    assert assign["agree"] == 1 and assign["farther"] == 0 and assign["excess"] == 1
    assert 0 < assign["rest_share"] < assign["pairs_share"] < 0.2


def test_training_runs_with_torch_pillow_and_numpy_alone(tmp_path):
    rows = run_alone(tmp_path, "--part", "trainer")
    cases = ["matmul", *["check"] * 2, "augment", *["feed"] * 3, "prototypes", "compute", *["fed"] * 2]
    assert [row["case"] for row in rows] == cases
    by_case = {row["case"]: row for row in rows}
    exact, rounded = (row for row in rows if row["case"] == "check")
    assert exact["equal"] and exact["off"] == 0 and exact["ours"] > 0.999999  # one device here
    assert rounded["equal"] and 0 < rounded["off"] < 0.05 and rounded["precision"] == "bfloat16"
    assert by_case["augment"]["equal"] and by_case["augment"]["peer_name"] == "tensors on the CPU"
    assert by_case["prototypes"]["equal"] and by_case["prototypes"]["ratio"] > 1.1
    assert by_case["compute"]["equal"] and by_case["compute"]["skipped"] == 0
    fed = {row["crops_on"]: row for row in rows if row["case"] == "fed"}
    assert set(fed) == {"worker", "device"}
    assert all(0 <= row["waiting"] <= 1 and row["rows"] % (8 * row["workers"]) == 0 for row in fed.values())
