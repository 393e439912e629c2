"""Settings: what is refused, and that the documentation knows each.

.venv/bin/python -m pytest tests/service/test_settings.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from service.errors import SettingsInvalid
from service.settings import ModelChoice, Settings, read_settings, variable

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def documented() -> dict[str, str]:
    """variable -> default, as the table of docs/settings.md has them."""
    rows = re.findall(r"^\| `(SPECMOE_\w+)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: default.strip("`") for name, default in rows}


def test_the_documentation_lists_every_setting_and_no_other() -> None:
    assert list(documented()) == [variable(name) for name in Settings.model_fields]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_documentation_tells_the_default(name: str) -> None:
    default = Settings.model_fields[name].default
    said = documented()[variable(name)]
    assert said == {None: "unset", (): "empty"}.get(
        default, f"{default:g}" if isinstance(default, float) else str(default)
    )


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is_for(name: str) -> None:
    assert Settings.model_fields[name].description


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOE_PORT", "9000")
    monkeypatch.setenv("SPECMOE_MODELS", "one, two@3,three@candidate")
    settings = read_settings()
    assert settings.port == 9000
    assert settings.models == (ModelChoice("one"), ModelChoice("two", 3), ModelChoice("three", "candidate"))


def test_a_flag_goes_before_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOE_PORT", "9000")
    assert read_settings(port="9001").port == 9001


def test_an_unknown_variable_is_refused_with_the_likeliest_meant() -> None:
    with pytest.raises(SettingsInvalid, match="SPECMOE_MAX_INFLIGHT: no such setting") as refused:
        read_settings({"SPECMOE_MAX_INFLIGHT": "3", "PATH": "/bin"})
    assert "did you mean SPECMOE_MAX_IN_FLIGHT?" in refused.value.remedy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "http"}, "SPECMOE_PORT is 'http': expected a valid integer"),
        ({"port": "70000"}, "SPECMOE_PORT is '70000': expected less than or equal to 65535"),
        ({"provider": "tpu"}, "SPECMOE_PROVIDER is 'tpu': expected 'auto', 'cpu' or 'cuda'"),
        ({"models": "a@"}, "SPECMOE_MODELS is 'a@': 'a@' is not model, model@version or model@alias"),
        ({"models": "a@0"}, "'a@0' is not model"),
        ({"models": "../a"}, "'../a' is not model"),
        ({"models": "a@B"}, "'a@B' is not model"),
        ({"models": "a,b,a@2"}, "a stands there twice"),
        ({"store": ""}, "SPECMOE_STORE is ''"),
        ({"access_log_share": "2"}, "SPECMOE_ACCESS_LOG_SHARE is '2': expected less than or equal to 1"),
        ({"body_timeout_seconds": "0"}, "SPECMOE_BODY_TIMEOUT_SECONDS is '0': expected greater than 0"),
        ({"follow_seconds": "nan"}, "SPECMOE_FOLLOW_SECONDS is 'nan'"),
        (
            {"max_in_flight": "0", "log_level": "loud"},
            "SPECMOE_MAX_IN_FLIGHT is '0'.*SPECMOE_LOG_LEVEL is 'loud'",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_named_with_what_was_expected(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsInvalid, match=message.replace("(", r"\(")):
        read_settings({}, **flags)


def test_settings_listen_on_loopback_unless_told_otherwise() -> None:
    assert Settings().host == "127.0.0.1"
