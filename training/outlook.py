"""Trains the outlook of a finished version: what a cache should keep, beside what it should fetch.

version + traces -> states and later uses -> Outlook -> FOLDER: outlook.onnx, the version's graphs, draft

    specmoe outlook gpt-oss-20b --traces train.npz --validation validation.npz --folder runs/outlook
    specmoe publish runs/outlook --store ./store

It reads the version's state through its graphs, as a server would, so it needs no training run and fits
whatever predictor is inside.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional

from model_store.documents import complete, written
from model_store.manifest import OUTLOOK, Draft, GraphName, Lineage, StateTensor
from model_store.manifest import Outlook as Description
from model_store.store import StoredVersion
from speculation.golden import golden_uses
from speculation.publishing import DRAFT
from speculation.runtime import Speculator
from traces.trace import RoutingTrace
from training.calibration import three_slopes
from training.errors import ConfigInvalid, ExportFailed, check_same_shape
from training.forecasts import states
from training.onnx_graph import halve, to_onnx
from training.outlook_graph import Outlook, readable

CALIBRATION_BINS = 15
# ONNX Runtime adds in another order than torch; nothing else may differ.
TOLERANCE = 1e-4
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class OutlookConfig:
    """How an outlook is trained.

    tokens: how far it looks, the token in progress included (count).
    rank: numbers that the context is squeezed into (count).
    steps: training steps (count).
    batch_tokens: tokens of a step (count).
    every: one training token in so many is learned from (count).
    learning_rate: peak step size of AdamW (1).
    weight_decay: decoupled decay of the weights (1 / step size).
    seed: of the order of tokens and the first weights (integer).
    """

    tokens: int = 8
    rank: int = 32
    steps: int = 1500
    batch_tokens: int = 256
    every: int = 1
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "rank", "steps", "batch_tokens", "every"):
            if getattr(self, name) < 1:
                raise ConfigInvalid(
                    f"{name} is {getattr(self, name)}, expected at least 1.",
                    remedy=f"Set --{name.replace('_', '-')} accordingly.",
                )
        if not 0 < self.learning_rate < 1:
            raise ConfigInvalid(
                f"learning_rate is {self.learning_rate}, expected between 0 and 1.",
                remedy="Set --learning-rate accordingly.",
            )


@dataclass(frozen=True)
class Examples:
    """What was carried before N tokens, and what was used after: `uses`, whether within the next n tokens.

    carried: the tensors that are read. state: half precision where they are float32.
    """

    carried: tuple[StateTensor, ...]
    state: tuple[np.ndarray[Any, Any], ...]
    uses: Bool[np.ndarray, "N L E"]

    def __len__(self) -> int:
        return len(self.uses)

    def inputs(self, rows: Int[np.ndarray, "B"] | slice) -> list[torch.Tensor]:
        """The state's tensors of these examples, as a graph gets them."""
        parts = zip(self.carried, self.state, strict=True)
        return [torch.from_numpy(tensor[rows].astype(of_it.dtype, copy=False)) for of_it, tensor in parts]


def used_within(trace: RoutingTrace, tokens: int) -> Bool[np.ndarray, "N L E"]:
    """Whether each expert is used by any of `tokens` tokens from this one on, in its sequence."""
    spec = trace.spec
    used = np.zeros((trace.num_tokens, spec.num_layers, spec.num_experts), bool)
    np.put_along_axis(used, trace.experts.astype(np.int64), True, axis=-1)
    within, reach = used, 1
    left = tokens_left(trace)
    while reach < tokens:  # doubling how far it looks
        further = min(reach, tokens - reach)
        later = np.zeros_like(within)
        later[:-further] = within[further:]
        later[left <= further] = False
        within, reach = within | later, reach + further
    return within


def tokens_left(trace: RoutingTrace) -> Int[np.ndarray, "N"]:
    """Tokens of the sequence from each token on, itself included."""
    left: Int[np.ndarray, "N"] = np.repeat(trace.starts[1:], np.diff(trace.starts)) - np.arange(
        trace.num_tokens
    )
    return left


def examples(
    speculator: Speculator, trace: RoutingTrace, carried: tuple[StateTensor, ...], tokens: int, every: int = 1
) -> Examples:
    """Of one token in `every`; those whose sequence ends within `tokens` are left out, as nobody knows."""
    names = [tensor.name for tensor in speculator.manifest.state]
    places = [names.index(tensor.name) for tensor in carried]
    left = tokens_left(trace)
    rows_of, parts = [], []
    for rows, state in states(speculator, trace, every=every):
        whole = left[rows] >= tokens
        rows_of.append(rows[whole])
        parts.append([_small(state[place][whole]) for place in places])
    rows = np.concatenate(rows_of)
    if not len(rows):
        raise ConfigInvalid(
            f"No sequence has {tokens} tokens.", remedy="Look less far ahead, or give longer sequences."
        )
    state = tuple(np.concatenate(tensors) for tensors in zip(*parts, strict=True))
    return Examples(carried, state, used_within(trace, tokens)[rows])


