"""Scenarios for `csrc/cuda.cpp` alone, each run in a process of its own: ``python -m fake_cuda.device_scenarios NAME``.

A docstring says what the scenario would catch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

import numpy as np

from fake_cuda.fake import Bytes, DeviceError, Fake, Shim, captured_meanwhile, pages, random_bytes

SIZE = 1 << 16


def save_comes_after_pending_work() -> None:
    """A copy that does not wait for what the caller's streams are still computing: it would see 0xA5."""
    fake, shim = Fake(), Shim()
    for stream in (0, 1, 2, fake.stream(0)):
        content, slot = random_bytes(SIZE, seed=stream), np.zeros(SIZE, np.uint8)
        address = fake.alloc(SIZE)
        fake.work(address, content, stream=stream)
        with shim.make(stream=stream) as device:
            device.to_slot(slot, address)
            device.complete()
        assert np.array_equal(slot, content), f"stream {stream}"
    fake.assert_clean()


def load_comes_after_earlier_use_of_the_memory() -> None:
    """A copy into memory that work queued earlier still writes to: that work would land on top of it."""
    fake, shim = Fake(), Shim()
    for stream in (0, fake.stream(0)):
        content = random_bytes(SIZE)
        address = fake.alloc(SIZE)
        fake.work(address, np.full(SIZE, 7, np.uint8), stream=stream)
        with shim.make(stream=stream) as device:
            device.from_slot(content, address)
            device.complete()
        assert np.array_equal(fake.peek(address, SIZE), content)
        fake.finish()
        assert np.array_equal(fake.peek(address, SIZE), content)
    fake.assert_clean()


def a_completed_slot_is_done() -> None:
    """A complete() that does not wait, or waits for another slot's copies: the slot would still be 0xA5."""
    fake, shim = Fake(), Shim()
    contents = [random_bytes(SIZE, seed=index) for index in range(4)]
    addresses = [fake.alloc(content) for content in contents]
    slots = [np.zeros(SIZE, np.uint8) for _ in contents]
    with shim.make() as device:
        for turn in range(3):
            for index in range(4):
                device.to_slot(slots[index], addresses[(index + turn) % 4], index)
            for index in (2, 0, 3, 1):
                device.complete(index)
                assert np.array_equal(slots[index], contents[(index + turn) % 4])
    fake.assert_clean()


def loaded_bytes_have_left_the_slot() -> None:
    """A slot used again before its copy to the device was done: the device would get the second filling twice."""
    fake, shim = Fake(), Shim()
    first, second = fake.alloc(SIZE), fake.alloc(SIZE)
    slot = np.full(SIZE, 1, np.uint8)
    with shim.make() as device:
        device.from_slot(slot, first)
        device.complete()
        slot[:] = 2
        device.from_slot(slot, second)
        device.complete()
    assert set(fake.peek(first, SIZE)) == {1} and set(fake.peek(second, SIZE)) == {2}
    fake.assert_clean()


def every_worker_has_the_context_of_the_device() -> None:
    """A worker thread without a current context, or with that of the device it served before."""
    fake, shim = Fake(), Shim()
    contents = [random_bytes(SIZE, seed=device) for device in range(2)]
    addresses = [fake.alloc(content, device) for device, content in enumerate(contents)]
    problems: list[str] = []
    with shim.make(0) as zero, shim.make(1) as one:

        def work(index: int) -> None:
            try:
                for device in (zero, one):
                    device.enter_thread()
                for turn in range(20):
                    which = (turn + index) % 2
                    slot = np.zeros(SIZE, np.uint8)
                    device = (zero, one)[which]
                    device.to_slot(slot, addresses[which], index)
                    device.complete(index)
                    assert np.array_equal(slot, contents[which])
            except BaseException as error:
                problems.append(repr(error))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    fake.assert_clean()


