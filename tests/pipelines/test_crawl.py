"""Crawl tables on this machine, against the definition; what is told of mistakes. Spark: tests/spark."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crawled import BLOCKED, expected, nasty_table, result_of, write_files

from curation.artifact import Artifact
from curation.store import Location
from curation.urls import normal_host, normal_url
from pipelines.cli import app
from pipelines.crawl.fetch import FetchConfig, FetchResources, check_urls, fetch
from pipelines.crawl.rules import CrawlConfig
from pipelines.crawl.table import Engine, crawl_table, read_block_list
from pipelines.errors import UserError

DOMAINS = {"ads.net", "b.org", normal_host("bücher.de")}
LOCAL = Engine()
CASES = [
    (CrawlConfig(), lambda row: True),
    (CrawlConfig(part_rows=50, seed=3, max_per_domain=7, schemes=("https", "ftp")), lambda row: True),
    (CrawlConfig(min_width=64, min_height=65, private_hosts=True, part_rows=7), lambda row: True),
    (CrawlConfig(where="score >= 0 or text = 'it''s' -- a comment", max_per_domain=20, part_rows=30),
     lambda row: row["text"] == "it's" or (row["score"] is not None and not row["score"] < 0)),
    (CrawlConfig(domain="site", max_per_domain=5), lambda row: True),
    (CrawlConfig(where="url_domain like '%.io'"),
     lambda row: normal_url(row["url"]).host.endswith(".io")),
    (CrawlConfig(where="false"), lambda row: False),
]  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return nasty_table(0, 1500)


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory) -> Location:
    folder = tmp_path_factory.mktemp("crawl") / "ta ble"
    write_files(table, folder, 3)
    (folder.parent / "block.txt").write_text(BLOCKED)
    return Location(str(folder))


def made(folder, config, place, engine=LOCAL):
    return crawl_table([folder], config, place, engine, folder.parent / "block.txt")[0]


@pytest.mark.parametrize("config, where", CASES)
def test_what_is_kept_and_why_the_rest_is_not_is_the_definition(table, folder, tmp_path, config, where):
    artifact = made(folder, config, Location(str(tmp_path / "out")))
    rows, counts = expected(table, config, DOMAINS, where)
    kept = pa.array(rows, pa.int64())
    assert artifact.counts == counts
    found = result_of(artifact)
    assert found["row"].to_pylist() == rows
    urls = [normal_url(url).url for url in table["url"].take(kept).to_pylist()]
    assert found["url"].to_pylist() == urls
    assert found["url_key"].to_pylist() == [hashlib.md5(url.encode()).hexdigest() for url in urls]
    for name in ("text", "raw", "ok", "day", "width", 'Odd `na"me'):
        assert found[name].to_pylist() == table[name].take(kept).to_pylist()
    assert found["at"].cast(pa.int64()).to_pylist() == [
        None if value is None else value // 1000 for value in table["at"].take(kept).cast(pa.int64()).to_pylist()
    ]


def test_the_random_tables_have_every_reason(table):
    config = CrawlConfig(min_width=64, max_per_domain=3)
    counts = expected(table, config, DOMAINS, lambda row: row["ok"])[1]
    names = "no_url scheme bad_url private_host blocked small rule duplicate domain_cap".split()
    assert all(counts[name] > 0 for name in names) and counts["kept"] > 10


def test_parts_are_about_as_long_as_asked_and_all_there(folder, tmp_path):
    artifact = made(folder, CrawlConfig(part_rows=1), Location(str(tmp_path / "out")))
    assert len(artifact.parts) == artifact.counts["kept"]
    assert [part.name for part in artifact.parts] == [f"part-{i:07d}.parquet" for i in range(len(artifact.parts))]
    rows = [part.rows for part in artifact.parts]
    assert sum(rows) == len(rows) and min(rows) == 0 and max(rows) > 1


def test_two_runs_give_the_same_bytes_and_the_second_does_nothing(folder, tmp_path):
    config = CrawlConfig(max_per_domain=9, part_rows=40)
    one, two = (made(folder, config, Location(str(tmp_path / name))) for name in ("one", "two"))
    assert one.manifest == two.manifest
    before = {path: path.stat().st_mtime_ns for path in one.location.path.iterdir() if path.name != ".lock"}
    artifact, worked = crawl_table([folder], config, one.location, LOCAL, folder.parent / "block.txt")
    assert not worked and artifact.manifest == one.manifest
    assert before == {path: path.stat().st_mtime_ns for path in one.location.path.iterdir() if path.name != ".lock"}


def test_a_result_put_through_the_same_rules_is_itself(folder, tmp_path):
    config = CrawlConfig(max_per_domain=9, min_width=20, part_rows=40)
    once = made(folder, config, Location(str(tmp_path / "once")))
    again = crawl_table([once.location], config, Location(str(tmp_path / "again")), LOCAL)[0]
    assert again.counts == {"rows": once.counts["kept"], "kept": once.counts["kept"], "dropped": 0}
    assert again.digest == once.digest


def test_every_setting_counts(folder, tmp_path):
    config = CrawlConfig(part_rows=40)
    other = {"url": "text", "width": "row", "height": "row", "domain": "site", "columns": ("row",),
             "schemes": ("https",),
             "private_hosts": True, "min_width": 64, "min_height": 64, "where": "ok", "max_per_domain": 2,
             "part_rows": 9,
             "seed": 1}  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(CrawlConfig)}
    base = made(folder, config, Location(str(tmp_path / "base")))
    needs = {"width": {"min_width": 64}, "height": {"min_height": 64}, "domain": {"max_per_domain": 2}}
    for name, value in other.items():
        change = {name: value, **needs.get(name, {})}
        found = made(folder, dataclasses.replace(config, **change), Location(str(tmp_path / name)))
        assert found.manifest["fingerprint"] != base.manifest["fingerprint"]
        plain = base
        if name in needs:
            plain = made(folder, dataclasses.replace(config, **needs[name]), Location(str(tmp_path / f"{name}-plain")))
        assert found.digest != plain.digest, name


def test_columns_that_are_named_come_along(folder, tmp_path):
    config = CrawlConfig(columns=("text",), domain="site", height="row")
    found = result_of(made(folder, config, Location(str(tmp_path / "out"))))
    assert found.column_names == ["text", "url", "width", "site", "row", "url_domain", "url_key"]


def test_a_file_without_a_column_has_it_null(folder, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"url": ["http://a.b/1"], "x": [1]}), tmp_path / "in" / "0.parquet")
    pq.write_table(pa.table({"url": pa.array(["http://a.b/2"], pa.large_string())}), tmp_path / "in" / "1.parquet")
    found = result_of(
        crawl_table([Location(str(tmp_path / "in"))], CrawlConfig(), Location(str(tmp_path / "out")), LOCAL)[0]
    )
    assert sorted(found.select(["url", "x"]).to_pylist(), key=str) == [
        {"url": "http://a.b/1", "x": 1},
        {"url": "http://a.b/2", "x": None},
    ]


def test_on_s3_the_bytes_are_the_same(folder, on_s3, tmp_path):
    for entry in folder.list():
        (on_s3 / "in" / entry.name).write((folder / entry.name).read())
    config = CrawlConfig(max_per_domain=9, part_rows=40)
    there = made(folder, config, on_s3 / "out")
    here = made(folder, config, Location(str(tmp_path / "out")))
    both = crawl_table([on_s3 / "in"], config, on_s3 / "both", LOCAL, folder.parent / "block.txt")[0]
    assert there.digest == both.digest == here.digest


SLOW = """
import sys, time
from curation.store import Location
from pipelines.crawl import scan, table
from pipelines.crawl.rules import CrawlConfig

