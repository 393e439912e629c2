"""A model of transformers tells a stream its routing while it decodes, and hears which experts come next.

stream = Stream(model="olmoe", union=True, per_sequence=False)
with stream, attach(model, stream, on_forecast=prefetch):
    model.generate(**inputs)

forward hooks of the model -> batch.py -> Stream; Stream.latest_union -> on_forecast
"""

from __future__ import annotations

import collections.abc
import contextlib
import inspect
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from specmoe_client.integrations.batch import Batch, Decoding, Reading
from specmoe_client.integrations.routers import find_routers, routing_of, shape_of
from specmoe_client.predictions import RoutingShape
from specmoe_client.questions import UNKNOWN_TOKEN
from specmoe_client.stream import Stream
from specmoe_client.streaming.forecasts import UnionForecast
from specmoe_client.streaming.routing import wrong

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger("specmoe_client")

OnForecast = collections.abc.Callable[[int, UnionForecast | None], object]


def attach(model: PreTrainedModel, stream: Stream, on_forecast: OnForecast | None = None) -> Hook:
    """Follow a model with a stream until the hook is closed. The model computes what it computes without.

    model: a decoder with experts, in eval mode. It is run once, on five tokens, to find its routers.
    stream: one with `union=True`, used for nothing else meanwhile. A service that cannot be reached is no
        error: it is waited for once, 5 s at most, and forecasts are None until it can be.
    on_forecast: called with a layer, counted among those with experts, just before this layer's block runs,
        and with the newest forecast of the tokens in progress, or None. In the thread that runs the model.

    Raises RequestInvalid where model and stream do not go together, RequestRefused where the service
    refuses the stream.
    """
    if not stream.options.union:
        raise wrong(
            "The stream was opened without union forecasts, and one forecast is for all rows of a batch.",
            "Open it with union=True.",
        )
    hook = Hook(model, stream, on_forecast)
    stream.ready()
    hook._check_shape()
    hook._listen()
    return hook


