"""The C client, compiled as strictly as compilers can be, and driven from Python.

with Driver(compiled("driver.c", folder)) as client:
    client.connect({"uds": "/run/specmoe.sock"}, top_n=3)
    client("open", [0])
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from tests.deploy.external import require

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "c"
SOURCES = Path(__file__).parent / "c"
STRICT = [
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
COMPILERS = {"c11": ["gcc", "-std=c11"], "c++": ["g++", "-x", "c++", "-std=c++11"]}
OK, INVALID, LOST, GONE = 0, -1, -2, -3
PATIENT_US = 10_000_000


def compiled(source: Path | str, folder: Path, *flags: str, language: str = "c11") -> Path:
    """The program of a source file, which is one of `SOURCES` where only its name is given."""
    compiler, *dialect = COMPILERS[language]
    program = folder / f"{Path(source).stem}-{language}"
    done = subprocess.run(
        [
            require(compiler),
            *dialect,
            *STRICT,
            f"-I{CLIENT}",
            *flags,
            str(SOURCES / source),
            "-o",
            str(program),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return program


def address(reached: dict[str, Any]) -> str:
    """Where a service is, as the C client is told. reached: keyword arguments of the Python client."""
    return f"unix:{reached['uds']}" if "uds" in reached else reached["base_url"]


class Driver:
    """One process with one C client. Leaving it proves that no sanitizer complained."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _, complaints = self._process.communicate()
        if kind is None:
            assert (self._process.returncode, complaints) == (0, "")

    def connect(
        self,
        where: dict[str, Any] | str,
        *,
        model: str = "toy",
        version: str = "-",
        top_n: int = 0,
        coverage: float = 0,
        adapt: bool = False,
        ahead: int = 0,
        every: int = 1,
        at_start: bool = True,
        max_sequences: int = 64,
        timeout_ms: int = 10_000,
    ) -> dict[str, Any]:
        """Open a stream, instead of the one there was."""
        reached = where if isinstance(where, str) else address(where)
        options = (top_n, coverage, int(adapt), ahead, every, int(at_start), max_sequences, timeout_ms)
        return self._say("connect", reached, model, version, *options)

    def __call__(self, command: str, sequences: Sequence[int]) -> dict[str, Any]:
        """open, close, end or ask."""
        return self._say(command, len(sequences), *sequences)

    def crowd(self) -> int:
        """Open files up to a descriptor that select cannot wait for. -1 where that is not allowed."""
        code: int = self._say("crowd")["code"]
        return code

    def start(self, sequences: Sequence[int], token_ids: Sequence[int] | None = None) -> dict[str, Any]:
        told = [0] if token_ids is None else [1, *token_ids]
        return self._say("start", len(sequences), *sequences, *told)

    def route(
        self, sequences: Sequence[int], experts: Any, gates: Any = None, *, layers: int | None = None
    ) -> dict[str, Any]:
        """experts, gates: `[n, m, K]`. layers: m, or a lie about it."""
        experts = np.asarray(experts)
        weights = [] if gates is None else [f"{gate:.9g}" for gate in np.ravel(gates)]
        numbers = (int(gates is not None), layers or experts.shape[1], experts.size)
        return self._say("route", len(sequences), *sequences, *numbers, *experts.ravel().tolist(), *weights)

    def wait(self, sequence: int, timeout_us: int = PATIENT_US) -> dict[str, Any]:
        return self._say("wait", sequence, timeout_us)

    def latest(self, sequence: int) -> dict[str, Any]:
        return self._say("latest", sequence, 0)

    def poll(self) -> dict[str, Any]:
        return self._say("poll")

    def status(self) -> dict[str, Any]:
        return self._say("status")

    def _say(self, *words: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        answer: dict[str, Any] = json.loads(line)
        if "experts" in answer:
            shape = answer["layers"], answer["width"]
            for name in ("experts", "probabilities"):
                answer[name] = np.array(answer[name]).reshape(shape)
        return answer
