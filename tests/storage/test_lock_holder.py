"""Who holds a lock, from /proc/locks: said only if it is certain."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shardsave
from shardsave._storage.lock_holder import lock_holder

HOLD = "import fcntl, os, sys; f = os.open(sys.argv[1], 0); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


@contextmanager
def other_process(folder: Path) -> Iterator[int]:
    """Another process that locks ``folder``; returns its number."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def lines(fd: int, pid: int, form: str = "{n}: FLOCK  ADVISORY  WRITE {pid} {device}:{inode} 0 EOF") -> str:
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    others = ["1: POSIX  ADVISORY  READ 7 08:02:4567 128 128", "2: FLOCK  ADVISORY  WRITE 8 08:02:1 0 EOF"]
    return "\n".join([*others, form.format(n=3, pid=pid, device=device, inode=status.st_ino), "", "new words"]) + "\n"


def system(folder: Path, text: str, pid: int, opened: int | None) -> str:
    """A directory that looks like /proc. ``opened``: a descriptor of this process that process ``pid`` has open too."""
    (folder / "proc" / str(pid) / "fd").mkdir(parents=True)
    (folder / "proc/locks").write_text(text)
    if opened is not None:
        (folder / "proc" / str(pid) / "fd/3").symlink_to(os.readlink(f"/proc/self/fd/{opened}"))
    return str(folder / "proc")


def test_a_save_that_is_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that silently replaces what another one committed while it waited for the directory, and a note without a reason."""
    shardsave.save({"x": torch.ones(1)}, tmp_path, durable=False)
    held = os.open(tmp_path, os.O_RDONLY)
    reports = []

    def meanwhile(seconds: float) -> None:
        monkeypatch.undo()
        os.close(held)
        if not reports:
            reports.append(shardsave.save({"x": torch.zeros(1)}, tmp_path, durable=False))

    for others in (0, 1):
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr("shardsave._storage.lock.time.sleep", meanwhile)
        report = shardsave.save({"x": torch.full((1,), 2.0)}, tmp_path, durable=False)
        notes = [
            note for note in report.notes if "another save into this directory was committed while this one waited" in note
        ]
        assert len(notes) == 1 - others and reports[0].notes == ()
        held = os.open(tmp_path, os.O_RDONLY)
    os.close(held)
    assert shardsave.load(tmp_path)["x"] == 2


def test_a_lock_of_another_process(tmp_path: Path) -> None:
    """Catches an error that leaves the user to search for the process that holds the directory."""
    shardsave.save({"x": torch.ones(1)}, tmp_path)
    status = tmp_path.stat()
    with other_process(tmp_path) as pid:
        entry = f" {pid} {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
        listed = Path("/proc/locks").exists() and entry in Path("/proc/locks").read_text()
        with pytest.raises(shardsave.DirectoryBusyError) as refusal:
            shardsave.save({"x": torch.ones(1)}, tmp_path, lock_timeout=0)
    # Sandboxes do not list locks, and some file systems have another device in the list.
    holder = rf" \(process {pid}, python[^)]*\)" if listed else ""
    assert re.search(f"another save holds it{holder}; nothing was written", str(refusal.value))


def test_listed_locks(tmp_path: Path, fd: int) -> None:
    """Catches another lock of the list that is taken for this one, and a device or inode that is read wrongly."""
    proc = system(tmp_path, lines(fd, 1), 1, fd)
    assert lock_holder(fd, proc=proc).startswith("process 1")
    with open(tmp_path / "other", "w") as other:
        assert lock_holder(other.fileno(), proc=proc) == ""


def test_this_process(tmp_path: Path, fd: int) -> None:
    """Catches a user who is told to look at a process that is their own."""
    assert lock_holder(fd, proc=system(tmp_path, lines(fd, os.getpid()), os.getpid(), fd)) == "this process"


@pytest.mark.parametrize(
    "form",
    [
        "{n}: -> FLOCK  ADVISORY  WRITE {pid} {device}:{inode} 0 EOF",
        "{n}: POSIX  ADVISORY  WRITE {pid} {device}:{inode} 0 EOF",
        "{n}: FLOCK  ADVISORY  WRITE {pid} {device}:{inode}0 0 EOF",
        "{n}: FLOCK  ADVISORY  WRITE {pid} 00:fe:{inode} 0 EOF",
    ],
)
def test_lines_about_something_else(tmp_path: Path, fd: int, form: str) -> None:
    """Catches a process that only waits, or has another lock or file, and is named as the holder."""
    assert lock_holder(fd, proc=system(tmp_path, lines(fd, 1, form), 1, fd)) == ""


def test_what_is_not_certain(tmp_path: Path, fd: int) -> None:
    """Catches a number of another namespace, one that a new process has got, two holders, and a system without the list."""
    assert lock_holder(fd, proc=system(tmp_path / "a", lines(fd, 4321), 4321, None)) == ""
    assert lock_holder(fd, proc=system(tmp_path / "b", lines(fd, 0), 0, fd)) == ""
    assert lock_holder(fd, proc=system(tmp_path / "c", lines(fd, -1), 1, fd)) == ""
    both = system(tmp_path / "d", lines(fd, 1) + lines(fd, os.getpid()), 1, fd)
    system_of_self = tmp_path / "d/proc" / str(os.getpid()) / "fd"
    system_of_self.mkdir(parents=True)
    (system_of_self / "9").symlink_to(tmp_path)
    assert lock_holder(fd, proc=both) == ""
    assert lock_holder(fd, proc=str(tmp_path / "missing")) == ""


def test_a_lock_of_another_thread(tmp_path: Path) -> None:
    """Catches an error that names a stranger where this process itself saves."""
    shardsave.save({"x": torch.ones(1)}, tmp_path)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(shardsave.DirectoryBusyError, match=r"another save holds it(;| \(this process\);)"):
        shardsave.save({"x": torch.ones(1)}, tmp_path, lock_timeout=0)
    os.close(other)
