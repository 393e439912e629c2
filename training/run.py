"""A training run's folder: what was asked for, so that it can be resumed, exported and trained again.

RUN/run.json        this record          RUN/checkpoint.pt   weights, optimizers, step
RUN/export/         graphs and draft     RUN/events.out.*    TensorBoard
"""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from model_store.manifest import TraceSource
from traces.files import digest, load
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, concatenate
from training.config import TrainConfig
from training.errors import RunInvalid, check_same_shape
from training.predictor_configs import PredictorConfig
from training.presets import PRESETS
from training.vocabulary import Vocabulary

RECORD = "run.json"
# Of ONNX Runtime's two distributions one is installed.
PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Run:
    """What a run was asked for.

    predictor: its name; predictor_config: its size, of the type that goes with the name (`training.presets`).
    paths: of the validation traces, where they lay on this machine; everything else goes into the lineage.
    known_ids, known_pairs: the vocabulary. hidden_size: of the hidden states it reads, 0 where it reads none.
    refit: folder of the run that it repeats with the validation traces among the training traces, if any.
    """

    spec: RoutingSpec
    predictor: str
    predictor_config: Any
    train_config: TrainConfig
    sources: tuple[TraceSource, ...]
    validation_paths: tuple[Path, ...]
    known_ids: tuple[int, ...]
    known_pairs: tuple[tuple[int, int], ...]
    command: str
    code_revision: str
    hardware: str
    packages: dict[str, str]
    hidden_size: int = 0
    refit: Path | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(np.array(self.known_ids, np.int64), np.array(self.known_pairs, np.int64))


_RUN: TypeAdapter[Run] = TypeAdapter(Run)


def write_run(folder: Path, run: Run) -> None:
    """Begin a run. Raises RunInvalid where the folder already holds one."""
    record = folder / RECORD
    if record.exists():
        raise RunInvalid(
            f"{folder} already holds a run.",
            remedy="Give --resume to go on with it, or another --run folder.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_bytes(_RUN.dump_json(run, indent=1))


def read_run(folder: Path) -> Run:
    """The run of a folder. Raises RunInvalid where there is none or its record is damaged."""
    try:
        run = _RUN.validate_json((folder / RECORD).read_bytes())
        return replace(run, predictor_config=_config_of(folder, run))
    except FileNotFoundError as error:
        raise RunInvalid(
            f"{folder} holds no run: there is no {RECORD}.", remedy="Give a folder made by `specmoe train`."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunInvalid(
            f"{folder / RECORD}: {place}: {first['msg']}.", remedy="Train again into a new folder."
        ) from error


def _config_of(folder: Path, run: Run) -> PredictorConfig:
    """The predictor's config as an object. Raises RunInvalid, ValidationError."""
    if run.predictor not in PRESETS:
        raise RunInvalid(
            f"{folder / RECORD}: predictor is {run.predictor!r}, expected one of {', '.join(PRESETS)}.",
            remedy="Train again into a new folder.",
        )
    kind = type(PRESETS[run.predictor].config)
    config: PredictorConfig = TypeAdapter(kind).validate_python(run.predictor_config)
    return config


def check_resumable(folder: Path, run: Run) -> None:
    """Raise RunInvalid where the run in `folder` was asked for otherwise: its lineage would not be true."""
    recorded = read_run(folder)
    for name in ("spec", "predictor", "predictor_config", "train_config", "sources", "hidden_size", "refit"):
        came, expected = getattr(run, name), getattr(recorded, name)
        if came != expected:
            raise RunInvalid(
                f"{folder} was started with other {name.replace('_', ' ')}: {_differences(expected, came)}.",
                remedy="Resume with the options and traces it began with, or choose a new --run folder.",
            )


def check_apart(train: tuple[TraceSource, ...], validation: tuple[TraceSource, ...]) -> None:
    """Raise RunInvalid where a validation trace is a training trace too: its scores would tell nothing."""
    learnt = {source.sha256: source.name for source in train}
    for source in validation:
        if source.sha256 in learnt:
            raise RunInvalid(
                f"{source.name} is given for validation, and the same recording, as {learnt[source.sha256]},"
                " for training.",
                remedy="Validate on sequences of their own: training stops, and probabilities are"
                " calibrated, by what they show.",
            )


def _differences(expected: Any, came: Any) -> str:
    """What differs, by field where both are of one dataclass."""
    if not is_dataclass(expected) or type(expected) is not type(came):
        return f"{expected}, now {came}"
    return "; ".join(
        f"{field.name} {_differences(getattr(expected, field.name), getattr(came, field.name))}"
        for field in fields(expected)
        if getattr(expected, field.name) != getattr(came, field.name)
    )


def load_traces(
    paths: tuple[Path, ...],
    use: Literal["train", "validation"],
    model: str | None = None,
    *,
    hidden: bool = False,
) -> tuple[RoutingTrace, tuple[TraceSource, ...]]:
    """All traces of these files and folders as one, and where it came from.

    model: the name to go by, where the files' own is not the one wanted. hidden: with hidden states, where
    all have some.
    """
    traces = [load(path, hidden=hidden) for path in paths]
    for trace in traces[1:]:
        check_same_shape(trace.spec, traces[0].spec, str(paths[0]))
    sources = tuple(
        TraceSource(
            name=path.name,
            use=use,
            sha256=digest(path),
            tokens=trace.num_tokens,
            sequences=trace.num_sequences,
        )
        for path, trace in zip(paths, traces, strict=True)
    )
    return _named(concatenate([_named(trace, traces[0].spec.model) for trace in traces]), model), sources


def _named(trace: RoutingTrace, model: str | None) -> RoutingTrace:
    if model is None or model == trace.spec.model:
        return trace
    return replace(trace, spec=replace(trace.spec, model=model))


def environment() -> dict[str, Any]:
    """Code revision, hardware and package versions, for the lineage."""
    return {
        "code_revision": _revision(),
        "hardware": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "packages": {"python": platform.python_version(), **_installed()},
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _revision() -> str:
    """The git commit of this code, with a plus where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(here), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
