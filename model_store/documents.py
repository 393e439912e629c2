"""The store's documents as bytes: manifest.json and aliases.json, written, read and distrusted.

Between the stores (`folder.py`, `s3.py`), which move bytes, and `manifest.py`, which knows what they mean.

    python -m json.tool model_store/bundled/gpt-oss-20b/1/manifest.json
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from model_store.errors import AliasInvalid, ChecksumMismatch, FileRefused, ManifestInvalid, ModelNotFound
from model_store.manifest import MANIFEST, Draft, File, GraphName, Manifest
from traces.spec import MODEL_NAME, SpecError

ALIASES = "aliases.json"
MAX_FILE_BYTES = 512 << 20
MAX_DOCUMENT_BYTES = 4 << 20

ALIAS_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
VERSION_NAME = re.compile(r"[1-9][0-9]{0,8}")

# Shown of a wrong value, so that a message stays one a person reads.
MAX_SHOWN_CHARACTERS = 80

Document = TypeVar("Document")
_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)
_DRAFT: TypeAdapter[Draft] = TypeAdapter(Draft)
_ALIASES: TypeAdapter[dict[str, int]] = TypeAdapter(dict[str, int])


def check_model(model: str) -> str:
    """The name itself, which is safe as a folder. Raises ModelNotFound: no store can hold another one."""
    if not MODEL_NAME.fullmatch(model):
        raise ModelNotFound(
            f"{_shown(model)} is no model name.",
            remedy="Use letters, digits, '.', '_' and '-', 100 characters at most.",
        )
    return model


def check_alias(alias: str) -> str:
    """The alias itself. Raises AliasInvalid where it could be mistaken for a version or a path."""
    if not ALIAS_NAME.fullmatch(alias):
        raise AliasInvalid(
            f"{_shown(alias)} cannot be an alias.",
            remedy="Use lower-case letters, digits and '-', a letter first, 63 characters at most.",
        )
    return alias


def complete(draft: Draft, version: int, graphs: Mapping[GraphName, bytes]) -> Manifest:
    """The manifest under which these graphs are published as `version`, now."""
    return Manifest(
        **{name: getattr(draft, name) for name in Draft.model_fields},
        version=version,
        created=datetime.now(UTC).replace(microsecond=0),
        files={name: _described(content, name) for name, content in graphs.items()},
    )


def check_bytes(manifest: Manifest, name: GraphName, content: bytes, *, origin: str) -> bytes:
    """`content`, if it is what the manifest promises of the file `name`; else ChecksumMismatch."""
    promised = manifest.files[name]
    if len(content) != promised.bytes:
        came, expected = f"{len(content)} bytes", f"{promised.bytes} bytes"
    else:
        came, expected = f"sha256 {hashlib.sha256(content).hexdigest()}", f"sha256 {promised.sha256}"
    if came != expected:
        raise ChecksumMismatch(
            f"{origin} has {came}, its manifest promises {expected}.",
            remedy="Copy the file again from where it was published, or publish the version anew.",
        )
    return content


def written(document: Draft | Mapping[str, int]) -> bytes:
    """A document as UTF-8 JSON, one field a line: readable, and small differences stay small."""
    fields = document.model_dump(mode="json") if isinstance(document, Draft) else dict(document)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    content = f"{{\n{lines}\n}}\n".encode()
    if len(content) > MAX_DOCUMENT_BYTES:
        raise ManifestInvalid(
            f"The manifest would have {len(content)} bytes, {MAX_DOCUMENT_BYTES} are allowed.",
            remedy="Leave large tables out of `metrics` and `predictor.config`.",
        )
    return content


def read_manifest(content: bytes, *, model: str, version: int, origin: str) -> Manifest:
    """The manifest of `model` at `version`. Raises ManifestInvalid naming origin, field and what came."""
    manifest = _read(_MANIFEST, content, origin)
    came, expected = (manifest.spec.model, manifest.version), (model, version)
    if came != expected:
        raise ManifestInvalid(
            f"{origin} is of {came[0]} version {came[1]}, but lies where {model} version {version} belongs.",
            remedy="Versions are published, not copied by hand: publish it anew.",
        )
    return manifest


def read_draft(content: bytes, *, origin: str) -> Draft:
    """What an export says of itself (`draft.json`). Raises ManifestInvalid naming origin, field and value."""
    return _read(_DRAFT, content, origin)


def read_aliases(content: bytes, *, origin: str) -> dict[str, int]:
    """alias -> version. Raises ManifestInvalid."""
    aliases = _read(_ALIASES, content, origin)
    wrong = {a: v for a, v in aliases.items() if not ALIAS_NAME.fullmatch(a) or v < 1}
    if wrong:
        raise ManifestInvalid(
            f"{origin} holds {_shown(wrong)}, expected names that point to versions from 1.",
            remedy=f"Mend {origin}, or remove it and set its aliases again.",
        )
    return aliases


def _read(kind: TypeAdapter[Document], content: bytes, origin: str) -> Document:
    try:
        # Strict: "3" or true is no version 3.
        return kind.validate_json(content, strict=True)
    except ValidationError as error:
        raise ManifestInvalid(f"{origin}: {_problems(error)}.", remedy=_remedy(origin)) from error
    except SpecError as error:
        raise ManifestInvalid(f"{origin}: spec: {error.message}", remedy=_remedy(origin)) from error


def _remedy(origin: str) -> str:
    kind = "publish the version anew" if origin.endswith(MANIFEST) else "write the file anew"
    return f"Use a specMoE at least as new as the one that wrote it, or {kind}."


def _problems(error: ValidationError, most: int = 3) -> str:
    found = error.errors(include_url=False)
    told = [_problem(".".join(map(str, e["loc"])), e["msg"], e["type"], e["input"]) for e in found[:most]]
    return "; ".join(told + ([f"and {len(found) - most} more"] if len(found) > most else []))


def _problem(field: str, reason: str, kind: str, came: object) -> str:
    reason = reason.removeprefix("Value error, ")
    where = f"{field}: " if field else ""
    # A missing field's input is the whole object around it; a validator of ours names what came itself.
    return where + (
        reason if kind in {"missing", "value_error", "json_invalid"} else f"{reason}, came {_shown(came)}"
    )


def _described(content: bytes, name: str) -> File:
    if not 1 <= len(content) <= MAX_FILE_BYTES:
        raise FileRefused(
            f"{name} has {len(content)} bytes, expected 1 to {MAX_FILE_BYTES}.",
            remedy="Export a smaller predictor: it has to run in microseconds anyway.",
        )
    return File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"
