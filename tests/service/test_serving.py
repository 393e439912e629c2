"""Which versions are in memory, which one answers, and what is refused.

.venv/bin/python -m pytest tests/service/test_serving.py
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import service.loading
from model_store.errors import StoreUnavailable
from model_store.folder import FolderStore
from model_store.store import StoredVersion, open_store
from service.app import create_app
from service.errors import ModelNotReady, ModelNotServed, VersionRefused
from service.metrics import Metrics
from service.serving import Serving
from service.settings import ModelChoice, Settings
from tests.service.in_process import body, predict, running_app, wait_for
from tests.toy_version import TOY_SPEC, toy_store, toy_version

pytestmark = pytest.mark.anyio

UNFIT = ((0.5,) * TOY_SPEC.num_experts,) * TOY_SPEC.num_layers


class CountingStore(FolderStore):
    """A folder store that notes what is loaded, and can be taken away."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.loads: list[int] = []
        self.away = False

    def load(self, model: str, version: int) -> StoredVersion:
        self.loads.append(version)
        return super().load(model, version)

    def versions(self, model: str) -> list[int]:
        if self.away:
            raise StoreUnavailable("The store is away.", remedy="Bring it back.")
        return super().versions(model)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(toy_store(tmp_path))


@asynccontextmanager
async def serving(store: CountingStore, *models: ModelChoice, **options: Any) -> AsyncIterator[Serving]:
    """What is served after one look at the store, which is not followed unless the test does."""
    settings = Settings(models=models, provider="cpu", **options)
    serving = Serving(store, settings, Metrics())
    await serving.follow()
    try:
        yield serving
    finally:
        serving.loader.close()


def publish_unfit(store: CountingStore, *aliases: str) -> int:
    """A version whose golden answer is not what it predicts."""
    return store.publish(*toy_version(golden=UNFIT), aliases=list(aliases)).version


async def test_production_is_served_unless_told_otherwise(store: CountingStore) -> None:
    async with serving(store) as served:
        assert (await served.get("toy", None)).version == 2


async def test_the_newest_is_served_where_nothing_is_production(store: CountingStore) -> None:
    store.publish(*toy_version())
    store.remove_alias("toy", "production")
    async with serving(store) as served:
        assert (await served.get("toy", None)).version == 3


async def test_the_settings_choose_model_and_version(store: CountingStore) -> None:
    async with serving(store, ModelChoice("toy", 1)) as served:
        assert (await served.get("toy", None)).version == 1


async def test_a_model_that_the_settings_leave_out_is_not_served(store: CountingStore) -> None:
    store.publish(*toy_version(replace(TOY_SPEC, model="other")))
    async with serving(store, ModelChoice("toy")) as served:
        with pytest.raises(ModelNotServed, match="It serves: toy"):
            await served.get("other", None)


async def test_a_moved_alias_is_followed(store: CountingStore) -> None:
    async with serving(store) as served:
        store.set_alias("toy", "production", 1)
        await served.follow()
        assert (await served.get("toy", None)).version == 1


async def test_the_version_that_was_served_before_stays_at_hand(store: CountingStore) -> None:
    async with serving(store) as served:
        store.set_alias("toy", "production", 1)
        await served.follow()
        store.loads.clear()
        assert (await served.get("toy", 2)).version == 2
        assert not store.loads


async def test_an_unfit_version_is_refused_and_the_running_one_keeps_running(store: CountingStore) -> None:
    async with serving(store) as served:
        publish_unfit(store, "production")
        await served.follow()
        assert (await served.get("toy", None)).version == 2
        assert (await served.get("toy", "production")).version == 2
        assert "toy version 3 is refused: " in str(served.models()["toy"].reason)
        assert not served.unready()


async def test_once_it_is_replaced_the_reason_is_gone(store: CountingStore) -> None:
    async with serving(store) as served:
        publish_unfit(store, "production")
        await served.follow()
        store.publish(*toy_version(), aliases=["production"])
        await served.follow()
        assert (await served.get("toy", None)).version == 4
        assert served.models()["toy"].reason is None


async def test_an_unfit_only_version_leaves_the_model_unready(store: CountingStore) -> None:
    publish_unfit(store, "production")
    async with serving(store) as served:
        assert "is refused" in served.unready()["toy"]
        with pytest.raises(ModelNotReady, match="toy is not ready: toy version 3 is refused"):
            await served.get("toy", None)
        assert (await served.get("toy", 1)).version == 1


@pytest.mark.parametrize("file", ["predict.onnx", "advance.onnx", "manifest.json"])
async def test_a_version_whose_files_were_touched_is_refused(store: CountingStore, file: str) -> None:
    (Path(store.location) / "toy" / "1" / file).write_bytes(b"{}")
    async with serving(store) as served:
        with pytest.raises(VersionRefused, match="toy version 1 is refused"):
            await served.get("toy", 1)


async def test_an_unexpected_failure_while_warming_up_refuses_the_version(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_speculator: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.loading, "_warm_up", fail)
    async with serving(store) as served:
        with pytest.raises(VersionRefused, match="RuntimeError: out of memory"):
            await served.get("toy", 1)


async def test_a_refused_version_is_not_read_again_at_once(store: CountingStore) -> None:
    unfit = publish_unfit(store)
    async with serving(store) as served:
        for _ in range(3):
            with pytest.raises(VersionRefused):
                await served.get("toy", unfit)
        assert store.loads.count(unfit) == 1


