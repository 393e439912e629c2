"""A routing trace in memory: which experts each token was routed to, layer by layer, sequence by sequence.

Everything that reads a trace (`traces.files.load`) hands on this form, checked; everything that learns from
routing or scores it starts here.

    python -c "from pathlib import Path; from traces.files import load; print(load(Path('traces.npz')).spec)"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int32, Int64

from traces.errors import TraceError
from traces.hidden import HiddenStates, concatenated
from traces.spec import RoutingSpec

UNKNOWN_DOMAIN = "unknown"
UNKNOWN_TOKEN = -1
MAX_DOMAIN_LENGTH = 200
# Checks look at this many routed experts at a time, so that their copies stay near 100 MB.
ENTRIES_AT_ONCE = 1 << 23

RECORD_AGAIN = "Correct the recording or leave this sequence out."


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """N tokens of S sequences, one after another, each routed to K of E experts in L layers.

    experts: routed expert ids, 0..E-1, in the router's order where the source kept it.
    gates: router weight of each routed expert, any positive scale; None where unknown.
    token_ids: the token at that position in the model's own tokenizer, -1 where unknown; None where all are.
    starts: sequence i is tokens starts[i]:starts[i + 1], in order.
    domains: where each sequence's prompt came from, "unknown" where nobody said.
    prefill: True where the token was read together with others (a prompt, a given text), False where it
        was decoded on its own; None where nobody said.
    hidden: what each router was given, and the routers; None unless it was recorded and asked for.
    """

    spec: RoutingSpec
    experts: Int16[np.ndarray, "N L K"]
    gates: Float32[np.ndarray, "N L K"] | None
    token_ids: Int32[np.ndarray, "N"] | None
    starts: Int64[np.ndarray, "S+1"]
    domains: tuple[str, ...]
    prefill: Bool[np.ndarray, "N"] | None = None
    hidden: HiddenStates | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.experts)

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    def sequence(self, index: int) -> slice:
        """The tokens of sequence `index`, counted from 0."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def select(self, sequence_indices: Sequence[int]) -> RoutingTrace:
        """These sequences alone, in the order given.

        Raises TraceError where none is given, or one that does not exist.
        """
        for index in sequence_indices:
            if not 0 <= index < self.num_sequences:
                raise TraceError(
                    f"There is no sequence {index} among {self.num_sequences}.",
                    remedy="Sequences are counted from 0.",
                )
        if not len(sequence_indices):
            raise TraceError("No sequence was selected.", remedy="Select one sequence at least.")
        slices = [self.sequence(index) for index in sequence_indices]
        tokens = np.concatenate([np.arange(part.start, part.stop) for part in slices])
        return RoutingTrace(
            spec=self.spec,
            experts=self.experts[tokens],
            gates=None if self.gates is None else self.gates[tokens],
            token_ids=None if self.token_ids is None else self.token_ids[tokens],
            starts=starts_of([part.stop - part.start for part in slices]),
            domains=tuple(self.domains[index] for index in sequence_indices),
            prefill=None if self.prefill is None else self.prefill[tokens],
            hidden=None if self.hidden is None else self.hidden.select(tokens),
        )


def starts_of(lengths: Sequence[int] | Int64[np.ndarray, "S"]) -> Int64[np.ndarray, "S+1"]:
    """Where sequences of these lengths in tokens begin, one after another, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def concatenate(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace with the sequences of all, in order.

    Token ids are -1 for the traces that have none; prefill and hidden states are told where all tell them.
    Raises TraceError where there is no trace, the specs differ, or some have gates and others none: an
    invented gate would pass for a measured one.
    """
    if not traces:
        raise TraceError("There is no trace to put together.", remedy="Give one trace at least.")
    for trace in traces[1:]:
        if trace.spec != traces[0].spec:
            raise TraceError(
                f"Traces of different models do not go together: {traces[0].spec} and {trace.spec}.",
                remedy="Keep each model's traces in a folder of their own.",
            )
    if len({trace.gates is None for trace in traces}) > 1:
        raise TraceError(
            "Some of the traces have gates and others have none.",
            remedy="Keep the two kinds in folders of their own.",
        )
    return RoutingTrace(
        spec=traces[0].spec,
        experts=np.concatenate([trace.experts for trace in traces]),
        gates=_joined([trace.gates for trace in traces]),
        token_ids=_joined(_token_ids_of_all(traces)),
        starts=starts_of(np.concatenate([np.diff(trace.starts) for trace in traces])),
        domains=tuple(domain for trace in traces for domain in trace.domains),
        prefill=None
        if any(trace.prefill is None for trace in traces)
        else _joined([trace.prefill for trace in traces]),
        hidden=concatenated(hidden)
        if len(hidden := [trace.hidden for trace in traces if trace.hidden is not None]) == len(traces)
        else None,
    )