write = scan.write_table
def slow(*args, **kwargs):
    info = write(*args, **kwargs)
    print(info.name, flush=True)
    time.sleep(0.05)
    return info
scan.write_table = slow
folder, out = map(Location, sys.argv[1:])
table.crawl_table([folder], CrawlConfig(part_rows=20), out, table.Engine(), folder.parent / "block.txt")
"""


def test_killed_and_run_again_the_result_is_the_same(folder, tmp_path):
    place = Location(str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(place)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not Artifact(place).is_complete() and (place / "part-0000000.parquet").exists()
    with pytest.raises(UserError, match="must be empty or of this table and these rules"):
        made(folder, CrawlConfig(part_rows=21), place)
    whole = made(folder, CrawlConfig(part_rows=20), Location(str(tmp_path / "whole")))
    assert made(folder, CrawlConfig(part_rows=20), place).manifest == whole.manifest
    names = {path.name for path in place.path.iterdir()}
    assert names == {path.name for path in whole.location.path.iterdir()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"where": "widht > 3"}, "crawl.where must be an expression over columns"),
        ({"where": "width + 1"}, "crawl.where must be true or false for every row: got int32"),
        ({"where": "read_text('/etc/passwd') is not null"}, "crawl.where must be an expression"),
        ({"where": "cast(text as int) > 0"}, "crawl.where must be an expression over columns: Conversion Error"),
        ({"where": "true) OR (true"}, None),
        ({"where": "true) FROM crawl_rows; DROP TABLE crawl_rows; --"}, "crawl.where must be"),
        ({"url": "URL"}, "a table must have column URL: got text, url, width"),
        ({"url": "row"}, "column row must be text: got int64"),
        ({"width": "text"}, "column text must be a number of pixels: got large_string"),
        ({"columns": ("nope",)}, "a table must have column nope"),
    ],
)
def test_mistakes_in_rules_are_told(folder, tmp_path, change, message):
    place = Location(str(tmp_path / "out"))
    if message is None:
        made(folder, CrawlConfig(**change), place)
        return
    with pytest.raises((UserError, ValueError), match=message):
        made(folder, CrawlConfig(**change), place)
    assert not Artifact(place).is_complete()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schemes": ("http", "file")}, "crawl.schemes must be some of http, https, ftp: got file"),
        ({"schemes": ()}, "crawl.schemes must be some of http, https, ftp: got none"),
        ({"part_rows": 0}, "crawl.part_rows must be at least 1: got 0"),
        ({"max_per_domain": -1}, "crawl.max_per_domain must be at least 0: got -1"),
        ({"url": ""}, "crawl.url must name a column"),
    ],
)
def test_settings_that_cannot_be_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        CrawlConfig(**change)


def test_mistakes_about_files_are_told(folder, tmp_path):
    out = Location(str(tmp_path / "out"))

    def run(*sources, place=out):
        return crawl_table([Location(str(source)) for source in sources], CrawlConfig(), place, LOCAL)

    (tmp_path / "spoilt").mkdir()
    pq.write_table(pa.table({"url": ["http://a.b"]}), tmp_path / "spoilt" / "0.parquet")
    (tmp_path / "spoilt" / "1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"1\.parquet must be a Parquet file with the columns of"):
        run(tmp_path / "spoilt")
    text = pa.array([b"http://a.b/\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": text}), tmp_path / "spoilt" / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet must be a Parquet file .*UTF8"):
        run(tmp_path / "spoilt", place=Location(str(tmp_path / "out2")))
    pq.write_table(pa.table({"url": ["http://a.b"], "x": [[1]]}), tmp_path / "spoilt" / "0.parquet")
    with pytest.raises(ValueError, match="column x must be text, numbers, dates or bytes: got list"):
        run(tmp_path / "spoilt", place=Location(str(tmp_path / "out3")))
    with pytest.raises(UserError, match="no folder or file"):
        run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="must have Parquet files: got none"):
        run(tmp_path / "empty")
    with pytest.raises(UserError, match="must not be in the table"):
        run(folder, place=folder / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(UserError, match="must be empty: got 1 files, first letter"):
        run(folder, place=Location(str(tmp_path / "mine")))


def test_block_lists_are_checked(tmp_path):
    (tmp_path / "list").write_text("a.b\nhttp://c.d\n")
    with pytest.raises(UserError, match=r"got 'http://c\.d' in line 2"):
        read_block_list(Location(str(tmp_path / "list")))
    with pytest.raises(UserError, match="must be a text file"):
        read_block_list(Location(str(tmp_path / "none")))


def test_the_command_line(folder, tmp_path, capsys):
    args = ["crawl-table", f"{folder}/*.parquet", "--out", str(tmp_path / "out"), "--where", "ok", "--json"]
    args += ["--max-per-domain", "5", "--block-list", str(folder.parent / "block.txt"), "--columns", '["row", "ok"]']
    app(args, standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    artifact = Artifact(Location(str(tmp_path / "out")))
    assert told["counts"] == artifact.counts and told["state"] == "done" and told["stage"] == "crawl-table"
    assert artifact.manifest["config"]["columns"] == ["row", "ok"]
    app(args, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["state"] == "done before"
    for wrong, message in [
        (["--engine", "sparkle"], "--engine must be duckdb or spark"),
        (["--seed", "-1"], "crawl.seed"),
    ]:
        with pytest.raises(UserError, match=message):
            app(args + wrong, standalone_mode=False)
    with pytest.raises(UserError, match="--out must be given"):
        app(["crawl-table", str(folder)], standalone_mode=False)


def test_a_limit_of_memory_is_kept_by_going_to_disk(tmp_path):
    """160 MB of rows with 100 MB: the answer is that of any other machine."""
    n = 400_000
    words = pa.array([f"{i:08d}" * 50 for i in range(1000)])
    (tmp_path / "in").mkdir()
    for part in range(2):
        ids = np.arange(part * n // 2, (part + 1) * n // 2)
        rows = pa.table({"url": [f"http://a.b/{i}" for i in ids], "text": words.take(pa.array(ids % 1000)), "row": ids})
        pq.write_table(rows, tmp_path / "in" / f"{part}.parquet")
    out = [Location(str(tmp_path / name)) for name in ("small", "large")]
    engines = [Engine(memory="100MB", scratch=str(tmp_path)), LOCAL]
    small, large = (
        crawl_table([Location(str(tmp_path / "in"))], CrawlConfig(part_rows=50_000), at, engine)[0]
        for at, engine in zip(out, engines, strict=True)
    )
    assert small.counts == {"rows": n, "kept": n, "dropped": 0}
    assert small.manifest == large.manifest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("openlvd-crawl-")] == []


def test_fetching_needs_its_library_and_a_table_that_leads_to_the_web(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"url": ["http://a.b/", "file:///etc/passwd"]}), tmp_path / "in" / "0.parquet")
    table, out = Location(str(tmp_path / "in")), Location(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"URLs must begin with http:// or https://: got file:///etc/passwd"):
        check_urls(table / "0.parquet", FetchConfig())
    with pytest.raises(UserError, match=r"--python must have img2dataset: got .*: ModuleNotFoundError"):
        fetch([table], FetchConfig(), out, FetchResources(), sys.executable)
    with pytest.raises(UserError, match="--python must be an interpreter"):
        fetch([table], FetchConfig(), out, FetchResources(), str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"fetch\.timeout must be at least 1: got 0"):
        FetchConfig(timeout=0)
    assert not out.exists()