def fit(network: Outlook, learned: Examples, config: OutlookConfig) -> None:
    """Train on binary cross-entropy, from each expert's own frequency on."""
    rng = np.random.default_rng(config.seed)
    often = learned.uses.mean(axis=0).clip(1e-3, 1 - 1e-3)
    network.bias.data += torch.from_numpy(np.log(often / (1 - often))).float()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, max(config.steps, 4))
    for _ in range(config.steps):
        rows = rng.integers(0, len(learned), config.batch_tokens)
        uses = torch.from_numpy(learned.uses[rows]).float()
        loss = functional.binary_cross_entropy_with_logits(network.logits(*learned.inputs(rows)), uses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def calibrate(network: Outlook, held_out: Examples) -> None:
    """Fit each layer's three slopes and shift on tokens that were not learned from."""
    logits = np.concatenate([network.logits(*held_out.inputs(part)).numpy() for part in _pieces(held_out)])
    fitted = [
        three_slopes(logits[:, layer].ravel(), held_out.uses[:, layer].ravel())
        for layer in range(network.spec.num_layers)
    ]
    network.calibrate(np.array(fitted, np.float32))


def scores(probabilities: Float[np.ndarray, "N L E"], uses: Bool[np.ndarray, "N L E"]) -> dict[str, float]:
    """ece: mean gap between probability and outcome, over all experts, in 15 bins of equal mass; brier; rate.

    rate: share that was used.
    """
    order = np.argsort(probabilities, axis=None)
    bins = [np.array_split(array.ravel()[order], CALIBRATION_BINS) for array in (probabilities, uses)]
    gaps = [
        len(p) * abs(float(p.mean(dtype=np.float64)) - float(y.mean())) for p, y in zip(*bins, strict=True)
    ]
    return {
        "ece": sum(gaps) / uses.size,
        "brier": float(np.square(probabilities - uses).mean(dtype=np.float64)),
        "rate": float(uses.mean()),
    }


def train_outlook(
    stored: StoredVersion,
    train: RoutingTrace,
    validation: RoutingTrace,
    config: OutlookConfig,
    lineage: Lineage,
    folder: Path,
) -> Description:
    """Train an outlook for a version, and write both into `folder`, ready to be published as a new version.

    Raises SpecMismatch where a trace is of another shape, ConfigInvalid where no sequence is long enough,
    ExportFailed where the state has no maps, or the graph answers otherwise than what was trained.
    """
    bare = without_outlook(stored)
    speculator = Speculator(bare, provider="cpu")
    for trace in (train, validation):
        check_same_shape(trace.spec, speculator.spec, speculator.origin)
    torch.manual_seed(config.seed)
    began = time.perf_counter()
    network = Outlook(speculator.spec, readable(bare.manifest.state, speculator.spec), config.rank)
    fit(network, examples(speculator, train, network.carried, config.tokens, config.every), config)
    lineage = lineage.model_copy(update={"trained_seconds": round(time.perf_counter() - began, 1)})
    halve(network)
    held_out = examples(speculator, validation, network.carried, config.tokens)
    calibrate(network, held_out)
    blank = ((0.0,) * speculator.spec.num_experts,) * speculator.spec.num_layers
    description = Description(tokens=config.tokens, golden=blank, metrics={}, lineage=lineage)
    graph = exported(network)
    told = _told(with_outlook(bare, graph, description), network, held_out)
    description = description.model_copy(update=told)
    _write(with_outlook(bare, graph, description), folder)
    return description


def exported(network: Outlook) -> bytes:
    """The graph, outlook.onnx."""
    inputs = {t.name: torch.zeros((2, *t.shape), dtype=getattr(torch, t.dtype)) for t in network.carried}
    return to_onnx(network, inputs, ["uses"])


def without_outlook(stored: StoredVersion) -> StoredVersion:
    """The version as it was before it had one."""
    draft = _draft(stored).model_copy(update={"outlook": None})
    graphs: dict[GraphName, bytes] = {n: graph for n, graph in stored.graphs.items() if n != OUTLOOK}
    return StoredVersion(complete(draft, stored.manifest.version, graphs), graphs)


def with_outlook(bare: StoredVersion, graph: bytes, description: Description) -> StoredVersion:
    """The version with it."""
    draft = _draft(bare).model_copy(update={"outlook": description})
    graphs = {**bare.graphs, OUTLOOK: graph}
    return StoredVersion(complete(draft, bare.manifest.version, graphs), graphs)


@torch.no_grad()
def _told(stored: StoredVersion, network: Outlook, held_out: Examples) -> dict[str, Any]:
    """Golden answer and scores of the graph, which must tell what the network does."""
    speculator = Speculator(stored, provider="cpu")
    graph = speculator.graphs[OUTLOOK]
    network.eval()
    pieces = []
    for part in _pieces(held_out):
        inputs = held_out.inputs(part)
        pieces.append(graph(*(tensor.numpy() for tensor in inputs))[0])
        apart = float(np.abs(pieces[-1] - network(*inputs).numpy()).max())
        if not apart <= TOLERANCE:
            raise ExportFailed(
                f"{OUTLOOK} and torch differ by {apart:.1e}, expected {TOLERANCE} at most.",
                remedy="Report this with the versions of torch and onnxruntime.",
            )
    found = scores(np.concatenate(pieces), held_out.uses)
    return {
        "golden": tuple(tuple(row) for row in np.round(golden_uses(speculator).astype(float), 5).tolist()),
        "metrics": {"validation": {name: round(value, 5) for name, value in found.items()}},
    }


def _pieces(held: Examples) -> list[slice]:
    return [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(held), ROWS_AT_ONCE)]


def _small(tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor


def _draft(stored: StoredVersion) -> Draft:
    return Draft(**{name: getattr(stored.manifest, name) for name in Draft.model_fields})


def _write(stored: StoredVersion, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in [*stored.graphs.items(), (DRAFT, written(_draft(stored)))]:
        (folder / name).write_bytes(content)
