"""Images of a URL table from a server on this machine, through the real img2dataset. ``make test-fetch``.

``OPENLVD_FETCH_PYTHON`` names the interpreter that has the library.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.artifact import Artifact, read_table
from curation.store import Location
from pipelines.cli import app
from pipelines.crawl.fetch import LOG, SUMMARY, WORK, FetchConfig, FetchResources, fetch
from pipelines.crawl.rules import CrawlConfig
from pipelines.crawl.table import Engine, crawl_table
from pipelines.errors import UserError

PYTHON = os.environ["OPENLVD_FETCH_PYTHON"]
SPEED = FetchResources(processes=1, threads=8)


def image(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20 + number % 7, 30), (number % 256, number * 7 % 256, 90)).save(
        out, ("JPEG", "PNG", "GIF")[number % 3]
    )
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """``/NUMBER`` is an image; other names go wrong in the ways of the web."""

    asked: ClassVar[Counter[str]] = Counter()
    pause = 0.0  # seconds before every image

    def do_GET(self) -> None:
        name = self.path[1:]
        self.asked[name] += 1
        if name.startswith("gone"):
            self.send_error(404)
            return
        if name.startswith("slow"):
            time.sleep(3)
        if name.startswith("flaky") and self.asked[name] == 1:
            self.send_error(503)
            return
        time.sleep(self.pause)
        data = b"<html>no image here</html>" if name.startswith("html") else image(int(name.rpartition("-")[2]))
        self.send_response(200)
        if name.startswith("robots"):
            self.send_header("X-Robots-Tag", "noai")
        self.send_header("Content-Length", str(len(data) + (name.startswith("short") and 100)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Handler.asked, Handler.pause = Counter(), 0.0
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def write_urls(folder: Path, server: str, names: list[str]) -> Location:
    urls, texts = [f"{server}/{name}" for name in names], [f"é {name}" for name in names]
    rows = pa.table({"url": urls, "text": texts})
    for name, value in (("width", 1), ("score", 0.5), ("raw", b"\xff")):
        rows = rows.append_column(name, pa.array([value] * len(names)))
    folder.mkdir()
    pq.write_table(rows, folder / "0.parquet")
    return Location(str(folder))


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_from_a_crawl_to_a_pool(server, tmp_path, capsys):
    bad = ["gone-1", "slow-2", "html-3", "robots-4", "short-5", "flaky-6"]
    table = write_urls(tmp_path / "crawl", server, [*map(str, range(20)), *bad, "3?utm_source=x"])
    config = CrawlConfig(private_hosts=True)
    urls = crawl_table([table], config, Location(str(tmp_path / "urls")), Engine())[0]
    assert urls.counts == {"rows": 27, "kept": 26, "dropped": 1, "duplicate": 1}
    out = tmp_path / "im ages"
    args = ["fetch", str(tmp_path / "urls"), "--out", str(out), "--caption", "text", "--timeout", "1", "--json"]
    args += ["--shard-rows", "10", "--python", PYTHON, "--processes", "1"]
    app(args, standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"rows": 26, "kept": 22, "dropped": 4} and told["state"] == "done"
    summary = json.loads((out / SUMMARY).read_bytes())
    reasons = " ".join(summary["reasons"])
    assert sum(summary["reasons"].values()) == 4
    assert all(words in reasons for words in ("404", "timed out", "X-Robots-Tag", "IncompleteRead"))
    assert sorted(path.name for path in out.glob("*")) == [
        ".img2dataset",
        ".lock",
        "00000.tar",
        "00001.tar",
        "00002.tar",
        SUMMARY,
    ]

    app(["pool", "--source", str(out), "--out", str(tmp_path / "pool"), "--min-side", "8", "--max-bad-fraction", "0.5",
         "--json"], standalone_mode=False)  # fmt: skip
    pool = Artifact(Location(str(tmp_path / "pool")))
    rows = pa.concat_tables(read_table(pool.part(i)) for i in range(len(pool.parts)))
    expected = {hashlib.sha256(image(n)).hexdigest(): f"é {n}" for n in range(20)}
    found = dict(zip(rows["key"].to_pylist(), rows["caption"].to_pylist(), strict=True))
    flaky = hashlib.sha256(image(6)).hexdigest()  # also number 6: an exact copy, of which one stays
    assert {key: text for key, text in found.items() if key != flaky} == {
        k: t for k, t in expected.items() if k != flaky
    }
    assert found[flaky] in ("é 6", "é flaky-6")
    assert pool.counts["bad"] == 1 and pool.counts["exact_duplicate"] == 1  # the page that is no image

    meta = json.loads(next(data for name, data in members(out).items() if name.endswith(".json")))
    assert {"url", "url_key", "url_domain", "score", "sha256"} <= set(meta) and "raw" not in meta
    before = Counter(Handler.asked)
    app(args, standalone_mode=False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "done before" and before == Handler.asked
    with pytest.raises(UserError, match="must be of this table and these settings"):
        app([*args, "--retries", "5"], standalone_mode=False)


FETCH = """
import sys
from curation.store import Location
from pipelines.crawl.fetch import FetchConfig, FetchResources, fetch
table, out, python = sys.argv[1:]
fetch([Location(table)], FetchConfig(shard_rows=5), Location(out), FetchResources(processes=1, threads=2), python)
"""


def group_of(folder: Path) -> list[int]:
    """The processes that work in a folder of img2dataset."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(folder) in str(fd.readlink()) for fd in (path / "fd").iterdir()):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_killed_it_leaves_whole_tars_and_nobody_and_goes_on(server, tmp_path):
    Handler.pause = 0.2
    table = write_urls(tmp_path / "urls", server, list(map(str, range(40))))
    out = tmp_path / "images"
    process = subprocess.Popen([sys.executable, "-c", FETCH, str(table), str(out), PYTHON])
    deadline = time.monotonic() + 120
    while not (out / "00001.tar").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while group_of(out):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    first = Counter(Handler.asked)
    assert 2 <= len(done) < 8 and not (out / SUMMARY).exists()
    Handler.pause = 0.0
    summary, worked = fetch([table], FetchConfig(shard_rows=5), Location(str(out)), SPEED, PYTHON)
    assert worked and summary == {"rows": 40, "kept": 40, "dropped": 0, "reasons": {}}
    assert {name: (out / name).read_bytes() for name in done} == done
    again = Handler.asked - first
    finished = {str(n) for name in done for n in range(5 * int(name[:5]), 5 * int(name[:5]) + 5)}
    assert not finished & set(again)
    images = [data for name, data in sorted(members(out).items()) if not name.endswith(".json")]
    assert images == [image(n) for n in range(40)]
    assert not list((out / WORK).glob("*.tar"))


def test_what_fails_in_img2dataset_is_told(server, tmp_path):
    table = write_urls(tmp_path / "urls", server, ["1"])
    with pytest.raises(UserError, match="must have column nope"):
        fetch([table], FetchConfig(caption="nope"), Location(str(tmp_path / "a")), SPEED, PYTHON)
    with pytest.raises(UserError, match="must have none of"):
        fetch([table], FetchConfig(), Location(str(tmp_path / "a[b]")), SPEED, PYTHON)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    with pytest.raises(UserError, match="must be empty: got 1 files, first letter"):
        fetch([table], FetchConfig(), Location(str(tmp_path / "full")), SPEED, PYTHON)
    assert (tmp_path / "full" / "letter").read_text() == "dear" and not (tmp_path / "a" / WORK / LOG).exists()
