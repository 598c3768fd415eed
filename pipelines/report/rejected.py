"""What the page says of files that a pool refused."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute as pc

from curation.artifact import Artifact, read_table
from curation.listing import root_of
from pipelines.report.run import Run
from pipelines.report.thumbnails import rejected_thumb


def rejected(run: Run) -> list[dict[str, Any]]:
    """Every pool that refused files: how many for which reason, with examples."""
    found = []
    for name, pool in run.of("pool").items():
        files = [file for file in pool.files if file.name.startswith("rejected-") and file.rows]
        reasons = Counter[str]()
        for file in files:
            reasons.update({key: n for key, n in file.counts.items() if key not in ("rows", "dropped", "bad")})
        groups = [
            (
                reason,
                n,
                rejected_examples(pool, [f.name for f in files if reason in f.counts], reason, run.config.n_rejected),
            )
            for reason, n in reasons.most_common()
        ]
        if groups:
            found.append({"name": name, "counts": pool.counts, "groups": groups})
    return found


def rejected_examples(pool: Artifact, names: Iterable[str], reason: str, n: int) -> list[dict[str, Any]]:
    """The first ``n`` files with a reason, in the order of the source; reads no more parts than that takes."""
    root = root_of(pool.outside("source"))
    rows: list[dict[str, Any]] = []
    for name in names:
        if len(rows) >= n:
            break
        table = read_table(pool.location / name)
        rows += table.filter(pc.equal(table["reason"], reason)).slice(0, n - len(rows)).to_pylist()
    return [
        {"uri": rejected_thumb(root, row["source"], row["member"]) if reason != "undecodable" else "",
         "name": f"{row['source']}/{row['member']}" if row["member"] else row["source"], "detail": rejected_detail(row)}
        for row in rows
    ]  # fmt: skip


def rejected_detail(row: Mapping[str, Any]) -> str:
    """Why a file was refused, in words; of a copy, what it is a copy of."""
    return f"same bytes as {row['duplicate_of']}" if row["duplicate_of"] else row["detail"] or ""
