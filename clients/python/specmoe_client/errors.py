"""What can go wrong between a decode loop and the service.

    ClientError
    ├── NoPrediction            no usable answer in time: decoding goes on without one
    │   ├── AnswerLate          the deadline passed first
    │   ├── ServiceUnreachable  no connection, or it broke before the answer was complete
    │   ├── ServiceUnavailable  the service is there but cannot answer now (408, 429, 5xx)
    │   ├── MessageRefused      a stream goes on, but the service applied nothing of one of its messages
    │   └── AnswerInvalid       what came is not a specMoE answer
    └── RequestRefused          the request is wrong and will stay wrong: mend the program
        ├── NotFound            no such model, version or alias (404)
        └── RequestInvalid      wrong shapes, ids or options, or too large a body (413, 422)

`predict` returns None for the first branch unless it is told to raise; the second branch is always raised.
A stream raises at once what is wrong with its arguments; what the service refuses it for, `ready` raises.
"""

from __future__ import annotations


class ClientError(Exception):
    """Any error of this package. `message`: what happened; `remedy`: what to do about it."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(f"{message} {remedy}")
        self.message = message
        self.remedy = remedy


class NoPrediction(ClientError):
    """The service gave no usable answer in time. `reason`: one word, fit for a metric's label.

    `retryable`: asking again within a few milliseconds may help.
    """

    reason = "none"

    def __init__(self, message: str, *, remedy: str, retryable: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.retryable = retryable


class AnswerLate(NoPrediction):
    """The total deadline passed before the answer was complete."""

    reason = "late"


class ServiceUnreachable(NoPrediction):
    """No connection could be made, or it broke, or spoke no HTTP, before the answer was complete."""

    reason = "unreachable"


class ServiceUnavailable(NoPrediction):
    """The service cannot predict now: still warming up, too busy, or failing inside.

    `status` of HTTP; `code`: the service's own word; `request_id`: where to look in its log.
    """

    reason = "unavailable"

    def __init__(self, message: str, *, remedy: str, status: int, code: str, request_id: str) -> None:
        # Only "not now" is worth asking again at once; a failure inside will repeat.
        super().__init__(message, remedy=remedy, retryable=status == 503)
        self.status = status
        self.code = code
        self.request_id = request_id


class MessageRefused(NoPrediction):
    """The service refused a message of a stream: its sequences have no forecasts until they are opened again.

    `code`: the service's own word.
    """

    reason = "refused"

    def __init__(self, message: str, *, remedy: str, code: str) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class AnswerInvalid(NoPrediction):
    """The answer is not what a specMoE service of this version sends."""

    reason = "invalid"


class RequestRefused(ClientError):
    """The service refused the request for what it asks.

    `status` of HTTP; `code`: the service's own word; `request_id`: where to look in its log.
    """

    def __init__(self, message: str, *, remedy: str, status: int, code: str, request_id: str) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.code = code
        self.request_id = request_id


class NotFound(RequestRefused):
    """The service has no such model, version or alias."""


class RequestInvalid(RequestRefused):
    """The request's shapes, ids or options are wrong, or its body is too large."""
