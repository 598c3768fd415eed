"""``crawl-table``: what of a table of URLs is worth fetching; the manifest of the result counts why the rest is not."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from curation.artifact import Artifact, FileInfo, finish, part_name, write_table
from curation.listing import file_at, list_source
from curation.store import Entry, Location
from curation.urls import normal_host
from pipelines.crawl.local import check_where, run_local
from pipelines.crawl.rules import CrawlConfig, parts_of
from pipelines.crawl.scan import FILE_BITS, Scan, read_schema, table_schema
from pipelines.crawl.spark import run_spark
from pipelines.engine import FINGERPRINT, drop_scratch
from pipelines.errors import UserError
from pipelines.fingerprint import config_values, content_id
from pipelines.lock import lock_root
from pipelines.stage import SCRATCH

STAGE = "crawl-table"
VERSION = 1  # raised when the bytes of a result change for equal input


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Who does the work; nothing here changes a byte of the result."""

    name: str = "duckdb"  # duckdb (this machine) or spark
    master: str = "local[*]"  # of Spark: local[CORES], spark://HOST:PORT, yarn, k8s://...
    memory: str | None = None  # such as 8GB: of duckdb, or of Spark's driver; without it their own defaults
    scratch: str | None = None  # a folder for what duckdb puts on disk; without it that for temporary files

    def __post_init__(self) -> None:
        if self.name not in ("duckdb", "spark"):
            raise ValueError(f"--engine must be duckdb or spark: got {self.name!r}")


@dataclass(frozen=True)
class Table:
    """A table of URLs as it is outside."""

    files: tuple[Location, ...]
    entries: tuple[Entry, ...]  # of the files, names relative to what was given


def find_table(sources: Sequence[Location]) -> Table:
    """The Parquet files of a table: those in folders or prefixes, by patterns, or by name, in that order.

    A file is taken once. Raises UserError when a source has none.
    """
    found: dict[str, tuple[Location, Entry]] = {}
    for source in sources:
        try:
            listing = list_source(source)
        except FileNotFoundError as e:
            raise UserError(f"crawl-table: {e}", "check the path; it is relative to where the command runs") from e
        entries = [entry for entry in listing.entries if entry.name.lower().endswith(".parquet")]
        if not entries:
            raise UserError(f"{source} must have Parquet files: got none", "their names end in .parquet")
        for entry in entries:
            at = file_at(listing.root, entry.name).resolved()
            found.setdefault(at.uri, (at, entry))
    if len(found) >= 1 << FILE_BITS:
        raise UserError(f"a table must have less than {1 << FILE_BITS} files: got {len(found)}", "join some of them")
    return Table(tuple(at for at, _ in found.values()), tuple(entry for _, entry in found.values()))


def read_block_list(location: Location) -> frozenset[str]:
    """The domains of a text file, one a line, ``#`` begins a comment. Raises UserError for a line that is none."""
    try:
        lines = location.read().decode().splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as e:
        raise UserError(f"--block-list must be a text file: got {location}", "one domain a line") from e
    domains = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        domain = normal_host(text) if text else ""
        if domain is None:
            raise UserError(
                f"--block-list must have a domain a line: got {text!r} in line {number} of {location}",
                "write example.com for it and all below it",
            )
        domains.add(domain)
    return frozenset(domains - {""})


def crawl_table(
    sources: Sequence[Location],
    config: CrawlConfig,
    place: Location,
    engine: Engine,
    block_list: Location | None = None,
    on_step: Callable[[str, str], Callable[[int, int], None]] = lambda name, stage: lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Artifact, bool]:
    """The result at ``place``, and whether it was made now: what is there of the same table and rules is left as it is.

    Raises UserError, also when something else is at ``place``; ValueError for a file that is not what it should be.
    """
    place = place.resolved()
    table = find_table(sources)
    for at in (source.resolved() for source in sources):
        if f"{place}/".startswith(f"{at.uri.rstrip('/')}/"):
            raise UserError(f"{place} must not be in the table: got {at}", "choose another --out")
    blocked = frozenset() if block_list is None else read_block_list(block_list)
    schema = table_schema(config, read_schema(table.files[0]))
    scan = Scan(config, tuple(at.uri for at in table.files), schema, blocked)
    check_where(scan)
    head = {
        "stage": STAGE,
        "version": VERSION,
        "config": {
            **config_values(config),
            "block_list": hashlib.sha256("\n".join(sorted(blocked)).encode()).hexdigest(),
        },
        "found": content_id([list(entry) for entry in table.entries]),
    }
    fingerprint = content_id(head)[:16]
    check_place(place, fingerprint)
    artifact = Artifact(place)
    with lock_root(place, say):
        check_place(place, fingerprint)
        made = not artifact.is_complete()
        if made:
            (place / SCRATCH / FINGERPRINT).write(fingerprint.encode())
            place.sweep()
            progress = on_step(place.name, STAGE)
            if engine.name == "spark":
                files, counts = run_spark(scan, place, engine.master, engine.memory, progress)
            else:
                files, counts = run_local(scan, place, engine.memory, engine.scratch, progress)
            files += empty_parts(files, parts_of(counts["kept"], config.part_rows), place, scan.result_schema)
            if sum(file.rows for file in files) != counts["kept"]:
                raise UserError(f"the files of {sources[0]} must stay as they are: they changed", "run it again")
            known = {"inputs": {}, "locations": {}, "counts": counts, "facts": {"blocked_domains": len(blocked)}}
            finish(place, files, {**head, "fingerprint": fingerprint, **known})
        drop_scratch(artifact)
    return artifact, made


def empty_parts(files: Sequence[FileInfo], n_parts: int, out: Location, schema: pa.Schema) -> list[FileInfo]:
    """The parts into which no row fell."""
    there = {file.name for file in files}
    missing = [name for name in map(part_name, range(n_parts)) if name not in there]
    return [write_table(out / name, schema.empty_table()) for name in missing]


def check_place(place: Location, fingerprint: str) -> None:
    """A place for a result is empty (hidden files aside) or holds this very one, or its beginning. Raises UserError."""
    artifact, begun = Artifact(place), place / SCRATCH / FINGERPRINT
    if artifact.is_complete():
        found = str(artifact.manifest.get("fingerprint"))
    elif begun.exists():
        found = begun.read().decode()
    else:
        others = [entry.name for entry in place.list() if not entry.name.startswith(".")] if place.is_folder() else []
        if others:
            raise UserError(
                f"{place} must be empty: got {len(others)} files, first {others[0]}", "choose another --out"
            )
        return
    if found != fingerprint:
        raise UserError(
            f"{place} must be empty or of this table and these rules: got a result of others, fingerprint {found} and "
            f"not {fingerprint}",
            "choose another --out",
        )
