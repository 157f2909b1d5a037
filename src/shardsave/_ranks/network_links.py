"""The links of an exchange between hosts: parcels, which are sent over gloo and copied to and from windows.

No cycle of ranks can wait for each other: each sends, and asks for, its parcels in an order that all ranks have (the number of the block,
then the owner). Of all parcels that have not arrived, the first one in this order has nothing to wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from shardsave._ranks.gloo import MARK_BYTES, Buffers, Gloo
from shardsave._ranks.links import Callbacks, Lost
from shardsave._ranks.traffic import Parcel, Traffic

if TYPE_CHECKING:
    from torch.distributed import Work

    from shardsave._ranks.session import Session

#: The most bytes of parcels that a rank has packed but not sent, or has asked for in blocks of others.
_PARCEL_BYTES = 32 << 20

#: How long `close` waits for the threads, in seconds.
_JOIN_SECONDS = 5.0


class _Moving(NamedTuple):
    """A parcel on its way to or from ``rank``, in ``buffer``. ``window``: the address of the owner's window, on the owner."""

    rank: int
    block: int
    nbytes: int
    window: int
    buffer: torch.Tensor
    work: Work


class NetworkLinks:
    """``owners``: the ranks of other hosts that own blocks. ``windowed``: the blocks of this rank with a window, in order.

    Threads: two of its own, one that packs and sends, and one that waits for parcels and unpacks them. `open`, `may_pack` and `end` may be
    called from any thread.
    """

    def __init__(
        self, exchange: Callbacks, session: Session, traffic: Traffic, owners: Sequence[int], windowed: Sequence[int]
    ) -> None:
        self.lost: dict[int, Lost] = {}
        self.buffers = Buffers()
        self._exchange = exchange
        self._session = session
        self._traffic = traffic
        self._windowed = windowed
        here = session.hosts[session.rank]
        others = [rank for rank in range(session.size) if session.hosts[rank] != here]
        self._owners = [owner for owner in owners if traffic.may_meet(owner, session.rank)]
        self._peers = [rank for rank in others if windowed and traffic.may_meet(session.rank, rank)]
        self._inward = traffic.way == "in"
        self._gloo: Gloo | None = None
        self._changed = threading.Condition()
        self._asked: deque[_Moving] = deque()  # guarded by the condition, as are the three below
        self._to_pack: dict[int, list[tuple[int, int, int]]] = {}  # block → rank, bytes and window of each parcel
        self._may_pack: set[int] = set()
        self._no_more = False
        self._given: set[tuple[int, int]] = set()  # rank and block of the parcels that were sent, and of those asked for
        self._asked_for: set[tuple[int, int]] = set()
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._at_work = 0

    @property
    def ended(self) -> bool:
        """Whether this rank has given and taken all that it has to exchange with other hosts."""
        return self._at_work == 0

    def start(self, token: bytes) -> None:
        """Makes the group of the ranks that need it. Every rank calls it, with the same ``token``, which was never used before."""
        if len({*self._session.hosts}) == 1:
            return
        mine = bool(self._owners or self._peers)
        answers = self._session.exchange("ranks that exchange between hosts", b"1" if mine else b"0")
        if not mine:
            return
        self._gloo = Gloo(self._session, [rank for rank, answer in enumerate(answers) if answer == b"1"], token.decode())
        for action in (self._send_all, self._receive_all):
            thread = threading.Thread(target=self._run, args=(action,), name="shardsave-parcels", daemon=True)
            self._threads.append(thread)
            self._at_work += 1
            thread.start()

    def open(self, rank: int, block: int, nbytes: int, window: int) -> None:
        """The owner's: its window at the address ``window`` is open for a parcel of ``rank``, or holds what is to be in it."""
        with self._changed:
            if not self._inward:
                self._to_pack.setdefault(block, []).append((rank, nbytes, window))
            elif (asked := self._ask(rank, block, nbytes, window)) is not None:
                self._asked.append(asked)
            self._changed.notify_all()
        if self.lost:
            self._exchange.wake()

    def may_pack(self, block: int) -> None:
        """The owner's, where bytes go out: `open` was called for all ranks that take part in ``block``."""
        with self._changed:
            self._may_pack.add(block)
            self._changed.notify_all()

    def end(self) -> None:
        """The owner's: it opens no more windows."""
        with self._changed:
            self._no_more = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads, and the group if they have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._gloo is None:
            return
        if not self.ended:
            self._release_others()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            if not self.ended:  # a thread waits in gloo, until the other process is gone or the time limit is reached
                _left.append(self)
                return
        self._disconnect()

    def _disconnect(self) -> None:
        """Closes the connections. Somebody may still hold this object, by the traceback of an error for example."""
        self._asked.clear()
        if self._gloo is not None:
            self._gloo.close()

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            if not self._closing:
                self._exchange.fail(error)
        finally:
            with self._changed:
                self._at_work -= 1
                is_left = self.ended and self in _left
            self._exchange.wake()
            if is_left:
                _left.remove(self)
                self._disconnect()

    def _send_all(self) -> None:
        moving: deque[_Moving] = deque()
        for rank, block, nbytes, window in self._lane() if self._inward else self._packable():
            while moving and sum(parcel.nbytes for parcel in moving) + nbytes > _PARCEL_BYTES:
                self._sent(moving.popleft())
            if self._closing:
                return
            moving.append(self._pack(rank, block, nbytes, window))
        while moving and not self._closing:
            self._sent(moving.popleft())

    def _receive_all(self) -> None:
        if self._inward:
            while (parcel := self._next_asked()) is not None:
                if self._arrived(parcel):
                    self._traffic.between(parcel.rank, parcel.block, parcel.window, parcel.buffer.data_ptr())
                    self.buffers.give_back(parcel.buffer)
                    self._exchange.done(parcel.rank, parcel.block)
            return
        moving: deque[_Moving] = deque()
        for rank, block, nbytes, _ in self._lane():
            while moving and sum(parcel.nbytes for parcel in moving) + nbytes > _PARCEL_BYTES:
                self._take_in(moving.popleft())
            if self._closing:
                return
            if (asked := self._ask(rank, block, nbytes, 0)) is None:
                self._leave(rank, said=False)
            moving.append(asked)
        while moving and not self._closing:
            self._take_in(moving.popleft())

    def _lane(self) -> Iterator[tuple[int, int, int, int]]:
        """The parcels that this rank exchanges with other owners, in order."""
        for block, owner, nbytes in self._traffic.parcels(self._owners, self._session.rank):
            yield owner, block, nbytes, 0

    def _packable(self) -> Iterator[tuple[int, int, int, int]]:
        """The parcels for other ranks of what this one has read, in the order of blocks, each as soon as it can be packed."""
        for block in self._windowed if self._peers else ():
            with self._changed:
                self._changed.wait_for(lambda: self._closing or block in self._may_pack)
                ready = self._to_pack.pop(block, [])
                self._may_pack.discard(block)
            if self._closing:
                return
            for rank, nbytes, window in ready:
                yield rank, block, nbytes, window

    def _pack(self, rank: int, block: int, nbytes: int, window: int) -> _Moving:
        buffer = self.buffers.take(nbytes)
        if self._inward:
            self._traffic.in_parcel(Parcel(block, rank, nbytes), buffer.data_ptr())
            self._exchange.count(nbytes)
        else:
            self._traffic.between(rank, block, window, buffer.data_ptr())
            self._exchange.done(rank, block)
        assert self._gloo is not None
        self._given.add((rank, block))
        try:
            work = self._gloo.send(buffer[: nbytes + MARK_BYTES], rank, block)
        except RuntimeError:
            self._leave(rank, said=False)
        return _Moving(rank, block, nbytes, window, buffer, work)

    def _ask(self, rank: int, block: int, nbytes: int, window: int) -> _Moving | None:
        """Asks for a parcel; None if the other rank is gone."""
        assert self._gloo is not None
        self._asked_for.add((rank, block))
        buffer = self.buffers.take(nbytes)
        try:
            work = self._gloo.ask(buffer[: nbytes + MARK_BYTES], rank, block)
        except RuntimeError:
            self.lost.setdefault(rank, Lost(rank, said=False))
            return None
        return _Moving(rank, block, nbytes, window, buffer, work)

    def _next_asked(self) -> _Moving | None:
        """The parcel to wait for; None if no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._asked or self._no_more or not self._peers)
            return self._asked.popleft() if self._asked and not self._closing else None

    def _take_in(self, parcel: _Moving) -> None:
        if self._arrived(parcel):
            self._traffic.in_parcel(Parcel(parcel.block, parcel.rank, parcel.nbytes), parcel.buffer.data_ptr())
            self.buffers.give_back(parcel.buffer)
            self._exchange.count(parcel.nbytes)

    def _sent(self, parcel: _Moving) -> None:
        if self._arrived(parcel):
            self.buffers.give_back(parcel.buffer)

    def _arrived(self, parcel: _Moving) -> bool:
        """Waits until ``parcel`` has been sent, or has come as a whole. False if the links are being closed."""
        assert self._gloo is not None
        try:
            self._gloo.wait(parcel.work)
        except RuntimeError:
            self._leave(parcel.rank, said=False)
        if self._closing:  # the window may be gone
            return False
        if not self._gloo.is_whole(parcel.buffer[: parcel.nbytes + MARK_BYTES]):
            self._leave(parcel.rank, said=True)
        return True

    def _leave(self, rank: int, *, said: bool) -> NoReturn:
        """Notes that ``rank`` is lost, and ends this thread when the links are closed."""
        self.lost.setdefault(rank, Lost(rank, said))
        self._exchange.wake()
        with self._changed:
            self._changed.wait_for(lambda: self._closing)
        raise _Left

    def _release_others(self) -> None:
        """Lets ranks go on that wait for parcels from this one, or for this one to ask for theirs: it will do neither."""
        assert self._gloo is not None
        me, given, asked = self._session.rank, self._given, self._asked_for
        for owner in self._owners:
            lane = self._traffic.parcels([owner], me)
            self._release(
                owner, ((block, nbytes) for block, _, nbytes in lane), given if self._inward else asked, sends=self._inward
            )
        for rank in self._peers:
            lane = self._traffic.parcels([me], rank)
            self._release(
                rank, ((block, nbytes) for block, _, nbytes in lane), asked if self._inward else given, sends=not self._inward
            )

    def _release(self, rank: int, lane: Iterator[tuple[int, int]], over: set[tuple[int, int]], *, sends: bool) -> None:
        """``lane``: block and bytes of the parcels between this rank and ``rank``; those ``over`` were sent or asked for."""
        assert self._gloo is not None
        left, nbytes = [], 0
        for parcel in lane:
            if (rank, parcel[0]) not in over:
                left.append(parcel)
                nbytes += parcel[1]
                if nbytes > _PARCEL_BYTES:  # the other rank has no more under way
                    break
        if sends:
            self._gloo.release(rank, [block for block, _ in left])
        else:
            self._gloo.drain(rank, left)


class _Left(Exception):
    """The other rank has left, and the exchange is being closed."""


#: Links whose threads have not ended. They keep the memory that gloo may still write.
_left: list[NetworkLinks] = []
