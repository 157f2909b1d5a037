"""Permissions of new files: those of the files that they replace, exactly, and at no moment more.

A file that replaces nothing has what the umask and the directory's default access control list (ACL) give it. With an ACL, the group's
bits of a mode are only the limit of what its entries allow (acl(5)); so a mode without its ACL would allow the group more.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call
from shardsave._storage.directory import Directory

_ACL, _DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"

#: errno values of getxattr(2) for a file without an ACL, or a file system without ACLs.
_NO_ACL = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS)


class Permissions(NamedTuple):
    """Who may do what with a file: the nine bits of its mode, its group, and its ACL."""

    mode: int
    group: int
    acl: bytes | None = None

    def without_group(self) -> Permissions:
        """For a file of another group, or without the ACL: the group may do what everybody may do, at most."""
        return self._replace(mode=self.mode & (0o707 | (self.mode & 0o007) << 3), acl=None)

    def of_folder(self) -> Permissions:
        """For a directory of files that have these permissions. No ACL is right for both, so it is left out."""
        plain = self if self.acl is None else self.without_group()
        return plain._replace(mode=stat.S_IRWXU | (plain.mode & 0o066) | (plain.mode & 0o044) >> 2)


@dataclass(frozen=True)
class Replaced:
    """The permissions of what a save replaces: of ``files``, of the ``index``, of a part's ``folder`` and of the files ``in_folder``.

    None: there is nothing to replace.
    """

    files: Permissions | None = None
    index: Permissions | None = None
    folder: Permissions | None = None
    in_folder: Permissions | None = None


def permissions_of(path: str, status: os.stat_result) -> Permissions:
    """The permissions of the file at ``path``, whose status is ``status``. Raises CallFailed."""
    mode = stat.S_IMODE(status.st_mode) & 0o777
    return Permissions(mode, status.st_gid, _read_acl(path, _ACL) if mode & stat.S_IRWXG else None)


def common_permissions(several: Iterable[Permissions]) -> Permissions | None:
    """What all of ``several`` allow; None if there are none."""
    common: Permissions | None = None
    for one in several:
        if common is not None and (one.group, one.acl) != (common.group, common.acl):
            one, common = one.without_group(), common.without_group()
        common = one if common is None else common._replace(mode=common.mode & one.mode)
    return common


class Access(NamedTuple):
    """Whose a file is, and who may do what with it."""

    owner: int
    group: int
    mode: int
    acl: bytes | None


def access_of(fd: int, name: str) -> Access:
    """The owner and the permissions of an open file. Raises CallFailed."""
    status = call(os.fstat, name, fd)
    acl = _read_acl(fd, _ACL, name) if status.st_mode & stat.S_IRWXG else None
    return Access(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), acl)


def _read_acl(file: str | int, kind: str, name: str = "") -> bytes | None:
    """The list of the file with this path or descriptor; ``name`` is for messages, if it is a descriptor."""
    try:
        return call(os.getxattr, name or str(file), file, kind)
    except CallFailed as error:
        if error.errno not in _NO_ACL:
            raise
        return None


class FileMaker:
    """Creates files in ``folder``, which is open and whose path is ``path``, with given permissions. Raises CallFailed."""

    def __init__(self, folder: Directory, path: str) -> None:
        self._folder = folder
        self._inherits = _read_acl(path, _DEFAULT_ACL) is not None  # whether new files get an ACL
        self._group = call(os.fstat, folder.name, folder.fd).st_gid  # most likely that of new files

    def create(self, name: str, file: Descriptor, wanted: Permissions) -> None:
        """Creates the file ``name``, which must not exist yet, and opens it as ``file``."""
        self._folder.create(name, file, self._first_mode(wanted))
        # A reader of a checkpoint is most often its owner.
        self._give(name, file.fd, wanted._replace(mode=wanted.mode | stat.S_IRUSR))

    def make_folder(self, inside: Directory, wanted: Permissions) -> None:
        """Creates the directory that has the name of ``inside``, which must not exist yet, and opens it."""
        wanted = wanted._replace(mode=wanted.mode | stat.S_IRWXU)
        self._folder.mkdir(inside.name, self._first_mode(wanted))
        inside.open_in(self._folder)
        self._give(inside.name, inside.fd, wanted)

    def _first_mode(self, wanted: Permissions) -> int:
        is_plain = wanted.acl is None and not self._inherits and wanted.group == self._group
        return wanted.mode if is_plain else wanted.mode & ~stat.S_IRWXG

    def _give(self, name: str, fd: int, wanted: Permissions) -> None:
        """Gives the new file or directory ``name`` the permissions ``wanted``."""
        status = call(os.fstat, name, fd)
        if status.st_gid != wanted.group:
            try:
                call(os.fchown, name, fd, -1, wanted.group)
            except CallFailed:
                wanted = wanted.without_group()
        if wanted.acl is not None:
            try:
                return call(os.setxattr, name, fd, _ACL, wanted.acl)
            except CallFailed:
                wanted = wanted.without_group()
        if self._inherits:
            with suppress(CallFailed):  # there may be none
                call(os.removexattr, name, fd, _ACL)
                status = call(os.fstat, name, fd)
        if stat.S_IMODE(status.st_mode) & 0o777 != wanted.mode:
            self._change_mode(name, fd, wanted.mode | status.st_mode & stat.S_ISGID, status.st_mode)

    @staticmethod
    def _change_mode(name: str, fd: int, mode: int, present: int) -> None:
        try:
            call(os.fchmod, name, fd, mode)
        except CallFailed:
            if present & 0o777 & ~mode:
                raise  # otherwise it allows less than it might
