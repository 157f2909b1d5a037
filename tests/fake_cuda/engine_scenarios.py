"""Scenarios for the C++ engine on the fake driver, each in a process: ``python -m fake_cuda.engine_scenarios NAME``.

A docstring says what the scenario would catch. The extension is loaded without its package, which would import torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fake_cuda.fake import Bytes, Fake, random_bytes

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


def assert_only_the_ring_is_left(fake: Fake) -> None:
    alive = fake.alive()
    assert alive in ({}, {"registrations": 1, "context references": 1}), alive
    native.release_ring()
    fake.assert_clean()


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


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def _until_joined(tasks: int) -> None:
    """A thread that was joined may be listed for a moment longer."""
    deadline = time.monotonic() + 5
    while _tasks() > tasks and time.monotonic() < deadline:
        time.sleep(0.001)
    assert _tasks() == tasks, "a thread was left behind"


def _for_every_call(files: Files, start: Callable[[Fake, int], None]) -> int:
    """Method: let the driver fail from N = 1, 2, … on until a save and a load succeed untouched. How many runs failed."""
    fake = Fake()
    content = random_bytes(3 * SLOT + 5)
    source = Part(0, fake.alloc(content), content.nbytes)
    target = Part(0, fake.alloc(content.nbytes), content.nbytes)
    tasks, faults = _tasks(), 0

    def both() -> None:
        files.save([source], workers=2)
        assert np.array_equal(files.content(content.nbytes), content)
        files.load([target], workers=2)
        assert np.array_equal(fake.peek(target.address, target.nbytes), content)

    both()  # the driver is loaded now: what it says to cuInit holds for the life of a process
    for n in range(1, 1000):
        native.release_ring()
        before = fake.count("calls")
        start(fake, n)
        try:
            both()
        except native.Fault as fault:
            faults += 1
            file, call, errno, _, _, detail = fault.args
            assert (file, errno) == (-1, 0) and call.startswith("cu"), fault.args
            assert "CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure, on cuda:0" in detail, fault.args
            assert call.startswith(fake.failed_call()), (call, fake.failed_call())
        untouched = fake.count("calls") - before < n
        fake.revive()
        _until_joined(tasks)
        assert fake.alive() in ({}, {"registrations": 1, "context references": 1}), (n, fake.alive())
        both()
        assert_only_the_ring_is_left(fake)
        if untouched:
            return faults
    raise AssertionError("the run never succeeded")


def any_driver_call_may_fail(files: Files) -> None:
    """A driver's failure that is swallowed or not named, that leaks, or that spoils the next run."""
    assert _for_every_call(files, lambda fake, n: fake.fail_at(n)) >= 40


def the_device_may_be_lost_at_any_call(files: Files) -> None:
    """A lost device that hangs the run, ends the process, leaks, or spoils the next run."""
    assert _for_every_call(files, lambda fake, n: fake.lose_at_call(n)) >= 60


def the_device_is_lost_in_the_middle_of_a_copy(files: Files) -> None:
    """Half a copy taken for a whole one; a process, or a ring, that is of no use after it."""
    fake = Fake()
    content = random_bytes(6 * SLOT)
    source = Part(0, fake.alloc(content), content.nbytes)
    host = Part(HOST, content.ctypes.data, content.nbytes)
    for copy in range(1, 7):
        for direction in (files.save, files.load):
            files.save([host], {})
            fake.lose_at_copy(copy)
            try:
                direction([source])
            except native.Fault as fault:
                assert "CUDA_ERROR_LAUNCH_FAILED" in fault.args[5], fault.args
            else:
                raise AssertionError("a lost device went unnoticed")
            files.save([host], {})  # with the device still lost
            assert np.array_equal(files.content(content.nbytes), content)
            fake.revive()
            fake.work(source.address, content)
            fake.finish()
            files.save([source])
            assert np.array_equal(files.content(content.nbytes), content)
    assert_only_the_ring_is_left(fake)


def an_interrupt_ends_the_run(files: Files) -> None:
    """Copies still in flight, or device resources kept, after Ctrl-C."""
    fake = Fake()
    part = Part(0, fake.alloc(random_bytes(40 * RING)), 40 * RING)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    for direction in (files.save, files.load):
        try:
            direction([part], tick=interrupt)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the interrupt was lost")
        if direction == files.save:
            files.save([part])
    assert_only_the_ring_is_left(fake)


