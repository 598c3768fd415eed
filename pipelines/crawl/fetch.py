"""``fetch``: the images of a URL table, as WebDataset tars for ``pool``, downloaded by the img2dataset library.

img2dataset works in a hidden folder of the result. A tar moves out of it when it is whole, so what one sees is whole
at any time; a run that was stopped goes on at the tars that are missing. Bytes are kept as they came: what is no image
is told by ``pool``.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.artifact import Counts, add_counts
from curation.store import Location
from pipelines.crawl import fetch_job
from pipelines.crawl.table import Table, find_table
from pipelines.errors import TaskError, UserError
from pipelines.fingerprint import config_values, content_id
from pipelines.lock import lock_root

WORK, SUMMARY, LOG = ".img2dataset", "fetched.json", "img2dataset.log"
SETTINGS, TABLE = "fetch.settings", "table"  # in the hidden folder, where img2dataset takes *.json for its own
LOOK_EVERY_S = 0.5
PATTERNS = "*?[]"  # characters that img2dataset takes for a pattern in a path
OWN = frozenset("key caption url width height original_width original_height status error_message exif md5 sha256 "
                "sha512".split())  # fmt: skip  # what img2dataset says of an image under its own names
QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # libraries of img2dataset that call home


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are asked for, and what is kept beside them."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    url: str = "url"  # column with the URL
    caption: str = ""  # column with the caption, kept as KEY.txt; empty: none
    timeout: int = 10  # seconds without an answer after which an image is given up
    retries: int = 1  # further tries of an image
    shard_rows: int = 10_000  # URLs of a tar
    user_agent: str = ""  # a name for the header User-Agent, with which sites address their robot rules; empty: none
    refused_by: tuple[str, ...] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
    )  # X-Robots-Tag values that are obeyed

    def __post_init__(self) -> None:
        for name, least in (("timeout", 1), ("retries", 0), ("shard_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"fetch.{name} must be at least {least}: got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class FetchResources:
    """Speed only."""

    processes: int = 0  # 0: one a core
    threads: int = 64  # downloads at a time in a process

    def __post_init__(self) -> None:
        if self.processes < 0 or self.threads < 1:
            raise ValueError(f"fetch needs processes >= 0 and threads >= 1: got {self.processes} and {self.threads}")


def fetch(
    sources: Sequence[Location],
    config: FetchConfig,
    out: Location,
    resources: FetchResources,
    python: str | None = None,
    on_step: Callable[[str, str], Callable[[int, int], None]] = lambda name, stage: lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], bool]:
    """Fetch the images of a table to the folder ``out``; returns the summary, and whether anything was done now.

    ``python`` is an interpreter that has img2dataset, if this one has not. Raises UserError, or TaskError when some
    tars could not be made; the next run goes on.
    """
    interpreter = find_python(python)
    out = out.resolved()
    table = find_table(sources)
    check_paths(table, out)
    digest = content_id({"config": config_values(config), "found": [list(entry) for entry in table.entries]})
    with lock_root(out, say):
        work = out.path / WORK
        check_same(out.path, work, digest)
        if (out.path / SUMMARY).exists():
            return json.loads((out.path / SUMMARY).read_bytes()), False
        n_shards = link_table(table, config, work)
        settings = job_settings(table, config, resources, work, n_shards)
        run_job(interpreter, settings, out.path, n_shards, on_step(out.name, "fetch"))
        summary = summarise(work)
        Location(str(out.path / SUMMARY)).write((json.dumps(summary, indent=1) + "\n").encode())
    return summary, True


def find_python(python: str | None) -> str:
    """An interpreter that has img2dataset. Raises UserError."""
    hint = "pip install 'openlvd[crawl]', or into an environment of its own and --python ENV/bin/python"
    if python is None:
        if find_spec("img2dataset") is None:
            raise UserError("fetch must find img2dataset: this Python has none", hint)
        return sys.executable
    try:
        found = subprocess.run(
            [python, "-c", "import img2dataset"], check=False, capture_output=True, env=environment()
        )
    except OSError as e:
        raise UserError(f"--python must be an interpreter: got {python}", hint) from e
    if found.returncode:
        last = (found.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        raise UserError(f"--python must have img2dataset: got {python}: {last}", hint)
    return python


def environment() -> dict[str, str]:
    """Of the job: ours, with libraries kept from calling home."""
    return {**os.environ, **QUIET}


def check_paths(table: Table, out: Location) -> None:
    """Files and folders are local, of names that img2dataset reads as they are. Raises UserError."""
    distant = [at for at in (out, *table.files) if not at.is_local]
    if distant:
        raise UserError(f"fetch must read and write on a disk: got {distant[0]}", "copy the table, then the tars")
    if set(PATTERNS) & set(out.uri):
        raise UserError(f"--out must have none of {PATTERNS} in its path: got {out}", "choose another --out")


def check_same(out: Path, work: Path, digest: str) -> None:
    """A folder is empty (hidden files aside) or has the beginning of this very fetch. Raises UserError."""
    if (work / SETTINGS).exists():
        found = json.loads((work / SETTINGS).read_bytes()).get("digest")
        if found != digest:
            raise UserError(
                f"{out} must be of this table and these settings: got another fetch", "choose another --out"
            )
        return
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others:
        raise UserError(f"{out} must be empty: got {len(others)} files, first {others[0]}", "choose another --out")
    Location(str(work / SETTINGS)).write(json.dumps({"digest": digest}).encode())


def link_table(table: Table, config: FetchConfig, work: Path) -> int:
    """Put the files where img2dataset looks for them, in order; returns how many tars they make. Raises UserError."""
    folder = work / TABLE
    folder.mkdir(parents=True, exist_ok=True)
    n_shards = 0
    for index, at in enumerate(table.files):
        check_urls(at, config)
        with pq.ParquetFile(at.path) as file:
            n_shards += -(-file.metadata.num_rows // config.shard_rows)
        link = folder / f"{index:07d}.parquet"
        link.unlink(missing_ok=True)
        link.symlink_to(at.path)
    return n_shards


def check_urls(at: Location, config: FetchConfig) -> None:
    """Every URL leads to the web: the downloader would open file:/// too. Raises UserError."""
    columns = [name for name in (config.url, config.caption) if name]
    try:
        with pq.ParquetFile(at.path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                found = ", ".join(file.schema_arrow.names)
                raise UserError(f"{at} must have column {missing[0]}: got {found}", "name it with --url or --caption")
            for batch in file.iter_batches(columns=[config.url]):
                urls = batch.column(0).cast(pa.string())
                bad = urls.filter(pc.invert(pc.fill_null(pc.match_substring_regex(urls, "^https?://"), False)))
                if len(bad):
                    raise UserError(f"URLs must begin with http:// or https://: got {bad[0]} in {at}",
                                    "openlvd crawl-table leaves such rows out")  # fmt: skip
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{at} must be a Parquet file: {e}") from e


def job_settings(
    table: Table, config: FetchConfig, resources: FetchResources, work: Path, n_shards: int
) -> dict[str, Any]:
    """The arguments of ``img2dataset.download``."""
    schema = pq.read_schema(table.files[0].path)
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_boolean)  # what JSON can hold
    fit = [one.name for one in schema if any(is_kind(one.type) for is_kind in kinds)]
    return {
        "url_list": str(work / TABLE),
        "input_format": "parquet",
        "url_col": config.url,
        "caption_col": config.caption or None,
        "save_additional_columns": [name for name in fit if name not in OWN | {config.url, config.caption}],
        "output_folder": str(work),
        "output_format": "webdataset",
        "resize_mode": "no",
        "disable_all_reencoding": True,  # original bytes
        "extract_exif": False,
        "compute_hash": "sha256",
        "number_sample_per_shard": config.shard_rows,
        "oom_shard_count": max(5, len(str(n_shards))),
        "timeout": config.timeout,
        "retries": config.retries,
        "user_agent_token": config.user_agent or None,
        "disallowed_header_directives": list(config.refused_by),
        "processes_count": resources.processes or os.cpu_count() or 1,
        "thread_count": resources.threads,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }


