"""What a version says of itself: `manifest.json`, read before any of its other files is trusted.

<store>/<model>/<version>/{predict.onnx, advance.onnx, manifest.json}; some have begin.onnx and step.onnx,
some outlook.onnx
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from traces.spec import RoutingSpec

SCHEMA_VERSION: Final = 1
PREDICT: Final = "predict.onnx"
ADVANCE: Final = "advance.onnx"
BEGIN: Final = "begin.onnx"
STEP: Final = "step.onnx"
OUTLOOK: Final = "outlook.onnx"
MANIFEST: Final = "manifest.json"
# Of one sequence; thousands of sequences may have theirs in memory at once.
MAX_STATE_ELEMENTS = 1 << 22

GraphName = Literal["predict.onnx", "advance.onnx", "begin.onnx", "step.onnx", "outlook.onnx"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """Refuses fields it does not know: a manifest written by a newer specMoE is not half-understood."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StateTensor(Part):
    """One tensor that a sequence carries. `shape` is without the leading batch axis."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    dtype: Literal["float16", "float32", "int32", "int64", "uint8"]
    shape: tuple[Annotated[int, Field(ge=1)], ...]

    @model_validator(mode="after")
    def _fits_into_memory(self) -> Self:
        if (elements := math.prod(self.shape)) > MAX_STATE_ELEMENTS:
            raise ValueError(f"{self.name} has {elements} elements, expected {MAX_STATE_ELEMENTS} at most")
        return self


class File(Part):
    """A file of the version, as it was published."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=1)]


class Predictor(Part):
    """Which network is inside, for people; the service needs none of it."""

    name: str
    parameters: Annotated[int, Field(ge=0)]
    config: dict[str, Any] = {}


class Coverage(Part):
    """Which experts to fetch so that all routed ones are among them: as many of the first-ranked as it says,
    and whoever else is probable enough.

    `experts[i][l][d - 1]`, `thresholds[i][l][d - 1]`: with probability `levels[i]`, for target layer l at
    distance d = 1 .. l + 1, where distance l + 1 is the start of the token. Versions from before thresholds
    have none: a number of experts alone. From the validation split.
    """

    levels: tuple[Probability, ...]
    experts: tuple[tuple[tuple[Annotated[int, Field(ge=1)], ...], ...], ...]
    thresholds: tuple[tuple[tuple[Probability, ...], ...], ...] = ()

    @model_validator(mode="after")
    def _triangular(self) -> Self:
        if len(self.experts) != len(self.levels):
            raise ValueError(f"coverage has {len(self.experts)} tables for {len(self.levels)} levels")
        if self.thresholds and len(self.thresholds) != len(self.levels):
            raise ValueError(
                f"coverage has {len(self.thresholds)} tables of thresholds for {len(self.levels)} levels"
            )
        for tables in (self.experts, self.thresholds):
            for level, table in zip(self.levels, tables, strict=False):
                for layer, row in enumerate(table):
                    if len(row) != layer + 1:
                        raise ValueError(
                            f"coverage at {level}, layer {layer} has {len(row)} distances, "
                            f"expected {layer + 1}"
                        )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        if not self.thresholds:
            del fields["thresholds"]
        return fields


class Lineage(Part):
    """Where a version comes from: enough to train it again.

    refit: whether it learnt from the validation traces, too. Calibration, coverage and metrics are then those
    of the run that it repeats, which had not.
    """

    traces: tuple[TraceSource, ...]
    command: str
    code_revision: str
    seed: int
    trained_seconds: Annotated[float, Field(ge=0)]
    hardware: str
    packages: dict[str, str]
    refit: bool = False


