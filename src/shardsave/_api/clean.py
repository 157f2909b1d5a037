"""`clean`: lists and removes what crashed saves left in a directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain

from shardsave._api.arguments import check_path, check_switches, check_timeout
from shardsave._api.reports import Printed, log_deletion
from shardsave._common.os_calls import CallFailed, absolute_path
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import count, human_bytes, some
from shardsave._format.file_names import INDEX_NAME, LONE_NAME, step_name, step_number
from shardsave._runs.removal import finish_step
from shardsave._runs.steps import Run
from shardsave._storage.companions import finish_dead_savers
from shardsave._storage.leavings import Leaving, find_leavings, remove_leaving
from shardsave._storage.lock import LockedDirectory, learn_owner
from shardsave._storage.previous import companions_of
from shardsave._storage.removal import read_obeyed
from shardsave.errors import CheckpointNotFoundError, ShardSaveError

__all__ = ["CleanReport", "Leaving", "clean"]

_UNTOUCHED = "nothing was removed"


@dataclass(frozen=True)
class CleanReport(Printed):
    """What crashed saves left behind in the directory ``path``.

    ``found``: all leavings. ``removed``: the names of those that were removed. ``leftovers``: names of files and directories that
    could not be removed. ``completed``: the configs that were put in place, because a save had committed them before it crashed.
    ``refused``: of a run, the steps that could not be cleaned, and why.
    """

    path: str
    found: tuple[Leaving, ...]
    removed: tuple[str, ...]
    leftovers: tuple[str, ...]
    completed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Leaving, ...]:
        """The leavings that are still there."""
        return tuple(leaving for leaving in self.found if leaving.name not in self.removed)

    def _lines(self) -> Iterator[str]:
        yield from self.refused
        if not self.found:
            yield f"{self.path}: nothing was left behind{' in the other steps' if self.refused else ''}"
            return
        total = human_bytes(sum(leaving.bytes for leaving in self.found))
        parts = [f"{self.path}: {count(len(self.found), 'leaving')} of crashed saves, {total}", f"{len(self.removed)} removed"]
        kept = [leaving.name for leaving in self.left if not leaving.dead and leaving.ours]
        strangers = [leaving.name for leaving in self.left if not leaving.ours]
        if self.completed:
            parts.append(f"put in place: {some(self.completed)}")
        if kept:
            parts.append(f"kept, since their owners may be alive: {some(kept)}")
        if strangers:
            parts.append(f"kept, since another user may have made or changed them: {some(strangers)}")
        if self.leftovers:
            parts.append(f"could not remove {some(self.leftovers)}")
        yield "; ".join(parts)


@uncompiled
@verb()
def clean(
    directory: str | os.PathLike[str], *, remove: bool = True, other_hosts: bool = False, lock_timeout: float = 60.0
) -> CleanReport:
    """Finds what crashed saves left in ``directory``, and removes it; the checkpoint and all other files stay as they are.

    The next save into the directory would remove it too. `clean` holds the directory's lock, so a saver of this host whose staging
    directory is still there is certainly dead. A saver of another host may be alive, and would lose what it has written: its
    staging directory is listed, but removed only with ``other_hosts=True``. In a directory to which every user may write, what
    another user may have made or changed is listed and never removed. If a crashed save had committed a config, but not yet
    put it beside the weights, `clean` puts it there.

    In a run of steps (`CheckpointManager`), each step is cleaned. If nothing is left in the directory of a step (``step-00001000``), it
    goes too. Also a removal that was interrupted is finished. A step that cannot be cleaned stays as it is, and the report says why.

    Never collective: a rank that calls it waits for no other.

    Args:
        directory: the directory of a checkpoint, of a first save that crashed, or of a run.
        remove: False only lists the leavings.
        other_hosts: remove also what savers of other hosts left (or of this one, where the file system has no locks).
        lock_timeout: seconds to wait for a save into the same directory.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        CheckpointNotFoundError: there is no such directory.
        CorruptCheckpointError, IncompatibleCheckpointError: the index cannot be read, so the needed files are unknown.
        DirectoryBusyError: another save holds the lock.
        ShardSaveError: the directory cannot be read, the index cannot be made durable first, or another user may have written it in
            a directory to which every user may write. Nothing was removed.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.ones(2)}, "tidy")
        >>> print(shardsave.clean("tidy"))
        tidy: nothing was left behind
    """
    check_path(directory)
    check_switches(remove=remove, other_hosts=other_hosts)
    check_timeout(lock_timeout)
    path = absolute_path(os.fspath(directory))
    steps = _steps_of_run(path)
    if not steps:
        return _clean(path, os.fspath(directory), remove, other_hosts, lock_timeout)
    reports: list[CleanReport] = []
    refused: list[str] = []
    for step in steps:
        name = step_name(step)
        try:
            reports.append(_clean(os.path.join(path, name), name, remove, other_hosts, lock_timeout))
        except CheckpointNotFoundError:
            continue  # another process has just removed it
        except ShardSaveError as error:
            refused.append(str(error))
    joined = _joined(os.fspath(directory), reports)
    return replace(joined, refused=(*refused, *joined.refused))


def _steps_of_run(path: str) -> list[int]:
    """The steps of the run at ``path``; none if it is a checkpoint, or nothing."""
    if any(os.path.lexists(os.path.join(path, name)) for name in (INDEX_NAME, LONE_NAME)):
        return []
    return Run(path).numbers() if os.path.isdir(path) else []


def _joined(path: str, reports: list[CleanReport]) -> CleanReport:
    """One report of the steps of a run: each name begins with its step's."""

    def named(report: CleanReport, names: Iterable[str]) -> list[str]:
        return [name if name == report.path else f"{report.path}/{name}" for name in names]

    found = [
        replace(leaving, name=name, files=tuple(named(report, leaving.files)))
        for report in reports
        for leaving, name in zip(report.found, named(report, [leaving.name for leaving in report.found]))
    ]
    return CleanReport(
        path,
        tuple(found),
        tuple(chain.from_iterable(named(report, report.removed) for report in reports)),
        tuple(chain.from_iterable(named(report, report.leftovers) for report in reports)),
        tuple(chain.from_iterable(named(report, report.completed) for report in reports)),
        tuple(chain.from_iterable(report.refused for report in reports)),
    )


