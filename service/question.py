"""A request that fits its version, and the answers to several of them at once.

PredictRequest -> Question -> `service.together` -> `answered` -> JSON

.venv/bin/python -m pytest tests/service/test_predict.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float32, Int64

from service.answers import check_amount, list_sizes, outlook, per_sequence, union
from service.batch import Batch, joined, misfit, to_batch, wanted_layers
from service.loading import Running
from service.schemas import PredictRequest
from speculation.errors import InputInvalid
from traces.errors import SpecMoEError


class Question:
    """A request as arrays. Raises RequestInvalid or CoverageUnknown where it does not fit the version.

    of_all: whether its sequences are answered together.
    uses: the outlook, once it is known, where it was asked for.
    """

    uses: Float32[np.ndarray, "B L E"] | None = None

    def __init__(self, request: PredictRequest, running: Running) -> None:
        spec = running.speculator.spec
        self.running = running
        self.batch: Batch = to_batch(request, spec)
        self.of_all = request.combine == "union"
        self._request = request
        self._wanted = wanted_layers(request, spec, self.batch)
        check_amount(request, running)

    def sizes(self, probabilities: Float32[np.ndarray, "B L E"]) -> Int64[np.ndarray, "B L"]:
        """How many experts each sequence's layer gets."""
        return list_sizes(self._request, self.running, self._wanted, self.batch.seen, probabilities)

    def together(self, probabilities: Float32[np.ndarray, "B L E"]) -> bytes:
        """What all its sequences need, as JSON."""
        sizes = self.sizes(probabilities)
        demand = union(probabilities, sizes, self._request, self.running.speculator.spec)
        return self.body(None, demand)

    def body(self, predictions: list[Any] | None, demand: list[Any] | None) -> bytes:
        """The answer as JSON."""
        running = self.running
        return orjson.dumps(
            {
                "model": running.model,
                "version": running.version,
                "predictions": predictions,
                "union": demand,
                **({} if self.uses is None else {"outlook": outlook(self.uses, self._request, running)}),
            }
        )

    def misfit(self, error: InputInvalid) -> SpecMoEError:
        """What the model's refusal means in the request's words."""
        return misfit(self.batch, self._request, self.running.speculator.spec) or error


def answered(questions: Sequence[Question], probabilities: Float32[np.ndarray, "B L E"]) -> list[bytes]:
    """The answer to each question about one version, in their order. Ranking all at once takes half the time.

    probabilities: of all their sequences, one question after another.
    """
    ends = np.cumsum([len(question.batch.current) for question in questions]).tolist()
    places = [slice(end - len(q.batch.current), end) for q, end in zip(questions, ends, strict=True)]
    one_by_one = [q for q in questions if not q.of_all]
    listed: list[list[dict[str, Any]]] = []
    if one_by_one:
        of_them = [probabilities[place] for q, place in zip(questions, places, strict=True) if not q.of_all]
        sizes = [question.sizes(of_it) for question, of_it in zip(one_by_one, of_them, strict=True)]
        listed = per_sequence(
            of_them[0] if len(of_them) == 1 else np.concatenate(of_them),
            np.concatenate(sizes),
            joined([question.batch for question in one_by_one]),
            questions[0].running.speculator.spec,
        )
    lists = iter(listed)
    return [
        question.together(probabilities[place])
        if question.of_all
        else question.body([next(lists) for _ in question.batch.current], None)
        for question, place in zip(questions, places, strict=True)
    ]
