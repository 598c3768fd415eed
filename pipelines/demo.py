"""``openlvd demo``: make the pool of digits, run the shipped recipe on it, and say what came of it.

The run itself knows nothing of what was planted: the truth is read when it is over, and only here and by the
page's class histograms. Every number of the last screen is computed from the artifacts of this run.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from curation.artifact import Artifact, read_table
from curation.store import Location
from pipelines.demo_pool import TRUTH, make_demo_pool
from pipelines.engine import StepResult, last_seconds
from pipelines.errors import UserError
from pipelines.launch import run_steps
from pipelines.recipe import read_recipe
from pipelines.report.classes import balance
from pipelines.stage import HEAD_COUNTS
from pipelines.stages.report import PAGE
from pipelines.stages.table import STAGES

Truth = Mapping[str, Mapping[str, Any]]  # what is known of each file of the crawl
RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
POOL, RUN = "pool", "run"  # folders below the root of a demo
ENCODERS = (  # step, what it is, in the words of the last screen
    ("knn_pixels", "raw pixels"),
    ("knn_random", "untrained encoder"),
    ("knn_tiny", "openlvd-tiny, trained on photographs"),
    ("knn_first", "encoder trained on the raw pool"),
    ("knn_second", "encoder trained on the curated set"),
)


@dataclass(frozen=True)
class Found:
    """How much of what was planted is gone, and how much of what was dropped was planted. All are files."""

    planted: int
    gone: int  # of the planted
    dropped: int
    right: int  # of the dropped

    def as_plain(self) -> dict[str, float]:
        """As JSON-able values."""
        precision = self.right / self.dropped if self.dropped else 1.0
        recall = self.gone / self.planted if self.planted else 1.0
        return {**asdict(self), "precision": precision, "recall": recall}


def run_demo(root: Location, overrides: list[str], executor: str, as_json: bool) -> None:
    """Run the demo below ``root`` and print the last screen, or one JSON object. Raises UserError."""
    if not root.is_local:
        raise UserError(f"--root must be a local folder: got {root}", "the demo writes its images there")
    pool = root.path / POOL
    if not pool.exists():
        make_demo_pool(pool)
    recipe = read_recipe(Location(str(RECIPE)), [*places(pool), *overrides], STAGES)
    results = list(run_steps(recipe, root / RUN, executor, None, quiet=as_json))
    summary = summarise(results, {result.name: artifact_of(result) for result in results}, pool)
    if as_json:
        print(json.dumps(summary))
    else:
        Console().print(last_screen(summary))


def places(pool: Path) -> list[str]:
    """Where the recipe finds its images, and the page the classes of the crawl if they are known."""
    values = {"web.source": pool / "crawl", "exam.source": pool / "eval", "bank.source": pool / "bank"}
    if (pool / TRUTH).exists():
        values["page.labels"] = pool / TRUTH
    return [f"{key}={json.dumps(str(path))}" for key, path in values.items()]


def artifact_of(result: StepResult) -> Artifact:
    """The output of a finished step."""
    assert result.location is not None  # the step is done
    return Artifact(result.location)


def summarise(results: Iterable[StepResult], steps: Mapping[str, Artifact], pool: Path) -> dict[str, Any]:
    """Everything the last screen says, as plain values."""
    truth_is_there = (pool / TRUTH).exists()
    summary: dict[str, Any] = {
        "steps": [step_row(result, steps[result.name]) for result in results],
        "accuracy": {name: steps[name].facts["accuracy"] for name, _ in ENCODERS},
        "report": str(steps["page"].location / PAGE),
        "planted_truth": truth_is_there,
    }
    if truth_is_there:
        truth = read_truth(pool / TRUTH)
        summary["duplicates"] = duplicates_found(steps, truth).as_plain()
        summary["leaks"] = leaks_found(steps, truth).as_plain()
        summary["classes"] = class_balance(steps, truth)
    return summary


def step_row(result: StepResult, artifact: Artifact) -> dict[str, Any]:
    """One step: its counts, and the seconds it took, in this run or when it was made."""
    counts = {name: result.counts.get(name) for name in HEAD_COUNTS}
    seconds = round(result.seconds or last_seconds(artifact), 2)
    return {"step": result.name, "stage": result.stage, "state": result.state, **counts, "seconds": seconds}


def read_truth(path: Path) -> Truth:
    """What was planted, by file; nothing was in a file that somebody added since."""
    rows = {row["source"]: row for row in pq.read_table(path).to_pylist()}
    return defaultdict(lambda: {"label": None, "group": None, "leak_of": None}, rows)


def duplicates_found(steps: Mapping[str, Artifact], truth: Truth) -> Found:
    """Row by row: a dropped image is right when it and the one that stayed for it are copies of one picture.

    Exact copies that the pool refused count as dropped. Planted are, of each group of copies among the images that
    came so far, all but one.
    """
    source = sources(steps["web"])
    dropped = exact_copies(steps["web"])
    looked = [name for name, _ in dropped]
    for row_id, row in rows_of(steps["unique"], steps["web"], ["row", "kept", "representative"]):
        looked.append(source[row_id])
        if not row["kept"]:
            dropped.append((source[row_id], source[row["representative"]]))
    groups = Counter(truth[name]["group"] for name in looked if truth[name]["group"] is not None)
    right = sum(truth[a]["group"] is not None and truth[a]["group"] == truth[b]["group"] for a, b in dropped)
    return Found(sum(n - 1 for n in groups.values()), right, len(dropped), right)


def leaks_found(steps: Mapping[str, Artifact], truth: Truth) -> Found:
    """Planted are the files that show an image of the exam; they are gone when decontamination does not keep them."""
    source = sources(steps["web"])
    looked = [(source[i], row["kept"]) for i, row in rows_of(steps["clean"], steps["web"], ["row", "kept"])]
    dropped = [name for name, kept in looked if not kept]
    planted = {name for name, row in truth.items() if row["leak_of"] is not None}
    gone = planted - {name for name, kept in looked if kept}
    return Found(len(planted), len(gone), len(dropped), len(planted.intersection(dropped)))


def class_balance(steps: Mapping[str, Artifact], truth: Truth) -> dict[str, Any]:
    """Images of each class in the pool, without copies and leaks, and in the curated set; and how even they are."""
    source = sources(steps["web"])
    chosen = {"raw": list(range(len(source)))}
    for words, step in (("clean", "clean"), ("curated", "balanced")):
        chosen[words] = [i for i, row in rows_of(steps[step], steps["web"], ["row", "kept"]) if row["kept"]]
    found = {}
    for words, rows in chosen.items():
        labels = [truth[source[row]]["label"] for row in rows]
        counts = Counter(label for label in labels if label is not None)
        found[words] = {"counts": dict(sorted(counts.items())), **balance(counts)}
    return found


def exact_copies(pool: Artifact) -> list[tuple[str, str]]:
    """(file, the file that stayed) of what the pool refused because an earlier file has the same bytes."""
    by_key = {row["key"]: row["source"] for row in pool_rows(pool, ["key", "source"])}
    rejected = [read_table(pool.location / name).to_pylist() for name in names(pool, "rejected-")]
    return [(r["source"], by_key[r["key"]]) for rows in rejected for r in rows if r["reason"] == "exact_duplicate"]


def rows_of(selection: Artifact, pool: Artifact, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row that a step looked at, by its position in the pool."""
    for i, start in enumerate(pool.starts[:-1].tolist()):
        for row in read_table(selection.part(i), columns).to_pylist():
            yield start + row["row"], row


