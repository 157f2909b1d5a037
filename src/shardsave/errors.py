"""Every error that shardsave raises itself.

Every message has one shape: *what failed: where: what was wanted, what was found; the state of things now.*
Wrong arguments raise ``TypeError`` or ``ValueError`` before anything is read or written.
"""

from __future__ import annotations

__all__ = [
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "DirectoryBusyError",
    "DurabilityUncertainError",
    "IncompatibleCheckpointError",
    "OutOfSpaceError",
    "SaveNotCommittedError",
    "ShardSaveError",
    "UnsupportedModuleError",
    "UnsupportedTensorError",
    "UntrustedCodeError",
]


class ShardSaveError(Exception):
    """Base class of all errors of this package."""


class CheckpointNotFoundError(ShardSaveError):
    """There is no checkpoint at the given path."""


class CorruptCheckpointError(ShardSaveError):
    """The bytes on disk are not the bytes that were saved, or are not a valid checkpoint."""


class IncompatibleCheckpointError(ShardSaveError):
    """The checkpoint is intact, but does not fit the module, or needs a newer version of shardsave."""


class UnsupportedTensorError(ShardSaveError):
    """A tensor cannot be saved, or cannot be filled by a load; the message names it."""


class SaveNotCommittedError(ShardSaveError):
    """The save failed and nothing was committed; the previous checkpoint is intact."""


class OutOfSpaceError(SaveNotCommittedError):
    """The disk is full, or there is no memory for staging; nothing was committed."""


class DurabilityUncertainError(ShardSaveError):
    """The new checkpoint is in place, but the system did not confirm that it survives a loss of power."""


class DirectoryBusyError(ShardSaveError):
    """Other processes kept saving into the directory until the time limit was reached."""


class UnsupportedModuleError(ShardSaveError):
    """A module holds values that cannot be stored as data, such as a lambda; the message says where each one is."""


class UntrustedCodeError(ShardSaveError):
    """A file names classes or functions that are not trusted; the message lists them, and none of them was imported."""
