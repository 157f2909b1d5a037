"""The contents of a background save after the call: copies, and tensors that are still to be read, which are followed until then."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from shardsave._background import guard, snapshot
from shardsave._background.drain import Drain, Drained
from shardsave._background.owners import Choice, Mode
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._engine.engine import HostMemory
from shardsave._saving.contents import Contents
from shardsave.errors import SaveNotCommittedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SpreadParts(NamedTuple):
    """A tensor of several ranks, and a source for each box of it that this rank has."""

    spread: Spread
    parts: list[TensorSource]


class StagedContents:
    """A save after the call: what it will read, and the moment from which nothing in the process can change that any more.

    ``mode`` and ``reason``: how it is staged, and why. ``copies``: what was copied of the planned contents in the call. ``staged`` is set
    as soon as all bytes are copied or read, and also on failure. ``spreads``: the tensors that several ranks save, with the parts of this
    one that were copied. ``copied_bytes``, ``copy_seconds``: in the call. ``drained_bytes``: read
    afterwards. ``notes``: for the report.

    Threads: `arm` is called in the call, `let_go` on any thread, all else on the thread that saves; `finish` at its end.
    """

    def __init__(
        self,
        contents: Contents,
        choice: Choice,
        copies: snapshot.Copies | None = None,
        memory: HostMemory | None = None,
        items: Sequence[Drained] = (),
        streams: Sequence[torch.cuda.Stream] = (),
        step_timeout: float = 600.0,
        spreads: Sequence[SpreadParts] = (),
    ) -> None:
        self.mode: Mode = choice.mode
        self.reason = choice.reason
        self.staged = threading.Event()
        self.copied_bytes = sum(copies.nbytes) if copies is not None else 0
        self.copy_seconds = 0.0
        self.drained_bytes = sum(item.nbytes for item in items)
        self.drain_seconds = 0.0
        self.notes: tuple[str, ...] = (memory.note,) if memory is not None and memory.note else ()
        self._contents: Contents | None = contents
        self._copies = copies
        self._spreads = spreads
        self._memory = memory
        self._streams = streams
        self._began = time.perf_counter()
        self._drain = Drain(items, step_timeout, self._drained)
        if not items:
            self._drain.finish()

    @property
    def contents(self) -> Contents:
        """What to write; with the mode ``"blocking"`` it is live memory that nobody guards, to be written in the call.

        Copies take the place of what was copied at the first use, not in the call: that takes time for each tensor.
        """
        assert self._contents is not None
        copies, self._copies = self._copies, None
        if copies is not None:
            copied: dict[int, ByteSource] = dict(zip(map(id, copies.pieces), copies.sources()))
            for spread, parts in self._spreads:
                copies_of = [snapshot.copy_of(copied[id(part)]) for part in parts]
                copied[id(spread)] = spread.of([copy.tensor for copy in copies_of], [copy.crc for copy in copies_of])
            self._contents = self._contents.with_sources(copied)
        return self._contents

    @property
    def step_wait_seconds(self) -> float:
        """How long steps have waited, all together."""
        return self._drain.step_wait_seconds

    def arm(self) -> None:
        """From now on no step of an optimizer changes what is still to be read."""
        if not self.staged.is_set():
            guard.arm(self._drain)
            if self.staged.is_set():
                guard.disarm(self._drain)

    def use_streams(self) -> None:
        """Makes copies of this thread from CUDA devices follow the work that had been enqueued when the call was made."""
        for stream in self._streams:
            torch.cuda.set_stream(stream)

    def check(self) -> None:
        """Called again and again while the save reads. Raises SaveNotCommittedError: a tensor was changed, or a step waited too long."""
        self._drain.check()

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        """As `Watch.is_urgent`."""
        return not self.staged.is_set() and self._drain.is_urgent(pieces)

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        """As `Watch.begin_reading`."""
        return None if self.staged.is_set() else self._drain.begin_reading(pieces)

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        """As `Watch.end_reading`. Raises SaveNotCommittedError if one of ``pieces`` was changed until now."""
        self._drain.end_reading(pieces, sums)

    def check_complete(self) -> None:
        """Raises SaveNotCommittedError unless everything was read and found unchanged. A commit must not be attempted before."""
        self._drain.check()
        if not self._drain.complete:
            raise SaveNotCommittedError(
                "cannot save while training goes on: all tensors were expected to be read, the save was ended before; nothing was "
                "committed, a previous checkpoint is intact"
            )

    def let_go(self) -> None:
        """No step waits any more, and ``staged`` is set. If not everything was read, nothing can be committed after this."""
        self._drain.finish()

    def finish(self) -> None:
        """As `let_go`; snapshot memory is then used again, so the contents must not be read any more."""
        self._drain.finish()
        self._drain.forget()
        self._contents, self._copies = None, None
        memory, self._memory = self._memory, None
        if memory is not None:
            snapshot.give_back(memory)

    def _drained(self) -> None:
        self.drain_seconds = time.perf_counter() - self._began
        self.staged.set()
