"""What can be set: `SPECMOE_*` in the environment, or flags of `specmoe serve`. See docs/settings.md.

SPECMOE_PORT=9000 specmoe serve --models gpt-oss-20b@3
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model_store.documents import ALIAS_NAME, VERSION_NAME
from service.errors import SettingsInvalid
from traces.spec import MODEL_NAME

PREFIX = "SPECMOE_"


@dataclass(frozen=True)
class ModelChoice:
    """A model to serve. `selector`: version, alias, or None for `production`, else the newest."""

    model: str
    selector: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelChoice:
        """From `model`, `model@3` or `model@candidate`. Raises ValueError."""
        model, at, selector = text.partition("@")
        if not MODEL_NAME.fullmatch(model) or (
            at and not ALIAS_NAME.fullmatch(selector) and not VERSION_NAME.fullmatch(selector)
        ):
            raise ValueError(f"{text!r} is not model, model@version or model@alias")
        return cls(model, int(selector) if selector.isdecimal() else selector or None)

    def __str__(self) -> str:
        return self.model if self.selector is None else f"{self.model}@{self.selector}"


def _choices(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    choices = tuple(ModelChoice.parse(part.strip()) for part in value.split(",") if part.strip())
    names = [choice.model for choice in choices]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands there twice")
    return choices


class Settings(BaseSettings):
    """Where the service listens, what it serves and what it refuses. Raises ValidationError: use `read`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = Field(
        "127.0.0.1", description="Address to listen on. There is no authentication: mind who can reach it."
    )
    port: int = Field(8080, ge=0, le=65535, description="TCP port to listen on; 0 lets the system choose.")
    uds: Path | None = Field(None, description="Unix socket to listen on instead of host and port.")
    store: str | None = Field(
        None,
        min_length=1,
        description="Folder or s3://bucket/prefix of the store; unset: the bundled versions.",
    )
    models: Annotated[tuple[ModelChoice, ...], NoDecode, BeforeValidator(_choices)] = Field(
        (), description="What to serve: model, model@version or model@alias, comma-separated; empty: all."
    )
    provider: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where models run. auto measures a GPU that works beside the CPU, and takes the faster.",
    )
    model_threads: int = Field(1, ge=1, le=256, description="Threads within one model call.")
    worker_threads: int = Field(
        2, ge=1, le=64, description="Large requests that are worked on at the same time."
    )
    follow_seconds: float = Field(
        5.0,
        ge=0.0,
        le=3600.0,
        description="How often aliases and new versions are looked up; 0: only at start.",
    )
    extra_versions: int = Field(
        2,
        ge=0,
        le=64,
        description="Versions kept in memory, beside those served, because requests named them.",
    )
    max_in_flight: int = Field(64, ge=1, le=65536, description="Predictions at the same time; more get 429.")
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="Bytes of a request's body.")
    body_timeout_seconds: float = Field(
        10.0, gt=0.0, le=600.0, description="Time for a request's body to arrive."
    )
    max_sequences: int = Field(256, ge=1, le=65536, description="Sequences in a request.")
    max_context_tokens: int = Field(
        4096, ge=0, le=1 << 20, description="Context tokens in a request, all sequences together."
    )
    max_streams: int = Field(256, ge=1, le=65536, description="Streams that are open at the same time.")
    max_stream_sequences: int = Field(
        16384, ge=1, le=1 << 20, description="Sequences of all streams of a version; each takes some 32 kB."
    )
    max_frame_bytes: int = Field(1 << 20, ge=1024, le=1 << 26, description="Bytes of a stream's message.")
    stream_idle_seconds: int = Field(
        300, ge=1, le=86400, description="A stream's sequence that is not mentioned for so long is forgotten."
    )
    stream_batch_rows: int = Field(
        64,
        ge=1,
        le=1024,
        description="Sequences that one model call of the streams forecasts; 1: no batches.",
    )
    stream_spin_us: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="Microseconds to look for a stream's next message without sleeping; takes a core.",
    )
    stream_score_share: float = Field(
        0.1, ge=0.0, le=1.0, description="Share of the streams' tokens whose forecasts are scored."
    )
    shutdown_seconds: int = Field(
        10, ge=0, le=600, description="Time for requests in flight and streams to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    access_log_share: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of requests that are logged, 0 to 1. Faults always are."
    )

    def named_models(self) -> list[str]:
        """The models that were asked for, as they were written; empty where all are served."""
        return [str(choice) for choice in self.models]


def read_settings(environment: Mapping[str, str] | None = None, **flags: Any) -> Settings:
    """Settings from the environment, flags first. Raises SettingsInvalid naming each wrong one."""
    _refuse_unknown(os.environ if environment is None else environment)
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SettingsInvalid(
            "; ".join(_described(problem) for problem in error.errors(include_url=False)) + ".",
            remedy="docs/settings.md lists every setting and its range.",
        ) from None


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = [variable(field) for field in Settings.model_fields]
    unknown = sorted(
        name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known
    )
    if unknown:
        closest = difflib.get_close_matches(unknown[0].upper(), known, n=1, cutoff=0.0)
        raise SettingsInvalid(
            f"{', '.join(unknown)}: no such setting.",
            remedy=f"Unset it, or did you mean {closest[0]}? docs/settings.md lists them all.",
        )


def _described(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    expected = message.removeprefix("Input should be ")
    if expected != message:
        expected = f"expected {expected}"
    return f"{variable(str(problem['loc'][0]))} is {str(problem['input'])[:80]!r}: {expected}"
