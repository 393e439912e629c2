"""Whatever bytes arrive as a message, they are understood or refused, never anything else: by coverage.

Not a part of `make test`, which tries random ones. It runs until it finds something, or for so many seconds:

    .venv/bin/pip install atheris==3.0.0
    .venv/bin/python tests/fuzz/fuzz_stream.py -max_total_time=600
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["service.stream"]):
    from service.stream import checks
    from service.stream.binary import decode
    from service.stream.text import parse

from service.errors import MessageInvalid, MessageUnreadable
from service.stream.messages import Context, Routing, Start
from traces.spec import RoutingSpec

SPECS = (None, RoutingSpec("toy", 4, 8, 2), RoutingSpec("wide", 2, 300, 1))


def take(data: bytes) -> None:
    """The first byte says how the others are read."""
    how, message = data[:1] or b"\0", data[1:]
    spec = SPECS[how[0] % len(SPECS)]
    try:
        in_text = how[0] & 0x80
        read = parse(message.decode(errors="replace"), spec) if in_text else decode(message, spec)
        if spec and isinstance(read, Routing | Context):
            checks.check_experts(read.experts, spec)
            if read.gates is not None:
                checks.check_gates(read.gates)
        if isinstance(read, Start | Context):
            checks.check_token_ids(read.token_ids)
    except (MessageInvalid, MessageUnreadable) as error:
        (error.message + error.remedy).encode()


if __name__ == "__main__":
    atheris.Setup(sys.argv, take)
    atheris.Fuzz()
