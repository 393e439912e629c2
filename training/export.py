"""From a training run to what can be published: calibrated ONNX graphs and a draft of their manifest.

specmoe export runs/mine
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from model_store.documents import complete, written
from model_store.manifest import ADVANCE, PREDICT, Draft, Lineage, Predictor, StateTensor
from model_store.store import StoredVersion
from speculation.golden import golden_probabilities
from speculation.publishing import DRAFT
from speculation.runtime import Speculator
from traces.trace import RoutingTrace
from training import checkpoint
from training.calibration import Calibration, fit
from training.dataset import Blocks
from training.errors import ExportFailed
from training.evaluate import score_version
from training.loop import CHECKPOINT
from training.onnx_graph import OPSET, halve, to_onnx
from training.predictors import PREDICTORS
from training.predictors.prefix import PrefixPredictor
from training.run import Run, load_traces, read_run
from training.survey import Survey, coverage, survey

EXPORT = "export"
# ONNX Runtime adds in another order than torch; nothing else may differ.
PARITY_TOLERANCE = 1e-4
PARITY_TOKENS = 64


def export(folder: Path, *, progress: bool = False) -> Path:
    """Export the best weights of the run in `folder`. Returns the folder with graphs and draft.

    Raises RunInvalid where the run has no finished look yet, ExportFailed where a graph answers otherwise
    than the predictor, and what loading the validation traces raises.
    """
    run = read_run(folder)
    predictor, seconds = trained(run, folder)
    halve(predictor)
    trace, _ = load_traces(run.validation_paths, "validation", run.spec.model)
    blocks = Blocks(trace, run.train_config.block_tokens, run.predictor_config)
    calibration, found = calibrated(predictor, blocks, progress=progress)
    stored = _assembled(run, predictor, calibration, found, seconds)
    check_parity(predictor, calibration, stored, trace)
    speculator = Speculator(stored, provider="cpu", origin=str(folder))
    metrics = score_version(speculator, trace, progress=progress).distances()
    draft = _draft_of(stored, golden_probabilities(speculator), metrics)
    return _write(folder / EXPORT, draft, stored)


def trained(run: Run, folder: Path) -> tuple[PrefixPredictor, float]:
    """The predictor with the run's best weights, and the seconds it was trained."""
    saved = checkpoint.load(folder / CHECKPOINT)
    predictor = PREDICTORS[run.predictor](run.spec, run.predictor_config, run.vocabulary)
    if not saved["best_weights"]:
        raise ExportFailed(
            f"{folder} was interrupted before its first look at the validation split.",
            remedy="Go on with it: specmoe train --resume.",
        )
    predictor.load_state_dict(saved["best_weights"])
    return predictor.eval(), float(saved["seconds"])


def calibrated(
    predictor: PrefixPredictor, blocks: Blocks, *, progress: bool = False
) -> tuple[Calibration, Survey]:
    """Calibration fitted on `blocks`, with token ids and without, and the survey of the richer kind."""
    calibration = Calibration(predictor.spec.num_layers)
    without = survey(predictor, blocks, token_ids=False, progress=progress)
    calibration.set_tables(False, fit(without.logits, without.targets))
    if not len(predictor.vocabulary.known):
        calibration.set_tables(True, fit(without.logits, without.targets))
        return calibration, without
    del without
    found = survey(predictor, blocks, token_ids=True, progress=progress)
    calibration.set_tables(True, fit(found.logits, found.targets))
    return calibration, found


