"""Scenarios for gathering from devices into memory, each in a process: ``python -m fake_cuda.gather_scenarios NAME``.

A docstring says what the scenario would catch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from fake_cuda.engine_runs import (
    HOST,
    LENT,
    SLOT,
    Files,
    Part,
    assert_only_the_ring_is_left,
    for_every_call,
    native,
    run,
)
from fake_cuda.fake import Bytes, Fake, pages, random_bytes

WORKERS = 4


def gather(parts: list[Part], into: Any, streams: dict[int, int] | None = None, **options: Any) -> Any:
    return run(True, None, parts, streams, **{"workers": WORKERS, "into": into, **options})


def pinned_memory(nbytes: int) -> Any:
    memory = native.HostMemory(nbytes=nbytes, pin_for=0)
    assert memory.pinned and memory.refusal == ""
    return memory


def content_of(memory: Any, size: int) -> Bytes:
    return np.frombuffer(memory, np.uint8)[:size]


def gathers_bit_for_bit(files: Files) -> None:
    """A wrong byte or sum, a copy through the ring or into pageable memory, pinned memory that is pinned again or stays pinned."""
    fake = Fake()
    contents = [random_bytes(size, seed=size) for size in (1, 7, SLOT - 3, 4096, 3 * SLOT + 17, 100, 20 * SLOT)]
    whole = np.concatenate(contents)
    sums = [native.crc64(content) for content in contents]
    parts = [
        Part(HOST, content.ctypes.data, content.nbytes) if number in (1, 5) else Part(0, fake.alloc(content), content.nbytes)
        for number, content in enumerate(contents)
    ]
    memory = pinned_memory(len(whole))
    for workers in (1, 16):
        gathered = gather(parts, memory, workers=workers)
        assert gathered.sums.tolist() == sums and (gathered.staging_bytes, gathered.pinned) == (0, False)
        assert np.array_equal(content_of(memory, len(whole)), whole)
        np.frombuffer(memory, np.uint8)[:] = 0
    assert fake.count("pageable copies") == 0 and fake.count("pins") == 1
    assert fake.alive() == {"registrations": 1, "context references": 1}
    pageable = pages(len(whole))
    assert gather(parts, pageable).sums.tolist() == sums and np.array_equal(pageable, whole)
    assert fake.count("pins") == 1
    nowhere = gather(parts, None)
    assert nowhere.sums.tolist() == sums and nowhere.pinned and nowhere.staging_bytes == 16 * SLOT
    del memory
    assert_only_the_ring_is_left(fake)


def queued_work_comes_first(files: Files) -> None:
    """Bytes copied before the work that computes them, on whatever stream is current, or of one device of several."""
    fake = Fake()
    streams = {0: fake.stream(0), 1: 0}
    contents = [random_bytes(SLOT // 2 + number, seed=number) for number in range(9)]
    parts = []
    for number, content in enumerate(contents):
        device = number % 2
        address = fake.alloc(content.nbytes, device)
        fake.work(address, content, device, streams[device])
        parts.append(Part(device, address, content.nbytes))
    memory = pages(sum(part.nbytes for part in parts))
    sums = [native.crc64(content) for content in contents]
    assert gather(parts, memory, streams).sums.tolist() == sums
    assert np.array_equal(memory, np.concatenate(contents))
    assert_only_the_ring_is_left(fake)


def a_device_piece_is_taken_when_its_copy_has_ended(files: Files) -> None:
    """A piece that is reported as taken while its copy may still be on its way, or although its copy failed."""
    fake = Fake()
    half = SLOT // 2
    content = random_bytes(half)
    parts = [Part(0, fake.alloc(content), half), Part(LENT, 0, half)]
    taken, seen = np.zeros(2, np.int64), []

    def lend(_piece: int, _offset: int, memory: memoryview) -> None:  # while the copy of the same block is in flight
        seen.append(taken.tolist())
        memory[:] = bytes(len(memory))

    files.save(parts, lend=lend, taken=taken)
    assert seen == [[0, 0]] and taken.tolist() == [half, half]
    assert np.array_equal(files.content(half), content)
    failed_calls = set()
    for n in range(1, 1000):
        taken[:] = 0
        fake.fail_at(n)
        try:
            files.save(parts[:1], taken=taken[:1])
        except native.Fault:
            failed_calls.add(fake.failed_call())
            assert taken[0] == 0, fake.failed_call()
            continue
        if not fake.failed_call():
            break
    fake.revive()
    assert taken[0] == half and "cuEventSynchronize" in failed_calls, failed_calls
    assert_only_the_ring_is_left(fake)


def a_refused_pinning_leaves_pageable_memory(files: Files) -> None:
    """A failed pinning that fails the allocation, goes unsaid, or leaks."""
    fake = Fake()
    content = random_bytes(5 * SLOT)
    part = Part(0, fake.alloc(content), content.nbytes)
    fake.pin_limit(SLOT)
    memory = native.HostMemory(nbytes=content.nbytes, pin_for=0)
    assert not memory.pinned and "CUDA_ERROR_OUT_OF_MEMORY" in memory.refusal
    gather([part], memory)
    assert np.array_equal(content_of(memory, content.nbytes), content) and fake.count("pageable copies") == 5
    del memory
    fake.assert_clean()


def _for_every_call(start: Callable[[Fake, int], None]) -> int:
    """How often pinning and gathering fail if the driver fails from each call on."""
    fake = Fake()
    content = random_bytes(5 * SLOT + 5)
    part = Part(0, fake.alloc(content), content.nbytes)

    def gather_anew() -> None:
        memory = native.HostMemory(nbytes=content.nbytes, pin_for=0)
        assert memory.pinned == (memory.refusal == "")
        gather([part], memory, workers=2)
        assert np.array_equal(content_of(memory, content.nbytes), content)

    return for_every_call(fake, start, gather_anew)


def any_driver_call_may_fail(files: Files) -> None:
    """A failure that is swallowed or not named, a pin or a stream that is left, or one that spoils the next gathering."""
    assert _for_every_call(lambda fake, n: fake.fail_at(n)) >= 20


def the_device_may_be_lost_at_any_call(files: Files) -> None:
    """A lost device that hangs the gathering, leaks, or spoils the next one."""
    assert _for_every_call(lambda fake, n: fake.lose_at_call(n)) >= 20


def nothing_arrives_after_an_interrupt(files: Files) -> None:
    """A copy into memory that is still in flight when the exception reaches the caller, who may free the memory."""
    fake = Fake()
    content = np.ones(40 * SLOT, np.uint8)
    half = Part(0, fake.alloc(content[: SLOT // 2]), SLOT // 2)
    memory = pinned_memory(content.nbytes)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    parts = [half, Part(LENT, 0, SLOT // 2)] * 40  # a copy is in flight whenever the hook raises
    for hooks in ({"lend": interrupt}, {"lend": lambda _piece, _offset, view: None, "tick": interrupt}):
        try:
            gather(parts, memory, **hooks)
        except KeyboardInterrupt:
            np.frombuffer(memory, np.uint8)[:] = 7
        else:
            raise AssertionError("the interrupt was lost")
        fake.finish()
        assert (np.frombuffer(memory, np.uint8) == 7).all()
    del memory
    assert_only_the_ring_is_left(fake)


def a_forked_child_leaves_pinned_memory_alone(files: Files) -> None:
    """A driver call by a forked child that drops memory which its parent has pinned."""
    fake = Fake()
    content = random_bytes(3 * SLOT)
    part = Part(0, fake.alloc(content), content.nbytes)
    memories = [pinned_memory(content.nbytes)]
    calls, pid = fake.count("calls"), os.fork()
    if pid == 0:
        memories.clear()
        os._exit(0 if fake.count("calls") == calls else 1)
    assert os.waitpid(pid, 0)[1] == 0
    gather([part], memories[0])
    assert np.array_equal(content_of(memories[0], content.nbytes), content) and fake.count("pageable copies") == 0
    memories.clear()
    fake.assert_clean()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCENARIO_DIR")) as scratch:
        globals()[sys.argv[1]](Files(scratch))
