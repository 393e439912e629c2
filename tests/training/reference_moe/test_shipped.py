"""What is shipped of the reference model: it loads, routes as its traces tell, and is as good as told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from model_store.store import open_store
from traces.files import load
from training.collection import model as collected
from training.collection.model import Loaded
from training.reference_moe.model import answer, count_parameters

SHIPPED = Path(__file__).parents[3] / "reference_moe"
PAGE = (SHIPPED.parent / "docs" / "reference-moe.md").read_text(encoding="utf-8")
REPORT = json.loads((SHIPPED / "report.json").read_text(encoding="utf-8"))
MAX_BYTES = 30_000_000


@pytest.fixture(scope="module")
def shipped() -> Loaded:
    return collected.load(str(SHIPPED / "checkpoint"), device="cpu", dtype="float32")


def test_the_checkpoint_is_small_and_in_half_precision(shipped: Loaded) -> None:
    assert sum(file.stat().st_size for file in (SHIPPED / "checkpoint").iterdir()) <= MAX_BYTES
    with safe_open(SHIPPED / "checkpoint" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    model = REPORT["models"]["decoder"]
    assert count_parameters(shipped.model) == (model["parameters"], model["active_parameters"])


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_it_routes_as_its_traces_tell(shipped: Loaded, part: str) -> None:
    trace = load(SHIPPED / "traces" / part)
    assert trace.token_ids is not None
    for first, end in zip(trace.starts[:2], trace.starts[1:3], strict=True):
        ids = torch.from_numpy(trace.token_ids[first : end + 1].astype(np.int64))
        with torch.no_grad():
            routers = answer(shipped.model, ids[None]).routers
        chosen = torch.stack([logits.topk(trace.spec.top_k).indices for logits in routers], 1).numpy()
        recorded = trace.experts[first : first + len(chosen)]
        # Sums in another order turn near ties.
        assert (np.sort(chosen, -1) == np.sort(recorded, -1)).mean() > 0.999


def test_hidden_states_are_those_that_the_routers_saw(shipped: Loaded) -> None:
    trace = load(SHIPPED / "traces" / "hidden", hidden=True)
    hidden = trace.hidden
    assert hidden is not None and hidden.routers is not None
    assert hidden.states.shape == (trace.num_tokens, trace.spec.num_layers, shipped.model.config.hidden_size)
    weights = torch.stack([layer.mlp.gate.weight for layer in shipped.model.model.layers])
    np.testing.assert_array_equal(hidden.routers[..., :-1], weights.detach().numpy())
    logits = np.einsum("tlh,leh->tle", hidden.states.astype(np.float32), hidden.routers[..., :-1])
    best = np.argsort(-logits, -1)[..., : trace.spec.top_k]
    # Hidden states are kept in half precision.
    assert (np.sort(best, -1) == np.sort(trace.experts, -1)).mean() > 0.99


def test_its_predictor_is_bundled_and_of_its_shape(shipped: Loaded) -> None:
    store = open_store()
    manifest = store.load("reference-moe", store.resolve("reference-moe", "production")).manifest
    config = shipped.model.config
    assert manifest.spec == load(SHIPPED / "traces" / "test").spec
    assert manifest.spec.num_experts == config.num_experts
    assert {source.name for source in manifest.lineage.traces} == {"train", "validation"}


def test_it_is_what_was_asked_for() -> None:
    model = REPORT["models"]["decoder"]
    assert model["perplexity"] < REPORT["unigram"]["perplexity"] / 5
    assert min(model["experts"]["usage_entropy"]) >= 0.8
    for domain, perplexity in model["perplexity_by_domain"].items():
        assert perplexity < REPORT["unigram"]["perplexity_by_domain"][domain] / 3


def test_the_page_tells_the_report() -> None:
    for name, model in REPORT["models"].items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {model['perplexity']:.1f} |" in line
    for domain, perplexity in REPORT["models"]["decoder"]["perplexity_by_domain"].items():
        assert f"| {domain} | {perplexity:.1f} |" in PAGE
