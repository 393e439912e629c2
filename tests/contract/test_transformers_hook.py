"""Models of transformers that are followed by a stream, against the real service in a process of its own.

What a model routed is heard a second time by `training.collection`'s recorder, and what a version says of it
is computed here without any service: the forecasts that the hook hands out must be those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from specmoe_client import NotFound, RequestInvalid, RoutingShape, Stream
from specmoe_client.integrations.routers import find_routers as found_by_client
from specmoe_client.integrations.routers import shape_of
from specmoe_client.integrations.transformers import Hook, attach

from model_store.store import open_store
from speculation.demand import union_demand
from speculation.ranking import rank
from speculation.runtime import Speculator
from tests.contract.running import running_service
from tests.contract.streams import until
from tests.contract.test_stream_service import PATIENT_MS
from tests.toy_version import toy_version
from tests.training.toy_models import END, FAMILIES, OTHERS, SIZES
from traces.spec import RoutingSpec
from training.collection.recorder import Recorder
from training.collection.routers import find_routers

SPECS = {
    name: RoutingSpec(model=name, num_layers=3, num_experts=8, top_k=2) for name in ("olmoe", "qwen3-moe")
}
LAYERS, TOP_N = 3, 4
CONFIGS: dict[str, Callable[..., Any]] = {
    "olmoe": transformers.OlmoeConfig,
    "qwen3-moe": transformers.Qwen3MoeConfig,
}
PADDED = {
    "input_ids": torch.tensor([[END, END, 5, 9, 11], [7, 8, 9, 10, 11]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
families = pytest.mark.parametrize("family", SPECS)


def small(family: str, **changes: Any) -> Any:
    """A model of random weights that never ends a text by itself."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_experts": 8, "eos_token_id": None} | changes
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**sizes)).eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hook")
    for spec in SPECS.values():
        open_store(root).publish(*toy_version(spec))
    return root


@pytest.fixture(scope="module")
def service(store: Path) -> Iterator[dict[str, Any]]:
    with running_service(store) as reached:
        yield reached


def stream_of(service: dict[str, Any], family: str, **options: Any) -> Stream:
    return Stream(**service, model=family, union=True, per_sequence=False, top_n=TOP_N, **options)


