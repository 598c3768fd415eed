"""Runs with their images and their root on S3, through a proxy that spoils answers: they end with the same bytes.

The images are the 400 of ``imagenet-sample`` beside the project, or pictures of noise where there are none.
"""

import io
import os
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_proxy import KINDS, FaultyProxy
from PIL import Image
from tiny import answer, noise_png

from curation import s3 as requests
from curation.store import Location, client
from embedding.backbone import save_vit
from embedding.preprocess import Preprocess
from embedding.vit import ViT
from embedding.vit_config import ViTConfig
from pipelines import lock
from pipelines.engine import read_root, run_recipe
from pipelines.errors import TaskError, UserError
from pipelines.executor import LocalExecutor
from pipelines.lock import lock_root
from pipelines.ray_executor import RayExecutor
from pipelines.recipe import Recipe, parse_recipe
from pipelines.stages.table import STAGES

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
N_IMAGES, N_TARS = 400, 4
SHARE = float(os.environ.get("OPENLVD_S3_FAULTS", "0.05"))  # of the answers that are spoilt
NOTES = ("run.json", "run.jsonl", ".lock")  # written again and again: what happened, not what is


@dataclass
class Case:
    """A recipe on images in tars on S3, and the results of a run that nothing disturbed."""

    recipe: Recipe
    expected: dict[str, bytes]


def sample_images() -> list[bytes]:
    """The sample, or JPEGs of noise of as many sizes."""
    if SAMPLE.is_dir():
        return [path.read_bytes() for path in sorted(SAMPLE.glob("*.JPEG"))]
    rng, images = np.random.default_rng(0), []
    for _ in range(N_IMAGES):
        out = io.BytesIO()
        height, width = rng.integers(250, 400, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(out, "JPEG")
        images.append(out.getvalue())
    return images


def put_tars(images: list[bytes], at: Location) -> None:
    """Write images as tars."""
    for i in range(N_TARS):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for j in range(i, len(images), N_TARS):
                info = tarfile.TarInfo(f"{j:04d}.jpg")
                info.size = len(images[j])
                tar.addfile(info, io.BytesIO(images[j]))
        (at / f"{i:02d}.tar").write(out.getvalue())


def recipe_of(source: str, backbone: Path) -> Recipe:
    """Pool, two embeddings and shards, in so many parts that there is much to ask for."""
    steps = {
        "web": {"stage": "pool", "source": source, "part_rows": 10},
        "web_copy": {"stage": "embed", "pool": "web", "backbone": "pixels"},
        "web_vec": {"stage": "embed", "pool": "web", "backbone": str(backbone)},
        "shards": {"stage": "shards", "pool": "web", "shard_rows": 100, "mix_rows": 100},
    }
    return parse_recipe({"seed": 0, "resources": {"workers": 2}, "steps": steps}, STAGES)


def results(root: Location) -> dict[str, bytes]:
    """What a run is for, by name."""
    names = [entry.name for entry in root.list()]
    return {name: (root / name).read() for name in names if name.rpartition("/")[2] not in NOTES}


def undisturbed(at: Location, images: list[bytes], backbone: Path) -> Case:
    """A run without a proxy."""
    put_tars(images, at / "images")
    recipe = recipe_of(f"{at}/images", backbone)
    for _ in run_recipe(recipe, at / "plain", LocalExecutor(recipe.resources)):
        pass
    return Case(recipe, results(at / "plain"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    vit = ViT(ViTConfig(patch_size=8, width=32, depth=2, heads=2), seed=0)
    save_vit(folder, vit, Preprocess(size=32, crop=32))
    return folder


@pytest.fixture(scope="module")
def case(s3, backbone) -> Case:
    return undisturbed(Location(f"{s3}/{uuid.uuid4().hex}"), sample_images(), backbone)


@pytest.fixture(scope="module")
def small_case(s3, backbone) -> Case:
    images = [noise_png(np.random.default_rng(i)) for i in range(20)]
    return undisturbed(Location(f"{s3}/{uuid.uuid4().hex}"), images, backbone)


@pytest.fixture
def proxied(s3, monkeypatch) -> Iterator[Callable[..., FaultyProxy]]:
    """Puts a proxy between this process and S3."""
    proxies, endpoint = list[FaultyProxy](), os.environ["AWS_ENDPOINT_URL"]

    def put(share: float, timeout_s: float = 1.0) -> FaultyProxy:
        proxies.append(FaultyProxy(endpoint, share, stall_s=1.25 * timeout_s))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        monkeypatch.setenv("OPENLVD_S3_TIMEOUT_S", str(timeout_s))
        client.cache_clear()
        return proxies[-1]

    yield put
    for proxy in proxies:
        proxy.stop()
    client.cache_clear()


def until(true: Callable[[], object]) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def check(case: Case, root: Location, proxy: FaultyProxy) -> None:
    """A finished run has the bytes of the undisturbed one and left nothing else behind."""
    proxy.share = 0
    found = results(root)
    assert set(found) == set(case.expected)
    assert [name for name, data in case.expected.items() if found[name] != data] == []
    assert all(artifact is not None for artifact in read_root(root).values())
    pieces = client().list_multipart_uploads(Bucket=root.bucket, Prefix=root.key + "/").get("Uploads", [])
    assert [piece["Key"] for piece in pieces] == []
    assert min(proxy.done[kind] for kind in KINDS) >= 1, proxy.done
    assert sum(proxy.done[kind] for kind in KINDS) > SHARE / 2 * proxy.done["requests"], proxy.done


def test_a_run_through_faults_ends_with_the_same_bytes(case, on_s3, proxied, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.1)  # so that signs of life are lost too
    monkeypatch.setattr(requests, "PIECE_BYTES", 5 << 20)  # shards go up in pieces, tars come down in pieces
    proxy, said, begin, begun = proxied(SHARE), list[str](), client().create_multipart_upload, list[str]()

    def begin_twice(**request: Any) -> Any:  # the answer to the first request was lost
        begun.append(begin(**request)["UploadId"])
        return begin(**request)

    monkeypatch.setattr(client(), "create_multipart_upload", begin_twice)
    for result in run_recipe(case.recipe, on_s3, LocalExecutor(case.recipe.resources), say=said.append):
        assert result.state == "done"
    assert len(begun) >= 4
    check(case, on_s3, proxy)
    assert said == []
    assert any(path.endswith("/.lock") for _, _, path in proxy.spoilt)
    again = run_recipe(case.recipe, on_s3, LocalExecutor(case.recipe.resources))
    assert {result.state for result in again} == {"done before"}


def drive(recipe: Recipe, root: Location, env: dict[str, str], told: Any) -> None:
    """In another process: a whole run on Ray."""
    os.environ.update(env)
    client.cache_clear()
    executor = RayExecutor(recipe.resources)
    try:
        told.send([result.state for result in run_recipe(recipe, root, executor)])
    finally:
        executor.close()


def test_workers_of_ray_go_through_faults_too(case, on_s3, proxied, other_process):
    proxy = proxied(SHARE)
    env = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "OPENLVD_"))}
    ours, theirs = other_process.Pipe()
    process = other_process.Process(target=drive, args=(case.recipe, on_s3, env, theirs))
    process.start()
    assert answer(process, ours) == ["done"] * len(case.recipe.steps)
    process.join()
    check(case, on_s3, proxy)


