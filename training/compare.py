"""Trains, exports and scores every approach on the same splits; whatever is finished is never done again.

approaches + splits -> runs, exports, one result each -> `training.compare_report`

    FOLDER/comparison.json  what is compared     FOLDER/runs/NAME       training runs, with their export
    FOLDER/results/NAME.json  scores             FOLDER/traces          what was made from the splits

specmoe compare --traces train.npz --validation validation.npz --test test.npz --folder comparison
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model_store.manifest import Draft
from speculation.publishing import DRAFT, read_export
from speculation.runtime import Speculator
from traces.spec import RoutingSpec
from training.approaches import Approach
from training.baselines import BASELINES
from training.compare_traces import Splits
from training.cost import measure_cost, measure_step
from training.errors import ComparisonInvalid
from training.evaluate import score_baseline, score_version
from training.export import EXPORT, export
from training.loop import CHECKPOINT
from training.metrics import START, Metrics
from training.pipeline import train
from training.report import write_json
from training.run import RECORD

COMPARISON = "comparison.json"
RESULTS, RUNS, TRACES = "results", "runs", "traces"
SCHEMA = 1
# How many of the best are trained with further seeds.
TOP = 3
# By layer, what the report shows.
BY_LAYER = (START, "1")

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What must be alike for results to be comparable.

    every: one test token in so many is scored. passes: over the training tokens; None: as each preset has it.
    precision: of products while training (float32 or bfloat16); None: as each preset has it.
    quick: tiny predictors on few tokens, whose numbers mean nothing.
    """

    every: int = 1
    passes: int | None = None
    precision: str | None = None
    quick: bool = False


@dataclass(frozen=True)
class Comparison:
    """A comparison in its folder. splits: as they were given. command: for the runs' lineage."""

    folder: Path
    splits: Splits
    settings: Settings
    command: str

    def begin(self) -> None:
        """Write down what is compared. Raises ComparisonInvalid where the folder holds another comparison."""
        asked = self.description()
        path = self.folder / COMPARISON
        if not path.exists():
            write_whole(asked, path)
            return
        recorded = _read(path)
        for name, came in asked.items():
            if recorded.get(name) != came:
                raise ComparisonInvalid(
                    f"{self.folder} holds a comparison with {name} {recorded.get(name)}, now {came}.",
                    remedy="Give the options and traces it began with, or another --folder.",
                )

    def description(self) -> dict[str, Any]:
        """Schema, shape, settings, and the files of each split by name and sha256."""
        spec = self.splits.train.trace.spec
        files = {use: [list(file) for file in split.digests] for use, split in vars(self.splits).items()}
        return {"schema": SCHEMA, "spec": _shape(spec), **asdict(self.settings), "files": files}

    def used(self) -> Splits:
        """The splits that are learnt from and scored: shorter in a quick comparison."""
        return self.splits.cut(self.folder / TRACES) if self.settings.quick else self.splits

    def result(self, approach: Approach, seed: int, splits: Splits) -> Result:
        """Scores of an approach, from its file where it is known. Raises what training and scoring raise."""
        name = run_name(approach, seed)
        path = self.folder / RESULTS / f"{name}.json"
        if not path.exists():
            scored = (
                self._plain(approach, splits) if approach.baseline else self._trained(approach, seed, splits)
            )
            write_whole({"name": approach.name, "seed": seed, **scored}, path)
        return _read(path)

    def _plain(self, approach: Approach, splits: Splits) -> Result:
        baseline = BASELINES[approach.baseline]().fit(splits.train.trace)
        metrics = score_baseline(baseline, splits.test.trace, every=self.settings.every, progress=True)
        return {"kind": "baseline", **_scores(metrics)}

    def _trained(self, approach: Approach, seed: int, splits: Splits) -> Result:
        folder = self.folder / RUNS / run_name(approach, seed)
        learnt = splits.shuffled(self.folder / TRACES) if approach.shuffled else splits
        if not (folder / EXPORT / DRAFT).exists():
            self._train(approach, seed, learnt, folder)
            export(folder, progress=True)
        draft, speculator = self._exported(folder)
        metrics = score_version(
            speculator, splits.test.trace, every=self.settings.every, progress=True, title=approach.name
        )
        return {
            "kind": "control" if approach.shuffled else "trained",
            "passes": draft.predictor.config["passes"],
            "trained_seconds": draft.lineage.trained_seconds,
            **_scores(metrics),
        }

    def cost(self, approach: Approach, seed: int) -> Result:
        """What a trained approach takes when it is called, measured now."""
        _, speculator = self._exported(self.folder / RUNS / run_name(approach, seed))
        return measure_cost(speculator) | {"step_us": measure_step(speculator)}

    def _exported(self, folder: Path) -> tuple[Draft, Speculator]:
        draft, stored = read_export(folder / EXPORT)
        return draft, Speculator(stored, provider="cpu", origin=str(folder))

    def _train(self, approach: Approach, seed: int, splits: Splits, folder: Path) -> None:
        if not (folder / CHECKPOINT).exists():  # it was cut off before there was anything to go on with
            shutil.rmtree(folder, ignore_errors=True)
        settings = self.settings
        with redirect_stdout(sys.stderr):  # where it trained into is news, not the outcome
            train(
                traces=splits.train.paths,
                validation=splits.validation.paths,
                folder=folder,
                model=None,
                train_config=approach.training(
                    seed, passes=settings.passes, precision=settings.precision, quick=settings.quick
                ),
                predictor=approach.predictor,
                predictor_config=approach.config(settings.quick),
                command=self.command,
                resume=(folder / RECORD).exists(),
            )


