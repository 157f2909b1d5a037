"""What memory is free: the machine's, and what each control group leaves, read from directories that look like the system's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from shardsave._common.free_memory import FreeMemory, free_memory

GB = 1 << 30
V1_MOUNT = "35 31 0:32 {top} {place} rw,relatime shared:5 - cgroup cgroup rw,memory"
V2_MOUNT = "32 31 0:29 {top} {place} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
OTHER = [
    "23 1 8:1 / / rw - ext4 /dev/vda rw",
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
    "a line of another kind",
]
UNLIMITED = 9223372036854771712

#: What a group's directory has: limit, usage, inactive pages of files, limit and usage of swap space; None: no such file.
Group = tuple[object, object, int, object, object]
Tree = Callable[..., str]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with 50 GB of free memory and 5 GB of free swap space."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50 * GB))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemFree:  1 kB\nSwapTotal:  9765625 kB\nSwapFree:  {5 * GB // 1024} kB\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def make(version: int, own: str, groups: dict[str, Group], *, top: str = "/", place: str = "/sys/fs/cgroup") -> str:
        """``own``: this process's group; ``groups``: path below the mount → its numbers."""
        members = ["0::/"] if version == 1 else ["5:cpu:/elsewhere"]
        members.append(f"4:hugetlb,memory:{own}" if version == 1 else f"0::{own}")
        (tmp_path / "proc/self/cgroup").write_text("\n".join([*members, "broken", ""]))
        mount = (V1_MOUNT if version == 1 else V2_MOUNT).format(top=top, place=place.replace(" ", r"\040"))
        (tmp_path / "proc/self/mountinfo").write_text("\n".join([*OTHER, mount, ""]))
        if version == 1:
            names = ["limit_in_bytes", "usage_in_bytes", "total_inactive_file", "memsw.limit_in_bytes", "memsw.usage_in_bytes"]
        else:
            names = ["max", "current", "inactive_file", "swap.max", "swap.current"]
        for path, (limit, usage, inactive, *swap) in groups.items():
            folder = tmp_path / place.lstrip("/") / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.stat").write_text(f"anon 12\n{names[2]} {inactive}\nfile 3\n")
            for name, value in zip([*names[:2], *names[3:]], [limit, usage, *swap]):
                if value is not None:
                    (folder / f"memory.{name}").write_text(f"{value}\n")
        return str(tmp_path)

    return make


def free_of(limit: int, usage: int, inactive: int = 0) -> Group:
    return (limit * GB, usage * GB, inactive * GB, None, None)


def test_no_groups(tmp_path: Path) -> None:
    """Catches an error where there are no control groups, and swap space that counts as free memory."""
    assert free_memory(str(tmp_path)) == FreeMemory(50 * GB, 55 * GB, "this machine")


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of psutil that ends a load, where /proc is hidden."""

    def fail() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert free_memory(str(tmp_path)) is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_of_all_levels(version: int, tree: Tree) -> None:
    """Catches a limit of a group above that is overlooked, and cached pages that count as used."""
    groups = {"": free_of(40, 4), "jobs": free_of(20, 16, 2), "jobs/a": free_of(30, 3)}
    assert free_memory(tree(version, "/jobs/a", groups)) == FreeMemory(6 * GB, 11 * GB, "control group /jobs")


@pytest.mark.parametrize("version", [1, 2])
def test_the_own_group(version: int, tree: Tree) -> None:
    """Catches a limit of the own group that is overlooked, or of a sibling that is obeyed."""
    groups = {"a": free_of(20, 1), "a/b": free_of(8, 7), "a/c": free_of(1, 1)}
    assert free_memory(tree(version, "/a/b", groups)) == FreeMemory(GB, 6 * GB, "control group /a/b")


def test_no_limit(tree: Tree) -> None:
    """Catches ``max`` that is taken for a number; the root group of version 2 has no such files at all."""
    groups: dict[str, Group] = {"a": ("max", 3 * GB, 0, "max", 0), "a/b": (None, None, 0, None, None)}
    assert free_memory(tree(2, "/a/b", groups)) == FreeMemory(50 * GB, 55 * GB, "this machine")


def test_no_limit_in_version_1(tree: Tree) -> None:
    """Catches the largest number of pages, which is version 1's word for no limit, that is taken for a limit."""
    groups: dict[str, Group] = {"": (UNLIMITED, 3 * GB, 0, UNLIMITED, 3 * GB), "a": (UNLIMITED, GB, 0, None, None)}
    assert free_memory(tree(1, "/a", groups)) == FreeMemory(50 * GB, 55 * GB, "this machine")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_swap_space(version: int, tree: Tree) -> None:
    """Catches swap space of the machine that a group may not use."""
    more = (11 * GB, 9 * GB) if version == 1 else (GB, 0)  # in version 1, both include the memory that is not swapped
    root = tree(version, "/a", {"a": (10 * GB, 8 * GB, GB, *more)})
    assert free_memory(root) == FreeMemory(3 * GB, (3 if version == 1 else 4) * GB, "control group /a")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("own", ["/docker/4f2a", "/docker/4f2a/inner", "/", "/../other"])
def test_in_a_container(version: int, own: str, tree: Tree) -> None:
    """Catches a container whose group is named from outside of it, whose tree is mounted in part, at a place with a space in its name."""
    top = "/docker/4f2a" if own.startswith("/docker") else "/"
    root = tree(version, own, {"": free_of(4, 1), "inner": free_of(9, 1)}, top=top, place="/mnt/the groups")
    assert free_memory(root) == FreeMemory(3 * GB, 8 * GB, "control group /")


def test_usage_beyond_the_limit(tree: Tree) -> None:
    """Catches a negative number, when a limit was lowered below what is used."""
    assert free_memory(tree(2, "/a", {"a": free_of(1, 2)})) == FreeMemory(0, 5 * GB, "control group /a")


def test_broken_files(tree: Tree, tmp_path: Path) -> None:
    """Catches an error for files of a form that nobody knows."""
    root = tree(2, "/a", {"a": free_of(10, 2)})
    (tmp_path / "sys/fs/cgroup/a/memory.stat").write_text("inactive_file many\n\n")
    assert free_memory(root) == FreeMemory(8 * GB, 13 * GB, "control group /a")
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_bytes(b"\xff\xfe")
    assert free_memory(root) == FreeMemory(50 * GB, 55 * GB, "this machine")


def test_this_system() -> None:
    """Catches a real system that is not understood."""
    free = free_memory()
    assert free is not None and 0 < free.bytes <= free.with_swap
