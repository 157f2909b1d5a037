"""Moves bytes between ranks, block by block: the owner of a block has a window of memory for it, in which the other ranks work.

The owner's engine takes blocks in an order. When the window of a block may be used, the owner *opens* it for the ranks that take part in
it; each does its work there (a save: fills in its boxes; a load: takes out its boxes) and reports that it is *done*. Within a host the
window is memory that these ranks share; between hosts its parts travel as parcels over gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shardsave._ranks.session import Session

#: What a rank does with its part of a block: owner, number of the block among the owner's, the window.
Work = Callable[[int, int, memoryview], None]


class Exchange:
    """``takes_part(owner, block)``: the ranks that take part in a block, the owner itself not among them, and their bytes in it.

    ``counts``: how many blocks each rank owns that others take part in. ``bytes_go``: "in" for saves, "out" for loads.
    """

    def __init__(
        self,
        session: Session,
        counts: Sequence[int],
        takes_part: Callable[[int, int], dict[int, int]],
        work: Work,
        bytes_go: Literal["in", "out"],
    ) -> None:
        raise NotImplementedError

    def window(self, block: int) -> memoryview | None:
        """The owner's: the window of ``block`` as soon as it may be used (bytes go out), or all ranks are done with it (in); else None."""
        raise NotImplementedError

    def give_back(self, block: int) -> None:
        """The owner's engine has written the window (bytes go in), or has read the file into it (out)."""

    def close(self) -> None:
        """Ends everything; never waits for other ranks."""
