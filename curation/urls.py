"""One form for all spellings of a URL, so that equal ones can be found by comparing text.

What is changed never changes what a browser asks for, with one exception: parameters that only follow people around
are left out. Anything a server may give a meaning to is kept: the order of parameters, doubled slashes, ``www.``, a
slash at the end, upper case in the path.
"""

import ipaddress
import re
from typing import NamedTuple

import idna
import pyarrow as pa
import pyarrow.compute as pc

DEFAULT_PORTS = {"http": 80, "https": 443, "ftp": 21}  # the schemes whose URLs are understood
TRACKING = frozenset(
    "dclid fbclid gbraid gclid gclsrc igshid mc_cid mc_eid msclkid ttclid twclid wbraid yclid _ga _gl".split()
)  # names of parameters; those that begin with utm_ are meant too
MAX_HOST, MAX_LABEL = 253, 63  # characters of a name in the DNS
MAX_PORT = 65_535

_PARTS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?#]*)([^?#]*)(?:\?([^#]*))?)?", re.DOTALL)
_ENDS = "".join(map(chr, range(0x21)))  # spaces and control characters, which browsers ignore at both ends
_BREAKS = str.maketrans("", "", "\t\r\n")  # and these anywhere
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})|([^!$&-;=?-Z_a-z~\[\]])")  # an escape, or a character that must be escaped
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_PORT = re.compile(r"[0-9]{0,5}")
_LABEL = re.compile(rf"[a-z0-9_-]{{1,{MAX_LABEL}}}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label of this form makes a host an IPv4 address
# Of Arrow's engine, which runs over whole columns: URLs that are in the one form as they are. Names of a path begin
# with no dot, so none of them is "." or "..".
_LABEL_RE = rf"[a-z0-9_](?:[a-z0-9_-]{{0,{MAX_LABEL - 2}}}[a-z0-9_])?"
_PLAIN = (
    rf"^https?://(?P<host>(?:{_LABEL_RE}\.){{1,3}}[a-z]{{2,{MAX_LABEL}}})"  # 4 labels are never more than MAX_HOST + 2
    r"(?:/(?:[A-Za-z0-9_~!$&'()*+,;=:@-][A-Za-z0-9_~!$&'()*+,;=:@.-]*)?)+$"
)


class NormalUrl(NamedTuple):
    """A URL in its one form."""

    url: str
    scheme: str
    host: str  # without port; an IPv6 address stands in brackets


class BadUrl(NamedTuple):
    """Why a text is no URL that could be fetched."""

    reason: str  # "scheme": another than those understood, or none; "bad_url": no host, or one that cannot be
    detail: str


def normal_url(text: str) -> NormalUrl | BadUrl:
    """The one form of a URL; normalising it again changes nothing.

    Scheme and host in lower case; the host in ASCII (punycode of its Unicode name as browsers map it, addresses in
    their short form), without a user, a dot at its end, or the scheme's own port; ``/`` for an empty path, ``.`` and
    ``..`` resolved; escapes in upper case, none for letters, digits and ``-._~``, and one for every other character
    that needs it; no fragment, no empty query, no parameters of ``TRACKING``.
    """
    match = _PARTS.match(text.strip(_ENDS).translate(_BREAKS))
    scheme = match[1].lower() if match else ""
    if match is None or scheme not in DEFAULT_PORTS:
        return BadUrl("scheme", scheme[:20])
    host, colon, port = _split_port((match[2] or "").rpartition("@")[2])
    name = normal_host(host)
    number = port.lstrip("0") or ("0" if port else "")
    if name is None or not _PORT.fullmatch(number) or (number and int(number) > MAX_PORT):
        return BadUrl("bad_url", f"host {host[:MAX_HOST]}{colon}{port[:20]}" if host else "no host")
    at = name if number in ("", str(DEFAULT_PORTS[scheme])) else f"{name}:{number}"
    query = _without_tracking(_escaped(match[4] or ""))
    return NormalUrl(f"{scheme}://{at}{_normal_path(match[3])}{query}", scheme, name)


def normal_urls(texts: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """The one form of every URL of a string array (n,), null where there is none: (url, host, reason), strings (n,).

    A reason is null, "no_url" for null and for empty text, or that of ``BadUrl``. URLs that are in the one form
    already, which most are, are told by one pass of Arrow over the column; only the others cost Python.
    """
    found = pc.extract_regex(texts, _PLAIN)
    plain = pc.and_(pc.is_valid(found), pc.less_equal(pc.binary_length(pc.struct_field(found, 0)), MAX_HOST))
    plain = pc.fill_null(plain, False)
    urls = pc.if_else(plain, texts, pa.scalar(None, pa.string()))
    hosts = pc.if_else(plain, pc.struct_field(found, 0), pa.scalar(None, pa.string()))
    rest = pc.invert(plain)
    made = [_one(text) for text in texts.filter(rest).to_pylist()]
    columns = ([one[i] for one in made] for i in range(3))
    new_urls, new_hosts, reasons = (pa.array(column, pa.string()) for column in columns)
    nothing = pa.nulls(len(texts), pa.string())
    return (
        pc.replace_with_mask(urls, rest, new_urls),
        pc.replace_with_mask(hosts, rest, new_hosts),
        pc.replace_with_mask(nothing, rest, reasons),
    )


def is_public(host: str) -> bool:
    """Whether a host of a ``NormalUrl`` may be one of the internet: no address or name of a network of one's own."""
    address = _address(host)
    if address is not None:
        return address.is_global
    *_, last = labels = host.split(".")
    return len(labels) > 1 and last not in ("localhost", "local", "internal", "lan", "home", "test", "invalid")


def normal_host(host: str) -> str | None:
    """A host in ASCII and lower case, None for one that cannot be. IPv4 addresses are dotted quads and nothing else."""
    if host.startswith("["):
        address = _address(host) if host.endswith("]") and "%" not in host else None
        return f"[{address.compressed}]" if isinstance(address, ipaddress.IPv6Address) else None
    try:
        mapped = idna.uts46_remap(_unescaped(host), std3_rules=False, transitional=False)
        labels = [x if x.isascii() else f"xn--{x.encode('punycode').decode()}" for x in mapped.split(".")]
    except (idna.IDNAError, UnicodeError):
        return None
    if labels[-1] == "":
        labels.pop()
    name = ".".join(labels)
    if not labels or len(name) > MAX_HOST or not all(map(_LABEL.fullmatch, labels)):
        return None
    if _NUMBER.fullmatch(labels[-1]):
        return name if isinstance(_address(name), ipaddress.IPv4Address) else None
    return name


def parents(host: str) -> list[str]:
    """A host and the domains above it, the longest first: ``a.b.c``, ``b.c``, ``c``; an address has none above it."""
    if _address(host) is not None:
        return [host]
    labels = host.split(".")
    return [".".join(labels[i:]) for i in range(len(labels))]


def _one(text: str | None) -> tuple[str | None, str | None, str | None]:
    if not text:
        return None, None, "no_url"
    found = normal_url(text)
    return (None, None, found.reason) if isinstance(found, BadUrl) else (found.url, found.host, None)


def _split_port(at: str) -> tuple[str, str, str]:
    """(host, ":" or "", port); the colons of an IPv6 address are its own."""
    host, colon, port = at.rpartition(":")
    return (host, colon, port) if colon and not port.endswith("]") else (at, "", "")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _unescaped(host: str) -> str:
    """A host without its escapes. Raises UnicodeError when they are no UTF-8."""
    pieces = re.split("((?:%[0-9A-Fa-f]{2})+)", host)
    return "".join(x if i % 2 == 0 else bytes.fromhex(x.replace("%", "")).decode() for i, x in enumerate(pieces))


def _escaped(text: str) -> str:
    return _PERCENT.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    if match[1] is None:
        return "".join(f"%{byte:02X}" for byte in match[2].encode("utf-8", "replace"))
    byte = int(match[1], 16)
    return chr(byte) if byte in _UNRESERVED else f"%{byte:02X}"


def _normal_path(path: str) -> str:
    """A path from the root without ``.`` and ``..``: RFC 3986, 5.2.4, for a path that begins with a slash."""
    kept: list[str] = []
    names = _escaped(path)[1:].split("/")
    for name in names:
        if name == "..":
            del kept[-1:]
        elif name != ".":
            kept.append(name)
    if names[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def _without_tracking(query: str) -> str:
    """``?`` and the parameters that are left, in their order; empty without any."""
    kept = [pair for pair in query.split("&") if pair and not _is_tracking(pair.partition("=")[0].lower())]
    return "?" + "&".join(kept) if kept else ""


def _is_tracking(name: str) -> bool:
    return name in TRACKING or name.startswith("utm_")
