"""How much memory this process can still take: what the machine has free, and what its control groups leave of their limits.

The kernel ends a process of a group that exceeds its limit, whatever the machine has left; the limits of all groups above it count too
(kernel documents admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst). A group's usage includes pages of files that nobody
has used lately (``inactive_file``). The kernel takes these back first, so here they count as free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shardsave._common.imports import import_at_use


class FreeMemory(NamedTuple):
    """``bytes`` that can be allocated without swapping, as the system estimates it; ``with_swap``: the most that can be allocated at all.

    ``of``: what sets these limits, in words for a message.
    """

    bytes: int
    with_swap: int
    of: str


def free_memory(root: str = "/") -> FreeMemory | None:
    """The memory that this process can still take, the smallest of all limits; None if the system does not say.

    ``root``: where the directories ``proc`` and ``sys`` are, for tests.
    """
    import_at_use("psutil")  # takes longer to import than a small save
    import psutil

    try:
        available, swap = psutil.virtual_memory().available, _free_swap(Path(root))
    except (OSError, RuntimeError, RuntimeWarning, ValueError, KeyError, psutil.Error):
        return None
    machine = FreeMemory(available, available + swap, "this machine")
    return min([machine, *_free_in_groups(Path(root), swap)], key=lambda free: free.with_swap)


def _free_swap(root: Path) -> int:
    """The free swap space of the machine. `psutil.swap_memory` warns where counters that nobody asked for are missing."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("SwapFree:"):
            return int(line.split()[1]) * 1024
    return 0


class _Names(NamedTuple):
    """The names of a control group's files, and of the line in ``memory.stat``, in one version of the interface.

    ``total``: whether the limit and the usage of ``swap`` include the memory that is not swapped.
    """

    limit: str
    usage: str
    inactive: str
    swap_limit: str
    swap_usage: str
    total: bool


_V1 = _Names(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
    "memory.memsw.limit_in_bytes",
    "memory.memsw.usage_in_bytes",
    True,
)
_V2 = _Names("memory.max", "memory.current", "inactive_file", "memory.swap.max", "memory.swap.current", False)


def _free_in_groups(root: Path, swap: int) -> Iterator[FreeMemory]:
    """What each control group of this process, and each one above it, has free. ``swap``: the free swap space of the machine."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in memberships:  # hierarchy number : controllers : path
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" or "memory" in controllers.split(","):
            names = _V2 if number == "0" else _V1
            for folder, name in _folders(root, mounts, group, names):
                free = _free_in(folder, names, name, swap)
                if free is not None:
                    yield free


def _folders(root: Path, mounts: list[str], group: str, names: _Names) -> Iterator[tuple[Path, str]]:
    """The directories of ``group`` and of the groups above it, as far as they are mounted, each with its name for a message."""
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" if names is _V2 else kind[0] == "cgroup" and "memory" in kind[2].split(","):
            top, place = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
            # In a container only a part of the tree may be mounted, and the group may be named from outside of it.
            inside = group[len(top.rstrip("/")) :] if f"{group}/".startswith(f"{top.rstrip('/')}/") else ""
            parts = [part for part in inside.split("/") if part]
            if ".." in parts:
                parts = []
            for depth in range(len(parts), -1, -1):
                yield (root / place.lstrip("/")).joinpath(*parts[:depth]), "/" + "/".join(parts[:depth])
            return


def _free_in(folder: Path, names: _Names, name: str, swap: int) -> FreeMemory | None:
    """What the group has free; None if it has no limit."""
    limit, usage = _number(folder / names.limit), _number(folder / names.usage)
    if limit is None or usage is None:
        return None
    inactive = 0
    with suppress(OSError, ValueError, KeyError):
        lines = (folder / "memory.stat").read_text().splitlines()
        inactive = int(dict(line.split(" ", 1) for line in lines)[names.inactive])
    free = max(0, limit - usage + inactive)
    with_swap = free + swap
    swap_limit, swap_usage = _number(folder / names.swap_limit), _number(folder / names.swap_usage)
    if swap_limit is not None and swap_usage is not None:
        swap_left = max(0, swap_limit - swap_usage)
        with_swap = min(with_swap, swap_left + inactive if names.total else free + swap_left)
    return FreeMemory(free, max(free, with_swap), f"control group {name}")


def _number(path: Path) -> int | None:
    """The number in a file; None for ``max``, for anything else, and if there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def return_freed_memory() -> None:
    """Gives memory that this process has freed, and whose allocator has kept it, back to the system."""
    import ctypes
    import gc

    gc.collect()
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
