"""Stores to test: a folder, and a bucket of a real S3 server on a socket of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from model_store.store import Store, open_store
from tests.toy_version import toy_version

BUCKET = "specmoe-test"


@pytest.fixture(scope="session")
def toys() -> list[tuple]:
    """Two drafts of one model with their graphs, which differ in every file."""
    return [toy_version(bias=-1.0), toy_version(bias=-0.5)]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """An empty bucket, which the usual AWS environment leads to."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    found = boto3.resource("s3").Bucket(BUCKET)
    found.create()
    yield found
    found.objects.all().delete()
    found.delete()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of either kind: what holds for one holds for the other."""
    if request.param == "folder":
        return open_store(tmp_path / "store")
    request.getfixturevalue("bucket")
    return open_store(f"s3://{BUCKET}/some/prefix")
