"""What the service answers, as arrays: parsed and checked, or refused as AnswerInvalid.

Read by `client.py` and `async_client.py` from the JSON of /v1/predict and /v1/models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specmoe_client.errors import AnswerInvalid

NO_EXPERT = -1


@dataclass(frozen=True, eq=False)
class LayerRanking:
    """Experts by layer, best first. M layers, n experts in the longest row.

    layers: int32 `[M]`, target layers, ascending.
    experts: int32 `[M, n]`; a shorter row (`coverage`) ends in -1.
    probabilities: float32 `[M, n]`; 0 where experts is -1.
    """

    layers: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float32]

    def experts_of(self, layer: int) -> npt.NDArray[np.int32]:
        """The experts of one layer, best first, without filling; empty where the layer was not predicted."""
        row: npt.NDArray[np.int32] = self.experts[self.layers == layer].ravel()
        return np.compress(row != NO_EXPERT, row)


@dataclass(frozen=True, eq=False)
class SequencePrediction(LayerRanking):
    """What one sequence's coming layers will probably be routed to.

    probabilities: that the expert is among the routed top-k of its layer.
    distances: int32 `[M]`, layers ahead of the last one seen; at token start, layer + 1.
    expected_recall: float32 `[M]`, expected share of the routed experts among those of the row.
    """

    distances: npt.NDArray[np.int32]
    expected_recall: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """`sequences[i]` belongs to the i-th sequence asked about. `version`: the one that answered."""

    model: str
    version: int
    sequences: tuple[SequencePrediction, ...]


@dataclass(frozen=True)
class UnionPrediction:
    """One ranking for all sequences together. Probabilities: that at least one of them needs the expert."""

    model: str
    version: int
    union: LayerRanking


@dataclass(frozen=True)
class RoutingShape:
    """MoE layers, routed experts of a layer, and how many of them a token is routed to."""

    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class ModelInfo:
    """A model of the service. `version`: the one that answers by default; None while there is none.

    reason: why it is not ready, or why a newer version was refused. shape: None while no version was read.
    """

    model: str
    ready: bool
    version: int | None
    reason: str | None
    shape: RoutingShape | None
    versions: tuple[int, ...]
    aliases: dict[str, int]


def read_prediction(document: Any, asked: int) -> Prediction:
    """The answer to a question about `asked` sequences. Raises AnswerInvalid where it is anything else."""
    try:
        sequences = tuple(_sequence(rows) for rows in document["predictions"])
        if len(sequences) != asked:
            raise ValueError(f"{len(sequences)} predictions for {asked} sequences")
        return Prediction(_text(document["model"]), _number(document["version"]), sequences)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _bad("/v1/predict", error) from error


def read_union(document: Any) -> UnionPrediction:
    """The answer to a question for the union. Raises AnswerInvalid where it is anything else."""
    try:
        union = LayerRanking(**_ranking(document["union"]))
        return UnionPrediction(_text(document["model"]), _number(document["version"]), union)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _bad("/v1/predict", error) from error


def read_models(document: Any) -> tuple[ModelInfo, ...]:
    """The answer of /v1/models. Raises AnswerInvalid where it is anything else."""
    try:
        return tuple(_model(entry) for entry in document["models"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad("/v1/models", error) from error


def _bad(path: str, error: Exception) -> AnswerInvalid:
    return AnswerInvalid(
        f"The answer of {path} is not one of a specMoE service ({type(error).__name__}: {error}).",
        remedy="Check that base_url leads to specMoE itself and that its version fits this client's.",
    )


def _sequence(rows: list[dict[str, Any]]) -> SequencePrediction:
    return SequencePrediction(
        **_ranking(rows),
        distances=_integers([row["distance"] for row in rows], len(rows)),
        expected_recall=_shares([row["expected_recall"] for row in rows], len(rows)),
    )


def _ranking(rows: list[dict[str, Any]]) -> dict[str, Any]:
    experts = [row["experts"] for row in rows]
    probabilities = [row["probabilities"] for row in rows]
    lengths = [len(row) for row in experts]
    if lengths != [len(row) for row in probabilities]:
        raise ValueError("a layer has more experts than probabilities, or fewer")
    if not all(lengths):
        raise ValueError("a layer has no experts")
    longest = max(lengths, default=0)
    return {
        "layers": _integers([row["layer"] for row in rows], len(rows)),
        "experts": _integers(_filled(experts, longest, NO_EXPERT), len(rows), longest),
        "probabilities": _shares(_filled(probabilities, longest, 0.0), len(rows), longest),
    }


def _filled(rows: list[list[Any]], width: int, filling: float) -> list[list[Any]]:
    return [row if len(row) == width else row + [filling] * (width - len(row)) for row in rows]


def _integers(values: list[Any], *shape: int) -> npt.NDArray[np.int32]:
    array = _array(values, shape)
    if array.size and (array.dtype.kind != "i" or array.min() < NO_EXPERT or array.max() > 2**31 - 1):
        raise ValueError("a layer, distance or expert is not a whole number from 0 up")
    return array.astype(np.int32)


def _shares(values: list[Any], *shape: int) -> npt.NDArray[np.float32]:
    array = _array(values, shape)
    if array.size and (array.dtype.kind not in "if" or not ((array >= 0) & (array <= 1)).all()):
        raise ValueError("a probability is not a number from 0 to 1")
    return array.astype(np.float32)


def _array(values: list[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if not values:
        return np.zeros(shape)
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"a list is of shape {array.shape}, expected {shape}")
    return array


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, got {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _model(entry: dict[str, Any]) -> ModelInfo:
    shape = entry["spec"]
    return ModelInfo(
        model=_text(entry["model"]),
        ready=entry["ready"] is True,
        version=None if entry["version"] is None else _number(entry["version"]),
        reason=None if entry["reason"] is None else _text(entry["reason"]),
        shape=None if shape is None else RoutingShape(*(_number(shape[name]) for name in _SHAPE)),
        versions=tuple(_number(version) for version in entry["versions"]),
        aliases={_text(alias): _number(version) for alias, version in entry["aliases"].items()},
    )


_SHAPE = ("num_layers", "num_experts", "top_k")
