"""The store on an S3 whose answers are spoilt, against a dictionary; and what an endpoint that is gone costs."""

import hashlib
import os
import socket
import threading
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from botocore.exceptions import ClientError, FlexibleChecksumError
from faulty_proxy import KINDS, FaultyProxy
from urllib3.exceptions import SSLError

from curation import s3 as requests
from curation.store import Conflict, Location, RangeFile, client

SHARE = 0.2
PIECE = 5 << 20  # the least that S3 takes


@pytest.fixture
def behind(s3, on_s3, monkeypatch) -> Callable[..., FaultyProxy]:
    """Puts a proxy between the store and its endpoint."""
    proxies, endpoint = list[FaultyProxy](), os.environ["AWS_ENDPOINT_URL"]

    def put(share: float = 0.0, seed: int = 0, timeout_s: float = 0.4) -> FaultyProxy:
        proxies.append(FaultyProxy(endpoint, share, seed, delay_s=timeout_s / 4, stall_s=timeout_s * 1.5))
        monkeypatch.setenv("OPENLVD_S3_TIMEOUT_S", str(timeout_s))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        client.cache_clear()
        return proxies[-1]

    monkeypatch.setattr(requests, "FIRST_WAIT_S", 0.005)
    monkeypatch.setattr(requests, "PIECE_BYTES", PIECE)
    yield put
    for proxy in proxies:
        proxy.stop()
    client.cache_clear()


def uploads(at: Location) -> list[str]:
    """Uploads in pieces that were begun and neither completed nor given up."""
    found = client().list_multipart_uploads(Bucket=at.bucket, Prefix=at.key + "/")
    return [upload["Key"] for upload in found.get("Uploads", [])]


def some_bytes(rng: np.random.Generator) -> bytes:
    """Nothing, little, some, and once in a while more than one piece."""
    kind = rng.random()
    size = 0 if kind < 0.1 else rng.integers(1, 2 * PIECE + 9) if kind > 0.95 else rng.integers(1, 50_000)
    return rng.bytes(int(size))


class Oracle:
    """What the store does, done to a dictionary at the same time, and compared."""

    def __init__(self, place: Location, rng: np.random.Generator) -> None:
        self.place, self.rng, self.files = place, rng, dict[str, bytes]()
        self.names = [f"{folder}{i}" for folder in ("", "a/", "a/b c/", "é/") for i in range(3)]

    def draw(self) -> tuple[str, Location, bytes | None]:
        name = self.names[self.rng.integers(len(self.names))]
        return name, self.place / name, self.files.get(name)

    def write(self) -> None:
        name, at, _ = self.draw()
        self.files[name] = some_bytes(self.rng)
        at.write(self.files[name])

    def write_new(self) -> None:
        name, at, there = self.draw()
        data = there if there is not None and self.rng.random() < 0.5 else some_bytes(self.rng)[:10_000]
        try:
            at.write_new(data)
            made = True
        except Conflict:
            made = False
        assert made == (there is None), f"{name} was {'' if there is None else 'not '}free"
        if made:
            self.files[name] = data

    def write_over(self) -> None:
        name, at, there = self.draw()
        if there is None:
            with pytest.raises(FileNotFoundError):
                at.write_over(b"1", "0" * 32)
            return
        if self.rng.random() < 0.3:
            with pytest.raises(Conflict):
                at.write_over(b"1", "0" * 32)
            return
        self.files[name] = some_bytes(self.rng)[:10_000]
        assert at.write_over(self.files[name], at.entry().stamp) == at.entry().stamp

    def read(self) -> None:
        _, at, there = self.draw()
        if there is None:
            with pytest.raises(FileNotFoundError):
                at.read()
            return
        assert at.read() == there

    def read_range(self) -> None:
        _, at, there = self.draw()
        if there is None:
            with pytest.raises(FileNotFoundError):
                at.read(1, 2)
            return
        offset, length = (int(n) for n in self.rng.integers(0, len(there) + 9, 2))
        assert at.read(offset, length) == there[offset : offset + length]
        assert at.read(offset) == there[offset:]

    def copy(self) -> None:
        _, at, there = self.draw()
        if there is None:
            with pytest.raises(FileNotFoundError), at.local_copy():
                pass
            return
        with at.local_copy() as path:
            assert path.read_bytes() == there

    def look(self) -> None:
        _, at, there = self.draw()
        assert at.exists() == (there is not None)
        if there is not None:
            assert at.entry().size == len(there) == RangeFile(at).seek(0, os.SEEK_END)

    def list(self) -> None:
        folder = ("", "a", "a/b c", "é", "none")[self.rng.integers(5)]
        prefix = f"{folder}/" if folder else ""
        here = {name.removeprefix(prefix): len(data) for name, data in self.files.items() if name.startswith(prefix)}
        assert {entry.name: entry.size for entry in (self.place / folder).list()} == here
        assert (self.place / folder).is_folder() == bool(here)

    def delete(self) -> None:
        name, at, _ = self.draw()
        if self.rng.random() < 0.1:
            name, at = "a", self.place / "a"
        at.delete()
        self.files = {n: data for n, data in self.files.items() if n != name and not n.startswith(f"{name}/")}

    def sweep(self) -> None:
        self.place.sweep()


