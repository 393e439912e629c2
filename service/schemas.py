"""What travels over REST: requests as pydantic checks them, answers as the documentation describes them.

Body bytes -> `PREDICT_REQUEST.validate_json` -> `service.batch` turns lists into arrays. Answers are written
straight from arrays (`service.answers`); their models here only describe them in OpenAPI.

    curl localhost:8080/openapi.json
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema
from pydantic_core import PydanticCustomError

from traces.spec import MAX_EXPERTS, MAX_LAYERS

ALIAS = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_TOKEN_ID = 2**31 - 1
MAX_VERSION = 2**31 - 1


def _version_selector(value: Any) -> int | str | None:
    if value is None or (type(value) is int and 1 <= value <= MAX_VERSION):
        return value
    if type(value) is str and ALIAS.fullmatch(value):
        return value
    raise PydanticCustomError(
        "version_selector",
        "Input should be a version number from 1 up, an alias such as 'production', or null",
    )


VersionSelector = Annotated[
    int | str | None,
    BeforeValidator(_version_selector),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": f"^{ALIAS.pattern}$"},
                {"type": "null"},
            ]
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Expert = Annotated[int, Field(ge=0, lt=MAX_EXPERTS)]
# Far above any router's weight, and far below where a sum of them leaves float32.
MAX_GATE = 1e30
Gate = Annotated[float, Field(ge=0.0, le=MAX_GATE)]
Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


Item = TypeVar("Item")
# Told of its first wrong item: a list of a million would take seconds to tell of all.
Checked = Annotated[list[Item], Field(fail_fast=True)]


class Request(BaseModel):
    """Takes JSON types as they are (no "3" for 3) and refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Token(Request):
    """A token and how it was routed, layer by layer from layer 0."""

    token_id: TokenId | None = Field(None, description="Id in the model's own tokenizer; null where unknown.")
    experts: Checked[Checked[Expert]] = Field(
        [], description="experts[l]: the top_k experts that layer l routed the token to, in any order."
    )
    gates: Checked[Checked[Gate]] | None = Field(
        None,
        description="Router weights in the order of `experts`, on any scale; null where unknown.",
    )


class Sequence(Token):
    """One sequence being generated: the token in progress, and the finished ones before it."""

    context: Checked[Token] = Field(
        [],
        description="Finished tokens of this sequence, oldest first, each with all its layers. May be empty.",
    )


class PredictRequest(Request):
    """Which experts will these sequences need in the layers they have not reached?"""

    model: str = Field(max_length=100, description="A name that /v1/models lists.")
    version: VersionSelector = Field(None, description="Version or alias; null for the one that is served.")
    sequences: Checked[Sequence] = Field(min_length=1)
    layers: Annotated[list[Layer], Field(min_length=1)] | None = Field(
        None, description="Layers wanted; of these, each sequence gets those it has not seen. null: all."
    )
    top_n: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = Field(
        None, description="How many experts a layer. Without this and `coverage`: 2 * top_k."
    )
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="As many experts a layer as it takes for all the routed ones to be among them with this "
        "probability: fewer where the forecast is sure. Excludes `top_n`.",
    )
    combine: Literal["per_sequence", "union"] = Field(
        "per_sequence",
        description="`union`: one list for the whole batch, by the probability that a sequence needs it.",
    )
    outlook: bool = Field(
        False,
        description="Also tell how probable a use of each expert is within the next tokens: what to keep. "
        "Refused where the version has no outlook.",
    )


PREDICT_REQUEST: TypeAdapter[PredictRequest] = TypeAdapter(PredictRequest)


class LayerPrediction(BaseModel):
    """The experts that one sequence's layer will probably be routed to, best first."""

    layer: int
    distance: int = Field(description="Layers ahead of the last one seen; at token start, layer + 1.")
    experts: list[int]
    probabilities: list[Probability]
    expected_recall: Probability = Field(description="Expected share of the routed experts among these.")


class UnionPrediction(BaseModel):
    """The experts that a layer will probably need for the whole batch, best first."""

    layer: int
    experts: list[int]
    probabilities: list[Probability] = Field(
        description="Probability that at least one of the sequences needs the expert."
    )


