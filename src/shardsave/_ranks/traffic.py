"""What one rank does in the blocks of an exchange: its own blocks and those of others, in windows and in parcels."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shardsave._common.layouts import Extent
from shardsave._common.spread import Spread
from shardsave._ranks.copies import Local, Way, copy_parcel
from shardsave._ranks.shares import Run, Shares


class Parcel(NamedTuple):
    """The bytes of one rank in one block of ``owner``, as they travel between hosts."""

    block: int
    owner: int
    nbytes: int


class Traffic:
    """``rank``: this one. ``run_of`` and ``takers``: as for `Shares`. ``way``: "in" if bytes go into windows, "out" if out of them.

    Threads: all methods may be called on any.
    """

    def __init__(
        self,
        rank: int,
        way: Way,
        run_of: Callable[[int], Run],
        takers: Callable[[Spread, int], Mapping[int, Sequence[Extent]]],
    ) -> None:
        self.rank = rank
        self.way: Way = way
        self._run_of = run_of
        self._takers = takers
        self._shares = Shares(run_of, takers)
        self._local = Local(way)

    def follow_caller(self) -> None:
        """What is copied from and to devices comes after the work that the calling thread has given them."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            tensors = [tensor for tensor in self._run_of(self.rank).tensors if tensor is not None]
            self._local.follow_caller({tensor.cuda_device for tensor in tensors} | {torch.cuda.current_device()})

    def windowed(self) -> NDArray[np.bool_]:
        """For each block of this rank, whether other ranks may take part in it."""
        run = self._run_of(self.rank)
        table, segments, _ = run.blocks
        if not len(table):
            return np.zeros(0, dtype=bool)
        shared = np.array([tensor is not None for tensor in run.tensors], dtype=bool)
        return np.logical_or.reduceat(shared[segments[:, 0]], table[:, 3])

    def taking(self, block: int) -> dict[int, int]:
        """The other ranks that take part in a block of this one, each with the number of bytes."""
        taking = self._shares.taking(self.rank, block)
        taking.pop(self.rank, None)
        return taking

    def in_window(self, owner: int, block: int, window: int) -> int:
        """Copies this rank's share of a block between its tensors and the window, whose address is given. Returns the bytes."""
        return self._local.copy(self._shares.of(owner, block, self.rank), window)

    def in_parcel(self, parcel: Parcel, address: int) -> None:
        """Copies this rank's share of a block between its tensors and a parcel."""
        self._local.copy(self._shares.of(parcel.owner, parcel.block, self.rank), address, packed=True)

    def between(self, rank: int, block: int, window: int, parcel: int) -> None:
        """Copies the share of ``rank`` in a block of this one between the window and a parcel."""
        copy_parcel(self._shares.of(self.rank, block, rank), window, parcel, self.way)

    def may_meet(self, owner: int, rank: int) -> bool:
        """Whether ``rank`` takes part in any tensor of ``owner``."""
        kinds = {id(tensor.layout): tensor for tensor in self._run_of(owner).tensors if tensor is not None}
        return any(rank in self._takers(tensor, owner) for tensor in kinds.values())

    def parcels(self, owners: Sequence[int], rank: int) -> Iterator[Parcel]:
        """What ``rank`` exchanges with ``owners``, in an order that all ranks have: by the number of the block, then by owner."""
        return heapq.merge(*(self._parcels(owner, rank) for owner in owners))

    def _parcels(self, owner: int, rank: int) -> Iterator[Parcel]:
        if not self.may_meet(owner, rank):
            return
        for block in range(len(self._run_of(owner).blocks.table)):
            if nbytes := int(self._shares.of(owner, block, rank).nbytes.sum()):
                yield Parcel(block, owner, nbytes)
