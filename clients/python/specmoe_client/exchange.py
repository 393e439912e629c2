"""One question and its reply, without any waiting: requests made, replies judged, transport errors named.

questions.py -> exchange.py -> httpx transport -> exchange.py -> predictions.py
"""

from __future__ import annotations

import collections.abc
import contextlib
import json
from typing import Any

import httpx

from specmoe_client.deadline import Deadline, TimeLeft
from specmoe_client.errors import (
    AnswerInvalid,
    ClientError,
    NotFound,
    RequestInvalid,
    RequestRefused,
    ServiceUnavailable,
    ServiceUnreachable,
)

# Far above any real answer: 32 sequences x 100 layers x 512 experts are about 30 MB.
MAX_ANSWER_BYTES = 64 << 20
NOT_NOW = frozenset({408, 429})
REFUSALS: dict[int, type[RequestRefused]] = {
    404: NotFound,
    413: RequestInvalid,
    422: RequestInvalid,
}
# An idle connection is dropped after this; the transport also notices when the service closed it before.
LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=60.0)


class Address:
    """Where the service is and what every request carries. Raises ClientError where `base_url` is no URL."""

    def __init__(self, base_url: str, headers: collections.abc.Mapping[str, str] | None) -> None:
        try:
            self._base = httpx.URL(base_url.rstrip("/"))
        except httpx.InvalidURL as error:
            raise _no_url(base_url) from error
        if self._base.scheme not in ("http", "https") or not self._base.host:
            raise _no_url(base_url)
        # Reading the certificates takes longer than many predictions: only where there are some to check.
        self.verify = self._base.scheme == "https"
        self._headers = httpx.Headers({"Accept": "application/json", "User-Agent": "specmoe-client"})
        self._headers.update(headers)
        self._headers_with_body = httpx.Headers(self._headers)
        self._headers_with_body["Content-Type"] = "application/json"
        self._urls: dict[str, httpx.URL] = {}

    def request(self, method: str, path: str, deadline: Deadline, body: bytes | None = None) -> httpx.Request:
        """A request whose waits, in the transport, end with the deadline."""
        if path not in self._urls:
            # Parsing an address takes longer than writing the question.
            raw_path = self._base.raw_path.rstrip(b"/") + path.encode()
            self._urls[path] = self._base.copy_with(raw_path=raw_path)
        return httpx.Request(
            method,
            self._urls[path],
            headers=self._headers if body is None else self._headers_with_body,
            content=body,
            extensions={"timeout": TimeLeft(deadline)},
        )


class Reply:
    """A response whose body arrives in pieces, each of them before the deadline."""

    def __init__(self, response: httpx.Response, deadline: Deadline) -> None:
        self._status = response.status_code
        self._deadline = deadline
        self._pieces: list[bytes] = []
        self._bytes = 0

    def add(self, piece: bytes) -> None:
        """Raises AnswerLate, or AnswerInvalid where the body grows without end."""
        self._deadline.check()
        self._pieces.append(piece)
        self._bytes += len(piece)
        if self._bytes > MAX_ANSWER_BYTES:
            raise AnswerInvalid(
                f"The answer is larger than {MAX_ANSWER_BYTES} bytes.",
                remedy="Ask for fewer sequences or experts, and check that base_url leads to specMoE.",
            )

    def document(self) -> Any:
        """The JSON of a 200. Raises RequestRefused, ServiceUnavailable or AnswerInvalid for anything else."""
        document = self._json()
        if self._status == 200:
            return document
        raise refusal(self._status, document)

    def _json(self) -> Any:
        try:
            return json.loads(b"".join(self._pieces))
        except (ValueError, RecursionError) as error:
            if self._status != 200:
                return None
            raise AnswerInvalid(
                f"The answer is not JSON ({type(error).__name__}).",
                remedy="Check that base_url leads to specMoE itself.",
            ) from error


def refusal(status: int, document: Any) -> ClientError:
    """The error for an answer that is none, in the service's own words where `document` has them."""
    details = _details(document, status)
    if status in NOT_NOW or status >= 500:
        return ServiceUnavailable(**details)
    if 400 <= status < 500:
        return REFUSALS.get(status, RequestRefused)(**details)
    return AnswerInvalid(
        f"The service answered with status {status}, which was not expected here.",
        remedy="Check that base_url leads to specMoE itself, not to a page that redirects.",
    )


def _details(document: Any, status: int) -> dict[str, Any]:
    """The service's own words for a status that is not 200, or ours where something else answered."""
    words = document if isinstance(document, dict) else {}
    return {
        "message": str(words.get("message", f"The service answered with status {status}.")),
        "remedy": str(words.get("remedy", "Look at what stands between this client and the service.")),
        "status": status,
        "code": str(words.get("code", f"http_{status}")),
        "request_id": str(words.get("request_id", "")),
    }


def _no_url(base_url: str) -> ClientError:
    return ClientError(
        f"base_url is {base_url!r}, expected http://host:port.", remedy="Begin with http:// or https://."
    )


@contextlib.contextmanager
def transport_errors(deadline: Deadline) -> collections.abc.Iterator[None]:
    """Turns what the transport raises into this package's errors.

    Only a connection that could not be made is worth another attempt: nothing was asked yet.
    """
    try:
        yield
    except (httpx.TimeoutException, TimeoutError) as error:
        raise deadline.late() from error
    except httpx.TransportError as error:
        raise ServiceUnreachable(
            f"The connection failed ({type(error).__name__}: {error}).",
            remedy="Check that the service runs (/livez) and that base_url or uds leads to it.",
            retryable=isinstance(error, httpx.ConnectError),
        ) from error
