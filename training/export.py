"""From a training run to what can be published: calibrated ONNX graphs and a draft of their manifest.

specmoe export runs/mine
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_store.documents import complete, written
from model_store.manifest import (
    ADVANCE,
    BEGIN,
    PREDICT,
    STEP,
    Coverage,
    Draft,
    GraphName,
    Lineage,
    Predictor,
)
from model_store.store import StoredVersion
from speculation.golden import golden_probabilities
from speculation.publishing import DRAFT, read_export
from speculation.runtime import Speculator
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace
from training import checkpoint
from training.calibration import Calibration, fit
from training.errors import ExportFailed
from training.evaluate import score_version
from training.examples import Examples
from training.loop import CHECKPOINT
from training.onnx_graph import OPSET, halve, to_onnx
from training.parity import check_parity, check_quantized, check_trained
from training.predictor_configs import reads_hidden
from training.predictors import examples_of, kind_of, network_of
from training.predictors.predictor import Predictor as TrainedPredictor
from training.quantization import quantized
from training.run import Run, load_traces, read_run
from training.served import Served
from training.survey import MAX_WINDOWED_TOKENS, Survey, coverage, survey

EXPORT = "export"
# Inputs of a step with an axis for the layers told.
TOLD = ("layers", "experts", "gates")


def export(folder: Path, *, progress: bool = False) -> Path:
    """Export the best weights of the run in `folder`. Returns the folder with graphs and draft.

    Of a refit, calibration, sets and metrics are those of the run that it repeats; that is exported, too.
    Raises RunInvalid where the run has no finished look yet, ExportFailed where a graph answers otherwise
    than the predictor, and what loading the validation traces raises.
    """
    run = read_run(folder)
    predictor, seconds = trained(run, folder)
    halve(predictor)
    hidden = reads_hidden(run.predictor_config)
    trace, _ = load_traces(run.validation_paths, "validation", run.spec.model, hidden=hidden)
    blocks = as_served(run, trace)
    judged = predictor if run.refit is None else _judge(run.refit)
    judged.settle(blocks)
    predictor.settle_as(judged)
    calibration, found = calibrated(judged, blocks, progress=progress)
    functions = kind_of(run.predictor_config).served(predictor, calibration)
    row = calibration.first_row_of(True, hidden_told=bool(predictor.hidden_size))
    exact = _assembled(run, predictor, functions, coverage(found, calibration, row), seconds)
    check_parity(functions, exact, trace)
    check_trained(predictor, calibration, blocks, exact, trace)
    stored = replace(exact, graphs={name: quantized(graph) for name, graph in exact.graphs.items()})
    check_quantized(exact, stored, trace)
    speculator = Speculator(stored, provider="cpu", origin=str(folder))
    if run.refit is None:
        every = -(-trace.num_tokens // MAX_WINDOWED_TOKENS) if blocks.shares_prefix else 1
        scores = score_version(speculator, trace, every=every, progress=progress).distances()
        metrics = {distance: _flat(score) for distance, score in scores.items()}
    else:
        metrics = read_export(export(run.refit, progress=progress))[0].metrics["validation"]
    draft = _draft_of(stored, golden_probabilities(speculator), metrics)
    return _write(folder / EXPORT, draft, stored)


def _judge(folder: Path) -> TrainedPredictor:
    """The predictor of a run that has not seen the validation traces in training."""
    predictor, _ = trained(read_run(folder), folder)
    halve(predictor)
    return predictor


def as_served(run: Run, trace: RoutingTrace) -> Examples[Any]:
    """The examples of a trace in which each token sees as much of its past as it will when served."""
    shares_prefix = kind_of(run.predictor_config).examples.shares_prefix
    return examples_of(trace, 1 if shares_prefix else run.train_config.block_tokens, run.predictor_config)


def trained(run: Run, folder: Path) -> tuple[TrainedPredictor, float]:
    """The predictor with the run's best weights, and the seconds it was trained."""
    saved = checkpoint.load(folder / CHECKPOINT)
    predictor = network_of(run.spec, run.predictor_config, run.vocabulary, run.hidden_size)
    if not saved["best_weights"]:
        until = "first look at the validation split" if run.refit is None else "end"
        raise ExportFailed(
            f"{folder} was interrupted before its {until}.",
            remedy=f"Go on with it: specmoe {'train' if run.refit is None else 'refit'} --resume.",
        )
    try:
        predictor.load_state_dict(saved["best_weights"])
    except RuntimeError as error:  # many lines, the first of which names the class alone
        raise ExportFailed(
            f"{folder} holds weights of another predictor: {str(error).splitlines()[1].strip()}",
            remedy="It was trained by another specMoE: export it there, or train it again.",
        ) from error
    return predictor.eval(), float(saved["seconds"])


