"""Moves bytes between ranks, block by block: the owner of a block has a window of memory for it, in which the other ranks work.

The owner's engine takes blocks in an order. When the window of a block may be used, the owner *opens* it for the ranks that take part in
it; each does its work there (a save: fills in its boxes; a load: takes out its boxes) and reports that it is *done*. Within a host the
window is memory that these ranks share (`host_links.py`); between hosts its shares travel as parcels (`network_links.py`).

No cycle of ranks can wait for each other: a rank works whenever a window is opened for it, and an owner opens the window of a block as
soon as an earlier block, which an engine that takes blocks in order already has, does not need the memory any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardsave._engine.transfer import BLOCK_BYTES
from shardsave._ranks.host_links import HostLinks
from shardsave._ranks.links import Lost
from shardsave._ranks.network_links import NetworkLinks
from shardsave._ranks.windows import SharedMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._ranks.session import Session
    from shardsave._ranks.traffic import Traffic

#: How many windows a rank has for the blocks that it owns. More would let fast ranks work further ahead, and take more memory.
WINDOWS = 3

#: How long an owner's worker waits before it looks whether its run still goes on, and a rank before it looks for errors; in seconds.
_WAIT = 0.05


class _Block:
    """A block with a window, on its owner. ``open``: the window may be used for it. ``missing``: ranks that are not yet done with it;
    None until it was opened for them."""

    __slots__ = ("missing", "number", "open", "place", "worked")

    def __init__(self, number: int, place: int) -> None:
        self.number = number
        self.place = place
        self.open = self.worked = False
        self.missing: set[int] | None = None


class Exchange:
    """``owners``: the ranks that own any blocks. ``windowed``: the numbers of this rank's blocks that need a window, ascending.

    ``traffic``: what each rank does in a block; in a save the ranks fill windows, in a load they empty them. ``sent_bytes``,
    ``received_bytes``: what has left this rank for others, and what has come from them.
    Threads: `take` and `give_back` are for the engine's workers, the rest for the thread that made it.
    """

    def __init__(
        self,
        session: Session,
        owners: Sequence[int],
        windowed: Sequence[int],
        traffic: Traffic,
    ) -> None:
        self.sent_bytes = self.received_bytes = 0
        self._session = session
        self._traffic = traffic
        self._inward = traffic.way == "in"
        self._blocks = [_Block(number, place) for place, number in enumerate(windowed)]
        self._by_number = {block.number: block for block in self._blocks}
        self._count = min(WINDOWS, len(windowed))
        self._complete = 0
        self._memory: SharedMemory | None = None
        lock = threading.Lock()
        self._places = [threading.Condition(lock) for _ in range(self._count)]  # a worker waits for its window alone
        self._finished = threading.Condition(lock)
        self._lock = lock
        self._error: BaseException | None = None
        self._closed = False
        here = session.hosts[session.rank]
        others = [rank for rank in owners if rank != session.rank]
        self._host_links = HostLinks(
            self, session, [rank for rank in others if session.hosts[rank] == here], listens=session.rank in owners
        )
        self._network_links = NetworkLinks(
            self, session, traffic, [rank for rank in others if session.hosts[rank] != here], windowed
        )

    @property
    def peak_bytes(self) -> int:
        """The most memory that this rank had for windows and parcels."""
        return self._network_links.buffers.peak_bytes + self._count * BLOCK_BYTES

    def start(self) -> None:
        """Connects to the other ranks. Every rank calls it, also one that owns nothing.

        Raises what `Session.check` raises, and ShardSaveError.
        """
        self._traffic.follow_caller()
        token = self._session.publish("exchange", HostLinks.new_token() if self._session.leads else None)
        if self._count:
            self._memory = SharedMemory.new(self._count * BLOCK_BYTES)
        self._host_links.start(token, self._memory)
        self._network_links.start(token)
        for block in self._blocks[: self._count]:
            self._open(block)
        if not self._blocks:
            self._end()

    def take(self, number: int) -> memoryview | None:
        """The window of a block, once it is open (way "out"), or once all ranks are done with it ("in"); None after a short wait."""
        block = self._by_number[number]
        changed = self._places[block.place % self._count]
        if not self._wait(changed, lambda: block.open):
            return None
        if self._inward:
            if not block.worked:
                self._traffic.in_window(self._session.rank, number, self._address(block))
                block.worked = True
            if not self._wait(changed, lambda: not block.missing):
                return None
        assert self._memory is not None
        begin = block.place % self._count * BLOCK_BYTES
        return self._memory.view[begin : begin + BLOCK_BYTES]

    def give_back(self, number: int) -> None:
        """The engine has written the window, or has read the file into it."""
        block = self._by_number[number]
        if self._inward:
            self._completed(block)
            return
        self._traffic.in_window(self._session.rank, number, self._address(block))
        self._open_for_others(block)

    def done(self, rank: int, number: int) -> None:
        """Called by links: another rank is done with a block of this one."""
        block = self._by_number[number]
        with self._lock:
            assert block.missing is not None
            block.missing.remove(rank)
            last = not block.missing
            if last:
                self._places[block.place % self._count].notify_all()
        if last and not self._inward:
            self._completed(block)

    def work_in(self, owner: int, number: int, address: int) -> None:
        """Called by links: the window of a block of ``owner`` is open for this rank."""
        self.count(self._traffic.in_window(owner, number, address))

    def count(self, nbytes: int) -> None:
        """Called by links: this rank has given or taken ``nbytes`` of another one's block."""
        with self._lock:
            if self._inward:
                self.sent_bytes += nbytes
            else:
                self.received_bytes += nbytes

    def fail(self, error: BaseException) -> None:
        """Called by links when something failed on their threads."""
        with self._lock:
            self._error = self._error or error
        self.wake()

    def finish(self) -> None:
        """Waits until the other ranks are done with this rank's blocks, and this one with theirs. Raises as `start`."""
        while not self._wait(self._finished, self._is_finished):
            self._session.check()

    def close(self) -> None:
        """Ends everything, after success and after any error. Never waits for other ranks. May be called any number of times."""
        if self._closed:
            return
        self._closed = True
        self._host_links.close()
        self._network_links.close()
        if self._memory is not None:
            self._memory.close()

    def wake(self) -> None:
        """Called by links when they have ended."""
        with self._lock:
            for changed in (*self._places, self._finished):
                changed.notify_all()

    def _is_finished(self) -> bool:
        return self._complete == len(self._blocks) and self._host_links.ended and self._network_links.ended

    def _address(self, block: _Block) -> int:
        assert self._memory is not None
        return self._memory.address + block.place % self._count * BLOCK_BYTES

    def _open(self, block: _Block) -> None:
        """The window of ``block`` may be used for it."""
        if self._inward:
            self._open_for_others(block)
        with self._lock:
            block.open = True
            self._places[block.place % self._count].notify_all()

    def _open_for_others(self, block: _Block) -> None:
        """Opens the window for the ranks that take part in ``block``."""
        taking = self._traffic.taking(block.number)
        with self._lock:
            block.missing = {*taking}
            if self._inward:
                self.received_bytes += sum(taking.values())
            else:
                self.sent_bytes += sum(taking.values())
        for rank, nbytes in taking.items():
            if self._session.hosts[rank] == self._session.hosts[self._session.rank]:
                self._host_links.open(rank, block.number, block.place % self._count)
            else:
                self._network_links.open(rank, block.number, nbytes, self._address(block))
        if not self._inward:
            self._network_links.may_pack(block.number)
        if not taking and not self._inward:
            self._completed(block)

    def _completed(self, block: _Block) -> None:
        """Nobody needs the window of ``block`` any more: it is opened for a later one."""
        with self._lock:
            self._complete += 1
            all_complete = self._complete == len(self._blocks)
            if all_complete:
                self._finished.notify_all()
        if block.place + self._count < len(self._blocks):
            self._open(self._blocks[block.place + self._count])
        if all_complete:
            self._end()

    def _end(self) -> None:
        """This rank opens no more windows."""
        self._host_links.end()
        self._network_links.end()

    def _wait(self, changed: threading.Condition, true: Callable[[], bool]) -> bool:
        """Whether ``true()`` within a short time; ``changed``: when to look. Raises the error of this exchange."""
        with changed:
            changed.wait_for(lambda: self._error is not None or self._lost() or true(), _WAIT)
            if self._error is not None:
                raise self._error
            if not self._lost() or true():
                return true()
        self._report_lost()
        return False

    def _lost(self) -> list[Lost]:
        return [*self._host_links.lost.values(), *self._network_links.lost.values()]

    def _report_lost(self) -> None:
        """A rank that said that it leaves tells its error; one that did not is dead. Raises the error of the job."""
        for rank, said in self._lost():
            if not said:
                self._session.report_loss(rank, "its process has closed the connection over which tensors were exchanged")
        time.sleep(_WAIT)


class RunWindows:
    """The windows of one run of the owner's engine. ``numbers``: for each block of the run, which of the owner's it is; ascending, but for
    those that are -1: these are not exchanged. ``windowed``: for each block of the owner, whether it has a window."""

    def __init__(self, exchange: Exchange, numbers: NDArray[np.int64], windowed: NDArray[np.bool_]) -> None:
        self.of_block = np.append(windowed, False)[numbers]
        self._exchange = exchange
        self._numbers = numbers.tolist()

    def take(self, block: int) -> memoryview | None:
        return self._exchange.take(self._numbers[block])

    def give_back(self, block: int) -> None:
        self._exchange.give_back(self._numbers[block])
