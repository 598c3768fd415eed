"""``select``: rows of a pool by an expression over its columns."""

from functools import partial

import duckdb
import numpy as np

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, read_table
from curation.execute import Executor
from curation.select import SelectConfig
from curation.selection import read_selection, write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage


def run(config: SelectConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write which rows the expression is true for; null counts as false."""
    pool: Artifact = inputs["pool"]
    names = [[part_name(i)] for i in range(len(pool.parts))]
    work = partial(select_part, where=config.where, pool=pool, before=inputs.get("selection"), out=out.location)
    out.make(work, range(len(pool.parts)), names)
    return add_counts(file.counts for file in out.files)


def select_part(index: int, where: str, pool: Artifact, before: Artifact | None, out: Location) -> FileInfo:
    """One part: the rows looked at are those of the selection before, if there is one."""
    kept = evaluate(where, pool.part(index))
    rows = np.arange(len(kept)) if before is None else read_selection(before.part(index)).rows
    return write_selection(out / part_name(index), rows, kept[rows])


def evaluate(where: str, part: Location) -> np.ndarray:
    """bool (n,): the SQL expression for every row of a pool's part. It sees the columns and nothing else."""
    table = read_table(part)
    with duckdb.connect(config={"threads": 1, "enable_external_access": False}) as engine:
        engine.register("images", table)
        try:
            # ordered by row_id, which is the order of the part
            answer = engine.sql(f"SELECT coalesce(({where}), false) AS kept FROM images ORDER BY row_id")
            column = answer.to_arrow_table()["kept"]
        except duckdb.Error as e:
            raise UserError(
                f"select.where must be an expression over columns: {str(e).splitlines()[0]}",
                f"columns are {', '.join(table.column_names)}; for example width >= 224 and height >= 224",
            ) from e
    if str(column.type) != "bool" or len(column) != table.num_rows:
        raise UserError(
            f"select.where must be true or false for every row: got {column.type}", "for example width >= 224"
        )
    return np.asarray(column.to_numpy())


STAGE = Stage(
    version=1,
    config=SelectConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
)
