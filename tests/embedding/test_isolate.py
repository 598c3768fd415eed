"""A call that crashes or hangs is a bad image; what comes from outside or from our own errors is not."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedding.decode import BadImage, inspect_image
from embedding.isolate import Isolated, Processes, guarded

CALLS = """
import os, pathlib, signal, sys, time

def die(data, name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(100)  # a moment passes until a signal comes

def spin(data):
    while True:
        pass

def size(data):
    return len(data)

def whoami(data):
    return os.getpid()

def refuse(data):
    raise ValueError("no such number")

def leave(data):
    os._exit(3)

def spoil(data):
    global spoilt
    spoilt = True

def die_if_spoilt(data):
    if "spoilt" in globals():
        os.abort()
    return "good"

def die_once(data, note):
    if not pathlib.Path(note).exists():
        pathlib.Path(note).touch()
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    return "good"
"""
CRASHED = BadImage("undecodable", "the decoder crashed")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Functions that the other process finds too."""
    (tmp_path / "planted_calls.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    import planted_calls

    yield planted_calls
    del sys.modules["planted_calls"]


@pytest.fixture
def apart():
    isolated = Isolated(seconds=1)
    yield isolated
    isolated.close()


def test_the_answer_is_that_of_the_function(calls, apart):
    assert apart(calls.size, b"abc") == 3
    assert apart(inspect_image, b"<html>", 100) == inspect_image(b"<html>", 100)
    first = apart(calls.whoami, b"")
    assert first == apart(calls.whoami, b"")  # one process for all


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"])
def test_a_crash_is_a_bad_image_and_the_next_file_is_decoded(calls, apart, name):
    assert apart(calls.die, b"", name) == CRASHED
    assert apart(calls.size, b"abc") == 3
    assert apart(calls.die, b"", name) == CRASHED


def test_a_hang_is_a_bad_image(calls, apart):
    assert apart(calls.spin, b"") == BadImage("undecodable", "the decoder hung: more than 1 s")
    assert apart(calls.size, b"abc") == 3


def test_a_file_does_not_pay_for_what_another_has_spoilt(calls, apart):
    apart(calls.spoil, b"")
    assert apart(calls.die_if_spoilt, b"") == "good"


def test_a_kill_from_outside_is_no_crash(calls, apart, tmp_path):
    assert apart(calls.die_once, b"", str(tmp_path / "note")) == "good"
    with pytest.raises(RuntimeError, match="killed 3 times"):
        apart(calls.die, b"", "SIGKILL")
    assert apart(calls.size, b"abc") == 3


def test_errors_of_ours_are_raised_and_reject_no_image(calls, apart):
    with pytest.raises(RuntimeError, match="ValueError: no such number"):
        apart(calls.refuse, b"")
    with pytest.raises(RuntimeError, match="ended with code 3"):
        apart(calls.leave, b"")


def test_a_process_that_cannot_start_is_told(monkeypatch, calls, apart):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"ended with code 1|could not start"):
        apart(calls.size, b"")


def test_threads_get_their_own_answers(calls, apart):
    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(lambda n: apart(calls.size, bytes(n)), range(200)))
    assert lengths == list(range(200))


def test_it_ends_with_the_block(calls):
    with guarded(isolated=True) as call:
        number = call(calls.whoami, b"")
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_many_processes_answer_many_threads(calls):
    apart = Processes(3)
    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(lambda n: apart(calls.size, bytes(n)), range(200)))
        numbers = set(pool.map(lambda n: apart(calls.whoami, b""), range(50)))
    assert lengths == list(range(200))
    assert 1 <= len(numbers) <= 3 and os.getpid() not in numbers
    assert apart(calls.die, b"", "SIGSEGV") == CRASHED
    assert apart(calls.size, b"abc") == 3
    apart.close()
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_no_more_processes_start_than_are_in_use(calls):
    apart = Processes(5)
    assert len({apart(calls.whoami, b"") for _ in range(20)}) == 1
    apart.close()


def test_processes_end_with_what_calls_in_them(calls):
    apart = Processes(2)
    number = apart(calls.whoami, b"")
    del apart
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


WATCHED = """
import sys, threading, time
from embedding import isolate
isolate._WATCH = isolate.Watch(1)
with isolate.guarded(False) as call:
    def busy():
        until = time.monotonic() + 5
        while time.monotonic() < until:
            call(len, b"abc")
    if "late" in sys.argv:  # what is outside the call is not watched, nor what was quick
        call(len, b"abc")
        time.sleep(2)
    else:
        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads:
            thread.start()
        call(time.sleep, 3)
print("alive")
"""


@pytest.mark.parametrize(("word", "code"), [("late", 0), ("hang", -signal.SIGALRM)])
def test_a_process_in_which_a_call_hangs_ends(word, code):
    run = subprocess.run([sys.executable, "-c", WATCHED, word], capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stderr
    assert run.stdout == ("" if code else "alive\n")


def test_the_alarm_of_others_is_left_alone():
    """As that of a test runner, which has a handler."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    old = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with guarded(isolated=False) as call:
            assert call(len, b"abc") == 3
        assert 990 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, *old)
        signal.signal(signal.SIGALRM, before)


def test_what_is_called_may_be_called_by_many_threads(calls):
    seen = []

    def work():
        with guarded(isolated=False) as call:
            seen.extend(call(calls.size, bytes(n)) for n in range(300))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(list(range(300)) * 4)
