"""Small requests that arrive at one moment are forecast in one model call, and their answers ranked together,
which costs much less for each.

Predictions -> Together.answer -> one call for all of a version -> each its own answer

    specmoe bench --only rest
"""

from __future__ import annotations

import asyncio
import time

from service.batch import joined
from service.loading import Running
from service.prediction import predict
from service.question import Question, answered
from speculation.errors import InputInvalid

Answer = asyncio.Future[bytes]


class Together:
    """Gathers what comes in one round of the event loop; works it off at the round's end."""

    def __init__(self) -> None:
        self._waiting: dict[Running, list[tuple[Question, Answer]]] = {}

    async def answer(self, question: Question) -> bytes:
        """The answer to a question without context. Raises InputInvalid where the question is wrong."""
        loop = asyncio.get_running_loop()
        answer: Answer = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._work_off)
        self._waiting.setdefault(question.running, []).append((question, answer))
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

    def _answer_alone(self, running: Running, one: tuple[Question, Answer]) -> None:
        try:
            self._answer(running, [one])
        except Exception as error:
            _fail(one[1], error)

    def _answer(self, running: Running, asked: list[tuple[Question, Answer]]) -> None:
        questions = [question for question, _ in asked]
        began = time.perf_counter()
        probabilities = predict(running.speculator, joined([question.batch for question in questions]))
        running.metrics.model_seconds.observe(time.perf_counter() - began)
        for (_, answer), body in zip(asked, answered(questions, probabilities), strict=True):
            if not answer.done():  # its client may have gone
                answer.set_result(body)


def _fail(answer: Answer, error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
