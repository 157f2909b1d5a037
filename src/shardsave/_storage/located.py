"""Where a stored tensor is: the file and the range of its bytes, or several chunks in several files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

from shardsave._format.header import Header


class Located(NamedTuple):
    """A stored tensor and its place: ``offset`` bytes into the file ``shard``. ``checksum`` is None if the file has none.

    ``chunks``: of a tensor that was stored in several chunks; ``shard`` is then the file of the first, and ``offset`` is negative.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int
    checksum: int | None
    chunks: tuple[StoredChunk, ...] = ()

    @property
    def places(self) -> tuple[Located, ...]:
        """The ranges of bytes that have to be read: its chunks, or itself."""
        return tuple(chunk.located for chunk in self.chunks) or (self,)


class StoredChunk(NamedTuple):
    """A box of a stored tensor, which begins at index ``begin``."""

    begin: tuple[int, ...]
    located: Located


def located(shard: str, header: Header) -> Iterator[tuple[str, Located]]:
    """Name → place, for each tensor of the file ``shard``."""
    names, dtypes, shapes, begins, nbytes = header.tensors
    offsets = [header.data_start + begin for begin in begins]
    sums = header.sums if header.sums is not None else repeat(None)
    rows = zip(names, dtypes, shapes, nbytes, repeat(shard), offsets, sums, repeat(()))
    return zip(names, map(Located._make, rows))
