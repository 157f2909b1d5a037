"""Scenarios for the C++ engine on the fake driver, each in a process: ``python -m fake_cuda.engine_scenarios NAME``.

A docstring says what the scenario would catch.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading

import numpy as np

from fake_cuda.engine_runs import (
    HOST,
    LENT,
    RING,
    SLOT,
    SLOTS,
    Files,
    Part,
    assert_only_the_ring_is_left,
    native,
    run,
)
from fake_cuda.fake import Fake, captured_meanwhile, random_bytes


def saves_and_loads_bit_for_bit(files: Files) -> None:
    """A wrong offset, length, direction or sum anywhere between a device and a file."""
    fake = Fake()
    contents = [random_bytes(size, seed=size) for size in (1, 7, SLOT - 3, 4096, 3 * SLOT + 17, 100, 2 * SLOT)]
    whole = np.concatenate(contents)
    sums = [native.crc64(content) for content in contents]
    for access in ("buffered", "direct", "auto"):
        memories = [0, HOST, 0, 0, 0, HOST, 0]
        sources = [
            Part(memory, content.ctypes.data if memory == HOST else fake.alloc(content), content.nbytes)
            for memory, content in zip(memories, contents)
        ]
        if access != "auto":
            saved = files.save(sources, access=access)
            assert saved.sums.tolist() == sums and saved.pinned and saved.notes == []
            assert np.array_equal(files.content(len(whole)), whole)
        landed = [np.zeros(content.nbytes, np.uint8) for content in contents]
        targets = [
            Part(memory, host.ctypes.data if memory == HOST else fake.alloc(host.nbytes), host.nbytes)
            for memory, host in zip(memories, landed)
        ]
        assert files.load(targets, access=access).sums.tolist() == sums
        for part, host, content in zip(targets, landed, contents):
            found = host if part.memory == HOST else fake.peek(part.address, part.nbytes)
            assert np.array_equal(found, content)
    assert_only_the_ring_is_left(fake)


def work_in_flight_comes_first(files: Files) -> None:
    """A save of tensors still being computed, or a load into memory still in use, on whatever stream is current."""
    fake = Fake()
    for stream in (0, fake.stream(0)):
        content = random_bytes(5 * SLOT + 5, seed=stream)
        source, target = fake.alloc(content.nbytes), fake.alloc(content.nbytes)
        fake.work(source, content, stream=stream)
        files.save([Part(0, source, content.nbytes)], {0: stream})
        assert np.array_equal(files.content(content.nbytes), content)
        fake.work(target, np.full(content.nbytes, 7, np.uint8), stream=stream)
        files.load([Part(0, target, content.nbytes)], {0: stream})
        fake.finish()
        assert np.array_equal(fake.peek(target, content.nbytes), content)
    assert_only_the_ring_is_left(fake)


def several_devices_take_part(files: Files) -> None:
    """A copy on another device's stream or context, or one device that is not waited for."""
    fake = Fake()
    streams = {0: 0, 1: fake.stream(1)}
    contents = [random_bytes(SLOT // 2 + number, seed=number) for number in range(9)]
    sources, targets = [], []
    for number, content in enumerate(contents):
        device = number % 2
        address = fake.alloc(content.nbytes, device)
        fake.work(address, content, device, streams[device])
        sources.append(Part(device, address, content.nbytes))
        targets.append(Part(1 - device, fake.alloc(content.nbytes, 1 - device), content.nbytes))
    files.save(sources, streams)
    assert np.array_equal(files.content(sum(map(len, contents))), np.concatenate(contents))
    files.load(targets, streams)
    for part, content in zip(targets, contents):
        assert np.array_equal(fake.peek(part.address, part.nbytes, part.memory), content)
    assert_only_the_ring_is_left(fake)


def a_model_larger_than_the_ring(files: Files) -> None:
    """A slot filled again before its last bytes had reached the device or the file."""
    fake = Fake()
    content = random_bytes(20 * RING + 4097)
    source, target = fake.alloc(content), fake.alloc(content.nbytes)
    saved = files.save([Part(0, source, content.nbytes)], workers=SLOTS)
    assert saved.staging_bytes == RING
    assert np.array_equal(files.content(content.nbytes), content)
    files.load([Part(0, target, content.nbytes)], workers=SLOTS)
    assert np.array_equal(fake.peek(target, content.nbytes), content)
    assert_only_the_ring_is_left(fake)


def every_slot_has_a_worker(files: Files) -> None:
    """Fewer slots or workers than the copies of a device need to hide each other's latency."""
    fake = Fake()
    source = fake.alloc(random_bytes(SLOT // 2))
    together = threading.Barrier(SLOTS)

    def lend(_piece: int, _offset: int, memory: memoryview) -> None:
        together.wait(timeout=30)
        memory[:] = bytes(len(memory))

    for access in ("buffered", "direct"):
        parts = [Part(0, source, SLOT // 2), Part(LENT, 0, SLOT // 2)] * SLOTS
        saved = files.save(parts, access=access, lend=lend, workers=SLOTS)
        assert saved.staging_bytes == RING
    assert_only_the_ring_is_left(fake)


def a_block_goes_to_a_device_whole(files: Files) -> None:
    """Blocks of a device, or with host memory beside it, moved in the small steps that host memory takes through the page cache."""
    fake = Fake()
    slot = 4 << 20
    content = random_bytes(2 * slot + 5)
    whole, half = Part(0, fake.alloc(slot + slot // 2), slot + slot // 2), slot // 2 + 5
    host = np.zeros(half, np.uint8)
    fake.work(whole.address, content[: whole.nbytes])
    host[:] = content[whole.nbytes :]
    parts = [whole, Part(HOST, host.ctypes.data, half)]
    sums = files.save(parts, slot=slot).sums.tolist()
    assert np.array_equal(files.content(content.nbytes), content)
    fake.work(whole.address, np.zeros(whole.nbytes, np.uint8))
    host[:] = 0
    assert files.load(parts, slot=slot).sums.tolist() == sums
    assert np.array_equal(np.concatenate([fake.peek(whole.address, whole.nbytes), host]), content)
    assert fake.count("copies") == 4, "one for each block and direction"
    assert_only_the_ring_is_left(fake)


def the_pinned_ring_is_used_again(files: Files) -> None:
    """Pinning at every run, or staging memory that is not pinned."""
    fake = Fake()
    part = Part(0, fake.alloc(random_bytes(3 * SLOT)), 3 * SLOT)
    files.save([part])
    files.load([part])
    files.save([part])
    assert fake.count("pins") == 1 and fake.count("pageable copies") == 0 and fake.count("copies") == 9
    assert fake.count("pinned bytes") == RING
    assert_only_the_ring_is_left(fake)


def pinning_is_refused(files: Files) -> None:
    """A failed pinning that fails the save, goes unsaid, or leaks; a ring that is not halved before it goes pageable."""
    fake = Fake()
    content = random_bytes(10 * SLOT)
    part = Part(0, fake.alloc(content), content.nbytes)
    for limit, staging, pinned in ((RING // 2, RING // 2, True), (SLOT, SLOT, True), (0, RING, False)):
        fake.pin_limit(limit)
        saved = files.save([part])
        assert (saved.staging_bytes, saved.pinned, len(saved.notes)) == (staging, pinned, 1), (limit, saved.notes)
        if not pinned:
            assert "CUDA_ERROR_OUT_OF_MEMORY" in saved.notes[0]
        assert np.array_equal(files.content(content.nbytes), content)
        assert_only_the_ring_is_left(fake)


def a_refused_pinning_is_asked_for_again(files: Files) -> None:
    """A ring that stays pageable for the life of the process, a run that asks more than once, or while others use the ring."""
    fake = Fake()
    content = random_bytes(3 * SLOT)
    part, host = Part(0, fake.alloc(content), content.nbytes), Part(HOST, content.ctypes.data, content.nbytes)
    fake.pin_limit(0)
    assert not files.save([part]).pinned
    before = fake.count("calls")
    again = files.save([part])
    calls = fake.count("calls") - before
    assert not again.pinned and len(again.notes) == 1 and again.staging_bytes == RING
    fake.pin_limit(RING)
    seen = []

    def lend(_piece: int, _offset: int, memory: memoryview) -> None:  # a run, while another one uses the ring
        if not seen:
            with tempfile.TemporaryFile() as scratch:
                seen.append(run(True, scratch.fileno(), [part]))
        memory[:] = bytes(len(memory))

    before = fake.count("calls")
    files.save([Part(LENT, 0, SLOT)], {}, lend=lend)
    assert not seen[0].pinned and fake.count("pins") == 0 and fake.count("calls") - before < calls
    saved = files.save([part])
    assert saved.pinned and saved.notes == [] and fake.count("pins") == 1 and fake.count("pinned bytes") == RING
    assert np.array_equal(files.content(content.nbytes), content)
    files.save([host], {})
    files.load([part])
    assert fake.count("pins") == 1
    assert_only_the_ring_is_left(fake)


def another_threads_capture_stays_whole(files: Files) -> None:
    """A save or a load, its pinning included, that poisons a CUDA graph being captured on another thread."""
    fake = Fake()
    part = Part(0, fake.alloc(random_bytes(3 * SLOT)), 3 * SLOT)
    with captured_meanwhile(fake):
        files.save([part])
        files.load([part])
        native.release_ring()
    assert_only_the_ring_is_left(fake)


def a_forked_child_is_refused(files: Files) -> None:
    """A driver call in a forked child, or a child that cannot even save host memory."""
    fake = Fake()
    content = random_bytes(3 * SLOT)
    part = Part(0, fake.alloc(content), content.nbytes)
    files.save([part])
    calls, pid = fake.count("calls"), os.fork()
    if pid == 0:
        try:
            try:
                files.save([part])
            except native.Fault as fault:
                assert "a forked child cannot use it" in fault.args[5], fault.args
            else:
                raise AssertionError("a forked child was let in")
            files.save([Part(HOST, content.ctypes.data, content.nbytes)], {})
            native.release_ring()
            assert fake.count("calls") == calls, "a forked child called the driver"
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert np.array_equal(files.content(content.nbytes), content)
    files.save([part])
    assert np.array_equal(files.content(content.nbytes), content)
    assert fake.count("pins") == 1
    assert_only_the_ring_is_left(fake)


def unavailable() -> None:
    """Not a scenario: prints why there is no driver, once host memory was saved all the same."""
    assert native.cuda_available() is False
    content = random_bytes(3 * SLOT)
    host = Part(HOST, content.ctypes.data, content.nbytes)
    with tempfile.TemporaryDirectory() as folder:
        files = Files(folder)
        assert files.save([host], {}).notes == []
        assert np.array_equal(files.content(content.nbytes), content)
        try:
            files.save([host], {0: 0})
        except native.Fault as fault:
            reason = native.cuda_unavailable_reason()
            assert fault.args == (-1, "dlopen", 0, 0, 0, f"{reason}, on cuda:0"), fault.args
        else:
            raise AssertionError("there is no driver")
    print(reason)


if __name__ == "__main__":
    if sys.argv[1] == unavailable.__name__:
        sys.exit(unavailable())
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCENARIO_DIR")) as scratch:
        globals()[sys.argv[1]](Files(scratch))