def the_callers_context_stays_current() -> None:
    """Another current context on the calling thread after we were there: torch's next call would go to a wrong device."""
    fake, shim = Fake(), Shim()
    address, other = fake.alloc(SIZE, 0), fake.alloc(SIZE, 1)
    with shim.make(1):
        pass
    slot, memory = np.zeros(SIZE, np.uint8), pages(SIZE)
    assert other and fake.push_context(0xC0DE0001) == 0
    before = fake.current_context()
    assert shim.pin(memory) == ""
    with shim.make(0) as device:
        assert fake.current_context() == before
        device.to_slot(slot, address)
        device.complete()
    shim.unpin(memory)
    with contextlib.suppress(DeviceError):
        shim.make(7)
    assert fake.current_context() == before and fake.count("contexts of this thread") == 1
    fake.assert_clean()


def copies_in_flight_are_waited_for() -> None:
    """A device destroyed while a dead worker's copies still write into its slot."""
    fake, shim = Fake(), Shim()
    content, slot = random_bytes(SIZE), np.zeros(SIZE, np.uint8)
    address = fake.alloc(content)
    with shim.make() as device:
        device.to_slot(slot, address)
        assert set(slot) == {0xA5}
    assert np.array_equal(slot, content)
    fake.assert_clean()


def _round_trip(fake: Fake, shim: Shim, source: int, target: int, slot: Bytes, memory: Bytes) -> None:
    if why := shim.pin(memory):
        raise DeviceError(why)
    try:
        with shim.make(slots=2) as device:
            device.enter_thread()
            device.to_slot(slot, source, 0)
            device.complete(0)
            device.from_slot(slot, target, 1)
            device.complete(1)
            device.to_slot(slot, source, 0)  # a worker that ends here leaves this one in flight
    finally:
        shim.unpin(memory)


def _for_every_call(start: Callable[[Fake, int], None]) -> int:
    """Method: fail the N-th driver call, for N = 1, 2, … until the work succeeds. How many did fail."""
    fake, shim = Fake(), Shim()
    content, memory = random_bytes(SIZE), pages(SIZE)
    source, target = fake.alloc(content), fake.alloc(SIZE)
    before = fake.count("calls")
    _round_trip(fake, shim, source, target, np.zeros(SIZE, np.uint8), memory)
    calls = fake.count("calls") - before
    errors = 0
    for n in range(1, calls + 1):
        slot = np.zeros(SIZE, np.uint8)
        start(fake, n)
        try:
            _round_trip(fake, shim, source, target, slot, memory)
        except DeviceError as error:
            errors += 1
            assert "CUDA_ERROR_LAUNCH_FAILED (719): unspecified launch failure, on cuda:0" in str(error), str(error)
            assert str(error).startswith(fake.failed_call()), (str(error), fake.failed_call())
        fake.revive()
        after = slot.copy()
        fake.finish()
        assert np.array_equal(slot, after), f"call {n}: a copy was still in flight"
        fake.assert_clean()
        _round_trip(fake, shim, source, target, slot, memory)
        assert np.array_equal(slot, content) and np.array_equal(fake.peek(target, SIZE), content)
        fake.assert_clean()
    return errors


def any_call_may_fail() -> None:
    """A failure that is swallowed, leaks, throws out of a destructor, or leaves a copy in flight."""
    assert _for_every_call(lambda fake, n: fake.fail_at(n)) >= 20


def the_device_may_be_lost_at_any_call() -> None:
    """A destructor that hangs, throws or leaks when every further call fails."""
    assert _for_every_call(lambda fake, n: fake.lose_at_call(n)) >= 30


def the_device_is_lost_in_the_middle_of_a_copy() -> None:
    """Half a copy taken for a whole one."""
    fake, shim = Fake(), Shim()
    address, slot = fake.alloc(random_bytes(SIZE)), np.zeros(SIZE, np.uint8)
    with shim.make() as device:
        fake.lose_at_copy(1)
        device.to_slot(slot, address)
        try:
            device.complete()
        except DeviceError as error:
            assert str(error).startswith("cuEventSynchronize: CUDA_ERROR_LAUNCH_FAILED"), str(error)
        else:
            raise AssertionError("half a copy was taken for a whole one")
    fake.assert_clean()


