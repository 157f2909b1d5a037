"""Checksums of what is in memory: the engine sums pieces as if they were written, and no file takes part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardsave._engine import engine
from shardsave._engine.blocks import blocks
from shardsave._engine.transfer import BLOCK_BYTES

if TYPE_CHECKING:
    from shardsave._common.sources import ByteSource

#: Of so many bytes each piece begins at a multiple in the table of blocks, so that no element is cut.
_ALIGNMENT = 64


def checksums(
    pieces: Sequence[ByteSource], *, workers: int | None = None, check: Callable[[], object] = lambda: None
) -> Sequence[int]:
    """The checksum of each of ``pieces``. ``workers``: as for `engine.gather`. ``check`` is called again and again.

    Raises TransferFault, and what ``check`` raises.
    """
    if not pieces:
        return ()
    extents = np.ones((len(pieces), 4), np.int64)
    extents[:, 0] = 0
    extents[:, 2] = [piece.nbytes for piece in pieces]
    extents[0, 1] = 0
    extents[1:, 1] = np.cumsum(-(-extents[:-1, 2] // _ALIGNMENT) * _ALIGNMENT)
    return engine.gather(blocks(extents, BLOCK_BYTES), pieces, workers=workers, tick=lambda done: check()).sums
