"""``select``: rows of a pool by an expression over its columns, and over scores."""

from collections.abc import Mapping, Sequence
from functools import partial

import duckdb
import numpy as np
import pyarrow as pa

from curation.artifact import Artifact, Counts, FileInfo, add_counts, part_name, pool_of, read_table
from curation.execute import Executor
from curation.select import SelectConfig
from curation.selection import carried_count, read_selection, write_selection
from curation.store import Location
from pipelines.errors import UserError
from pipelines.stage import SELECTIONS, Inputs, Output, Stage, Step, listed, part_span
from pipelines.stages.mix import check_unmixed, refuse_mixes

Span = tuple[int, int, int]  # part, position of its first row in the pool, rows


def check(name: str, config: SelectConfig, inputs: Mapping[str, Step]) -> None:
    """No mix with shares as selection, scores with names of their own. Raises UserError before anything runs."""
    refuse_mixes(name, inputs)
    configs = [step.config for key, step in inputs.items() if key.startswith("scores.")]
    check_columns(name, [config.column for config in configs if config is not None])


def check_columns(name: str, columns: Sequence[str]) -> None:
    """Raise UserError unless every score has a column of its own."""
    doubles = [column for i, column in enumerate(columns) if column in columns[:i]]
    if doubles:
        raise UserError(
            f"{name}.scores must have one column each: got {doubles[0]} twice", "give the score steps a column: name"
        )


def run(config: SelectConfig, inputs: Inputs, out: Output, executor: Executor) -> Counts:
    """Write which rows the expression is true for; null counts as false. Counts of the selection before go on."""
    pool: Artifact = inputs["pool"]
    check_unmixed("select.selection", inputs.get("selection"))
    names = [[part_name(i)] for i in range(len(pool.parts))]
    work = partial(select_part, where=config.where, pool=pool, scores=scores_of(config, inputs),
                   before=inputs.get("selection"), out=out.location)  # fmt: skip
    out.make(work, part_span(pool), names)
    return add_counts(file.counts for file in out.files)


def scores_of(config: SelectConfig, inputs: Inputs) -> dict[str, Artifact]:
    """The scores by their column. Raises UserError when two have one name, or one is of another pool."""
    found = listed(inputs, "scores", config.scores)
    columns = [str(artifact.facts["column"]) for artifact in found]
    check_columns("select", columns)
    for step, artifact in zip(config.scores, found, strict=True):
        if pool_of(artifact).digest != inputs["pool"].digest:
            raise UserError(
                f"select.scores must be of the pool that is selected from: got {step}, which is of another",
                "score embeddings of this pool; those of a union are a union of embeddings",
            )
    return dict(zip(columns, found, strict=True))


def select_part(
    span: Span, where: str, pool: Artifact, scores: Mapping[str, Artifact], before: Artifact | None, out: Location
) -> FileInfo:
    """One part: the rows looked at are those of the selection before, if there is one."""
    index, start, _ = span
    table = with_scores(numbered(read_table(pool.part(index)), start), scores, index)
    kept = evaluate(where, table)
    rows = np.arange(len(kept)) if before is None else read_selection(before.part(index)).rows
    return write_selection(out / part_name(index), rows, kept[rows], **carried_count(before, index, rows, kept[rows]))


def with_scores(table: pa.Table, scores: Mapping[str, Artifact], index: int) -> pa.Table:
    """The rows of part ``index`` with a column of each score, null where it does not cover a row."""
    for name, artifact in scores.items():
        found = read_table(artifact.part(index), ["row", name])
        at = np.full(table.num_rows, -1)
        at[found["row"].to_numpy()] = np.arange(found.num_rows)
        table = table.append_column(name, found[name].take(pa.array(at, mask=at < 0)))
    return table


def numbered(table: pa.Table, start: int) -> pa.Table:
    """The rows of a part with their row ids in the pool that is asked; a part of a union has those of its member."""
    row_id = pa.array(np.arange(start, start + table.num_rows))
    return table.set_column(table.column_names.index("row_id"), "row_id", row_id)


def evaluate(where: str, table: pa.Table) -> np.ndarray:
    """bool (n,): the SQL expression for every row of a pool's part. It sees the columns and nothing else."""
    table = table.append_column("bytes", table["n_bytes"])
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
    version=2,
    config=SelectConfig,
    run=run,
    reads={"pool": ("pool",)},
    optional={"selection": SELECTIONS},
    lists={"scores": ("score",)},
    through=("scores.embeddings", "scores.embeddings.pool"),
    check=check,
)
