"""The front door: it lists its subcommands, turns errors into messages, and ends quietly."""

import subprocess
import sys
from pathlib import Path

import pytest

from specmoe import cli
from traces.errors import SpecMoEError

ROOT = Path(__file__).parents[2]


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.SUBCOMMANDS)


def test_every_subcommand_has_a_module_of_its_own() -> None:
    modules = {path.stem for path in (ROOT / "specmoe" / "commands").glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in cli.SUBCOMMANDS}


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: specmoe {name}")


def test_an_unknown_subcommand_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict"])
    assert ended.value.code == 2
    assert "invalid choice: 'predict'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SpecMoEError("It is 3.", remedy="Make it 4."), 2, "specmoe: It is 3. Make it 4."),
        (ModuleNotFoundError("no torch", name="torch"), 2, "pip install '.[training]'"),
        (ModuleNotFoundError("no arrow", name="pyarrow.parquet"), 2, "pip install '.[traces]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["bad input", "no torch", "no pyarrow", "interrupted"],
)
def test_a_failure_becomes_a_message_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str, arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["serve"]) == status
    assert message in capsys.readouterr().err


def test_a_module_that_no_extra_brings_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, arguments: list[str]) -> int:
        raise ModuleNotFoundError("gone", name="specmoe.commands.gone")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve"])


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys; from specmoe import cli\n"
        "def many(name, arguments):\n"
        "    for _ in range(500): print('x' * 1000)\n"
        "    sys.stdout.flush()\n"
        "    return 0\n"
        "cli._run = many\n"
        "sys.exit(cli.main(['store']))"
    )
    piped = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" -c "$CODE" | head -1 >/dev/null'],
        env={"CODE": code, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (piped.returncode, piped.stderr) == (0, "")