class Reference:
    """What a version says of a model's tokens, told token by token. heard: by another recorder."""

    def __init__(self, store: Path, family: str, model: Any) -> None:
        self._speculator = Speculator(open_store(store).load(family, 1), provider="cpu")
        self.recorder = Recorder(
            find_routers(model, lambda n: model(torch.zeros(1, n, dtype=torch.int64))), hidden=False
        )

    def take(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts and gates [B, T, L, K]."""
        routing = self.recorder.take(self.recorder.stacks[0], tokens)
        return routing.experts.astype(np.int32), routing.gates

    def probabilities(self, ids: np.ndarray, experts: np.ndarray, gates: np.ndarray, seen: int) -> np.ndarray:
        """[L, E] of the last token of one row, of which `seen` layers are known."""
        state = self._speculator.initial_state(1)
        for token in range(len(ids) - 1):
            state = self._speculator.advance(
                state, ids[token : token + 1], experts[token][None], gates[token][None]
            )
        now, weights = experts[-1][None].copy(), gates[-1][None].copy()
        now[:, seen:], weights[:, seen:] = -1, 0
        answer: np.ndarray = self._speculator.predict(state, ids[-1:], now, weights)[0]
        return answer


class Patient:
    """A callback that waits, so that each forecast has seen all that was told. calls: (layer, forecast)."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.hook: Hook | None = None
        self.calls: list[tuple[int, Any]] = []

    def __call__(self, layer: int, forecast: Any) -> None:
        assert self.hook is not None
        decoding = any(handle is not None for handle in self.hook.sequences)
        self.calls.append((layer, self._stream.wait_union(PATIENT_MS) if decoding else forecast))


def followed(model: Any, stream: Stream, reference: Reference, **given: Any) -> tuple[Any, Patient]:
    """(ids that were generated from, what the callback got) of `generate`, with both recorders attached."""
    callback = Patient(stream)
    with attach(model, stream, callback) as callback.hook, torch.no_grad():
        with reference.recorder.listening(len(given["input_ids"])):
            ids = model.generate(do_sample=False, pad_token_id=END, **given)
        assert callback.hook.last_error is None
    return ids.numpy(), callback


def assert_foretold(forecast: Any, expected: list[np.ndarray], seen: int) -> None:
    """The forecast is the union [L, E] of these rows."""
    assert forecast is not None
    assert forecast.seen == seen
    experts, probabilities = rank(union_demand(np.stack(expected))[seen:], TOP_N)
    np.testing.assert_allclose(forecast.probabilities, probabilities, atol=1e-5)
    np.testing.assert_array_equal(forecast.experts, experts)


@families
def test_the_service_hears_what_the_model_routed(family: str, service: dict[str, Any], store: Path) -> None:
    model = small(family)
    reference = Reference(store, family, model)
    with stream_of(service, family) as stream:
        ids, callback = followed(model, stream, reference, **PADDED, max_new_tokens=5)
    tokens = ids.shape[1] - 1
    experts, gates = reference.take(tokens)
    assert [layer for layer, _ in callback.calls] == [0, 1, 2] * 5
    assert [forecast for _, forecast in callback.calls[:LAYERS]] == [None] * LAYERS  # of the prompt
    for number, (layer, forecast) in enumerate(callback.calls[LAYERS:]):
        end = 6 + number // LAYERS
        rows = [
            reference.probabilities(
                ids[row, first:end], experts[row, first:end], gates[row, first:end], layer
            )
            for row, first in enumerate((2, 0))
        ]
        assert_foretold(forecast, rows, layer)


def test_a_new_text_knows_nothing_of_the_one_before(service: dict[str, Any], store: Path) -> None:
    model = small("olmoe")
    reference = Reference(store, "olmoe", model)
    prompt = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.tensor([[1]])}
    with stream_of(service, "olmoe") as stream:
        _, first = followed(model, stream, reference, **prompt, max_new_tokens=4)
        callback = Patient(stream)
        with attach(model, stream, callback) as callback.hook, torch.no_grad():
            for _ in range(2):
                model.generate(**prompt, do_sample=False, max_new_tokens=4, pad_token_id=END)
            assert sum(handle is not None for handle in callback.hook.sequences) == 1
    assert len(first.calls) == 4 * LAYERS  # a prompt of one token is live, too
    for start in (0, 4 * LAYERS):
        for (_, forecast), (_, again) in zip(first.calls, callback.calls[start:], strict=False):
            np.testing.assert_array_equal(forecast.experts, again.experts)
            np.testing.assert_allclose(forecast.probabilities, again.probabilities, atol=1e-5)


@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_a_prompt_that_is_read_in_pieces_is_context_like_any_other(
    embedded: bool, service: dict[str, Any], store: Path
) -> None:
    model = small("olmoe")
    reference = Reference(store, "olmoe", model)
    ids, embed = torch.tensor([[4, 5, 6, 7, 8, 9]]), model.get_input_embeddings()
    # transformers calls it one way or the other, by version.
    name = next(name for name in ("cache", "past_key_values") if name in signature(model.forward).parameters)
    cache = {name: transformers.DynamicCache(config=model.config)}
    with stream_of(service, "olmoe") as stream, torch.no_grad():
        callback = Patient(stream)
        with attach(model, stream, callback) as callback.hook, reference.recorder.listening(1):
            for piece in (ids[:, :2], ids[:, 2:5], ids[:, 5:]):
                model(**({"inputs_embeds": embed(piece)} if embedded else {"input_ids": piece}), **cache)
            assert callback.hook.last_error is None
    experts, gates = reference.take(6)
    told = np.full(6, -1) if embedded else ids[0].numpy()
    for layer, forecast in callback.calls[-LAYERS:]:
        assert_foretold(forecast, [reference.probabilities(told, experts[0], gates[0], layer)], layer)


