"""The whole way of one prediction: body bytes -> request -> batch -> probabilities -> answer bytes.

Small work is done where it arrives, on the event loop; large work on a thread, so that small need not wait.

    curl localhost:8080/v1/predict -H 'Content-Type: application/json' \\
        -d '{"model": "gpt-oss-20b", "sequences": [{"token_id": 976}]}'
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson
from jaxtyping import Float32
from pydantic import ValidationError

from service.answers import list_sizes, outlook, per_sequence, union
from service.batch import Batch, check_size, misfit, to_batch, wanted_layers
from service.explain import explained
from service.loading import Running
from service.middleware import Exchange
from service.prediction import predict, predict_with_outlook
from service.schemas import PREDICT_REQUEST, PredictRequest
from service.serving import Serving
from service.settings import Settings
from service.together import Together
from speculation.errors import InputInvalid
from traces.errors import SpecMoEError

# Work is counted in rows: a sequence or a context token. On two busy cores the first row took 300 µs, each
# further one 100, a hop to a thread and back 75 to 120. So up to four rows, under 1 ms, are done at once: the
# hop would add a tenth or more, and whoever waits behind them waits for less than a prediction may take.
INLINE_ROWS = 4
# Parsing takes about 20 ns a byte, so that a body up to this size is parsed in a third of a millisecond.
INLINE_BODY_BYTES = 16 << 10


class Predictions:
    """Answers requests for predictions. Belongs to one event loop. workers: for what would hold it up."""

    def __init__(self, serving: Serving, settings: Settings) -> None:
        self._serving = serving
        self._settings = settings
        self._together = Together()
        self.workers = ThreadPoolExecutor(settings.worker_threads, "predict")

    async def answer(self, body: bytes, exchange: Exchange) -> bytes:
        """The answer to a request's body, as JSON. Raises what `service.problems` maps."""
        loop = asyncio.get_running_loop()
        if len(body) <= INLINE_BODY_BYTES:
            request = parse(body)
        else:
            request = await loop.run_in_executor(self.workers, parse, body)
        rows = check_size(
            request,
            max_sequences=self._settings.max_sequences,
            max_context_tokens=self._settings.max_context_tokens,
        )
        running = await self._serving.get(request.model, request.version)
        exchange.running = running
        if rows == len(request.sequences) <= INLINE_ROWS and not request.outlook:
            question = Question(request, running)
            try:
                return question.answer(await self._together.predict(running, question.batch))
            except InputInvalid as error:
                raise question.misfit(error) from None
        if rows <= INLINE_ROWS:
            return compute(request, running)
        return await loop.run_in_executor(self.workers, compute, request, running)

    def close(self) -> None:
        """Wait for the work that is under way."""
        self.workers.shutdown()


def parse(body: bytes) -> PredictRequest:
    """The request, its fields checked one by one. Raises RequestInvalid."""
    try:
        return PREDICT_REQUEST.validate_json(body)
    except ValidationError as error:
        raise explained(error.errors(include_url=False)) from None


class Question:
    """A request as arrays. Raises RequestInvalid or CoverageUnknown where it does not fit the version."""

    def __init__(self, request: PredictRequest, running: Running) -> None:
        spec = running.speculator.spec
        self.batch: Batch = to_batch(request, spec)
        self._request, self._running = request, running
        self._sizes = list_sizes(request, running, self.batch, wanted_layers(request, spec, self.batch))

    def answer(
        self,
        probabilities: Float32[np.ndarray, "B L E"],
        uses: Float32[np.ndarray, "B L E"] | None = None,
    ) -> bytes:
        """What the model says, as JSON. uses: its outlook, where that was asked for."""
        running, request, spec = self._running, self._request, self._running.speculator.spec
        together = request.combine == "union"
        return orjson.dumps(
            {
                "model": running.model,
                "version": running.version,
                "predictions": None
                if together
                else per_sequence(probabilities, self._sizes, self.batch, spec),
                "union": union(probabilities, self._sizes, request, spec) if together else None,
                **({} if uses is None else {"outlook": outlook(uses, request, running)}),
            }
        )

    def misfit(self, error: InputInvalid) -> SpecMoEError:
        """What the model's refusal means in the request's words."""
        return misfit(self.batch, self._request, self._running.speculator.spec) or error


def compute(request: PredictRequest, running: Running) -> bytes:
    """The answer of a version, worked out at once. Raises RequestInvalid, CoverageUnknown, OutlookUnknown."""
    question = Question(request, running)
    began = time.perf_counter()
    try:
        if request.outlook:
            probabilities, uses = predict_with_outlook(running.speculator, question.batch)
        else:
            probabilities, uses = predict(running.speculator, question.batch), None
    except InputInvalid as error:
        raise question.misfit(error) from None
    running.metrics.model_seconds.observe(time.perf_counter() - began)
    return question.answer(probabilities, uses)
