"""What can go wrong with a store, as one tree.

SpecMoEError
└── StoreError
    ├── StoreUnavailable      the store cannot be read or written (not there, no permission, network)
    ├── ModelNotFound         the store has no version of that model
    ├── VersionNotFound       the model has no such version or alias
    ├── AliasInvalid          a word cannot be an alias
    ├── PublishConflict       others kept writing first; nothing was published or moved
    └── VersionBroken         something in the store is not what was published
        ├── ManifestInvalid   manifest.json or aliases.json does not say what it must
        ├── FileRefused       a file is missing, too large, or lies outside the store
        └── ChecksumMismatch  a file's bytes are not the ones its manifest promises
"""

from __future__ import annotations

from traces.errors import SpecMoEError


class StoreError(SpecMoEError):
    """Something is wrong with a store or with what was asked of it."""


class StoreUnavailable(StoreError):
    """The store cannot be read or written."""


class ModelNotFound(StoreError):
    """The store has no version of that model."""


class VersionNotFound(StoreError):
    """The model has no such version or alias."""


class AliasInvalid(StoreError):
    """A word cannot be an alias."""


class PublishConflict(StoreError):
    """Others kept writing first."""


class VersionBroken(StoreError):
    """Something in the store is not what was published."""


class ManifestInvalid(VersionBroken):
    """manifest.json or aliases.json does not say what it must."""


class FileRefused(VersionBroken):
    """A file is missing, too large, or lies outside the store."""


class ChecksumMismatch(VersionBroken):
    """A file's bytes are not the ones its manifest promises."""
