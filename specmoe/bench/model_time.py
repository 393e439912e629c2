"""The model alone: predict and advance, beside the bare ONNX Runtime session on the same inputs.

StoredVersion -> cases x batch sizes -> times -> `specmoe.bench.report`

specmoe bench --only model
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from model_store.manifest import ADVANCE, PREDICT, GraphName
from model_store.store import StoredVersion
from specmoe.bench.latency import Latency, measure, warm_up
from specmoe.bench.parts import Effort
from specmoe.bench.routing import Routing, made_up
from speculation.runtime import Speculator, State
from speculation.session import open_session

BATCHES = (1, 8, 32)
# A call takes the next one in turn: the same tokens again and again would be unusually well cached.
INPUTS = 16
CONTEXT_TOKENS = 3


@dataclass(frozen=True)
class Case:
    """One call of a decode loop. seen: layers of the current token that are known."""

    name: str
    graph: GraphName
    seen: int


def cases(num_layers: int) -> list[Case]:
    """What a decode loop calls: at token start, in the middle of a token, at its end."""
    return [
        Case("predict, no layer seen", PREDICT, 0),
        Case("predict, half of the layers seen", PREDICT, num_layers // 2),
        Case("advance", ADVANCE, num_layers),
    ]


class ModelTime:
    """Times of every case, by name and batch size: of `Speculator`, and of the session below it."""

    def __init__(self, stored: StoredVersion, speculator: Speculator) -> None:
        self._speculator = speculator
        provider = speculator.provider
        self._sessions = {
            name: open_session(stored.graphs[name], name, provider, 1) for name in (PREDICT, ADVANCE)
        }
        self._rows: list[tuple[Case, int, Latency, Latency]] = []

    def steps(self, effort: Effort) -> int:
        """One for each case and batch size."""
        return len(cases(self._speculator.spec.num_layers)) * len(BATCHES)

    def run(self, effort: Effort) -> Generator[str]:
        """Measure all; yields the name of what is measured next."""
        for case in cases(self._speculator.spec.num_layers):
            for batch in BATCHES:
                yield f"{case.name}, batch {batch}"
                ours, bare = Latency(), Latency()
                self._rows.append((case, batch, ours, bare))
                self._measure(case, batch, ours, bare, effort.model_seconds)

    def report(self) -> list[dict[str, Any]]:
        """Fit for JSON: a row a case and batch size. `session`: ONNX Runtime alone."""
        return [
            {"case": case.name, "batch": batch, "speculator": ours.report(), "session": bare.report()}
            for case, batch, ours, bare in self._rows
            if len(ours)
        ]

    def _measure(self, case: Case, batch: int, ours: Latency, bare: Latency, seconds: float) -> None:
        speculator, session = self._speculator, self._sessions[case.graph]
        state = after_context(speculator, batch)
        inputs = [made_up(speculator.spec, batch=batch, seen=case.seen, seed=seed) for seed in range(INPUTS)]
        feeds = [_feed(session, speculator, state, routing) for routing in inputs]
        outputs = [output.name for output in session.get_outputs()]
        options = onnxruntime.RunOptions()
        method = speculator.predict if case.graph == PREDICT else speculator.advance
        call = caller(method, state, inputs)

        def run(number: int) -> None:
            session.run(outputs, feeds[number % INPUTS], options)

        warm_up(call)
        warm_up(run)
        measure([(call, ours), (run, bare)], seconds)


def caller(method: Callable[..., Any], state: State, inputs: Sequence[Routing]) -> Callable[[int], Any]:
    """A call of `Speculator.predict` or `.advance` on the next of the inputs."""

    def call(number: int) -> None:
        routing = inputs[number % len(inputs)]
        method(state, routing.token_ids, routing.experts, routing.gates)

    return call


def after_context(speculator: Speculator, batch: int) -> State:
    """The state of sequences that have a little history: zeros may be a special case for a processor."""
    state = speculator.initial_state(batch)
    for seed in range(CONTEXT_TOKENS):
        routing = made_up(speculator.spec, batch=batch, seen=speculator.spec.num_layers, seed=1000 + seed)
        state = speculator.advance(state, routing.token_ids, routing.experts, routing.gates)
    return state


def _feed(
    session: onnxruntime.InferenceSession, speculator: Speculator, state: State, routing: Routing
) -> dict[str, np.ndarray[Any, Any]]:
    """What the session takes; a graph need not read all of the state."""
    untold = speculator.untold(len(routing.experts))
    names = [*(tensor.name for tensor in speculator.manifest.state), *(["hidden"] if untold else [])]
    given = {"token_id": routing.token_ids, "experts": routing.experts, "gates": routing.gates}
    given |= dict(zip(names, (*state, *untold), strict=True))
    return {taken.name: given[taken.name] for taken in session.get_inputs()}
