"""The whole way from traces to a published version, as one call; `specmoe train` is its command line.

specmoe train --traces train.npz --validation validation.npz --run runs/mine --publish --store ./store
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from model_store.documents import check_alias
from model_store.manifest import TraceSource
from model_store.store import Store, open_store
from speculation.publishing import publish_export
from traces.trace import RoutingTrace, concatenate
from training.config import TrainConfig
from training.errors import RunInvalid, check_same_shape
from training.examples import Batch, Examples
from training.export import export
from training.hidden_states import check_hidden
from training.loop import Trainer, best_passes
from training.plan import steps_per_pass
from training.precision import tell_imitated
from training.predictor_configs import PredictorConfig, reads_hidden
from training.predictors import examples_of, network_of
from training.processes import Processes, processes
from training.run import Run, check_apart, check_resumable, environment, load_traces, read_run, write_run
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
        _fit(run, folder, where, train_trace, validation_trace, resume=resume)
        if where.leads:
            _finish(folder, destination, aliases, where)


def refit(
    base_folder: Path,
    *,
    traces: tuple[Path, ...],
    folder: Path,
    command: str,
    resume: bool = False,
    store: str | None = None,
    aliases: tuple[str, ...] = (),
) -> None:
    """Train as the finished run in `base_folder` was, with its validation traces among the training traces.

    traces: the training traces that it had. command: what comes behind the run's own, in the lineage.
    Otherwise as `train`; raises RunInvalid where they are others.
    """
    destination = None if store is None else open_store(store)
    for alias in aliases:
        check_alias(alias)
    base = read_run(base_folder)
    if base.refit is not None:
        raise RunInvalid(
            f"{base_folder} has learnt from its validation traces already.", remedy=f"Give {base.refit}."
        )
    with processes() as where:
        model, hidden = base.spec.model, reads_hidden(base.predictor_config)
        trace, sources = load_traces(traces, "train", model, hidden=hidden)
        kept_back, more = load_traces(base.validation_paths, "validation", model, hidden=hidden)
        _check_same(base_folder, base.sources, sources + more)
        in_pass = steps_per_pass(_blocks(base, trace), base.train_config)
        passes = best_passes(base_folder, in_pass, base.train_config)
        both = concatenate([trace, kept_back])
        vocabulary = Vocabulary.of(both.token_ids, both.starts)
        run = replace(
            base,
            known_ids=tuple(vocabulary.known.tolist()),
            known_pairs=tuple((before, token) for before, token in vocabulary.pairs.tolist()),
            command=f"{base.command} && {command}",
            refit=base_folder.resolve(),
            **environment(),
        )
        _fit(run, folder, where, both, None, resume=resume, passes=passes)
        if where.leads:
            _finish(folder, destination, aliases, where)


def _check_same(folder: Path, had: tuple[TraceSource, ...], came: tuple[TraceSource, ...]) -> None:
    """Raise RunInvalid where these are not the traces that a run had."""
    if [(source.use, source.sha256) for source in had] != [(source.use, source.sha256) for source in came]:
        names = [
            ", ".join(source.name for source in sources if source.use == "train") for sources in (had, came)
        ]
        raise RunInvalid(
            f"{folder} was trained on {names[0]}, and {names[1]} came, or one of its traces has changed.",
            remedy="Give the traces that it was trained on, in the same order.",
        )


def _blocks(run: Run, trace: RoutingTrace) -> Examples[Batch]:
    return examples_of(trace, run.train_config.block_tokens, run.predictor_config)


def _fit(
    run: Run,
    folder: Path,
    where: Processes,
    trace: RoutingTrace,
    validation: RoutingTrace | None,
    *,
    resume: bool,
    passes: int | None = None,
) -> None:
    """Begin or resume a run, and train it to its end."""
    if resume:
        check_resumable(folder, run)
    elif where.leads:
        write_run(folder, run)
    if where.leads:
        tell_imitated(run.train_config.precision, where.device)
    torch.manual_seed(run.train_config.seed)
    network = network_of(run.spec, run.predictor_config, run.vocabulary, run.hidden_size)
    blocks = _blocks(run, trace)
    looks = None if validation is None else _blocks(run, validation)
    network.prepare(blocks)
    trainer = Trainer(network, blocks, looks, run.train_config, folder, where, passes)
    if resume:
        trainer.resume()
    trainer.fit()


def _finish(folder: Path, store: Store | None, aliases: tuple[str, ...], where: Processes) -> None:
    if store is None:
        print(f"Trained into {folder}. Next: specmoe export {folder}")
        return
    exported = export(folder, progress=where.leads)
    manifest = publish_export(exported, store, aliases=aliases)
    print(f"Published {manifest.spec.model} version {manifest.version} to {store.location}.")
