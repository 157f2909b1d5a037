"""The phases of a transaction, in their order. The phase alone decides whether a transaction that ends may remove what it wrote."""

from __future__ import annotations

from enum import IntEnum


class Phase(IntEnum):
    """How far a transaction has come. It only moves forward, by `then`."""

    #: The directory has not been read yet. At most an empty staging directory was made.
    UNREAD = 0

    #: The previous checkpoint is known. Whatever is written has a name that no index mentions.
    STAGING = 1

    #: The rename of the index was attempted: the previous or the new checkpoint is in place, and nobody knows which. Nothing is
    #: removed unless the index is re-read and proves to be the previous one. A save whose outcome stays uncertain ends here.
    RENAMING = 2

    #: The index was re-read after a failure, and is the previous one.
    NOT_COMMITTED = 3

    #: The new index is in place, and durable if that was requested. What follows (companions, cleaning) cannot undo that.
    COMMITTED = 4

    def then(self, later: Phase) -> Phase:
        """Returns ``later``, which must be a phase that may follow this one."""
        assert later in _MAY_FOLLOW[self], (self, later)
        return later

    @property
    def removable(self) -> bool:
        """Whether what was written is certain to belong to no checkpoint, so that a transaction that ends removes it."""
        return self in (Phase.UNREAD, Phase.STAGING, Phase.NOT_COMMITTED)


_MAY_FOLLOW: dict[Phase, set[Phase]] = {
    Phase.UNREAD: {Phase.STAGING},
    Phase.STAGING: {Phase.RENAMING},
    Phase.RENAMING: {Phase.NOT_COMMITTED, Phase.COMMITTED},
    Phase.NOT_COMMITTED: set(),
    Phase.COMMITTED: set(),
}
