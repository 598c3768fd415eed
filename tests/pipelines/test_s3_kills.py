"""The driver of a run on S3 is killed at random moments, again and again. The bucket keeps every version of every
object, so in the end it tells everything that anybody could ever have seen there."""

import hashlib
import os
import signal
import time
import uuid
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny import MARK, answer, living

from curation.store import Location, client
from pipelines import lock
from pipelines.engine import read_root, run_recipe
from pipelines.executor import LocalExecutor
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe

N_KILLS = int(os.environ.get("OPENLVD_S3_KILLS", "20"))
N_RAY_KILLS = int(os.environ.get("OPENLVD_S3_RAY_KILLS", "2"))
BEAT_S, STALE_S = 0.1, 0.4  # of the lock, so that a restart does not wait for minutes
ORPHANS_S = 30  # a process whose driver is dead ends within
NOTES = ("run.json", "run.jsonl", ".lock")  # written again and again; the first two say what happened, not what is


class Version(NamedTuple):
    """What an object once was."""

    etag: str
    size: int
    since: datetime


@pytest.fixture(scope="session")
def versioned(s3) -> str:
    """The URI of a bucket that forgets nothing."""
    client().create_bucket(Bucket="versioned")
    client().put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    return "s3://versioned"


@pytest.fixture
def new_root(versioned):
    """Makes empty roots in that bucket."""
    return lambda: Location(f"{versioned}/{uuid.uuid4().hex}")


def reach_s3(env: dict[str, str]) -> None:
    """In another process, which has the environment of the first of its kind."""
    os.environ.update(env)
    client.cache_clear()


def drive(recipe: Recipe, root: Location, executor: str, env: dict[str, str], told: Any) -> None:
    """In another process: a whole run."""
    reach_s3(env)
    lock.BEAT_S, lock.STALE_S = BEAT_S, STALE_S
    engine = RayExecutor(recipe.resources) if executor == "ray" else LocalExecutor(recipe.resources)
    told.send("started")
    try:
        for _ in run_recipe(recipe, root, engine):
            pass
    finally:
        engine.close()


def environment(mark: str = "") -> dict[str, str]:
    """What another process needs to know of this one."""
    return {MARK: mark, **{name: value for name, value in os.environ.items() if name.startswith("AWS_")}}


def killed_after(context: Any, seconds: float | None, work: Any, *args: Any) -> bool:
    """Start ``work`` in another process and SIGKILL it when it has worked for so long; False when it ended before."""
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*args, theirs))
    process.start()
    assert answer(process, ours) == "started"
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the run failed: its words are above"
    return process.exitcode != 0


def history(root: Location) -> dict[str, list[Version]]:
    """Every version of every object that was ever below a root, the oldest first."""
    found: dict[str, list[Version]] = {}
    pages = client().get_paginator("list_object_versions").paginate(Bucket=root.bucket, Prefix=root.key + "/")
    for entry in (entry for page in pages for entry in page.get("Versions", [])):
        version = Version(entry["ETag"].strip('"'), entry["Size"], entry["LastModified"])
        found.setdefault(entry["Key"].removeprefix(root.key + "/"), []).insert(0, version)
    return found


def uploads(root: Location) -> list[str]:
    """Uploads in pieces that were begun and neither completed nor given up."""
    found = client().list_multipart_uploads(Bucket=root.bucket, Prefix=root.key + "/")
    return [upload["Key"] for upload in found.get("Uploads", [])]


def is_result(name: str) -> bool:
    """Whether a file is what a run is for: not a note, no log, not scratch."""
    return name.rpartition("/")[2] not in NOTES and not {"log", "scratch"} & set(name.split("/"))


