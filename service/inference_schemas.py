"""What travels over /v2: the Open Inference Protocol's requests as pydantic checks them, and its answers.

JSON bytes -> `INFER_REQUEST.validate_json` -> `service.inference` turns data into arrays

Fields that are not read are let pass, unlike in /v1: clients of the protocol send what their servers know.

    curl localhost:8080/openapi.json
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, TypeAdapter
from pydantic_core import PydanticCustomError

from service.schemas import ErrorBody

MAX_INT64 = 2**63 - 1
# Parameters of extensions that /v2 does not list. To pass over them would be to answer another question.
UNSUPPORTED = frozenset({"sequence_id", "shared_memory_region", "classification"})


def _supported(parameters: Any) -> Any:
    asked = sorted(UNSUPPORTED & parameters.keys()) if isinstance(parameters, dict) else []
    if asked:
        raise PydanticCustomError(
            "unsupported_extension", "Input should be free of extensions that /v2 does not list: {asked}",
            {"asked": ", ".join(asked)},
        )  # fmt: skip
    return parameters


class Part(BaseModel):
    """Takes JSON types as they are (no "3" for 3)."""

    model_config = ConfigDict(extra="ignore", strict=True)


class InputParameters(Part):
    """Parameters of an input."""

    binary_data_size: Annotated[int, Field(ge=0, le=MAX_INT64)] | None = Field(
        None, description="The tensor's bytes, where they follow the JSON instead of standing in `data`."
    )


class OutputParameters(Part):
    """Parameters of a requested output."""

    binary_data: bool | None = Field(
        None, description="Whether the tensor's bytes follow the JSON. null: as `binary_data_output` says."
    )


class RequestParameters(Part):
    """Parameters of a request."""

    binary_data_output: bool | None = Field(
        None, description="Whether the bytes of all outputs follow the JSON that does not say otherwise."
    )


class InferInput(Part):
    """A tensor of the whole batch, in row-major order."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT64)]], FailFast()]
    datatype: str = Field(description="As the model's metadata says: INT64, INT32, UINT8, FP16 or FP32.")
    parameters: Annotated[InputParameters, BeforeValidator(_supported)] | None = None
    data: list[Any] | None = Field(None, description="Numbers, flat or nested as the shape says.")


class InferOutput(Part):
    """An output that is asked for."""

    name: Literal["probabilities"]
    parameters: Annotated[OutputParameters, BeforeValidator(_supported)] | None = None


class InferRequest(Part):
    """One call of a version's predict graph."""

    id: str | None = Field(None, description="Returned as it came.")
    parameters: Annotated[RequestParameters, BeforeValidator(_supported)] | None = None
    # Failing fast, a body that is one long list of nonsense is not complained about element by element.
    inputs: Annotated[list[InferInput], FailFast()]
    outputs: Annotated[list[InferOutput], Field(max_length=1)] | None = Field(
        None, description="Left out or empty: all there are."
    )


INFER_REQUEST: TypeAdapter[InferRequest] = TypeAdapter(InferRequest)


class AnsweredParameters(BaseModel):
    """Parameters of an answered output."""

    binary_data_size: int = Field(description="Bytes of the tensor behind the JSON.")


class AnsweredOutput(BaseModel):
    """A tensor that is answered: in `data`, else behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float] | None = Field(None, description="Flat, in row-major order.")
    parameters: AnsweredParameters | None = None


class InferResponse(BaseModel):
    """Answer of infer."""

    model_name: str
    model_version: str = Field(description="The version that answered.")
    id: str | None = Field(None, description="The request's, if it had one.")
    outputs: list[AnsweredOutput]


class ServerMetadata(BaseModel):
    """Answer of /v2."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Answer of /v2/health/live."""

    live: bool


class ServerReady(BaseModel):
    """Answer of /v2/health/ready."""

    ready: bool


class ModelReady(BaseModel):
    """Answer of a model's ready."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """A tensor that predict takes or gives."""

    name: str
    datatype: str
    shape: list[int] = Field(description="-1: the sequences of the batch.")


class ModelMetadata(BaseModel):
    """Answer of a model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferenceErrorBody(ErrorBody):
    """Every answer below /v2 that is not 2xx."""

    error: str = Field(description="Message and remedy: where clients of the protocol look.")
