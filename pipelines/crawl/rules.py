"""The rules of ``crawl-table``, and the SQL that carries them out, the same text for every engine.

What a row alone decides about its URL is told by ``pipelines.crawl.scan``. The queries do the rest: minimum size, the
user's expression, one row a URL, the cap of a domain, and the order and part of what is left. An engine runs them one
after the other, each over the tables before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from curation.urls import DEFAULT_PORTS

# Why a row is dropped, in the order in which the reasons are looked at.
REASONS = ("no_url", "scheme", "bad_url", "private_host", "blocked", "small", "rule", "duplicate", "domain_cap")
AT, URL, REASON, PART, ORDER = "crawl_at", "crawl_url", "crawl_reason", "crawl_part", "crawl_order"  # on the way
DOMAIN, KEY = "url_domain", "url_key"  # columns of the result
ORDER_BITS = 40  # of the hash that orders rows; times the number of parts it must fit into int64


@dataclass(frozen=True, kw_only=True)
class CrawlConfig:
    """Which rows of a table of URLs are worth fetching."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    # Columns: what the table calls things
    url: str = "url"  # column with the URL
    width: str = "width"  # column with the width in pixels, if there is one
    height: str = "height"  # column with the height in pixels, if there is one
    domain: str = ""  # column with the registered domain, for max_per_domain; empty: the host without a leading www.
    columns: tuple[str, ...] = ()  # columns to carry along beside those; empty: all
    # Rules: a row goes on that breaks none of them
    schemes: tuple[str, ...] = ("http", "https")  # of http, https, ftp
    private_hosts: bool = False  # whether addresses and names of one's own network may be fetched
    min_width: int = 0  # pixels; a row of unknown width goes on
    min_height: int = 0  # pixels; a row of unknown height goes on
    where: str = ""  # SQL expression over the columns and url_domain; null counts as false; empty: every row
    max_per_domain: int = 0  # rows of one domain, drawn by seed; 0: no limit
    # Result
    part_rows: int = 65_536  # rows of a part on average: a row's part is drawn by seed
    seed: int = 0

    def __post_init__(self) -> None:
        strange = [scheme for scheme in self.schemes if scheme not in DEFAULT_PORTS]
        if strange or not self.schemes:
            known = ", ".join(DEFAULT_PORTS)
            raise ValueError(f"crawl.schemes must be some of {known}: got {', '.join(strange) or 'none'}")
        if not self.url:
            raise ValueError("crawl.url must name a column: got an empty string")
        for name, least in (("min_width", 0), ("min_height", 0), ("max_per_domain", 0), ("part_rows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"crawl.{name} must be at least {least}: got {getattr(self, name)}")


class Dialect(NamedTuple):
    """Where two engines say the same thing in other words."""

    quote: Callable[[str], str]  # a column's name
    number: Callable[[str], str]  # int64 of a text of hexadecimal digits


def judge_query(config: CrawlConfig, columns: list[str], dialect: Dialect) -> str:
    """From ``crawl_rows``: the place, domain, key and first reason of every row."""
    sizes = [(config.width, config.min_width), (config.height, config.min_height)]
    small = [f"{dialect.quote(name)} < {least}" for name, least in sizes if least and name in columns]
    cases = [f"WHEN {REASON} IS NOT NULL THEN {REASON}"]
    cases += [f"WHEN {' OR '.join(small)} THEN 'small'"] if small else []
    cases += [f"WHEN NOT coalesce(({config.where}\n), FALSE) THEN 'rule'"] if config.where else []
    return (
        f"SELECT {AT}, {DOMAIN}, md5({URL}) AS {KEY}, CASE {' '.join(cases)} ELSE NULL END AS {REASON} FROM crawl_rows"
    )


def first_query(config: CrawlConfig, dialect: Dialect) -> str:
    """From ``crawl_judged``: the first row of every URL, with the hash that orders rows, by seed."""
    digits = f"substr(md5(concat('{config.seed} ', {KEY})), 1, {ORDER_BITS // 4})"
    return (
        f"SELECT {KEY}, min({AT}) AS {AT}, min_by({DOMAIN}, {AT}) AS {DOMAIN}, {dialect.number(digits)} AS crawl_order "
        f"FROM crawl_judged WHERE {REASON} IS NULL GROUP BY {KEY}"
    )


def cap_query(config: CrawlConfig) -> str:
    """From ``crawl_first``: of every domain as many rows as it may have."""
    if not config.max_per_domain:
        return f"SELECT {AT}, {KEY}, crawl_order FROM crawl_first"
    places = f"row_number() OVER (PARTITION BY {DOMAIN} ORDER BY crawl_order, {KEY})"
    ranked = f"SELECT {AT}, {KEY}, crawl_order, {places} AS crawl_place FROM crawl_first"
    return f"SELECT {AT}, {KEY}, crawl_order FROM ({ranked}) ranked WHERE crawl_place <= {config.max_per_domain}"


def result_query(config: CrawlConfig, columns: list[str], n_parts: int, dialect: Dialect) -> str:
    """From ``crawl_rows`` and ``crawl_kept``: whole rows, their URL in its one form, with their part; not in order.

    The columns come first and have numbers for names, which need no quotes anywhere.
    """
    names = [f"r.{URL if name == config.url else dialect.quote(name)}" for name in columns]
    whole = "".join(f"{name} AS crawl_{i}, " for i, name in enumerate(names))
    return (
        f"SELECT {whole}r.{DOMAIN}, k.{KEY}, CAST((k.crawl_order * {n_parts}) >> {ORDER_BITS} AS BIGINT) AS {PART}, "
        f"k.crawl_order FROM crawl_rows r JOIN crawl_kept k ON r.{AT} = k.{AT}"
    )


def result_counts(n_rows: int, by_reason: dict[str, int], n_first: int, n_kept: int) -> dict[str, int]:
    """The counts of a table: its rows are those kept, and those dropped for every reason."""
    told = {reason: by_reason.get(reason, 0) for reason in REASONS}
    told["duplicate"] = n_rows - sum(by_reason.values()) - n_first
    told["domain_cap"] = n_first - n_kept
    return {"rows": n_rows, "kept": n_kept, "dropped": n_rows - n_kept, **{k: n for k, n in told.items() if n}}


def parts_of(n_kept: int, part_rows: int) -> int:
    """How many parts a result has."""
    return max(-(-n_kept // part_rows), 1)
