"""The rules of docs/stream-protocol.md as plain Python: what is refused, due and dropped, and what a forecast
says, each worked out from scratch.

Protocol.take(message) -> refused or not; Protocol.due -> the forecasts that must be sent next
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speculation.runtime import Speculator
from tests.service.stream.frames import Message
from tests.speculation.replayed import Replayed

MAX_GATE = 1e30


@dataclass
class Due:
    """What one message asked for: names that have seen the same layers."""

    tag: int
    seen: int
    names: list[int] = field(default_factory=list)


class Protocol:
    """What the service must know of one connection."""

    def __init__(self, hello: Message, speculator: Speculator) -> None:
        self.hello, self.speculator, self.spec = hello, speculator, speculator.spec
        self.sequences: dict[int, Replayed] = {}
        self.in_progress: set[int] = set()
        self.due: list[Due] = []
        self.dropped = 0

    def take(self, message: Message) -> bool:
        """Whether a message is taken; a refused one changes nothing."""
        if not self.allows(message):
            return False
        getattr(self, f"_{message['type']}")(_names(message), message)
        return True

    def allows(self, message: Message) -> bool:
        """Whether a message would be taken."""
        names = _names(message)
        return len(set(names)) == len(names) and self._allowed(message, set(names))

    def expected(self, due: Due) -> list[Message]:
        """The messages with which a due is answered."""
        told = {"tag": due.tag, "first_layer": due.seen, "dropped": self.dropped % 2**32}
        tokens = [self.sequences[name].started - 1 for name in due.names]
        p = [self.sequences[name].probabilities() for name in due.names]
        ahead = self.hello.get("ahead") or self.spec.num_layers
        layers = range(due.seen, min(due.seen + ahead, self.spec.num_layers))
        ranked = [{layer: self._ranked(of_one[layer], due.seen, layer) for layer in layers} for of_one in p]
        answers: list[Message] = []
        if self.hello.get("per_sequence", True):
            predictions = [
                {"sequence": name, "token": token, "layers": [
                    {"layer": layer, "distance": layer - due.seen + 1, **_listed(experts, of_one[layer])}
                    for layer, experts in lists.items()
                ]}
                for name, token, of_one, lists in zip(due.names, tokens, p, ranked, strict=True)
            ]  # fmt: skip
            answers.append({"type": "forecast", **told, "predictions": predictions})
        if self.hello.get("union"):
            demand = 1.0 - np.prod([1.0 - of_one for of_one in p], axis=0)
            wanted = []
            for layer in layers:
                experts = _best(demand[layer], self.spec.num_experts)
                if self.hello.get("coverage"):
                    chosen = {expert for lists in ranked for expert in lists[layer]}
                    experts = [expert for expert in experts if expert in chosen]
                else:
                    experts = experts[: len(ranked[0][layer])]
                wanted.append({"layer": layer, **_listed(experts, demand[layer])})
            answers.append(
                {"type": "union", **told, "sequences": due.names, "tokens": tokens, "layers": wanted}
            )
        return answers

    def _allowed(self, message: Message, names: set[int]) -> bool:
        kind, opened = message["type"], set(self.sequences)
        if kind == "open":
            return not names & opened
        if not names <= opened or not _sound(message, self.spec.num_experts):
            return False
        if kind in ("start", "context"):
            return not names & self.in_progress
        if kind == "close":
            return True
        if not names <= self.in_progress:
            return False
        if kind == "routing":
            first, end = message["first_layer"], message["first_layer"] + len(message["experts"][0])
            return end <= self.spec.num_layers and {self.sequences[name].seen for name in names} == {first}
        return True

    def _open(self, names: list[int], message: Message) -> None:
        for name in names:
            self.sequences[name] = Replayed(self.speculator)

    def _close(self, names: list[int], message: Message) -> None:
        self._overtake(names)
        for name in names:
            del self.sequences[name]
            self.in_progress.discard(name)

    def _context(self, names: list[int], message: Message) -> None:
        sequence = self.sequences[names[0]]
        ids = message.get("token_ids") or [-1] * len(message["experts"])
        gates = message.get("gates") or [None] * len(message["experts"])
        for token_id, experts, weights in zip(ids, message["experts"], gates, strict=True):
            sequence.start(token_id)
            sequence.tell(experts, weights)
            sequence.started -= 1  # not on this connection

    def _start(self, names: list[int], message: Message) -> None:
        for name, token_id in zip(names, message.get("token_ids") or [-1] * len(names), strict=True):
            self.sequences[name].start(token_id)
            self.in_progress.add(name)
        if self.hello.get("at_start", True):
            self.due.append(Due(message.get("tag", 0), 0, names))

    def _routing(self, names: list[int], message: Message) -> None:
        gates = message.get("gates") or [None] * len(names)
        for name, experts, weights in zip(names, message["experts"], gates, strict=True):
            self.sequences[name].tell(experts, weights)
        first, end = message["first_layer"], message["first_layer"] + len(message["experts"][0])
        every = self.hello.get("every", 1)
        if end == self.spec.num_layers:
            self._overtake(names)
            self.in_progress -= set(names)
        elif every and any(seen % every == 0 for seen in range(first + 1, end + 1)):
            self._overtake(names)
            self.due.append(Due(message.get("tag", 0), end, names))
        else:
            self._bring_up_to_date(names, end)

    def _end(self, names: list[int], message: Message) -> None:
        self._overtake(names)
        self.in_progress -= set(names)

    def _ask(self, names: list[int], message: Message) -> None:
        self._overtake(names)
        asked: dict[int, Due] = {}
        for name in names:
            seen = self.sequences[name].seen
            asked.setdefault(seen, Due(message.get("tag", 0), seen)).names.append(name)
        self.due.extend(asked.values())

    def _bring_up_to_date(self, names: list[int], seen: int) -> None:
        moved = [
            Due(due.tag, seen, [name for name in names if name in due.names])
            for due in sorted(
                self.due, key=lambda due: min(map(names.index, set(due.names) & set(names)), default=0)
            )
            if set(due.names) & set(names)
        ]
        for due in self.due:
            due.names = [name for name in due.names if name not in names]
        self.due = [due for due in self.due if due.names] + moved

    def _overtake(self, names: list[int]) -> None:
        for due in self.due:
            self.dropped += len(set(due.names) & set(names))
            due.names = [name for name in due.names if name not in names]
        self.due = [due for due in self.due if due.names]

    def _ranked(self, p: np.ndarray[Any, Any], seen: int, layer: int) -> list[int]:
        coverage = self.hello.get("coverage")
        if coverage:
            tables = self.speculator.manifest.coverage
            level = next(i for i, level in enumerate(tables.levels) if level >= coverage)
            threshold = np.float32(tables.thresholds[level][layer][layer - seen])
            return _best(p, max(tables.experts[level][layer][layer - seen], int((p >= threshold).sum())))
        return _best(p, self.hello.get("top_n") or min(2 * self.spec.top_k, self.spec.num_experts))


def _names(message: Message) -> list[int]:
    names: list[int] = message["sequences"] if "sequences" in message else [message["sequence"]]
    return names


def _best(p: np.ndarray[Any, Any], n: int) -> list[int]:
    return sorted(range(len(p)), key=lambda expert: (-p[expert], expert))[:n]


def _listed(experts: list[int], p: np.ndarray[Any, Any]) -> Message:
    return {"experts": experts, "probabilities": [float(p[expert]) for expert in experts]}


def _sound(message: Message, num_experts: int) -> bool:
    """Whether ids and gates are what they must be."""
    layers = [slots for row in message.get("experts") or [] for slots in row]
    gates = [slots for row in message.get("gates") or [] for slots in row]
    return (
        all(len(set(slots)) == len(slots) and max(slots) < num_experts for slots in layers)
        and all(max(slots) > 0 and min(slots) >= 0 and max(slots) <= MAX_GATE for slots in gates)
        and all(token_id >= -1 for token_id in message.get("token_ids") or [])
    )