def sources(pool: Artifact) -> list[str]:
    """The file of every row, by position."""
    return [row["source"] for row in pool_rows(pool, ["source"])]


def pool_rows(pool: Artifact, columns: list[str]) -> list[dict[str, Any]]:
    """Some columns of a pool's rows: the demo's pool is small."""
    parts = [read_table(pool.location / name, columns) for name in names(pool, "part-")]
    rows: list[dict[str, Any]] = pa.concat_tables(parts).to_pylist()
    return rows


def names(artifact: Artifact, prefix: str) -> list[str]:
    """The files of a kind, in order."""
    return [file.name for file in artifact.files if file.name.startswith(prefix)]


def last_screen(summary: Mapping[str, Any]) -> Group:
    """What the demo has to say, for people."""
    blocks: list[Any] = [head("Steps"), step_table(summary["steps"])]
    if summary["planted_truth"]:
        blocks += [head("Planted near-duplicates and leaks"), found_table(summary)]
        blocks += [head("Images by class, which no step has seen"), class_table(summary["classes"])]
    else:
        blocks += [
            head("Planted near-duplicates and leaks"),
            Text(f"not measured: {TRUTH} is absent. The run did not need it."),
        ]
    blocks += [head("k-NN accuracy on the exam, one bank for all"), accuracy_table(summary["accuracy"])]
    blocks += [Text(verdict(summary["accuracy"])), head("Report"), Text(summary["report"], overflow="fold")]
    return Group(*blocks)


