"""A batch that a model works on, as sequences of a stream: context where it reads, live where it decodes.

transformers.py -> Batch.begin -> Reading or Decoding -> Stream.open, Stream.start, Stream.route

Arrays in, arrays out: what is a tensor elsewhere has been fetched by then.
"""

from __future__ import annotations

import collections.abc
from typing import Any

import numpy as np
import numpy.typing as npt

from specmoe_client.questions import Token
from specmoe_client.stream import Stream

Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]
# Ids and gates [tokens, K] of one layer, of all rows together, wherever the model has them.
Fetch = collections.abc.Callable[[Any], npt.NDArray[Any]]


class Batch:
    """B rows that go through a model side by side, from an empty cache on.

    ends: ids that end a text. padding: what a row is fed that has ended, while others go on.
    """

    def __init__(
        self, stream: Stream, rows: int, ends: collections.abc.Collection[int], padding: int
    ) -> None:
        self.handles: list[int | None] = [None] * rows
        self._stream = stream
        self._ends, self._padding = np.array(sorted(ends), np.int64), padding
        self._ended = np.zeros(rows, bool)
        self._over = np.zeros(rows, bool)

    def decode(self, token_ids: Ints, real: Bools) -> tuple[list[int], list[int]]:
        """One token `[B]` of each row begins. Gives the rows that go on, and their handles."""
        over = self._ended & (token_ids == self._padding) & ~self._over
        gone = [handle for row in np.flatnonzero(over) if (handle := self.handles[row]) is not None]
        if gone:
            self._stream.close_sequences(gone)
            self.handles = [None if handle in gone else handle for handle in self.handles]
        self._over |= over
        self._ended = np.isin(token_ids, self._ends)
        rows = np.flatnonzero(real & ~self._over).tolist()
        handles = [self._handle(row) for row in rows]
        if rows:
            self._stream.start(handles, token_ids[rows])
        return rows, handles

    def read(self, row: int, tokens: list[Token]) -> None:
        """These tokens of a row are finished."""
        if not tokens:
            return
        self._over[row] = self._ended[row] = False
        handle = self.handles[row]
        if handle is None:
            self.handles[row] = self._stream.open(tokens)
            return
        for token in tokens:
            self._stream.start([handle], [-1 if token.token_id is None else token.token_id])
            gates = None if token.gates is None else np.asarray(token.gates)[None]
            self._stream.route([handle], np.asarray(token.experts)[None], gates)

    def close(self) -> None:
        """The rows are over."""
        handles = [handle for handle in self.handles if handle is not None]
        self.handles = [None] * len(self.handles)
        if handles:
            self._stream.close_sequences(handles)

    def _handle(self, row: int) -> int:
        handle = self.handles[row]
        if handle is None:
            handle = self.handles[row] = self._stream.open()
        return handle


class Decoding:
    """A pass over one token of each row: each layer is told as it comes."""

    def __init__(self, stream: Stream, batch: Batch, token_ids: Ints, real: Bools) -> None:
        self._stream = stream
        self._rows, self._handles = batch.decode(token_ids[:, 0], real[:, 0])

    def tell(self, experts: Any, gates: Any, fetch: Fetch) -> None:
        """The next layer: `[B, K]`."""
        if self._rows:
            self._stream.route(self._handles, fetch(experts)[self._rows], fetch(gates)[self._rows])


class Reading:
    """A pass over several tokens of each row, of a prompt mostly: told when its last layer has come.

    newest: so many of a row's tokens at most, the last ones.
    """

    def __init__(self, batch: Batch, token_ids: Ints, real: Bools, layers: int, newest: int) -> None:
        self._batch, self._layers = batch, layers
        self._from = max(0, token_ids.shape[1] - newest)
        self._shape = token_ids.shape
        self._token_ids, self._real = token_ids[:, self._from :], real[:, self._from :]
        self._heard: list[tuple[Any, Any]] = []

    def tell(self, experts: Any, gates: Any, fetch: Fetch) -> None:
        """The next layer: `[B T, K]`. What comes before the last layer stays where the model has it."""
        self._heard.append((self._newest(experts), self._newest(gates)))
        if len(self._heard) == self._layers:
            self._read(*(np.stack([fetch(of[part]) for of in self._heard], axis=2) for part in (0, 1)))

    def _newest(self, part: Any) -> Any:
        return part.reshape(*self._shape, part.shape[-1])[:, self._from :]

    def _read(self, experts: npt.NDArray[Any], gates: npt.NDArray[Any]) -> None:
        """`[B, t, L, K]`."""
        for row, real in enumerate(self._real):
            tokens = [
                Token(experts[row, at], gates[row, at], int(self._token_ids[row, at]))
                for at in np.flatnonzero(real)
            ]
            self._batch.read(row, tokens)
