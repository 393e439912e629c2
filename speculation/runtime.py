"""A version, running: ONNX Runtime sessions behind pure functions.

store.load() -> Speculator -> advance / predict / outlook -> ranking, coverage, demand
                           -> Steps: the same, layer by layer (`speculation.steps`)

python -c "from speculation.runtime import load_speculator as load; print(load('gpt-oss-20b').spec)"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, Int64

from model_store.manifest import ADVANCE, BEGIN, OUTLOOK, PREDICT, STEP, GraphName, Manifest, StateTensor
from model_store.store import Store, StoredVersion, open_store
from speculation.coverage import CoverageSets, all_sets, level_number
from speculation.errors import InputInvalid, OutlookUnknown
from speculation.golden import check_golden
from speculation.inputs import FLOAT32, INT32, INT64, check_array, check_experts, check_gates, check_hidden
from speculation.session import (
    Graph,
    Provider,
    ProviderChoice,
    Signature,
    Tensor,
    choose_provider,
    open_session,
)
from traces.spec import RoutingSpec

# One array [B, ...] for each state tensor of the manifest, in its order.
State: TypeAlias = tuple[np.ndarray[Any, Any], ...]

# Defaults for absent inputs are kept for batches up to this size; larger ones are made anew.
LARGEST_KEPT_BATCH = 64
# A state takes a thousand times as much.
LARGEST_KEPT_STATE = 16


class Speculator:
    """Runs one version. Holds no sequence: state goes in and comes out, so threads may share it.

    graphs: what the version can do, for those who check what they put in themselves.
    provider: `auto` takes CUDA where it really works; threads: ONNX Runtime's, within one call; origin: what
    messages call the version (`model/version`).
    Raises GraphRefused where the graphs are not what the manifest says, ProviderUnavailable.
    """

    def __init__(
        self,
        stored: StoredVersion,
        *,
        provider: ProviderChoice = "auto",
        threads: int = 1,
        origin: str | None = None,
    ) -> None:
        if threads < 1:
            raise InputInvalid(f"threads is {threads}, expected at least 1.", remedy="One is fastest mostly.")
        self.manifest: Manifest = stored.manifest
        self.spec: RoutingSpec = stored.manifest.spec
        self.origin: str = origin or f"{self.spec.model}/{self.manifest.version}"
        self.provider: Provider = choose_provider(
            provider, stored.graphs[PREDICT], f"{self.origin}/{PREDICT}"
        )
        self.graphs: dict[GraphName, Graph] = {}
        for name, signature in _signatures(self.manifest).items():
            origin = f"{self.origin}/{name}"
            session = open_session(stored.graphs[name], origin, self.provider, threads)
            self.graphs[name] = Graph(session, origin, signature)
        self._predict, self._advance = self.graphs[PREDICT], self.graphs[ADVANCE]
        self._state = [(t.name, np.dtype(t.dtype), t.shape) for t in self.manifest.state]
        self._sets = all_sets(self.manifest.coverage, self.spec.num_layers)
        self._defaults = {batch: self._absent(batch) for batch in range(1, LARGEST_KEPT_BATCH + 1)}
        self._nothing = self.initial_state(LARGEST_KEPT_STATE)

    def coverage_sets(self, level: float) -> CoverageSets:
        """Which experts to fetch so that all routed ones are among them, with a probability in (0, 1].

        A level that the manifest lacks is answered by the next higher one. Raises CoverageUnknown.
        """
        return self._sets[level_number(self.manifest.coverage, level)]

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences of which nothing has happened yet: zeros."""
        return tuple(np.zeros((batch, *shape), dtype) for _, dtype, shape in self._state)

    def advance(
        self,
        state: State,
        token_ids: Int64[np.ndarray, "B"] | None,
        experts: Int32[np.ndarray, "B L K"],
        gates: Float32[np.ndarray, "B L K"] | None,
    ) -> State:
        """The state after one more finished token of each sequence. Raises InputInvalid.

        token_ids: -1 or None where unknown; gates: any positive scale, None where unknown.
        """
        routing = self._checked(state, token_ids, experts, gates)
        return tuple(self._advance(*[state[place] for place in self._advance.reads], *routing))

    def predict(
        self,
        state: State | None,
        token_ids: Int64[np.ndarray, "B"] | None,
        experts: Int32[np.ndarray, "B L K"],
        gates: Float32[np.ndarray, "B L K"] | None,
        hidden: Float32[np.ndarray, "B H"] | None = None,
    ) -> Float32[np.ndarray, "B L E"]:
        """Probability that an expert is among the routed ones of a layer of the current token.

        state: None where nothing has happened yet, which costs less than `initial_state`.
        experts: -1 in every slot of a layer not seen yet. Rows of layers that were seen mean nothing.
        hidden: for a version that reads it, what the router of the last layer seen was given; at a token's
        start, what the last layer's was for the token before; zeros or None where unknown. Raises
        InputInvalid.
        """
        routing = self._checked(state, token_ids, experts, gates)
        if hidden is not None:
            self.check_hidden(hidden, len(experts))
        told = self.untold(len(experts)) if hidden is None else (hidden,)
        if state is None:
            state = self._nothing_yet(len(experts))
        return self._predict(*[state[place] for place in self._predict.reads], *routing, *told)[0]

    def untold(self, batch: int) -> tuple[Float32[np.ndarray, "B H"], ...]:
        """What predict takes last where no hidden state is known; nothing where it reads none."""
        size = self.manifest.hidden_size
        return (np.zeros((batch, size), np.float32),) if size else ()

    def check_hidden(self, hidden: Float32[np.ndarray, "B H"], batch: int) -> None:
        """Raises InputInvalid where the version reads none, or it is not `batch` finite ones of its size."""
        if not self.manifest.hidden_size:
            raise InputInvalid(
                f"{self.origin} reads no hidden state.",
                remedy="Leave it out, or publish a version that was trained to read it.",
            )
        check_hidden(hidden, (batch, self.manifest.hidden_size))

    def outlook(self, state: State) -> Float32[np.ndarray, "B L E"]:
        """Probability that an expert is used within the next n tokens: what a cache should keep.

        n: `manifest.outlook.tokens`; the token in progress, of which nothing is known here, is the first of
        them. Raises OutlookUnknown where the version cannot tell, InputInvalid.
        """
        graph = self.graphs.get(OUTLOOK)
        if graph is None:
            raise OutlookUnknown(
                f"{self.origin} has no {OUTLOOK}.",
                remedy="Make a version that has one: specmoe outlook, then specmoe publish.",
            )
        self._check_state(state, len(state[0]) if state and isinstance(state[0], np.ndarray) else 1)
        return graph(*[state[place] for place in graph.reads])[0]

    def _checked(
        self,
        state: State | None,
        token_ids: np.ndarray[Any, Any] | None,
        experts: np.ndarray[Any, Any],
        gates: np.ndarray[Any, Any] | None,
    ) -> tuple[np.ndarray[Any, Any], ...]:
        """(token ids, experts, gates), they and the state checked: a few microseconds for one sequence."""
        spec = self.spec
        # At least one: an empty batch, too, is told what was expected.
        batch = len(experts) or 1 if isinstance(experts, np.ndarray) and experts.ndim else 1
        check_array("experts", experts, INT32, (batch, spec.num_layers, spec.top_k))
        check_experts(experts, spec)
        if gates is not None:
            check_array("gates", gates, FLOAT32, experts.shape)
            check_gates(gates, experts)
        if token_ids is not None:
            check_array("token_ids", token_ids, INT64, (batch,))
        if token_ids is None or gates is None:
            absent = self._defaults.get(batch) or self._absent(batch)
            token_ids = absent[0] if token_ids is None else token_ids
            gates = absent[1] if gates is None else gates
        if state is not None:
            self._check_state(state, batch)
        return token_ids, experts, gates

    def _nothing_yet(self, batch: int) -> State:
        """`initial_state`, for reading only."""
        if batch > LARGEST_KEPT_STATE:
            return self.initial_state(batch)
        return tuple(array[:batch] for array in self._nothing)

    def _check_state(self, state: State, batch: int) -> None:
        """Raises InputInvalid where it is not the state of `batch` sequences."""
        if len(state) != len(self._state):
            raise InputInvalid(
                f"state has {len(state)} arrays, expected {len(self._state)}.",
                remedy="Begin with initial_state().",
            )
        for array, (name, dtype, shape) in zip(state, self._state, strict=True):
            check_array(f"state {name}", array, dtype, (batch, *shape))

    def _absent(self, batch: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What stands for unknown token ids and gates."""
        shape = (batch, self.spec.num_layers, self.spec.top_k)
        return np.full(batch, -1, np.int64), np.ones(shape, np.float32)


def load_speculator(
    model: str,
    *,
    version: int | str | None = None,
    store: Store | str | Path | None = None,
    provider: ProviderChoice = "auto",
) -> Speculator:
    """A version out of a store, running, its golden answer checked.

    version: a number or an alias; None: `production`, else the newest. store: None: the versions shipped with
    the project. Raises StoreError, SpeculationError.
    """
    opened = open_store(store) if store is None or isinstance(store, str | Path) else store
    speculator = Speculator(opened.load(model, opened.resolve(model, version)), provider=provider)
    check_golden(speculator)
    return speculator


def _signatures(manifest: Manifest) -> dict[GraphName, Signature]:
    """What each of the version's graphs takes and returns, as the contract has it."""
    spec = manifest.spec
    state, token, progress = map(_tensors, (manifest.state, manifest.token, manifest.progress))
    token_id = Tensor("token_id", "int64", ())
    routing = (token_id, *_routing(spec.num_layers, spec.top_k))
    probabilities = Tensor("probabilities", "float32", (spec.num_layers, spec.num_experts))
    hidden = (Tensor("hidden", "float32", (manifest.hidden_size,)),) if manifest.hidden_size else ()
    found: dict[GraphName, Signature] = {
        PREDICT: Signature(state, (*routing, *hidden), (probabilities,)),
        ADVANCE: Signature(state, routing, _next(state)),
    }
    if manifest.outlook is not None:
        uses = Tensor("uses", "float32", (spec.num_layers, spec.num_experts))
        found[OUTLOOK] = Signature(state, (), (uses,))
    if not token:
        return found
    told = (Tensor("layers", "int32", (None,)), *_routing(None, spec.top_k))
    found[BEGIN] = Signature(state, (token_id,), token)
    found[STEP] = Signature(state, (*token, *progress, *told), (*_next(progress), probabilities))
    return found


def _routing(layers: int | None, top_k: int) -> tuple[Tensor, Tensor]:
    return Tensor("experts", "int32", (layers, top_k)), Tensor("gates", "float32", (layers, top_k))


def _tensors(carried: tuple[StateTensor, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(tensor.name, tensor.dtype, tensor.shape) for tensor in carried)


def _next(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(f"next_{tensor.name}", tensor.dtype, tensor.shape) for tensor in tensors)
