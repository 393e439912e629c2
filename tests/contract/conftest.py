"""Fixtures of the contract tests: a store with a toy model, the real service over both kinds of socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.clients import connect
from tests.contract.running import running_service
from tests.contract.streams import open_stream
from tests.toy_version import toy_store

__all__ = ["connect", "open_stream"]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="session", params=["tcp", "unix"])
def service(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """How to reach a running service: keyword arguments of a client."""
    uds = tmp_path_factory.mktemp("sockets") / "specmoe.sock"
    flags = ["--uds", str(uds)] if request.param == "unix" else []
    with running_service(store, *flags) as reached:
        yield reached
