"""The fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from support import BUILD, ROOT, Compile, SmallModel

# A shell that starts a command in the background has it ignore SIGINT, and children inherit that: no Ctrl-C would be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compiled() -> Compile:
    """``compiled("name.so", [sources], *flags)`` builds a C or C++ helper once and gives its path."""

    def build(name: str, sources: list[Path], *flags: str) -> Path:
        target = BUILD / name
        if not target.exists() or any(source.stat().st_mtime > target.stat().st_mtime for source in sources):
            target.parent.mkdir(parents=True, exist_ok=True)
            compiler = os.environ.get("CXX", "g++") if any(s.suffix == ".cpp" for s in sources) else os.environ.get("CC", "gcc")
            scratch = target.with_name(f"{target.name}.{os.getpid()}")
            command = [compiler, "-O2", "-g", "-Wall", "-Wextra", "-Werror", *map(str, sources), "-o", str(scratch), *flags]
            subprocess.run(command, check=True)
            scratch.replace(target)
        return target

    return build


@pytest.fixture(scope="session")
def beneath(compiled: Compile) -> Path:
    """The library that stands between a process and libc."""
    return compiled("beneath.so", [ROOT / "tests" / "faults" / "beneath.c"], "-shared", "-fPIC", "-pthread", "-ldl")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where fsync takes no time; an ordinary one where there is no place for it."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def small_model() -> nn.Module:
    return SmallModel()
