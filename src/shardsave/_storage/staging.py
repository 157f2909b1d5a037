"""The hidden directory in which a save makes its files, beside those that are there, until they are whole."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import secrets
import sys
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed, Descriptor, allocate, call, inode_of, open_regular, read_all, write_all
from shardsave._format.crc64 import crc64

#: Staging directories: eight hex digits for the host, eight at random.
STAGING_PATTERN = re.compile(r"\.shardsave-([0-9a-f]{8})[0-9a-f]{8}")

#: What link(2) says where the file system, or its permission, has no links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class StagedShard(NamedTuple):
    """A shard that is being written: its final name, and the file that is written."""

    name: str
    file: Descriptor


class Staging:
    """A staging directory, made when it is first needed; where ``durable``, each file in it is when it is done.

    Every method raises CallFailed.
    """

    def __init__(self, *, durable: bool) -> None:
        self.name: str | None = None
        self._durable = durable
        self._inside = Descriptor()
        self._shards: list[StagedShard] = []

    def make(self, folder: int) -> None:
        """Makes the directory in ``folder``, a descriptor, where it is not there yet."""
        if self._inside.fd >= 0:
            return
        name = self.name = f".shardsave-{host_id()}{secrets.token_hex(4)}"
        assert STAGING_PATTERN.fullmatch(name)
        call(os.mkdir, name, name, dir_fd=folder)
        self._inside.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
        sync_file(folder, "", wanted=self._durable)

    def create(self, name: str, length: int) -> StagedShard:
        """A file for the data of shard ``name``, ``length`` bytes long and reserved where the file system can."""
        shard = StagedShard(name, Descriptor())
        self._shards.append(shard)
        self._open(shard.file, name)
        allocate(shard.file.fd, name, length)
        return shard

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Ends a shard whose data is written: true length, then header, then fsync on this same descriptor, then close."""
        name, fd = shard.name, shard.file.fd
        end_shard(fd, name, length, header)
        sync_file(fd, name, wanted=self._durable)
        shard.file.close(name)

    def write(self, name: str, data: bytes) -> None:
        """Makes a file that is ``data`` and nothing else."""
        with Descriptor() as file:
            self._open(file, name)
            write_all(file.fd, name, data)
            sync_file(file.fd, name, wanted=self._durable)
            file.close(name)

    def add_name(self, name: str, staged: str) -> None:
        """Gives a sealed file a second name in here; where there are no links, a copy."""
        inside = self._inside.fd
        try:
            call(os.link, name, staged, name, src_dir_fd=inside, dst_dir_fd=inside, follow_symlinks=False)
        except CallFailed as error:
            if error.errno not in NO_LINKS:
                raise
            self.write(name, read_all(staged, inside, sys.maxsize) or b"")

    def sync(self) -> None:
        """Makes the names in here durable."""
        sync_file(self._inside.fd, self.name or "", wanted=self._durable)

    def inode_of(self, name: str) -> tuple[int, int] | None:
        """Tells a file in here from every other."""
        return inode_of(name, self._inside.fd)

    def link(self, name: str, folder: int) -> None:
        """Gives a file its name in ``folder``, where that is free; the staged name stays."""
        call(os.link, name, name, name, src_dir_fd=self._inside.fd, dst_dir_fd=folder, follow_symlinks=False)

    def rename(self, staged: str, name: str, folder: int) -> None:
        """Moves a file to ``name`` in ``folder``, in the place of whatever is there."""
        call(os.rename, name, staged, name, src_dir_fd=self._inside.fd, dst_dir_fd=folder)

    def abandon(self) -> None:
        """Closes what is open, whatever that says."""
        for shard in self._shards:
            shard.file.abandon()

    def close(self) -> None:
        """Lets go of the directory; what is in it stays."""
        self._inside.abandon()

    def _open(self, file: Descriptor, name: str) -> None:
        file.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, self._inside.fd)


def end_shard(fd: int, name: str, length: int, header: bytes) -> None:
    """Gives a file whose data is written its true length and then its header, which is no whole number of blocks. Raises CallFailed."""
    call(os.ftruncate, name, fd, length)
    flags = call(fcntl.fcntl, name, fd, fcntl.F_GETFL)
    call(fcntl.fcntl, name, fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    write_all(fd, name, header)


def sync_file(fd: int, name: str, *, wanted: bool) -> None:
    """fsync, once: after an error the kernel has dropped the pages, and a second call would lie."""
    if wanted:
        call(os.fsync, name, fd)


def sync_there(name: str, folder: int, *, wanted: bool) -> None:
    """Makes the content of what others may have written durable."""
    with Descriptor() as file:
        if open_regular(file, name, folder):
            sync_file(file.fd, name, wanted=wanted)


def host_id() -> str:
    """Eight hex digits for this host: what its savers leave behind is known to be dead by whoever holds the lock here."""
    try:
        with open("/etc/machine-id", "rb") as file:
            machine = file.read(64)
    except OSError:
        machine = b""
    return f"{crc64(platform.node().encode() + machine) & 0xFFFF_FFFF:08x}"
