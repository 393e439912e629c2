"""Records the routing of a model on texts or prompts into Parquet shards, batch by batch; can be resumed.

    specmoe collect MODEL --text novel.txt --out traces/ --length 512 --batch-size 8 --tokens 100000

texts -> batches -> passes (a model with a Recorder on its routers) -> RecordingWriter, one for each stack.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from tqdm import tqdm

from traces.hidden import write_routers
from traces.recording import RecordingWriter, sequences_in
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, starts_of
from training.collection.config import USUAL_LENGTH, CollectConfig
from training.collection.model import Loaded
from training.collection.passes import Recorded, expected_tokens, generate, probe, read_texts
from training.collection.provenance import provenance_of
from training.collection.recorder import Recorder
from training.collection.routers import Stack, find_routers
from training.collection.texts import Text, Tokens, prompts_of, texts_of
from training.errors import CollectionError, ConfigInvalid

# What a kill loses, and what resuming reads again.
SHARD_TOKENS = 1 << 14
SHARD_HIDDEN_BYTES = 1 << 28


@dataclass(frozen=True)
class Collected:
    """What a folder holds now."""

    folder: Path
    spec: RoutingSpec
    sequences: int
    tokens: int


def collect(
    loaded: Loaded, config: CollectConfig, out: Path, *, name: str | None = None, resume: bool = False
) -> list[Collected]:
    """Record into `out`; where the model has several stacks, into a folder of it for each.

    name: what to call the model in the traces; its own where None. resume: go on with what is in the folder.
    With hidden states, the routers' weights are written beside the shards (`traces.hidden`).

    Ctrl-C and errors leave whole shards, to be gone on with.

    Raises CollectionError, ConfigInvalid, TraceError.
    """
    check_folder(out, resume=resume)
    _check_length(loaded, config)
    stacks = find_routers(loaded.model, lambda tokens: probe(loaded, tokens))
    recorder = Recorder(stacks, hidden=config.hidden)
    tokens = Tokens(loaded.tokenizer, config.length)
    provenance = provenance_of(loaded, stacks, config)
    folders = {stack: out / stack.name for stack in stacks}
    done = min(map(sequences_in, folders.values())) if resume else 0
    with ExitStack() as block:
        writers = {
            stack: block.enter_context(
                _writer(folders[stack], stack, name or loaded.name, config, provenance, done)
            )
            for stack in stacks
        }
        _record(loaded, recorder, config, tokens, writers, done)
    for stack, folder in folders.items():
        if config.hidden and (routers := stack.weights()) is not None:
            write_routers(folder, routers)
    return [
        Collected(folders[stack], writer.spec, writer.sequences, writer.tokens)
        for stack, writer in writers.items()
    ]


def check_folder(out: Path, *, resume: bool) -> None:
    """Raise CollectionError where there is anything in `out`, unless it is to be gone on with."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CollectionError(
            f"{out} exists already and is not an empty folder.",
            remedy="Choose another; --resume goes on with a recording that was interrupted.",
        )


def usual_length(loaded: Loaded, new_tokens: int) -> int:
    """Tokens of a piece where nobody says: as many as the model can read, 512 at most."""
    limit = _limit(loaded)
    return USUAL_LENGTH if limit is None else max(2, min(USUAL_LENGTH, limit - new_tokens))


def _limit(loaded: Loaded) -> int | None:
    """Tokens that the model can read, None where it does not say."""
    limit: int | None = getattr(loaded.model.config, "max_position_embeddings", None)
    return limit


def _check_length(loaded: Loaded, config: CollectConfig) -> None:
    limit = _limit(loaded)
    if limit is not None and config.length + config.new_tokens > limit:
        raise ConfigInvalid(
            f"length {config.length} and {config.new_tokens} generated tokens are more than the"
            f" {limit} that {loaded.name} can read.",
            remedy="Choose a smaller --length or --generate.",
        )


