"""Walking a trace with a version: nothing of the future gets in, nothing of the past gets lost."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoe.cli import main
from speculation.runtime import Speculator
from tests.toy_version import toy_store, toy_stored
from tests.training.toy_routing import SPEC, toy_trace
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.baselines import BASELINES, Popularity, routing_maps
from training.errors import EvaluationError, SpecMismatch
from training.evaluate import Evaluation, evaluate, score_baseline
from training.forecasts import of_speculator

TRACE = toy_trace()
TRAIN = toy_trace((300,), seed=1)


@pytest.fixture(scope="module")
def speculator() -> Speculator:
    return Speculator(toy_stored(), provider="cpu")


class Wrapped:
    """A version whose answers are replaced, or whose inputs are looked at."""

    def __init__(self, inner: Speculator) -> None:
        self.inner, self.spec, self.manifest, self.provider = (
            inner,
            inner.spec,
            inner.manifest,
            inner.provider,
        )
        self.seen: list[tuple[Any, np.ndarray, Any]] = []

    def initial_state(self, batch: int) -> Any:
        return self.inner.initial_state(batch)

    def advance(self, state: Any, token_ids: Any, experts: Any, gates: Any) -> Any:
        return self.inner.advance(state, token_ids, experts, gates)

    def predict(self, state: Any, token_ids: Any, experts: Any, gates: Any) -> np.ndarray:
        self.seen.append((token_ids, experts, gates))
        return self.inner.predict(state, token_ids, experts, gates)


class Clairvoyant(Wrapped):
    """Finds the truth by the token id, which must be the row of the trace."""

    def __init__(self, inner: Speculator, trace: RoutingTrace) -> None:
        super().__init__(inner)
        self.truth = routing_maps(trace)

    def predict(self, state: Any, token_ids: Any, experts: Any, gates: Any) -> np.ndarray:
        return self.truth[np.zeros(len(experts), int) if token_ids is None else token_ids % len(self.truth)]


def one_by_one(speculator: Speculator, trace: RoutingTrace) -> Iterator[tuple[int, int, np.ndarray]]:
    """(row, seen, probabilities [L, E]), a sequence and a token at a time."""
    assert trace.token_ids is not None and trace.gates is not None
    for sequence in range(trace.num_sequences):
        state = speculator.initial_state(1)
        for row in range(*trace.sequence(sequence).indices(trace.num_tokens)):
            token = (trace.token_ids[[row]].astype(np.int64), trace.experts[[row]].astype(np.int32))
            for seen in range(trace.spec.num_layers):
                known = token[1].copy()
                known[:, seen:] = -1
                yield row, seen, speculator.predict(state, token[0], known, trace.gates[[row]])[0]
            state = speculator.advance(state, *token, trace.gates[[row]])


def scores_of(speculator: Any, trace: RoutingTrace, **options: Any) -> dict[tuple[int, int], np.ndarray]:
    """(row, seen) -> scores in rank order of the layers left."""
    return {
        (int(row), forecast.seen): forecast.ranked.scores[i]
        for forecast in of_speculator(speculator, trace, **options)
        for i, row in enumerate(forecast.rows)
    }


def test_every_token_gets_the_forecasts_it_gets_alone(speculator: Speculator) -> None:
    together = scores_of(speculator, TRACE)
    assert len(together) == TRACE.num_tokens * SPEC.num_layers
    for row, seen, probabilities in one_by_one(speculator, TRACE):
        expected = -np.sort(-probabilities[seen:], axis=-1)
        np.testing.assert_allclose(together[row, seen], expected, atol=1e-6)


@pytest.mark.parametrize("seen", range(SPEC.num_layers))
def test_no_forecast_changes_with_what_comes_later(speculator: Speculator, seen: int) -> None:
    row, other = 25, toy_trace(seed=7)
    assert TRACE.gates is not None and TRACE.token_ids is not None and other.gates is not None
    experts, gates, token_ids = TRACE.experts.copy(), TRACE.gates.copy(), TRACE.token_ids.copy()
    experts[row, seen:], gates[row, seen:] = other.experts[row, seen:], other.gates[row, seen:]
    experts[row + 1 :], gates[row + 1 :], token_ids[row + 1 :] = (
        other.experts[row + 1 :],
        other.gates[row + 1 :],
        3,
    )
    changed = scores_of(speculator, replace(TRACE, experts=experts, gates=gates, token_ids=token_ids))
    before = scores_of(speculator, TRACE)
    assert np.array_equal(changed[row, seen], before[row, seen])
    assert np.array_equal(changed[row - 1, 0], before[row - 1, 0])


def test_layers_not_seen_are_blotted_out(speculator: Speculator) -> None:
    spy = Wrapped(speculator)
    for forecast in of_speculator(spy, TRACE):  # type: ignore[arg-type]
        _, experts, gates = spy.seen[-1]
        assert (experts[:, : forecast.seen] >= 0).all() and (experts[:, forecast.seen :] == -1).all()
        assert (gates[:, forecast.seen :] == 1).all()


def test_a_perfect_forecast_scores_full_marks(speculator: Speculator) -> None:
    trace = replace(TRACE, token_ids=np.arange(TRACE.num_tokens, dtype=np.int32))
    clairvoyant = Clairvoyant(speculator, trace)
    for scores in evaluate(clairvoyant, trace).metrics.distances().values():  # type: ignore[arg-type]
        names = ("recall_at_k", "recall_at_2k", "hit_at_1", "exact_set", "gate_mass_recall", "ece", "brier")
        assert [scores[name] for name in names] == pytest.approx([1, 1, 1, 1, 1, 0, 0])


def test_the_oracle_baseline_scores_full_marks() -> None:
    for scores in score_baseline(BASELINES["oracle"]().fit(TRAIN), TRACE).distances().values():
        assert (scores["recall_at_k"], scores["exact_set"], scores["ece"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "random"])
def test_baselines_score_the_same_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = BASELINES[name]().fit(TRAIN)
    whole = score_baseline(baseline, TRACE).distances()
    monkeypatch.setattr("training.forecasts.CHUNK", 10)
    assert score_baseline(baseline, TRACE).distances() == whole


def test_many_sequences_and_batches_score_as_few(
    speculator: Speculator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores_of(speculator, TRACE)
    monkeypatch.setattr("training.forecasts.SEQUENCES_AT_ONCE", 2)
    monkeypatch.setattr("training.forecasts.ROWS_AT_ONCE", 5)
    few = scores_of(speculator, TRACE)
    assert whole.keys() == few.keys()
    assert all(np.allclose(few[key], whole[key], atol=1e-6) for key in whole)


def test_domains_score_as_their_sequences_alone(speculator: Speculator) -> None:
    alone = evaluate(speculator, TRACE.select([1, 3])).metrics.distances()
    domains = evaluate(speculator, TRACE).domains
    assert set(domains) == {"maths", "prose"}
    for distance in ("start", "1"):
        expected = {name: alone[distance][name] for name in ("recall_at_k", "recall_at_2k")}
        assert domains["maths"][distance] == pytest.approx(expected)


def test_one_token_in_three_is_scored_but_all_are_lived_through(speculator: Speculator) -> None:
    some, every = scores_of(speculator, TRACE, every=3), scores_of(speculator, TRACE)
    assert {row for row, _ in some} == set(range(0, TRACE.num_tokens, 3))
    np.testing.assert_allclose(some[30, 2], every[30, 2], atol=1e-6)


@pytest.mark.parametrize("name", ["token_ids", "gates"])
def test_a_withheld_input_is_as_if_the_trace_had_none(speculator: Speculator, name: str) -> None:
    withheld = scores_of(speculator, TRACE, **{name: False})
    absent = scores_of(speculator, replace(TRACE, **{name: None}))
    assert all(np.array_equal(withheld[key], absent[key]) for key in absent)


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("token_ids", [True, False])
def test_only_inputs_that_exist_are_withheld(speculator: Speculator, gates: bool, token_ids: bool) -> None:
    document = evaluate(speculator, toy_trace(gates=gates, token_ids=token_ids)).document()
    assert ("without_gates" in document, "without_token_ids" in document) == (gates, token_ids)
    assert (document["distances"]["1"]["gate_mass_recall"] is not None) == gates


@pytest.fixture(scope="module")
def evaluation(speculator: Speculator) -> Evaluation:
    return evaluate(speculator, TRACE, baselines=[Popularity().fit(TRAIN)])


def test_the_document_says_what_was_scored(evaluation: Evaluation) -> None:
    document = json.loads(json.dumps(evaluation.document()))
    assert (document["model"], document["version"], document["tokens"]) == ("toy", 1, 57)
    assert list(document["distances"]) == ["start", "1", "2", "3"]
    assert set(document["distances"]["start"]["top_n_accuracy"]) == {"1", "3", "5", "10"}
    assert list(document["baselines"]) == ["popularity"]


def test_the_cost_is_measured_and_told(evaluation: Evaluation) -> None:
    cost = evaluation.document()["cost"]
    assert cost["predict_us"] > 0 and cost["advance_us"] > 0 and cost["bytes"] > 0


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (RoutingSpec("toy", 5, 8, 2), "num_layers 5"),
        (RoutingSpec("toy", 4, 9, 2), "num_experts 9"),
        (RoutingSpec("toy", 4, 8, 3), "top_k 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trace_of_another_shape_is_refused(speculator: Speculator, spec: RoutingSpec, field: str) -> None:
    with pytest.raises(SpecMismatch, match=rf"has {field}, expected \d as in toy version 1\."):
        evaluate(speculator, toy_trace(spec=spec))


def test_a_trace_without_tokens_is_refused(speculator: Speculator) -> None:
    empty = replace(
        TRACE, experts=TRACE.experts[:0], gates=None, token_ids=None, starts=np.zeros(1, np.int64), domains=()
    )
    with pytest.raises(EvaluationError, match="no token"):
        evaluate(speculator, empty)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(a store with a toy, a trace file)."""
    trace = tmp_path / "test.npz"
    save(trace, TRACE)
    return toy_store(tmp_path), trace