class Outlook(BaseModel):
    """What a cache should keep, asked for with `outlook`."""

    tokens: int = Field(description="How far it looks: the token in progress and those after it.")
    uses: list[list[list[Probability]]] = Field(
        description="uses[i][l][e]: probability that sequence i uses expert e of layer l within so many "
        "tokens; with `combine: union` one table, of a use by any sequence. By the context alone: what is "
        "known of the token in progress counts for `predictions`."
    )


class PredictResponse(BaseModel):
    """`predictions[i]` belongs to `sequences[i]`; with `combine: union` there is one list, in `union`."""

    model: str
    version: int = Field(description="The version that answered.")
    predictions: list[list[LayerPrediction]] | None
    union: list[UnionPrediction] | None
    outlook: Outlook | None = Field(None, description="There where it was asked for.")


class SpecSummary(BaseModel):
    """What the model's routing looks like."""

    num_layers: int
    num_experts: int
    top_k: int


class LoadedVersion(BaseModel):
    """A version in memory that passed its golden check."""

    version: int
    provider: str = Field(description="The ONNX Runtime execution provider really used.")
    provider_reason: str
    load_seconds: float = Field(description="Reading, verifying, warming up and checking it.")


class ModelSummary(BaseModel):
    """A model that this service serves."""

    model: str
    ready: bool
    version: int | None = Field(description="The version that answers where a request names none.")
    selector: int | str | None = Field(
        description="What the settings ask for; null: production, else newest."
    )
    reason: str | None = Field(description="Why it is not ready, or why a newer choice was refused.")
    spec: SpecSummary | None
    versions: list[int]
    aliases: dict[str, int]
    loaded: list[LoadedVersion]


class ModelList(BaseModel):
    """Answer of /v1/models."""

    models: list[ModelSummary]


class LineageSummary(BaseModel):
    """Where a version comes from, in short.

    refit: whether it learnt from the validation traces, too; they are in `train_tokens` then.
    """

    traces: list[str]
    train_tokens: int
    refit: bool
    code_revision: str
    trained_seconds: float
    hardware: str


class VersionSummary(BaseModel):
    """A version in the store. Where its manifest cannot be read, all but the first three fields are null."""

    version: int
    broken: str | None = Field(description="Why it cannot be served; null where nothing is known against it.")
    loaded: bool
    created: datetime | None = None
    predictor: str | None = None
    parameters: int | None = None
    bytes: int | None = Field(default=None, description="Both graphs together.")
    uses_token_ids: bool | None = None
    uses_gates: bool | None = None
    coverage_levels: list[float] | None = None
    metrics: dict[str, dict[str, dict[str, float]]] | None = Field(
        default=None, description="metrics[split][distance][name]"
    )
    lineage: LineageSummary | None = None


class VersionList(BaseModel):
    """Answer of /v1/models/{model}/versions, newest first."""

    model: str
    aliases: dict[str, int]
    versions: list[VersionSummary]


class LiveDistance(BaseModel):
    """How forecasts of layers so far ahead turned out, over `layers` targets. See docs/evaluation.md."""

    layers: int
    recall_at_k: Probability
    recall_at_2k: Probability
    hit_at_1: Probability
    ece: Probability = Field(description="15 bins of equal width over the first 2 * top_k ranked experts.")
    coverage: dict[str, Probability] = Field(
        description="By level: how often the set made for it held all routed experts."
    )


class LiveVersion(BaseModel):
    """What streams saw of a version since the service was started. `distances`: "start", "1", "2", ..."""

    version: int
    tokens: int = Field(description="Tokens whose forecasts were scored, by SPECMOE_STREAM_SCORE_SHARE.")
    forecasts: int
    distances: dict[str, LiveDistance]
    validation: dict[str, dict[str, float]] = Field(
        description="The same scores on the validation split, from the manifest: what to compare with."
    )


class LiveReport(BaseModel):
    """Answer of /v1/models/{model}/live, newest version first. Empty where no stream used the model."""

    model: str
    versions: list[LiveVersion]


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    code: str = Field(description="Stable, for programs.")
    message: str = Field(description="What came and what was expected.")
    remedy: str = Field(description="What to do.")
    request_id: str


class NotReadyBody(ErrorBody):
    """Answer of /readyz while a model is missing."""

    reasons: dict[str, str] = Field(description="By model.")
