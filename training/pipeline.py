"""The whole way from traces to a published version, as one call; `specmoe train` is its command line.

specmoe train --traces train.npz --validation validation.npz --run runs/mine --publish --store ./store
"""

from __future__ import annotations

from pathlib import Path

import torch

from model_store.documents import check_alias
from model_store.store import Store, open_store
from speculation.publishing import publish_export
from training.config import TrainConfig
from training.errors import check_same_shape
from training.export import export
from training.hidden_states import check_hidden
from training.loop import Trainer
from training.predictor_configs import PredictorConfig, reads_hidden
from training.predictors import examples_of, network_of
from training.processes import Processes, processes
from training.run import Run, check_apart, check_resumable, environment, load_traces, write_run
from training.vocabulary import Vocabulary


def train(
    *,
    traces: tuple[Path, ...],
    validation: tuple[Path, ...],
    folder: Path,
    model: str | None,
    train_config: TrainConfig,
    predictor: str,
    predictor_config: PredictorConfig,
    command: str,
    resume: bool = False,
    store: str | None = None,
    aliases: tuple[str, ...] = (),
) -> None:
    """Train into `folder`; with a `store`, also export and publish there and move `aliases`.

    predictor: the name it goes by (`training.presets`); what it is follows from its config.
    Raises TraceError for malformed traces, SpecMismatch where they are of different shapes, RunInvalid where
    a trace is given for both or the folder holds another run, HiddenMissing, and what exporting and
    publishing raise.
    """
    destination = None if store is None else open_store(store)
    for alias in aliases:  # before hours of training, not after them
        check_alias(alias)
    with processes() as where:
        hidden = reads_hidden(predictor_config)
        train_trace, train_sources = load_traces(traces, "train", model, hidden=hidden)
        validation_trace, validation_sources = load_traces(validation, "validation", hidden=hidden)
        check_same_shape(validation_trace.spec, train_trace.spec, "the training traces")
        hidden_size = check_hidden(train_trace, validation_trace) if hidden else 0
        check_apart(train_sources, validation_sources)
        vocabulary = Vocabulary.of(train_trace.token_ids, train_trace.starts)
        run = Run(
            spec=train_trace.spec,
            predictor=predictor,
            predictor_config=predictor_config,
            train_config=train_config,
            sources=train_sources + validation_sources,
            validation_paths=tuple(path.resolve() for path in validation),
            known_ids=tuple(vocabulary.known.tolist()),
            known_pairs=tuple((before, token) for before, token in vocabulary.pairs.tolist()),
            command=command,
            hidden_size=hidden_size,
            **environment(),
        )
        if resume:
            check_resumable(folder, run)
        elif where.leads:
            write_run(folder, run)
        torch.manual_seed(train_config.seed)
        network = network_of(run.spec, predictor_config, run.vocabulary, hidden_size)
        blocks, looks = (
            examples_of(trace, train_config.block_tokens, predictor_config)
            for trace in (train_trace, validation_trace)
        )
        network.prepare(blocks)
        trainer = Trainer(network, blocks, looks, train_config, folder, where)
        if resume:
            trainer.resume()
        trainer.fit()
        if where.leads:
            _finish(folder, destination, aliases, where)


def _finish(folder: Path, store: Store | None, aliases: tuple[str, ...], where: Processes) -> None:
    if store is None:
        print(f"Trained into {folder}. Next: specmoe export {folder}")
        return
    exported = export(folder, progress=where.leads)
    manifest = publish_export(exported, store, aliases=aliases)
    print(f"Published {manifest.spec.model} version {manifest.version} to {store.location}.")
