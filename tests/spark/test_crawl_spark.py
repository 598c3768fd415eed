"""Crawl tables on Spark give the bytes that one machine gives; these tests fail without Java. ``make test-spark``."""

import shutil
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crawled import BLOCKED, expected, nasty_table, result_of, write_files

from curation.store import Location
from curation.urls import normal_host
from pipelines.crawl.rules import CrawlConfig
from pipelines.crawl.spark import open_spark
from pipelines.crawl.table import Engine, crawl_table
from pipelines.errors import UserError

MASTER = "local[2]"
LOCAL, SPARK = Engine(), Engine(name="spark", master=MASTER)
DOMAINS = {"ads.net", "b.org", normal_host("bücher.de")}
CONFIGS = [
    CrawlConfig(),
    CrawlConfig(max_per_domain=7, schemes=("https", "ftp"), part_rows=30, seed=3),
    CrawlConfig(min_width=64, min_height=65, private_hosts=True, domain="site", max_per_domain=40, part_rows=9),
    CrawlConfig(where="score >= 0 or text = 'it''s' -- a comment", max_per_domain=2000),
    CrawlConfig(
        where="url_domain like '%.io' and (width / 2 > 30 or width is null) and lower(text) <> 'x'", part_rows=5
    ),
    CrawlConfig(where="height > 100 and not isnan(height)", columns=("raw", "at", "score")),
    CrawlConfig(where="false"),
]


@pytest.fixture(scope="module", autouse=True)
def spark(s3) -> Iterator[None]:
    """One session for all; its workers see the S3 of the tests."""
    with open_spark(MASTER, None):
        yield


def both(folder, config, tmp_path, name="") -> list:
    block = folder.parent / "block.txt"
    return [
        crawl_table([folder], config, Location(str(tmp_path / f"{engine.name}{name}")), engine, block)[0]
        for engine in (LOCAL, SPARK)
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_spark_gives_the_same_bytes_as_one_machine(config, tmp_path):
    table = nasty_table(CONFIGS.index(config) + 10, 1200)
    write_files(table, tmp_path / "ta ble", 4)
    (tmp_path / "block.txt").write_text(BLOCKED)
    local, spark = both(Location(str(tmp_path / "ta ble")), config, tmp_path)
    assert spark.counts == local.counts
    assert repr(result_of(spark).to_pylist()) == repr(result_of(local).to_pylist())  # as text, for NaN
    assert spark.manifest == local.manifest
    if not config.where:
        assert spark.counts == expected(table, config, DOMAINS)[1]


def test_on_s3_too(tmp_path, on_s3):
    write_files(nasty_table(1, 400), tmp_path / "in", 2)
    (tmp_path / "block.txt").write_text(BLOCKED)
    folder = Location(str(tmp_path / "in"))
    for entry in folder.list():
        (on_s3 / "in" / entry.name).write((folder / entry.name).read())
    config = CrawlConfig(part_rows=50)
    there = crawl_table([on_s3 / "in"], config, on_s3 / "out", SPARK, folder.parent / "block.txt")[0]
    assert there.digest == both(folder, config, tmp_path)[0].digest
    assert [entry.name for entry in (on_s3 / "out").list() if "part-" in entry.name] == [p.name for p in there.parts]


def test_an_answer_is_left_and_another_is_refused(tmp_path):
    write_files(nasty_table(2, 200), tmp_path / "in", 1)
    folder, out = Location(str(tmp_path / "in")), Location(str(tmp_path / "out"))
    assert crawl_table([folder], CrawlConfig(), out, SPARK)[1]
    assert not crawl_table([folder], CrawlConfig(), out, SPARK)[1]
    assert not crawl_table([folder], CrawlConfig(), out, LOCAL)[1]
    with pytest.raises(UserError, match="must be empty or of this table"):
        crawl_table([folder], CrawlConfig(seed=1), out, SPARK)


def test_what_goes_wrong_on_a_worker_is_told_as_on_one_machine(tmp_path):
    write_files(nasty_table(3, 100), tmp_path / "in", 2)
    (tmp_path / "in" / "9.parquet").write_bytes(b"PAR1")
    folder, said = Location(str(tmp_path / "in")), []
    for engine in (LOCAL, SPARK):
        with pytest.raises(ValueError, match=r"9\.parquet must be a Parquet file with the columns of") as error:
            crawl_table([folder], CrawlConfig(), Location(str(tmp_path / engine.name)), engine)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_words_that_spark_does_not_know_are_told(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"url": ["http://a.b/"], "s": ["x"]}), tmp_path / "in" / "0.parquet")
    config = CrawlConfig(where="list_contains(['x'], s)")  # of duckdb alone
    with pytest.raises(UserError, match=r"crawl\.where must be an expression over columns"):
        crawl_table([Location(str(tmp_path / "in"))], config, Location(str(tmp_path / "out")), SPARK)


def test_without_java_that_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match="--engine spark must find Java: got none"), open_spark(MASTER, None):
        pass
