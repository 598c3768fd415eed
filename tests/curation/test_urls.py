import random
import string
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pytest

from curation.urls import BadUrl, NormalUrl, is_public, normal_host, normal_url, normal_urls, parents

SAME = [  # one form a line, then other spellings of it
    ("http://example.com/", "HTTP://EXAMPLE.com", "http://example.com:80", "http://example.com:/", "http://example.com?",
     "http://example.com./#top", " http://example.com/\n", "http://ex\tample.com/", "http://user:pw@example.com/",
     "http://a@b@example.com/", "http://%65xample.com", "http://ＥＸample。com/", "http://example.com/.",
     "http://example.com/a/..", "http://example.com/..", "http://example.com/?&&", "http://example.com/?utm_source=x",
     "http://example.com/?fbclid=1&gclid=2#x", "http://example.com:000080/", "http://example.com/%2E%2e/"),
    ("https://a.b:8443/x?b=2&a=1", "https://a.b:08443/x?b=2&a=1", "https://a.b:8443/x?b=2&UTM_medium=q&a=1",
     "https://a.b:8443/./y/../x?b=2&&a=1&", "https://a.b:8443/x?utm%5Fsource=1&b=2&a=1#?"),
    ("http://a.b/%C3%A9%20~%2F%25zz", "http://a.b/é ~%2f%zz", "http://a.b/%c3%a9%20%7E%2F%25zz"),
    ("http://xn--bcher-kva.de/", "http://bücher.de", "http://BÜCHER.DE", "http://b%C3%BCcher.de", "http://XN--BCHER-KVA.de"),
    ("http://xn--strae-oqa.de/", "http://straße.de"),  # another site than strasse.de
    ("http://xn--i-7iq.ws/", "http://I❤.ws"),
    ("https://[2001:db8::1]/", "https://[2001:DB8:0::0001]:443"),
    ("http://1.2.3.4:8080//x/", "http://1.2.3.4:8080//x/"),
]  # fmt: skip
DIFFERENT = [
    *("http://a.b/", "https://a.b/", "http://www.a.b/", "http://a.b:81/", "http://a.b/A", "http://a.b/a"),
    *("http://a.b/a/", "http://a.b//a", "http://a.b/a?", "http://a.b/?a", "http://a.b/?a=1&b=2", "http://a.b/?b=2&a=1"),
    *("http://a.b/a%2Fb", "http://a.b/a/b", "http://a.b/?q=a+b", "http://a.b/?q=a%20b", "http://a.b/%2525"),
]
BAD = [
    *(
        "",
        "a.b/c",
        "//a.b/c",
        "data:image/png;base64,AA==",
        "mailto:a@b.c",
        "javascript:alert(1)",
        "file:///etc/passwd",
    ),
    *("http:a.b", "http:/a.b", "http://", "http:///x", "http://?x", "http://a..b/", "http://.a/", "http://a b/"),
    *("http://a<b/", "http://a.b:x/", "http://a.b:65536/", "http://a.b:1²/", "http://a.b:99999999999999999999/"),
    *("http://[::1/", "http://[1.2.3.4]/", "http://[fe80::1%25eth0]/", "http://127.1/", "http://0x7f.0.0.1/"),
    *("http://2130706433/", "http://1.2.3.4.5/", "http://a%2fb.c/", "http://%ff.c/", "http://%zz.c/"),
    *(f"http://{'a' * 64}.b/", f"http://{'a.' * 127}b/", "http://a\x00.b/", "http:\\\\a.b\\c"),
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_url_have_one_form(spellings):
    for spelling in spellings:
        found = normal_url(spelling)
        assert isinstance(found, NormalUrl) and found.url == spellings[0], spelling


def test_what_a_server_may_tell_apart_stays_apart():
    found = {normal_url(url).url for url in DIFFERENT}
    assert len(found) == len(DIFFERENT) - 1  # "a?" is "a"


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_fetched_is_told(text):
    found = normal_url(text)
    assert isinstance(found, BadUrl)
    assert found.reason == ("bad_url" if text.startswith("http:") else "scheme")


def nasty_url(rng: random.Random) -> str:
    pieces = ["%", "%2e", "%2E%2e", "..", ".", "/", "//", "?", "&", "=", "#", "@", ":", "[", "]", " ", "é", "日本",
              "\x00", "\u200d", "%C3%A9", "%ff", "%41", "utm_x=1", "fbclid", "+", "\\", "a", "B", "1", "a.b", "\n",
              "ß", "🐟", "%4", "xn--"]  # fmt: skip
    start = rng.choice(
        ["http://", "HTTPS://", "http://a.b", "https://a.b/", "http://Ex.com:80/", "http:/", "ftp://", ""]
    )
    return start + "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("seed", range(20))
def test_the_form_is_a_url_of_the_same_meaning_and_its_own_form(seed):
    rng = random.Random(seed)
    seen = 0
    for _ in range(1000):
        text = nasty_url(rng)
        found = normal_url(text)
        if isinstance(found, NormalUrl):
            seen += 1
            assert normal_url(found.url) == found, text
            assert found.url.isascii() and found.url.isprintable() and " " not in found.url
            parts = urlsplit(found.url)
            assert (parts.scheme, parts.hostname) == (found.scheme, found.host.strip("[]"))
            assert parts.fragment == "" and parts.path.startswith("/") and parts.username is None
            assert not {".", ".."} & set(parts.path.split("/"))
    assert seen > 100


@pytest.mark.parametrize("seed", range(20))
def test_paths_and_queries_keep_their_meaning(seed):
    """Python's own splitting and unquoting as the oracle."""
    rng = random.Random(seed)
    letters = string.ascii_letters + string.digits + "é日 %\"'<>|~!$&()*+,;=:@-_"
    for _ in range(200):
        path = "/" + "/".join("".join(rng.choice(letters) for _ in range(rng.randrange(1, 6))) for _ in range(3)) + "x"
        before, after = urlsplit("http://a.b" + path), urlsplit(normal_url("http://a.b" + path).url)
        assert unquote(after.path) == unquote(before.path)


@pytest.mark.parametrize("seed", range(10))
def test_whole_columns_are_as_one_by_one(seed):
    rng = random.Random(seed)
    plain = ["http://a.b/c.jpg", "https://cdn.ex.co.uk/a_b/C-1,2/x.y.jpg", "https://a.b//", "http://a.b/x/.y", "http://a.b",
             "http://a.b./x", "http://-a.b/x", "http://a-.b/x", "http://1.2.3.4/x", "http://a.b/x/..", "http://A.b/x",
             f"http://{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 63}/x", f"http://{'a' * 63}.bb/x", "http://localhost/x",
             "http://a.b/x\n", "http://a.b/x?y", "http://a.b/%41", "http://a.b1/x", "http://a.b.c.d.e/x"]  # fmt: skip
    texts = [rng.choice([None, "", nasty_url(rng), rng.choice(plain)]) for _ in range(500)] + plain
    urls, hosts, reasons = normal_urls(pa.array(texts, pa.string()))
    for text, *found in zip(texts, urls.to_pylist(), hosts.to_pylist(), reasons.to_pylist(), strict=True):
        one = normal_url(text or "")
        if not text:
            assert found == [None, None, "no_url"]
        elif isinstance(one, BadUrl):
            assert found == [None, None, one.reason]
        else:
            assert found == [one.url, one.host, None]


def test_no_rows():
    assert [len(column) for column in normal_urls(pa.array([], pa.string()))] == [0, 0, 0]


def test_hosts_of_ones_own_network():
    private = ["localhost", "a.localhost", "intranet", "nas.local", "127.0.0.1", "10.1.2.3", "169.254.169.254",
               "[::1]", "[fe80::1]", "192.168.0.1", "0.0.0.0", "[::ffff:127.0.0.1]"]  # fmt: skip
    assert [host for host in private if is_public(host)] == []
    assert all(map(is_public, ["a.b", "8.8.8.8", "[2606:4700::1111]", "localhost.example.com"]))


def test_domains_above_a_host():
    assert parents("a.b.c") == ["a.b.c", "b.c", "c"]
    assert parents("1.2.3.4") == ["1.2.3.4"] and parents("[::1]") == ["[::1]"]


def test_hosts_of_block_lists_are_normalised_alike():
    assert normal_host("BÜCHER.de.") == "xn--bcher-kva.de"
    assert [normal_host(text) for text in ("", "a b", "*.a.b", "http://a.b")] == [None] * 4
