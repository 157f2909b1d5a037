"""Method: a real ext4 is cut off from its disk during a save (FS_IOC_SHUTDOWN: everything that its journal has not committed is
lost, as with a loss of power): right before the N-th OS call, for N spread over all of them, and at random moments. Then it is mounted
again, replays its journal, and must hold the checkpoint that the saver reported, old or new; the next save leaves no litter.

``python -m faults.cuts IMAGE FOLDER CUTS``, with the library of ``beneath.c`` preloaded and IMAGE mounted at FOLDER.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import shardsave
from faults.beneath import Fate, arm, disarm, seen
from faults.savers import generation_in, next_save_works, save

_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # FS_IOC_SHUTDOWN, _IOR('X', 125, __u32), and its flag

#: What a saver reported, as the exit status of its process.
_SUCCESS, _UNCERTAIN, _NOT_COMMITTED = 0, 3, 4

#: The journal commits by itself only after 300 seconds, so that a slow machine loses as much as a fast one.
MOUNT = ("-o", "loop,commit=300")


def cut(folder: Path) -> None:
    """Shuts the file system of ``folder`` down. Raises OSError where it cannot do that."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


class Disk:
    """The disk ``image``, mounted at ``folder``: one saver after the other is cut off from it."""

    def __init__(self, image: Path, folder: Path, first: bool) -> None:
        self.watched = folder / "watched"
        self._image = image
        self._folder = folder
        self._target = self.watched / "runs" / "ckpt"
        self.old = None if first else 1

    def reset(self) -> None:
        """Puts the old checkpoint there, or none, and makes that durable."""
        shutil.rmtree(self.watched, ignore_errors=True)
        self.watched.mkdir()
        if self.old is not None:
            save(self.old, self._target)
        fd = os.open(self.watched, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def save(self, durable: bool = True) -> int:
        """Saves generation 2; returns what the save reported."""
        try:
            save(2, self._target, durable=durable)
        except shardsave.DurabilityUncertainError:
            return _UNCERTAIN
        except shardsave.SaveNotCommittedError:
            return _NOT_COMMITTED
        return _SUCCESS

    def fork_saver(self, nth: int = 0, fate: Fate = Fate.PASS, durable: bool = True) -> int:
        """Forks a process that saves, whose ``nth`` call meets ``fate``, and that exits with what the save reported. Returns its id."""
        child = os.fork()
        if child == 0:
            arm(self.watched, nth, fate)
            os._exit(self.save(durable))
        return child

    def outcome(self, child: int) -> tuple[int, int | None]:
        """Waits for a saver, cuts, and mounts again. Returns what the saver reported, and the generation on disk."""
        status = os.waitpid(child, 0)[1]
        assert os.WIFEXITED(status), status
        cut(self._folder)
        subprocess.run(["umount", str(self._folder)], check=True)
        subprocess.run(["mount", *MOUNT, str(self._image), str(self._folder)], check=True)
        return os.WEXITSTATUS(status), generation_in(self._target)

    def judge(self, child: int) -> int:
        """As `outcome`; what is on disk must agree with what the saver reported, which is returned."""
        reported, generation = self.outcome(child)
        allowed = {_SUCCESS: {2}, _UNCERTAIN: {self.old, 2}, _NOT_COMMITTED: {self.old}}[reported]
        assert generation in allowed, (reported, generation)
        next_save_works(self._target)
        return reported


def cut_at_each_call(disk: Disk, cuts: int) -> list[int]:
    """Cuts before ``cuts`` of the calls of a save, and once after all of them. Returns what each saver reported."""
    disk.reset()
    arm(disk.watched, 0, Fate.PASS)
    disk.save()
    calls = seen()
    disarm()
    reports = []
    for nth in sorted({1 + number * calls // cuts for number in range(cuts)} | {calls + 1}):
        disk.reset()
        reports.append(disk.judge(disk.fork_saver(nth, Fate.CUT)))
    assert reports[0] == _NOT_COMMITTED and reports[-1] == _SUCCESS, reports
    return reports


def cut_at_any_moment(disk: Disk, cuts: int) -> list[int]:
    """Cuts at ``cuts`` random moments, whatever the saver's threads and the kernel are doing. Returns what each saver reported."""
    chance = random.Random(1)
    window = 0.05  # seconds; adapts to the disk, so that about half of the cuts come too late
    reports = []
    for _ in range(cuts):
        disk.reset()
        child = disk.fork_saver()
        time.sleep(chance.random() * window)
        cut(disk.watched)
        reports.append(disk.judge(child))
        window *= 0.8 if reports[-1] == _SUCCESS else 1.25
    return reports


def durability_left_out(disk: Disk, _cuts: int) -> list[int]:
    """A save without fsyncs, and one whose fsyncs do nothing, must be lost: so this disk would reveal a missing fsync.

    Now and then such a save stays, since another process has called sync(2), which writes all disks.
    """
    reports = []
    for fate, durable in ((Fate.PASS, False), (Fate.NO_SYNC, True)):
        for _ in range(5):
            disk.reset()
            outcome = disk.outcome(disk.fork_saver(fate=fate, durable=durable))
            if outcome != (_SUCCESS, 2):
                break
        assert outcome == (_SUCCESS, disk.old), (fate, outcome)
        reports.append(outcome[0])
    return reports


def main(image: str, folder: str, cuts: str) -> None:
    save(0, Path(folder) / "warm")
    for first in (True, False):
        disk = Disk(Path(image), Path(folder), first)
        for scenario in (durability_left_out, cut_at_each_call, cut_at_any_moment):
            reports = scenario(disk, int(cuts))
            print(f"{scenario.__name__}: {len(reports)} cuts, {reports.count(_SUCCESS)} after the save", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
