"""A simulated expert cache: which expert weights would be resident, fetched on demand, fetched ahead.

Recorded routing and forecasts -> ExpertCache -> hit rate and fetches, for `specmoe.replay`. Fetches take no
time here: the counts tell the load of the link, not whether it would have kept up.

specmoe replay test.npz --model gpt-oss-20b --cache-share 0.25
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class ExpertCache:
    """Keeps the `capacity` experts, of all layers together, that were used or forecast most recently (LRU).

    uses: experts that tokens were routed to. hits: those that were resident when their layer began.
    fetched_ahead: experts brought in by a forecast; of these, `useful` were used while they stayed and
    `wasted` were evicted unused. The rest is still resident.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.uses = self.hits = self.fetched_ahead = self.useful = self.wasted = 0
        # Least recent first. True: fetched ahead and not used since.
        self._resident: OrderedDict[tuple[int, int], bool] = OrderedDict()

    @property
    def misses(self) -> int:
        """Experts fetched on demand, while the layer waits."""
        return self.uses - self.hits

    @property
    def hit_rate(self) -> float:
        """Share of the uses that found their expert resident; 0 where nothing was used."""
        return self.hits / self.uses if self.uses else 0.0

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """A token is routed to these experts of a layer. What is missing is fetched now."""
        keys = [(layer, expert) for expert in experts]
        resident = [key for key in keys if key in self._resident]
        self.uses += len(keys)
        self.hits += len(resident)
        self.useful += sum(self._resident[key] for key in resident)
        # The resident ones first, so that fetching a missing one evicts none that this layer needs.
        for key in resident:
            self._resident[key] = False
            self._resident.move_to_end(key)
        for key in keys:
            if key not in self._resident:
                self._put(key, fetched_ahead=False)

    def prefetch(self, forecast: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Fetch ahead what is not resident. `forecast`: layers, nearest first, and their experts, best first.

        The nearest layer's best expert becomes the most recent, so that it is the last to be evicted.
        """
        keys = [(layer, expert) for layer, experts in forecast for expert in experts]
        # More than fit would push out one another: the surest of the nearest layers are kept.
        for key in reversed(keys[: self.capacity]):
            if key in self._resident:
                self._resident.move_to_end(key)
            else:
                self.fetched_ahead += 1
                self._put(key, fetched_ahead=True)

    def _put(self, key: tuple[int, int], *, fetched_ahead: bool) -> None:
        if len(self._resident) >= self.capacity:
            _, unused = self._resident.popitem(last=False)
            self.wasted += unused
        self._resident[key] = fetched_ahead
