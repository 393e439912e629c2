"""Runs a model on a batch of texts, given or to be continued, and tells the routing, padding removed.

`training.collection.recording` calls these batch by batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int16, Int32, Int64
from torch import Tensor

from training.collection.model import Loaded
from training.collection.recorder import Recorder, Routing
from training.collection.routers import Stack
from training.collection.texts import Text


@dataclass(frozen=True)
class Recorded:
    """The tokens of one sequence that a stack has seen, and their routing; fields as in a RoutingTrace."""

    token_ids: Int32[np.ndarray, "T"]
    prefill: Bool[np.ndarray, "T"]
    experts: Int16[np.ndarray, "T L K"]
    gates: Float32[np.ndarray, "T L K"]
    hidden: Float16[np.ndarray, "T L H"] | None


@dataclass(frozen=True)
class _Read:
    """What a stack read, by sequence. before: padding before each, columns: tokens with padding."""

    token_ids: Sequence[Sequence[int]]
    prefill: Sequence[int]
    before: Sequence[int]
    columns: int


@torch.inference_mode()
def read_texts(loaded: Loaded, recorder: Recorder, texts: Sequence[Text]) -> Mapping[Stack, list[Recorded]]:
    """The routing of the texts as they are, in one pass.

    Where there are two stacks, the encoder reads the first half of each text and the decoder the second,
    behind its start token, as if it had written it.
    """
    ids = [list(text.token_ids) for text in texts]
    if not loaded.encoder_decoder:
        tokens, mask = padded(ids, loaded)
        with recorder.listening(len(ids)):
            loaded.model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return _by_stack(recorder, decoder=_given(ids))
    halves = [max(1, len(of) // 2) for of in ids]
    fronts = [of[:half] for of, half in zip(ids, halves, strict=True)]
    backs = [[loaded.start_id, *of[half:-1]] for of, half in zip(ids, halves, strict=True)]
    return read_pairs(loaded, recorder, fronts, backs)


@torch.inference_mode()
def read_pairs(
    loaded: Loaded, recorder: Recorder, fronts: Sequence[Sequence[int]], backs: Sequence[Sequence[int]]
) -> Mapping[Stack, list[Recorded]]:
    """The routing of what an encoder reads (`fronts`, token ids) and of what its decoder reads (`backs`)."""
    (front, front_mask), (back, back_mask) = padded(fronts, loaded), padded(backs, loaded)
    with recorder.listening(len(fronts)):
        loaded.model.base_model(
            input_ids=front,
            attention_mask=front_mask,
            decoder_input_ids=back,
            decoder_attention_mask=back_mask,
            use_cache=False,
        )
    return _by_stack(recorder, encoder=_given(fronts), decoder=_given(backs))


@torch.inference_mode()
def generate(
    loaded: Loaded, recorder: Recorder, texts: Sequence[Text], new_tokens: int
) -> Mapping[Stack, list[Recorded]]:
    """The routing of prompts and of the `new_tokens` tokens that the model writes behind them, greedily.

    The last token it writes is never read, so nothing routes it; neither is what ends a text.
    """
    prompts = [list(text.token_ids) for text in texts]
    tokens, mask = padded(prompts, loaded, left=not loaded.encoder_decoder)
    with recorder.listening(len(prompts)):
        output = loaded.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.pad_id,
        ).tolist()
    ahead = 1 if loaded.encoder_decoder else tokens.shape[1]
    written = [_until_the_end(of[ahead:], loaded.end_ids) for of in output]
    begun = [of[:1] for of in output] if loaded.encoder_decoder else prompts
    decoder = _Read(
        token_ids=[start + of[:-1] for start, of in zip(begun, written, strict=True)],
        prefill=[0 if loaded.encoder_decoder else len(prompt) for prompt in prompts],
        before=[ahead - len(start) for start in begun],
        columns=len(output[0]) - 1,
    )
    return _by_stack(recorder, encoder=_given(prompts) if loaded.encoder_decoder else None, decoder=decoder)


@torch.inference_mode()
def probe(loaded: Loaded, tokens: int) -> None:
    """Run the model once on one sequence of `tokens` tokens, in each stack."""
    ids = torch.full((1, tokens), loaded.pad_id, device=loaded.device)
    decoder = {"decoder_input_ids": ids} if loaded.encoder_decoder else {}
    loaded.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **decoder)


def expected_tokens(loaded: Loaded, stack: Stack, text: Text, new_tokens: int) -> int:
    """How many tokens of a text a stack will see, at most."""
    read, half = len(text.token_ids), max(1, len(text.token_ids) // 2)
    if not loaded.encoder_decoder:
        return read + max(0, new_tokens - 1)
    if stack.encodes:
        return read if new_tokens else half
    return new_tokens or max(1, read - half)


def padded(
    ids: Sequence[Sequence[int]], loaded: Loaded, *, left: bool = False
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """Sequences side by side, filled up to the longest, behind or before them, and a mask of them."""
    columns = max(map(len, ids))
    tokens = torch.full((len(ids), columns), loaded.pad_id)
    mask = torch.zeros_like(tokens)
    for row, of in enumerate(ids):
        place = slice(columns - len(of), columns) if left else slice(len(of))
        tokens[row, place] = torch.tensor(of)
        mask[row, place] = 1
    return tokens.to(loaded.device), mask.to(loaded.device)


def _given(ids: Sequence[Sequence[int]]) -> _Read:
    lengths = [len(of) for of in ids]
    return _Read(ids, prefill=lengths, before=[0] * len(ids), columns=max(lengths))


def _until_the_end(written: list[int], end_ids: frozenset[int]) -> list[int]:
    """What was written up to the token that ends it, which is part of it; behind that is padding."""
    end = next((at for at, token in enumerate(written) if token in end_ids), len(written))
    return written[: end + 1]


def _by_stack(
    recorder: Recorder, *, decoder: _Read, encoder: _Read | None = None
) -> dict[Stack, list[Recorded]]:
    result = {}
    for stack in recorder.stacks:
        read = encoder if encoder is not None and stack.encodes else decoder
        routing = recorder.take(stack, read.columns)
        result[stack] = [_of_sequence(routing, read, row) for row in range(len(read.token_ids))]
    return result


def _of_sequence(routing: Routing, read: _Read, row: int) -> Recorded:
    token_ids = np.array(read.token_ids[row], np.int32)
    place: Any = (row, slice(read.before[row], read.before[row] + len(token_ids)))
    return Recorded(
        token_ids=token_ids,
        prefill=np.arange(len(token_ids)) < read.prefill[row],
        experts=routing.experts[place],
        gates=routing.gates[place],
        hidden=None if routing.hidden is None else routing.hidden[place],
    )