def another_threads_capture_stays_whole() -> None:
    """A call in the thread's own capture mode while another thread captures a graph: it fails, and the capture with it."""
    fake, shim = Fake(), Shim()
    address, memory = fake.alloc(random_bytes(SIZE)), pages(SIZE)
    with captured_meanwhile(fake):
        _round_trip(fake, shim, address, fake.alloc(SIZE), np.zeros(SIZE, np.uint8), memory)
        fake.pin_limit(0)
        assert "CUDA_ERROR_OUT_OF_MEMORY" in shim.pin(memory)
    fake.assert_clean()


def a_capturing_stream_is_refused() -> None:
    """An ordering event recorded into the caller's own graph: the copies would become part of it."""
    fake, shim = Fake(), Shim()
    fake.alloc(SIZE)
    stream = fake.stream(0)
    fake.begin_capture(stream)
    try:
        shim.make(stream=stream)
    except DeviceError as error:
        assert "being captured into a CUDA graph" in str(error)
    else:
        raise AssertionError("a capturing stream was taken")
    assert fake.end_capture(stream) == 1
    fake.assert_clean()


def pinned_memory_keeps_its_context() -> None:
    """A registration that goes with the context of the last device, and a refusal that leaks."""
    fake, shim = Fake(), Shim()
    memory, more = pages(SIZE), pages(SIZE)
    assert shim.unavailable() == ""
    fake.pin_limit(SIZE)
    assert shim.pin(memory) == ""
    assert fake.alive() == {"registrations": 1, "context references": 1}
    why = shim.pin(more)
    assert why == "cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory, on cuda:0"
    with shim.make(1):
        pass
    assert fake.alive() == {"registrations": 1, "context references": 1}
    shim.unpin(more)
    shim.unpin(memory)
    shim.unpin(memory)
    fake.assert_clean()


def _outcome_in_child(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def a_forked_child_is_refused() -> None:
    """A driver call in a forked child, where the context is dead: it would fail, hang or crash."""
    fake, shim = Fake(), Shim()
    content, memory, slot = random_bytes(SIZE), pages(SIZE), np.zeros(SIZE, np.uint8)
    address = fake.alloc(content)
    assert shim.pin(memory) == ""
    device = shim.make()
    device.to_slot(slot, address)
    calls = fake.count("calls")

    def child() -> None:
        reason = f"CUDA was initialised by process {os.getppid()} before the fork, and a forked child cannot use it"
        for use in (shim.make, device.enter_thread):
            try:
                use()
            except DeviceError as error:
                assert reason in str(error), str(error)
            else:
                raise AssertionError("a forked child was let in")
        assert reason in shim.pin(pages(SIZE))
        device.__exit__()
        shim.unpin(memory)
        assert fake.count("calls") == calls, "a forked child called the driver"

    assert _outcome_in_child(child) == 0
    device.complete()
    assert np.array_equal(slot, content)
    device.__exit__()
    shim.unpin(memory)
    fake.assert_clean()


def errors_name_call_reason_and_device() -> None:
    """An error that does not say which call, why, and on which device."""
    fake, shim = Fake(), Shim()
    fake.alloc(SIZE)
    try:
        shim.make(7)
    except DeviceError as error:
        assert str(error) == "cuDeviceGet: CUDA_ERROR_INVALID_DEVICE (101): invalid device ordinal, on cuda:7"
    else:
        raise AssertionError("there are two devices")
    fake.fail_at(1, 12345)
    try:
        shim.make()
    except DeviceError as error:
        assert str(error) == ("cuThreadExchangeStreamCaptureMode: unknown CUDA error (12345): no description, on cuda:0")
    else:
        raise AssertionError("the call failed")
    fake.assert_clean()


def unavailable() -> None:
    """Not a scenario of the fake's: prints why there is no driver."""
    shim = Shim()
    reason = shim.unavailable()
    try:
        shim.make()
    except DeviceError as error:
        assert reason and str(error) == f"dlopen: {reason}, on cuda:0"
    assert reason in shim.pin(pages(4096))
    shim.unpin(pages(4096))
    print(reason)


SCENARIOS = [
    name
    for name, value in list(globals().items())
    if getattr(value, "__module__", None) == __name__ and not name.startswith("_") and name != unavailable.__name__
]

if __name__ == "__main__":
    globals()[sys.argv[1]]()
