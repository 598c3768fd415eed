"""One math thread: the same bits on every machine of one kind, and no fight for the cores. One S3 for all tests."""

import uuid
from collections.abc import Iterator

import pytest
import torch

from curation.store import Location, client

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URI of a bucket on an S3 server in this process, which the environment points to."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }.items():
        patch.setenv(name, value)
    client.cache_clear()
    client().create_bucket(Bucket="bucket")
    yield "s3://bucket"
    patch.undo()
    client.cache_clear()
    server.stop()


@pytest.fixture
def on_s3(s3) -> Location:
    """An empty prefix of the bucket."""
    return Location(f"{s3}/{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> Location:
    """An empty place on a disk, and one on S3."""
    if request.param == "s3":
        return request.getfixturevalue("on_s3")
    return Location(str(tmp_path / "place"))
