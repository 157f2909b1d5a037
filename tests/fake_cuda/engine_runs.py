"""Runs of the C++ engine on the fake driver. The extension is loaded without its package, which would import torch."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fake_cuda.fake import Bytes, Fake

HOST, LENT = -1, -2

SLOT = 1 << 16

SLOTS = 16  # with a device

RING = SLOTS * SLOT


def load_native() -> ModuleType:
    package = importlib.util.find_spec("shardsave")
    assert package is not None and package.submodule_search_locations is not None
    for folder in package.submodule_search_locations:
        for extension in Path(folder).glob("_native.*.so"):
            spec = importlib.util.spec_from_file_location("shardsave._native", extension)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise AssertionError("the C++ engine is not built")


native = load_native()


class Part(NamedTuple):
    """A piece of a model: where its bytes are."""

    memory: int
    address: int
    nbytes: int


def run(
    write: bool,
    descriptor: int | None,
    parts: Sequence[Part],
    streams: dict[int, int] | None = None,
    slot: int = SLOT,
    **options: Any,
) -> Any:
    """One run over a file, or with None over memory, that holds ``parts`` one after the other."""
    begins = np.cumsum([0, *(part.nbytes for part in parts)])
    blocks, segments = [], []
    for start in range(0, int(begins[-1]), slot):
        end = min(start + slot, int(begins[-1]))
        blocks.append((0, start, -(-(end - start) // 4096) * 4096, len(segments)))
        for number, part in enumerate(parts):
            first, last = max(start, int(begins[number])), min(end, int(begins[number + 1]))
            if first < last:
                into = first - int(begins[number])
                segments.append((part.memory, part.address + into, last - first, first - start, number, into))
    table = {
        "files": None if descriptor is None else np.array([descriptor], np.int64),
        "blocks": np.array(blocks, np.int64),
        "segments": np.array(segments, np.int64),
        "piece_bytes": np.array([part.nbytes for part in parts], np.int64),
        "streams": list((streams if streams is not None else {0: 0}).items()),
    }
    usual = {"access": "buffered", "checksum": True, "workers": 4, "slot_bytes": slot, "lend": None, "tick": lambda _: None}
    return native.run(write=write, **{**usual, **table, **options})


class Files:
    """A scratch file that is written by one run and read by the next."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "file")

    def save(self, parts: Sequence[Part], streams: dict[int, int] | None = None, **options: Any) -> Any:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            return run(True, descriptor, parts, streams, **options)
        finally:
            os.close(descriptor)

    def load(self, parts: Sequence[Part], streams: dict[int, int] | None = None, **options: Any) -> Any:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return run(False, descriptor, parts, streams, **options)
        finally:
            os.close(descriptor)

    def content(self, size: int) -> Bytes:
        return np.fromfile(self.path, np.uint8)[:size]


#: What is alive while the pinned ring is kept.
PINNED_RING = {"registrations": 1, "context references": 1}


def assert_only_the_ring_is_left(fake: Fake) -> None:
    alive = fake.alive()
    assert alive in ({}, PINNED_RING), alive
    native.release_ring()
    fake.assert_clean()


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def until_joined(threads: int) -> None:
    """A thread that was joined may be listed for a moment longer."""
    deadline = time.monotonic() + 5
    while count_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert count_threads() == threads, "a thread was left behind"


def for_every_call(fake: Fake, start: Callable[[Fake, int], None], succeed: Callable[[], None], *left: dict[str, int]) -> int:
    """Method: let the driver fail from N = 1, 2, … on until ``succeed`` does, untouched. Returns how many runs failed.

    ``left``: what may be alive after it, besides nothing.
    """
    threads, faults = count_threads(), 0
    succeed()  # the driver is loaded now: what it says to cuInit holds for the life of a process
    for n in range(1, 1000):
        native.release_ring()
        before = fake.count("calls")
        start(fake, n)
        try:
            succeed()
        except native.Fault as fault:
            faults += 1
            file, call, errno, _, _, detail = fault.args
            assert (file, errno) == (-1, 0) and call.startswith("cu"), fault.args
            assert "CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure, on cuda:0" in detail, fault.args
            assert call.startswith(fake.failed_call()), (call, fake.failed_call())
        untouched = fake.count("calls") - before < n
        fake.revive()
        until_joined(threads)
        assert fake.alive() in ({}, *left), (n, fake.alive())
        succeed()
        assert fake.alive() in ({}, *left), (n, fake.alive())
        native.release_ring()
        fake.assert_clean()
        if untouched:
            return faults
    raise AssertionError("it never succeeded")