def _token_ids_of_all(traces: Sequence[RoutingTrace]) -> list[np.ndarray | None]:
    if all(trace.token_ids is None for trace in traces):
        return [None]
    return [
        np.full(trace.num_tokens, UNKNOWN_TOKEN, np.int32) if trace.token_ids is None else trace.token_ids
        for trace in traces
    ]


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def check(trace: RoutingTrace, origin: str, *, first_row: int = 0) -> None:
    """Raise TraceError naming `origin` (a file, say), the token and the reason where the trace is malformed.

    first_row: the number in `origin` of the trace's first token, where the trace is a piece of it.
    """
    _check_arrays(trace, origin)
    _check_starts(trace, origin)
    _check_domains(trace, origin)
    if trace.token_ids is not None:
        _check_token_ids(trace.token_ids, origin, first_row)
    at_once = max(1, ENTRIES_AT_ONCE // (trace.spec.num_layers * trace.spec.top_k))
    for start in range(0, trace.num_tokens, at_once):
        rows = slice(start, start + at_once)
        _check_experts(trace.experts[rows], trace.spec, origin, first_row + start)
        if trace.gates is not None:
            _check_gates(trace.gates[rows], origin, first_row + start)


def _check_arrays(trace: RoutingTrace, origin: str) -> None:
    spec = trace.spec
    routed = (len(trace.experts), spec.num_layers, spec.top_k)
    for name, array, dtype, shape in (
        ("experts", trace.experts, np.int16, routed),
        ("gates", trace.gates, np.float32, routed),
        ("token_ids", trace.token_ids, np.int32, routed[:1]),
        ("prefill", trace.prefill, np.bool_, routed[:1]),
        ("starts", trace.starts, np.int64, (len(trace.domains) + 1,)),
    ):
        if array is not None and (array.dtype != dtype or array.shape != shape):
            raise TraceError(
                f"{origin}: {name} is {array.dtype} {list(array.shape)},"
                f" expected {np.dtype(dtype)} {list(shape)}.",
                remedy="Arrays must agree on tokens, layers and top-k, starts and domains on the sequences.",
            )
    if trace.hidden is not None and trace.hidden.states.shape[:2] != routed[:2]:
        raise TraceError(
            f"{origin}: hidden states are {list(trace.hidden.states.shape)},"
            f" expected {list(routed[:2])} first.",
            remedy="There is one for each layer of each token.",
        )
    if not len(trace.experts):
        raise TraceError(f"{origin} has no tokens.", remedy="Record one sequence at least.")


def _check_starts(trace: RoutingTrace, origin: str) -> None:
    starts = trace.starts
    remedy = "starts lists where each sequence begins, and last the number of tokens."
    if starts[0] != 0 or starts[-1] != trace.num_tokens:
        raise TraceError(
            f"{origin}: starts goes from {starts[0]} to {starts[-1]}, expected 0 to {trace.num_tokens}"
            " (all tokens).",
            remedy=remedy,
        )
    lengths = np.diff(starts)
    if (lengths <= 0).any():
        index = int(np.argmax(lengths <= 0))
        what = "is empty" if lengths[index] == 0 else "ends before it begins"
        raise TraceError(
            f"{origin}: sequence {index} {what} (starts[{index}] = {starts[index]},"
            f" starts[{index + 1}] = {starts[index + 1]}).",
            remedy=remedy,
        )


def _check_domains(trace: RoutingTrace, origin: str) -> None:
    for index, domain in enumerate(trace.domains):
        if not (0 < len(domain) <= MAX_DOMAIN_LENGTH and domain.isprintable()):
            raise TraceError(
                f"{origin}: sequence {index}: domain {domain[:MAX_DOMAIN_LENGTH]!r} is not a name.",
                remedy=f"Use 1 to {MAX_DOMAIN_LENGTH} printable characters.",
            )


def _check_token_ids(token_ids: Int32[np.ndarray, "N"], origin: str, first_row: int) -> None:
    bad = token_ids < UNKNOWN_TOKEN
    if bad.any():
        row = int(np.argmax(bad))
        raise TraceError(
            f"{origin}: token {first_row + row}: token id is {token_ids[row]}, expected 0 or more,"
            " or -1 where unknown.",
            remedy=RECORD_AGAIN,
        )


def _check_experts(
    experts: Int16[np.ndarray, "n L K"], spec: RoutingSpec, origin: str, first_row: int
) -> None:
    outside = (experts < 0) | (experts >= spec.num_experts)
    if outside.any():
        row, layer, slot = _first(outside)
        raise TraceError(
            f"{origin}: token {first_row + row}, layer {layer}: expert id is {experts[row, layer, slot]},"
            f" expected 0 to {spec.num_experts - 1}.",
            remedy="Count routed experts only, from 0; correct the number of experts or the recording.",
        )
    ordered = np.sort(experts, axis=-1)
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        row, layer, slot = _first(twice)
        raise TraceError(
            f"{origin}: token {first_row + row}, layer {layer}: expert {ordered[row, layer, slot]} is routed"
            f" twice among the top {spec.top_k}.",
            remedy=RECORD_AGAIN,
        )


def _check_gates(gates: Float32[np.ndarray, "n L K"], origin: str, first_row: int) -> None:
    bad = ~(np.isfinite(gates) & (gates >= 0))
    if bad.any():
        row, layer, slot = _first(bad)
        raise TraceError(
            f"{origin}: token {first_row + row}, layer {layer}: gate is {gates[row, layer, slot]}, expected"
            " a finite number, 0 or more.",
            remedy=f"{RECORD_AGAIN} Leave gates out altogether where the recorder does not know them.",
        )
    weightless = gates.sum(axis=-1) <= 0
    if weightless.any():
        row, layer = _first(weightless)
        raise TraceError(
            f"{origin}: token {first_row + row}, layer {layer}: all gates are 0, expected one above 0.",
            remedy=RECORD_AGAIN,
        )


def _first(bad: Bool[np.ndarray, "..."]) -> tuple[int, ...]:
    """Where the first True is."""
    return tuple(int(index) for index in np.unravel_index(int(np.argmax(bad)), bad.shape))