def compare(
    comparison: Comparison, approaches: Sequence[Approach], seeds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything as plain JSON values: description, tokens, `results`, and `further` seeds of the best.

    seeds: of the best three trained ones; the others have one. say: told which approach is next.
    """
    comparison.begin()
    splits = comparison.used()
    results = [
        _announced(comparison, approach, 0, splits, f"{number} of {len(approaches)}", say)
        for number, approach in enumerate(approaches, 1)
    ]
    best = {result["name"] for result in top(results)}
    repeated = [(a, seed) for seed in range(1, seeds) for a in approaches if a.name in best]
    further = [
        _announced(comparison, approach, seed, splits, f"further {number} of {len(repeated)}", say)
        for number, (approach, seed) in enumerate(repeated, 1)
    ]
    say("time of a call")  # one after the other, so that they can be compared
    for approach, result in zip(approaches, results, strict=True):
        if not approach.baseline:
            result["cost"] = comparison.cost(approach, 0)
    return {
        **comparison.description(),
        "tokens": {use: split.trace.num_tokens for use, split in vars(splits).items()},
        "gates": splits.test.trace.gates is not None,
        "token_ids": splits.test.trace.token_ids is not None,
        "results": results,
        "further": further,
    }


def _announced(
    comparison: Comparison,
    approach: Approach,
    seed: int,
    splits: Splits,
    place: str,
    say: Callable[[str], None],
) -> Result:
    say(f"{place}: {run_name(approach, seed)}")
    return comparison.result(approach, seed, splits)


def top(results: Sequence[Result], count: int = TOP) -> list[Result]:
    """The best trained ones, best first, by recall@k at token start and one layer ahead together."""
    return sorted((r for r in results if r["kind"] == "trained"), key=standing, reverse=True)[:count]


def standing(result: Result) -> float:
    """Mean of recall@k at token start and, where there are two layers, one layer ahead."""
    known = [result["distances"][d]["recall_at_k"] for d in BY_LAYER if d in result["distances"]]
    return float(sum(known) / len(known))


def run_name(approach: Approach, seed: int) -> str:
    """Of its run and its result; seed 0 goes without saying."""
    return f"{approach.name}-seed{seed}" if seed else approach.name


def write_whole(document: dict[str, Any], path: Path) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    write_json(document, partial)
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ComparisonInvalid(
            f"{path} is no JSON: {error}.", remedy="Remove that file; what it held is done again."
        ) from error
    return document


def _scores(metrics: Metrics) -> Result:
    by_layer = metrics.by_layer_and_distance()
    return {
        "distances": metrics.distances(),
        "by_layer": {distance: by_layer[distance] for distance in BY_LAYER if distance in by_layer},
        "reliability": metrics.reliability(),
    }


def _shape(spec: RoutingSpec) -> dict[str, Any]:
    names = ("model", "num_layers", "num_experts", "top_k")
    return {name: getattr(spec, name) for name in names}
