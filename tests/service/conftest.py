"""Fixtures of the service's tests: a store with the toy model, an app over it, a client to that app."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.service.in_process import running_app
from tests.toy_version import toy_store


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECMOE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that no test changes."""
    return toy_store(tmp_path_factory.mktemp("service"))


@pytest.fixture
async def client(shared_store: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client to a ready app that serves the toy."""
    async with running_app(Settings(store=str(shared_store), provider="cpu")) as client:
        yield client
