"""The whole way of one inference: JSON and bytes -> arrays -> a version's predict graph -> JSON and bytes.

Small work is done where it arrives, on the event loop; large work on a thread (see `service.predictions`).

    curl localhost:8080/v2/models/gpt-oss-20b
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import orjson
from jaxtyping import Float32
from pydantic import ValidationError

from service.errors import BatchTooLarge, RequestInvalid
from service.explain import explained, shown
from service.inference_schemas import INFER_REQUEST, InferInput, InferRequest
from service.loading import Running
from service.middleware import Exchange
from service.predictions import INLINE_BODY_BYTES, INLINE_ROWS
from service.schemas import MAX_TOKEN_ID
from service.serving import Serving
from service.settings import Settings
from service.tensors import METADATA_REMEDY, Array, TensorSpec, cut, read
from speculation.errors import GraphFailed
from speculation.runtime import Speculator, State

FLOAT32 = np.dtype(np.float32)


class Signature(NamedTuple):
    """What predict takes and gives. routing: what every version's takes; state: what this version's does."""

    routing: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    output: TensorSpec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Everything it takes."""
        return self.routing + self.state


class Answer(NamedTuple):
    """The body of an answer. `json_bytes`: how much of it is JSON, None where all is."""

    body: bytes
    json_bytes: int | None


class Inference:
    """Answers requests for inference. Belongs to one event loop; workers: for what would hold it up."""

    def __init__(self, serving: Serving, settings: Settings, workers: Executor) -> None:
        self._serving = serving
        self._max_sequences = settings.max_sequences
        self._workers = workers

    async def answer(
        self, model: str, selector: int | str | None, body: bytes, json_bytes: int | None, exchange: Exchange
    ) -> Answer:
        """The answer to a request's body, of which the first `json_bytes` are JSON (None: all of it).

        Raises what `service.problems` maps.
        """
        loop = asyncio.get_running_loop()
        text, behind = _split(body, json_bytes)
        small = len(text) <= INLINE_BODY_BYTES
        request = parse(text) if small else await loop.run_in_executor(self._workers, parse, text)
        batch = batch_size(request.inputs, self._max_sequences)
        running = await self._serving.get(model, selector)
        exchange.running = running
        if small and batch <= INLINE_ROWS:
            return compute(request, behind, batch, running)
        return await loop.run_in_executor(self._workers, compute, request, behind, batch, running)


def signature(speculator: Speculator) -> Signature:
    """What a version's predict takes and gives, as the contract has it."""
    spec, hidden_size = speculator.spec, speculator.manifest.hidden_size
    slots = (spec.num_layers, spec.top_k)
    return Signature(
        routing=(
            TensorSpec("token_id", np.dtype(np.int64), ()),
            TensorSpec("experts", np.dtype(np.int32), slots),
            TensorSpec("gates", FLOAT32, slots),
            *((TensorSpec("hidden", FLOAT32, (hidden_size,)),) if hidden_size else ()),
        ),
        state=tuple(TensorSpec(t.name, np.dtype(t.dtype), t.shape) for t in speculator.manifest.state),
        output=TensorSpec("probabilities", FLOAT32, (spec.num_layers, spec.num_experts)),
    )


def parse(text: bytes) -> InferRequest:
    """The request's JSON, its fields checked one by one. Raises RequestInvalid."""
    try:
        return INFER_REQUEST.validate_json(text)
    except ValidationError as error:
        raise explained(error.errors(include_url=False)) from None


def batch_size(inputs: Sequence[InferInput], max_sequences: int) -> int:
    """How many sequences `experts` says it has. Raises RequestInvalid, BatchTooLarge."""
    shape = next((given.shape for given in inputs if given.name == "experts"), None)
    if shape is None:
        raise RequestInvalid(
            "inputs has no experts.",
            remedy="Send them, -1 in every slot of a layer that was not seen yet; all else may be left out.",
        )
    if not shape or not shape[0]:
        raise RequestInvalid(
            f"experts has the shape {shape}, expected [batch, layers, top_k] with a sequence or more.",
            remedy=METADATA_REMEDY,
        )
    if shape[0] > max_sequences:
        raise BatchTooLarge(
            f"experts has {shape[0]} sequences, at most {max_sequences} are allowed.",
            remedy="Split the batch, or raise SPECMOE_MAX_SEQUENCES.",
        )
    return shape[0]


def compute(request: InferRequest, behind: memoryview, batch: int, running: Running) -> Answer:
    """The answer of a version. Raises RequestInvalid or InputInvalid where the request does not fit it."""
    tensors = signature(running.speculator)
    arrays = _arrays(request.inputs, behind, tensors.inputs, batch)
    _check_token_ids(arrays.get("token_id"))
    probabilities = _predict(running, arrays, _state(arrays, tensors.state))
    return _written(request, running, tensors.output, probabilities)


