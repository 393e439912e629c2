"""What /v1/models tells: which versions are in memory, and what lies in the store.

curl localhost:8080/v1/models/gpt-oss-20b/versions
"""

from __future__ import annotations

from model_store.errors import StoreError
from model_store.manifest import Lineage, Manifest
from model_store.store import Store
from service.loading import Running
from service.schemas import (
    LineageSummary,
    LoadedVersion,
    ModelSummary,
    SpecSummary,
    VersionList,
    VersionSummary,
)
from service.serving import Served, Serving


def model_summary(serving: Serving, served: Served) -> ModelSummary:
    """A configured model as it stands."""
    running = served.running
    return ModelSummary(
        model=served.choice.model,
        ready=running is not None,
        version=running.version if running else None,
        selector=served.choice.selector,
        reason=served.reason,
        spec=_spec_summary(running) if running else None,
        versions=served.versions,
        aliases=served.aliases,
        loaded=[_loaded_version(version) for version in serving.loaded(served.choice.model)],
    )


async def version_list(serving: Serving, model: str, limit: int) -> VersionList:
    """The newest `limit` versions of a configured model. Raises ModelNotServed, StoreError."""
    serving.find(model)
    loaded = {running.version for running in serving.loaded(model)}
    aliases, manifests = await serving.loader.read(_manifests, serving.store, model, limit)
    return VersionList(
        model=model,
        aliases=aliases,
        versions=[
            _version_summary(
                version, manifest, loaded=version in loaded, refusal=serving.loader.refusal(model, version)
            )
            for version, manifest in manifests.items()
        ],
    )


def _manifests(
    store: Store, model: str, limit: int
) -> tuple[dict[str, int], dict[int, Manifest | StoreError]]:
    """(aliases, the newest versions' manifests or what is wrong with them), newest first."""
    found: dict[int, Manifest | StoreError] = {}
    for version in sorted(store.versions(model), reverse=True)[:limit]:
        try:
            found[version] = store.manifest(model, version)
        except StoreError as error:
            found[version] = error
    return store.aliases(model), found


def _spec_summary(running: Running) -> SpecSummary:
    spec = running.speculator.spec
    return SpecSummary(num_layers=spec.num_layers, num_experts=spec.num_experts, top_k=spec.top_k)


def _loaded_version(running: Running) -> LoadedVersion:
    return LoadedVersion(
        version=running.version,
        provider=running.speculator.provider,
        provider_reason=running.provider_reason,
        load_seconds=running.load_seconds,
    )


def _version_summary(
    version: int, manifest: Manifest | StoreError, *, loaded: bool, refusal: str | None
) -> VersionSummary:
    if isinstance(manifest, StoreError):
        return VersionSummary(version=version, broken=manifest.message, loaded=loaded)
    return VersionSummary(
        version=version,
        broken=refusal,
        loaded=loaded,
        created=manifest.created,
        predictor=manifest.predictor.name,
        parameters=manifest.predictor.parameters,
        bytes=sum(file.bytes for file in manifest.files.values()),
        uses_token_ids=manifest.uses_token_ids,
        uses_gates=manifest.uses_gates,
        coverage_levels=list(manifest.coverage.levels),
        metrics=manifest.metrics,
        lineage=_lineage_summary(manifest.lineage),
    )


def _lineage_summary(lineage: Lineage) -> LineageSummary:
    return LineageSummary(
        traces=[source.name for source in lineage.traces],
        train_tokens=sum(s.tokens for s in lineage.traces if lineage.refit or s.use == "train"),
        refit=lineage.refit,
        code_revision=lineage.code_revision,
        trained_seconds=lineage.trained_seconds,
        hardware=lineage.hardware,
    )
