"""What a stream service is told and answers, after docs/stream-protocol.md, literally; without sockets.

book = Book(Behaviour())
book.take(hello), book.answers          # toy_stream.py puts it behind a real socket

Its forecasts are a checksum of all that it was told of a sequence: where they are equal, so is what was told.
With coverage, so are the sizes of its sets.
It shares nothing with the client, the reading of frames included.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

LAYERS, EXPERTS, TOP_K = 4, 8, 2
VERSION, IDLE_SECONDS = 3, 300
HEADER = struct.Struct("<BBHIHHI")
NAMES = ["hello", "open", "context", "start", "routing", "end", "ask", "close"]
Routed = list[tuple[Any, Any]]


class Refused(Exception):
    """What the message told is wrong; nothing of it was applied."""


class Unreadable(Exception):
    """What came is no message; the connection ends."""


@dataclass
class Told:
    """A sequence as it was told: finished tokens, the one in progress and its layers, tokens started."""

    past: list[Any] = field(default_factory=list)
    token_id: int | None = None
    layers: Routed = field(default_factory=list)
    started: int = 0


@dataclass
class Behaviour:
    """What is odd about it.

    close_at_hello: (close code, error code). first_words: sent instead of welcome. mute: no forecasts.
    deaf: nothing is read after hello. late: forecasts wait for `release`. max_sequences: more are refused.
    """

    close_at_hello: tuple[int, str] | None = None
    first_words: bytes | str | None = None
    mute: bool = False
    deaf: bool = False
    late: bool = False
    uses_token_ids: bool = True
    uses_gates: bool = True
    max_sequences: int = 4096
    max_frame_bytes: int = 1 << 20
    max_context_tokens: int = 4096
    layers: int = LAYERS


class Book:
    """One connection without a socket: `take` a frame, then `answers` holds what is said of it.

    kinds, tags: of the messages that came; hello: the first; refused: what was wrong with others.
    closed: the code with which the connection was to be closed. held: forecasts that are late.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.kinds: list[str] = []
        self.tags: list[int] = []
        self.hello: dict[str, Any] = {}
        self.refused: list[str] = []
        self.sequences: dict[int, Told] = {}
        self.answers: list[bytes | str] = []
        self.closed: int | None = None
        self._behaviour = behaviour
        self.held: list[bytes] = []
        self._dropped = 0

    def take(self, frame: Any) -> None:
        """Any message."""
        tag = 0
        try:
            if len(frame) > self._behaviour.max_frame_bytes:
                self.closed = 1009
                return
            if not self.hello:
                self._greet(frame)
                return
            message = _read(frame, self._behaviour.layers)
            tag = message["tag"]
            self.kinds.append(message["kind"])
            self.tags.append(tag)
            getattr(self, "_" + message["kind"])(message)
        except Refused as error:
            self.refused.append(f"{message['kind']}: {error}")
            self.fail(tag, "sequences_exhausted" if "many" in str(error) else "invalid_message")
        except (Unreadable, struct.error) as error:
            self.refused.append(f"unreadable: {error}")
            self.fail(tag, "invalid_message", fatal=True)
            self.closed = 4400

    def expire(self, *sequences: int) -> None:
        """Forget sequences."""
        for sequence in sequences:
            del self.sequences[sequence]
        numbers = struct.pack(f"<{len(sequences)}I", *sequences)
        self.answers.append(HEADER.pack(133, 0, len(sequences), 0, 0, 0, 0) + numbers)

    def release(self) -> None:
        """Say what was held back."""
        self.answers += self.held
        self.held = []

    def fail(self, tag: int, code: str, *, fatal: bool = False) -> None:
        """An error message."""
        body = json.dumps({"code": code, "message": "It is so.", "remedy": "Do this."}).encode()
        self.answers.append(HEADER.pack(131, fatal, 0, tag, 0, 0, len(body)) + body)

    def _greet(self, frame: Any) -> None:
        kind, flags, _, tag, every, ahead, protocol = HEADER.unpack_from(frame)
        deadline_us, coverage, top_n, model, version, zero = struct.unpack_from("<IfHHHH", frame, 16)
        if (kind, protocol, zero, len(frame)) != (1, 1, 0, 32 + model + version):
            raise Unreadable("hello")
        self.hello = {
            "model": frame[32 : 32 + model].decode(),
            "version": frame[32 + model :].decode(),
            "per_sequence": bool(flags & 1),
            "union": bool(flags & 2),
            "at_start": bool(flags & 4),
            "adapt": bool(flags & 8),
            "every": every,
            "ahead": ahead,
            "deadline_us": deadline_us,
            "coverage": round(coverage, 6),
            "top_n": top_n,
        }
        odd = self._behaviour
        if odd.first_words is not None:
            self.answers.append(odd.first_words)
        elif odd.close_at_hello is not None:
            self.fail(tag, odd.close_at_hello[1], fatal=True)
            self.closed = odd.close_at_hello[0]
        else:
            self.answers.append(self._welcome(tag))

    def _welcome(self, tag: int) -> bytes:
        odd = self._behaviour
        limits = odd.max_sequences, odd.max_frame_bytes, odd.max_context_tokens, IDLE_SECONDS
        return HEADER.pack(
            128, odd.uses_token_ids | odd.uses_gates << 1, 0, tag, 0, 0, VERSION
        ) + struct.pack("<HHHHIIII", odd.layers, EXPERTS, TOP_K, 1, *limits)

    def _open(self, message: dict[str, Any]) -> None:
        if any(name in self.sequences for name in message["sequences"]):
            raise Refused("open already")
        if len(self.sequences) + len(message["sequences"]) > self._behaviour.max_sequences:
            raise Refused("too many")
        self.sequences.update({name: Told() for name in message["sequences"]})

    def _context(self, message: dict[str, Any]) -> None:
        (told,) = self._idle(message)
        if len(message["token_ids"]) > self._behaviour.max_context_tokens:
            raise Refused("context too long")
        told.past += list(zip(message["token_ids"], message["routed"], strict=True))

    def _start(self, message: dict[str, Any]) -> None:
        for told, token_id in zip(self._idle(message), message["token_ids"], strict=True):
            told.token_id, told.layers = token_id, []
            told.started += 1
        if self.hello["at_start"]:
            self._forecast(message["tag"], message["sequences"])

    def _routing(self, message: dict[str, Any]) -> None:
        first, end = message["first_layer"], message["first_layer"] + message["layers"]
        found = self._within(message)
        if any(len(told.layers) != first for told in found) or end > self._behaviour.layers:
            raise Refused("wrong layer")
        for told, layers in zip(found, message["routed"], strict=True):
            told.layers += layers
            if end == self._behaviour.layers:
                told.past.append((told.token_id, told.layers))
                told.token_id = None
        every = self.hello["every"]
        if every and end // every > first // every and end < self._behaviour.layers:
            self._forecast(message["tag"], message["sequences"])

    def _end(self, message: dict[str, Any]) -> None:
        for told in self._within(message):
            told.token_id = None

    def _ask(self, message: dict[str, Any]) -> None:
        found = self._within(message)
        for seen in {len(told.layers) for told in found}:
            names = [
                name
                for name, told in zip(message["sequences"], found, strict=True)
                if len(told.layers) == seen
            ]
            self._forecast(message["tag"], names)

    def _close(self, message: dict[str, Any]) -> None:
        self._known(message)
        for name in message["sequences"]:
            del self.sequences[name]

    def _known(self, message: dict[str, Any]) -> list[Told]:
        names = message["sequences"]
        if len(set(names)) < len(names) or any(name not in self.sequences for name in names):
            raise Refused("not open, or twice")
        return [self.sequences[name] for name in names]

    def _idle(self, message: dict[str, Any]) -> list[Told]:
        found = self._known(message)
        if any(told.token_id is not None for told in found):
            raise Refused("within a token")
        return found

    def _within(self, message: dict[str, Any]) -> list[Told]:
        found = self._known(message)
        if any(told.token_id is None for told in found):
            raise Refused("no token in progress")
        return found

    def _forecast(self, tag: int, names: list[int]) -> None:
        if self._behaviour.mute:
            return
        found = [self.sequences[name] for name in names]
        seen = len(found[0].layers)
        end = min(seen + self.hello["ahead"], self._behaviour.layers) if self.hello["ahead"] else None
        layers = range(seen, end or self._behaviour.layers)
        number = self.hello["top_n"] or 2 * TOP_K
        sizes = [
            [set_size(told, layer) if self.hello["coverage"] else number for layer in layers]
            for told in found
        ]
        width = max(max(of_one) for of_one in sizes)
        head = struct.pack(f"<{2 * len(names)}I", *names, *(told.started - 1 for told in found))
        rows = [[ranked(told, layer, width) for layer in layers] for told in found]
        if self.hello["per_sequence"]:
            self._tell(129, tag, seen, names, head, sizes, rows)
        if self.hello["union"]:
            width = max(sizes[0])
            self._tell(130, tag, seen, names, head, sizes[:1], [[row[:width] for row in rows[0]]])

    def _tell(
        self,
        kind: int,
        tag: int,
        seen: int,
        names: list[int],
        head: bytes,
        sizes: list[list[int]],
        rows: list[list[list[int]]],
    ) -> None:
        experts = [expert for layers in rows for row in layers for expert in row]
        chances = [1 / (2 + place) for layers in rows for row in layers for place in range(len(row))]
        meant = [size for layers in sizes for size in layers]
        message = (
            HEADER.pack(kind, 0, len(names), tag, seen, len(sizes[0]), self._dropped)
            + head
            + struct.pack(f"<{len(chances)}f{len(meant)}H", *chances, *meant)
            + bytes(experts)
        )
        (self.held if self._behaviour.late else self.answers).append(message)


