"""The command line: ``openlvd run | plan | status | why | contains | report | demo``.

Data goes to stdout, everything for people's eyes while they wait to stderr. Exit code 2 for what the user can
mend, 1 for a run that failed.
"""

import json
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from curation.artifact import Artifact
from curation.store import Location
from pipelines.commands import PanelGroup, add_stage_commands, read_value
from pipelines.crawl.command import add_crawl_commands
from pipelines.engine import StepResult, last_seconds, plan_recipe, read_root
from pipelines.errors import TaskError, UserError
from pipelines.executor import Resources
from pipelines.launch import open_executor, run_steps
from pipelines.progress import StepProgress
from pipelines.recipe import Recipe, read_recipe
from pipelines.stage import HEAD_COUNTS
from pipelines.stages.table import STAGES
from pipelines.train_command import TRAIN_COMMAND

app = typer.Typer(
    cls=PanelGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)

FOUND = 3  # of contains --fail-if-found, when a near copy was found: neither a mistake (2) nor a failed run (1)
ACCURACIES = {"accuracy": "k-NN", "linear_accuracy": "linear probe"}  # among the facts of evaluate
INTERRUPTED = 130  # the shell's exit code for Ctrl-C, which typer returns

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe to run.")]
Root = Annotated[str | None, typer.Option(help="Where artifacts go: a folder or s3://bucket/prefix.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="STEP.KEY=VALUE", help="Change the recipe.")]
Until = Annotated[str | None, typer.Option(metavar="STEP", help="Stop after this step.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a step on stdout.")]
AsSummary = Annotated[bool, typer.Option("--json", help="The summary as one JSON object on stdout.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="serial (this process) or ray.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster; without it Ray runs in processes of this machine.")]


@app.command()
def run(
    recipe: RecipePath,
    root: Root = None,
    overrides: Overrides = None,
    executor: ExecutorName = "serial",
    address: Address = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a recipe; what is done already is not done again."""
    parsed = read_recipe(Location(recipe), overrides or [], STAGES)
    target = root_of(parsed, root)
    show_results(run_steps(parsed, target, executor, address, until, quiet=as_json), as_json)


@app.command()
def plan(
    recipe: RecipePath,
    root: Root = None,
    overrides: Overrides = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """What a run would do and what is done already; nothing is executed."""
    parsed = read_recipe(Location(recipe), overrides or [], STAGES)
    show_results(plan_recipe(parsed, root_of(parsed, root), until), as_json)


@app.command()
def status(root: Annotated[str, typer.Argument(metavar="ROOT")], as_json: AsJson = False) -> None:
    """The steps of the last run on a root."""
    results = []
    for name, artifact in read_root(Location(root)).items():
        if artifact is None or not artifact.is_complete():
            results.append(StepResult(name, "", "to do", {}, 0.0, None))
        else:
            seconds = last_seconds(artifact)
            results.append(StepResult(name, artifact.stage, "done", artifact.counts, seconds, artifact.location))
    show_results(results, as_json)


@app.command()
def why(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The root of a run.")],
    image: Annotated[
        str, typer.Argument(metavar="KEY|PATH", help="A key or its first digits, a path in a source, or any file.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """The story of an image: which step kept or dropped it, and why."""
    from pipelines.why.story import print_story, tell_why

    story = tell_why(Location(root), image)
    if as_json:
        print(json.dumps(story))
    else:
        print_story(story, Console(highlight=False, emoji=False))


@app.command()
def contains(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The root of a run.")],
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder, tar, Parquet, image file or s3:// prefix.")
    ],
    min_similarity: Annotated[
        float | None,
        typer.Option(
            help="Cosine from which on two images are copies. Default: that of the run's decontaminate, or of "
            "the neighbors of its dedup."
        ),
    ] = None,
    step: Annotated[
        str | None, typer.Option(metavar="NAME", help="The step that made the set: default the last shards, or choice.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(metavar="NAME", help="The embed step to compare by. Default: that of the similarity.")
    ] = None,
    whole_pool: Annotated[
        bool,
        typer.Option("--whole-pool", help="Also look among what is not in the set, and say which step dropped it."),
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(metavar="PATH", help="The weights, if they are no longer where the run found them.")
    ] = None,
    work: Annotated[
        str | None, typer.Option(metavar="URI", help="A place to keep the vectors of IMAGES at. Default: none is kept.")
    ] = None,
    fail_if_found: Annotated[
        bool, typer.Option("--fail-if-found", help="Exit with 3 when an image has a near copy in the set.")
    ] = False,
    executor: ExecutorName = "serial",
    address: Address = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object an image on stdout, then one with the sums.")
    ] = False,
) -> None:
    """Which of some images have a near copy in the set that a run has made: is this benchmark in my set?

    A line an image: "in" (a near copy is in the set), "dropped" (one is in the pool alone, with --whole-pool) or "no";
    "again" for the bytes of an earlier image, "unread" for what does not decode. The exit code is 0 whatever the
    answer: a script reads --json, or gives --fail-if-found.
    """
    from pipelines.contains.command import Question
    from pipelines.contains.command import contains as look

    question = Question(
        root=root, images=images, step=step, embeddings=embeddings, min_similarity=min_similarity,
        whole_pool=whole_pool, backbone=backbone, work=work, executor=executor, address=address, as_json=as_json,
    )  # fmt: skip
    if look(question) and fail_if_found:
        raise SystemExit(FOUND)


@app.command()
def report(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The root of a run, finished or not.")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Where the page goes; without it ROOT/report.html.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The heading of the page.")] = None,
    executor: ExecutorName = "serial",
    address: Address = None,
) -> None:
    """Write a page about the last run on a root."""
    from pipelines.report.command import write_page

    with open_executor(executor, address, Resources()) as engine, StepProgress() as progress:
        page = write_page(Location(root), out, title, engine, progress.start)
    print(page)


@app.command("export")
def export_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A train step, ROOT/STEP, or a folder with its files.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="A new folder for the model.")],
    as_json: AsSummary = False,
) -> None:
    """A trained encoder as a folder for Hugging Face's transformers: config, safetensors, preprocessor."""
    from pipelines.export import export

    made = export(path, out)
    if as_json:
        print(json.dumps(made._asdict()))
        return
    theirs = made.transformers_difference
    compared = "transformers is not installed to compare with" if theirs is None else f"by transformers {theirs:.1e}"
    print(f"{made.folder}: {made.model_type}, {made.parameters:,} parameters")
    print(f"largest difference of a feature: read back {made.own_difference:.1e}, {compared}")


@app.command()
def demo(
    root: Annotated[str, typer.Option(help="Where the demo's pool and its run go.")] = "demo",
    overrides: Overrides = None,
    executor: ExecutorName = "ray",
    as_json: AsJson = False,
) -> None:
    """Curate a pool made of real handwritten digits, train on it, and measure what was planted."""
    from pipelines.demo import run_demo

    run_demo(Location(root).resolved(), overrides or [], executor, as_json)


Photos = Annotated[str, typer.Argument(metavar="PHOTOS", help="Images: a folder, tar, Parquet or s3:// prefix.")]
MinSimilarity = Annotated[
    float | None,
    typer.Option(
        help="Cosine from which on two images are copies. pixels: 0.99, phash: 0.758 (31 of 256 bits differ); for "
        "others it must be given (SSCD: 0.6).",
    ),
]
BackboneName = Annotated[
    str, typer.Option("--backbone", help="pixels, phash, a Hugging Face owner/name, or the folder or file of a model.")
]
MaxDropFraction = Annotated[
    float, typer.Option(help="Share of near copies from which on the threshold is taken for a mistake.")
]


@app.command("dedup-folder")
def dedup_folder(
    photos: Photos,
    kept: Annotated[str, typer.Option("--out", metavar="KEPT", help="A new folder for the images that stay.")],
    min_similarity: MinSimilarity = None,
    backbone: BackboneName = "pixels",
    max_drop_fraction: MaxDropFraction = 0.5,
    executor: ExecutorName = "serial",
    as_json: AsSummary = False,
) -> None:
    """Copy the images of a folder without near-duplicates; the folder itself is never touched.

    Of every group of copies the one with most pixels stays, under its own name. KEPT/.openlvd has dropped.csv with the
    others, report.html with pictures, and the recipe. Run it again when images were added.
    """
    from pipelines import oneliners

    oneliners.dedup_folder(photos, kept, min_similarity, backbone, max_drop_fraction, executor, as_json)


@app.command("balance-folder")
def balance_folder(
    photos: Photos,
    out: Annotated[str, typer.Option("--out", metavar="SHARDS", help="A new folder or s3:// prefix for the shards.")],
    target: Annotated[int, typer.Option(help="Images in the shards, at most.")],
    min_similarity: MinSimilarity = None,
    backbone: BackboneName = "pixels",
    n_clusters: Annotated[
        str | None,
        typer.Option(metavar="[INT, ...]", help="Clusters of each level, finest first. Default: images / 10, / 100."),
    ] = None,
    max_drop_fraction: MaxDropFraction = 0.5,
    executor: ExecutorName = "serial",
    as_json: AsSummary = False,
) -> None:
    """Make WebDataset shards of a folder: no copies, and every kind of image the same share, as far as it goes.

    SHARDS holds the tars and one set of them: another target or other images need another SHARDS. SHARDS/.openlvd has
    report.html with pictures of the clusters, and the recipe.
    """
    from pipelines import oneliners

    levels = read_value(n_clusters, tuple[int, ...], "--n-clusters", "balance-folder")
    oneliners.balance_folder(
        photos, out, target, min_similarity, backbone, levels, max_drop_fraction, executor, as_json
    )


def root_of(recipe: Recipe, given: str | None) -> Location:
    """The root of a run: the option, or the recipe's own. Raises UserError."""
    if not (given or recipe.root):
        raise UserError("a run needs a root: got none", "give --root FOLDER, or write root: in the recipe")
    return Location(given or recipe.root or "")


def show_results(results: Iterable[StepResult], as_json: bool) -> None:
    """A table on stdout, or one JSON object a step as soon as it is there."""
    seen = []
    for result in results:
        seen.append(result)
        if as_json:
            print(json.dumps(as_plain(result)), flush=True)
    if not as_json:
        Console().print(results_table(seen))


def show_result(result: StepResult, as_json: bool) -> None:
    """The result of one step, what it says of itself, and where it is."""
    show_results([result], as_json)
    if as_json or result.location is None:
        return
    artifact = Artifact(result.location)
    facts = artifact.facts if artifact.is_complete() else {}
    if "verdict" in facts:
        print(f"\n{facts['verdict']}")
    found = [f"{how} {facts[key]:.2%}" for key, how in ACCURACIES.items() if key in facts]
    if found:
        print(f"\naccuracy: {', '.join(found)}")
    print(f"\n{result.location}")


add_crawl_commands(app, show_result)
add_stage_commands(app, show_result, {"train": TRAIN_COMMAND})


def as_plain(result: StepResult) -> dict[str, Any]:
    """A step's result as JSON-able values."""
    location = str(result.location) if result.location else None
    facts = numbers(Artifact(result.location)) if result.location else {}
    return {**asdict(result), "location": location, "seconds": round(result.seconds, 3), "facts": facts}


def numbers(artifact: Artifact) -> dict[str, float]:
    """What a finished step says of its content in plain numbers, such as an accuracy."""
    facts = artifact.facts if artifact.is_complete() else {}
    return {key: value for key, value in facts.items() if isinstance(value, int | float)}


def results_table(results: Iterable[StepResult]) -> Table:
    """Rows in, kept, dropped and bad of every step."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "stage", "state"):
        table.add_column(name)
    for name in (*HEAD_COUNTS, "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        numbers = [f"{r.counts[name]:,}" if name in r.counts else "" for name in HEAD_COUNTS]
        table.add_row(r.name, r.stage, r.state, *numbers, f"{r.seconds:.1f}" if r.seconds else "")
    return table


def main() -> None:
    """The entry point: errors become one sentence, an empty line, a hint, and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is an interrupt like Ctrl-C
    try:
        if app(standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as e:
        stop(f"error: {e.message}", e.hint, 2)
    except typer.TyperException as e:  # a wrong option or command
        stop(f"error: {e.format_message().splitlines()[0]}", "openlvd --help lists commands and options", 2)
    except (typer.Abort, KeyboardInterrupt):
        stop("interrupted", "finished parts are kept; the same command goes on with the rest", INTERRUPTED)
    except TaskError as e:
        stop(f"error: {e}", "finished parts are kept; the same command goes on with the rest", 1)
    except ValueError as e:  # a location or an artifact that is not what it should be
        stop(f"error: {e}", "check the path", 2)
    except ImportError as e:
        stop(f"error: {e}", "install it: pip install 'openlvd[cpu,hf]', or [gpu,hf] beside a GPU", 2)
    except OSError as e:
        stop(f"error: {e}", "finished parts are kept; the same command goes on with the rest", 1)


def stop(message: str, hint: str, code: int) -> None:
    """Say what happened and leave."""
    print(f"{message}\n\nhint: {hint}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
