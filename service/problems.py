"""Errors as HTTP: one table from domain error to status and code, and the body that every error has.

.venv/bin/python -m pytest tests/service/test_problems.py
"""

from __future__ import annotations

from typing import NamedTuple

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from model_store import errors as store
from service import errors as service
from speculation import errors as speculation
from traces import errors as traces
from traces.errors import SpecMoEError
from traces.spec import SpecError

# A client that meets a service which is busy or starting may as well wait a second.
RETRY_AFTER_SECONDS = 1


class Kind(NamedTuple):
    """HTTP status and stable code of an error."""

    status: int
    code: str


INTERNAL = Kind(500, "internal")
VERSION_REFUSED = Kind(503, "version_refused")
STORE_UNAVAILABLE = Kind(503, "store_unavailable")
INVALID_REQUEST = Kind(422, "invalid_request")

# Every domain error the service can see. Those of writing and starting are faults where a request meets them.
KINDS: dict[type[SpecMoEError], Kind] = {
    SpecMoEError: INTERNAL,
    traces.TraceError: INTERNAL,
    traces.TraceFormatError: INTERNAL,
    SpecError: VERSION_REFUSED,
    store.StoreError: STORE_UNAVAILABLE,
    store.StoreUnavailable: STORE_UNAVAILABLE,
    store.ModelNotFound: Kind(404, "model_not_found"),
    store.VersionNotFound: Kind(404, "version_not_found"),
    store.AliasInvalid: INVALID_REQUEST,
    store.PublishConflict: INTERNAL,
    store.VersionBroken: VERSION_REFUSED,
    store.ManifestInvalid: VERSION_REFUSED,
    store.FileRefused: VERSION_REFUSED,
    store.ChecksumMismatch: VERSION_REFUSED,
    speculation.SpeculationError: INTERNAL,
    speculation.InputInvalid: INVALID_REQUEST,
    speculation.CoverageUnknown: INVALID_REQUEST,
    speculation.OutlookUnknown: INVALID_REQUEST,
    speculation.ProviderUnavailable: VERSION_REFUSED,
    speculation.GraphFailed: INTERNAL,
    speculation.GraphRefused: VERSION_REFUSED,
    speculation.GoldenMismatch: VERSION_REFUSED,
    service.ServiceError: INTERNAL,
    service.SettingsInvalid: INTERNAL,
    service.AddressUnavailable: INTERNAL,
    service.RequestInvalid: INVALID_REQUEST,
    service.BatchTooLarge: Kind(413, "batch_too_large"),
    service.BodyTooLarge: Kind(413, "body_too_large"),
    service.BodyLate: Kind(408, "body_timeout"),
    service.MediaTypeUnsupported: Kind(415, "unsupported_media_type"),
    service.Overloaded: Kind(429, "overloaded"),
    service.UpgradeRequired: Kind(426, "upgrade_required"),
    service.MessageInvalid: Kind(422, "invalid_message"),
    service.ContextTooLong: Kind(413, "context_too_long"),
    service.SequencesExhausted: Kind(429, "too_many_sequences"),
    service.MessageUnreadable: Kind(400, "unreadable_message"),
    service.HelloLate: Kind(408, "hello_timeout"),
    service.StreamsExhausted: Kind(429, "too_many_streams"),
    service.ModelNotServed: Kind(404, "model_not_found"),
    service.VersionUnavailable: Kind(503, "not_ready"),
    service.ModelNotReady: Kind(503, "not_ready"),
    service.VersionRefused: VERSION_REFUSED,
}


class Problem(NamedTuple):
    """An error as the caller gets it."""

    kind: Kind
    message: str
    remedy: str
    headers: dict[str, str]

    def response(self, request_id: str, **more: object) -> Response:
        """The answer. `more`: further fields of the body."""
        body = {
            "code": self.kind.code,
            "message": self.message,
            "remedy": self.remedy,
            "request_id": request_id,
            **more,
        }
        return Response(orjson.dumps(body), self.kind.status, self.headers, "application/json")


def problem(error: Exception) -> Problem:
    """What a caller is told of an error: all of a domain error, nothing of an unexpected one."""
    if isinstance(error, SpecMoEError):
        kind = next(KINDS[base] for base in type(error).__mro__ if base in KINDS)
        waits = kind.status in (429, 503)
        return Problem(
            kind, error.message, error.remedy, {"Retry-After": str(RETRY_AFTER_SECONDS)} if waits else {}
        )
    if isinstance(error, HTTPException):
        return _of_routing(error)
    return Problem(
        INTERNAL,
        "The service failed at this request.",
        "Report it with the request id: the log has the details under it.",
        {},
    )


def _of_routing(error: HTTPException) -> Problem:
    """What the router itself refuses: a path or a method."""
    headers = dict(error.headers or {})
    if error.status_code == 405:
        return Problem(
            Kind(405, "method_not_allowed"),
            "This path does not take that method.",
            f"It takes {headers.get('Allow', headers.get('allow', 'another one'))}.",
            headers,
        )
    return Problem(
        Kind(404, "not_found"), "There is nothing at this path.", "/openapi.json lists the paths.", headers
    )
