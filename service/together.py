"""Small requests that arrive at one moment are forecast in one model call, which costs much less for each.

Predictions -> Together.predict -> one call for all of a version -> each its own rows

    specmoe bench --only rest
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
from jaxtyping import Float32

from service.batch import Batch
from service.loading import Running
from service.prediction import predict
from speculation.errors import InputInvalid

Answer = asyncio.Future[Float32[np.ndarray, "B L E"]]


class Together:
    """Gathers what comes in one round of the event loop; works it off at the round's end."""

    def __init__(self) -> None:
        self._waiting: dict[Running, list[tuple[Batch, Answer]]] = {}

    async def predict(self, running: Running, batch: Batch) -> Float32[np.ndarray, "B L E"]:
        """Probabilities for a batch without context. Raises InputInvalid where the batch itself is wrong."""
        loop = asyncio.get_running_loop()
        answer: Answer = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._work_off)
        self._waiting.setdefault(running, []).append((batch, answer))
        return await answer

    def _work_off(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for running, asked in waiting.items():
            try:
                self._answer(running, asked)
            except InputInvalid:  # one of them is wrong: the others must not suffer from it
                for one in asked:
                    self._answer_alone(running, one)
            except Exception as error:  # whatever it is, they wait for an answer
                for _, answer in asked:
                    _fail(answer, error)

    def _answer_alone(self, running: Running, one: tuple[Batch, Answer]) -> None:
        try:
            self._answer(running, [one])
        except Exception as error:
            _fail(one[1], error)

    def _answer(self, running: Running, asked: list[tuple[Batch, Answer]]) -> None:
        began = time.perf_counter()
        probabilities = predict(running.speculator, joined([batch for batch, _ in asked]))
        running.metrics.model_seconds.observe(time.perf_counter() - began)
        first = 0
        for batch, answer in asked:
            last = first + len(batch.current)
            if not answer.done():  # its client may have gone
                answer.set_result(probabilities[first:last])
            first = last


def joined(batches: list[Batch]) -> Batch:
    """Batches without context as one, in their order."""
    if len(batches) == 1:
        return batches[0]
    experts = np.concatenate([batch.experts for batch in batches])
    gates = None
    if any(batch.gates is not None for batch in batches):
        gates = np.concatenate(
            [np.ones(b.experts.shape, np.float32) if b.gates is None else b.gates for b in batches]
        )
    return Batch(
        token_ids=np.concatenate([batch.token_ids for batch in batches]),
        experts=experts,
        gates=gates,
        current=np.arange(len(experts)),
        context_tokens=np.zeros(len(experts), np.int64),
        seen=np.concatenate([batch.seen for batch in batches]),
    )


def _fail(answer: Answer, error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
