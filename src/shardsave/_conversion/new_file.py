"""A file that is written under another name beside its path, and then renamed: so at the path there is always a whole file."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from contextlib import nullcontext, suppress
from types import TracebackType

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import OUT_OF_SPACE, CallFailed, call
from shardsave._storage.cleaning_notes import strangers_notes
from shardsave._storage.directory import NO_LINKS, Directory, make_folders, path_to_write
from shardsave._storage.freeing import RemovedFiles, wait_until_freed
from shardsave._storage.permissions import FileMaker, permissions_of
from shardsave._storage.sizes import bytes_visible
from shardsave.errors import DurabilityUncertainError, OutOfSpaceError, SaveNotCommittedError, ShardSaveError

#: The endings of the names of scratch files, and of the directories that they may need.
_SCRATCH, _WORKSPACE = ".part", ".d"


class _Phase(enum.Enum):
    """The phases of a `NewFile`, in this order."""

    OPENING = enum.auto()  # nothing was created
    WRITING = enum.auto()  # the scratch file exists, or may
    RENAMED = enum.auto()  # the scratch file has become the file at the path


class NewFile:
    """A transaction on the file at ``path``.

    Entering it creates a scratch file beside ``path``, with the permissions of the file that it will replace, and removes those of
    dead writers. The caller writes to `file` and calls `commit`, which renames the scratch file to ``path``. Leaving it without a
    commit removes the scratch file; a file that was at ``path`` is then unchanged. The scratch file is locked until the end: later
    writers to ``path`` see that its writer is alive.
    """

    def __init__(self, path: str, durable: bool) -> None:
        self.path = path_to_write(path)
        self.folder, self._name = os.path.split(self.path)
        self._stem = f".{self._name[:100]}."
        self._scratch = ""
        self.file = Descriptor()
        self._lock = Descriptor()
        self._durable = durable
        self._directory = Directory(self.folder, durable=durable)
        self._phase = _Phase.OPENING
        self._removed: list[str] = []
        self._strangers: dict[str, int] = {}
        self._replaced = ""  # the second name of the file that is being replaced
        self._to_free = RemovedFiles()

    def __enter__(self) -> NewFile:
        wait_until_freed()
        try:
            make_folders(self.folder, self._durable)
            self._directory.open_for_writing(self.folder)
            self._create()
            self._remove_dead()
        except CallFailed as error:
            self.close()
            raise self.failure(error) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of what killed writers had left, and what was removed."""
        return tuple(self._removed)

    def notes(self) -> tuple[str, ...]:
        """Notes on what had to stay."""
        return tuple(strangers_notes(self._strangers))

    @property
    def workspace(self) -> str:
        """The path of a directory for the caller's files, which `make_workspace` creates; leaving the transaction removes it."""
        return os.path.join(self.folder, self._scratch + _WORKSPACE)

    def make_workspace(self) -> None:
        """Creates the workspace so that no other user can enter it."""
        try:
            self._directory.mkdir(self._scratch + _WORKSPACE, 0o700)
        except CallFailed as error:
            raise self.failure(error) from error

    def _create(self) -> None:
        status = self._directory.status_of(self._name)
        replaced = permissions_of(self.path, status) if status is not None else None
        while True:
            self._scratch = f"{self._stem}{secrets.token_hex(8)}{_SCRATCH}"
            self._phase = _Phase.WRITING
            if replaced is not None:
                FileMaker(self._directory, self.folder).create(self._scratch, self.file, replaced)
            else:
                self._directory.create(self._scratch, self.file)
            self._lock.open(self._scratch, os.O_RDONLY | os.O_NOFOLLOW, self._directory.fd)
            # On a file system without locks the call fails. There, no other writer can remove this file as a dead one either.
            with suppress(OSError):
                fcntl.flock(self._lock.fd, fcntl.LOCK_EX)
            if call(os.fstat, self._scratch, self.file.fd).st_nlink:
                return
            self.file.abandon()  # before it was locked, another writer removed it as a dead one
            self._lock.abandon()

    def _remove_dead(self) -> None:
        """Removes what killed writers to the same path left behind; in a shared directory, only what this user made."""
        pattern = re.compile(rf"({re.escape(self._stem)}[0-9a-f]{{16}}\{_SCRATCH})(?:\{_WORKSPACE})?")
        matches = map(pattern.fullmatch, self._directory.names())
        for name in sorted({match[1] for match in matches if match is not None} - {self._scratch}):
            with suppress(OSError):
                if self._is_ours(name) and self._is_ours(name + _WORKSPACE):
                    self._remove_dead_writer(name)

    def _is_ours(self, name: str) -> bool:
        """Whether ``name`` may be removed. Notes it if another user of a shared directory made it."""
        status = self._directory.status_of(name)
        if status is None or not call(os.fstat, self.folder, self._directory.fd).st_mode & stat.S_IWOTH:
            return True
        if status.st_uid == call(os.fstat, self._scratch, self.file.fd).st_uid:
            return True
        self._strangers[name] = bytes_visible(self._directory, name)
        return False

    def _remove_dead_writer(self, name: str) -> None:
        workspace = name + _WORKSPACE
        file = self._directory.open_regular(name, follow=False)
        with file or nullcontext():
            if file is not None:
                fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer is alive
            if self._directory.inode_of(workspace) is not None:
                shutil.rmtree(os.path.join(self.folder, workspace), ignore_errors=True)
                if self._directory.inode_of(workspace) is None:
                    self._removed.append(workspace)
            if file is not None:
                self._directory.unlink(name)
                self._removed.append(name)

    def commit(self) -> None:
        """Completes the scratch file and renames it to ``path``, both durably if the caller requested that."""
        inode = self._end_file()
        folders = {"src_dir_fd": self._directory.fd, "dst_dir_fd": self._directory.fd}
        self._name_replaced()
        try:
            call(os.rename, self.path, self._scratch, self._name, **folders)
            self._phase = _Phase.RENAMED
            self._remove_replaced()
            self._directory.sync()
        except CallFailed as error:
            if self._phase is _Phase.WRITING and not self._is_at_path(inode):
                raise self.failure(error) from error
            self._phase = _Phase.RENAMED
            raise DurabilityUncertainError(
                f"written, but not known to be durable: {self.path}: {error.words}, after the "
                f"file was renamed; a loss of power may bring back the previous file"
            ) from error

    def _name_replaced(self) -> None:
        """Gives the file at ``path`` a second name, so that the rename does not have to wait until its space is free.

        It is the name of a scratch file, which later writers remove. Keeping the file open would do the same, but NFS moves an open file
        out of the way before the rename, and for a moment there would be no file at ``path``.
        """
        self._replaced = f"{self._stem}{secrets.token_hex(8)}{_SCRATCH}"
        try:
            self._directory.link(self._name, self._directory, self._replaced)
        except CallFailed as error:  # then the rename waits
            if error.errno in (errno.ENOENT, *NO_LINKS):
                self._replaced = ""

    def _remove_replaced(self) -> None:
        """Removes the second name of the file that was to be replaced. If that fails, later writers remove it."""
        if self._replaced:
            with suppress(CallFailed):
                self._to_free.unlink(self._directory, self._replaced)
                self._replaced = ""

    def _end_file(self) -> tuple[int, int] | None:
        """Makes the content durable if the caller requested that, and closes the file. Returns its inode."""
        try:
            if self._durable:
                call(os.fsync, self.path, self.file.fd)
            inode = self._directory.inode_of(self._scratch)
            self.file.close(self.path)
        except CallFailed as error:
            raise self.failure(error) from error
        return inode

    def _is_at_path(self, inode: tuple[int, int] | None) -> bool:
        """Whether a failed rename took effect all the same. A network file system may lose the answer to a successful rename."""
        with suppress(CallFailed):
            return inode is not None and self._directory.inode_of(self._name) == inode
        return False

    def failure(self, error: CallFailed) -> ShardSaveError:
        """The error to raise if a call fails before the rename."""
        kind = OutOfSpaceError if error.errno in OUT_OF_SPACE else SaveNotCommittedError
        return kind(f"cannot write {self.path}: {error.reason}; nothing was written, existing files are unchanged")

    def close(self) -> None:
        """Removes whatever was created and not renamed, and closes what is open."""
        if self._phase is not _Phase.OPENING:
            with suppress(OSError):  # rmtree can raise it in spite of ignore_errors
                shutil.rmtree(self.workspace, ignore_errors=True)
        if self._phase is _Phase.WRITING:
            with suppress(OSError):
                os.unlink(self._scratch, dir_fd=self._directory.fd)
        self._remove_replaced()
        self._to_free.free_later()
        self.file.abandon()
        self._lock.abandon()
        self._directory.close()
