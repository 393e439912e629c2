"""What clients/c shows is compiled as strictly as can be, and run against the real service.

.venv/bin/python -m pytest tests/contract/test_c_examples.py
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from specmoe_client import Stream

from model_store.store import open_store
from tests.contract.c_client import CLIENT, COMPILERS, ROOT, SOURCES, address, compiled
from tests.contract.running import running_service
from tests.contract.streams import PATIENCE_S
from tests.deploy.external import require
from tests.toy_version import toy_version
from traces.spec import RoutingSpec

README = (CLIENT / "README.md").read_text(encoding="utf-8")
SPEC = RoutingSpec(model="gpt-oss-20b", num_layers=24, num_experts=32, top_k=4)
PATIENT_MS = PATIENCE_S * 1000
LLAMA = f"-I{SOURCES / 'llama'}"
DIALECTS = ["c11", "gnu17", "c++11", "c++20"]
STRICTLY = [
    CLIENT / "example.c",
    SOURCES / "driver.c",
    SOURCES / "decoding.c",
    ROOT / "benchmarks" / "c_client.c",
]
NAMES = re.compile(r"static inline [a-z_0-9 *]*?\b(specmoe_[a-z_]+[a-z])\(")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("examples")
    open_store(root / "store").publish(*toy_version(SPEC))
    with running_service(root / "store", "--uds", str(root / "s")) as reached:
        yield reached


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(CLIENT / "example.c", tmp_path_factory.mktemp("c"))


def ran(program: Path, *arguments: str, told: str = "") -> str:
    """What it printed."""
    done = subprocess.run([program, *arguments], input=told, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def made_up(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [T], experts [T, L, K])."""
    random = np.random.default_rng(5)
    rows = [[random.permutation(32)[:4] for _ in range(24)] for _ in range(tokens)]
    return random.integers(0, 1000, tokens), np.array(rows)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("source", STRICTLY, ids=lambda source: f"{source.parent.name}/{source.stem}")
def test_no_compiler_warns_of_anything(dialect: str, level: str, source: Path, tmp_path: Path) -> None:
    compiler = ["g++", "-x", "c++"] if "++" in dialect else ["gcc"]
    flags = ["-Wall", "-Wextra", "-Wshadow", "-pedantic", "-Werror", f"-I{CLIENT}", LLAMA, level]
    done = subprocess.run(
        [require(compiler[0]), *compiler[1:], f"-std={dialect}", *flags, source, "-o", tmp_path / "program"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_readme_runs_and_gets_forecasts(service: dict[str, Any], tmp_path: Path) -> None:
    code = re.findall(r"```c\n(#include \"specmoe.h\".*?)```", README, re.DOTALL)[0]
    # Its deadline is for a machine that does nothing else, its threshold for a model that was trained.
    changes = {"http://127.0.0.1:8080": address(service), " 200,": " 10000000,", "0.9f": "0.3f"}
    for there, here in changes.items():
        assert there in code
        code = code.replace(there, here)
    (tmp_path / "loop.c").write_text(code)
    assert re.match(r"layer \d+ wants expert \d+\n", ran(compiled(tmp_path / "loop.c", tmp_path)))


def test_the_replayed_file_counts_what_the_python_client_forecasts(
    service: dict[str, Any], replay: Path
) -> None:
    token_ids, experts = made_up(3)
    lines, right = [], 0
    with Stream(**service, model="gpt-oss-20b") as stream:
        assert stream.ready()
        sequence = stream.open()
        for token_id, token in zip(token_ids, experts, strict=True):
            stream.start([sequence], [token_id])
            for layer, routed in enumerate(token):
                forecast = stream.wait(sequence, PATIENT_MS)
                assert forecast is not None
                right += len(set(forecast.experts_of(layer).tolist()) & set(routed.tolist()))
                stream.route([sequence], routed[None])
                lines.append(",".join(map(str, [token_id, layer, *routed])))
    told = "\n".join(lines) + "\n"
    printed = ran(replay, address(service), "gpt-oss-20b", "10000000", told=told)
    assert printed == f"{right} of {3 * 24 * 4} routed experts had been forecast\n"


@pytest.mark.parametrize(
    "line", ["", "7", "7,0,1,2,3", "7,0,1,2,3,4,5", "7,0,1,2,3,x", "7,0,1,2,3,32", "7,1,1,2,3,4"]
)
def test_a_line_that_is_none_is_told(service: dict[str, Any], replay: Path, line: str) -> None:
    done = subprocess.run(
        [replay, address(service), "gpt-oss-20b"], input=line + "\n", capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("line 1: ")


def test_nothing_is_allocated_once_the_stream_is_open(service: dict[str, Any], tmp_path: Path) -> None:
    wrapped = [f"-Wl,--wrap={name}" for name in ("malloc", "calloc", "realloc")]
    program = compiled("allocations.c", tmp_path, "-fno-sanitize=all", *wrapped)
    printed = ran(program, address(service), "gpt-oss-20b")
    assert re.fullmatch(r"[1-9]\d* before, 0 then\n", printed)


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("language", COMPILERS)
def test_llama_cpps_callback_tells_what_the_python_client_tells(
    service: dict[str, Any], tmp_path: Path, language: str, dense: int
) -> None:
    token_ids, experts = made_up(2)
    gates = np.random.default_rng(6).random(experts.shape).astype(np.float32)
    lines, numbers = [], [[24, 4, 32, dense]]
    with Stream(**service, model="gpt-oss-20b") as stream:
        assert stream.ready()
        sequence = stream.open()
        for token_id, token, weights in zip(token_ids, experts, gates, strict=True):
            stream.start([sequence], [token_id])
            numbers.append([token_id])
            for layer in range(24):
                forecast = stream.wait(sequence, PATIENT_MS)
                assert forecast is not None
                lines.append(" ".join(map(str, [layer, *forecast.experts_of(layer)])))
                stream.route([sequence], token[None, layer], weights[None, layer])
                numbers += [token[layer].tolist(), [f"{gate:.9g}" for gate in weights[layer]]]
    program = compiled("decoding.c", tmp_path, LLAMA, language=language)
    told = "\n".join(" ".join(map(str, row)) for row in numbers)
    printed = ran(program, address(service), "gpt-oss-20b", told=told).splitlines()
    assert printed == [*lines, f"prefetched {2 * 23} times"]


def test_the_readme_tells_of_every_function() -> None:
    header = (CLIENT / "specmoe.h").read_text(encoding="utf-8")
    functions = set(NAMES.findall(header.split("Frames of RFC 6455")[0]))
    assert len(functions) == 14
    assert functions == set(re.findall(r"`(specmoe_[a-z_]+)[(`]", README)) - {
        "specmoe_options",
        "specmoe_forecast",
    }
