"""Windows: memory of one rank that the other ranks of its host map too. It has no name in any file system, so nothing of it can stay."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
from contextlib import suppress

from shardsave._common.os_calls import Descriptor, call

#: The longest control message of an exchange, in bytes.
MESSAGE_BYTES = 64


class SharedMemory:
    """``nbytes`` of memory behind a descriptor, which it owns. ``view``: the bytes; ``address``: where they begin.

    ``populate``: all pages are mapped at once (four times cheaper than one by one), for memory that will be used as a whole.
    """

    def __init__(self, file: Descriptor, nbytes: int, *, populate: bool) -> None:
        self.file = file
        self.nbytes = nbytes
        self._map = mmap.mmap(file.fd, nbytes, mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0))
        if hasattr(mmap, "MADV_DONTFORK"):
            self._map.madvise(mmap.MADV_DONTFORK)  # a forked child would keep the memory
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def new(cls, nbytes: int) -> SharedMemory:
        """New memory, which is there: later no process is killed for the lack of it. Raises CallFailed."""
        file = Descriptor()
        file.open_in_memory()
        try:
            call(os.posix_fallocate, "", file.fd, 0, nbytes)
            return cls(file, nbytes, populate=True)
        except BaseException:
            file.abandon()
            raise

    def close(self) -> None:
        """Frees it, or leaves that to the last view of it."""
        self.file.abandon()
        self.view.release()
        with suppress(BufferError):
            self._map.close()


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
