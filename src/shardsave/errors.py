"""Everything that shardsave raises on its own account.

Every message has one shape: *what failed: where: what was wanted, what was found; the state of things now.*
Wrong arguments are plain ``TypeError`` and ``ValueError``, raised before anything happens.
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
    "UnsupportedTensorError",
]


def an(noun: str) -> str:
    """``a list``, ``an int``: what was found, for a message."""
    vowel = noun[:1].lower() in "aeio" or noun[:2].lower() == "un"
    return f"{'an' if vowel else 'a'} {noun}"


class ShardSaveError(Exception):
    """The base of every error of this package."""


class CheckpointNotFoundError(ShardSaveError):
    """There is no checkpoint at the path given."""


class CorruptCheckpointError(ShardSaveError):
    """The bytes on disk are not those that were saved, or are not a legal checkpoint."""


class IncompatibleCheckpointError(ShardSaveError):
    """The checkpoint is whole, but does not fit the module, or needs a newer reader."""


class UnsupportedTensorError(ShardSaveError):
    """A tensor cannot be stored, or cannot be filled; the message names it."""


class SaveNotCommittedError(ShardSaveError):
    """The save failed; nothing was committed, and what was there before is intact."""


class OutOfSpaceError(SaveNotCommittedError):
    """The save failed for want of room on disk or of memory for staging; nothing was committed."""


class DurabilityUncertainError(ShardSaveError):
    """The new checkpoint is in place, but the system did not confirm that it would survive a loss of power."""


class DirectoryBusyError(ShardSaveError):
    """Others kept saving into the directory for as long as we were prepared to wait."""


class UnsupportedModuleError(ShardSaveError):
    """A module holds what cannot be kept as data, a lambda for example; the message has the place of each."""


class UntrustedCodeError(ShardSaveError):
    """An architecture asks for classes or functions that were not trusted; the message names all, none was imported."""
