"""Which versions are in memory, and which of them answers a request.

Every configured model has one version that is served: the one its selector means, followed when its alias
moves. A newer choice that is unfit is refused with its reason, and the version that runs keeps running. Other
versions come into memory when requests name them, and leave it when others were named more recently.

    curl localhost:8080/v1/models
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass, field

from model_store.store import PRODUCTION, Store
from service.errors import ModelNotReady, ModelNotServed
from service.loading import Loader, Running
from service.metrics import Metrics
from service.settings import ModelChoice, Settings
from traces.errors import SpecMoEError

log = logging.getLogger(__name__)

# While something is not ready the store is looked at so often, even where following is off.
RETRY_SECONDS = 5.0
WAIT = "Wait until /readyz answers 200, then try again."


@dataclass
class Served:
    """A configured model. `reason`: why it does not run yet, or why a newer choice was refused."""

    choice: ModelChoice
    running: Running | None = None
    reason: str | None = "It has not been loaded yet."
    versions: list[int] = field(default_factory=list)
    aliases: dict[str, int] = field(default_factory=dict)

    @property
    def selector(self) -> int | str | None:
        """What is followed: as the settings say, or `production` where they say nothing and there is one."""
        if self.choice.selector is None and PRODUCTION in self.aliases:
            return PRODUCTION
        return self.choice.selector


class Serving:
    """The versions in memory. Belongs to one event loop; what blocks runs on the loader's thread."""

    def __init__(self, store: Store, settings: Settings, metrics: Metrics) -> None:
        self.store = store
        self.loader = Loader(store, settings, metrics)
        self._settings = settings
        self._metrics = metrics
        self._served = {choice.model: Served(choice) for choice in settings.models}
        self._extra: OrderedDict[tuple[str, int], Running] = OrderedDict()
        self._store_reason: str | None = None if settings.models else "The store has not been read yet."

    def models(self) -> dict[str, Served]:
        """Every configured model by name."""
        return self._served

    def loaded(self, model: str) -> list[Running]:
        """Every version of a model in memory, the served one first."""
        running = self._served[model].running
        return ([running] if running else []) + [
            extra for key, extra in self._extra.items() if key[0] == model
        ]

    def unready(self) -> dict[str, str]:
        """Reasons by model, the store's under "store". Empty where everything is ready."""
        reasons = {"store": self._store_reason} if self._store_reason else {}
        return reasons | {
            name: served.reason or "" for name, served in self._served.items() if served.running is None
        }

    def find(self, model: str) -> Served:
        """A configured model. Raises ModelNotServed, or ModelNotReady while nobody knows."""
        served = self._served.get(model)
        if served is None and self._store_reason:
            raise ModelNotReady(self._store_reason, remedy=WAIT)
        if served is None:
            names = ", ".join(sorted(self._served)) or "none"
            raise ModelNotServed(
                f"This service does not serve that model. It serves: {names}.",
                remedy="Ask for one of these, or add the model to SPECMOE_MODELS.",
            )
        return served

    async def get(self, model: str, selector: int | str | None) -> Running:
        """The version that answers. Raises ModelNotServed, ModelNotReady, VersionRefused, StoreError."""
        served = self.find(model)
        running = served.running
        if selector is None or selector == served.selector:
            if running is None:
                raise ModelNotReady(f"{model} is not ready: {served.reason}", remedy=WAIT)
            return running
        version = selector if isinstance(selector, int) else await self._version(served, selector)
        if running is not None and version == running.version:
            return running
        return await self._extra_version(model, version)

    async def run(self) -> None:
        """Load what is configured, then follow the store until cancelled."""
        while True:
            try:
                await self.follow()
            except Exception:
                log.exception("looking at the store failed")
            if not self._settings.follow_seconds and not self.unready():
                return
            await asyncio.sleep(self._settings.follow_seconds or RETRY_SECONDS)

    async def follow(self) -> None:
        """Look once at what the store has, and serve what the settings mean by now."""
        if not self._served:
            await self._find_models()
        for served in self._served.values():
            try:
                await self._follow(served)
            except SpecMoEError as error:
                if served.reason != error.message:
                    log.warning(
                        "model refused", extra={"model": served.choice.model, "reason": error.message}
                    )
                served.reason = error.message
        self._show_loaded()

    async def _find_models(self) -> None:
        """Every model of the store, once it has one.

        A model that is published later waits for the next start: its first version may be bad, and must not
        make a service unready that answers for the others.
        """
        try:
            names = await self.loader.read(self.store.models)
        except SpecMoEError as error:
            self._store_reason = error.message
            return
        self._store_reason = (
            None if names else f"The store at {self.store.location} holds no version of any model."
        )
        self._served = {name: Served(ModelChoice(name)) for name in names}

    async def _follow(self, served: Served) -> None:
        model, selector = served.choice.model, served.choice.selector
        served.versions = await self.loader.read(self.store.versions, model)
        served.aliases = await self.loader.read(self.store.aliases, model)
        version = await self.loader.read(self.store.resolve, model, selector)
        before = served.running
        if before is None or before.version != version:
            served.running = self._extra.pop((model, version), None) or await self.loader.get(model, version)
            if before is not None:
                self._keep(before)
            _log_ready(served.running, self.store)
        served.reason = None

    async def _version(self, served: Served, alias: str) -> int:
        """What an alias means: by the last look at the store, else by a fresh one."""
        if alias in served.aliases:
            return served.aliases[alias]
        return await self.loader.read(self.store.resolve, served.choice.model, alias)

    async def _extra_version(self, model: str, version: int) -> Running:
        running = self._extra.get((model, version))
        if running is None:
            running = await self.loader.get(model, version)
        if running is not self._served[model].running:  # it may have been chosen to be served meanwhile
            self._keep(running)
        return running

    def _keep(self, running: Running) -> None:
        """Make it the most recently named extra version; the least recently named one may have to go."""
        key = (running.model, running.version)
        new = key not in self._extra
        self._extra[key] = running
        self._extra.move_to_end(key)
        if new:
            while len(self._extra) > self._settings.extra_versions:
                self._extra.popitem(last=False)
            self._show_loaded()

    def _show_loaded(self) -> None:
        """Let the gauges say what is in memory."""
        gauge = self._metrics.loaded_version
        gauge.clear()
        for model, served in self._served.items():
            self._metrics.model_ready.labels(model).set(served.running is not None)
            for running in self.loaded(model):
                answers = "true" if running is served.running else "false"
                gauge.labels(model, running.version, running.speculator.provider, answers).set(1)


def _log_ready(running: Running, store: Store) -> None:
    log.info(
        "model ready",
        extra={
            "model": running.model,
            "version": running.version,
            "store": store.location,
            "provider": running.speculator.provider,
            "provider_reason": running.provider_reason,
            "load_seconds": running.load_seconds,
        },
    )
