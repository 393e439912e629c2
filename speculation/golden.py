"""A version's known answer: what it must predict after made-up routing that anyone can make up again.

Written into the manifest by training's export, checked before a version is published and before it is served.

    specmoe publish runs/mine/export --store ./store
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from model_store.manifest import STEP
from speculation.errors import GoldenMismatch
from speculation.steps import Steps, step_through
from traces.spec import RoutingSpec

if TYPE_CHECKING:
    from speculation.runtime import Speculator, State

NUM_TOKENS = 4
# Half precision on an accelerator and 8 bits stay within it, a wrong weight does not.
TOLERANCE = 1e-2


def golden_inputs(
    spec: RoutingSpec,
) -> tuple[Int64[np.ndarray, "T"], Int32[np.ndarray, "T L K"], Float32[np.ndarray, "T L K"]]:
    """(token_ids, experts, gates) of T = 4 tokens, by formula; the second id is unknown (-1), the last
    is that of the first."""
    token = np.arange(NUM_TOKENS)[:, None, None]
    layer = np.arange(spec.num_layers)[None, :, None]
    slot = np.arange(spec.top_k)[None, None, :]
    experts = (5 * token + 3 * layer + slot) % spec.num_experts
    gates = 1.0 + (token + layer + 2 * slot) % 3
    token_ids = np.array([11, -1, 2011, 11])
    return token_ids, experts.astype(np.int32), (gates / gates.sum(axis=-1, keepdims=True)).astype(np.float32)


def golden_probabilities(speculator: Speculator) -> Float[np.ndarray, "L E"]:
    """What it predicts for the last token, the first half of its layers seen; rows of seen layers are 0.

    A version that reads a hidden state is told one.
    """
    size = speculator.manifest.hidden_size
    told = (golden_hidden(size),) if size else ()
    return _unseen(speculator.predict(*_last_token(speculator), *told)[0])


def golden_hidden(size: int) -> Float32[np.ndarray, "1 H"]:
    """A hidden state, by formula, from -1 to 1."""
    return (((5 * np.arange(size) + 3) % 17 - 8) / 8).astype(np.float32)[None]


def golden_uses(speculator: Speculator) -> Float[np.ndarray, "L E"]:
    """What its outlook is at the last token's start."""
    uses: Float[np.ndarray, "L E"] = speculator.outlook(_last_token(speculator)[0])[0]
    return uses


def check_golden(speculator: Speculator) -> None:
    """Raises GoldenMismatch where the answer is no probability or not the published one.

    A version that can go step by step must come to the same answer layer by layer, without a hidden state;
    one that has an outlook must tell the published one.
    """
    golden = np.asarray(speculator.manifest.golden, np.float32)
    _check(speculator, "predicts", golden_probabilities(speculator), golden)
    if STEP in speculator.graphs:
        if speculator.manifest.hidden_size:
            golden = _unseen(speculator.predict(*_last_token(speculator))[0])
        stepped = step_through(Steps(speculator), *_last_token(speculator), at_once=1)[0]
        _check(speculator, "predicts, step by step,", _unseen(stepped), golden)
    if speculator.manifest.outlook is not None:
        uses = np.asarray(speculator.manifest.outlook.golden, np.float32)
        _check(speculator, "expects", golden_uses(speculator), uses)


def _last_token(
    speculator: Speculator,
) -> tuple[State, Int64[np.ndarray, "1"], Int32[np.ndarray, "1 L K"], Float32[np.ndarray, "1 L K"]]:
    """(state, token id, experts, gates): the last of the golden tokens, half of its layers seen."""
    token_ids, experts, gates = golden_inputs(speculator.spec)
    state = speculator.initial_state(1)
    for t in range(NUM_TOKENS - 1):
        state = speculator.advance(state, token_ids[t : t + 1], experts[t : t + 1], gates[t : t + 1])
    current = experts[-1:].copy()
    current[:, speculator.spec.num_layers // 2 :] = -1
    return state, token_ids[-1:], current, gates[-1:]


def _unseen(probabilities: Float32[np.ndarray, "L E"]) -> Float32[np.ndarray, "L E"]:
    """The same with rows of seen layers, which mean nothing, set to 0."""
    return np.where(np.arange(len(probabilities))[:, None] < len(probabilities) // 2, 0.0, probabilities)


def _check(
    speculator: Speculator,
    predicts: str,
    came: Float[np.ndarray, "L E"],
    golden: Float[np.ndarray, "L E"],
) -> None:
    possible = (came >= 0) & (came <= 1)  # NaN is neither
    if not possible.all():
        layer, expert = np.argwhere(~possible)[0]
        raise GoldenMismatch(
            f"{speculator.origin} {predicts} {came[layer, expert]} for layer {layer}, expert {expert}, "
            "expected a probability.",
            remedy="Train or export it again; do not serve it.",
        )
    difference = np.abs(came - golden)
    if difference.max() > TOLERANCE:
        layer, expert = np.unravel_index(difference.argmax(), difference.shape)
        raise GoldenMismatch(
            f"{speculator.origin} {predicts} {came[layer, expert]:.4f} for layer {layer}, expert {expert} on "
            f"{speculator.provider}, its manifest promises {golden[layer, expert]:.4f}.",
            remedy="Export it again, or run it on the provider it was checked on (`cpu`).",
        )
