"""Small made-up traces and files of them, and what it means that two traces are the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from traces.parquet import TraceWriter
from traces.spec import RoutingSpec
from traces.trace import UNKNOWN_DOMAIN, RoutingTrace, starts_of

TOY = RoutingSpec("toy", num_layers=3, num_experts=8, top_k=2)
FIXTURES = Path(__file__).parent / "fixtures"


def made_up_trace(
    spec: RoutingSpec = TOY,
    lengths: Sequence[int] = (4, 1, 3),
    *,
    gates: bool = True,
    token_ids: bool = True,
    prefill: bool = False,
    seed: int = 0,
) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    order = rng.random((tokens, spec.num_layers, spec.num_experts)).argsort(axis=-1)
    weights = rng.random((tokens, spec.num_layers, spec.top_k), np.float32) + np.float32(0.1)
    return RoutingTrace(
        spec=spec,
        experts=order[..., : spec.top_k].astype(np.int16),
        gates=weights if gates else None,
        token_ids=rng.integers(0, 1000, tokens, np.int32) if token_ids else None,
        starts=starts_of(lengths),
        domains=tuple(f"domain {index % 2}" for index in range(len(lengths))),
        prefill=rng.random(tokens) < 0.5 if prefill else None,
    )


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    experts = draw(st.integers(2, 20))
    spec = RoutingSpec("toy", draw(st.integers(1, 4)), experts, draw(st.integers(1, min(4, experts))))
    return made_up_trace(
        spec,
        draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)),
        gates=draw(st.booleans()),
        token_ids=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def bare(trace: RoutingTrace, *, gates: bool = False, token_ids: bool = False) -> RoutingTrace:
    """The trace without domains, and without gates or token ids unless asked for."""
    return replace(
        trace,
        domains=(UNKNOWN_DOMAIN,) * trace.num_sequences,
        gates=trace.gates if gates else None,
        token_ids=trace.token_ids if token_ids else None,
    )


def with_dense(experts: np.ndarray, dense: Sequence[int]) -> np.ndarray:
    """[n, L, K] with layers of zeros put in, so that they stand at these places."""
    layers = list(np.moveaxis(experts, 1, 0))
    for place in sorted(dense):
        layers.insert(place, np.zeros_like(layers[0]))
    return np.stack(layers, axis=1)


def same(one: RoutingTrace, other: RoutingTrace) -> bool:
    """Equal in everything, bit by bit."""
    arrays = ("experts", "gates", "token_ids", "starts", "prefill")
    return (one.spec, one.domains) == (other.spec, other.domains) and all(
        (a is None and b is None)
        or (a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b))
        for a, b in ((getattr(one, name), getattr(other, name)) for name in arrays)
    )


def npz_arrays(trace: RoutingTrace) -> dict[str, Any]:
    arrays = {
        "experts": trace.experts.astype(np.uint8),
        "gates": trace.gates,
        "token_ids": trace.token_ids,
        "starts": trace.starts,
        "domains": np.array(trace.domains),
        "num_experts": np.array(trace.spec.num_experts),
        "model": np.array(trace.spec.model),
    }
    return {name: array for name, array in arrays.items() if array is not None}


def write_npz(path: Path, trace: RoutingTrace | None = None, **replaced: Any) -> Path:
    """The trace as .npz, with some arrays replaced, or left out where None."""
    arrays = npz_arrays(made_up_trace() if trace is None else trace) | replaced
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def write_shards(
    folder: Path, trace: RoutingTrace, max_shard_tokens: int = 1000, source: str = "made up"
) -> Path:
    """The trace as Parquet shards; what was in the folder goes."""
    shutil.rmtree(folder, ignore_errors=True)
    with TraceWriter(
        folder,
        trace.spec,
        gates=trace.gates is not None,
        token_ids=trace.token_ids is not None,
        prefill=trace.prefill is not None,
        provenance={"source": source},
        max_shard_tokens=max_shard_tokens,
    ) as writer:
        writer.append(trace)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


COLUMN_NAMES = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


def route_csv_rows(
    turns: int = 2, prompt: int = 3, generated: int = 2, *, layers: Sequence[int] = (1, 2, 3), seed: int = 0
) -> list[list[str]]:
    """Rows as BigMoeOnEdge writes them: a prompt layer by layer, its last layer for its last token only, then
    one token after another. Layer 0 is dense; 8 experts, top-2."""
    rng = np.random.default_rng(seed)
    rows, step = [], 0
    for turn in range(turns):
        cells = [
            (0, step + token, layer)
            for layer in layers
            for token in range(prompt)
            if layer != layers[-1] or token == prompt - 1
        ]
        cells += [(1, step + prompt + token, layer) for token in range(generated) for layer in layers]
        for phase, at, layer in cells:
            for slot, expert in enumerate(rng.permutation(8)[:2]):
                weight = f"{rng.random() + 0.01:.6g}"
                rows.append([*map(str, (turn, phase, at, layer, slot, expert)), weight, "0", "128"])
        step += prompt + generated
    return rows


def preamble(layers: int = 4, dense: Sequence[int] = (0,), model: str = "/m/Toy-1B-Q4.gguf") -> list[str]:
    """The lines before the rows, with that of the column names."""
    return [
        "# route_trace v1",
        f"# model={model} arch=toymoe n_layer={layers} n_expert=8 n_expert_used=2",
        *(
            f"# layer={layer} expert_bytes={0 if layer in dense else 128} dense_bytes=7"
            for layer in range(layers)
        ),
        COLUMN_NAMES,
    ]


def write_route_csv(
    path: Path, rows: Sequence[Sequence[str]] | None = None, head: Sequence[str] | None = None
) -> Path:
    rows = route_csv_rows() if rows is None else rows
    lines = [*(preamble() if head is None else head), *(",".join(row) for row in rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
