"""File systems that only root may mount: one with less space than it promises, one that loses its disk, one without direct I/O.

Method: an ext4 image on a tmpfs that is smaller than the image: ``fallocate`` succeeds there, and writing, or the fsync after it,
fails. An ext4 that is cut off from its disk during a save (``faults/cuts.py``). A ramfs, which refuses O_DIRECT.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shardsave
from faults.cuts import MOUNT, cut
from faults.running import ENGINES, run_beneath
from faults.savers import litter_in
from warm_python import warm_python

pytestmark = pytest.mark.slow

CUTS = int(os.environ.get("SHARDSAVE_CUTS", "6"))  # per scenario, for a first save and for an overwrite

PROGRAM = """
import sys, torch, shardsave
folder = sys.argv[1]
try:
    shardsave.save({"x": torch.arange(4_000_000)}, folder)
    print("saved")
except shardsave.ShardSaveError as error:
    print(type(error).__name__, error)
"""


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    """Makes the directory ``where`` and runs ``mount arguments where``; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    where.mkdir()
    done = subprocess.run(["mount", *arguments, str(where)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 12 MB."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=12m", "tmpfs") as disk:
        yield disk


@pytest.fixture
def thin_disk(tmp_path: Path, small_disk: Path) -> Iterator[Path]:
    """An empty ext4 that reports some 50 MB and has less than 12."""
    image = small_disk / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(tmp_path / "thin", "-o", "loop", str(image)) as disk:
        yield disk


@pytest.fixture
def disk_that_can_be_cut(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An image of an ext4 in memory, and its mount point. It has been cut off from its disk once, to see that this works."""
    with mounted(tmp_path / "memory", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as memory:
        image = memory / "image"
        with image.open("wb") as file:
            file.truncate(48 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        with mounted(tmp_path / "disk", *MOUNT, str(image)) as disk:
            try:
                cut(disk)
            except OSError as error:
                pytest.skip(f"ext4 cannot be shut down here: {error}")
            subprocess.run(["umount", str(disk)], check=True)
            subprocess.run(["mount", *MOUNT, str(image), str(disk)], check=True)
            yield image, disk


@pytest.fixture
def without_direct_io(tmp_path: Path) -> Iterator[Path]:
    """A ramfs."""
    with mounted(tmp_path / "ramfs", "-t", "ramfs", "ramfs") as disk:
        yield disk


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_only_promised_room(thin_disk: Path, engine: str) -> None:
    """Catches a save that reports success for bytes that the disk never stored, and one that damages the previous checkpoint."""
    small = "import sys, torch, shardsave; print(shardsave.save({'x': torch.ones(1000)}, sys.argv[1]))"
    load = "import sys, shardsave; print(int(shardsave.load(sys.argv[1])['x'].sum()))"

    def run(program: str) -> str:
        done = warm_python().run(["-c", program, thin_disk / "ckpt"], SHARDSAVE_ENGINE=engine)
        done.check_returncode()
        return done.stdout

    assert "durable" in run(small)
    printed = run(PROGRAM)
    assert printed.startswith(("SaveNotCommittedError", "OutOfSpaceError")), printed
    assert "nothing was committed, the previous checkpoint is intact" in printed
    assert run(load) == "1000\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_is_cut_off(beneath: Path, disk_that_can_be_cut: tuple[Path, Path], engine: str) -> None:
    """Catches a save that reports success, and is lost or torn once the journal has been replayed; one that damages the previous
    checkpoint, or leaves litter for good; and trials that would not notice such a save."""
    printed = run_beneath(beneath, engine, ["-m", "faults.cuts", *map(str, disk_that_can_be_cut), str(CUTS)])
    assert sum(int(number) for number in re.findall(r"(\d+) cuts", printed)) >= 4 * CUTS


def test_space_that_dead_savers_hold(small_disk: Path) -> None:
    """Catches leavings of killed savers that fill the disk, so that no later save gets far enough to clean up."""
    kill = "import os, signal, sys, torch, shardsave;"
    kill += "stop = lambda done, total: os.kill(os.getpid(), signal.SIGKILL);"
    kill += "shardsave.save({'x': torch.zeros(4_000_000, dtype=torch.uint8)}, sys.argv[1], progress=stop)"
    shardsave.save({"x": torch.ones(4_000_000, dtype=torch.uint8)}, small_disk / "ckpt")
    assert warm_python().run(["-c", kill, small_disk / "ckpt"]).returncode < 0
    shardsave.save({"x": torch.full((4_000_000,), 2, dtype=torch.uint8)}, small_disk / "ckpt")
    assert shardsave.load(small_disk / "ckpt")["x"].min() == 2 and not litter_in(small_disk / "ckpt")


def test_a_file_system_that_refuses_direct_io(without_direct_io: Path) -> None:
    """Catches a save or a load that needs O_DIRECT, reports it although it was refused, or leaves the file of a refused call behind."""
    state = {"x": torch.arange(5_000_000), "y": torch.ones(3)}
    report = shardsave.save(state, without_direct_io / "ckpt")
    assert report.durable and not report.direct
    loaded = shardsave.load(without_direct_io / "ckpt")
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert not shardsave.verify(without_direct_io / "ckpt").direct
    assert not litter_in(without_direct_io / "ckpt")
