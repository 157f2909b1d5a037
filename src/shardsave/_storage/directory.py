"""An open directory, and the OS calls on the names in it: every name is one path component, relative to the directory's descriptor.

So a `Directory` stays the same directory even if a directory above it is renamed. Only `make_folders` uses paths, since the
directories that it creates do not exist yet, and `names_on_the_way`, which is asked about a path.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from types import TracebackType

from shardsave._common.descriptors import Descriptor, open_regular
from shardsave._common.os_calls import CallFailed, absolute_path, call, kind_of, read_whole, sync_all
from shardsave._storage.links import follow
from shardsave.errors import SaveNotCommittedError

#: errno values of link(2) if the file system has no hard links, or does not permit this one.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

#: errno values that are ignored when directories above the checkpoint's are fsynced: they may belong to someone else.
_MAY_NOT_SYNC = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EOPNOTSUPP)


#: How many symbolic links Linux follows from one to the next.
_MAX_LINKS = 40


class Directory:
    """A directory, to be opened by `open` or `open_in`. As a context manager it is closed at the end.

    ``name``: its name in errors, "" if the message names the directory elsewhere. ``durable``: whether the ``sync`` methods wait for
    the disk; otherwise they do nothing. Every method but `close` raises CallFailed. Threads: for one thread only.
    """

    def __init__(self, name: str = "", *, durable: bool = False) -> None:
        self.name = name
        self.durable = durable
        self._descriptor = Descriptor()

    @property
    def fd(self) -> int:
        """The descriptor, -1 before `open` and after `close`."""
        return self._descriptor.fd

    def open(self, path: str) -> None:
        """Opens the directory at ``path``, through symbolic links."""
        self._descriptor.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def open_for_writing(self, path: str) -> None:
        """Opens the directory at ``path``, but through no symbolic link of another user that `follow` refuses."""
        with follow(path) as found:
            try:
                self._descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, found)
            except CallFailed as error:
                raise CallFailed(error.call, path, error.errno or 0, error.strerror or "") from error

    def open_in(self, parent: Directory) -> None:
        """Opens the directory that has this one's name in ``parent``. A symbolic link is refused."""
        self._descriptor.open(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, parent.fd)

    def enter(self, name: str) -> Directory:
        """Opens the directory ``name`` in this one. A symbolic link is refused."""
        inside = Directory(name, durable=self.durable)
        inside.open_in(self)
        return inside

    def close(self) -> None:
        self._descriptor.abandon()

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def names(self) -> list[str]:
        """The names in it, in no particular order."""
        return call(os.listdir, self.name, self.fd)

    def status_of(self, name: str, *, follow: bool = False) -> os.stat_result | None:
        """The status of ``name``, None if there is nothing. Without ``follow``, the status of a symbolic link is its own."""
        try:
            return call(os.stat, name, name, dir_fd=self.fd, follow_symlinks=follow)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def target_of(self, link: str) -> os.stat_result | None:
        """The status of what the symbolic link ``link`` leads to, None if that is nothing."""
        try:
            return self.status_of(link, follow=True)
        except CallFailed as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            return None

    def inode_of(self, name: str) -> tuple[int, int] | None:
        """Device and inode number of ``name``, which identify a file; None if there is nothing."""
        status = self.status_of(name)
        return (status.st_dev, status.st_ino) if status is not None else None

    def free_bytes(self) -> int | None:
        """The free bytes of the file system; None if it does not know them and reports no blocks at all (ramfs, some on networks)."""
        status = call(os.fstatvfs, self.name, self.fd)
        return status.f_bavail * status.f_frsize if status.f_blocks else None

    def open_regular(self, name: str, *, follow: bool = True) -> Descriptor | None:
        """Opens the regular file ``name`` for reading; returns None if there is nothing. Raises NotRegular for anything else."""
        return open_regular(name, self.fd, follow=follow)

    def read_all(self, name: str, limit: int, *, follow: bool = True) -> bytes | None:
        """The content of the regular file ``name``, None if there is nothing. Raises TooLong if it is longer than ``limit`` bytes."""
        file = self.open_regular(name, follow=follow)
        if file is None:
            return None
        with file:
            return read_whole(file.fd, name, limit)

    def create(self, name: str, file: Descriptor, mode: int = 0o666) -> None:
        """Creates the file ``name``, which must not exist yet, and opens it as ``file``."""
        file.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, self.fd, mode)

    def sync(self) -> None:
        """Makes the names in it durable."""
        self.sync_open(self.fd, self.name)

    def sync_file(self, name: str) -> None:
        """Makes the content of the regular file ``name`` durable, whoever wrote it; does nothing if there is no such file."""
        file = self.open_regular(name)
        if file is not None:
            with file:
                self.sync_open(file.fd, name)

    def sync_with(self, name: str) -> None:
        """Makes the names in it durable, and the content of the regular file ``name``, whoever wrote it, if there is one."""
        if not self.durable:
            return
        file = self.open_regular(name)
        with file or Descriptor():
            for failure in sync_all([(self.fd, self.name), *([(file.fd, name)] if file is not None else [])]):
                if failure is not None:
                    raise failure

    def sync_open(self, fd: int, name: str) -> None:
        """Makes the content of an open file durable.

        With one fsync and no retry: after an error the kernel has dropped the pages, and a second fsync would report success.
        """
        if self.durable:
            call(os.fsync, name, fd)

    def mkdir(self, name: str, mode: int = 0o777) -> None:
        call(os.mkdir, name, name, mode, dir_fd=self.fd)

    def link(self, name: str, into: Directory, new_name: str) -> None:
        """Gives the file ``name`` the second name ``new_name`` in ``into``, which must be free."""
        call(os.link, new_name, name, new_name, src_dir_fd=self.fd, dst_dir_fd=into.fd, follow_symlinks=False)

    def rename(self, name: str, into: Directory, new_name: str) -> None:
        """Moves the file ``name`` to ``new_name`` in ``into``, where it replaces whatever has that name."""
        call(os.rename, new_name, name, new_name, src_dir_fd=self.fd, dst_dir_fd=into.fd)

    def unlink(self, name: str) -> None:
        call(os.unlink, name, name, dir_fd=self.fd)

    def rmdir(self, name: str) -> None:
        call(os.rmdir, name, name, dir_fd=self.fd)


