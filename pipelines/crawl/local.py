"""``crawl-table`` on this machine, by an embedded SQL engine that goes to disk where memory ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.artifact import Counts, FileInfo
from curation.store import Location
from pipelines.crawl.rules import (
    KEY,
    ORDER,
    ORDER_BITS,
    REASON,
    Dialect,
    cap_query,
    first_query,
    judge_query,
    parts_of,
    result_counts,
    result_query,
)
from pipelines.crawl.scan import BATCH_ROWS, Scan, read_rows, write_parts
from pipelines.errors import TaskError, UserError

N_RANGES = 256  # into which the rows of a result are dealt to be sorted
DIALECT = Dialect(
    quote=lambda name: '"' + name.replace('"', '""') + '"',
    number=lambda digits: f"CAST(concat('0x', {digits}) AS BIGINT)",
)


def check_where(scan: Scan) -> None:
    """Try the user's expression on no rows. Raises UserError."""
    where, empty = scan.config.where, scan.row_schema.empty_table()
    names = [*scan.columns, "url_domain"]
    if not where:
        return
    with duckdb.connect(config={"threads": 1, "enable_external_access": False}) as engine:
        engine.register("crawl_rows", empty.select(names))
        try:
            kind = engine.sql(f"SELECT ({where}\n) AS kept FROM crawl_rows").to_arrow_table()["kept"].type
        except duckdb.Error as e:
            raise wrong_where(str(e), names) from e
    if str(kind) != "bool":
        raise UserError(f"crawl.where must be true or false for every row: got {kind}", "for example width >= 224")


def wrong_where(message: str, names: list[str]) -> UserError:
    """What to say when an engine refuses the user's expression."""
    return UserError(
        f"crawl.where must be an expression over columns: {message.splitlines()[0]}", f"columns are {', '.join(names)}"
    )


class Rows:
    """All rows of a table as one stream, which tells how far it is, and keeps the error that ended it."""

    def __init__(self, scan: Scan, progress: Callable[[int, int], None]) -> None:
        self.failed: ValueError | None = None
        self._scan, self._progress = scan, progress

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            for index in range(len(self._scan.files)):
                yield from read_rows(self._scan, index)
                self._progress(index + 1, len(self._scan.files))
        except ValueError as e:
            self.failed = e
            raise


def run_local(
    scan: Scan, out: Location, memory: str | None, scratch: str | None, progress: Callable[[int, int], None]
) -> tuple[list[FileInfo], Counts]:
    """Write the parts of a result. Needs room for the table once or twice in ``scratch``, a folder.

    ``progress`` is told how many files are read. Raises UserError, ValueError for a file that is spoilt, TaskError.
    """
    with TemporaryDirectory(prefix="openlvd-crawl-", dir=scratch) as folder:
        settings = {"memory_limit": memory} if memory else {}
        try:
            with duckdb.connect(str(Path(folder) / "crawl.duckdb"), config=settings) as engine:
                # the user's expression sees the table and nothing else
                engine.execute("SET preserve_insertion_order = false; SET enable_external_access = false")
                return run_queries(engine, scan, out, Rows(scan, progress), Path(folder))
        except duckdb.ConversionException as e:
            raise wrong_where(str(e), [*scan.columns, "url_domain"]) from e
        except duckdb.InvalidInputException as e:
            raise UserError(f"crawl-table cannot be set so: {str(e).splitlines()[0]}", "see --help") from e
        except duckdb.OutOfMemoryException as e:
            raise UserError(
                f"crawl-table must have more memory than {memory or 'duckdb takes'}: {str(e).splitlines()[0]}",
                "give it more with --memory, leave out wide columns with --columns, or use --engine spark",
            ) from e
        except duckdb.Error as e:
            raise TaskError(f"at crawl-table: {str(e).splitlines()[0]}") from e


def run_queries(
    engine: duckdb.DuckDBPyConnection, scan: Scan, out: Location, rows: Rows, folder: Path
) -> tuple[list[FileInfo], Counts]:
    """The queries one after the other; what one of them no longer needs is dropped."""
    config, columns = scan.config, scan.columns
    engine.register("crawl_stream", pa.RecordBatchReader.from_batches(scan.row_schema, iter(rows)))
    try:
        engine.execute("CREATE TABLE crawl_rows AS SELECT * FROM crawl_stream")
    except duckdb.Error as e:
        raise (rows.failed or e) from e
    engine.execute(f"CREATE TABLE crawl_judged AS {judge_query(config, columns, DIALECT)}")
    told = engine.execute(f"SELECT {REASON}, count(*) FROM crawl_judged GROUP BY {REASON}").fetchall()
    engine.execute(f"CREATE TABLE crawl_first AS {first_query(config, DIALECT)}; DROP TABLE crawl_judged")
    engine.execute(f"CREATE TABLE crawl_kept AS {cap_query(config)}")
    sizes = [engine.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0] for name in ("crawl_first", "crawl_kept")]
    counts = result_counts(sum(n for _, n in told), {reason: n for reason, n in told if reason}, *sizes)
    result = result_query(config, columns, parts_of(sizes[1], config.part_rows), DIALECT)
    stream = engine.sql(result).to_arrow_reader(BATCH_ROWS)
    return list(write_parts(in_order(stream, folder), out, scan.result_schema)), counts


def in_order(stream: pa.RecordBatchReader, folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a result in order: dealt to files by ranges of the hash that orders them, then sorted file by file.

    Holds a ``N_RANGES``-th of the rows. (The engine's own sort keeps whole rows in memory.)
    """
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"range-{i}.arrow").open("wb")) for i in range(N_RANGES)]
        writers = [stack.enter_context(pa.ipc.new_stream(file, stream.schema)) for file in files]
        for batch in stream:
            ranges = batch.column(ORDER).to_numpy() * N_RANGES >> ORDER_BITS
            rows = batch.take(pa.array(np.argsort(ranges, kind="stable")))
            ends = np.cumsum(np.bincount(ranges, minlength=N_RANGES))
            for i in np.unique(ranges):
                rows_before = int(ends[i - 1]) if i else 0
                writers[i].write_batch(rows.slice(rows_before, int(ends[i]) - rows_before))
    for file in files:
        path = Path(file.name)
        with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
            rows = reader.read_all()
        path.unlink()
        yield from rows.take(pc.sort_indices(rows, [(ORDER, "ascending"), (KEY, "ascending")])).to_batches()
