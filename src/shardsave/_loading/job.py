"""The processes that load one checkpoint together, as one of them sees them. Most loads have a job of one process: `ALONE`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol, TypeVar

from shardsave._common.progress import Progress
from shardsave._engine.totals import Totals
from shardsave._loading.read import TensorReader
from shardsave._state.distributed_tensors import PartReader
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.open_checkpoint import CHANGING_SECONDS, open_checkpoint
from shardsave._storage.shard_files import Broken, HeaderCheck
from shardsave.errors import DirectoryBusyError

Result = TypeVar("Result")


class LoadJob(Protocol):
    """What a load asks of the processes that call it together. Whatever one process raises, all raise."""

    @property
    def leads(self) -> bool:
        """Whether this process does what only one is to do, such as to log."""

    @property
    def size(self) -> int:
        """The number of processes."""

    @property
    def number(self) -> int:
        """Which of the processes this one is, from 0 on."""

    @property
    def here(self) -> str:
        """What a message about this machine begins with, where there are several."""

    @property
    def parts(self) -> PartReader | None:
        """Reads tensors of which each process holds a part; None if this process is alone."""

    def check_equal(self, arguments: Mapping[str, object]) -> None:
        """Raises ValueError if ``arguments``, JSON values by name, are not the same everywhere."""

    def attempt(self, work: Callable[[], Result], identity: Callable[[Result], bytes] = lambda _: b"") -> tuple[Result, bool]:
        """What ``work`` returns, once it has succeeded everywhere, and whether its ``identity`` is the same everywhere.

        One error that it has everywhere names no process.
        """

    def of_all(self, what: str, mine: bytes) -> list[bytes]:
        """The value of each process, everywhere. ``mine``: that of this one; ``what``: its name."""

    def checked(self, needed: int = 0) -> tuple[str, ...]:
        """Called when everything that this process can refuse has been refused; returns when that is true everywhere.

        ``needed``: how much new memory on the CPU it will allocate, which it has checked for itself. Raises OutOfMemoryError if what all
        processes of the host need does not fit; returns notes, if it fits barely.
        """

    def reader(self, checkpoint: Checkpoint, *, verify: bool, progress: Progress) -> TensorReader:
        """The reader for this process. `TensorReader.read_together` must be called the same number of times everywhere."""

    def ended(self, totals: Totals, shards: Collection[str]) -> tuple[Totals, int]:
        """Called when this process has loaded everything, from ``shards``; waits for the others. Returns what all have read, and from how
        many shards."""


class Alone:
    """A job of one process."""

    leads = True
    size = 1
    number = 0
    here = ""
    parts = None

    def check_equal(self, arguments: Mapping[str, object]) -> None:
        pass

    def attempt(self, work: Callable[[], Result], identity: Callable[[Result], bytes] = lambda _: b"") -> tuple[Result, bool]:
        return work(), True

    def of_all(self, what: str, mine: bytes) -> list[bytes]:
        return [mine]

    def checked(self, needed: int = 0) -> tuple[str, ...]:
        return ()

    def reader(self, checkpoint: Checkpoint, *, verify: bool, progress: Progress) -> TensorReader:
        return TensorReader(checkpoint, verify=verify, progress=progress)

    def ended(self, totals: Totals, shards: Collection[str]) -> tuple[Totals, int]:
        return totals, len(shards)


ALONE = Alone()


def _names_of_files(checkpoint: Checkpoint) -> bytes:
    return json.dumps(checkpoint.shards).encode()


@contextmanager
def opened(
    job: LoadJob,
    path: str,
    wanted: Callable[[str], bool] | None = None,
    parts: Iterable[str] = (),
    *,
    broken: Broken = None,
    header_check: HeaderCheck | None = None,
) -> Iterator[Checkpoint]:
    """The checkpoint at ``path``, opened as `open_checkpoint` does, the same one in all processes. Starts over if a save replaces it.

    With ``broken``, processes may differ in which files they can open. Raises what `open_checkpoint` raises.
    """
    parts = tuple(parts)
    deadline = time.monotonic() + CHANGING_SECONDS
    while True:
        with ExitStack() as stack:
            opening = partial(open_checkpoint, path, wanted, parts=parts, broken=broken, header_check=header_check)
            checkpoint, all_have_it = job.attempt(
                lambda: stack.enter_context(opening()),
                lambda found: found.identity() if broken is None or found.index is not None else _names_of_files(found),
            )
            if all_have_it:
                yield checkpoint
                return
        if broken:
            broken.clear()
        if time.monotonic() > deadline:
            raise DirectoryBusyError(
                f"cannot load {path}: one checkpoint was expected on all ranks, savers have been replacing it for "
                f"{CHANGING_SECONDS:.0f} s, or the ranks see different files; nothing was loaded"
            )
