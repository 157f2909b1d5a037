"""Want of memory and of threads, in processes with limits: a smaller ring, fewer workers, or an error before anything is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, resource, sys, torch, shardsave
from shardsave import _engine
folder, room, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "no threads"
torch.set_num_threads(1)
state = {"x": torch.arange(3_000_000), "s": torch.arange(1_000_000).reshape(1000, 1000).t()}
expected = {name: tensor.sum() for name, tensor in state.items()}
shardsave.save({"x": torch.ones(1)}, folder)  # what is loaded at the first use, is loaded
if _engine.native is not None:
    _engine.native.release_ring()
if threads:
    os.setgid(65534)
    os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
else:
    pages = int(open("/proc/self/statm").read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
try:
    report = shardsave.save(state, folder)
except shardsave.ShardSaveError as error:
    print(type(error).__name__, error)
else:
    if not threads:
        resource.setrlimit(resource.RLIMIT_AS, before)
    loaded = shardsave.load(folder)
    assert all(loaded[name].sum() == expected[name] for name in state)
    print("saved", report.staging_bytes)
"""

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"


def limited(folder: Path, room: int, threads: str = "threads", engine: str = "native") -> str:
    """What a save said that had ``room`` bytes of address space more than torch and shardsave take."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(room), threads]
    done = subprocess.run(command, env={**os.environ, "SHARDSAVE_ENGINE": engine}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_smaller_ring(tmp_path: Path) -> None:
    """Catches a save that fails although there is memory for a part of the ring."""
    word, staging = limited(tmp_path, 45 << 20).split()
    assert word == "saved" and 8 << 20 <= int(staging) < 64 << 20


@pytest.mark.parametrize(
    ("engine", "call"),
    [
        ("native", r"mmap of staging memory: Cannot allocate memory \(needs 8388608 bytes\)"),
        ("portable", r"allocation of (staging|working) memory: Cannot allocate memory.*"),
    ],
)
def test_no_memory_for_staging(tmp_path: Path, engine: str, call: str) -> None:
    """Catches want of memory that leaves something behind, or is no OutOfSpaceError that says how much is wanted."""
    said = limited(tmp_path, 4 << 20, engine=engine)
    where = re.escape(str(tmp_path))
    outcome = "nothing was committed, the previous checkpoint is intact"
    assert re.fullmatch(rf"OutOfSpaceError cannot write {where}/.*: {call}; {outcome}", said), said
    assert sorted(os.listdir(tmp_path)) == [SHARD, INDEX]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: it becomes a user without a process to spare")
def test_no_threads(tmp_path: Path) -> None:
    """Catches a save or a load that fails, hangs or dies where the system starts no thread."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o077)
    assert limited(tmp_path, 0, "no threads") == f"saved {64 << 20}"