@pytest.mark.parametrize("seed", range(3))
def test_the_store_is_a_dictionary_when_a_fifth_of_the_answers_are_spoilt(on_s3, behind, monkeypatch, seed):
    monkeypatch.setattr(requests, "PAGE_KEYS", 3)
    proxy, rng = behind(SHARE, seed, timeout_s=1.0), np.random.default_rng(seed)
    oracle = Oracle(on_s3, rng)
    deeds = [oracle.write, oracle.write_new, oracle.write_over, oracle.read, oracle.read_range, oracle.copy]
    deeds += [oracle.look, oracle.list, oracle.delete, oracle.sweep]
    shares = np.array([4, 2, 3, 2, 3, 1, 2, 2, 1, 0.3])
    for i in rng.choice(len(deeds), 120, p=shares / shares.sum()):
        deeds[i]()
    proxy.share = 0
    on_s3.sweep()
    assert {entry.name: (on_s3 / entry.name).read() for entry in on_s3.list()} == oracle.files and uploads(on_s3) == []
    assert min(proxy.done[kind] for kind in KINDS) >= 1, proxy.done


DATA = bytes(range(256)) * 40


def read(at: Location) -> None:
    assert (at / "x").read() == DATA


def read_a_range(at: Location) -> None:
    assert (at / "x").read(250, 9000) == DATA[250:9250]


def copy(at: Location) -> None:
    with (at / "x").local_copy() as path:
        assert path.read_bytes() == DATA


def list_and_look(at: Location) -> None:
    assert [entry.name for entry in at.list()] == ["x", "y"]
    assert at.is_folder() and not (at / "z").is_folder()
    assert (at / "x").exists() and not (at / "z").exists() and (at / "x").entry().size == len(DATA)


def write(at: Location) -> None:
    (at / "y").write(b"new")


def write_new(at: Location) -> None:
    (at / "z").write_new(b"new")
    with pytest.raises(Conflict):
        (at / "x").write_new(DATA)


def write_over(at: Location) -> None:
    stamp = (at / "y").write_over(b"new", hashlib.md5(b"y").hexdigest())
    assert stamp == hashlib.md5(b"new").hexdigest()
    with pytest.raises(Conflict):
        (at / "x").write_over(DATA, stamp)


def write_pieces(at: Location) -> None:
    (at / "y").write(bytes(PIECE) + b"new")


def delete(at: Location) -> None:
    (at / "x").delete()
    at.delete()


DEEDS = [  # what is done, how many requests it takes, and what it leaves
    (read, 1, {"x": DATA, "y": b"y"}), (read_a_range, 1, {"x": DATA, "y": b"y"}), (copy, 1, {"x": DATA, "y": b"y"}),
    (list_and_look, 6, {"x": DATA, "y": b"y"}), (write, 1, {"x": DATA, "y": b"new"}),
    (write_new, 3, {"x": DATA, "y": b"y", "z": b"new"}), (write_over, 3, {"x": DATA, "y": b"new"}),
    (write_pieces, 4, {"x": DATA, "y": bytes(PIECE) + b"new"}), (delete, 5, {}),
]  # fmt: skip


@pytest.mark.parametrize("deed, n_requests, left", DEEDS)
def test_faults_at_any_request_change_nothing(on_s3, behind, deed, n_requests, left):
    """Two of a kind, so that the answer to the second try is lost too; but waiting takes time."""
    proxy = behind(timeout_s=0.3)
    for kind, i in product(KINDS, range(n_requests)):
        at = on_s3 / f"{kind} {i}"
        (at / "x").write(DATA)
        (at / "y").write(b"y")
        proxy.next_faults.extend([None] * i + [kind] * (1 if kind in ("stalled", "delayed") else 2))
        deed(at)
        if kind == "beheaded":  # enough may have come
            proxy.next_faults.clear()
        assert not proxy.next_faults, f"there was no request {i}"
        assert {entry.name: (at / entry.name).read() for entry in at.list()} == left, f"{kind} at request {i}"
    on_s3.sweep()
    assert uploads(on_s3) == []


def test_the_list_of_requests_is_whole(on_s3, behind):
    """Without faults each deed takes as many requests as the test above believes."""
    proxy = behind()
    for deed, n_requests, _ in DEEDS:
        at = on_s3 / deed.__name__
        (at / "x").write(DATA)
        (at / "y").write(b"y")
        before = proxy.done["requests"]
        deed(at)
        assert proxy.done["requests"] - before == n_requests, deed


