"""Scenarios for the C++ engine on the fake driver in which something fails: ``python -m fake_cuda.failure_scenarios NAME``.

A docstring says what the scenario would catch.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np

from fake_cuda.engine_runs import (
    HOST,
    LENT,
    PINNED_RING,
    RING,
    SLOT,
    Files,
    Part,
    assert_only_the_ring_is_left,
    count_threads,
    for_every_call,
    native,
    run,
)
from fake_cuda.fake import Fake, random_bytes


def _for_every_call(files: Files, start: Callable[[Fake, int], None]) -> int:
    """How many saves and loads fail if the driver fails from each call on."""
    fake = Fake()
    content = random_bytes(3 * SLOT + 5)
    source = Part(0, fake.alloc(content), content.nbytes)
    target = Part(0, fake.alloc(content.nbytes), content.nbytes)

    def both() -> None:
        files.save([source], workers=2)
        assert np.array_equal(files.content(content.nbytes), content)
        files.load([target], workers=2)
        assert np.array_equal(fake.peek(target.address, target.nbytes), content)

    return for_every_call(fake, start, both, PINNED_RING)


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

    threads = count_threads()
    failing = threading.Thread(target=fail)
    failing.start()
    failed.wait()
    while count_threads() > threads + 2:  # until the first block's worker has ended: its caller and the second one go on
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCENARIO_DIR")) as scratch:
        globals()[sys.argv[1]](Files(scratch))
