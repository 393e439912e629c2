"""The traffic of a soak: streams that do whatever the protocol allows, and some things it forbids; what they
are forecast is compared with the same sequences worked out here.

soak_stream.py -> `Life`, one connection after another -> Tally

Written by docs/stream-protocol.md, not with our client: what both got wrong would not be seen.
"""

from __future__ import annotations

import base64
import os
import random
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speculation.coverage import sizes_of
from speculation.runtime import Speculator, State
from tests.service.stream.frames import Message, binary, frame, read, text

# In 8 bits, one number that is rounded up here and down there moves a probability by up to 0.02. The forecast
# of another sequence, or of another step, differs by far more.
TOLERANCE = 0.05
# What JSON rounds off a probability.
ROUNDED = 1e-6
MOST_SEQUENCES = 24
# Forecasts that are checked in one model call.
CHECKED_TOGETHER = 64
ANSWER_SECONDS = 30.0
# For one that has a deadline, and so may be too late each time.
GIVE_UP_SECONDS = 5.0
# For a forecast, where a stream waits for it.
PATIENCE_SECONDS = 0.02
CLOSE, PING, PONG = 8, 9, 10
Array = np.ndarray[Any, Any]


class Violation(Exception):
    """The service did what it must not."""


class Gone(Exception):
    """The service closed the connection. code: why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code}: {reason}")
        self.code = code


@dataclass
class Tally:
    """What happened. largest_difference: between a probability that came and the one worked out here."""

    streams: int = 0
    cut: int = 0
    messages: int = 0
    routing: int = 0
    wrong: int = 0
    due: int = 0
    forecasts: int = 0
    unions: int = 0
    dropped: int = 0
    accounts: int = 0
    too_late: int = 0
    largest_difference: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Both together."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "largest_difference" else mine + value)


class Socket:
    """A WebSocket that reads no more than it is told to."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=ANSWER_SECONDS)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /v1/stream HTTP/1.1\r\nHost: service\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        self._came = bytearray()
        self._gone: Gone | None = None
        while b"\r\n\r\n" not in self._came:
            self._receive()
        head, _, rest = bytes(self._came).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise Violation(f"the handshake was answered {head!r}")
        self._came = bytearray(rest)

    def send(self, message: bytes | str) -> None:
        """A whole message."""
        if isinstance(message, bytes):
            self._frame(2, message)
        else:
            self._frame(1, message.encode())

    def messages(self, seconds: float) -> list[bytes | str]:
        """What has come, or comes within so many seconds. Raises Gone."""
        found = self._parsed()
        while not found and select.select([self._socket], [], [], seconds)[0]:
            self._receive()
            found = self._parsed()
            seconds = 0.0
        return found

    def hang_up(self) -> None:
        """Close in order."""
        self._frame(CLOSE, struct.pack(">H", 1000))
        try:
            while True:
                self.messages(ANSWER_SECONDS)
        except Gone as gone:
            if gone.code != 1000:
                raise
        self._socket.close()

    def cut(self, after: bytes = b"") -> None:
        """Be gone, in the middle of a frame if there is something to begin it with."""
        self._socket.sendall(after)
        self._socket.close()

    def _frame(self, opcode: int, payload: bytes) -> None:
        length = len(payload)
        if length < 126:
            head = struct.pack(">BB", 0x80 | opcode, 0x80 | length)
        elif length < 65536:
            head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, length)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, length)
        self._socket.sendall(head + bytes(4) + payload)  # a mask of zeros

    def _receive(self) -> None:
        came = self._socket.recv(1 << 16)
        if not came:
            raise Gone(1006, "without a word")
        self._came += came

    def _parsed(self) -> list[bytes | str]:
        found: list[bytes | str] = []
        if self._gone:
            raise self._gone
        while len(self._came) >= 2:
            length, start = self._came[1], 2
            if length == 126:
                length, start = int.from_bytes(self._came[2:4], "big"), 4
            elif length == 127:
                length, start = int.from_bytes(self._came[2:10], "big"), 10
            if len(self._came) < start + length:
                break
            opcode, payload = self._came[0] & 15, bytes(self._came[start : start + length])
            del self._came[: start + length]
            if opcode == PING:
                self._frame(PONG, payload)
            elif opcode == CLOSE:
                self._gone = Gone(int.from_bytes(payload[:2], "big"), payload[2:].decode())
                if not found:  # else what came before it first
                    raise self._gone
                break
            else:
                found.append(payload.decode() if opcode == 1 else payload)
        return found