def path_to_write(path: str) -> str:
    """The absolute path of a checkpoint or file that will be written. Raises SaveNotCommittedError if there is no current directory."""
    path = absolute_path(path)
    if os.path.isabs(path):
        return path
    try:
        return os.path.join(call(os.getcwd, ""), path)
    except CallFailed as error:
        raise SaveNotCommittedError(
            f"cannot save to {path}: the path is relative to the current directory, which does not exist any more: {error.words}; "
            f"nothing was written"
        ) from error


def make_folders(path: str, durable: bool) -> None:
    """Creates ``path`` and the directories that are missing above it, outermost first. Raises CallFailed.

    With ``durable``, the parent of each new directory is synced. Existing directories above are synced too, because nobody knows
    whether their creators did so. A symbolic link of another user that `follow` refuses is refused before anything is created.
    """
    existing, missing = missing_folders(path)
    with follow(existing):
        pass
    for folder in reversed(missing):
        try:
            call(os.mkdir, folder, folder)
        except CallFailed:
            if not _is_folder(folder):
                raise
    if durable:
        _sync_parents(_above(existing), [os.path.dirname(folder) for folder in missing])


def missing_folders(path: str) -> tuple[str, list[str]]:
    """``path``, or the nearest directory above it that exists, and those that are missing, innermost first. Raises CallFailed."""
    missing, existing = [], path
    while not _is_folder(existing):
        missing.append(existing)
        existing = os.path.dirname(existing)
    return existing, missing


def names_on_the_way(folder: Directory, path: str) -> Iterator[str]:
    """The names in ``folder`` that ``path`` needs: its own last part, and those of symbolic links on the way to its file."""
    own = call(os.fstat, folder.name, folder.fd)
    with suppress(OSError):  # the path leads nowhere
        for _ in range(_MAX_LINKS):
            parent, name = os.path.split(path)
            if os.path.samestat(own, os.stat(parent or ".")):
                yield name
            if not os.path.islink(path):
                return
            path = os.path.join(parent, os.readlink(path))


def _above(path: str) -> Iterator[str]:
    """The directories above ``path``, up to the root of its file system. Raises CallFailed."""
    device = call(os.stat, path, path).st_dev
    while (parent := os.path.dirname(path)) != path and call(os.stat, parent, parent).st_dev == device:
        yield parent
        path = parent


def _sync_parents(others: Iterable[str], of_new: Iterable[str]) -> None:
    """Makes the names in these directories durable; in ``others``, where that is allowed."""
    with ExitStack() as opened:
        files: list[tuple[int, str]] = []
        needed: list[bool] = []
        for is_needed, paths in ((False, others), (True, of_new)):
            for path in paths:
                folder = opened.enter_context(Directory(path))
                try:
                    folder.open(path)
                except CallFailed as error:
                    if is_needed or error.errno not in _MAY_NOT_SYNC:
                        raise
                    continue
                files.append((folder.fd, path))
                needed.append(is_needed)
        for is_needed, failure in zip(needed, sync_all(files)):
            if failure is not None and (is_needed or failure.errno not in _MAY_NOT_SYNC):
                raise failure


def _is_folder(path: str) -> bool:
    """Whether ``path`` is a directory; False if there is nothing. Raises CallFailed if there is something else."""
    try:
        mode = call(os.stat, path, path).st_mode
    except CallFailed as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    if not stat.S_ISDIR(mode):
        raise CallFailed("mkdir", path, errno.EEXIST, f"a directory was expected, it is a {kind_of(mode)}")
    return True
