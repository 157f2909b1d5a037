"""A lack of memory or of threads, in real processes: a smaller ring, fewer workers, or an error before anything is written.

Method: ``memory/short.c``, preloaded, refuses each allocation and mapping of a given size or more; the system itself refuses threads.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import ROOT, Compile, let_everybody_in
from warm_python import warm_python

pytestmark = pytest.mark.slow

PROGRAM = """
import ctypes, os, resource, sys, torch, shardsave
folder, limit = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
shardsave.save, shardsave.load  # imported while there is enough memory
state = {"x": torch.arange(3_000_000), "s": torch.arange(1_000_000).reshape(1000, 1000).t()}
expected = {name: tensor.sum() for name, tensor in state.items()}
if limit:
    shorten = ctypes.CDLL(None).short_of_memory
    shorten.argtypes = [ctypes.c_size_t]
    shorten(limit)
else:
    os.setgid(65534)
    os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    report = shardsave.save(state, folder)
except shardsave.ShardSaveError as error:
    print(type(error).__name__, error)
else:
    if limit:
        shorten(2**63)
    loaded = shardsave.load(folder)
    assert all(loaded[name].sum() == expected[name] for name in state)
    print("saved", report.staging_bytes)
"""

SLOT = 8 << 20


@pytest.fixture(scope="module")
def short(compiled: Compile) -> Path:
    return compiled("short.so", [ROOT / "tests" / "memory" / "short.c"], "-shared", "-fPIC")


def limited(folder: Path, short: Path, limit: int, engine: str = "native") -> str:
    """What a save printed to which ``limit`` bytes at once, or more, were refused; with 0 every thread was refused."""
    done = warm_python(preload=str(short)).run(["-c", PROGRAM, folder, limit], SHARDSAVE_ENGINE=engine)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("limit", "slots"), [(8 * SLOT, 4), (SLOT + 1, 1)])
def test_a_smaller_ring(tmp_path: Path, short: Path, limit: int, slots: int) -> None:
    """Catches a save that fails although there is memory for some slots of the ring."""
    assert limited(tmp_path, short, limit) == f"saved {slots * SLOT}"


@pytest.mark.parametrize(("engine", "call"), [("native", "mmap"), ("portable", "allocation")])
def test_no_memory_for_staging(tmp_path: Path, short: Path, engine: str, call: str) -> None:
    """Catches a lack of memory that shows only after something was written, and an error without the number of bytes needed."""
    assert limited(tmp_path, short, SLOT, engine) == (
        f"OutOfSpaceError cannot save to {tmp_path}: {call} of staging memory: Cannot allocate memory (needs {SLOT} bytes); "
        f"nothing was committed, the directory had no checkpoint before"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: the process becomes a user that may start no thread")
def test_no_threads(tmp_path: Path, short: Path) -> None:
    """Catches a save or a load that fails, hangs or crashes if the system refuses to start threads."""
    let_everybody_in(tmp_path)
    assert limited(tmp_path, short, 0) == f"saved {8 * SLOT}"