def test_only_the_newest_tokens_of_a_long_prompt_are_told(service: dict[str, Any], store: Path) -> None:
    model = small("olmoe")
    reference = Reference(store, "olmoe", model)
    with stream_of(service, "olmoe", history=2) as stream:
        prompt = {name: of[1:] for name, of in PADDED.items()}
        ids, callback = followed(model, stream, reference, **prompt, max_new_tokens=2)
    experts, gates = reference.take(6)
    layer, forecast = callback.calls[-1]
    told = slice(3, 6)
    expected = reference.probabilities(ids[0, told], experts[0, told], gates[0, told], layer)
    assert_foretold(forecast, [expected], layer)


def test_a_row_that_has_ended_is_told_no_longer(service: dict[str, Any]) -> None:
    model = small("olmoe")
    plain = model.generate(**PADDED, do_sample=False, max_new_tokens=6, pad_token_id=END)
    # What the first row writes first and the second never ends the text.
    end = next(int(token) for token in plain[0, 5:8] if token not in plain[1, 5:])
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = END
    rows: list[int] = []
    hook: Hook
    with stream_of(service, "olmoe") as stream:

        def count(layer: int, forecast: Any) -> None:
            union = stream.wait_union(PATIENT_MS) if any(h is not None for h in hook.sequences) else None
            rows.append(0 if union is None else len(union.sequences))

        with attach(model, stream, count) as hook:
            written = model.generate(**PADDED, do_sample=False, max_new_tokens=6)
            assert hook.sequences[0] is None
            assert hook.sequences[1] is not None
            assert hook.last_error is None
    both = int((written[0, 5:] == end).nonzero()[0]) + 1
    assert rows[LAYERS:] == [2] * both * LAYERS + [1] * (5 - both) * LAYERS


@families
def test_the_model_computes_the_same_bits(family: str, service: dict[str, Any]) -> None:
    model = small(family)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "do_sample": True}

    def run() -> Any:
        torch.manual_seed(1)
        return model.generate(**PADDED, **options, pad_token_id=END)

    alone = run()
    hooks = count_hooks(model)
    with stream_of(service, family) as stream:
        with attach(model, stream, lambda layer, forecast: None):
            followed_one = run()
        assert count_hooks(model) == hooks
    assert torch.equal(alone.sequences, followed_one.sequences)
    assert all(map(torch.equal, alone.logits, followed_one.logits))


def count_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_dead_service_means_no_forecasts() -> None:
    model = small("olmoe")
    plain = model.generate(**PADDED, do_sample=False, max_new_tokens=4, pad_token_id=END)
    calls: list[Any] = []
    with stream_of({"base_url": "http://127.0.0.1:1"}, "olmoe") as stream:
        stream.ready = lambda: False  # type: ignore[method-assign]  # it would wait for seconds
        with attach(model, stream, lambda *call: calls.append(call)) as hook:
            ids = model.generate(**PADDED, do_sample=False, max_new_tokens=4, pad_token_id=END)
            assert hook.last_error is None
        until(lambda: stream.last_failure is not None)
    assert torch.equal(plain, ids)
    assert calls == [(layer, None) for _ in range(4) for layer in range(LAYERS)]


def test_a_service_that_dies_in_the_middle_changes_nothing(store: Path) -> None:
    model = small("olmoe")
    given = PADDED | {"do_sample": False, "max_new_tokens": 8, "pad_token_id": END}
    plain = model.generate(**given)
    calls: list[Any] = []
    with running_service(store, "--shutdown-seconds", "1") as reached:
        stream = stream_of(reached, "olmoe")
        hook = attach(model, stream, lambda *call: calls.append(call))
        assert torch.equal(plain, model.generate(**given))
    with stream, hook:
        until(lambda: stream.latest_union() is None and stream.status.state == "broken")
        calls.clear()
        assert torch.equal(plain, model.generate(**given))
        assert hook.last_error is None
    assert {forecast for _, forecast in calls} == {None}


