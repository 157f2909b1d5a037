"""How much disk space files take, and how much of it their removal frees."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from shardsave._common.os_calls import CallFailed
from shardsave._storage.directory import Directory


def bytes_on_disk(folder: Directory, names: Iterable[str]) -> int:
    """The disk space that removing ``names`` frees: that of files which have no further name, here or elsewhere."""
    return sum(size for size, further in _sizes(folder, names) if not further)


def bytes_visible(folder: Directory, name: str) -> int:
    """The disk space of the directory ``name`` and the files in it, as far as they can be listed; or of the file ``name``."""
    total = sum(size for size, _ in _sizes(folder, (name,)))
    with suppress(CallFailed), folder.enter(name) as inside:
        total += sum(size for size, _ in _sizes(inside, inside.names()))
    return total


def _sizes(folder: Directory, names: Iterable[str]) -> list[tuple[int, bool]]:
    """The disk space of each file among ``names``, and whether it has a name that is not among them. A clone's bytes count as its own."""
    found: dict[tuple[int, int], tuple[os.stat_result, int]] = {}
    for name in names:
        with suppress(CallFailed):
            status = folder.status_of(name)
            if status is not None:
                inode = status.st_dev, status.st_ino
                found[inode] = status, found[inode][1] + 1 if inode in found else 1
    return [
        (status.st_blocks * 512, status.st_nlink > count and not stat.S_ISDIR(status.st_mode))
        for status, count in found.values()
    ]