def undisturbed(folder: Path) -> dict[str, bytes]:
    """The results of a run on a disk that nobody killed."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if is_result(name)}


def check_results(root: Location, expected: dict[str, bytes]) -> None:
    """A finished run has the bytes of an undisturbed one, and left nothing else behind."""
    left = {entry.name for entry in root.list()}
    assert {name for name in left if is_result(name)} == set(expected)
    assert {name.rpartition("/")[2] for name in left if not is_result(name) and "/log/" not in name} == {
        "run.json", "run.jsonl"
    }  # fmt: skip
    assert [name for name, data in expected.items() if (root / name).read() != data] == []
    assert all(artifact is not None for artifact in read_root(root).values())
    assert uploads(root) == []


def check_history(root: Location, expected: dict[str, bytes]) -> dict[str, list[Version]]:
    """Of every result nothing but its final bytes was ever visible. Returns all versions of the results."""
    found = {name: versions for name, versions in history(root).items() if is_result(name)}
    assert set(found) == set(expected), "something was there and is gone"
    for name, data in expected.items():
        whole = hashlib.md5(data).hexdigest(), len(data)
        assert {version[:2] for version in found[name]} == {whole}, f"{name} was once something else"
    return found


def check_done_once(found: dict[str, list[Version]]) -> None:
    """A part was made once. What stands beside it is written before it, and again only while the part is not there."""
    for name, versions in found.items():
        folder, _, file = name.rpartition("/")
        if file.startswith("part-") or file == "manifest.json":
            assert len(versions) == 1, f"{name} was made {len(versions)} times"
        if file.startswith(("shard-", "rejected-")) and len(versions) > 1:
            part = found.get(f"{folder}/part-{file.partition('-')[2].partition('.')[0]}.parquet")
            assert part is None or versions[-1].since <= part[0].since, f"{name} was made again beside its part"


def run_with_kills(recipe: Recipe, new_root: Any, context: Any, executor: str, n_kills: int, most_s: float) -> Any:
    """Runs, one after the other, until so many kills have hit; the last one goes on to its end.

    Returns the roots, the marks of the killed drivers, and how many kills came after how many finished steps.
    """
    rng = np.random.default_rng([n_kills, len(executor)])
    roots, marks, at = [new_root()], [], Counter[int]()
    while at.total() < n_kills:
        marks.append(uuid.uuid4().hex)
        env, seconds = environment(marks[-1]), rng.uniform(0, most_s)
        if killed_after(context, seconds, drive, recipe, roots[-1], executor, env):
            at[n_finished(roots[-1])] += 1
        else:
            roots.append(new_root())
    assert not killed_after(context, None, drive, recipe, roots[-1], executor, environment())
    return roots, marks, at


def n_finished(root: Location) -> int:
    """How many steps have their manifest."""
    return sum(entry.name.endswith("/manifest.json") for entry in root.list())


def test_a_driver_that_is_killed_again_and_again_finishes_with_the_same_bytes(tiny, new_root, other_process):
    roots, _, at = run_with_kills(tiny.recipe, new_root, other_process, "serial", N_KILLS, most_s=2.4)
    expected = undisturbed(tiny.root)
    for root in roots:
        check_results(root, expected)
        check_done_once(check_history(root, expected))
    assert len(at) > 1, "every kill came before the first step was finished"


def test_the_workers_of_a_killed_driver_change_nothing_and_end(tiny, new_root, other_process):
    """They may finish what they have in hand, while a new driver has the same done: a part may be made twice, of the
    same bytes."""
    roots, marks, _ = run_with_kills(tiny.recipe, new_root, other_process, "ray", N_RAY_KILLS, most_s=12)
    expected = undisturbed(tiny.root)
    for root in roots:
        check_results(root, expected)
        check_history(root, expected)
    end = time.monotonic() + ORPHANS_S
    while left := living(marks):
        assert time.monotonic() < end, f"processes of dead drivers live on: {left}"
        time.sleep(0.1)


def upload_again_and_again(at: Location, size: int, env: dict[str, str], told: Any) -> None:
    """In another process: one object that goes up in pieces, until somebody ends it."""
    reach_s3(env)
    data = bytes(size)
    told.send("started")
    while True:
        at.write(data)


def test_an_upload_in_pieces_is_seen_whole_or_not_at_all_and_is_cleared_away(new_root, other_process):
    root, rng, size = new_root(), np.random.default_rng(0), 20 << 20
    part = root / "step/part-0000000.parquet"
    while not uploads(root):  # until a kill came in the middle of one
        assert killed_after(other_process, rng.uniform(0, 1), upload_again_and_again, part, size, environment())
    assert {version.size for versions in history(root).values() for version in versions} <= {size}
    (root / "step").sweep()
    assert uploads(root) == []
