"""Random tables of nasty URLs, and what is to become of them, by the definition, row after row."""

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.artifact import Artifact, read_table
from curation.urls import BadUrl, is_public, normal_url, parents
from pipelines.crawl.rules import CrawlConfig

HOSTS = [
    *("a.com", "www.a.com", "A.com.", "b.org", "x.b.org", "notb.org", "ads.net", "localhost", "10.0.0.1"),
    *("bücher.de", "xn--bcher-kva.de", "u:p@c.io:80", "c.io", "www.com"),
]
PATHS = [
    "/",
    "",
    "/./",
    "/é",
    "/%C3%A9",
    "/a.jpg",
    "/A.jpg",
    "/a.jpg?utm_source=1",
    "/a.jpg#x",
    "/b c",
    "/'\"`",
    "/%zz",
]
ODD = [
    None,
    "",
    "no url",
    "data:image/png;base64,AA",
    "http://",
    "http://a..b/",
    "ftp://c.io/x",
    "file:///etc/passwd",
    "\x00",
]
BLOCKED = "# ads\nads.net\nB.org # and below\n\nbücher.de\n"


def nasty_table(seed: int, n_rows: int) -> pa.Table:
    """Rows of many duplicates, of sizes that are unknown, not numbers, or too small."""
    rng = np.random.default_rng(seed)

    def url() -> str | None:
        if rng.random() < 0.1:
            return ODD[rng.integers(len(ODD))]
        scheme = ["http://", "https://", "HTTP://"][rng.integers(3)]
        number = f"/{rng.integers(n_rows // 4)}" if rng.random() < 0.7 else ""
        return scheme + HOSTS[rng.integers(len(HOSTS))] + number + PATHS[rng.integers(len(PATHS))]

    def some(values: list) -> list:
        return [values[i] for i in rng.integers(len(values), size=n_rows)]

    return pa.table({
        "text": pa.array(some(["", None, "it's", "日本 🐟", 'a "b" \\ \n', "x\x00y"]), pa.large_string()),
        "url": pa.array([url() for _ in range(n_rows)]),
        "width": pa.array(some([None, 0, 10, 64, 224, 500]), pa.int32()),
        "height": pa.array(some([None, float("nan"), 10.0, 64.0, 224.5, 500.0]), pa.float64()),
        "Odd `na\"me": pa.array(some([0, 1, 255]), pa.uint8()),
        "score": pa.array(some([None, 0.0, -0.0, 0.1, float("inf"), float("nan")]), pa.float32()),
        "raw": pa.array(some([None, b"", b"\x00\xff"]), pa.binary()),
        "ok": pa.array(some([None, True, False])),
        "at": pa.array(some([None, 0, 1_700_000_000_123_456_789]), pa.timestamp("ns", "America/New_York")),
        "day": pa.array(some([None, 0, 20_000]), pa.date32()),
        "site": pa.array(some([None, "", "One", " one ", "two"])).dictionary_encode(),
        "row": pa.array(range(n_rows), pa.int64()),
    })  # fmt: skip


def write_files(table: pa.Table, folder: Path, n_files: int) -> None:
    """The rows in several files with several row groups, in the order of their names."""
    folder.mkdir(parents=True)
    cuts = np.linspace(0, table.num_rows, n_files + 1).astype(int)
    for i, (start, stop) in enumerate(pairwise(cuts)):
        pq.write_table(table.slice(start, stop - start), folder / f"{i} é%20[x].parquet", row_group_size=37)


def expected(table: pa.Table, config: CrawlConfig, blocked: set[str], where=lambda row: True) -> tuple[list[int], dict]:
    """(numbers of the rows that are kept, in order; counts), by the definition."""
    reasons: Counter[str] = Counter()
    first: dict[str, tuple[str, int]] = {}  # URL -> (domain, row)
    # Without the times: a Python datetime holds no nanoseconds.
    for i, row in enumerate(table.drop_columns("at").to_pylist()):
        found = normal_url(row["url"] or "")
        sizes = [(row["width"], config.min_width), (row["height"], config.min_height)]
        if not row["url"]:
            reason = "no_url"
        elif isinstance(found, BadUrl):
            reason = found.reason
        elif found.scheme not in config.schemes:
            reason = "scheme"
        elif not config.private_hosts and not is_public(found.host):
            reason = "private_host"
        elif set(parents(found.host)) & blocked:
            reason = "blocked"
        elif any(least and size is not None and size < least for size, least in sizes):
            reason = "small"
        elif not where(row):
            reason = "rule"
        elif found.url in first:
            reason = "duplicate"
        else:
            site = (row[config.domain] or "").strip().lower() if config.domain else ""
            host = found.host
            first[found.url] = (site or (host[4:] if host.startswith("www.") and len(host) > 4 else host), i)
            continue
        reasons[reason] += 1
    kept, used = [], Counter()
    for _, (domain, i) in sorted(first.items(), key=lambda item: order_of(item[0], config.seed)):
        used[domain] += 1
        if not config.max_per_domain or used[domain] <= config.max_per_domain:
            kept.append(i)
    reasons["domain_cap"] = len(first) - len(kept)
    counts = {"rows": table.num_rows, "kept": len(kept), "dropped": table.num_rows - len(kept)}
    return kept, counts | {reason: n for reason, n in reasons.items() if n}


def order_of(url: str, seed: int) -> tuple[str, str]:
    """Where a URL stands among others: a hash of the seed and of its key."""
    key = hashlib.md5(url.encode()).hexdigest()
    return hashlib.md5(f"{seed} {key}".encode()).hexdigest()[:10], key


def result_of(artifact: Artifact) -> pa.Table:
    """All rows of a result, in order."""
    return pa.concat_tables(read_table(artifact.part(i)) for i in range(len(artifact.parts)))
