"""Method: a real ext4 is cut off from its disk (FS_IOC_SHUTDOWN: what its journal has not committed is lost, as with the power) while
a save is at work: right before the N-th OS call, for N spread over all of them, and at random moments. Then it is mounted again,
replays its journal, and must hold the old or the new checkpoint, as the saver was told; the next save leaves no litter.

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

#: What a saver was told, as the exit status of its process.
_SUCCESS, _UNCERTAIN, _NOT_COMMITTED = 0, 3, 4

#: The journal commits by itself only after this many seconds: a slow machine loses no less than a fast one.
MOUNT = ("-o", "loop,commit=300")


def cut(folder: Path) -> None:
    """Shuts the file system of ``folder`` down; OSError where it cannot do that."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


class Disk:
    """The disk ``image``, mounted at ``folder``, on which one saver after the other is cut off."""

    def __init__(self, image: Path, folder: Path, first: bool) -> None:
        self.watched = folder / "watched"
        self._image = image
        self._folder = folder
        self._target = self.watched / "runs" / "ckpt"
        self.old = None if first else 1

    def reset(self) -> None:
        """The old checkpoint is there, or none is, and nothing of the disk is on its way."""
        shutil.rmtree(self.watched, ignore_errors=True)
        self.watched.mkdir()
        if self.old is not None:
            save(self.old, self._target)
        fd = os.open(self.watched, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def save(self, durable: bool = True) -> int:
        """Saves generation 2; what the saver was told."""
        try:
            save(2, self._target, durable=durable)
        except shardsave.DurabilityUncertainError:
            return _UNCERTAIN
        except shardsave.SaveNotCommittedError:
            return _NOT_COMMITTED
        return _SUCCESS

    def fork_saver(self, nth: int = 0, fate: Fate = Fate.PASS, durable: bool = True) -> int:
        """A process that saves, whose ``nth`` call meets ``fate``, and that exits with what it was told; its number."""
        child = os.fork()
        if child == 0:
            arm(self.watched, nth, fate)
            os._exit(self.save(durable))
        return child

    def outcome(self, child: int) -> tuple[int, int | None]:
        """Waits for a saver, cuts, and mounts again: what the saver was told, and the generation that is there."""
        status = os.waitpid(child, 0)[1]
        assert os.WIFEXITED(status), status
        cut(self._folder)
        subprocess.run(["umount", str(self._folder)], check=True)
        subprocess.run(["mount", *MOUNT, str(self._image), str(self._folder)], check=True)
        return os.WEXITSTATUS(status), generation_in(self._target)

    def judge(self, child: int) -> int:
        """As `outcome`, and what is there must be what the saver was told, which is given."""
        told, found = self.outcome(child)
        assert found in {_SUCCESS: {2}, _UNCERTAIN: {self.old, 2}, _NOT_COMMITTED: {self.old}}[told], (told, found)
        next_save_works(self._target)
        return told


def cut_at_each_call(disk: Disk, cuts: int) -> list[int]:
    """Cuts before ``cuts`` of the calls of a save, and once after all of them; what each saver was told."""
    disk.reset()
    arm(disk.watched, 0, Fate.PASS)
    disk.save()
    calls = seen()
    disarm()
    told = []
    for nth in sorted({1 + number * calls // cuts for number in range(cuts)} | {calls + 1}):
        disk.reset()
        told.append(disk.judge(disk.fork_saver(nth, Fate.CUT)))
    assert told[0] == _NOT_COMMITTED and told[-1] == _SUCCESS, told
    return told


def cut_at_any_moment(disk: Disk, cuts: int) -> list[int]:
    """Cuts at ``cuts`` random moments, whatever the threads of the saver and the kernel are doing; what each saver was told."""
    chance = random.Random(1)
    window = 0.05  # seconds; follows the disk, so that about half of the cuts come too late
    told = []
    for _ in range(cuts):
        disk.reset()
        child = disk.fork_saver()
        time.sleep(chance.random() * window)
        cut(disk.watched)
        told.append(disk.judge(child))
        window *= 0.8 if told[-1] == _SUCCESS else 1.25
    return told


def durability_left_out(disk: Disk, _cuts: int) -> list[int]:
    """A save without fsyncs, and one whose fsyncs do nothing, must be lost: this is a disk that does not forgive them."""
    told = []
    for fate, durable in ((Fate.PASS, False), (Fate.NO_SYNC, True)):
        disk.reset()
        outcome = disk.outcome(disk.fork_saver(fate=fate, durable=durable))
        assert outcome == (_SUCCESS, disk.old), (fate, outcome)
        told.append(outcome[0])
    return told


def main(image: str, folder: str, cuts: str) -> None:
    save(0, Path(folder) / "warm")
    for first in (True, False):
        disk = Disk(Path(image), Path(folder), first)
        for scenario in (durability_left_out, cut_at_each_call, cut_at_any_moment):
            told = scenario(disk, int(cuts))
            print(f"{scenario.__name__}: {len(told)} cuts, {told.count(_SUCCESS)} too late to hinder the save", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