def a_failing_disk_ends_copies_too(files: Files) -> None:
    """A slot given to another run while a failed run's copies may still write into it."""
    fake = Fake()
    content, other = random_bytes(30 * SLOT), random_bytes(30 * SLOT, seed=1)
    good, bad = Part(0, fake.alloc(content), content.nbytes), Part(0, fake.alloc(other), other.nbytes)
    stop, faults = threading.Event(), []

    def fail() -> None:
        with tempfile.NamedTemporaryFile() as scratch:
            descriptor = os.open(scratch.name, os.O_RDONLY)
            while not stop.is_set():
                try:
                    run(True, descriptor, [bad])
                except native.Fault as fault:
                    faults.append(fault.args[:2])
            os.close(descriptor)

    thread = threading.Thread(target=fail)
    thread.start()
    try:
        for _ in range(20):
            files.save([good])
            assert np.array_equal(files.content(content.nbytes), content)
    finally:
        stop.set()
        thread.join()
    assert faults and set(faults) == {(0, "pwrite")}, faults[:3]
    assert_only_the_ring_is_left(fake)


def a_failed_runs_slot_waits_for_its_copies(files: Files) -> None:
    """A slot that goes to another run while a copy of the failed run's is still on its way into it."""
    fake = Fake()
    half = SLOT // 2
    source = fake.alloc(random_bytes(half))
    parts = [Part(0, source, half), Part(LENT, 0, half)] * 2  # two blocks, each with a copy in flight when it is lent
    both, failed, release, outcome = threading.Barrier(2), threading.Event(), threading.Event(), []

    def lend(piece: int, _offset: int, _memory: memoryview) -> None:
        both.wait()
        if piece == 1:
            failed.set()
            raise RuntimeError("the first block fails")
        release.wait()  # the second keeps the run, and with it the device, from ending

    def fail() -> None:
        with tempfile.TemporaryFile() as scratch:
            try:
                run(True, scratch.fileno(), parts, lend=lend, workers=2)
            except RuntimeError as error:
                outcome.append(str(error))

    tasks = _tasks()
    failing = threading.Thread(target=fail)
    failing.start()
    failed.wait()
    while _tasks() > tasks + 2:  # until the first block's worker has ended: its caller and the second one go on
        time.sleep(0.001)
    content = random_bytes(SLOT, seed=1)

    def fill(_piece: int, _offset: int, memory: memoryview) -> None:
        memory[:] = content.tobytes()
        release.set()
        failing.join()  # now the copy has been made

    files.save([Part(LENT, 0, SLOT)], {}, lend=fill, workers=1)
    assert np.array_equal(files.content(SLOT), content)
    assert outcome == ["the first block fails"]
    assert_only_the_ring_is_left(fake)


def another_threads_capture_stays_whole(files: Files) -> None:
    """A save or a load, its pinning included, that poisons a CUDA graph being captured on another thread."""
    fake = Fake()
    part, stream = Part(0, fake.alloc(random_bytes(3 * SLOT)), 3 * SLOT), fake.stream(0)
    begun, ended, whole = threading.Event(), threading.Event(), []

    def capture() -> None:
        fake.begin_capture(stream)
        begun.set()
        ended.wait()
        whole.append(fake.end_capture(stream))

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait()
    try:
        files.save([part])
        files.load([part])
        native.release_ring()
    finally:
        ended.set()
        thread.join()
    assert whole == [1]
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


def a_device_that_is_not_there(files: Files) -> None:
    """An unclear error, or a leak of the devices that are there."""
    fake = Fake()
    part = Part(0, fake.alloc(random_bytes(SLOT)), SLOT)
    try:
        files.save([part], {0: 0, 7: 0})
    except native.Fault as fault:
        reason = "CUDA_ERROR_INVALID_DEVICE (101): invalid device ordinal, on cuda:7"
        assert fault.args == (-1, "cuDeviceGet", 0, 0, 0, reason), fault.args
    else:
        raise AssertionError("there are two devices")
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