def run_job(
    python: str, settings: Mapping[str, Any], out: Path, n_shards: int, progress: Callable[[int, int], None]
) -> None:
    """Run img2dataset until every tar is there; what is whole moves out while it works. Raises TaskError."""
    work = out / WORK
    drop_spoilt(work)
    with open_job(python, settings, out) as job:
        while job.poll() is None:
            progress(publish(work, out), n_shards)
            with suppress(subprocess.TimeoutExpired):
                job.wait(LOOK_EVERY_S)
    done = publish(work, out)
    progress(done, n_shards)
    if job.returncode or done != n_shards:
        raise TaskError(f"at fetch: img2dataset ended with {done} of {n_shards} tars, code {job.returncode}; "
                        f"what it said is in {work / LOG}")  # fmt: skip


@contextmanager
def open_job(python: str, settings: Mapping[str, Any], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of img2dataset, with a process group of its own, of which nothing is left afterwards."""
    with (out / WORK / LOG).open("ab") as log:
        job = subprocess.Popen(
            [python, fetch_job.__file__], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            env=environment(),
        )  # fmt: skip
        try:
            assert job.stdin is not None
            with suppress(BrokenPipeError), job.stdin as pipe:  # it says itself, in the log, why it does not listen
                pipe.write(json.dumps(settings).encode())
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def stats_files(work: Path) -> list[Path]:
    """What img2dataset writes of a tar when it is whole."""
    return sorted(work.glob("*_stats.json"))


def drop_spoilt(work: Path) -> None:
    """Remove the marks that a killed run left half written: their tars are made again."""
    for path in stats_files(work):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.unlink()


def publish(work: Path, out: Path) -> int:
    """Move the tars that are whole to where one sees them; returns how many there are."""
    stats = stats_files(work)
    for path in stats:
        tar = path.name.replace("_stats.json", ".tar")
        with suppress(FileNotFoundError):  # it is there already
            (work / tar).replace(out / tar)
    return len(stats)


def summarise(work: Path) -> dict[str, Any]:
    """The counts of a finished fetch, and how often what went wrong, as img2dataset tells it."""
    found = [json.loads(path.read_bytes()) for path in stats_files(work)]
    counts: Counts = add_counts(
        {"rows": one["count"], "kept": one["successes"], "dropped": one["count"] - one["successes"]} for one in found
    )
    reasons = add_counts(one["status_dict"] for one in found)
    reasons.pop("success", None)
    return {**counts, "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))}
