"""A disk that promises room and then has none: an ext4 image on a tmpfs that is smaller than the image.

Method: ``fallocate`` succeeds there, and what fails is the writing itself, or the fsync after it. Needs root and loop devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_faults import ENGINES

PROGRAM = """
import sys, torch, shardsave
folder = sys.argv[1]
try:
    shardsave.save({"x": torch.arange(4_000_000)}, folder)
    print("saved")
except shardsave.ShardSaveError as error:
    print(type(error).__name__, error)
"""


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def thin_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty ext4 that says it has some 50 MB and has less than 12."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=12m", "tmpfs", str(memory))
    try:
        image = memory / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        mount("-o", "loop", str(image), str(disk))
        try:
            yield disk
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(memory)], check=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_only_promised_room(thin_disk: Path, engine: str) -> None:
    """Catches a save that reports success for bytes that the disk never took, and one that costs the previous checkpoint."""
    environment = {**os.environ, "SHARDSAVE_ENGINE": engine}
    small = "import sys, torch, shardsave; print(shardsave.save({'x': torch.ones(1000)}, sys.argv[1]))"
    load = "import sys, shardsave; print(int(shardsave.load(sys.argv[1])['x'].sum()))"

    def run(program: str) -> str:
        command = [sys.executable, "-c", program, str(thin_disk / "ckpt")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "durable" in run(small)
    printed = run(PROGRAM)
    assert printed.startswith(("SaveNotCommittedError", "OutOfSpaceError")), printed
    assert "nothing was committed, the previous checkpoint is intact" in printed
    assert run(load) == "1000\n"
