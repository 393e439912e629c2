"""Recording a model: what ends up in the traces, stopping and going on, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.traces.made_up import files, same
from tests.training.toy_models import END, loaded, tokenizer, toy
from traces.errors import SpecMoEError, TraceError
from traces.files import load
from traces.parquet import read_hidden
from traces.recording import sequences_in
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training.collection import recording
from training.collection.config import CollectConfig
from training.collection.model import Loaded
from training.collection.recorder import Recorder
from training.collection.recording import collect
from training.collection.routers import find_routers
from training.errors import CollectionError, ConfigInvalid, RouterUnknown, TextInvalid


@pytest.fixture(scope="module")
def olmoe() -> Loaded:
    return loaded("olmoe")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, ...]:
    paths = tmp_path / "sea.txt", tmp_path / "land.txt"
    paths[0].write_text("The sea is wide. " * 9, encoding="utf-8")
    paths[1].write_text("Über Land, weit und breit.", encoding="utf-8")
    return paths


def config(texts: tuple[Path, ...], **changes: Any) -> CollectConfig:
    return CollectConfig(**{"texts": texts, "length": 16, "batch_size": 4} | changes)


def test_texts_become_sequences_of_their_tokens_and_domains(
    olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    collect(olmoe, config(texts), tmp_path / "t")
    trace = load(tmp_path / "t")
    assert trace.spec == RoutingSpec("olmoe", 3, 8, 2)
    assert np.diff(trace.starts).tolist() == [16] * 9 + [9, 16, 11]
    assert trace.domains == ("sea",) * 10 + ("land",) * 2
    read = olmoe.tokenizer.decode(trace.token_ids[: trace.starts[10]].tolist())
    assert read == "The sea is wide. " * 9
    assert trace.prefill is not None
    assert trace.prefill.all()


def test_generated_tokens_follow_their_prompt_and_are_told_apart(olmoe: Loaded, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "One", "domain": "numbers"}\n\n{"prompt": "Alphabet"}\n', encoding="utf-8")
    collect(olmoe, CollectConfig(prompts=prompts, length=64, new_tokens=5), tmp_path / "t")
    trace = load(tmp_path / "t")
    assert trace.domains == ("numbers", "unknown")
    assert np.diff(trace.starts).tolist() == [3 + 4, 8 + 4]
    assert trace.prefill is not None
    assert trace.prefill.tolist() == [True] * 3 + [False] * 4 + [True] * 8 + [False] * 4


def test_a_generated_text_ends_with_its_last_token_but_the_one_that_ends_it(tmp_path: Path) -> None:
    eager = loaded("olmoe")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\nAlphabet\n", encoding="utf-8")
    generated = CollectConfig(prompts=prompts, length=64, new_tokens=5)
    collect(eager, generated, tmp_path / "whole")
    whole = load(tmp_path / "whole")
    third = int(whole.token_ids[3 + 2])  # type: ignore[index]
    eager.model.generation_config.eos_token_id = [END, third]
    collect(eager, generated, tmp_path / "ended")
    ended = load(tmp_path / "ended")
    first = whole.token_ids[3:7].tolist().index(third)  # type: ignore[index]
    assert ended.token_ids[: ended.starts[1]].tolist() == whole.token_ids[: 3 + first].tolist()  # type: ignore[index]


def test_each_stack_has_a_trace_of_its_own(texts: tuple[Path, ...], tmp_path: Path) -> None:
    collect(loaded("switch"), config(texts), tmp_path / "t", name="switch-toy")
    encoder, decoder = load(tmp_path / "t" / "encoder"), load(tmp_path / "t" / "decoder")
    assert (encoder.spec, decoder.spec) == (
        RoutingSpec("switch-toy-encoder", 2, 8, 1),
        RoutingSpec("switch-toy-decoder", 2, 8, 1),
    )
    assert encoder.domains == decoder.domains
    assert np.diff(encoder.starts).tolist() == [8] * 9 + [4, 8, 5]
    assert np.diff(decoder.starts).tolist() == [8] * 9 + [5, 8, 6]


@pytest.mark.parametrize(
    ("family", "module", "new_tokens", "passes", "finished"),
    [
        ("olmoe", "model", 0, 3, 8),
        ("olmoe", "model", 3, 6, 4),
        ("switch", "decoder", 0, 3, 8),
        ("switch", "decoder", 3, 6, 4),
    ],
)
def test_a_resumed_recording_is_the_same_as_an_uninterrupted_one(
    texts: tuple[Path, ...],
    tmp_path: Path,
    family: str,
    module: str,
    new_tokens: int,
    passes: int,
    finished: int,
) -> None:
    model, wanted = loaded(family), config(texts, new_tokens=new_tokens)
    parts = [stack.name for stack in find_stacks(model)]
    handle = model.model.get_submodule(module).register_forward_pre_hook(interrupting(passes))
    with pytest.raises(KeyboardInterrupt):
        collect(model, wanted, tmp_path / "t")
    handle.remove()
    assert [sequences_in(tmp_path / "t" / part) for part in parts] == [finished] * len(parts)
    collect(model, config(texts, new_tokens=new_tokens, batch_size=3), tmp_path / "t", resume=True)
    collect(model, wanted, tmp_path / "at once")
    for part in parts:
        assert alike(load(tmp_path / "t" / part), load(tmp_path / "at once" / part))


def alike(one: RoutingTrace, other: RoutingTrace) -> bool:
    """The same, but for the last bits of gates: other batches add up in another order."""
    close = np.allclose(one.gates, other.gates, atol=1e-5)  # type: ignore[arg-type]
    return close and same(one, replace(other, gates=one.gates))


def find_stacks(model: Loaded) -> Any:
    return find_routers(model.model, lambda tokens: recording.probe(model, tokens))


def interrupting(passes: int) -> Any:
    """A Ctrl-C in the model's next pass after so many."""
    left = iter(range(passes))

    def count(*given: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return count


def test_a_budget_ends_with_the_sequence_that_reaches_it_and_may_be_raised(
    olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    for tokens, sequences in ((33, 3), (17, 3), (80, 5), (None, 12)):
        (collected,) = collect(olmoe, config(texts, tokens=tokens), tmp_path / "t", resume=True)
        assert collected.sequences == load(tmp_path / "t").num_sequences == sequences
    collect(olmoe, config(texts), tmp_path / "at once")
    assert alike(load(tmp_path / "t"), load(tmp_path / "at once"))


def test_hidden_states_route_as_recorded(olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path) -> None:
    collect(olmoe, config(texts, hidden=True), tmp_path / "t")
    trace, hidden = load(tmp_path / "t"), np.concatenate(list(read_hidden(tmp_path / "t")))
    assert hidden.shape == (trace.num_tokens, 3, 32)
    (stack,) = find_stacks(olmoe)
    for layer, router in enumerate(stack.routers):
        _, gates, experts = router.module(torch.from_numpy(hidden[:, layer]).float())
        agree = (experts.sort().values.numpy() == np.sort(trace.experts[:, layer])).all(-1)
        assert agree.mean() > 0.98  # half precision may turn a near tie
        assert np.allclose(gates.detach()[agree], trace.gates[agree, layer], atol=1e-2)  # type: ignore[index]


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt-oss", "granitemoe"])
def test_routers_are_kept_beside_hidden_states_and_pick_the_same(
    family: str, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    collect(loaded(family), config(texts, hidden=True), tmp_path / "t")
    trace = load(tmp_path / "t", hidden=True)
    assert trace.hidden is not None and trace.hidden.routers is not None
    weights, bias = trace.hidden.routers[..., :-1], trace.hidden.routers[..., -1]
    logits = np.einsum("nlh,leh->nle", trace.hidden.states.astype(np.float32), weights) + bias
    picked = np.argsort(-logits, axis=-1)[..., : trace.spec.top_k]
    assert (np.sort(picked) == np.sort(trace.experts)).all(-1).mean() > 0.98


def test_of_a_router_that_is_no_single_matrix_nothing_is_kept(
    texts: tuple[Path, ...], tmp_path: Path
) -> None:
    collect(loaded("dbrx"), config(texts, hidden=True), tmp_path / "t")
    trace = load(tmp_path / "t", hidden=True)
    assert trace.hidden is not None and trace.hidden.routers is None


def test_a_model_in_half_precision_is_recorded(texts: tuple[Path, ...], tmp_path: Path) -> None:
    half = loaded("qwen3-moe")
    half.model.to(torch.bfloat16)
    collect(half, config(texts, hidden=True), tmp_path / "t")
    assert load(tmp_path / "t").num_sequences == 12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 8}, "length is 16, not 8"),
        ({"new_tokens": 2}, "new_tokens is 0, not 2"),
        ({"domain": "else"}, "domain is , not else"),
        ({"texts": ("sea.txt",)}, "texts is sea.txt, land.txt, not sea.txt"),
        ({"hidden": True}, "it is of RoutingSpec"),
    ],
    ids=["length", "generate", "domain", "texts", "hidden"],
)
def test_another_recording_is_not_gone_on_with(
    olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    collect(olmoe, config(texts, tokens=20), tmp_path / "t")
    if "texts" in changes:
        changes = {"texts": tuple(tmp_path / name for name in changes["texts"])}
    with pytest.raises(TraceError, match=reason):
        collect(olmoe, config(**{"texts": texts} | changes), tmp_path / "t", resume=True)


def test_another_model_of_the_same_name_is_not_gone_on_with(
    olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    collect(olmoe, config(texts, tokens=20), tmp_path / "t")
    with pytest.raises(TraceError, match="routers_sha256 is"):
        collect(loaded("olmoe", seed=1), config(texts), tmp_path / "t", resume=True)


def test_a_recording_is_not_overwritten(olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path) -> None:
    collect(olmoe, config(texts, tokens=20), tmp_path / "t")
    before = [file.read_bytes() for file in files(tmp_path / "t")]
    with pytest.raises(CollectionError, match=r"exists already.*--resume"):
        collect(olmoe, config(texts), tmp_path / "t")
    assert [file.read_bytes() for file in files(tmp_path / "t")] == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"caf\xe9 " * 9, "byte 3 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', "line 2: expected an object"),
        ("a.jsonl", b'{"prompt": "x", "domain": ""}\n', "line 1: expected an object"),
        ("a.jsonl", b"prompt\n", "line 1 is no JSON"),
        ("a.txt", None, "No such file"),
        ("a.txt", b"\n \n", "hold no tokens"),
    ],
    ids=["not UTF-8", "no prompt", "no domain", "no JSON", "missing", "empty"],
)
def test_what_cannot_be_read_is_refused_and_leaves_nothing(
    olmoe: Loaded, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecMoEError, match=reason) as refused:
        collect(olmoe, CollectConfig(prompts=tmp_path / name, length=64), tmp_path / "t")
    assert isinstance(refused.value, CollectionError | TextInvalid)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 1}, "length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"texts": ()}, "neither"),
        ({"prompts": Path("p")}, "texts and prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        config(**{"texts": (Path("t"),)} | changes)


def test_longer_texts_than_the_model_reads_are_refused(
    olmoe: Loaded, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid, match="more than the 256 that olmoe can read"):
        collect(olmoe, config(texts, length=250, new_tokens=7), tmp_path / "t")


class OddRouter(torch.nn.Linear):
    """Looks like a router, and returns its logits alone."""


class PlainRouter(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = super().forward(hidden)
        top, experts = logits.topk(2)
        return logits, top.softmax(-1), experts


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(RouterUnknown, match="Linear has no layers with experts"):
        find_routers(torch.nn.Linear(4, 4), lambda tokens: None)


def test_a_router_that_cannot_be_read_is_named_with_what_it_returns() -> None:
    model = torch.nn.Sequential(OddRouter(4, 8))
    with pytest.raises(
        RouterUnknown, match=r"the first is 0: OddRouter returns float32 \[5, 8\].*readers.py"
    ):
        find_routers(model, lambda tokens: model(torch.zeros(tokens, 4)))


def test_layers_that_differ_are_no_trace() -> None:
    model = toy("olmoe")
    model.model.layers[1].mlp.gate.top_k = 3
    odd = Loaded("odd", model, tokenizer(), False)
    with pytest.raises(RouterUnknown, match="8 experts, top-2 and 8 experts, top-3"):
        find_stacks(odd)


def test_a_router_that_cannot_be_read_beside_one_that_can_is_named() -> None:
    layers = torch.nn.ModuleList([torch.nn.Sequential(kind(4, 8)) for kind in (PlainRouter, OddRouter)])
    with pytest.raises(RouterUnknown, match=r"1 modules look like routers .* the first is 1\.0: OddRouter"):
        find_routers(layers, lambda tokens: [layer(torch.zeros(tokens, 4)) for layer in layers])


def test_a_router_that_is_asked_twice_about_a_token_is_refused() -> None:
    layer = torch.nn.Sequential(PlainRouter(4, 8))
    (stack,) = find_routers(layer, lambda tokens: layer(torch.zeros(tokens, 4)))
    recorder = Recorder([stack], hidden=False)
    with recorder.listening(1):
        for _ in range(2):
            layer(torch.zeros(10, 4))
    with pytest.raises(RouterUnknown, match="0 was asked about 20 tokens of each sequence, expected 10"):
        recorder.take(stack, 10)


def test_stacks_that_were_killed_apart_go_on_together(texts: tuple[Path, ...], tmp_path: Path) -> None:
    model = loaded("switch")
    collect(model, config(texts, tokens=100), tmp_path / "t")
    collect(model, config(texts, tokens=40), tmp_path / "earlier")
    shutil.rmtree(tmp_path / "t" / "decoder")
    (tmp_path / "earlier" / "decoder").rename(tmp_path / "t" / "decoder")
    assert sequences_in(tmp_path / "t" / "encoder") > sequences_in(tmp_path / "t" / "decoder")
    collect(model, config(texts), tmp_path / "t", resume=True)
    collect(model, config(texts), tmp_path / "at once")
    for part in ("encoder", "decoder"):
        assert alike(load(tmp_path / "t" / part), load(tmp_path / "at once" / part))


def test_a_batch_that_does_not_fit_is_told_and_keeps_what_was_before(
    texts: tuple[Path, ...], tmp_path: Path
) -> None:
    model, passes = loaded("olmoe"), iter(range(2))

    def fill(*given: Any) -> None:
        if next(passes, None) is None:
            raise torch.OutOfMemoryError

    model.model.model.register_forward_pre_hook(fill)
    with pytest.raises(CollectionError, match=r"4 sequences of 16 tokens do not fit onto cpu.*--resume"):
        collect(model, config(texts), tmp_path / "t")
    assert sequences_in(tmp_path / "t") == 4