def _record(
    loaded: Loaded,
    recorder: Recorder,
    config: CollectConfig,
    tokens: Tokens,
    writers: Mapping[Stack, RecordingWriter],
    done: int,
) -> None:
    recorded = sum(writer.tokens for writer in writers.values())
    planned = _planned(loaded, config, tokens, tuple(writers))
    texts = islice(_texts(config, tokens), done, None)
    with _progress(planned, recorded) as bar:
        while not _reached(config, recorded) and (batch := list(islice(texts, config.batch_size))):
            routed = _routed(loaded, recorder, config, batch)
            for row, text in enumerate(batch):
                if _reached(config, recorded):
                    break
                with interrupts_held():
                    for stack, writer in writers.items():
                        writer.append(*_trace(writer.spec, routed[stack][row], text.domain))
                new = sum(len(routed[stack][row].token_ids) for stack in writers)
                recorded += new
                bar.update(new)


def _routed(
    loaded: Loaded, recorder: Recorder, config: CollectConfig, batch: Sequence[Text]
) -> Mapping[Stack, list[Recorded]]:
    try:
        if config.new_tokens:
            return generate(loaded, recorder, batch, config.new_tokens)
        return read_texts(loaded, recorder, batch)
    except torch.OutOfMemoryError as error:
        raise CollectionError(
            f"{len(batch)} sequences of {config.length + config.new_tokens} tokens do not fit onto"
            f" {loaded.device} beside the model.",
            remedy="Go on with a smaller --batch-size and --resume, or begin again with a smaller --length.",
        ) from error


def _progress(planned: int, recorded: int) -> tqdm[Any]:
    return tqdm(
        total=planned, initial=recorded, unit="token", unit_scale=True, desc="recording", disable=None
    )


def _reached(config: CollectConfig, recorded: int) -> bool:
    return config.tokens is not None and recorded >= config.tokens


def _planned(loaded: Loaded, config: CollectConfig, tokens: Tokens, stacks: Sequence[Stack]) -> int:
    """How many tokens there will be, all stacks together; fewer where generated texts end by themselves.

    Raises CollectionError where there is none.
    """
    planned = 0
    for text in _texts(config, tokens):
        planned += sum(expected_tokens(loaded, stack, text, config.new_tokens) for stack in stacks)
        if _reached(config, planned):
            break
    if not planned:
        raise CollectionError("The texts hold no tokens.", remedy="Give texts with two words at least.")
    return planned


def _texts(config: CollectConfig, tokens: Tokens) -> Iterator[Text]:
    if config.prompts is not None:
        return prompts_of(config.prompts, tokens, config.domain)
    return texts_of(config.texts, tokens, config.domain)


def _trace(
    spec: RoutingSpec, of: Recorded, domain: str
) -> tuple[RoutingTrace, Float16[np.ndarray, "T L H"] | None]:
    """A sequence as a trace of its own, and its hidden states."""
    trace = RoutingTrace(
        spec=spec,
        experts=of.experts,
        gates=of.gates,
        token_ids=of.token_ids,
        starts=starts_of([len(of.token_ids)]),
        domains=(domain,),
        prefill=of.prefill,
    )
    return trace, of.hidden


def _writer(
    folder: Path, stack: Stack, name: str, config: CollectConfig, provenance: Mapping[str, str], keep: int
) -> RecordingWriter:
    model = f"{name}-{stack.name}" if stack.name else name
    hidden_size = stack.hidden_size if config.hidden else 0
    shard_tokens = SHARD_TOKENS
    if hidden_size:
        shard_tokens = min(shard_tokens, SHARD_HIDDEN_BYTES // (2 * len(stack.routers) * hidden_size))
    return RecordingWriter(
        folder,
        RoutingSpec(model, len(stack.routers), stack.num_experts, stack.top_k),
        keep=keep,
        gates=True,
        token_ids=True,
        prefill=True,
        hidden_size=hidden_size,
        provenance=provenance,
        max_shard_tokens=max(shard_tokens, config.length + config.new_tokens),
    )


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A Ctrl-C in the block takes effect behind it, so that what is written is whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *seen: came.append(seen))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
