"""The fake driver's controls and the shim around ``csrc/cuda.h``, for scenario processes.

A scenario runs in a process of its own with ``LD_LIBRARY_PATH`` leading to the fake, since a driver is loaded once per process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

LAUNCH_FAILED = 719


def declare(function: Any, result: Any, *arguments: Any) -> Callable[..., Any]:
    function.restype = result
    function.argtypes = arguments
    return function  # type: ignore[no-any-return]


class Fake:
    """The library that ``dlopen("libcuda.so.1")`` gives in this process."""

    def __init__(self) -> None:
        library = self.library = ctypes.CDLL("libcuda.so.1")
        self._alloc = declare(library.fake_alloc, c_uint64, c_int, c_size_t)
        self.free = declare(library.fake_free, None, c_uint64)
        self._peek = declare(library.fake_peek, c_int, c_int, c_uint64, c_void_p, c_size_t)
        self.stream = declare(library.fake_stream, c_uint64, c_int)
        self._work = declare(library.fake_work, c_int, c_int, c_uint64, c_uint64, c_void_p, c_size_t)
        self.finish = declare(library.fake_finish, None)
        self.begin_capture = declare(library.fake_begin_capture, None, c_uint64)
        self.end_capture = declare(library.fake_end_capture, c_int, c_uint64)
        self._fail_at = declare(library.fake_fail_at, None, c_uint64, c_int, c_int)
        self.lose_at_copy = declare(library.fake_lose_at_copy, None, c_uint64)
        self.pin_limit = declare(library.fake_pin_limit, None, c_uint64)
        self._count = declare(library.fake_count, c_int64, c_char_p)
        self._violations = declare(library.fake_violations, c_char_p)
        self._failed_call = declare(library.fake_failed_call, c_char_p)
        self.push_context = declare(library.cuCtxPushCurrent_v2, c_int, c_uint64)
        self._current = declare(library.cuCtxGetCurrent, c_int, POINTER(c_uint64))

    def alloc(self, content: Bytes | int, device: int = 0) -> int:
        """Device memory with ``content``, or that many bytes of it, undefined."""
        size = content if isinstance(content, int) else content.nbytes
        address: int = self._alloc(device, size)
        if not isinstance(content, int):
            self.work(address, content, device)
            self.finish()
        return address

    def peek(self, address: int, size: int, device: int = 0) -> Bytes:
        """Device memory as it is now, with whatever is queued left undone."""
        content = np.empty(size, np.uint8)
        assert self._peek(device, address, content.ctypes.data, size) == 0
        return content

    def work(self, address: int, content: Bytes, device: int = 0, stream: int = 0) -> None:
        """A kernel of the caller's on ``stream`` that will write ``content``, once something waits for it."""
        assert self._work(device, stream, address, content.ctypes.data, content.nbytes) == 0

    def fail_at(self, call: int, code: int = LAUNCH_FAILED) -> None:
        """Makes the ``call``-th driver call from now on fail, and no other; 0: none."""
        self._fail_at(call, code, 0)

    def lose_at_call(self, call: int) -> None:
        """The device is lost at the ``call``-th driver call from now on."""
        self._fail_at(call, LAUNCH_FAILED, 1)

    def revive(self) -> None:
        """A lost device is as new, and nothing fails any more."""
        self.fail_at(0)
        self.lose_at_copy(0)

    def failed_call(self) -> str:
        """The call that `fail_at` made fail; empty when it never came to that."""
        return bytes(self._failed_call()).decode()

    def count(self, what: str) -> int:
        found: int = self._count(what.encode())
        assert found >= 0, what
        return found

    def current_context(self) -> int:
        context = c_uint64()
        assert self._current(ctypes.byref(context)) == 0
        return context.value

    def violations(self) -> list[str]:
        return bytes(self._violations()).decode().splitlines()

    def alive(self) -> dict[str, int]:
        """What the library under test has not given back."""
        kinds = ("streams", "events", "registrations", "context references")
        return {kind: self.count(kind) for kind in kinds if self.count(kind)}

    def assert_clean(self) -> None:
        """Nothing is left, nothing was broken, and this thread is as it was."""
        assert self.alive() == {}
        assert self.violations() == []
        assert self.count("capture mode of this thread") == 0


class DeviceError(Exception):
    """What the C++ class of that name says."""


class Shim:
    """``csrc/cuda.h``."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.environ["SHIM"])
        self._why = ctypes.create_string_buffer(512)
        self._available = declare(library.shim_available, c_int, c_char_p)
        self._make = declare(library.shim_make, c_void_p, c_int, c_uint64, c_size_t, c_char_p)
        self._pin = declare(library.shim_pin, c_int, c_int, c_void_p, c_size_t, c_char_p)
        self._unpin = declare(library.shim_unpin, None, c_void_p)
        self.enter = declare(library.shim_enter, c_int, c_void_p, c_char_p)
        self.submit = declare(library.shim_submit, c_int, c_void_p, c_int, c_void_p, c_uint64, c_size_t, c_size_t, c_char_p)
        self.complete = declare(library.shim_complete, c_int, c_void_p, c_size_t, c_char_p)
        self.destroy = declare(library.shim_destroy, None, c_void_p)

    def unavailable(self) -> str:
        """Why there is no driver; empty where there is one."""
        available = self._available(self._why)
        assert bool(available) == (self._why.value == b"")
        return self._why.value.decode()

    def pin(self, memory: Bytes, ordinal: int = 0) -> str:
        """Why the memory could not be pinned; empty when it is."""
        pinned = self._pin(ordinal, memory.ctypes.data, memory.nbytes, self._why)
        assert bool(pinned) == (self._why.value == b"")
        return self._why.value.decode()

    def unpin(self, memory: Bytes) -> None:
        self._unpin(memory.ctypes.data)

    def make(self, ordinal: int = 0, stream: int = 0, slots: int = 4) -> Device:
        handle = self._make(ordinal, stream, slots, self._why)
        if handle is None:
            raise DeviceError(self._why.value.decode())
        return Device(self, handle)


class Device:
    """A ``Device``; destroyed at the end of its ``with``."""

    def __init__(self, shim: Shim, handle: int) -> None:
        self._shim = shim
        self._handle = handle

    def _check(self, call: Callable[..., int], *arguments: Any) -> None:
        why = ctypes.create_string_buffer(512)
        if not call(self._handle, *arguments, why):
            raise DeviceError(why.value.decode())

    def enter_thread(self) -> None:
        self._check(self._shim.enter)

    def to_slot(self, slot: Bytes, address: int, index: int = 0) -> None:
        self._check(self._shim.submit, 1, slot.ctypes.data, address, slot.nbytes, index)

    def from_slot(self, slot: Bytes, address: int, index: int = 0) -> None:
        self._check(self._shim.submit, 0, slot.ctypes.data, address, slot.nbytes, index)

    def complete(self, index: int = 0) -> None:
        self._check(self._shim.complete, index)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None:
        self._shim.destroy(self._handle)


def pages(size: int) -> Bytes:
    """``size`` bytes that begin at a page, as a slot's memory does."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def random_bytes(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@contextmanager
def captured_meanwhile(fake: Fake) -> Iterator[None]:
    """While the block runs, another thread captures a CUDA graph. Raises AssertionError if that is not whole in the end."""
    stream = fake.stream(0)
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
        yield
    finally:
        ended.set()
        thread.join()
    assert whole == [1]
