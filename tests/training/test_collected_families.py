"""Of each family: what is recorded is what its routers decide, and all that its experts need to know."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.forced_routing import forced
from tests.training.routing_formulas import FORMULAS
from tests.training.toy_models import FAMILIES, OTHERS, loaded, random_ids
from training.collection.model import Loaded
from training.collection.passes import Recorded, generate, padded, probe, read_pairs, read_texts
from training.collection.recorder import Recorder
from training.collection.routers import Stack, find_routers
from training.collection.texts import Text

LENGTHS = (9, 4, 17)
TEXTS = [Text(tuple(ids), "toy") for ids in random_ids(LENGTHS)]
SEVERAL_STACKS = {"switch", "nllb-moe"}

families = pytest.mark.parametrize("family", FAMILIES)
families_and_others = pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])


def recorder_of(toy: Loaded, *, hidden: bool = False) -> Recorder:
    return Recorder(find_routers(toy.model, lambda tokens: probe(toy, tokens)), hidden=hidden)


def inputs(toy: Loaded, ids: list[list[int]]) -> dict[str, Any]:
    tokens, mask = padded(ids, toy)
    if not toy.encoder_decoder:
        return {"input_ids": tokens, "attention_mask": mask}
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "decoder_input_ids": tokens,
        "decoder_attention_mask": mask,
    }


def by_layer(recorder: Recorder, tokens: int) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """What was recorded of one sequence or several of the same length, by router: ids and gates [n, K]."""
    result = {}
    for stack in recorder.stacks:
        routing = recorder.take(stack, tokens)
        for layer, router in enumerate(stack.routers):
            experts, gates = routing.experts[:, :, layer], routing.gates[:, :, layer]
            result[router.module] = (
                torch.tensor(experts.reshape(-1, stack.top_k), dtype=torch.int64),
                torch.tensor(gates.reshape(-1, stack.top_k)),
            )
    return result


def test_every_family_has_a_formula() -> None:
    assert FORMULAS.keys() == FAMILIES.keys()


@families
def test_routers_are_found_with_their_stacks_and_layers(family: str) -> None:
    toy = loaded(family)
    stacks = recorder_of(toy).stacks
    assert [stack.name for stack in stacks] == (["encoder", "decoder"] if family in SEVERAL_STACKS else [""])
    layers = {"jetmoe": 6, "deepseek-v2": 2, "deepseek-v3": 2, "switch": 2, "nllb-moe": 2, "jamba": 1}
    top_k = 1 if family == "switch" else 2
    assert {(len(s.routers), s.num_experts, s.top_k, s.hidden_size) for s in stacks} == {
        (layers.get(family, 3), 8, top_k, 32)
    }


@families
def test_what_is_recorded_follows_from_the_routers_weights(family: str) -> None:
    toy = loaded(family)
    recorder = recorder_of(toy, hidden=True)
    seen: dict[Any, torch.Tensor] = {}
    weights = {}
    for router in (router for stack in recorder.stacks for router in stack.routers):
        path = router.path
        if family == "dbrx":  # the layer works out the top-k, between its router and its experts
            path = f"{path.rpartition('.')[0]}.router"
        weights[router.module] = toy.model.get_submodule(path)
        weights[router.module].top_k = router.top_k
        weights[router.module].register_forward_pre_hook(
            lambda module, given, of=router.module: seen.update({of: given[0]})
        )
    with torch.inference_mode(), recorder.listening(2):
        toy.model(**inputs(toy, random_ids((11, 11))))
    for module, routing in by_layer(recorder, 11).items():
        experts, gates = ordered(*(tensor.numpy() for tensor in routing))
        expected_experts, expected_gates = ordered(*FORMULAS[family](weights[module], seen[module]))
        assert np.array_equal(experts, expected_experts)
        assert np.allclose(gates, expected_gates, atol=1e-5)


def ordered(experts: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By expert id: some routers leave the order open."""
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(gates, order, -1)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "jetmoe", "granitemoe", "jamba"]
)
def test_the_ids_are_the_largest_router_logits_that_the_model_tells(family: str) -> None:
    toy = loaded(family)
    recorder = recorder_of(toy)
    with torch.inference_mode(), recorder.listening(2):
        output = toy.model(**inputs(toy, random_ids((11, 11))), output_router_logits=True)
    recorded = [experts for experts, _ in by_layer(recorder, 11).values()]
    told = [logits.reshape(22, 8).topk(2).indices for logits in output.router_logits]
    assert len(recorded) == len(told)
    assert all(
        torch.equal(mine.sort().values, theirs.sort().values)
        for mine, theirs in zip(recorded, told, strict=True)
    )