def _clean(path: str, shown: str, remove: bool, other_hosts: bool, lock_timeout: float) -> CleanReport:
    """Cleans one directory. That of a step goes if nothing is left in it; one that was empty before is a leaving of its own."""
    path = path.rstrip("/")  # of which a link would be followed
    run, name = os.path.split(path)
    step = step_number(name)
    report = _clean_files(path, shown, remove, other_hosts, lock_timeout)
    if step is None or os.path.islink(path) or os.path.lexists(os.path.join(path, INDEX_NAME)):
        return report
    empty = _empty_directory(path) if not report.found else None
    if empty is not None:
        report = replace(report, found=(empty,))
    if not remove or any(leaving is not empty or not empty.ours for leaving in report.left):
        return report
    try:
        finished = finish_step(run, step)
    except CheckpointNotFoundError:
        return report  # another process has just removed it
    except ShardSaveError as error:
        return replace(report, refused=(str(error),))
    if empty is not None and not finished.leftovers:
        log_deletion(shown, (name,))
        report = replace(report, removed=(name,))
    return report


def _empty_directory(path: str) -> Leaving | None:
    """The directory at ``path`` as a leaving, if nothing is in it: a save was killed right after it had made it."""
    try:
        is_empty, owner = not os.listdir(path), os.stat(path).st_uid
    except OSError:
        return None
    return Leaving(os.path.basename(path), (), 0, True, ours=owner == os.geteuid()) if is_empty else None


def _clean_files(path: str, shown: str, remove: bool, other_hosts: bool, lock_timeout: float) -> CleanReport:
    """Cleans one directory, which stays."""
    folder = LockedDirectory(path, durable=True)
    # Closed twice, since one interrupt may come at the beginning of a `close`, which then does nothing.
    with closing(folder), folder, _naming_failures(folder.path):
        folder.acquire(lock_timeout, purpose="clean", state=_UNTOUCHED)
        learn_owner(folder)
        index = read_obeyed(folder, INDEX_NAME, "clean")
        leavings = find_leavings(folder, index)
        chosen = [leaving for leaving in leavings if leaving.ours and (leaving.dead or other_hosts)] if remove else []
        completed: list[str] = []
        if chosen:
            # Replaced files may be removed only once the index is durable, and a staged config that was committed only once it is in place.
            folder.sync_file(INDEX_NAME)
            folder.sync()
            completed = finish_dead_savers(folder, companions_of(index), {leaving.name for leaving in chosen}.__contains__)
        leftovers = {leaving.name: remove_leaving(folder, leaving, index) for leaving in chosen}
    removed = tuple(name for name, remaining in leftovers.items() if not remaining)
    left = tuple(dict.fromkeys(chain.from_iterable(leftovers.values())))
    log_deletion(shown, removed, left)
    return CleanReport(shown, leavings, removed, left, tuple(completed))


@contextmanager
def _naming_failures(path: str) -> Iterator[None]:
    """Raises the error for an OS call that fails in the block."""
    try:
        yield
    except CallFailed as error:
        kind = CheckpointNotFoundError if error.errno in (errno.ENOENT, errno.ENOTDIR) else ShardSaveError
        raise kind(f"cannot clean {path}: {error.reason}; {_UNTOUCHED}") from error
