"""The commands ``crawl-table`` and ``fetch``; their options are made from their configs."""

import dataclasses
import inspect
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import typer

from curation.store import Location
from pipelines.commands import (
    Option,
    PanelCommand,
    Show,
    field_option,
    flag,
    parameter,
    place_of,
    read_config,
    set_signature,
)
from pipelines.crawl.fetch import FetchConfig, FetchResources, fetch
from pipelines.crawl.rules import CrawlConfig
from pipelines.crawl.table import STAGE, Engine, crawl_table
from pipelines.engine import StepResult
from pipelines.errors import UserError
from pipelines.progress import StepProgress
from pipelines.recipe import structure

PANEL = "From a crawl to images"
N_TOLD = 5  # reasons why images were not fetched
TABLE_HELP = """Choose what of a table of URLs is worth fetching: rules, one row a URL, caps, mixed by seed.

\b
    openlvd crawl-table crawl/*.parquet --out urls --block-list ads.txt --min-width 256 --max-per-domain 1000

The result has the columns of the table, its URL in one spelling, and url_domain and url_key (md5 of the URL). The
manifest counts the dropped rows by reason. Both engines give the same bytes.
"""
FETCH_HELP = """Fetch the images of a URL table with img2dataset, as WebDataset tars that a pool reads.

\b
    openlvd fetch urls --out images --caption text
    openlvd pool --source images --out runs/pool

Bytes are kept as they came; what is no image is told by the pool. Run it again to go on where it was stopped.
"""
EPILOG = "A finished --out is left as it is."
Config = TypeVar("Config")


def add_crawl_commands(app: typer.Typer, show: Show) -> None:
    """Give ``app`` the two commands; ``show`` prints what came of them."""

    def table_command(**given: Any) -> None:
        show(run_table(given), given["as_json"])

    def fetch_command(**given: Any) -> None:
        show(run_fetch(given), given["as_json"])

    place = Option("out", "--out", str | None, "URI",
                   "where the result goes: a folder or s3://bucket/prefix  [required]", "Run")  # fmt: skip
    folder = place._replace(metavar="FOLDER", help="where the tars go  [required]")
    as_json = Option("as_json", "--json", bool, None, "the result as one JSON object on stdout", "Run")
    block_list = Option("block_list", "--block-list", str | None, "FILE",
                        "domains, one a line, that are dropped with all below them", "Rules")  # fmt: skip
    python = Option("python", "--python", str | None, "FILE", "an interpreter that has img2dataset  [default: this]",
                    "Run")  # fmt: skip
    tables = [*settings(CrawlConfig), block_list, place, as_json, *settings(Engine, "engine")]
    fetches = [*settings(FetchConfig), folder, as_json, python, *settings(FetchResources, "run")]
    for name, command, options, help in (
        (STAGE, table_command, tables, TABLE_HELP),
        ("fetch", fetch_command, fetches, FETCH_HELP),
    ):
        set_signature(command, [sources_parameter(), *map(parameter, options)])
        app.command(name, cls=PanelCommand, help=help, epilog=EPILOG, rich_help_panel=PANEL)(command)


def settings(config: type, owner: str = "") -> Iterator[Option]:
    """An option for every field; ``Engine.name`` is ``--engine``."""
    for one in dataclasses.fields(config):
        panel = {"engine": "Engine", "run": "Run"}.get(owner, "Settings")
        option = field_option(config, one, option_name(one.name), panel)
        yield option._replace(panel=option.panel.partition(", ")[2] or option.panel)


def option_name(field: str) -> str:
    """What the option of a field is called."""
    return {"name": "engine"}.get(field, field)


def sources_parameter() -> inspect.Parameter:
    """The tables, each a place or a pattern."""
    help = "Parquet files, folders, s3:// prefixes or patterns."
    kind = Annotated[list[str], typer.Argument(metavar="TABLE...", help=help, show_default=False)]
    return inspect.Parameter("sources", inspect.Parameter.KEYWORD_ONLY, annotation=kind)


def read_settings(config: type[Config], given: Mapping[str, Any], owner: str) -> Config:
    """A config from the options. Raises UserError."""
    names = [one.name for one in dataclasses.fields(config)]  # type: ignore[arg-type]
    texts = {name: given[option_name(name)] for name in names}
    return structure(config, read_config(config, texts, owner, lambda key: flag(option_name(key))), owner)


def run_table(given: Mapping[str, Any]) -> StepResult:
    """Run ``crawl-table`` as the options say, with progress on stderr. Raises UserError or TaskError."""
    config, engine = read_settings(CrawlConfig, given, STAGE), read_settings(Engine, given, STAGE)
    place, started = needed_place(given), time.monotonic()
    blocked = place_of(given["block_list"]) if given["block_list"] else None
    with StepProgress(quiet=given["as_json"]) as progress:
        artifact, made = crawl_table(
            places(given), config, place, engine, blocked, on_step=progress.start, say=progress.say
        )
    return result_of(place, STAGE, made, artifact.counts, started)


def run_fetch(given: Mapping[str, Any]) -> StepResult:
    """Run ``fetch`` as the options say, with progress on stderr. Raises UserError or TaskError."""
    config, resources = read_settings(FetchConfig, given, "fetch"), read_settings(FetchResources, given, "fetch")
    place, started = needed_place(given), time.monotonic()
    with StepProgress(quiet=given["as_json"]) as progress:
        summary, made = fetch(
            places(given), config, place, resources, given["python"], on_step=progress.start, say=progress.say
        )
        for reason, n in list(summary["reasons"].items())[:N_TOLD]:
            progress.say(f"{n:,} not fetched: {reason}")
    counts = {name: summary[name] for name in ("rows", "kept", "dropped")}
    return result_of(place, "fetch", made, counts, started)


def places(given: Mapping[str, Any]) -> list[Location]:
    """The tables."""
    return [place_of(text) for text in given["sources"]]


def needed_place(given: Mapping[str, Any]) -> Location:
    """Where the result goes. Raises UserError."""
    if given["out"] is None:
        raise UserError("--out must be given: got none", "the result is made there")
    return place_of(given["out"])


def result_of(place: Location, stage: str, made: bool, counts: dict[str, int], started: float) -> StepResult:
    """What is shown."""
    return StepResult(
        place.name, stage, "done" if made else "done before", counts, time.monotonic() - started if made else 0.0, place
    )
