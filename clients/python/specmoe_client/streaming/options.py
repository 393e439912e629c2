"""What a stream asks for, checked before anything is sent: hello is made of it.

Stream(...) -> options.py -> connecting.py

python -c "from specmoe_client.streaming.options import StreamOptions; print(StreamOptions('toy').hello())"
"""

from __future__ import annotations

from dataclasses import dataclass

from specmoe_client.streaming import frames
from specmoe_client.streaming.routing import wrong

MAX_U16, MAX_U32 = 2**16 - 1, 2**32 - 1


@dataclass(frozen=True)
class StreamOptions:
    """model: as in /v1/models. version: a number, an alias, or None for the one that is served.

    top_n: experts a layer. coverage: as many as hold all the routed ones with this probability, 0 to 1.
        With neither, twice the model's top-k. adapt: coverage learns from its misses, so that it holds where
        routing is unlike what the version was made with.
    per_sequence, union: which forecasts come. ahead: layers that one covers at most; 0: all that are left.
    at_start: one comes at the start of a token. every: and after so many layers; 0: after none.
    deadline_ms: a forecast that cannot be sent so soon after its message is not sent at all.

    Raises RequestInvalid where they contradict each other.
    """

    model: str
    version: int | str | None = None
    top_n: int | None = None
    coverage: float | None = None
    adapt: bool = False
    per_sequence: bool = True
    union: bool = False
    ahead: int = 0
    at_start: bool = True
    every: int = 1
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise wrong("model is empty.", "Name a model as /v1/models does.")
        if self.top_n is not None and self.coverage is not None:
            raise wrong(
                f"top_n {self.top_n} and coverage {self.coverage} came together.",
                "Give one of them, or neither.",
            )
        if not (self.per_sequence or self.union):
            raise wrong("Neither per_sequence nor union forecasts are asked for.", "Ask for one, or both.")
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise wrong(f"coverage is {self.coverage}.", "Give a probability between 0 and 1.")
        if self.adapt and self.coverage is None:
            raise wrong("adapt came without coverage.", "Give coverage, or leave adapt out.")
        if self.deadline_ms is not None and not 0 < self.deadline_ms * 1000 <= MAX_U32:
            raise wrong(
                f"deadline_ms is {self.deadline_ms}.", "Give a positive number, or None for no deadline."
            )
        for name, value, least in (
            ("top_n", self.top_n, 1),
            ("ahead", self.ahead, 0),
            ("every", self.every, 0),
        ):
            if value is not None and not least <= value <= MAX_U16:
                raise wrong(f"{name} is {value}.", f"Give {least} to {MAX_U16}.")

    def due(self, first: int, end: int) -> bool:
        """Whether the service forecasts by itself once layers first .. end - 1 were told."""
        return self.every > 0 and end // self.every > first // self.every

    def hello(self) -> bytes:
        """The first message of a connection."""
        flags = (
            self.per_sequence * frames.PER_SEQUENCE
            | self.union * frames.UNION_DEMAND
            | self.at_start * frames.AT_START
            | self.adapt * frames.ADAPT
        )
        return frames.hello(
            self.model,
            "" if self.version is None else str(self.version),
            flags=flags,
            every=self.every,
            ahead=self.ahead,
            # A deadline below a microsecond must not become none.
            deadline_us=0 if self.deadline_ms is None else max(1, round(self.deadline_ms * 1000)),
            coverage=self.coverage or 0.0,
            top_n=self.top_n or 0,
        )