def test_of_many_writers_of_the_same_bytes_one_makes_the_new_object(on_s3, behind):
    """Each loses many answers, and what it finds there then looks like its own."""
    behind(0.3)
    for i in range(5):
        at, won = on_s3 / f"{i}", list[bool]()

        def write_it(at: Location = at, won: list[bool] = won) -> None:
            try:
                at.write_new(b"the same")
                won.append(True)
            except Conflict:
                won.append(False)

        threads = [threading.Thread(target=write_it) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 5 + [True]


def test_a_read_that_breaks_off_goes_on_where_it_was(on_s3, behind):
    proxy, data = behind(), os.urandom(3 << 20)
    (on_s3 / "x").write(data)
    for offset, length in ((0, None), (5, None), (7, 2 << 20), (0, len(data) + 9)):
        sent, real = [], client().get_object

        def get(sent: list[str] = sent, real: Callable[..., object] = real, **request: str) -> object:
            sent.append(request.get("Range", "all") + (" of it" if "IfMatch" in request else ""))
            return real(**request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client(), "get_object", get)
            proxy.next_faults.extend(["cut", "cut", "cut"])
            assert (on_s3 / "x").read(offset, length) == data[offset:][:length]
        starts = [int(text.removeprefix("bytes=").partition("-")[0]) for text in sent[1:]]
        assert starts == sorted(starts) and starts[-1] > offset, sent
        assert all(text.endswith("of it") for text, start in zip(sent[1:], starts, strict=True) if start > offset)


def test_an_object_that_changes_between_two_tries_is_read_anew(on_s3, behind, monkeypatch):
    proxy, old, new = behind(), b"o" * (2 << 20), b"n" * (1 << 20)
    (on_s3 / "x").write(old)
    proxy.next_faults.append("cut")
    real = client().get_object

    def get(**request):
        if request.get("IfMatch"):
            monkeypatch.undo()
            (on_s3 / "x").write(new)
        return real(**request)

    monkeypatch.setattr(client(), "get_object", get)
    assert (on_s3 / "x").read() == new


@pytest.mark.parametrize("kind", ["checksum", "tls"])
@pytest.mark.parametrize("n_bytes", [100, 2 * PIECE + 100])
def test_bytes_that_were_spoilt_on_their_way_are_asked_for_again(on_s3, behind, monkeypatch, kind, n_bytes):
    """The first body of every range is wrong in its middle, and that is found out at its end, or at once."""
    behind()
    data, real, seen = os.urandom(n_bytes), client().get_object, set[str]()
    (on_s3 / "x").write(data)

    class Spoilt:
        def __init__(self, body):
            self.body = body

        def read(self, n=None):
            if n is not None and kind == "checksum":
                return bytes(len(self.body.read(n)))
            if kind == "tls":
                raise SSLError("decryption failed or bad record mac")
            raise FlexibleChecksumError(error_msg="Expected checksum a did not match calculated checksum b")

    def get(**request):
        answer = real(**request)
        if request.get("Range", "all") not in seen:
            answer["Body"] = Spoilt(answer["Body"])
        seen.add(request.get("Range", "all"))
        return answer

    monkeypatch.setattr(client(), "get_object", get)
    assert (on_s3 / "x").read() == data
    with (on_s3 / "x").local_copy() as path:
        assert path.read_bytes() == data


def test_a_copy_in_pieces_of_an_object_that_changes_is_refused(on_s3, behind, monkeypatch):
    behind()
    (on_s3 / "x").write(bytes(2 * PIECE))
    real = requests._Range.fetch

    def fetch(self):
        if self.first:
            client().put_object(Bucket=on_s3.bucket, Key=f"{on_s3.key}/x", Body=b"1" * 3 * PIECE)
        real(self)

    monkeypatch.setattr(requests._Range, "fetch", fetch)
    with pytest.raises(OSError, match=f"{on_s3.uri}/x must not change while it is read"), (on_s3 / "x").local_copy():
        pass


def gone(operation):
    return ClientError({"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, operation)


@pytest.mark.parametrize("whose", ["ours", "another's", "nobody's"])
def test_an_upload_that_is_over_when_it_is_completed_is_known_by_its_token(on_s3, behind, monkeypatch, whose):
    """Some stores know no upload any more that they have completed."""
    behind()
    real, data = client().complete_multipart_upload, bytes(PIECE) + b"1"

    def complete(**request):
        if whose == "ours":
            real(**request)
        elif whose == "another's":
            client().put_object(Bucket=on_s3.bucket, Key=f"{on_s3.key}/x", Body=data)
        raise gone("CompleteMultipartUpload")

    monkeypatch.setattr(client(), "complete_multipart_upload", complete)
    if whose == "ours":
        (on_s3 / "x").write(data)
        assert (on_s3 / "x").read() == data
    else:
        with pytest.raises(OSError, match=f"{on_s3.uri}/x.*NoSuchUpload"):
            (on_s3 / "x").write(data)
    assert uploads(on_s3) == []


def test_an_upload_that_was_begun_twice_is_swept(on_s3, behind):
    proxy = behind()
    proxy.next_faults.append("lost")
    (on_s3 / "x").write(bytes(PIECE + 1))
    (on_s3 / "y").write(b"1")
    assert uploads(on_s3) == [f"{on_s3.key}/x"]
    proxy.next_faults.extend(["lost", "lost", "lost", "lost"])
    on_s3.sweep()
    assert uploads(on_s3) == []
    assert [entry.name for entry in on_s3.list()] == ["x", "y"]


def test_what_could_not_be_deleted_just_now_is_deleted_again(on_s3, behind, monkeypatch):
    behind()
    for name in "abc":
        (on_s3 / name).write(b"1")
    real, asked = client().delete_objects, []

    def delete_objects(Bucket, Delete):
        keys = [item["Key"] for item in Delete["Objects"]]
        asked.append([key[-1] for key in keys])
        if len(asked) > 2:
            return real(Bucket=Bucket, Delete=Delete)
        if keys[1:]:
            real(Bucket=Bucket, Delete={"Objects": [{"Key": key} for key in keys[1:]]})
        return {"Errors": [{"Key": keys[0], "Code": "SlowDown" if len(asked) < 2 else "InternalError"}]}

    monkeypatch.setattr(client(), "delete_objects", delete_objects)
    on_s3.delete()
    assert asked == [["a", "b", "c"], ["a"], ["a"]] and on_s3.list() == []


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


DEEDS_OF_ONE = [
    lambda at: at.read(), lambda at: at.read(1, 2), lambda at: at.list(), lambda at: at.exists(),
    lambda at: at.entry(), lambda at: at.is_folder(), lambda at: at.write(b"1"), lambda at: at.write(bytes(PIECE + 1)),
    lambda at: at.write_new(b"1"), lambda at: at.write_over(b"1", "0"), lambda at: at.delete(),
    lambda at: at.local_copy().__enter__(),
]  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS_OF_ONE)
def test_an_endpoint_that_is_gone_is_one_sentence(on_s3, behind, monkeypatch, deed):
    behind()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    client.cache_clear()
    words = rf"^S3 failed at {on_s3.uri}/x: Could not connect to the endpoint URL: .* \(asked 3 times\)$"
    with pytest.raises(OSError, match=words):
        deed(on_s3 / "x")
    (on_s3 / "x").sweep()  # what cannot be cleared away stays


def test_a_silent_endpoint_is_left_within_the_time_that_was_set(on_s3, behind, monkeypatch):
    monkeypatch.setenv("OPENLVD_S3_TIMEOUT_S", "0.1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        client.cache_clear()
        with pytest.raises(OSError, match=r"Read timeout on endpoint URL.*\(asked 2 times\)$"):
            (on_s3 / "x").read()


@pytest.mark.parametrize(
    "status, code, kind",
    [(403, "AccessDenied", PermissionError), (401, "", PermissionError), (404, "NoSuchKey", FileNotFoundError),
     (400, "InvalidRequest", OSError), (501, "NotImplemented", OSError)],
)  # fmt: skip
def test_what_cannot_come_right_is_asked_once(on_s3, behind, monkeypatch, status, code, kind):
    behind()
    asked = []

    def refuse(**_):
        asked.append(1)
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

    monkeypatch.setattr(client(), "get_object", refuse)
    with pytest.raises(kind, match=f"{on_s3.uri}/x"):
        (on_s3 / "x").read()
    assert asked == [1]


def test_the_pauses_double_up_to_a_limit_and_are_not_alike(on_s3, behind, monkeypatch):
    behind()
    slept: list[float] = []
    monkeypatch.setattr(requests, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(requests.time, "sleep", slept.append)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    client.cache_clear()
    for _ in range(2):
        with pytest.raises(OSError, match=rf"asked {requests.TRIES} times"):
            on_s3.read()
    most = [min(requests.MOST_WAIT_S, 0.1 * 2**i) for i in range(requests.TRIES - 1)]
    assert len(slept) == 2 * len(most) == 2 * len({*slept}) // 2
    assert all(wait / 2 <= got <= wait for got, wait in zip(slept, most * 2, strict=True))


@pytest.mark.parametrize("name", ["AWS_MAX_ATTEMPTS", "OPENLVD_S3_TIMEOUT_S"])
@pytest.mark.parametrize("text", ["0", "-1", "many", "nan"])
def test_settings_that_are_none_are_named(on_s3, behind, monkeypatch, name, text):
    behind()
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name} must be a positive number: got '{text}'"):
        on_s3.read()
