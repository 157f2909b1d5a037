"""A run: a directory of steps, each an ordinary checkpoint. Says which steps there are and in which state, from names and indexes alone.

No file records which step is the latest: it is the last one with an index, since the rename of an index is what commits a checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from shardsave._common.os_calls import CallFailed, NotRegular, TooLong
from shardsave._format.file_names import INDEX_NAME, LONE_NAME, REMOVED_INDEX_NAME, step_name, step_number
from shardsave._format.index import MAX_INDEX_BYTES, TRAINING, Index, Record
from shardsave._format.index_parsing import parse_index
from shardsave._format.training_state import parse_training_files
from shardsave._runs.lost_index import files_without_index
from shardsave._runs.step_files import Inode, Shared, StepFile, files_there, freed_bytes
from shardsave._storage.directory import Directory
from shardsave._storage.find import cannot_read
from shardsave._storage.previous import companions_of, files_of
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError

#: The file that pins a step, in the step's directory.
PIN_NAME = ".shardsave-pinned"

#: committed: can be loaded. saving: its first save is at work. unfinished: that save has died. removing: its removal has begun.
#: corrupt: the index is damaged, lost or that of another step, or a file that it names is missing or has another length. newer: needs a
#: newer shardsave.
#: foreign: not saved by shardsave. unreadable: the operating system refuses to read it.
State = Literal["committed", "saving", "unfinished", "removing", "corrupt", "newer", "foreign", "unreadable"]

#: errno values of a path on which nothing is.
_ABSENT = (errno.ENOENT, errno.ENOTDIR)

#: How often a step is read again that a save or a removal changes meanwhile.
_TRIES = 5


@dataclass(frozen=True)
class StepInfo:
    """A step of a run.

    ``state``: "committed", "saving", "unfinished", "removing", "corrupt", "newer", "foreign" or "unreadable"; ``problem`` says more.
    ``created``: when it was committed, in UTC, such as ``"2026-11-30T05:40:00Z"``. ``bytes``: the length of all its files;
    ``new_bytes``: of those that no earlier step of the run shares with it. ``pinned``: whether no policy may remove it.
    ``half_removed``: whether files of an earlier checkpoint of this step are still there, whose removal was interrupted.
    """

    step: int
    path: str
    state: State
    created: str = ""
    bytes: int = 0
    new_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False
    problem: str = ""
    half_removed: bool = False

    @property
    def committed(self) -> bool:
        return self.state == "committed"

    @property
    def shared_bytes(self) -> int:
        """The bytes of files that an earlier step of the run shares with it."""
        return self.bytes - self.new_bytes


class _Summary(NamedTuple):
    """What is remembered of an index. ``identity`` changes when its file does. ``lengths``: file → bytes, None if it may have any."""

    identity: tuple[int, ...]
    lengths: Mapping[str, int | None]
    record: Record
    created: str


class Run:
    """The run in the directory ``path``, which need not exist yet. Remembers what it has read in indexes that stay as they are.

    Threads: any, several at a time. What is remembered is only looked up, set and removed by single operations of dict.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._summaries: dict[int, _Summary] = {}
        self._files: dict[int, Mapping[Inode, StepFile]] = {}

    def path_of(self, step: int) -> str:
        return os.path.join(self.path, step_name(step))

    def numbers(self) -> list[int]:
        """The steps that have a directory, in order. Raises ShardSaveError if the run cannot be listed."""
        try:
            with Directory(self.path) as folder:
                folder.open(self.path)
                names = folder.names()
        except CallFailed as error:
            if error.errno == errno.ENOENT and os.path.islink(self.path):  # its disk may not be mounted: this is no new run
                raise ShardSaveError(
                    f"cannot read {self.path}: a directory was expected, it is a symbolic link to nothing; nothing was read or written"
                ) from error
            if error.errno == errno.ENOENT:
                return []
            raise cannot_read(self.path, error) from error
        return sorted(number for name in names if (number := step_number(name)) is not None)

    def steps(self) -> tuple[StepInfo, ...]:
        """All steps, in order. One that the operating system refuses to read is "unreadable". Raises ShardSaveError as `numbers` does."""
        infos: list[StepInfo] = []
        numbers = self.numbers()
        for gone in self._files.keys() - set(numbers):
            self._files.pop(gone, None)
            self._summaries.pop(gone, None)
        earlier = Shared()
        for number in numbers:
            try:
                info = self.read(number)
            except ShardSaveError as error:
                info = StepInfo(number, self.path_of(number), "unreadable", problem=str(error))
            if info is not None:
                files = self._files.get(number, {}) if info.committed else {}
                new = sum(file.bytes for inode, file in files.items() if not earlier.has(inode, file))
                earlier.add(files)
                infos.append(replace(info, new_bytes=new))
        return tuple(infos)

    def newest_first(self) -> Iterator[StepInfo]:
        """The steps from the last one back. Raises ShardSaveError for one that the operating system refuses to read."""
        for number in reversed(self.numbers()):
            info = self.read(number)
            if info is not None:
                yield info

    def read(self, number: int) -> StepInfo | None:
        """A step as it is now; None if it has no directory any more. Raises ShardSaveError if it cannot be read."""
        path = self.path_of(number)
        try:
            with Directory(durable=False) as folder:
                folder.open(path)
                return self._read(folder, number, path)
        except CallFailed as error:
            if error.errno in _ABSENT:
                return None
            raise cannot_read(path, error) from error

    def _read(self, folder: Directory, number: int, path: str) -> StepInfo:
        half_removed = folder.status_of(REMOVED_INDEX_NAME) is not None
        info = StepInfo(number, path, "saving", pinned=folder.status_of(PIN_NAME) is not None, half_removed=half_removed)
        for _ in range(_TRIES):
            identity = _identity(folder)
            if identity is None:
                found = replace(info, state="removing") if half_removed else _without_index(folder, info)
                if found.state != "corrupt" or (_identity(folder) is None and folder.status_of(REMOVED_INDEX_NAME) is None):
                    return found
                continue
            indexed = self._read_indexed(folder, info, identity)
            if indexed.committed or identity == _identity(folder):
                return indexed
        return info

    def _read_indexed(self, folder: Directory, info: StepInfo, identity: tuple[int, ...]) -> StepInfo:
        try:
            summary = self._summary(folder, info.step, identity)
        except (CorruptCheckpointError, NotRegular, TooLong) as error:
            return replace(info, state="corrupt", problem=str(error))
        except IncompatibleCheckpointError as error:
            return replace(info, state="newer", problem=str(error))
        if summary is None:
            return replace(info, state="foreign", problem="shardsave did not save it")
        files = files_there(folder, summary.lengths, summary.record)
        self._files[info.step] = files.files
        problem = files.problem or _problem_of_name(info, summary.record.moment.step)
        return replace(
            info,
            state="corrupt" if problem else "committed",
            created=summary.created,
            bytes=sum(file.bytes for file in files.files.values()),
            metrics=summary.record.moment.metrics,
            problem=problem,
        )

    def _summary(self, folder: Directory, number: int, identity: tuple[int, ...]) -> _Summary | None:
        known = self._summaries.get(number)
        if known is not None and known.identity == identity:
            return known
        data = folder.read_all(INDEX_NAME, MAX_INDEX_BYTES)
        index = parse_index(data or b"", f"index {INDEX_NAME}")
        if index.record is None:
            return None
        moment = index.record.moment
        mtime = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(identity[3] // 10**9))
        lengths = {**_lengths(index, index.record), **_lengths_of_training(folder, index.record)}
        kept = index.record._replace(flags=None, ties={}, metadata={}, module_flags=None)
        summary = _Summary(identity, lengths, kept, moment.created or mtime)
        self._summaries[number] = summary
        return summary

    def files_to_sync(self, number: int) -> tuple[str, ...]:
        """The files of a step that was read, if its save did not wait for the disk; otherwise none: its index says so."""
        summary = self._summaries.get(number)
        if summary is None or summary.record.durable:
            return ()
        return tuple(name for name in summary.lengths if "/" not in name)  # a directory goes with all that is in it

    def bytes_of_only(self, numbers: set[int]) -> int:
        """The bytes that removing these steps frees: of files that no other step, and no other checkpoint, shares."""
        others = Shared()
        for number, files in list(self._files.items()):
            if number not in numbers:
                others.add(files)
        return freed_bytes((self._files.get(number, {}) for number in sorted(numbers)), others)

    def to_take_from(self, step: int, uncounted: Container[int]) -> str | None:
        """The path of the last durable step, whose shards a save of ``step`` may take over; None if there is none, or if it is replaced.

        ``uncounted``: steps that are not what their index says. A step that cannot be read ends the search: the save needs none.
        """
        with suppress(ShardSaveError):
            for info in self.newest_first():
                if info.committed and info.step not in uncounted and self._summaries[info.step].record.durable:
                    return info.path if info.step != step else None
        return None


def _problem_of_name(info: StepInfo, recorded: int | None) -> str:
    """What is wrong with the name of a step whose index says that it is step ``recorded``: "" if nothing is.

    A plain `save` may have been given no step; then a link to the directory of another step shows it.
    """
    if recorded is None and os.path.islink(info.path):
        leads_to = (os.readlink(info.path), os.path.realpath(info.path))
        numbers = (step_number(os.path.basename(path.rstrip("/"))) for path in leads_to)
        recorded = next((number for number in numbers if number is not None), None)
    if recorded in (None, info.step):
        return ""
    return f"it is step {recorded}, not step {info.step}: the directory was renamed, copied or linked"


def _identity(folder: Directory) -> tuple[int, ...] | None:
    """What changes when the index in ``folder`` does; None if there is none."""
    status = folder.status_of(INDEX_NAME, follow=True)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if status is not None else None


def _lengths(index: Index, record: Record) -> dict[str, int | None]:
    """Each file of a checkpoint → its length. Those that people may edit on purpose may have any."""
    lengths: dict[str, int | None] = dict.fromkeys(sorted(files_of(index)))
    lengths |= {name: shard.length for name, shard in record.shards.items()}
    lengths |= {part.file: part.record.length for part in record.parts.values()}
    for name in companions_of(index):
        lengths[name] = None
    return lengths


def _lengths_of_training(folder: Directory, record: Record) -> dict[str, int]:
    """The same for the files that the document of a training state names. Raises CorruptCheckpointError, IncompatibleCheckpointError."""
    part = record.parts.get(TRAINING)
    if part is None or part.directory is None or folder.target_of(part.file) is None:
        return {}
    data = folder.read_all(part.file, part.record.length)
    files = parse_training_files(data or b"", f"part {part.file}")
    return {f"{part.directory}/{name}": file.length for name, file in files.items()}


def _without_index(folder: Directory, info: StepInfo) -> StepInfo:
    """``info`` with the state of a step that had no index a moment ago."""
    if folder.status_of(LONE_NAME) is not None:
        return replace(info, state="foreign")
    files = files_without_index(folder)  # before the lock: a save that ends meanwhile leaves an index
    if _is_locked(folder):
        return replace(info, state="saving")
    if not files:
        return replace(info, state="unfinished")
    return replace(info, state="corrupt", problem=f"its index {INDEX_NAME} is missing, and {files[0]} is there")


def _is_locked(folder: Directory) -> bool:
    """Whether a save holds the directory's lock. Asked with a shared lock, which ends when ``folder`` is closed."""
    try:
        fcntl.flock(folder.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return False