def ranked(told: Told, layer: int, width: int) -> list[int]:
    """A ranking that any difference in what was told would change."""
    return random.Random(_digest(told, layer)).sample(range(EXPERTS), width)


def set_size(told: Told, layer: int) -> int:
    """How many experts of that ranking a coverage set has."""
    return random.Random(_digest(told, layer)).randint(TOP_K, EXPERTS)


def _digest(told: Told, layer: int) -> int:
    return zlib.crc32(repr((told.past, told.token_id, told.layers, layer)).encode())


def _read(frame: Any, num_layers: int) -> dict[str, Any]:
    """A message's fields. routed: by sequence, or token, a list of layers: (experts, gates)."""
    kind, flags, count, tag, first_layer, layers, extra = HEADER.unpack_from(frame)
    if not 2 <= kind <= len(NAMES) or not count:
        raise Unreadable(f"kind {kind}, count {count}")
    name = NAMES[kind - 1]
    rest = memoryview(frame)[16:]

    def take(code: str, number: int) -> list[Any]:
        nonlocal rest
        size = struct.calcsize(f"<{number}{code}")
        values = list(struct.unpack(f"<{number}{code}", rest[:size]))
        rest = rest[size:]
        return values

    message: dict[str, Any] = {"kind": name, "tag": tag, "first_layer": first_layer, "layers": layers}
    message["sequences"] = take("I", count)
    rows = extra if name == "context" else count
    if name in ("context", "start"):
        message["token_ids"] = take("i", rows) if flags & 1 else [-1] * rows
    if name in ("context", "routing"):
        if name == "context" and (count != 1 or layers != num_layers or not extra):
            raise Unreadable("context of another shape")
        slots = rows * layers * TOP_K
        gates = take("f", slots) if flags & 2 else [1.0] * slots
        message["routed"] = _layered(take("B", slots), gates, rows, layers)
    if len(rest):
        raise Unreadable(f"{len(rest)} bytes too many in {name}")
    allowed = {"context": 3, "start": 1, "routing": 2}.get(name, 0)
    if flags & ~allowed or (name not in ("context", "routing") and (first_layer or layers or extra)):
        raise Unreadable(f"a field of {name} must be 0")
    return message


def _layered(experts: list[int], gates: list[float], rows: int, layers: int) -> list[Routed]:
    at = iter(range(0, len(experts) + 1, TOP_K))
    routed = []
    for _ in range(rows):
        routed.append([])
        for _ in range(layers):
            first = next(at)
            ids, weights = experts[first : first + TOP_K], gates[first : first + TOP_K]
            if len(set(ids)) < TOP_K or max(ids) >= EXPERTS or not (min(weights) >= 0 and sum(weights) > 0):
                raise Refused("no routing")
            routed[-1].append((ids, weights))
    return routed
