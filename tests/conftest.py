"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from support import BUILD, ROOT, Compile, SmallModel

# A shell makes background commands ignore SIGINT, and their children inherit that: without this line, tests of Ctrl-C would fail.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compiled() -> Compile:
    """``compiled("name.so", [sources], *flags)`` builds a C or C++ helper once and returns its path."""

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
    """The preloaded library between a process and libc, which makes system calls fail."""
    return compiled("beneath.so", [ROOT / "tests" / "faults" / "beneath.c"], "-shared", "-fPIC", "-pthread", "-ldl")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where fsync takes no time; an ordinary folder if /dev/shm cannot be used."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def small_model() -> nn.Module:
    return SmallModel()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m MARKER``, a file that does not use the marker is not even imported: that takes longer than some of these runs."""
    wanted = str(config.option.markexpr)
    if wanted.isidentifier() and collection_path.suffix == ".py" and f"mark.{wanted}" not in collection_path.read_text():
        return True
    return None


def pytest_collection_finish() -> None:
    """No collection of garbage visits what is imported by now: some tests collect, and some fork."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, those of storage before all, so that at the end no worker waits for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name != "storage", item.path not in slow))
