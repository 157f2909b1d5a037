"""Point to point over gloo, on a group of our own: parcels with a mark at their end, and short ones for ranks that wait in vain.

gloo cannot be asked whether a parcel has come, and a call that waits for one ends only with a parcel, with the other process, or at its
time limit. So a rank that leaves early sends very short parcels in place of those that others may wait for; they lack the mark.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch

from shardsave._ranks.group import job_store
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import Work

    from shardsave._ranks.session import Session

#: The bytes at the end of each parcel.
_MARK = torch.tensor(list(b"shardsav"), dtype=torch.uint8)
MARK_BYTES = len(_MARK)

#: Buffers for parcels that are kept for the next ones, in bytes.
_KEPT_BYTES = 64 << 20


class Gloo:
    """The group of ``members``, ranks of the session, which all make it at the same time, with a ``name`` that no other group ever has.

    Raises what `Session.check` raises, and ShardSaveError.
    """

    def __init__(self, session: Session, members: Sequence[int], name: str) -> None:
        self._group: Any = None  # a ProcessGroupGloo, whose methods torch's type hints lack
        self._position = {rank: position for position, rank in enumerate(members)}
        self._limit = timedelta(seconds=session.timeouts.phase)
        self._left: list[Work | torch.Tensor] = []
        self._connect(session, self._position[session.rank], len(members), name)

    def send(self, parcel: torch.Tensor, rank: int, tag: int) -> Work:
        """Sends bytes, the last `MARK_BYTES` of which become the mark; they must stay as they are until `wait` returns.

        Raises RuntimeError if the other rank is gone, as `ask` and `wait` do.
        """
        parcel[-MARK_BYTES:] = _MARK
        return cast("Work", self._group.send([parcel], self._position[rank], tag))

    def ask(self, parcel: torch.Tensor, rank: int, tag: int) -> Work:
        """Asks for a parcel as long as ``parcel``."""
        parcel[-MARK_BYTES:] = 0
        return cast("Work", self._group.recv([parcel], self._position[rank], tag))

    def wait(self, work: Work) -> None:
        """Waits until a parcel has been sent or has come. Raises RuntimeError if the other rank is gone."""
        work.wait(self._limit)

    @staticmethod
    def is_whole(parcel: torch.Tensor) -> bool:
        """Whether a parcel that has come is not the short one of a rank that leaves."""
        return torch.equal(parcel[-MARK_BYTES:], _MARK)

    def release(self, rank: int, tags: Sequence[int]) -> None:
        """Sends short parcels to ``rank``, which may wait for those with ``tags``, unless it is gone."""
        with suppress(RuntimeError):
            for tag in tags:
                short = torch.zeros(1, dtype=torch.uint8)
                self._left += [short, self._group.send([short], self._position[rank], tag)]

    def drain(self, rank: int, parcels: Sequence[tuple[int, int]]) -> None:
        """Asks ``rank`` for parcels, tag and bytes of each, that it may wait to send, unless it is gone. Nobody looks at them."""
        with suppress(RuntimeError):
            for tag, nbytes in parcels:
                buffer = torch.empty(nbytes + MARK_BYTES, dtype=torch.uint8)
                self._left += [buffer, self._group.recv([buffer], self._position[rank], tag)]

    def close(self) -> None:
        """Ends the group; no thread may use it any more."""
        self._group = None
        self._left.clear()

    def _connect(self, session: Session, rank: int, size: int, name: str) -> None:
        """On a thread, since gloo waits for all ranks to come.

        Not by `new_group`: that names a group by its ranks, and what an earlier one of the same ranks has left in the store misleads it.
        """
        failures: list[BaseException] = []

        def connect() -> None:
            from torch.distributed import distributed_c10d as c10d

            try:
                store = c10d.PrefixStore(f"shardsave/gloo/{name}", cast("Any", job_store().clone()))
                self._group = c10d.ProcessGroupGloo(store, rank, size, timedelta(seconds=session.timeouts.rank))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=connect, name="shardsave-connect", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.02)
            session.check()
        if failures:
            session.check()
            reason = str(failures[0]).partition("\n")[0]  # torch adds the trace of its C++ code
            raise ShardSaveError(
                f"ranks of several hosts were expected to connect over gloo: {reason}; GLOO_SOCKET_IFNAME chooses the network"
            ) from failures[0]


class Buffers:
    """Buffers for parcels, used again and again: the first touch of new memory costs as much as a copy. For any thread."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """At least ``nbytes``."""
        size = 1 << max(12, (nbytes - 1).bit_length())
        with self._lock:
            if free := self._free.get(size):
                return free.pop()
            if self._bytes + size > _KEPT_BYTES:
                self._bytes -= sum(size * len(free) for size, free in self._free.items())
                self._free.clear()
            self._bytes += size
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        return torch.empty(size + 4096, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._free.setdefault(buffer.numel() - 4096, []).append(buffer)
