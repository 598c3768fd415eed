"""``crawl-table`` on Spark, for tables larger than one machine: the same reader, queries and writer, shuffled by Spark.

A file is read by one task, in Python, with the reader of ``pipelines.crawl.scan``; a part is written by one task, whole
or not at all. So Spark needs to know nothing of S3 or Parquet, a task may be tried again or twice at a time, and the
parts are the same bytes as those made on one machine. The driver holds one line a file and a part. The table is read
twice: once to judge its rows by a few narrow columns, once to carry away the rows that are kept.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from curation.artifact import Counts, FileInfo
from curation.store import Location
from pipelines.crawl.rules import (
    DOMAIN,
    KEY,
    PART,
    REASON,
    Dialect,
    cap_query,
    first_query,
    judge_query,
    parts_of,
    result_counts,
    result_query,
)
from pipelines.crawl.scan import Scan, read_rows, write_parts
from pipelines.errors import TaskError, UserError

DIALECT = Dialect(
    quote=lambda name: "`" + name.replace("`", "``") + "`",
    number=lambda digits: f"CAST(conv({digits}, 16, 10) AS BIGINT)",
)
INFO_SCHEMA = "name string, rows long, bytes long, sha256 string"
CAP_LIMIT = "spark.sql.optimizer.windowGroupLimitThreshold"  # caps up to this are cut before the shuffle too
SETTINGS = {
    "spark.sql.ansi.enabled": "false",  # in where, what cannot be computed is null, not the end of the run
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "16384",
}
LOCAL_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.sql.shuffle.partitions": "16",
}


@contextmanager
def open_spark(master: str, memory: str | None) -> Iterator[Any]:
    """A session, closed at the end if it was opened here. Raises UserError without Java or Spark."""
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise UserError("--engine spark must find Java: got none", "install Java 17, or leave --engine out")
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as e:
        raise UserError(f"--engine spark must find pyspark: {e}", "pip install 'openlvd[spark]'") from e
    open_before = SparkSession.getActiveSession()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("openlvd crawl-table").master(master)
    given = {**(LOCAL_SETTINGS if master.startswith("local") else {}), **SETTINGS}
    for name, value in {**given, **({"spark.driver.memory": memory} if memory else {})}.items():
        builder = builder.config(name, value)
    try:
        spark = builder.getOrCreate()
    except PySparkException as e:
        raise UserError(
            f"--master must be a Spark that can be reached: {str(e).splitlines()[0]}",
            "local[*] is this machine, spark://HOST:PORT a cluster",
        ) from e
    spark.sparkContext.setLogLevel("OFF")  # what goes wrong is told once, by us
    try:
        yield spark
    finally:
        if open_before is None:
            spark.stop()


def run_spark(
    scan: Scan, out: Location, master: str, memory: str | None, progress: Callable[[int, int], None]
) -> tuple[list[FileInfo], Counts]:
    """Write the parts of a result. ``progress`` is told how many of three passes are done.

    Raises UserError, ValueError for a file that is spoilt, TaskError.
    """
    with open_spark(master, memory) as spark:
        from pyspark.errors import AnalysisException, PySparkException

        try:
            return run_queries(spark, scan, out, progress)
        except AnalysisException as e:
            names = ", ".join([*scan.columns, DOMAIN])
            raise UserError(
                f"crawl.where must be an expression over columns: {str(e).splitlines()[0]}", f"columns are {names}"
            ) from e
        except PySparkException as e:
            lines = str(e).splitlines()
            told = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
            if told and told[-1].startswith("ValueError: "):
                raise ValueError(told[-1].removeprefix("ValueError: ")) from e
            raise TaskError(f"at crawl-table: {(told or lines)[-1]}") from e


def run_queries(
    spark: Any, scan: Scan, out: Location, progress: Callable[[int, int], None]
) -> tuple[list[FileInfo], Counts]:
    """The queries one after the other, over views of those before."""
    from pyspark import StorageLevel

    config, columns = scan.config, scan.columns
    if config.max_per_domain:
        spark.conf.set(CAP_LIMIT, max(int(spark.conf.get(CAP_LIMIT)), config.max_per_domain))

    def view(name: str, frame: Any, keep: bool = False) -> Any:
        frame = frame.persist(StorageLevel.DISK_ONLY) if keep else frame
        frame.createOrReplaceTempView(name)
        return frame

    view("crawl_rows", scan_frame(spark, scan))
    judged = view("crawl_judged", spark.sql(judge_query(config, columns, DIALECT)), keep=True)
    told = [(row[0], row[1]) for row in judged.groupBy(REASON).count().collect()]
    progress(1, 3)
    first = view("crawl_first", spark.sql(first_query(config, DIALECT)), keep=True)
    kept = view("crawl_kept", spark.sql(cap_query(config)), keep=True)
    n_first, n_kept = first.count(), kept.count()
    progress(2, 3)
    counts = result_counts(sum(n for _, n in told), {reason: n for reason, n in told if reason}, n_first, n_kept)
    files = write_frame(
        spark.sql(result_query(config, columns, parts_of(n_kept, config.part_rows), DIALECT)), scan, out, n_kept
    )
    for frame in (judged, first, kept):
        frame.unpersist()
    progress(3, 3)
    return files, counts


def scan_frame(spark: Any, scan: Scan) -> Any:
    """All rows of a table, a file a task."""
    from pyspark.sql.pandas.types import from_arrow_schema

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for index in batch.column("id").to_pylist():
                yield from read_rows(scan, index)

    n_files = len(scan.files)
    return spark.range(0, n_files, 1, numPartitions=n_files).mapInArrow(read, from_arrow_schema(scan.row_schema))


def write_frame(frame: Any, scan: Scan, out: Location, n_kept: int) -> list[FileInfo]:
    """Write the parts of a result, whole parts a task."""
    schema = scan.result_schema

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for info in write_parts(batches, out, schema):
            yield pa.record_batch([[info.name], [info.rows], [info.bytes], [info.sha256]],
                                  names=["name", "rows", "bytes", "sha256"])  # fmt: skip

    n_tasks = parts_of(n_kept, scan.config.part_rows)
    ordered = frame.repartition(n_tasks, PART).sortWithinPartitions(PART, "crawl_order", KEY)
    return [
        FileInfo(row.name, row.rows, row.bytes, row.sha256, {})
        for row in ordered.mapInArrow(write, INFO_SCHEMA).collect()
    ]
