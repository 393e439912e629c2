"""A version, running: two ONNX Runtime sessions behind two pure functions.

store.load() -> Speculator -> advance / predict -> ranking, coverage, demand

python -c "from speculation.runtime import load_speculator as load; print(load('gpt-oss-20b').spec)"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from jaxtyping import Float32, Int32, Int64

from model_store.manifest import ADVANCE, PREDICT, Manifest
from model_store.store import Store, StoredVersion, open_store
from speculation.errors import InputInvalid
from speculation.golden import check_golden
from speculation.inputs import FLOAT32, INT32, INT64, check_array, check_experts, check_gates
from speculation.session import (
    Provider,
    ProviderChoice,
    Tensor,
    check_signature,
    choose_provider,
    open_session,
)
from traces.spec import RoutingSpec

# One array [B, ...] for each state tensor of the manifest, in its order.
State: TypeAlias = tuple[np.ndarray[Any, Any], ...]

# Defaults for absent inputs are kept for batches up to this size; larger ones are made anew.
LARGEST_KEPT_BATCH = 64


class Speculator:
    """Runs one version. Holds no sequence: state goes in and comes out, so threads may share it.

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
        predict, advance = f"{self.origin}/{PREDICT}", f"{self.origin}/{ADVANCE}"
        self.provider: Provider = choose_provider(provider, stored.predict, predict)
        self._predict = open_session(stored.predict, predict, self.provider, threads)
        self._advance = open_session(stored.advance, advance, self.provider, threads)
        inputs, probabilities, next_state = _signature(self.manifest)
        check_signature(self._predict, predict, inputs, [probabilities])
        check_signature(self._advance, advance, inputs, next_state)
        self._state = [(t.name, np.dtype(t.dtype), t.shape) for t in self.manifest.state]
        self._next_names = [tensor.name for tensor in next_state]
        # Made once: a call with its own costs 2 µs more.
        self._run_options = onnxruntime.RunOptions()
        self._defaults = {batch: self._absent(batch) for batch in range(1, LARGEST_KEPT_BATCH + 1)}

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
        feed = self._feed(state, token_ids, experts, gates)
        return tuple(self._advance.run(self._next_names, feed, self._run_options))

    def predict(
        self,
        state: State,
        token_ids: Int64[np.ndarray, "B"] | None,
        experts: Int32[np.ndarray, "B L K"],
        gates: Float32[np.ndarray, "B L K"] | None,
    ) -> Float32[np.ndarray, "B L E"]:
        """Probability that an expert is among the routed ones of a layer of the current token.

        experts: -1 in every slot of a layer not seen yet. Rows of layers that were seen mean nothing.
        Raises InputInvalid.
        """
        feed = self._feed(state, token_ids, experts, gates)
        probabilities: np.ndarray[Any, Any] = self._predict.run(_PROBABILITIES, feed, self._run_options)[0]
        return probabilities

    def _feed(
        self,
        state: State,
        token_ids: np.ndarray[Any, Any] | None,
        experts: np.ndarray[Any, Any],
        gates: np.ndarray[Any, Any] | None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The graphs' inputs, checked: a few microseconds for one sequence."""
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
        feed = {"token_id": token_ids, "experts": experts, "gates": gates}
        if len(state) != len(self._state):
            raise InputInvalid(
                f"state has {len(state)} arrays, expected {len(self._state)}.",
                remedy="Begin with initial_state().",
            )
        for array, (name, dtype, shape) in zip(state, self._state, strict=True):
            check_array(f"state {name}", array, dtype, (batch, *shape))
            feed[name] = array
        return feed

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


_PROBABILITIES = ["probabilities"]


def _signature(manifest: Manifest) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(inputs of both graphs, output of predict, outputs of advance), as the contract has them."""
    spec = manifest.spec
    slots = (spec.num_layers, spec.top_k)
    state = [Tensor(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.state]
    routing = [
        Tensor("token_id", "int64", ()),
        Tensor("experts", "int32", slots),
        Tensor("gates", "float32", slots),
    ]
    probabilities = Tensor("probabilities", "float32", (spec.num_layers, spec.num_experts))
    return [*state, *routing], probabilities, [Tensor(f"next_{t.name}", t.dtype, t.shape) for t in state]
