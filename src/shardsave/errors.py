"""Every error that shardsave raises itself.

Every message has one shape: *what failed: where: what was wanted, what was found; the state of things now.* It is one line that a
terminal can show: control characters in names and paths are escaped.
Wrong arguments raise ``TypeError`` or ``ValueError`` before anything is read or written.
"""

from __future__ import annotations

import errno

from shardsave._printable import printable

__all__ = [
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "DirectoryBusyError",
    "DurabilityUncertainError",
    "IncompatibleCheckpointError",
    "NoSuchTensorError",
    "OutOfMemoryError",
    "OutOfSpaceError",
    "SaveCancelledError",
    "SaveNotCommittedError",
    "ShardSaveError",
    "UnsupportedModuleError",
    "UnsupportedTensorError",
    "UnsupportedTrainingError",
    "UntrustedCodeError",
]


class ShardSaveError(Exception):
    """Base class of all errors of this package. Raised itself if an existing file cannot be read, for example."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(argument) if isinstance(argument, str) else argument for argument in arguments))


class CheckpointNotFoundError(ShardSaveError, FileNotFoundError):
    """There is no checkpoint at the given path. It is also a FileNotFoundError."""

    errno = errno.ENOENT


class CorruptCheckpointError(ShardSaveError):
    """The bytes on disk are not the bytes that were saved, or are not a valid checkpoint."""


class IncompatibleCheckpointError(ShardSaveError):
    """The files are not damaged, but do not fit the module, need a newer shardsave, or are of a kind that the call cannot read."""


class NoSuchTensorError(IncompatibleCheckpointError, KeyError):
    """An open checkpoint has no tensor of that name. It is also a KeyError, because every mapping has to raise one."""

    __str__ = Exception.__str__


class UnsupportedTensorError(ShardSaveError):
    """A tensor cannot be saved, or cannot be filled by a load; the message names it."""


class OutOfMemoryError(ShardSaveError, MemoryError):
    """A load needs more memory than there is; the message has the numbers. It is also a MemoryError."""


class UnsupportedTrainingError(ShardSaveError):
    """The training state holds something that is no data and has no state; the message says where it is."""


class SaveNotCommittedError(ShardSaveError):
    """The save failed and nothing was committed; the previous checkpoint is intact."""


class OutOfSpaceError(SaveNotCommittedError):
    """The disk is full, or there is no memory for staging; nothing was committed."""


class SaveCancelledError(SaveNotCommittedError):
    """The save in the background was cancelled; nothing was committed, the previous checkpoint is intact."""


class DurabilityUncertainError(ShardSaveError):
    """The save was committed, or may have been; the system did not confirm that all of it is on disk. The message says what is known."""


class DirectoryBusyError(ShardSaveError):
    """Another save uses the directory: it held the lock until the time limit was reached, or it changed files meanwhile.

    Also raised by a save in the background that may not wait for another one of this process (``if_busy="raise"``).
    """


class UnsupportedModuleError(ShardSaveError):
    """A module holds values that cannot be stored as data, such as a lambda; the message says where each one is."""


class UntrustedCodeError(ShardSaveError):
    """A file asks for classes, functions or methods that are not trusted; the message lists them, with what would run of each."""
