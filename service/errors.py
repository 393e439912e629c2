"""What the service itself refuses, as one tree. HTTP is not known here: `service.problems` maps it.

SpecMoEError
└── ServiceError
    ├── SettingsInvalid          a setting is not what it must be, or is none of ours
    ├── AddressUnavailable       the port or the socket cannot be listened on
    ├── RequestInvalid           a request is not what the documentation says
    │   └── BatchTooLarge        it asks for more sequences or context tokens than are allowed
    ├── BodyTooLarge             its body has more bytes than are allowed
    ├── BodyLate                 its body did not arrive in time
    ├── MediaTypeUnsupported     its body is not JSON
    ├── Overloaded               more requests are in flight than are allowed
    ├── UpgradeRequired          plain HTTP came where a WebSocket was expected
    ├── MessageInvalid           a message of a stream is refused; the stream goes on
    │   ├── ContextTooLong       it adds more history than may wait
    │   └── SequencesExhausted   it opens more sequences than are allowed
    ├── MessageUnreadable        a message of a stream cannot be understood
    ├── HelloLate                a stream did not say what it is for in time
    ├── StreamsExhausted         more streams are open than are allowed
    ├── ModelNotServed           it names a model that this service does not serve
    └── VersionUnavailable       no answer from this model or version, now
        ├── ModelNotReady        the model has not been loaded yet, or is refused
        └── VersionRefused       the version asked for was found unfit to serve
"""

from __future__ import annotations

from traces.errors import SpecMoEError


class ServiceError(SpecMoEError):
    """The service refuses something."""


class SettingsInvalid(ServiceError):
    """A setting is not what it must be, or is none of ours."""


class AddressUnavailable(ServiceError):
    """The port or the socket cannot be listened on."""


class RequestInvalid(ServiceError):
    """A request is not what the documentation says."""


class BatchTooLarge(RequestInvalid):
    """It asks for more sequences or context tokens than are allowed."""


class BodyTooLarge(ServiceError):
    """Its body has more bytes than are allowed."""


class BodyLate(ServiceError):
    """Its body did not arrive in time."""


class MediaTypeUnsupported(ServiceError):
    """Its body is not JSON."""


class Overloaded(ServiceError):
    """More requests are in flight than are allowed."""


class UpgradeRequired(ServiceError):
    """Plain HTTP came where a WebSocket was expected."""


class MessageInvalid(ServiceError):
    """A message of a stream is refused; the stream goes on."""


class ContextTooLong(MessageInvalid):
    """It adds more history than may wait to be taken in."""


class SequencesExhausted(MessageInvalid):
    """It opens more sequences than are allowed."""


class MessageUnreadable(ServiceError):
    """A message of a stream cannot be understood, so that what follows could not be either."""


class HelloLate(ServiceError):
    """A stream did not say what it is for in time."""


class StreamsExhausted(ServiceError):
    """More streams are open than are allowed."""


class ModelNotServed(ServiceError):
    """It names a model that this service does not serve."""


class VersionUnavailable(ServiceError):
    """No answer from this model or version, now."""


class ModelNotReady(VersionUnavailable):
    """The model has not been loaded yet, or is refused."""


class VersionRefused(VersionUnavailable):
    """The version asked for was found unfit to serve."""
