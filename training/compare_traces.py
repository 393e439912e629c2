"""The splits of a comparison: read once, cut short for a quick one, shuffled for the control.

Trace files -> Splits -> `training.compare`. What is made from them lies in the comparison's own folder, and
is as private as the recording.

    specmoe compare --traces train.npz --validation validation.npz --test test.npz --folder comparison
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from traces.files import digest, load
from traces.hidden import write_routers
from traces.parquet import TraceWriter
from traces.trace import RoutingTrace
from training.errors import ComparisonInvalid, check_same_shape
from training.run import load_traces

SHUFFLED = "shuffled"
SHORT = "short"
# Tokens of each split of a quick comparison; whole sequences, so somewhat more.
QUICK_TOKENS = 600


@dataclass(frozen=True)
class Split:
    """One split: its trace, and where a run reads it from. digests: sha256 by file name, as it was given."""

    trace: RoutingTrace
    paths: tuple[Path, ...]
    digests: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Splits:
    """What everything is trained, calibrated and scored on."""

    train: Split
    validation: Split
    test: Split

    @property
    def hidden(self) -> bool:
        """Whether all have hidden states."""
        return all(split.trace.hidden is not None for split in vars(self).values())

    def cut(self, folder: Path) -> Splits:
        """The first sequences of each, written below `folder`."""
        return Splits(
            *(
                _written(replace(split, trace=first_sequences(split.trace)), folder / SHORT / name)
                for name, split in vars(self).items()
            )
        )

    def shuffled(self, folder: Path) -> Splits:
        """The same with training and validation shuffled between tokens, written below `folder`."""
        train, validation = (
            _written(replace(split, trace=shuffled(split.trace, seed)), folder / SHUFFLED / name)
            for seed, (name, split) in enumerate((("train", self.train), ("validation", self.validation)))
        )
        return Splits(train, validation, self.test)


def read_splits(train: tuple[Path, ...], validation: tuple[Path, ...], test: Path) -> Splits:
    """Read all three, with hidden states where there are some.

    Raises TraceError, SpecMismatch where shapes differ, ComparisonInvalid where two share a file.
    """
    learnt, held_out = (
        Split(
            load_traces(paths, "train", hidden=True)[0],
            paths,
            tuple((path.name, digest(path)) for path in paths),
        )
        for paths in (train, validation)
    )
    check_same_shape(held_out.trace.spec, learnt.trace.spec, "the training traces")
    scored = load(test, hidden=True)
    check_same_shape(scored.spec, learnt.trace.spec, "the training traces")
    splits = Splits(learnt, held_out, Split(scored, (test,), ((test.name, digest(test)),)))
    _check_apart(splits)
    return splits


def _check_apart(splits: Splits) -> None:
    owner: dict[str, str] = {}
    for use, split in vars(splits).items():
        for name, sha256 in split.digests:
            if owner.setdefault(sha256, use) != use:
                raise ComparisonInvalid(
                    f"{name} is given for {use}, and the same file for {owner[sha256]}.",
                    remedy="Give splits that share no sequence: what was learnt by heart is no forecast.",
                )


def first_sequences(trace: RoutingTrace, tokens: int = QUICK_TOKENS) -> RoutingTrace:
    """The first whole sequences that have so many tokens together, or all."""
    enough = int(np.searchsorted(trace.starts, tokens))
    return trace.select(range(min(max(1, enough), trace.num_sequences)))


def shuffled(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Each layer's routing dealt anew to the tokens of the trace, gates along with it.

    What an expert's popularity says stays true; token, earlier tokens and earlier layers say nothing more.
    Without hidden states.
    """
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(trace.num_tokens) for _ in range(trace.spec.num_layers)], axis=1)
    layers = np.arange(trace.spec.num_layers)
    return replace(
        trace,
        experts=trace.experts[order, layers],
        gates=None if trace.gates is None else trace.gates[order, layers],
        hidden=None,
    )


def _written(split: Split, folder: Path) -> Split:
    """The split as shards in a folder, which are written unless they are there."""
    if not folder.exists():
        partial = folder.with_name(f"partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        trace, hidden = split.trace, split.trace.hidden
        columns: dict[str, Any] = {
            "gates": trace.gates is not None,
            "token_ids": trace.token_ids is not None,
            "prefill": trace.prefill is not None,
            "hidden_size": 0 if hidden is None else hidden.size,
        }
        with TraceWriter(partial, trace.spec, provenance={"source": "specmoe compare"}, **columns) as writer:
            writer.append(trace, None if hidden is None else hidden.states)
        if hidden is not None and hidden.routers is not None:
            write_routers(partial, hidden.routers)
        partial.replace(folder)
    return replace(split, paths=(folder,))
