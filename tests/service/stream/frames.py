"""Messages of a stream, written and read by the tables of docs/stream-protocol.md alone: a client's side.

A message is what its JSON form is, a dict; `binary` and `text` write it, `read` reads an answer.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

KINDS = {"hello": 1, "open": 2, "context": 3, "start": 4, "routing": 5, "end": 6, "ask": 7, "close": 8}
ANSWERS = {128: "welcome", 129: "forecast", 130: "union", 131: "error", 132: "goodbye", 133: "expired"}

Message = dict[str, Any]


def frame(
    kind: int,
    *,
    flags: int = 0,
    count: int = 0,
    tag: int = 0,
    first_layer: int = 0,
    layers: int = 0,
    extra: int = 0,
    body: bytes = b"",
) -> bytes:
    """Any header, and what follows it."""
    return struct.pack("<BBHIHHI", kind, flags, count, tag, first_layer, layers, extra) + body


def binary(message: Message, num_experts: int = 8) -> bytes:
    """A client's message as a binary frame."""
    kind, tag = message["type"], message.get("tag", 0)
    if kind == "hello":
        return _hello(message)
    names = message["sequences"] if "sequences" in message else [message["sequence"]]
    head = {"count": len(names), "tag": tag, "flags": 0}
    body = struct.pack(f"<{len(names)}I", *names)
    if message.get("token_ids") is not None:
        head["flags"] |= 1
        body += struct.pack(f"<{len(message['token_ids'])}i", *message["token_ids"])
    if "experts" in message:
        experts = np.asarray(message["experts"])
        head["layers"] = experts.shape[1]
        head["extra"] = experts.shape[0] if kind == "context" else 0
        head["first_layer"] = message.get("first_layer", 0)
        if message.get("gates") is not None:
            head["flags"] |= 2
            body += np.asarray(message["gates"], "<f4").tobytes()
        body += experts.astype("u1" if num_experts <= 256 else "<u2").tobytes()
    return frame(KINDS[kind], body=body, **head)


def _hello(message: Message) -> bytes:
    flags = (
        message.get("per_sequence", True)
        | message.get("union", False) << 1
        | message.get("at_start", True) << 2
        | message.get("adapt", False) << 3
    )
    model = message["model"].encode()
    version = str(message.get("version") or "").encode()
    body = struct.pack(
        "<IfHHHH",
        message.get("deadline_us", 0),
        message.get("coverage") or 0.0,
        message.get("top_n") or 0,
        len(model),
        len(version),
        0,
    )
    return frame(
        1,
        flags=flags,
        tag=message.get("tag", 0),
        first_layer=message.get("every", 1),
        layers=message.get("ahead", 0),
        extra=message.get("protocol", 1),
        body=body + model + version,
    )


def text(message: Message) -> str:
    """A client's message as JSON."""
    return json.dumps(message)


def read(answer: bytes | str, num_experts: int = 8) -> Message:
    """An answer of the service, as its JSON form. A welcome in binary has no `model`."""
    if isinstance(answer, str):
        message: Message = json.loads(answer)
        return message
    kind, flags, count, tag, first_layer, layers, extra = struct.unpack_from("<BBHIHHI", answer)
    body = answer[16:]
    name = ANSWERS[kind]
    if name == "welcome":
        limits = struct.unpack("<HHHHIIII", body)
        names = ("num_layers", "num_experts", "top_k", "protocol", "max_sequences", "max_frame_bytes",
                 "max_context_tokens", "idle_seconds")  # fmt: skip
        uses = {"uses_token_ids": bool(flags & 1), "uses_gates": bool(flags & 2)}
        return {"type": name, "tag": tag, "version": extra, **dict(zip(names, limits, strict=True)), **uses}
    if name == "error":
        assert len(body) == extra
        return {"type": name, "tag": tag, "fatal": bool(flags & 1), **json.loads(body)}
    if name == "goodbye":
        return {"type": name, "milliseconds": extra}
    if name == "expired":
        return {"type": name, "sequences": list(struct.unpack(f"<{count}I", body))}
    told = {"type": name, "tag": tag, "first_layer": first_layer, "dropped": extra}
    return told | _ranked(name, body, count, layers, first_layer, 1 if num_experts <= 256 else 2)


def _ranked(name: str, body: bytes, n: int, m: int, first_layer: int, item: int) -> Message:
    rows = n if name == "forecast" else 1
    width = (len(body) - 8 * n - 2 * rows * m) // (rows * m * (4 + item))
    parts = [
        ("<u4", (n,)),
        ("<u4", (n,)),
        ("<f4", (rows, m, width)),
        ("<u2", (rows, m)),
        (f"<u{item}", (rows, m, width)),
    ]
    arrays, place = [], 0
    for dtype, shape in parts:
        arrays.append(np.frombuffer(body, dtype, int(np.prod(shape)), place).reshape(shape))
        place += arrays[-1].nbytes
    assert place == len(body)
    names, tokens, probabilities, sizes, experts = arrays
    lists = [
        [
            {
                "layer": first_layer + layer,
                "experts": experts[row, layer, :size].tolist(),
                "probabilities": probabilities[row, layer, :size].tolist(),
            }
            for layer, size in enumerate(sizes[row].tolist())
        ]
        for row in range(rows)
    ]
    if name == "union":
        return {"sequences": names.tolist(), "tokens": tokens.tolist(), "layers": lists[0]}
    for layers in lists:
        for distance, layer in enumerate(layers, start=1):
            layer["distance"] = distance
    return {
        "predictions": [
            {"sequence": sequence, "token": token, "layers": layers}
            for sequence, token, layers in zip(names.tolist(), tokens.tolist(), lists, strict=True)
        ]
    }
