"""Who holds a root, on a disk and on S3; what cannot be one."""

import json
import time

import pytest

from curation.store import Conflict, Location
from pipelines import lock
from pipelines.errors import UserError
from pipelines.lock import STALE_S, lock_root


def until(condition, seconds=20):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def beat_of(holder, age=0.0):
    return json.dumps({"holder": holder, "time": time.time() - age, "token": holder}).encode()


def test_a_holder_that_lost_its_lock_leaves_the_new_one_alone(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    said, theirs = [], beat_of("process 7 on elsewhere")
    with lock_root(on_s3, said.append):
        (on_s3 / ".lock").write(theirs)
        until(lambda: said)
        assert "another run took" in said[0]
        assert (on_s3 / ".lock").read() == theirs
    assert (on_s3 / ".lock").read() == theirs


def test_a_lock_that_is_lost_between_two_beats_is_not_deleted(on_s3):
    theirs = beat_of("process 7 on elsewhere")
    with lock_root(on_s3, print):
        (on_s3 / ".lock").write(theirs)
    assert (on_s3 / ".lock").read() == theirs


def test_beats_go_on_after_errors(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    write_over, left = Location.write_over, [OSError("down"), PermissionError("down"), OSError("down")]

    def sometimes(self, data, stamp):
        if left:
            raise left.pop()
        return write_over(self, data, stamp)

    monkeypatch.setattr(Location, "write_over", sometimes)
    said = []
    with lock_root(on_s3, said.append):
        first = json.loads((on_s3 / ".lock").read())["time"]
        until(lambda: json.loads((on_s3 / ".lock").read())["time"] > first)
    assert said == [] and on_s3.list() == []


def test_errors_that_do_not_end_are_said(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "STALE_S", 0.2)

    def never(self, data, stamp):
        raise OSError("down")

    monkeypatch.setattr(Location, "write_over", never)
    said = []
    with lock_root(on_s3, said.append):
        until(lambda: said)
    assert "no sign of life could be written" in said[0] and "down" in said[0]


def test_a_beat_whose_answer_was_lost_is_our_own(on_s3, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    write_over, calls = Location.write_over, []

    def twice(self, data, stamp):
        """The client sends again what has arrived: the second one is refused."""
        calls.append(stamp)
        done = write_over(self, data, stamp)
        if len(calls) == 1:
            raise Conflict(self.uri)
        return done

    monkeypatch.setattr(Location, "write_over", twice)
    said = []
    with lock_root(on_s3, said.append):
        until(lambda: len(calls) > 3)
    assert said == [] and on_s3.list() == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b'"x"', b"{}", b'{"holder": "a", "time": "noon"}', b"\xff"])
def test_a_damaged_lock_is_stale(on_s3, data):
    (on_s3 / ".lock").write(data)
    said = []
    with lock_root(on_s3, said.append):
        assert said == [f"taking over {on_s3} from a lock that cannot be read"]
    assert on_s3.list() == []


def test_of_two_that_take_over_one_gets_it(on_s3, monkeypatch):
    """The other one has seen the same dead holder and is a moment late; the first one lives."""
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    (on_s3 / ".lock").write(beat_of("dead", STALE_S + 1))
    look, theirs = lock._look, []

    def late(at):
        seen = look(at)
        theirs.append(beat_of("process 7 on elsewhere"))
        at.write(theirs[-1])
        return seen

    monkeypatch.setattr(lock, "_look", late)
    with pytest.raises(UserError, match=r"another run works on .* process 7 on elsewhere"), lock_root(on_s3, print):
        pass
    assert (on_s3 / ".lock").read() == theirs[-1]


def test_what_cannot_be_a_root_is_one_sentence(tmp_path, s3, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / ".lock").mkdir(parents=True)
    for name, words in [("file", "File exists"), ("file/below", "Not a directory"), ("taken", "Is a directory")]:
        root = Location(str(tmp_path / name))
        with pytest.raises(UserError, match=f"^cannot use {root} as a root: {words}$"), lock_root(root, print):
            pass
    with (
        pytest.raises(UserError, match=r"^cannot use s3://nobody/x as a root: .*NoSuchBucket"),
        lock_root(Location("s3://nobody/x"), print),
    ):
        pass

    def forbidden(self, data):
        raise PermissionError(f"S3 refused {self.uri}: 403")

    monkeypatch.setattr(Location, "write_new", forbidden)
    with (
        pytest.raises(UserError, match=r"^cannot use s3://bucket/x as a root: S3 refused .* 403"),
        lock_root(Location("s3://bucket/x"), print),
    ):
        pass


def test_errors_of_the_run_itself_are_not_the_roots(tmp_path, on_s3):
    for root in (Location(str(tmp_path)), on_s3):
        with pytest.raises(FileNotFoundError, match="image"), lock_root(root, print):
            raise FileNotFoundError("image")