@families_and_others
def test_a_model_with_other_routers_that_is_made_to_route_as_recorded_gives_the_same_logits(
    family: str,
) -> None:
    toy = loaded(family)
    recorder = recorder_of(toy)
    given = inputs(toy, random_ids((11, 11)))
    with torch.inference_mode(), recorder.listening(2):
        logits = toy.model(**given).logits
    recorded = by_layer(recorder, 11)
    paths = {module: path for path, module in toy.model.named_modules()}
    other = copy.deepcopy(toy.model)
    scrambled = {other.get_submodule(paths[module]): routing for module, routing in recorded.items()}
    scramble(other)
    with torch.inference_mode():
        assert not torch.allclose(other(**given).logits, logits, atol=1e-4)
        with forced(scrambled):
            assert torch.allclose(other(**given).logits, logits, atol=1e-5)


def scramble(model: Any) -> None:
    """Give the routers other weights."""
    for path, parameter in model.named_parameters():
        if any(part in ("router", "gate") for part in path.split(".")):
            parameter.data.normal_(generator=torch.Generator().manual_seed(7))


@families_and_others
def test_padding_and_batch_size_change_nothing(family: str) -> None:
    toy = loaded(family)
    recorder = recorder_of(toy, hidden=True)
    together = read_texts(toy, recorder, TEXTS)
    for index, text in enumerate(TEXTS):
        same(of_row(together, index), of_row(read_texts(toy, recorder, [text]), 0))


@families_and_others
def test_generated_tokens_are_routed_as_when_they_are_read(family: str) -> None:
    toy = loaded(family)
    recorder = recorder_of(toy)
    generated = generate(toy, recorder, TEXTS, 6)
    (decoder,) = (stack for stack in generated if not stack.encodes)
    ids = [row.token_ids.tolist() for row in generated[decoder]]
    if toy.encoder_decoder:
        read = read_pairs(toy, recorder, [text.token_ids for text in TEXTS], ids)
    else:
        read = read_texts(toy, recorder, [Text(tuple(of), "toy") for of in ids])
    assert max(map(len, ids)) > (1 if toy.encoder_decoder else max(LENGTHS))
    for index in range(len(TEXTS)):
        same(of_row(generated, index), of_row(read, index))


@families_and_others
def test_listening_changes_no_bit_of_what_the_model_computes(family: str) -> None:
    toy = loaded(family)
    recorder = recorder_of(toy, hidden=True)
    given = inputs(toy, random_ids((11, 11)))
    with torch.inference_mode():
        before = toy.model(**given).logits
        with recorder.listening(2):
            during = toy.model(**given).logits
        after = toy.model(**given).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def of_row(recorded: Mapping[Stack, list[Recorded]], row: int) -> list[Recorded]:
    return [rows[row] for rows in recorded.values()]


def same(one: list[Recorded], other: list[Recorded]) -> None:
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.array_equal(a.experts, b.experts)
        assert np.allclose(a.gates, b.gates, atol=1e-5)
        if a.hidden is not None and b.hidden is not None:
            assert np.allclose(a.hidden, b.hidden, atol=1e-2)
