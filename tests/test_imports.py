"""The import table of docs/architecture.md, proven: by reading the sources, and in fresh interpreters.

.venv/bin/python -m pytest tests/test_imports.py
"""

from __future__ import annotations

import ast
import email
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLIENT = ROOT / "clients" / "python"
LEAVES = frozenset({"traces.spec", "traces.errors"})
OURS = frozenset({"traces", "training", "model_store", "speculation", "service", "specmoe", "specmoe_client"})


@dataclass(frozen=True)
class Room:
    """One row of the table. `may_import`: of ours, besides itself. `must_not_need`: packages kept out."""

    may_import: frozenset[str]
    must_not_need: frozenset[str]
    folder: Path = ROOT


ROOMS = {
    "traces": Room(frozenset(), frozenset({"torch", "fastapi"})),
    "training": Room(frozenset({"traces", "model_store", "speculation"}), frozenset({"fastapi"})),
    "model_store": Room(LEAVES, frozenset({"torch", "fastapi", "onnxruntime"})),
    "speculation": Room(LEAVES | {"model_store"}, frozenset({"torch", "fastapi"})),
    "service": Room(LEAVES | {"model_store", "speculation"}, frozenset({"torch", "pyarrow"})),
    "specmoe_client": Room(
        frozenset(), OURS - {"specmoe_client"} | {"torch", "fastapi", "pyarrow", "onnxruntime"}, CLIENT
    ),
}
CLIENT_NEEDS = {"httpx", "numpy", "websockets"}
HEAVY = ("torch", "pyarrow", "onnxruntime", "fastapi", "numpy", "httpx", "tqdm", "matplotlib", "boto3")


def modules(room: str) -> list[str]:
    """Dotted names of every module of a room."""
    folder = ROOMS[room].folder if room in ROOMS else ROOT
    paths = sorted((folder / room).rglob("*.py"))
    dotted = [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")]


def fresh(code: str, *, without: tuple[str, ...] = ()) -> list[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`. `without`: cannot be imported."""
    blocked = f"import sys, json; sys.modules.update(dict.fromkeys({without!r}))"
    loaded = "sorted({name.partition('.')[0] for name, module in sys.modules.items() if module is not None})"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}\n{code}\nprint('\\n' + json.dumps({loaded}))"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(CLIENT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    packages: list[str] = json.loads(done.stdout.splitlines()[-1])
    return packages


def imported(source: Path, package: str) -> Iterator[str]:
    """Every dotted name that a file imports anywhere in it, functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package if node.level else ""
            yield from (f"{node.module or start}.{alias.name}" for alias in node.names)


def within(name: str, allowed: frozenset[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("room", ROOMS)
def test_no_module_imports_a_room_it_may_not(room: str) -> None:
    allowed = ROOMS[room].may_import | {room}
    trespasses = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOMS[room].folder / room).rglob("*.py")
        for name in imported(path, room)
        if name.partition(".")[0] in OURS and not within(name, allowed)
    ]
    assert not trespasses


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_whole_room_loads_none_of_what_it_must_not_need(room: str) -> None:
    loaded = fresh("\n".join(f"import {name}" for name in modules(room)))
    assert room in loaded
    assert not ROOMS[room].must_not_need & set(loaded)


@pytest.mark.parametrize("room", ["traces", "training", "model_store", "speculation", "service"])
def test_the_table_of_the_documentation_names_the_same_packages(room: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{room}/` \|.*\|.*\|(?P<not_needed>.*)\|$", page, re.MULTILINE)
    assert row is not None
    assert set(row["not_needed"].replace(" ", "").split(",")) == ROOMS[room].must_not_need


def test_the_leaves_everyone_may_import_need_nothing_but_the_standard_library() -> None:
    loaded = fresh("import traces.spec, traces.errors")
    assert not set(HEAVY) & set(loaded)


def test_a_trace_in_memory_needs_no_pyarrow() -> None:
    assert "pyarrow" not in fresh("import traces.trace")


def test_the_client_brings_only_what_its_dependencies_bring() -> None:
    bare = set(fresh("import httpx, numpy, numpy.typing, websockets")) | sys.stdlib_module_names
    assert set(fresh("import specmoe_client")) - bare == {"specmoe_client"}


def test_the_service_makes_its_app_where_torch_and_pyarrow_cannot_be_imported() -> None:
    fresh(
        "from service.app import create_app\nfrom service.settings import Settings\ncreate_app(Settings())",
        without=("torch", "pyarrow"),
    )


def test_help_of_the_command_imports_no_heavy_package() -> None:
    code = "import specmoe.cli\ntry: specmoe.cli.main(['--help'])\nexcept SystemExit: pass"
    assert not set(HEAVY) & set(fresh(code))


def test_an_import_hidden_in_a_function_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "sly.py"
    source.write_text(
        "def f():\n    from training.loop import fit\n    import service.app as a\n    from . import x\n"
    )
    assert list(imported(source, "traces")) == ["training.loop.fit", "service.app", "traces.x"]
    assert not within("traces.trace.RoutingTrace", LEAVES)


def test_a_forbidden_import_would_be_seen() -> None:
    assert "fastapi" in fresh("import fastapi")
    with pytest.raises(AssertionError, match="torch"):
        fresh("import torch", without=("torch",))


@pytest.mark.parametrize(
    ("subcommand", "unneeded"),
    [
        ("serve", {"torch", "pyarrow", "tqdm"}),
        ("replay", {"torch", "fastapi", "onnxruntime", "pyarrow", "tqdm"}),
    ],
)
def test_a_subcommand_imports_only_its_own_room(subcommand: str, unneeded: set[str]) -> None:
    loaded = fresh(f"import specmoe.commands.{subcommand}")
    assert not unneeded & set(loaded)


@pytest.fixture(scope="session")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The client's wheel, built without a network by the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "build", *options, str(CLIENT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_the_client_wheel_requires_httpx_numpy_and_websockets_only(client_wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in client_wheel.namelist() if name.endswith(".dist-info/METADATA"))
    requires = email.message_from_bytes(client_wheel.read(metadata)).get_all("Requires-Dist") or []
    always = [requirement for requirement in requires if "extra ==" not in requirement]
    assert {re.split(r"[^A-Za-z0-9-]", requirement)[0] for requirement in always} == CLIENT_NEEDS


def test_the_client_wheel_holds_one_typed_package(client_wheel: zipfile.ZipFile) -> None:
    files = {name for name in client_wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in files} == {"specmoe_client"}
    assert "specmoe_client/py.typed" in files