def test_a_callback_that_fails_is_told_and_the_model_goes_on(
    service: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = small("olmoe")
    with stream_of(service, "olmoe") as stream:

        def fail(layer: int, forecast: Any) -> None:
            raise KeyError("no such expert in the cache")

        with attach(model, stream, fail) as hook:
            ids = model.generate(**PADDED, do_sample=False, max_new_tokens=3, pad_token_id=END)
            assert isinstance(hook.last_error, KeyError)
    assert ids.shape == (2, 8)
    assert caplog.text.count("on_forecast failed") == 1


def test_routing_that_cannot_be_told_gives_up_the_batch_and_begins_anew(service: dict[str, Any]) -> None:
    model = small("olmoe")
    broken = iter([False] * 4 + [True] + [False] * 100)
    router = model.model.layers[1].mlp.gate
    # Registered before the hook's own: the hook sees what it returns.
    router.register_forward_hook(
        lambda _, __, answer: (answer[0], answer[1] * float("nan"), answer[2]) if next(broken) else answer
    )
    with stream_of(service, "olmoe") as stream:
        callback = Patient(stream)
        with attach(model, stream, callback) as callback.hook:
            model.generate(**PADDED, do_sample=False, max_new_tokens=6, pad_token_id=END)
            assert isinstance(callback.hook.last_error, RequestInvalid)
    forecasts = [forecast for _, forecast in callback.calls]
    assert any(forecast is None for forecast in forecasts[LAYERS:])
    assert forecasts[-1] is not None


def test_reset_and_close_forget_the_sequences(service: dict[str, Any]) -> None:
    model = small("olmoe")
    with stream_of(service, "olmoe") as stream:
        hook = attach(model, stream)
        model.generate(**PADDED, do_sample=False, max_new_tokens=2, pad_token_id=END)
        told = hook.sequences
        assert None not in told
        hook.reset()
        assert hook.sequences == []
        with pytest.raises(RequestInvalid, match="not open"):
            stream.start(told)
        hook.close()
        model.generate(**PADDED, do_sample=False, max_new_tokens=2, pad_token_id=END)
        assert hook.sequences == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 2}, "2 layers of 8 experts, top-2"),
        ({"num_experts": 16}, "3 layers of 16 experts, top-2"),
        ({"num_experts_per_tok": 3}, "3 layers of 8 experts, top-3"),
    ],
    ids=["layers", "experts", "top-k"],
)
def test_a_version_of_another_shape_is_refused(
    changes: dict[str, int], told: str, service: dict[str, Any]
) -> None:
    model = small("olmoe", **changes)
    hooks = count_hooks(model)
    with stream_of(service, "olmoe") as stream, pytest.raises(RequestInvalid) as caught:
        attach(model, stream)
    assert f"OlmoeForCausalLM has {told}; version 1 of olmoe is for 3 layers of 8" in str(caught.value)
    assert count_hooks(model) == hooks


def test_what_cannot_be_followed_is_refused_at_once(service: dict[str, Any]) -> None:
    dense = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    with stream_of(service, "olmoe") as stream:
        with pytest.raises(RequestInvalid, match="no router"):
            attach(dense, stream)
        with pytest.raises(RequestInvalid, match=r"model\.eval\(\)"):
            attach(small("olmoe").train(), stream)
    with Stream(**service, model="olmoe") as stream, pytest.raises(RequestInvalid, match="union=True"):
        attach(small("olmoe"), stream)
    with stream_of(service, "mixtral") as stream, pytest.raises(NotFound):
        attach(small("olmoe"), stream)


@pytest.mark.parametrize("family", ["glm4-moe", "ernie4.5-moe", "minimax-m2"])
def test_routers_of_other_families_are_found_where_the_recorder_finds_them(family: str) -> None:
    model = OTHERS[family]().eval()
    (stack,) = find_routers(model, lambda n: model(torch.zeros(1, n, dtype=torch.int64)))
    mine = found_by_client(model)
    assert [router.module for router in mine] == [router.module for router in stack.routers]
    assert shape_of(mine) == RoutingShape(len(stack.routers), stack.num_experts, stack.top_k)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("jetmoe", "no router"),
        ("dbrx", "no router"),
        ("llama4", "no router"),
        ("switch", "cannot run 5 tokens alone"),
        ("nllb-moe", "cannot run 5 tokens alone"),
    ],
)
def test_families_that_cannot_be_followed_are_told_apart_from_others(family: str, told: str) -> None:
    with pytest.raises(RequestInvalid, match=told):
        found_by_client(FAMILIES[family]().eval())
