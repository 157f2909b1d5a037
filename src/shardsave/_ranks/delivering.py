"""Loads: brings what one rank reads to all ranks that need it, block by block, while the readers' engines read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardsave._common.coverage import Extent
from shardsave._common.spread import Spread
from shardsave._engine.blocks import Blocks
from shardsave._engine.transfer import Piece, Windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._ranks.session import Session


class Reading(NamedTuple):
    """What one rank reads. The n-th row of ``extents`` is the extent of piece n, as `_engine.blocks.blocks` wants it (file, offset, length,
    grain); ``tensor`` and ``start``: which tensor the piece belongs to, and at which byte of it the piece begins."""

    extents: NDArray[np.int64]
    tensor: NDArray[np.int64]
    start: NDArray[np.int64]


class Delivering:
    """The exchange of one load. All ranks make it with equal ``readings``, one for each rank.

    ``targets``: the tensors by number, each with the boxes that this rank fills (`Spread.local`). ``takers(tensor, reader)``: which rank
    takes which boxes of what ``reader`` reads; by default every rank takes all its boxes.

    Use: make it, `start`, then ``engine.read(files, delivering.blocks, delivering.pieces, windows=delivering.windows, …)`` (also where there
    is nothing to read), `finish`; `close` in any case. The sums of the run are those of this rank's pieces. A piece that this rank alone
    needs, and whose place is contiguous, is read straight into it.
    """

    blocks: Blocks
    pieces: list[Piece]
    windows: Windows
    sent_bytes: int
    received_bytes: int
    peak_bytes: int

    def __init__(
        self,
        session: Session,
        readings: Sequence[Reading],
        targets: Sequence[Spread],
        takers: Callable[[int, int], Sequence[tuple[int, Extent]]] | None = None,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """As `Shipping.start`; from now on local tensors are written."""

    def finish(self) -> None:
        """Waits until this rank's boxes are filled, and the other ranks have taken everything that it read."""

    def close(self) -> None:
        """As `Shipping.close`."""
