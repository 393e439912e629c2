"""The outlook: what it learns to tell, that the graph tells it, and that a cache gains from it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.manifest import OUTLOOK, Lineage, StateTensor
from model_store.store import StoredVersion, open_store
from speculation.publishing import publish_export
from speculation.runtime import Speculator, load_speculator
from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_run import save_npz
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.errors import ConfigInvalid, ExportFailed
from training.keeping import by_outlook, by_outlook_and_forecast, cache_report
from training.outlook import OutlookConfig, examples, scores, train_outlook, used_within, without_outlook
from training.outlook_graph import readable

GPT_OSS = RoutingSpec("gpt-oss-20b", 24, 32, 4)
TRAIN, VALIDATION = (
    toy_trace(lengths, spec=GPT_OSS, seed=seed) for lengths, seed in (((60, 50), 1), ((40,), 2))
)
LINEAGE = Lineage(
    traces=(), command="test", code_revision="none", seed=0, trained_seconds=0.0, hardware="none", packages={}
)
SMALL = OutlookConfig(tokens=3, rank=4, steps=40, batch_tokens=32)


@pytest.fixture(scope="module")
def bundled() -> StoredVersion:
    return open_store().load("gpt-oss-20b", 1)


@pytest.fixture(scope="module")
def store(bundled: StoredVersion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled version, its outlook learned from made-up routing."""
    folder = tmp_path_factory.mktemp("outlook")
    train_outlook(bundled, TRAIN, VALIDATION, SMALL, LINEAGE, folder / "export")
    publish_export(folder / "export", open_store(folder / "store"))
    return folder / "store"


@pytest.fixture(scope="module")
def speculator(store: Path) -> Speculator:
    return load_speculator("gpt-oss-20b", store=store, provider="cpu")


def test_a_published_outlook_knows_more_than_how_often_each_expert_is_used(speculator: Speculator) -> None:
    outlook = speculator.manifest.outlook
    assert outlook is not None and outlook.tokens == 3
    found = outlook.metrics["validation"]
    assert found["brier"] < found["rate"] * (1 - found["rate"])
    assert found["ece"] < 0.05


def test_the_other_graphs_stay_as_they_are(
    speculator: Speculator, bundled: StoredVersion, store: Path
) -> None:
    published = without_outlook(open_store(store).load("gpt-oss-20b", 1))
    assert published.graphs == bundled.graphs
    assert speculator.manifest.lineage == bundled.manifest.lineage


def test_a_cache_gains_from_it(speculator: Speculator) -> None:
    report = cache_report(speculator, VALIDATION)
    assert list(report) == [
        "lru",
        "lfu",
        "decayed frequency",
        "outlook",
        "outlook and forecast",
        "clairvoyant",
    ]
    for share in ("0.125", "0.25", "0.5"):
        assert all(rates[share] <= report["clairvoyant"][share] for rates in report.values())


@pytest.mark.parametrize("policy", [by_outlook, by_outlook_and_forecast])
def test_what_is_kept_does_not_depend_on_what_comes_later(speculator: Speculator, policy: object) -> None:
    other = toy_trace((40,), spec=GPT_OSS, seed=5)
    token = 20
    experts = np.concatenate([VALIDATION.experts[:token], other.experts[token:]])
    assert VALIDATION.token_ids is not None
    changed = RoutingTrace(
        GPT_OSS, experts, None, VALIDATION.token_ids, VALIDATION.starts, VALIDATION.domains
    )
    plain = RoutingTrace(
        GPT_OSS, VALIDATION.experts, None, VALIDATION.token_ids, VALIDATION.starts, VALIDATION.domains
    )
    worths = []
    for trace in (plain, changed):
        kept = policy(speculator, trace)  # type: ignore[operator]
        kept.begin(token)
        before = kept.worth().copy()
        kept.use(token, 0, np.arange(4))
        worths.append((before, kept.worth().copy()))
    np.testing.assert_allclose(worths[0], worths[1], atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 7))
def test_uses_are_those_of_the_next_tokens_of_the_sequence(lengths: list[int], tokens: int) -> None:
    trace = toy_trace(tuple(lengths), seed=3)
    found = used_within(trace, tokens)
    for sequence in range(trace.num_sequences):
        part = trace.sequence(sequence)
        for row in range(part.start, part.stop):
            coming = trace.experts[row : min(row + tokens, part.stop)]
            for layer in range(trace.spec.num_layers):
                assert set(np.flatnonzero(found[row, layer])) == set(coming[:, layer].ravel().tolist())


def test_tokens_whose_future_is_unknown_are_left_out(bundled: StoredVersion) -> None:
    speculator = Speculator(bundled, provider="cpu")
    carried = readable(bundled.manifest.state, GPT_OSS)
    assert [tensor.name for tensor in carried] == ["context", "previous", "averages"]
    assert len(examples(speculator, TRAIN, carried, 11)) == 110 - 2 * 10
    with pytest.raises(ConfigInvalid, match="No sequence has 61 tokens"):
        examples(speculator, TRAIN, carried, 61)


def test_a_state_without_maps_cannot_carry_an_outlook() -> None:
    state = (StateTensor(name="hidden", dtype="float32", shape=(64,)),)
    with pytest.raises(ExportFailed, match=r"no tensor \[n, 4, 8\]"):
        readable(state, SPEC)


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.random((400, 10, 10)).astype(np.float32)
    uses = rng.random(p.shape) < p
    assert scores(p, uses)["ece"] < 0.015 < 0.2 < scores(p**3, uses)["ece"]


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"steps": 0}, {"learning_rate": 1.0}])
def test_knobs_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigInvalid, match=next(iter(wrong))):
        OutlookConfig(**wrong)  # type: ignore[arg-type]


def test_the_command_makes_what_publish_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from specmoe.cli import main

    traces = [
        str(save_npz(trace, tmp_path / f"{name}.npz")) for name, trace in (("t", TRAIN), ("v", VALIDATION))
    ]
    files = ["--traces", traces[0], "--validation", traces[1], "--folder", str(tmp_path / "made")]
    assert main(["outlook", "gpt-oss-20b@1", *files, "--steps", "5", "--tokens", "2"]) == 0
    assert "Uses within 2 tokens" in capsys.readouterr().out
    assert (tmp_path / "made" / OUTLOOK).stat().st_size > 1000