def head(text: str) -> Padding:
    """A heading."""
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))


def table_of(*columns: str) -> Table:
    """A plain table, its first column words and the others numbers."""
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def step_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Rows in, kept, dropped and bad of every step, with seconds."""
    table = table_of("step", *HEAD_COUNTS, "seconds")
    for row in rows:
        cells = ["" if row[key] is None else f"{row[key]:,}" for key in HEAD_COUNTS]
        table.add_row(f"{row['step']} ({row['stage']})", *cells, f"{row['seconds']:.1f}")
    return table


def found_table(summary: Mapping[str, Any]) -> Table:
    """Precision and recall of what was planted."""
    table = table_of("", "planted", "gone", "recall", "dropped", "right", "precision")
    for words, key in (("near-duplicates", "duplicates"), ("leaks of the exam", "leaks")):
        found = summary[key]
        planted, gone, dropped, right = (f"{found[name]:,}" for name in ("planted", "gone", "dropped", "right"))
        table.add_row(words, planted, gone, f"{found['recall']:.3f}", dropped, right, f"{found['precision']:.3f}")
    return table


def class_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Images of each class, from the most to the least frequent in the raw pool, and how even they are."""
    raw = found["raw"]["counts"]
    table = table_of("class", *found)
    for label in sorted(raw, key=lambda label: (-raw[label], label)):
        table.add_row(label, *(f"{row['counts'].get(label, 0):,}" for row in found.values()))
    table.add_row("images", *(f"{row['images']:,}" for row in found.values()))
    table.add_row("effective classes", *(f"{row['effective']:.2f}" for row in found.values()))
    table.add_row("largest : smallest", *(f"{row['ratio']:.1f} : 1" for row in found.values()))
    return table


def accuracy_table(accuracy: Mapping[str, float]) -> Table:
    """What each encoder is worth."""
    table = table_of("", "accuracy")
    for name, words in ENCODERS:
        table.add_row(words, f"{100 * accuracy[name]:.1f} %")
    return table


def verdict(accuracy: Mapping[str, float]) -> str:
    """The accuracies in words, whatever they are."""
    names = ("knn_pixels", "knn_random", "knn_first", "knn_second")
    pixels, random, first, second = (accuracy[name] for name in names)
    if max(first, second) > pixels:
        said = "After a minute of training on a CPU the better encoder beats raw pixels."
    else:
        said = "A minute of training on a CPU does not beat raw pixels, which are strong on small centred digits."
    learnt = "Both trained encoders beat" if min(first, second) > random else "Not every trained encoder beats"
    order = "better than" if second > first else "worse than" if second < first else "as good as"
    points = 100 * (second - first)
    return (
        f"{said} {learnt} the untrained one. The one trained on the curated set is {order} the one trained on the "
        f"raw pool ({points:+.1f} points)."
    )