async def test_a_refused_version_is_read_again_after_a_while(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = publish_unfit(store)
    monkeypatch.setattr(service.loading, "REFUSED_FOR_SECONDS", 0.0)
    async with serving(store) as served:
        for _ in range(2):
            with pytest.raises(VersionRefused):
                await served.get("toy", unfit)
        assert store.loads.count(unfit) == 2


async def test_a_version_asked_for_by_many_is_loaded_once(store: CountingStore) -> None:
    async with serving(store) as served:
        running = await asyncio.gather(*[served.get("toy", 1) for _ in range(10)])
        assert store.loads == [2, 1]
        assert len({id(version) for version in running}) == 1


async def test_a_caller_that_gives_up_does_not_take_the_load_from_others(store: CountingStore) -> None:
    async with serving(store) as served:
        impatient, patient = (asyncio.create_task(served.get("toy", 1)) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).version == 1


async def test_the_least_recently_named_version_leaves_memory(store: CountingStore) -> None:
    for _ in range(2):
        store.publish(*toy_version())
    async with serving(store, extra_versions=2) as served:
        for version in (1, 3, 1, 4):
            await served.get("toy", version)
        assert [running.version for running in served.loaded("toy")] == [2, 1, 4]


async def test_the_gauge_tells_what_is_in_memory(store: CountingStore) -> None:
    metrics = Metrics()
    serving = Serving(store, Settings(provider="cpu"), metrics)
    await serving.follow()
    await serving.get("toy", 1)
    serving.loader.close()
    found = [
        (sample.labels["version"], sample.labels["served"])
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "specmoe_loaded_version"
    ]
    assert found == [("2", "true"), ("1", "false")]


async def test_a_store_that_goes_away_takes_nothing_along(store: CountingStore) -> None:
    async with serving(store) as served:
        store.away = True
        await served.follow()
        assert (await served.get("toy", None)).version == 2
        assert served.models()["toy"].reason == "The store is away."
        store.away = False
        await served.follow()
        assert served.models()["toy"].reason is None


async def test_an_app_becomes_ready_when_its_store_appears(tmp_path: Path) -> None:
    there = toy_store(tmp_path)
    later = tmp_path / "later"
    settings = Settings(store=str(later), provider="cpu", follow_seconds=0.01)
    async with running_app(settings, until_ready=False) as client:
        unready = await wait_for(client, "/readyz", lambda answer: "There is no store" in answer.text)
        refused = await client.post("/v1/predict", json=body())
        shutil.copytree(there, later)
        await wait_for(client, "/readyz", lambda answer: answer.status_code == 200)
        assert (await predict(client))["version"] == 2
    assert (unready.status_code, unready.json()["code"]) == (503, "not_ready")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


async def test_a_running_app_follows_the_alias(store: CountingStore) -> None:
    settings = Settings(provider="cpu", follow_seconds=0.01)
    async with running_app(settings, store) as client:
        store.set_alias("toy", "production", 1)
        await wait_for(client, "/v1/models", lambda answer: answer.json()["models"][0]["version"] == 1)
        assert (await predict(client))["version"] == 1


async def test_models_tell_version_provider_and_why_not(store: CountingStore) -> None:
    publish_unfit(store, "candidate")
    async with running_app(Settings(provider="cpu"), store) as client:
        await predict(client, version=1)
        refused = await client.post("/v1/predict", json=body(version="candidate"))
        (model,) = (await client.get("/v1/models")).json()["models"]
        versions = (await client.get("/v1/models/toy/versions")).json()["versions"]
    assert (refused.status_code, refused.json()["code"]) == (503, "version_refused")
    assert (model["ready"], model["version"], model["versions"]) == (True, 2, [1, 2, 3])
    assert model["aliases"] == {"candidate": 3, "production": 2}
    assert [(entry["version"], entry["provider"]) for entry in model["loaded"]] == [(2, "cpu"), (1, "cpu")]
    assert model["loaded"][0]["provider_reason"] == "set by SPECMOE_PROVIDER"
    assert [(entry["version"], entry["loaded"]) for entry in versions] == [(3, False), (2, True), (1, True)]
    assert versions[0]["broken"] == refused.json()["message"]


async def test_versions_list_broken_ones_with_their_reason(store: CountingStore) -> None:
    (Path(store.location) / "toy" / "1" / "manifest.json").write_bytes(b"{")
    async with running_app(Settings(provider="cpu"), store) as client:
        sound, broken = (await client.get("/v1/models/toy/versions")).json()["versions"]
        newest = (await client.get("/v1/models/toy/versions?limit=1")).json()["versions"]
    assert sound["broken"] is None
    assert sound["lineage"]["train_tokens"] == 100
    assert "manifest.json" in broken["broken"]
    assert [entry["version"] for entry in newest] == [2]


async def test_tokens_of_the_validation_traces_count_where_it_learnt_from_them(store: CountingStore) -> None:
    draft, graphs = toy_version()
    (source,) = draft.lineage.traces
    kept_back = source.model_copy(update={"use": "validation", "tokens": 30})
    for refit in (False, True):
        lineage = draft.lineage.model_copy(update={"traces": (source, kept_back), "refit": refit})
        open_store(store.location).publish(draft.model_copy(update={"lineage": lineage}), graphs)
    async with running_app(Settings(provider="cpu"), store) as client:
        last, before = (await client.get("/v1/models/toy/versions?limit=2")).json()["versions"]
    told = [(v["lineage"]["refit"], v["lineage"]["train_tokens"]) for v in (before, last)]
    assert told == [(False, 100), (True, 130)]


async def test_nothing_is_read_before_the_app_is_started(tmp_path: Path) -> None:
    transport = httpx.ASGITransport(create_app(Settings(store=str(tmp_path / "missing"))))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.post("/v1/predict", json=body())).json()["code"] == "not_ready"
