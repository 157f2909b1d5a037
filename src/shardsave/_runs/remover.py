"""Removes steps in the background. Each batch has a thread, which ends with it; the process may end at any moment meanwhile.

What a removal leaves then is finished by the next manager or by `clean`. Before the first step of a batch goes, those that stay are
made durable. Threads: a `Remover` belongs to one thread at a time; a batch is shared with the thread that works on it, which only
shortens it.
"""

from __future__ import annotations

import _thread
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from shardsave._common.log_records import log_event
from shardsave._common.shutdown import raise_if_ending
from shardsave._common.words import human_bytes, some
from shardsave._format.file_names import step_name
from shardsave._runs.removal import RemovedStep, finish_step, make_durable, remove_step
from shardsave._runs.steps import Run
from shardsave.errors import CheckpointNotFoundError, DirectoryBusyError, ShardSaveError

_POLL_SECONDS = 0.001

#: What is still to be done: the step, and the function that does it.
_Batch = list[tuple[int, Callable[[str, int], RemovedStep]]]


class Remover:
    """Removes steps of ``run``. A child of a fork forgets what its parent still has to do."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._batches: list[_Batch] = []
        self._durable: set[int] = set()
        _alive.add(self)

    @property
    def busy(self) -> frozenset[int]:
        """The steps that are still to be removed, or finished."""
        return frozenset(step for batch in self._batches for step, _ in list(batch))

    def note_saved(self, step: int, *, durable: bool) -> None:
        """Notes whether the last save of this step has made it durable."""
        if durable:
            self._durable.add(step)
        else:
            self._durable.discard(step)

    def start(self, doomed: Iterable[int], unfinished: Iterable[int], kept: Sequence[int]) -> None:
        """Starts a thread that removes the ``doomed`` steps once the ``kept`` ones are durable, and finishes the ``unfinished`` ones.

        If there can be no thread, does it now.
        """
        batch: _Batch = [*((step, finish_step) for step in unfinished), *((step, remove_step) for step in doomed)]
        if not batch:
            return
        try:
            # Not `threading.Thread`: the process need not wait for it at its end.
            _thread.start_new_thread(self._work, (batch, tuple(kept)))
        except (RuntimeError, MemoryError):
            self._work(batch, tuple(kept))
        else:
            self._batches.append(batch)

    def _work(self, batch: _Batch, kept: Sequence[int]) -> None:
        try:
            if any(action is remove_step for _, action in batch):
                self._make_durable(kept)
            while batch:
                raise_if_ending()
                step, action = batch[0]
                _remove(self._run.path, step, action)
                del batch[0]
        except ShardSaveError as error:
            log_event(logging.WARNING, "removal failed", str(error), path=self._run.path, problem=str(error))
        finally:
            batch.clear()

    def _make_durable(self, kept: Sequence[int]) -> None:
        for step in kept:
            if step not in self._durable:
                make_durable(self._run, step)
                self._durable.add(step)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until everything is done. Returns False after ``timeout`` seconds. It polls, as `wait_until_freed` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.busy:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            raise_if_ending()
            time.sleep(_POLL_SECONDS)
        for batch in list(self._batches):  # another thread may add one meanwhile
            if not batch:
                with suppress(ValueError):
                    self._batches.remove(batch)
        return True

    def forget(self) -> None:
        self._batches.clear()


def _remove(run: str, step: int, action: Callable[[str, int], RemovedStep]) -> None:
    """Removes one step and logs it. What cannot be removed now is tried again after the next commit."""
    started = time.perf_counter()
    path = os.path.join(run, step_name(step))
    try:
        removed = action(run, step)
    except CheckpointNotFoundError:
        return  # another process has removed it
    except DirectoryBusyError:
        return log_event(logging.INFO, "step in use", f"{path} stays for now: it is being read or saved", path=run, step=step)
    except ShardSaveError as error:
        return log_event(logging.WARNING, "removal failed", str(error), path=run, step=step, problem=str(error))
    seconds = time.perf_counter() - started
    facts = {"path": removed.path, "step": step, "bytes": removed.bytes, "seconds": seconds, "leftovers": removed.leftovers}
    if removed.pinned:
        log_event(logging.INFO, "step pinned", f"{removed.path} stays: it was pinned", path=removed.path, step=step)
    elif removed.leftovers and action is finish_step and not removed.bytes:
        return  # files that no save wrote, in a directory without a checkpoint: whoever removed that step has named them
    elif removed.leftovers:
        stays = some(removed.leftovers)
        log_event(logging.WARNING, "step removed", f"removed step {step}, but {stays} stays in {removed.path}", **facts)
    else:
        log_event(
            logging.INFO, "step removed", f"removed {removed.path}: {human_bytes(removed.bytes)}, {seconds:.2f} s", **facts
        )


#: Every remover of this process.
_alive: weakref.WeakSet[Remover] = weakref.WeakSet()


def _forget_in_child() -> None:
    for remover in list(_alive):
        remover.forget()


os.register_at_fork(after_in_child=_forget_in_child)
