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


class ModelNotServed(ServiceError):
    """It names a model that this service does not serve."""


class VersionUnavailable(ServiceError):
    """No answer from this model or version, now."""


class ModelNotReady(VersionUnavailable):
    """The model has not been loaded yet, or is refused."""


class VersionRefused(VersionUnavailable):
    """The version asked for was found unfit to serve."""