@dataclass(eq=False)
class Token:
    """A token of a sequence as it was told. state: before it."""

    state: State
    token_id: int
    experts: Array
    gates: Array


@dataclass(eq=False)
class Told:
    """A sequence. tokens: all that were started on the connection; seen: layers told, -1 between tokens."""

    state: State
    tokens: list[Token] = field(default_factory=list)
    seen: int = -1


class Life:
    """One connection from hello to its end."""

    def __init__(self, address: tuple[str, int], speculator: Speculator, chance: random.Random) -> None:
        self.tally = Tally(streams=1)
        self._speculator, self._spec, self._chance = speculator, speculator.spec, chance
        self._routing = np.random.default_rng(chance.getrandbits(32))
        self._in_text = chance.random() < 0.15
        self._socket = Socket(address)
        self._sequences: dict[int, Told] = {}
        self._ever: dict[int, Told] = {}
        self._unchecked: list[tuple[Token, int, Array, Array, Array]] = []
        self._answered = self._dropped = self._due = self._tag = 0
        self._hello = self._made_up_hello()
        self._say({"type": "hello", **self._hello})
        welcome = self._next("welcome")
        if welcome["num_layers"] != self._spec.num_layers:
            raise Violation(f"welcome is {welcome}")

    def live(self, until: float) -> None:
        """Do this and that until the time comes, then end in one of many ways. Raises Violation, Gone."""
        do = 3 * [self._open, self._start, self._start, self._context, self._end, self._ask, self._close]
        do += [self._tell] * 100 + [self._burst, self._do_not_read, self._settle_accounts, self._say_nonsense]
        patience = self._chance.choice([0.0, 0.5, 1.0])
        while time.monotonic() < until:
            self._chance.choice(do)()
            waits = self._due > self._answered + self._dropped and self._chance.random() < patience
            self._hear(PATIENCE_SECONDS if waits else 0.0)
        self._settle_accounts()
        self._finish()

    def _finish(self) -> None:
        way = self._chance.random()
        if way < 0.5:
            self._socket.hang_up()
        elif way < 0.8:
            self.tally.cut = 1
            self._socket.cut(b"" if way < 0.65 else b"\x82\xfe\x10\x00" + bytes(99))
        else:
            self._socket.send(self._chance.choice([frame(9), "no JSON", b"", frame(2, count=9)]))
            if not self._next("error")["fatal"]:
                raise Violation("an unreadable message did not end the connection")
            try:
                while True:
                    self._socket.messages(ANSWER_SECONDS)
            except Gone as gone:
                if gone.code != 4400:
                    raise
            self._socket.cut()

    def _made_up_hello(self) -> Message:
        chance, experts = self._chance, self._spec.num_experts
        amount: Message = {"top_n": chance.choice([1, 4, min(16, experts), experts])}
        levels = self._speculator.manifest.coverage.levels
        union = chance.random() < 0.2
        if levels and not union and chance.random() < 0.3:
            amount = {"coverage": chance.choice(levels), "adapt": chance.random() < 0.5}
        return {
            "model": self._spec.model,
            "version": self._speculator.manifest.version,
            "union": union,
            "every": chance.choice([1, 1, 1, 2, 5, 0]),
            "ahead": chance.choice([0, 0, 1, 3]),
            "at_start": chance.random() < 0.8,
            "deadline_us": chance.choice([0, 0, 0, 3_000, 100_000]),
            **amount,
        }

    # What it does.

    def _open(self) -> None:
        room = MOST_SEQUENCES - len(self._sequences)
        names = {self._chance.getrandbits(32) for _ in range(min(room, self._chance.randint(1, 6)))}
        names -= self._ever.keys()
        if names:
            self._say({"type": "open", "sequences": list(names)})
            for name in names:
                self._sequences[name] = self._ever[name] = Told(self._speculator.initial_state(1))

    def _close(self) -> None:
        names = self._some(self._sequences)[:2]
        if names:
            self._say({"type": "close", "sequences": names})
            for name in names:
                del self._sequences[name]

    def _context(self) -> None:
        names = self._some(self._between())
        if names:
            tokens = self._chance.randint(1, 5)
            ids, experts, gates = self._routed(tokens, self._spec.num_layers)
            told = {"token_ids": ids.tolist(), "experts": experts.tolist(), "gates": gates.tolist()}
            self._say({"type": "context", "sequence": names[0], **told})
            for token in range(tokens):
                one = slice(token, token + 1)
                sequence = self._sequences[names[0]]
                sequence.state = self._speculator.advance(sequence.state, ids[one], experts[one], gates[one])

    def _start(self, names: list[int] | None = None) -> None:
        names = names or self._some(self._between())
        if not names:
            return
        ids, experts, gates = self._routed(len(names), self._spec.num_layers)
        with_ids = self._chance.random() < 0.8
        told = {"token_ids": ids.tolist()} if with_ids else {}
        self._say({"type": "start", "sequences": names, **told})
        for row, name in enumerate(names):
            sequence = self._sequences[name]
            token_id = int(ids[row]) if with_ids else -1
            sequence.tokens.append(Token(sequence.state, token_id, experts[row], gates[row]))
            sequence.seen = 0
        if self._hello["at_start"]:
            self._due += len(names)

    def _tell(self) -> None:
        within = self._within()
        if not within:
            self._start()
            return
        first = self._sequences[self._chance.choice(within)].seen
        names = self._some([name for name in within if self._sequences[name].seen == first])
        end = min(first + self._chance.choice([1, 1, 1, 2, 4, 99]), self._spec.num_layers)
        tokens = [self._sequences[name].tokens[-1] for name in names]
        experts = np.stack([token.experts[first:end] for token in tokens])
        message = {"type": "routing", "sequences": names, "first_layer": first, "experts": experts.tolist()}
        if self._chance.random() < 0.8:
            message["gates"] = np.stack([token.gates[first:end] for token in tokens]).tolist()
        else:
            for token in tokens:
                token.gates[first:end] = 1.0
        self._say(message)
        self.tally.routing += 1
        for name in names:
            self._sequences[name].seen = end
        every = self._hello["every"]
        if end == self._spec.num_layers:
            self._advance(names)
        elif every and end // every > first // every:
            self._due += len(names)

    def _end(self) -> None:
        names = self._some(self._within())[:2]
        if names:
            self._say({"type": "end", "sequences": names})
            for name in names:
                self._sequences[name].seen = -1

    def _ask(self) -> None:
        names = self._some(self._within())
        if names:
            self._say({"type": "ask", "sequences": names})
            self._due += len(names)

    def _burst(self) -> None:
        for _ in range(20):
            self._tell()

    def _do_not_read(self) -> None:
        end = time.monotonic() + self._chance.uniform(0.0, 0.5)
        while time.monotonic() < end:
            self._tell()
            time.sleep(0.001)

    def _say_nonsense(self) -> None:
        """A message that must be refused, and nothing else: what was not read ends a connection by then."""
        self._settle_accounts()
        name = self._chance.choice(list(self._sequences))
        seen, layers, top_k = self._sequences[name].seen, self._spec.num_layers, self._spec.top_k
        wrong = self._chance.choice(
            [
                {"type": "open", "sequences": [name]},
                {"type": "start", "sequences": [name]},
                {"type": "close", "sequences": [name, name]},
                {"type": "ask", "sequences": [name, 1 << 31]},
                {
                    "type": "routing",
                    "sequences": [name],
                    "first_layer": seen + 1,
                    "experts": [[range(top_k)]],
                },
                {
                    "type": "routing",
                    "sequences": [name],
                    "first_layer": seen,
                    "experts": [[[0] * (top_k + 1)]],
                }
                if self._in_text
                else {
                    "type": "routing",
                    "sequences": [name],
                    "first_layer": seen,
                    "experts": [[[255] * top_k]],
                },
                {"type": "context", "sequence": name, "experts": [[range(top_k)] * layers]},
            ]
        )
        if "experts" in wrong:
            wrong["experts"] = np.array([[list(slots) for slots in row] for row in wrong["experts"]]).tolist()
        self._say(wrong)
        self.tally.wrong += 1
        error = self._next("error")
        if error["fatal"] or error["tag"] != self._tag or error["code"] != "invalid_message":
            raise Violation(f"{wrong} was answered with {error}")

    def _settle_accounts(self) -> None:
        """Ask for all sequences, until that is answered: then nothing is due, and none may be missing."""
        if not self._sequences:
            self._open()
        between = self._between()
        if between:
            self._start(between)
        names = set(self._sequences)
        deadline = self._hello["deadline_us"]
        end = time.monotonic() + (GIVE_UP_SECONDS if deadline else ANSWER_SECONDS)
        while names:
            self._say({"type": "ask", "sequences": list(names)})
            self._due += len(names)
            tag, asked = self._tag, len(names)
            dropped = self._dropped
            while names and time.monotonic() < end:
                for answer in self._hear(0.05):
                    if answer["type"] == "forecast" and answer["tag"] == tag:
                        names -= set(answer["names"])
                if deadline and (len(names) == asked or self._dropped > dropped):
                    break  # it may have been too late: ask once more
            if names and time.monotonic() >= end:
                if not deadline:
                    raise Violation(f"{len(names)} of {asked} forecasts did not come: {self._hello}")
                self.tally.too_late += 1  # on a machine this busy: what was dropped cannot be known
                return
        self._check()
        # What was asked for again before it was answered is dropped or answered by the time of the last one.
        if self._answered + self._dropped != self._due:
            counts = f"{self._due} were due, {self._answered} came, {self._dropped} were dropped"
            raise Violation(f"{counts}: {self._hello}")
        self.tally.accounts += 1

    # What it hears.

    def _hear(self, seconds: float) -> list[Message]:
        answers = []
        for raw in self._socket.messages(seconds):
            kind = raw[0] if isinstance(raw, bytes) else None
            answer = _ranked(raw, self._spec.num_experts) if kind in (129, 130) else None
            answer = answer or _plain(read(raw, self._spec.num_experts))
            if answer["type"] == "forecast":
                self._note(answer)
            elif answer["type"] == "union":
                self._check_union(answer)
            answers.append(answer)
        if len(self._unchecked) >= CHECKED_TOGETHER:
            self._check()
        return answers

    def _next(self, kind: str) -> Message:
        """The next answer of a kind; errors of another are not expected."""
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end:
            for answer in self._hear(0.1):
                if answer["type"] == kind:
                    return answer
                if answer["type"] not in ("forecast", "union"):
                    raise Violation(f"{answer} came instead of {kind}")
        raise Violation(f"{kind} did not come")

    def _note(self, forecast: Message) -> None:
        if forecast["dropped"] < self._dropped:
            raise Violation(f"dropped went from {self._dropped} to {forecast['dropped']}")
        self._dropped = forecast["dropped"]
        self._answered += len(forecast["names"])
        seen, sizes = forecast["first_layer"], forecast["sizes"]
        self._check_amount(seen, sizes)
        for row, (name, token) in enumerate(zip(forecast["names"], forecast["tokens"], strict=True)):
            told = self._ever[name].tokens[token]
            self._unchecked.append(
                (told, seen, forecast["experts"][row], forecast["probabilities"][row], sizes[row])
            )

    def _check_amount(self, seen: int, sizes: Array) -> None:
        """sizes: [n, m], of a union [1, m]. Coverage sets follow from what is forecast: `_check_sets`."""
        end = min(seen + (self._hello["ahead"] or self._spec.num_layers), self._spec.num_layers)
        expected = self._hello.get("top_n")
        if sizes.shape[1] != end - seen or (expected and (sizes != expected).any()):
            raise Violation(
                f"sizes are {sizes.tolist()}, expected {expected or 'some'} of {end - seen} layers"
            )

    def _check_sets(self, came: Array, seen: int, sizes: Array) -> None:
        """Whether as many experts came as are in the set, by the probabilities [m, w] that came with them."""
        sets = self._speculator.coverage_sets(self._hello["coverage"])
        least, threshold = (table[seen, seen : seen + len(sizes)] for table in (sets.least, sets.threshold))
        fewest, most = (sizes_of(least, threshold + gap, came) for gap in (ROUNDED, -ROUNDED))
        if (sizes < fewest).any() or (sizes > most).any():
            raise Violation(f"sizes are {sizes.tolist()}, expected {fewest.tolist()} to {most.tolist()}")

    def _check(self) -> None:
        """Compare what came with what is worked out here."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        tokens, seen = [token for token, *_ in unchecked], [layers for _, layers, *_ in unchecked]
        expected = self._probabilities(tokens, seen)
        for p, (_, first, listed, came, sizes) in zip(expected, unchecked, strict=True):
            self._compare(p[first : first + len(sizes)], listed, came, sizes)
            # Sets that adapt follow from when the service learned what.
            if "coverage" in self._hello and not self._hello["adapt"]:
                self._check_sets(came, first, sizes)
        self.tally.forecasts += len(unchecked)

    def _check_union(self, union: Message) -> None:
        seen, sizes = union["first_layer"], union["sizes"]
        self._check_amount(seen, sizes)
        named = zip(union["names"], union["tokens"], strict=True)
        tokens = [self._ever[name].tokens[token] for name, token in named]
        demand = 1.0 - np.prod(1.0 - self._probabilities(tokens, [seen] * len(tokens)), axis=0)
        listed, came = union["experts"][0], union["probabilities"][0]
        self._compare(demand[seen : seen + len(listed)], listed, came, sizes[0])
        self.tally.unions += 1

    def _probabilities(self, tokens: list[Token], seen: list[int]) -> Array:
        """Of each token, when so many of its layers are known."""
        state = tuple(np.concatenate(parts) for parts in zip(*(token.state for token in tokens), strict=True))
        experts = np.stack([token.experts for token in tokens])
        gates = np.stack([token.gates for token in tokens])
        experts[np.arange(self._spec.num_layers) >= np.array(seen)[:, None]] = -1
        return self._speculator.predict(state, np.array([token.token_id for token in tokens]), experts, gates)

    def _compare(self, p: Array, listed: Array, came: Array, sizes: Array) -> None:
        meant = np.arange(listed.shape[1]) < sizes[:, None]
        best = -np.sort(-p, axis=1)[:, : listed.shape[1]]
        of_listed = np.take_along_axis(p, listed.astype(np.int64), axis=1)
        difference = max(
            float(np.abs(of_listed - came)[meant].max()), float(np.abs(best - came)[meant].max())
        )
        self.tally.largest_difference = max(self.tally.largest_difference, difference)
        if difference > TOLERANCE:
            raise Violation(f"a forecast differs by {difference:.2g}: {self._hello}")
        for row, size in zip(listed, sizes, strict=True):
            if len(set(row[:size].tolist())) < size:
                raise Violation("an expert stands twice in a layer")

    # What it needs for both.

    def _say(self, message: Message) -> None:
        self._tag += 1
        message["tag"] = self._tag
        self.tally.messages += 1
        write = text if self._in_text else lambda told: binary(told, self._spec.num_experts)
        self._socket.send(write(message))

    def _advance(self, names: list[int]) -> None:
        told = [self._sequences[name] for name in names]
        tokens = [sequence.tokens[-1] for sequence in told]
        state = tuple(np.concatenate(parts) for parts in zip(*(token.state for token in tokens), strict=True))
        after = self._speculator.advance(
            state,
            np.array([token.token_id for token in tokens]),
            np.stack([token.experts for token in tokens]),
            np.stack([token.gates for token in tokens]),
        )
        for row, sequence in enumerate(told):
            sequence.state = tuple(part[row : row + 1].copy() for part in after)
            sequence.seen = -1

    def _routed(self, tokens: int, layers: int) -> tuple[Array, Array, Array]:
        shape = (tokens, layers, self._spec.num_experts)
        experts = self._routing.random(shape).argsort(-1)[..., : self._spec.top_k].astype(np.int32)
        gates = self._routing.uniform(0.1, 2.0, experts.shape).astype(np.float32)
        return self._routing.integers(-1, 2000, tokens), experts, gates

    def _between(self) -> list[int]:
        return [name for name, sequence in self._sequences.items() if sequence.seen < 0]

    def _within(self) -> list[int]:
        return [name for name, sequence in self._sequences.items() if sequence.seen >= 0]

    def _some(self, names: Any) -> list[int]:
        names = list(names)
        return self._chance.sample(names, self._chance.randint(1, len(names))) if names else []

    def end(self) -> Tally:
        """The tally, once it is over."""
        self.tally.due, self.tally.dropped = self._due, self._dropped
        return self.tally


def _ranked(raw: bytes, num_experts: int) -> Message:
    """A forecast or a union in binary, as arrays."""
    kind, _, n, tag, first_layer, m, dropped = struct.unpack_from("<BBHIHHI", raw)
    item = "u1" if num_experts <= 256 else "<u2"
    rows = n if kind == 129 else 1
    width = (len(raw) - 16 - 8 * n - 2 * rows * m) // (rows * m * (4 + np.dtype(item).itemsize))
    arrays, place = [], 16
    for dtype, shape in (
        ("<u4", (n,)),
        ("<u4", (n,)),
        ("<f4", (rows, m, width)),
        ("<u2", (rows, m)),
        (item, (rows, m, width)),
    ):
        arrays.append(np.frombuffer(raw, dtype, int(np.prod(shape)), place).reshape(shape))
        place += arrays[-1].nbytes
    if place != len(raw):
        raise Violation(f"a frame of {len(raw)} bytes says that it has {place}")
    names = ("names", "tokens", "probabilities", "sizes", "experts")
    kinds = {129: "forecast", 130: "union"}
    told = dict(zip(names, arrays, strict=True))
    told["names"], told["tokens"] = told["names"].tolist(), told["tokens"].tolist()
    return {"type": kinds[kind], "tag": tag, "first_layer": first_layer, "dropped": dropped, **told}


def _plain(answer: Message) -> Message:
    """An answer in text as `_ranked` gives it."""
    if answer["type"] == "forecast":
        lists = [prediction["layers"] for prediction in answer["predictions"]]
        names = [prediction["sequence"] for prediction in answer["predictions"]]
        tokens = [prediction["token"] for prediction in answer["predictions"]]
    elif answer["type"] == "union":
        lists, names, tokens = [answer["layers"]], answer["sequences"], answer["tokens"]
    else:
        return answer
    sizes = np.array([[len(layer["experts"]) for layer in layers] for layers in lists])
    experts = np.zeros((*sizes.shape, sizes.max()), np.int64)
    probabilities = np.zeros(experts.shape, np.float32)
    for row, layers in enumerate(lists):
        for place, layer in enumerate(layers):
            experts[row, place, : sizes[row, place]] = layer["experts"]
            probabilities[row, place, : sizes[row, place]] = layer["probabilities"]
    return {
        **answer,
        "names": names,
        "tokens": tokens,
        "sizes": sizes,
        "experts": experts,
        "probabilities": probabilities,
    }
