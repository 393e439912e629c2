"""Texts and prompts as sequences of token ids, in pieces, framed as the tokenizer frames them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import processors

from tests.training.toy_models import END, tokenizer
from training.collection import texts
from training.collection.model import usable
from training.collection.texts import Tokens, prompts_of, texts_of


def framing(template: str) -> Tokens:
    """Of a tokenizer that puts its only special token where the template says."""
    toy = tokenizer()
    post = processors.TemplateProcessing(single=template, special_tokens=[("</s>", END)])
    toy.backend_tokenizer.post_processor = post
    return Tokens(toy, 8)


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [("$A", [], []), ("</s> $A", [END], []), ("$A </s>", [], [END]), ("</s> $A </s>", [END], [END])],
)
def test_every_piece_is_framed_as_a_text_of_its_own(
    tmp_path: Path, template: str, before: list[int], behind: list[int]
) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    tokens = framing(template)
    pieces = [list(text.token_ids) for text in texts_of([tmp_path / "a.txt"], tokens, None)]
    size = 8 - len(before) - len(behind)
    ids = tokens.of("abcdefghijklmnopqrstuvwxyz")
    assert pieces == [
        [*before, *ids[at : at + size], *behind] for at in range(0, 26, size) if len(ids[at : at + size]) > 1
    ]


def test_a_text_larger_than_a_block_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("Ein Wörtchen, noch eins.\nUnd eins.  " * 5 + "x" * 40, encoding="utf-8")
    whole = list(texts_of([tmp_path / "a.txt"], framing("$A"), None))
    monkeypatch.setattr(texts, "BLOCK_CHARACTERS", 7)
    assert list(texts_of([tmp_path / "a.txt"], framing("$A"), None)) == whole


def test_a_prompt_is_cut_to_the_length_and_keeps_its_domain(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "abcdefghijkl"}\n{"prompt": "x", "domain": "y"}')
    tokens = framing("</s> $A")
    read = [(list(text.token_ids), text.domain) for text in prompts_of(tmp_path / "a.jsonl", tokens, None)]
    assert read == [([END, *tokens.of("abcdefg")], "unknown"), ([END, *tokens.of("x")], "y")]


@pytest.mark.parametrize(
    ("name", "called"),
    [("allenai/OLMoE-1B-7B", "olmoe-1b-7b"), ("./models/My Model/", "my-model"), ("_.", "model")],
)
def test_a_model_is_called_by_the_last_part_of_its_name(name: str, called: str) -> None:
    assert usable(name) == called