@pytest.mark.parametrize("dies_after", [0, 1, 20, 60, 90])
def test_an_endpoint_that_goes_away_is_one_sentence_and_the_run_goes_on_later(
    small_case, on_s3, proxied, monkeypatch, dies_after
):
    recipe = small_case.recipe
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setattr(requests, "FIRST_WAIT_S", 0.01)
    proxy = proxied(0)
    proxy.dies_after = dies_after
    words = r"S3 failed at s3://\S+: Connection was closed before .* \(asked 3 times\)$"
    with pytest.raises((TaskError, UserError, OSError), match=words) as told:
        for _ in run_recipe(recipe, on_s3, LocalExecutor(recipe.resources)):
            pass
    assert "\n" not in str(told.value)
    proxy.dies_after = None
    monkeypatch.setattr(lock, "STALE_S", 0.1)  # the lock could not be given back
    for _ in run_recipe(recipe, on_s3, LocalExecutor(recipe.resources)):
        pass
    assert results(on_s3) == small_case.expected


def test_a_lock_is_kept_through_faults_and_given_back(on_s3, proxied, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_S", 0.005)
    monkeypatch.setattr(lock, "BEAT_S", 0.005)
    proxy, said = proxied(0.3, 0.2), list[str]()
    for n_faults in (8, 16):
        with lock_root(on_s3, said.append):
            until(lambda n=n_faults: len(proxy.spoilt) >= n)
            assert b"token" in (on_s3 / ".lock").read()
        assert on_s3.list() == []
    assert said == []


def test_a_lock_outlives_an_outage_that_is_longer_than_its_lease(on_s3, proxied, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_WAIT_S", 0.005)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    monkeypatch.setattr(lock, "STALE_S", 0.2)
    proxy, said = proxied(0), list[str]()
    with lock_root(on_s3, said.append):
        proxy.dies_after = 0
        until(lambda: said)
        time.sleep(0.1)
        proxy.dies_after = None
        stamp = (on_s3 / ".lock").entry().stamp
        until(lambda: (on_s3 / ".lock").entry().stamp != stamp)
    [words] = said
    assert "no sign of life could be written" in words and "for 0.2 s: S3 failed at" in words
    assert on_s3.list() == []