class Hook:
    """What `attach` gives: a model that is followed. To be closed, or used as a context.

    shape: of the model. last_error: the newest thing that went wrong within a pass of the model, which goes
    on all the same; each kind is logged once.
    """

    def __init__(self, model: PreTrainedModel, stream: Stream, on_forecast: OnForecast | None) -> None:
        self.last_error: Exception | None = None
        self._model, self._stream, self._on_forecast = model, stream, on_forecast
        self._routers = find_routers(model)
        self.shape = shape_of(self._routers)
        self._body = model.base_model
        self._arguments = list(inspect.signature(self._body.forward).parameters)
        self._ends, self._padding = _ends_of(model)
        self._batch: Batch | None = None
        self._pass: Decoding | Reading | None = None
        self._layer = 0
        self._logged: set[type[Exception]] = set()
        self._handles: list[Any] = []

    @property
    def sequences(self) -> list[int | None]:
        """The stream's handle of each row of the batch; None where a row is not told, or has ended."""
        return [] if self._batch is None else list(self._batch.handles)

    def reset(self) -> None:
        """Forget the sequences that were told so far: the next pass begins new ones.

        A pass with an empty cache does so by itself; until it comes, the service keeps the last batch.
        """
        batch, self._batch, self._pass = self._batch, None, None
        if batch is not None:
            with contextlib.suppress(Exception):  # the stream may be closed, or know them no longer
                batch.close()

    def close(self) -> None:
        """Follow no longer. The stream stays open."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_shape(self) -> None:
        """Raises RequestInvalid where the stream's version is of a model of another shape."""
        status = self._stream.status
        if status.spec is not None and status.spec != self.shape:
            raise wrong(
                f"{type(self._model).__name__} has {_told(self.shape)}; version {status.version} of"
                f" {self._stream.options.model} is for {_told(status.spec)}.",
                "Open the stream with the name under which this model's version is served.",
            )

    def _listen(self) -> None:
        """Begin to follow."""
        self._handles = [self._body.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer, router in enumerate(self._routers):
            self._handles += [
                router.block.register_forward_pre_hook(lambda *_, layer=layer: self._foretell(layer)),
                router.module.register_forward_hook(
                    lambda _, __, answer, layer=layer: self._route(layer, answer)
                ),
            ]

    # The hooks. Each gives None, which leaves the model's own values as they are.

    def _begin(self, _: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """The model is about to run."""
        self._pass, self._layer = None, 0
        with self._quietly("What the model is given cannot be told"):
            given = dict(zip(self._arguments, arguments, strict=False)) | keywords
            token_ids = _token_ids(given)
            real = _real(given.get("attention_mask"), token_ids)
            if self._batch is None or len(self._batch.handles) != len(token_ids) or _is_first(given):
                self.reset()
                self._check_shape()
                self._batch = Batch(self._stream, len(token_ids), self._ends, self._padding)
            if token_ids.shape[1] == 1:
                self._pass = Decoding(self._stream, self._batch, token_ids, real)
            else:
                newest = self._stream.history
                self._pass = Reading(self._batch, token_ids, real, len(self._routers), newest)

    def _foretell(self, layer: int) -> None:
        """A block is about to run."""
        if self._on_forecast is None:
            return
        forecast = None
        with self._quietly("Forecasts cannot be had"):
            forecast = self._stream.latest_union() if isinstance(self._pass, Decoding) else None
        try:
            self._on_forecast(layer, forecast)
        except Exception as error:
            self._note("on_forecast failed", error)

    def _route(self, layer: int, answer: Any) -> None:
        """A router has run."""
        if self._pass is None:
            return
        with self._quietly("The model's routing cannot be told"):
            if layer != self._layer:
                raise wrong(
                    f"Layer {layer} was routed where layer {self._layer} was due.",
                    "Such a model cannot be followed: its routers do not run once a pass, in order.",
                )
            self._layer += 1
            self._pass.tell(*routing_of(answer), _fetched)

    @contextlib.contextmanager
    def _quietly(self, what: str) -> collections.abc.Iterator[None]:
        """The model goes on whatever happens here; what was told of the batch is given up."""
        try:
            yield
        except Exception as error:
            self._note(what, error)
            self.reset()

    def _note(self, what: str, error: Exception) -> None:
        self.last_error = error.with_traceback(None)  # which would keep tensors alive
        if type(error) not in self._logged:
            self._logged.add(type(error))
            logger.error("%s (%s: %s). Not logged again.", what, type(error).__name__, error)


def _ends_of(model: PreTrainedModel) -> tuple[set[int], int]:
    """(ids that end a text, the id that rows which have ended are fed), as `generate` takes them."""
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = [] if ends is None else np.atleast_1d(ends).tolist()
    padding = getattr(config, "pad_token_id", None)
    return set(ends), (ends[0] if ends else UNKNOWN_TOKEN) if padding is None else padding


def _token_ids(given: dict[str, Any]) -> npt.NDArray[np.int64]:
    """`[B, T]`; -1 where the model is given embeddings only."""
    token_ids = given.get("input_ids")
    if token_ids is None:
        return np.full(given["inputs_embeds"].shape[:2], UNKNOWN_TOKEN, np.int64)
    fetched: npt.NDArray[np.int64] = token_ids.detach().cpu().numpy()
    return fetched


def _real(mask: Any, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """`[B, T]`: what is no padding. A mask of another form is of attention only, and says nothing of it."""
    if getattr(mask, "ndim", 0) != 2:
        return np.ones(token_ids.shape, bool)
    real: npt.NDArray[np.bool_] = mask[:, -token_ids.shape[1] :].detach().cpu().numpy() != 0
    return real


def _is_first(given: dict[str, Any]) -> bool:
    """Whether nothing was read before: there is no cache, or it is empty."""
    # transformers calls it `cache` from some 5.2x on.
    cache = given.get("cache", given.get("past_key_values"))
    return cache is None or int(cache.get_seq_length()) == 0


def _fetched(part: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array; waits until the device has come to it."""
    part = part.detach()
    return (part.float() if part.is_floating_point() else part).cpu().numpy()


def _told(shape: RoutingShape) -> str:
    return f"{shape.num_layers} layers of {shape.num_experts} experts, top-{shape.top_k}"