def _split(body: bytes, json_bytes: int | None) -> tuple[bytes, memoryview]:
    """(the JSON, what follows it)."""
    if json_bytes is None:
        return body, memoryview(b"")
    if json_bytes > len(body):
        raise RequestInvalid(
            f"Inference-Header-Content-Length is {json_bytes}, but the body has {len(body)} bytes.",
            remedy="Say the length of the JSON, with which the body begins.",
        )
    return body[:json_bytes], memoryview(body)[json_bytes:]


def _arrays(
    given: Sequence[InferInput], behind: memoryview, inputs: Sequence[TensorSpec], batch: int
) -> dict[str, Array]:
    """The inputs by name. Raises RequestInvalid for one that is unknown or comes twice."""
    wanted = {spec.name: spec for spec in inputs}
    arrays: dict[str, Array] = {}
    for tensor, part in zip(given, cut(given, behind), strict=True):
        if tensor.name not in wanted or tensor.name in arrays:
            twice = tensor.name in arrays
            raise RequestInvalid(
                f"inputs has {shown(repr(tensor.name))}{' twice' if twice else ''}, "
                f"expected each of {', '.join(wanted)} at most once.",
                remedy="Leave it out.",
            )
        arrays[tensor.name] = read(tensor, part, wanted[tensor.name], batch)
    return arrays


def _check_token_ids(token_ids: Array | None) -> None:
    if token_ids is None:
        return
    wrong = (token_ids < -1) | (token_ids > MAX_TOKEN_ID)
    if wrong.any():
        row = int(wrong.argmax())
        raise RequestInvalid(
            f"token_id[{row}] is {token_ids[row]}, expected -1 to {MAX_TOKEN_ID}.",
            remedy="Use ids of the model's own tokenizer, -1 where one is unknown.",
        )


def _state(arrays: Mapping[str, Array], specs: Sequence[TensorSpec]) -> State | None:
    """The state that came, None where none did. Raises RequestInvalid where only some of it did."""
    missing = [spec.name for spec in specs if spec.name not in arrays]
    if len(missing) == len(specs):
        return None
    if missing:
        raise RequestInvalid(
            f"inputs has some of the state, but not {', '.join(missing)}.",
            remedy="Send every tensor that the version's advance returned, or none where sequences begin.",
        )
    return tuple(arrays[spec.name] for spec in specs)


def _predict(
    running: Running, arrays: Mapping[str, Array], state: State | None
) -> Float32[np.ndarray, "B L E"]:
    """Timed. state: None where the sequences begin.

    Raises InputInvalid, and RequestInvalid for a state that cannot be one: what it holds means something to
    the graph alone, so that only running it can tell.
    """
    token_ids, experts, gates = arrays.get("token_id"), arrays["experts"], arrays.get("gates")
    hidden = arrays.get("hidden")
    before = running.speculator.initial_state(len(experts)) if state is None else state
    began = time.perf_counter()
    try:
        probabilities = running.speculator.predict(before, token_ids, experts, gates, hidden)
    except GraphFailed:
        if state is None:
            raise
        raise _unusable("it cannot be read") from None
    running.metrics.model_seconds.observe(time.perf_counter() - began)
    if state is not None and not np.isfinite(probabilities).all():
        raise _unusable("it makes probabilities that are no numbers")
    return probabilities


def _unusable(reason: str) -> RequestInvalid:
    return RequestInvalid(
        f"The state is none that this version's advance returns: {reason}.",
        remedy="Send the tensors as advance returned them, or none where sequences begin.",
    )


def _written(
    request: InferRequest, running: Running, output: TensorSpec, probabilities: Float32[np.ndarray, "B L E"]
) -> Answer:
    written: dict[str, Any] = {
        "name": output.name,
        "datatype": output.datatype,
        "shape": probabilities.shape,
    }
    answer: dict[str, Any] = {
        "model_name": running.model,
        "model_version": str(running.version),
        "outputs": [written],
    }
    if request.id is not None:
        answer["id"] = request.id
    if not _wants_bytes(request):
        written["data"] = probabilities.ravel()
        return Answer(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), None)
    behind = probabilities.astype("<f4").tobytes()
    written["parameters"] = {"binary_data_size": len(behind)}
    text = orjson.dumps(answer)
    return Answer(text + behind, len(text))


def _wants_bytes(request: InferRequest) -> bool:
    """What the output's own parameter says, else the request's."""
    asked = request.outputs[0].parameters if request.outputs else None
    if asked is not None and asked.binary_data is not None:
        return asked.binary_data
    return bool(request.parameters and request.parameters.binary_data_output)
