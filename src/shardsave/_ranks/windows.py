"""Windows: memory of one rank that the other ranks of its host map too. It has no name in any file system, so nothing of it can stay."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
from contextlib import suppress

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import call, map_shared

#: The length of a huge page, in bytes, on the usual machines; on others there are none of this length, and nothing is lost.
_HUGE = 2 << 20

#: Of linux/mman.h. Unlike MADV_HUGEPAGE it does not depend on how the system is set, which rarely allows huge pages for shared memory.
_MADV_COLLAPSE = 25

#: The longest control message of an exchange, in bytes.
MESSAGE_BYTES = 64


class _Mapping:
    """A file in memory, mapped where its pages may be huge. ``address``: where it begins; ``populate``: as for `SharedMemory`."""

    def __init__(self, fd: int, nbytes: int, *, populate: bool) -> None:
        # More addresses than needed, of which it uses aligned ones: they are given back together with what is mapped onto them.
        self._addresses = call(mmap.mmap, "", -1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._addresses))
        self._skipped = -start % _HUGE
        self._nbytes = nbytes
        self.address = start + self._skipped
        map_shared(fd, self.address, nbytes, mmap.MAP_POPULATE if populate else 0)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._addresses.madvise(mmap.MADV_DONTFORK)  # a forked child would keep the memory

    def view(self) -> memoryview:
        return memoryview(self._addresses)[self._skipped : self._skipped + self._nbytes]

    def collapse(self) -> None:
        """Makes huge pages, as far as the kernel can and has any (madvise(2), Linux 6.1)."""
        with suppress(OSError):
            self._addresses.madvise(_MADV_COLLAPSE, self._skipped, self._nbytes)

    def close(self) -> None:
        """Unmaps it, or leaves that to the last view of it."""
        with suppress(BufferError):
            self._addresses.close()


class SharedMemory:
    """``nbytes`` of memory behind a descriptor, which it owns. ``view``: the bytes; ``address``: where they begin.

    ``populate``: all pages are mapped at once (four times cheaper than one by one), for memory that will be used as a whole.
    """

    def __init__(self, file: Descriptor, nbytes: int, *, populate: bool) -> None:
        self.file = file
        self.nbytes = nbytes
        self._mapping = _Mapping(file.fd, nbytes, populate=populate)
        self.view = self._mapping.view()
        self.address = self._mapping.address

    @classmethod
    def new(cls, nbytes: int) -> SharedMemory:
        """New memory, which is there: later no process is killed for the lack of it. Raises CallFailed."""
        file = Descriptor()
        file.open_in_memory()
        try:
            call(os.ftruncate, "", file.fd, nbytes)
            _take_huge_pages(file.fd, nbytes)
            call(os.posix_fallocate, "", file.fd, 0, nbytes)  # what is missing still, in ordinary pages
            return cls(file, nbytes, populate=True)
        except BaseException:
            file.abandon()
            raise

    def close(self) -> None:
        """Frees it, or leaves that to the last view of it."""
        self.file.abandon()
        self.view.release()
        self._mapping.close()


def _take_huge_pages(fd: int, nbytes: int) -> None:
    """Fills an empty file in memory with huge pages, where there are any. A disk takes a block of them in few and long requests; and it
    takes a twelfth of the time of ordinary pages to make them, a fiftieth to free them.
    """
    for offset in range(0, nbytes, _HUGE):
        call(os.posix_fallocate, "", fd, offset, mmap.PAGESIZE)  # where nothing is, nothing can become huge
    mapping = _Mapping(fd, nbytes, populate=False)
    mapping.collapse()
    mapping.close()


def send_descriptor(connection: socket.socket, message: bytes, fd: int) -> None:
    """Sends ``message`` and a descriptor, as sendmsg(2) and unix(7) say."""
    connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def receive(connection: socket.socket) -> tuple[bytes, Descriptor | None]:
    """One message, empty at the end of the connection, and the descriptor that came with it."""
    message, extra, _, _ = connection.recvmsg(
        MESSAGE_BYTES, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return message, Descriptor.of(int(array.array("i", data)[0]))
    return message, None


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket runs as this process's user."""
    credentials = array.array("i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * array.array("i").itemsize))
    return credentials[1] == os.geteuid()