def _assembled(
    run: Run, predictor: PrefixPredictor, calibration: Calibration, found: Survey, seconds: float
) -> StoredVersion:
    """Graphs and manifest as a store would hold them, before golden values and metrics are known."""
    predict, advance, state = predictor.graphs(calibration)
    inputs = example_inputs(run, state)
    graphs = (
        to_onnx(predict, inputs, ["probabilities"]),
        to_onnx(advance, inputs, [f"next_{tensor.name}" for tensor in state]),
    )
    draft = Draft(
        spec=run.spec,
        predictor=Predictor(
            name=predictor.name,
            parameters=sum(parameter.numel() for parameter in predictor.parameters()),
            config=vars(run.predictor_config) | vars(run.train_config),
        ),
        uses_token_ids=bool(run.known_ids),
        uses_gates=True,
        state=state,
        opset=OPSET,
        metrics={},
        coverage=coverage(found),
        golden=((0.0,) * run.spec.num_experts,) * run.spec.num_layers,
        lineage=Lineage(
            traces=run.sources,
            command=run.command,
            code_revision=run.code_revision,
            seed=run.train_config.seed,
            trained_seconds=seconds,
            hardware=run.hardware,
            packages=run.packages,
        ),
    )
    return StoredVersion(complete(draft, 1, *graphs), *graphs)


def example_inputs(run: Run, state: tuple[StateTensor, ...]) -> dict[str, torch.Tensor]:
    """Inputs of the two graphs for a batch of two sequences at their start."""
    spec = run.spec
    routed = (2, spec.num_layers, spec.top_k)
    experts = torch.arange(spec.top_k, dtype=torch.int32).expand(routed).contiguous()
    return {
        **{t.name: torch.zeros((2, *t.shape), dtype=getattr(torch, t.dtype)) for t in state},
        "token_id": torch.zeros(2, dtype=torch.int64),
        "experts": experts,
        "gates": torch.full(routed, 1 / spec.top_k),
    }


def check_parity(
    predictor: PrefixPredictor, calibration: Calibration, stored: StoredVersion, trace: RoutingTrace
) -> None:
    """Run real tokens through torch and ONNX Runtime side by side. Raises ExportFailed where they part."""
    predict, advance, state = predictor.graphs(calibration)
    speculator = Speculator(stored, provider="cpu", origin="the export")
    spec = trace.spec
    ours = speculator.initial_state(1)
    theirs = tuple(torch.zeros((1, *t.shape), dtype=getattr(torch, t.dtype)) for t in state)
    for token in range(min(PARITY_TOKENS, trace.sequence(0).stop)):
        row = slice(token, token + 1)
        ids = np.full(1, -1) if trace.token_ids is None else trace.token_ids[row].astype(np.int64)
        experts = trace.experts[row].astype(np.int32)
        gates = (
            np.full(experts.shape, 1 / spec.top_k, np.float32) if trace.gates is None else trace.gates[row]
        )
        shown = experts.copy()
        shown[:, token % spec.num_layers :] = -1
        with torch.no_grad():
            expected = predict(*theirs, *map(torch.from_numpy, (ids, shown, gates))).numpy()
            theirs = advance(*theirs, *map(torch.from_numpy, (ids, experts, gates)))
        came = speculator.predict(ours, ids, shown, gates)
        ours = speculator.advance(ours, ids, experts, gates)
        apart = max(
            float(np.abs(a - np.asarray(b)).max())
            for a, b in zip((came, *ours), (expected, *theirs), strict=True)
        )
        if not apart <= PARITY_TOLERANCE:
            raise ExportFailed(
                f"ONNX Runtime and torch differ by {apart:.1e} at token {token}, not {PARITY_TOLERANCE}.",
                remedy="Report this with the versions of torch and onnxruntime.",
            )


def _draft_of(stored: StoredVersion, golden: np.ndarray, metrics: dict[str, dict[str, object]]) -> Draft:
    fields = {name: getattr(stored.manifest, name) for name in Draft.model_fields}
    fields["golden"] = tuple(tuple(row) for row in np.round(golden.astype(float), 5))
    fields["metrics"] = {"validation": {distance: _flat(scores) for distance, scores in metrics.items()}}
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
    for name, content in ((PREDICT, stored.predict), (ADVANCE, stored.advance), (DRAFT, written(draft))):
        (folder / name).write_bytes(content)
    return folder
