"""The command line: data on stdout, one sentence, a hint and an exit code for what goes wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def openlvd(*args, cwd):
    command = [sys.executable, "-m", "pipelines.cli", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_says_one_sentence_a_hint_and_an_exit_code(tiny, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"steps:\n  web: {{stage: pool, source: {tiny.images}/web, max_bad_fraction: 0.5}}\n")
    good = openlvd("run", str(recipe), "--root", "out", "--json", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert [json.loads(line)["state"] for line in good.stdout.splitlines()] == ["done"]
    for args, words in [
        (["run", str(recipe)], "error: a run needs a root: got none"),
        (["run", str(recipe), "--root", "out", "--set", "web.min_sid=3"], "error: web has no key 'min_sid'"),
        (["run", "none.yaml", "--root", "out"], "error: no recipe none.yaml"),
        (["run", str(recipe), "--root", "out", "--until", "x"], "error: --until must name a step"),
        (["run", str(recipe), "--root", "out", "--executor", "dask"], "error: --executor must be serial or ray"),
        (
            ["run", str(recipe), "--root", "out", "--executor", "ray", "--address", "127.0.0.1:1"],
            "no Ray cluster answers",
        ),
        (
            ["run", str(recipe), "--root", "out", "--executor", "ray", "--address", "auto"],
            "must be host:port: got 'auto'",
        ),
        (["status", "nowhere"], "must be the root of a run"),
        (["walk"], "error: No such command 'walk'"),
        (["run", str(recipe), "--root", "gs://bucket/x"], "error: a location must be a path or s3://bucket/key"),
    ]:
        bad = openlvd(*args, cwd=tmp_path)
        lines = bad.stderr.strip().splitlines()
        assert bad.returncode == 2, (args, bad)
        assert words in lines[0], (args, lines)
        assert lines[1] == "", (args, lines)
        assert lines[2].startswith("hint: "), (args, lines)
        assert "Traceback" not in bad.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.yaml"]
    assert Path(tmp_path / "out" / "run.json").exists()


# As at a terminal: in the background of a shell a process is born deaf to Ctrl-C.
LISTENING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pipelines.cli import main; main()"
)


def test_an_interrupt_is_one_sentence(tiny, tmp_path):
    recipe = tmp_path / "r.yaml"
    vit = "{width: 64, depth: 2, heads: 2, patch_size: 8}"
    train = f"{{stage: train, shards: raw, vit: {vit}, image_size: 32, local_size: 16}}"
    recipe.write_text(
        f"steps:\n  web: {{stage: pool, source: {tiny.images}/exam}}\n  raw: {{stage: shards, pool: web}}\n"
        f"  first: {train}\n"
    )
    command = [sys.executable, "-c", LISTENING, "run", str(recipe), "--root", str(tmp_path / "out")]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob("first/*/scratch/progress")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "interrupted\n\nhint: finished parts are kept" in said
        assert "Traceback" not in said
        shutil.rmtree(tmp_path / "out")
