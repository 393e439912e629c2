"""What a stream foretells, as the program reads it: views of the bytes that came, valid for good.

frames.py -> session.py -> forecasts.py -> Stream.latest, AsyncStream.forecast
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specmoe_client.streaming.frames import Experts, Ranking


class _Layers:
    """Layers `seen`, `seen + 1`, ... of a ranking, m of them, with w experts in its longest row."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self.seen = ranking.first_layer

    @property
    def layers(self) -> npt.NDArray[np.int32]:
        """int32 `[m]`: the layers that are forecast, ascending."""
        return np.arange(self.seen, self.seen + self._ranking.num_layers, dtype=np.int32)

    @property
    def sizes(self) -> npt.NDArray[np.uint16]:
        """uint16 `[m]`: how many experts of a row are meant; what stands behind them is filling."""
        return self._ranking.sizes

    @property
    def experts(self) -> Experts:
        """uint8, or uint16 where the model has more than 256 experts, `[m, w]`: best first."""
        return self._ranking.experts

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """float32 `[m, w]`: of each expert."""
        return self._ranking.probabilities

    def experts_of(self, layer: int) -> Experts:
        """The experts of one layer, best first, without filling; empty where the layer is not forecast."""
        row = layer - self.seen
        if not 0 <= row < self._ranking.num_layers:
            return self.experts[0, :0]
        return self.experts[row, : self.sizes[row]]


class SequenceForecast(_Layers):
    """What the coming layers of one sequence's token will probably be routed to.

    sequence: its handle. token: how many of its tokens were started on the stream before this one.
    seen: layers that were told when it was made. probabilities: that an expert is among the routed top-k.
    """

    def __init__(self, ranking: Ranking, position: int, sequence: int, token: int) -> None:
        super().__init__(ranking)
        self._position = position
        self.sequence, self.token = sequence, token

    @property
    def sizes(self) -> npt.NDArray[np.uint16]:
        """uint16 `[m]`: how many experts of a row are meant; what stands behind them is filling."""
        sizes: npt.NDArray[np.uint16] = self._ranking.sizes[self._position]
        return sizes

    @property
    def experts(self) -> Experts:
        """uint8, or uint16 where the model has more than 256 experts, `[m, w]`: best first."""
        experts: Experts = self._ranking.experts[self._position]
        return experts

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """float32 `[m, w]`: of each expert."""
        probabilities: npt.NDArray[np.float32] = self._ranking.probabilities[self._position]
        return probabilities


class UnionForecast(_Layers):
    """What at least one of several sequences will probably need. sequences: their handles.

    seen: layers that were told of all when it was made. probabilities: that one of them needs the expert.
    """

    def __init__(self, ranking: Ranking, sequences: tuple[int, ...]) -> None:
        super().__init__(ranking)
        self.sequences = sequences