class TraceSource(Part):
    """A trace file that went into a version. `use`: what it was used for."""

    name: str
    use: Literal["train", "validation"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tokens: Annotated[int, Field(ge=1)]
    sequences: Annotated[int, Field(ge=1)]


class Outlook(Part):
    """What outlook.onnx tells: how probable a use of each expert is within the next `tokens` tokens.

    golden: what it must tell, L x E probabilities, after `speculation.golden` fed it made-up routing.
    metrics[split][metric], lineage: of this graph alone, which is trained after the others.
    """

    tokens: Annotated[int, Field(ge=1)]
    golden: tuple[tuple[Probability, ...], ...]
    metrics: dict[str, dict[str, float]]
    lineage: Lineage


class Draft(Part):
    """A manifest before it is published: everything but the version's number, its time and its files."""

    schema_version: Literal[1] = SCHEMA_VERSION
    spec: RoutingSpec
    predictor: Predictor
    # Which of the optional inputs change its predictions. It works without them too (-1, uniform).
    uses_token_ids: bool
    uses_gates: bool
    # Numbers of a hidden state, which predict may be told as one more input; 0: it takes none.
    hidden_size: Annotated[int, Field(ge=0, le=MAX_STATE_ELEMENTS)] = 0
    # From token to token, zeros at first; fixed during a token, as begin makes them; from step to step, zeros
    # at token start.
    state: tuple[StateTensor, ...]
    token: tuple[StateTensor, ...] = ()
    progress: tuple[StateTensor, ...] = ()
    opset: Annotated[int, Field(ge=1)]
    # metrics[split][distance][metric]; distance "start", "1", "2", ...
    metrics: dict[str, dict[str, dict[str, float]]]
    coverage: Coverage
    # What predict must answer, L x E probabilities, after `speculation.golden` fed it made-up routing.
    golden: tuple[tuple[Probability, ...], ...]
    lineage: Lineage
    # None: the version has no outlook.onnx.
    outlook: Outlook | None = None

    @model_validator(mode="after")
    def _shapes_follow_the_spec(self) -> Self:
        layers, experts = self.spec.num_layers, self.spec.num_experts
        goldens = {"golden": self.golden}
        if self.outlook is not None:
            goldens["outlook.golden"] = self.outlook.golden
        for name, golden in goldens.items():
            if len(golden) != layers or any(len(row) != experts for row in golden):
                raise ValueError(f"{name} must be {layers} x {experts}, as the spec says")
        for level, table in zip(self.coverage.levels, self.coverage.experts, strict=True):
            if len(table) != layers or any(n > experts for row in table for n in row):
                raise ValueError(f"coverage at {level} must have {layers} layers, at most {experts} experts")
        if any(len(table) != layers for table in self.coverage.thresholds):
            raise ValueError(f"coverage's thresholds must have {layers} layers")
        names = ["token_id", "experts", "gates", *(["layers"] if self.token else [])]
        names += ["hidden"] if self.hidden_size else []
        names += [tensor.name for tensor in (*self.state, *self.token, *self.progress)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two inputs have the name {twice[0]}")
        if bool(self.token) != bool(self.progress):
            raise ValueError("token and progress belong together: begin makes the one, step the other")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """An older specMoE, which refuses fields it does not know, reads a version that has none of these."""
        fields: dict[str, Any] = write(self)
        for name in ("outlook", "hidden_size"):
            if not getattr(self, name):
                fields.pop(name, None)
        return fields


class Manifest(Draft):
    """What lies beside the graphs as `manifest.json`."""

    version: Annotated[int, Field(ge=1)]
    created: datetime
    files: dict[GraphName, File]

    @model_validator(mode="after")
    def _files_are_complete(self) -> Self:
        if missing := {PREDICT, ADVANCE} - set(self.files):
            raise ValueError(f"files lacks {', '.join(sorted(missing))}")
        # Step by step needs both graphs and says what they pass on; a version that says nothing has neither.
        incremental = {BEGIN, STEP} if self.token else set()
        if (came := {BEGIN, STEP} & set(self.files)) != incremental:
            raise ValueError(
                f"files has {_listed(came)} of {BEGIN} and {STEP}, expected {_listed(incremental)}: "
                f"both where token and progress are described, else none"
            )
        if (OUTLOOK in self.files) != (self.outlook is not None):
            raise ValueError(f"{OUTLOOK} and its description belong together: files or outlook lacks it")
        return self


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names)) or "none"
