"""The whole way of one prediction: body bytes -> request -> batch -> probabilities -> answer bytes.

Small work is done where it arrives, on the event loop; large work on a thread, so that small need not wait.

    curl localhost:8080/v1/predict -H 'Content-Type: application/json' \\
        -d '{"model": "gpt-oss-20b", "sequences": [{"token_id": 976}]}'
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from service.batch import check_size
from service.explain import explained
from service.loading import Running
from service.middleware import Exchange
from service.prediction import predict, predict_with_outlook
from service.question import Question, answered
from service.schemas import PREDICT_REQUEST, PredictRequest
from service.serving import Serving
from service.settings import Settings
from service.together import Together
from speculation.errors import InputInvalid

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
                return await self._together.answer(question)
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


def compute(request: PredictRequest, running: Running) -> bytes:
    """The answer of a version, worked out at once. Raises RequestInvalid, CoverageUnknown, OutlookUnknown."""
    question = Question(request, running)
    began = time.perf_counter()
    try:
        if request.outlook:
            probabilities, question.uses = predict_with_outlook(running.speculator, question.batch)
        else:
            probabilities = predict(running.speculator, question.batch)
    except InputInvalid as error:
        raise question.misfit(error) from None
    running.metrics.model_seconds.observe(time.perf_counter() - began)
    return answered([question], probabilities)[0]
