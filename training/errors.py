"""The errors this room raises on purpose.

    SpecMoEError
    └── TrainingError
        ├── ConfigInvalid        a knob of a training run is out of its range
        ├── RunInvalid           a run's folder does not hold what it must
        ├── HiddenMissing        traces lack the hidden states, or the routers, that a predictor reads
        ├── ComparisonInvalid    a comparison's folder holds another one, or its splits are not apart
        ├── ExportFailed         the exported graphs do not answer as the trained predictor does
        ├── CollectionError      routing cannot be recorded from a model
        │   ├── ModelNotLoaded      there is no such model, or it does not load
        │   ├── RouterUnknown       no router was found, or one that cannot be read
        │   └── TextInvalid         a text or prompt cannot be read
        ├── SpecMismatch         a trace is of another routing shape than the model, or than the other traces
        └── EvaluationError      nothing can be scored
            ├── BaselineNotFitted   a baseline was asked before it saw training routing
            └── ForecastInvalid     a forecast is not a finite number from 0 for every expert of every layer

A message says what came and what was expected; the remedy says what to do.
"""

from __future__ import annotations

from traces.errors import SpecMoEError
from traces.spec import RoutingSpec


class TrainingError(SpecMoEError):
    """Training, evaluating or exporting a predictor cannot go on."""


class ConfigInvalid(TrainingError):
    """A knob of a training run is out of its range."""


class RunInvalid(TrainingError):
    """A training run's folder does not hold what it must."""


class HiddenMissing(TrainingError):
    """Traces lack the hidden states, or the routers, that a predictor reads."""


class ComparisonInvalid(TrainingError):
    """A comparison's folder holds another comparison, or its splits are not apart."""


class ExportFailed(TrainingError):
    """The exported graphs do not answer as the trained predictor does."""


class CollectionError(TrainingError):
    """Routing cannot be recorded from a model."""


class ModelNotLoaded(CollectionError):
    """There is no such model, or it does not load."""


class RouterUnknown(CollectionError):
    """No router was found, or one that cannot be read."""


class TextInvalid(CollectionError):
    """A text or a prompt cannot be read."""


class SpecMismatch(TrainingError):
    """A trace is of another routing shape than what it is used with."""


class EvaluationError(TrainingError):
    """Nothing can be scored."""


class BaselineNotFitted(EvaluationError):
    """A baseline was asked for scores before it saw any training routing."""


class ForecastInvalid(EvaluationError):
    """A forecast is not a finite number from 0 for every expert of every layer."""


def check_same_shape(trace: RoutingSpec, expected: RoutingSpec, owner: str) -> None:
    """Refuse a trace whose layers, experts or top-k differ from `expected`, which belongs to `owner`.

    Names may differ: the same model is known under many.

    Raises SpecMismatch naming the field.
    """
    for field in ("num_layers", "num_experts", "top_k"):
        came, wanted = getattr(trace, field), getattr(expected, field)
        if came != wanted:
            raise SpecMismatch(
                f"The trace of {trace.model} has {field} {came}, expected {wanted} as in {owner}.",
                remedy="Use traces recorded from the model it was made for.",
            )
