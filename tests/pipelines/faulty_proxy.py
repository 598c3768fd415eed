"""An HTTP proxy in front of an S3 server that spoils a share of the answers, as networks and stores do, and counts it.

Which answers are spoilt, and how, is drawn from a seed; every kind comes once before any comes again.
"""

import http.client
import random
import threading
import time
from collections import Counter, deque
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

KINDS = (
    "dropped",  # the connection closes, and the server never heard of the request
    "lost",  # the server has done what it was asked for, and the connection closes without an answer
    "stalled",  # the same, and the answer comes when nobody waits for it any more
    "delayed",  # the answer comes late
    "cut",  # the head is right, and the body ends before the length that it says
    "beheaded",  # the connection closes within the head, after a whole line
    "failed",  # the server has done what it was asked for, and says 500
    "refused",  # the server never heard of the request, and 503 SlowDown is the answer
)
UNHEARD = ("dropped", "refused")
OF_CONNECTIONS = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}  # not passed on
ERROR = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>by the proxy</Message></Error>'


class Answer(NamedTuple):
    """What a server says."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def head(self) -> list[bytes]:
        """The lines before the body."""
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in self.headers), ""]
        return [f"{line}\r\n".encode("latin-1") for line in lines]


def error(status: int, reason: str, code: str) -> Answer:
    """An answer of S3 that something went wrong, which may come right."""
    body = ERROR.format(code).encode()
    return Answer(status, reason, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)


class FaultyProxy:
    """The proxy, from construction to ``stop``.

    ``share`` of the answers are spoilt; ``next_faults`` come first. ``done`` counts the faults by kind and, as
    "requests", everything that was asked; ``asked`` are the methods and paths.
    """

    def __init__(self, endpoint: str, share: float, seed: int = 0, delay_s: float = 0.1, stall_s: float = 1.0) -> None:
        self.behind = urlsplit(endpoint)
        self.share, self.delay_s, self.stall_s = share, delay_s, stall_s
        self.done: Counter[str] = Counter()
        self.spoilt: list[tuple[str, str, str]] = []  # kind, method and path
        self.next_faults: deque[str | None] = deque()  # None: a good answer
        self.dies_after: int | None = None  # requests, from which on the endpoint is gone
        self.writing = (
            threading.Lock()
        )  # moto looks at the condition of a write before it writes, and may be interrupted
        self._rng, self._lock, self._deck = random.Random(seed), threading.Lock(), list[str]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """What ``AWS_ENDPOINT_URL`` is to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Close the port: nobody answers there any more."""
        self._server.shutdown()
        self._server.server_close()

    def is_gone(self) -> bool:
        """Whether the endpoint has died."""
        return self.dies_after is not None and self.done["requests"] > self.dies_after

    def draw(self, method: str, path: str) -> str | None:
        """What happens to the next request; None: nothing bad. Only what may have a body can be cut."""
        with self._lock:
            self.done["requests"] += 1
            if self.next_faults:
                kind = self.next_faults.popleft()
            elif self._rng.random() >= self.share:
                return None
            else:
                if not set(self._deck) - {"cut"}:  # a cut that fits nothing must not keep the others waiting
                    self._deck += self._rng.sample(KINDS, len(KINDS))
                fits = (kind for kind in self._deck if kind != "cut" or method in ("GET", "POST"))
                kind = next(fits)
                self._deck.remove(kind)
            if kind is not None:
                self.done[kind] += 1
                self.spoilt.append((kind, method, path))
            return kind

    def somewhere(self, n: int) -> int:
        """A place in [0, n)."""
        with self._lock:
            return self._rng.randrange(n)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.proxy: FaultyProxy = self.server.proxy  # type: ignore[attr-defined]
        behind = self.proxy.behind
        self.upstream = http.client.HTTPConnection(behind.hostname or "", behind.port)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def relay(self) -> None:
        """One request, and what becomes of its answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.proxy.draw(self.command, self.path)
        if self.proxy.is_gone() or kind == "dropped":
            self.close_connection = True
            return
        if kind == "refused":
            self.say(error(503, "Slow Down", "SlowDown"))
            return
        with self.proxy.writing if self.command == "PUT" else nullcontext():
            answer = self.ask(body)
        if kind == "failed":
            answer = error(500, "Internal Server Error", "InternalError")
        try:
            self.spoil(answer, kind)
        except OSError:  # nobody waits for it any more
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay

    def ask(self, body: bytes) -> Answer:
        """What the server says."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_CONNECTIONS}
        for last in (False, True):
            try:
                self.upstream.request(self.command, self.path, body or None, headers)
                got = self.upstream.getresponse()
                break
            except (http.client.RemoteDisconnected, ConnectionError):  # it had closed an idle connection
                self.upstream.close()
                if last:
                    raise
        data = got.read()
        kept = [(name, value) for name, value in got.getheaders() if name.lower() not in OF_CONNECTIONS]
        if self.command != "HEAD" and got.status not in (204, 304):
            kept = [(name, value) for name, value in kept if name.lower() != "content-length"]
            kept.append(("Content-Length", str(len(data))))
        return Answer(got.status, got.reason, kept, data)

    def spoil(self, answer: Answer, kind: str | None) -> None:
        """Give an answer, or what is left of it."""
        if kind in ("stalled", "delayed"):
            time.sleep(self.proxy.stall_s if kind == "stalled" else self.proxy.delay_s)
        if kind in ("lost", "stalled", "cut", "beheaded"):
            self.close_connection = True
        if kind == "beheaded":
            lines = answer.head()[:-1]
            self.wfile.write(b"".join(lines[: 1 + self.proxy.somewhere(len(lines))]))
        elif kind == "cut" and answer.body:
            self.wfile.write(b"".join(answer.head()) + answer.body[: self.proxy.somewhere(len(answer.body))])
        elif kind not in ("lost", "cut"):
            self.say(answer)

    def say(self, answer: Answer) -> None:
        """Give an answer as it is."""
        body = b"" if self.command == "HEAD" else answer.body
        self.wfile.write(b"".join(answer.head()) + body)
