"""Follows a path to a directory that will be written to, but no symbolic link by which another user could choose that directory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call

_FOLDER = os.O_PATH | os.O_DIRECTORY
#: The most links in a path, as for the kernel.
_MOST_LINKS = 40


@contextmanager
def follow(path: str) -> Iterator[int]:
    """A descriptor (O_PATH) of the directory at ``path``, closed at the end of the block. Raises CallFailed.

    A symbolic link in a directory to which everybody may write is refused, wherever the path meets it, if it belongs neither to this
    user nor to the owner of that directory. The kernel has this rule for sticky directories (fs.protected_symlinks), but not on
    every machine. Each component is opened relative to the one before, so nobody can exchange one after it was examined.
    """
    with ExitStack() as opened:
        try:
            folder = _follow(path, opened)
        except CallFailed as error:
            raise CallFailed("open", path, error.errno or 0, error.strerror or "") from error
        yield folder.fd


def _follow(path: str, opened: ExitStack) -> Descriptor:
    folder = opened.enter_context(Descriptor())
    folder.open("/" if path.startswith("/") else ".", _FOLDER)
    waiting, links = path.split("/")[::-1], 0
    while waiting:
        part = waiting.pop()
        if part in ("", "."):
            continue
        inside = opened.enter_context(Descriptor())
        try:
            inside.open(part, _FOLDER | os.O_NOFOLLOW, folder.fd)
        except CallFailed as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            target = _target_of(part, folder, error)
            links += 1
            if links > _MOST_LINKS:
                raise CallFailed("open", path, errno.ELOOP, os.strerror(errno.ELOOP)) from error
            if target is not None:
                waiting += target.split("/")[::-1]
                part = "/" if target.startswith("/") else "."
            inside.open(part, _FOLDER, folder.fd)
        folder.abandon()
        folder = inside
    return folder


def _target_of(part: str, folder: Descriptor, not_a_folder: CallFailed) -> str | None:
    """What the symbolic link ``part`` says; None for one of /proc, whose text may not say where it leads."""
    with Descriptor() as link:
        link.open(part, os.O_PATH | os.O_NOFOLLOW, folder.fd)
        status = call(os.fstat, part, link.fd)
        if not stat.S_ISLNK(status.st_mode):
            raise not_a_folder
        _refuse_foreign(call(os.fstat, part, folder.fd), part, status)
        return call(os.readlink, part, "", dir_fd=link.fd) if status.st_dev != _device_of_proc() else None


def _refuse_foreign(folder: os.stat_result, part: str, link: os.stat_result) -> None:
    if folder.st_mode & stat.S_IWOTH and link.st_uid not in (os.geteuid(), folder.st_uid):
        raise CallFailed(
            "open",
            part,
            errno.EACCES,
            f"a path without symbolic links of other users was expected, since everybody may write there; {part} is a link of user "
            f"{link.st_uid}",
        )


def _device_of_proc() -> int | None:
    try:
        return os.stat("/proc").st_dev
    except OSError:
        return None