def calibrated(
    predictor: TrainedPredictor, blocks: Examples[Any], *, progress: bool = False
) -> tuple[Calibration, Survey]:
    """Calibration fitted on `blocks`, with token ids and without, and the survey of the richer kind.

    Where the predictor reads hidden states, all of it once more without them.
    """
    calibration = Calibration(
        predictor.spec.num_layers, predictor.spec.top_k, hidden=bool(predictor.hidden_size)
    )
    if predictor.hidden_size:
        _calibrate(calibration, predictor, blocks.untold(), hidden_told=False, progress=progress)
    found = _calibrate(
        calibration, predictor, blocks, hidden_told=bool(predictor.hidden_size), progress=progress
    )
    return calibration, found


def _calibrate(
    calibration: Calibration,
    predictor: TrainedPredictor,
    blocks: Examples[Any],
    *,
    hidden_told: bool,
    progress: bool,
) -> Survey:
    """Set the tables with token ids and without. Returns the survey of the richer kind."""
    without = survey(predictor, blocks, token_ids=False, progress=progress)
    calibration.set_tables(False, fit(without.logits, without.targets), hidden_told=hidden_told)
    if not predictor.reads_ids:
        calibration.set_tables(True, fit(without.logits, without.targets), hidden_told=hidden_told)
        return without
    del without
    found = survey(predictor, blocks, token_ids=True, progress=progress)
    calibration.set_tables(True, fit(found.logits, found.targets), hidden_told=hidden_told)
    return found


def _assembled(
    run: Run, predictor: TrainedPredictor, functions: Served, covering: Coverage, seconds: float
) -> StoredVersion:
    """Graphs and manifest as a store would hold them, before golden values and metrics are known."""
    graphs = {
        name: to_onnx(
            function,
            example_inputs(run.spec, functions, name),
            output_names(functions, name),
            told=TOLD if name == STEP else (),
        )
        for name, function in functions.graphs.items()
    }
    draft = Draft(
        spec=run.spec,
        predictor=Predictor(
            name=run.predictor,
            parameters=sum(parameter.numel() for parameter in predictor.parameters()),
            config=asdict(run.predictor_config) | asdict(run.train_config) | predictor.settled(),
        ),
        uses_token_ids=predictor.reads_ids,
        uses_gates=predictor.reads_gates,
        state=functions.state,
        token=functions.token,
        progress=functions.progress,
        hidden_size=functions.hidden_size,
        opset=OPSET,
        metrics={},
        coverage=covering,
        golden=((0.0,) * run.spec.num_experts,) * run.spec.num_layers,
        lineage=Lineage(
            traces=run.sources,
            command=run.command,
            code_revision=run.code_revision,
            seed=run.train_config.seed,
            trained_seconds=seconds,
            hardware=run.hardware,
            packages=run.packages,
            refit=run.refit is not None,
        ),
    )
    return StoredVersion(complete(draft, 1, graphs), graphs)


def example_inputs(spec: RoutingSpec, functions: Served, name: GraphName) -> dict[str, torch.Tensor]:
    """Inputs of a graph for a batch of two sequences at their start."""
    carried = [tensor for tensor in functions.state if tensor.name in functions.reads[name]]
    if name == STEP:
        carried += [*functions.token, *functions.progress]
    inputs = {t.name: torch.zeros((2, *t.shape), dtype=getattr(torch, t.dtype)) for t in carried}
    routed = (2, spec.num_layers, spec.top_k)
    experts = torch.arange(spec.top_k, dtype=torch.int32).expand(routed).contiguous()
    layers = torch.arange(spec.num_layers, dtype=torch.int32).expand(routed[:2]).contiguous()
    token_id = {"token_id": torch.zeros(2, dtype=torch.int64)}
    routing = {"experts": experts, "gates": torch.full(routed, 1 / spec.top_k)}
    further: dict[GraphName, dict[str, torch.Tensor]] = {BEGIN: token_id, STEP: {"layers": layers, **routing}}
    if functions.hidden_size:
        further[PREDICT] = token_id | routing | {"hidden": torch.ones(2, functions.hidden_size)}
    return inputs | further.get(name, token_id | routing)


def output_names(functions: Served, name: GraphName) -> list[str]:
    """Outputs of a graph, as the contract has them."""
    state, progress = ([f"next_{t.name}" for t in part] for part in (functions.state, functions.progress))
    names: dict[GraphName, list[str]] = {
        PREDICT: ["probabilities"],
        ADVANCE: state,
        BEGIN: [tensor.name for tensor in functions.token],
        STEP: [*progress, "probabilities"],
    }
    return names[name]


def _draft_of(stored: StoredVersion, golden: np.ndarray, metrics: dict[str, dict[str, float]]) -> Draft:
    fields = {name: getattr(stored.manifest, name) for name in Draft.model_fields}
    fields["golden"] = tuple(tuple(row) for row in np.round(golden.astype(float), 5))
    fields["metrics"] = {"validation": metrics}
    return Draft(**fields)


def _flat(scores: dict[str, object], prefix: str = "") -> dict[str, float]:
    """Nested scores under names joined by underscores; those that could not be known are left out."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            flat[prefix + name] = round(float(value), 5)
    return flat


def _write(folder: Path, draft: Draft, stored: StoredVersion) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in [*stored.graphs.items(), (DRAFT, written(draft))]:
        (folder / name).write_bytes(content)
    return folder