def save(path: Path, trace: RoutingTrace, model: str = "toy") -> None:
    assert trace.gates is not None and trace.token_ids is not None
    np.savez(
        path,
        experts=trace.experts.astype(np.uint8),
        gates=trace.gates,
        token_ids=trace.token_ids,
        starts=trace.starts,
        domains=np.array(trace.domains),
        num_experts=trace.spec.num_experts,
        model=model,
    )


@pytest.mark.parametrize(("selector", "version"), [("", 2), ("@1", 1), ("@production", 2)])
def test_the_command_writes_the_scores_of_the_version_asked_for(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], selector: str, version: int
) -> None:
    store, trace = files
    out = tmp_path / "out" / "scores.json"
    arguments = [
        "evaluate",
        f"toy{selector}",
        "--traces",
        str(trace),
        "--store",
        str(store),
        "--json",
        str(out),
    ]
    assert main(arguments) == 0
    document = json.loads(out.read_text())
    assert (document["version"], document["trace"]["name"]) == (version, "test.npz")
    assert "| start" in capsys.readouterr().out


def test_the_command_reports_with_baselines(files: tuple[Path, Path], tmp_path: Path) -> None:
    store, trace = files
    save(tmp_path / "train.npz", TRAIN)
    learn = [
        "--baselines",
        "--train-traces",
        str(tmp_path / "train.npz"),
        "--report",
        str(tmp_path / "report"),
    ]
    assert main(["evaluate", "toy", "--traces", str(trace), "--store", str(store), *learn]) == 0
    assert "layer markov" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy", "--baselines"], "came without each other"),
        (["toy@"], "names no version"),
        (["toy@9"], "9"),
        (["absent"], "absent"),
    ],
    ids=["baselines without traces", "empty version", "unknown version", "unknown model"],
)
def test_the_command_says_what_it_cannot_do(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    store, trace = files
    assert main(["evaluate", *arguments, "--traces", str(trace), "--store", str(store)]) == 2
    assert message in capsys.readouterr().err


def test_a_trace_of_another_name_is_scored_with_a_warning(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "other.npz", TRACE, model="toy-finetuned")
    arguments = ["evaluate", "toy", "--traces", str(tmp_path / "other.npz"), "--store", str(files[0])]
    assert main(arguments) == 0
    assert "the traces are of toy-finetuned, not of toy" in capsys.readouterr().err
