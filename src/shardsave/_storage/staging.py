"""The staging directory: a hidden directory in the checkpoint's own, in which a save creates its files."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from errno import EEXIST, ENOENT
from typing import NamedTuple

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, allocate, call, sync_all, write_all
from shardsave._common.strict_json import NotJSON, check_memory
from shardsave._format.crc64 import crc64
from shardsave._format.file_names import DIRECTORY_PATTERN
from shardsave._storage.directory import NO_LINKS, Directory
from shardsave._storage.permissions import FileMaker, Permissions, Replaced

#: The name of the new index until it is renamed.
NEW_INDEX_NAME = "index"

#: The list of final names: JSON, an array of strings. If its saver dies, it says what the next save may remove.
LIST_NAME = "names"

#: A file that only this save knows: processes that are to write into the staging directory find out whether it is the same one.
NONCE_NAME = "nonce"

#: How many finished files are synced together at most; they are open until then.
_MOST_UNSYNCED = 16

_MAX_LIST_BYTES = 64_000_000
_NONCE_BYTES = 16

#: Staging directories: eight hex digits for the host, eight at random.
_PATTERN = re.compile(r"\.shardsave-([0-9a-f]{8})[0-9a-f]{8}")


#: The name of a directory in a list, such as ``training-0123abcd/``.
_DIRECTORY = re.compile(r"[a-z]+-[0-9a-f]{8}/")


def owner_of(name: str) -> str | None:
    """The id of the host whose saver created the staging directory ``name``; None if this is no name of a staging directory."""
    match = _PATTERN.fullmatch(name)
    return match[1] if match is not None else None


def host_id() -> str:
    """The id of this host, eight hex digits."""
    try:
        with open("/etc/machine-id", "rb") as file:
            machine = file.read(64)
    except OSError:
        machine = b""
    return f"{crc64(platform.node().encode() + machine) & 0xFFFF_FFFF:08x}"


def read_list(staging: Directory) -> list[str]:
    """The final names in the list of a dead saver; none if it did not finish the list. Raises CallFailed."""
    data = staging.read_all(LIST_NAME, _MAX_LIST_BYTES, follow=False)
    try:
        check_memory(data or b"")
        names = json.loads(data) if data is not None else []
    except (NotJSON, ValueError, RecursionError):
        return []
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name[:-1] if DIRECTORY_PATTERN.fullmatch(name[:-1]) and name.endswith("/") else name for name in texts]


def lists_directory(names: Iterable[str]) -> bool:
    """Whether a list, as `read_list` returns it, has the name of a directory that this version does not know."""
    return any(map(_DIRECTORY.fullmatch, names))


class StagedShard(NamedTuple):
    """A shard that is being written: its final name, and the open file."""

    name: str
    file: Descriptor


class Staging:
    """A staging directory in ``parent``, created when it is first needed. Nothing in it is durable before `sync_files` or `sync`, and
    nothing at all if ``parent`` is not.

    Files already have their final names in it; only the index and the list have other names. A part that has a directory of its own has
    it here, too: its files are called ``directory/file``. Every method raises CallFailed.

    ``private``: no other user, not even one of the same group, may change what the next save will obey: the directory's content, the
    index and the list. So nobody else may write to any file but the shards. ``permissions``: of what is replaced.
    """

    def __init__(self, parent: Directory, path: str) -> None:
        self._parent = parent
        self._path = path  # of the parent
        self._inside = Directory(durable=parent.durable)
        self._folders: list[Directory] = []
        self._files: list[Descriptor] = []  # all that were created
        self._unsynced: list[tuple[Descriptor, str]] = []  # finished files, and their names
        self._maker: FileMaker | None = None
        self.private = False
        self.permissions = Replaced()

    @property
    def name(self) -> str:
        """The directory's name, "" before `make`."""
        return self._inside.name

    @property
    def directory(self) -> Directory:
        """The directory itself, open after `make`."""
        return self._inside

    def make(self) -> None:
        """Creates the directory, unless it exists already. Its name is not durable before `sync`: until then, nothing needs its list."""
        if self._inside.fd >= 0:
            return
        self._inside.name = f".shardsave-{host_id()}{secrets.token_hex(4)}"
        assert owner_of(self.name) is not None
        self._parent.mkdir(self.name, self._mode())
        self._inside.open_in(self._parent)

    def write_nonce(self) -> str:
        """Creates the file of that name with new random digits, and returns these."""
        nonce = secrets.token_hex(_NONCE_BYTES)
        with Descriptor() as file:
            self._create(NONCE_NAME, file, None)
            write_all(file.fd, NONCE_NAME, nonce.encode())
            file.close(NONCE_NAME)
        return nonce

    def join(self, name: str, nonce: str) -> bool:
        """Opens the staging directory ``name``, which another process has made. Returns whether it is the one with this nonce."""
        self._inside.name = name
        try:
            self._inside.open_in(self._parent)
            return self._inside.read_all(NONCE_NAME, 2 * _NONCE_BYTES, follow=False) == nonce.encode()
        except CallFailed as error:
            if error.errno != ENOENT:
                raise
            return False

    def _mode(self) -> int:
        """Who may see nothing of the files may not enter the directory."""
        files = self.permissions.files
        seen = 0 if self.private else 0o777 if files is None else files.mode
        return 0o700 | (0o070 if seen & 0o070 else 0) | (0o007 if seen & 0o007 else 0)

    def make_folder(self, name: str) -> None:
        """Creates the directory ``name`` in this one, for files that are called ``name/…``."""
        folder = Directory(name, durable=self._inside.durable)
        self._folders.append(folder)
        mask = 0o022 if self.private else 0
        if self.permissions.folder is None:
            self._inside.mkdir(name, 0o777 & ~mask)
            folder.open_in(self._inside)
        else:
            wanted = self.permissions.folder
            self._file_maker().make_folder(folder, wanted._replace(mode=wanted.mode & ~mask))

    def _create(self, name: str, file: Descriptor, permissions: Permissions | None, mode: int = 0o666) -> None:
        if permissions is None:
            return self._inside.create(name, file, mode)
        self._file_maker().create(name, file, permissions)

    def _file_maker(self) -> FileMaker:
        if self._maker is None:
            self._maker = FileMaker(self._inside, f"{self._path}/{self.name}")
        return self._maker

    def _permissions_for(self, name: str) -> Permissions | None:
        return self.permissions.in_folder if os.path.dirname(name) else self.permissions.files

    def create(self, name: str, length: int) -> StagedShard:
        """Creates the file of shard ``name`` with room for ``length`` bytes, reserved on disk if the file system supports that."""
        shard = StagedShard(name, Descriptor())
        self._files.append(shard.file)
        self._create(name, shard.file, self._permissions_for(name))
        allocate(shard.file.fd, name, length)
        return shard

    def create_empty(self, name: str, file: Descriptor) -> None:
        """Creates the file of shard ``name``, and opens it as ``file``; the caller closes it."""
        self._create(name, file, self._permissions_for(name))

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Finishes a shard whose data is written: sets its true length and writes its header."""
        end_shard(shard.file.fd, shard.name, length, header)
        self.sync_later(shard.file, shard.name)

    def sync_later(self, file: Descriptor, name: str) -> None:
        """Leaves it to the next `sync_files` or `sync` to sync the finished ``file`` on this same descriptor, and to close it."""
        self._unsynced.append((file, name))
        if len(self._unsynced) >= _MOST_UNSYNCED:
            self.sync_files()

    def sync_files(self) -> None:
        """Makes the contents of all finished files durable, and closes these."""
        self._sync(())

    def write(self, name: str, data: bytes, permissions: Permissions | None = None) -> None:
        """Creates the file ``name`` with the content ``data``. ``permissions``: of a file that it replaces alone."""
        self._write(name, data, permissions or self._permissions_for(name))

    def write_index(self, data: bytes) -> None:
        """Writes the new index."""
        self._write(NEW_INDEX_NAME, data, self.permissions.index)

    def _write(self, name: str, data: bytes, permissions: Permissions | None) -> None:
        mask = 0o022 if self.private else 0
        if permissions is not None:
            permissions = permissions._replace(mode=permissions.mode & ~mask)
        file = Descriptor()
        self._files.append(file)
        self._create(name, file, permissions, 0o666 & ~mask)
        write_all(file.fd, name, data)
        self.sync_later(file, name)

    def write_list(self, names: Iterable[str]) -> None:
        """Writes the list of final names. Those of directories have a slash at the end."""
        listed = [f"{name}/" if DIRECTORY_PATTERN.fullmatch(name) else name for name in names]
        self.write(LIST_NAME, json.dumps(listed).encode())

    def add_name(self, name: str, staged: str) -> None:
        """Gives the finished file ``staged`` a second name in this directory; copies it if the file system has no links."""
        try:
            self._inside.link(staged, self._inside, name)
        except CallFailed as error:
            if error.errno not in NO_LINKS:
                raise
            self.write(name, self._inside.read_all(staged, sys.maxsize) or b"")

    def sync(self) -> None:
        """Makes all of this durable: the finished files, the names in this directory and in those of parts, and its own name."""
        self._sync([*self._folders, self._inside, self._parent])

    def _sync(self, folders: Sequence[Directory]) -> None:
        if self._inside.durable:
            opened = [*((file.fd, name) for file, name in self._unsynced), *((folder.fd, folder.name) for folder in folders)]
            for failure in sync_all(opened):
                if failure is not None:
                    raise failure
        for file, name in self._unsynced:
            file.close(name)
        self._unsynced.clear()

    def inode_of(self, name: str) -> tuple[int, int] | None:
        return self._inside.inode_of(name)

    def link(self, name: str) -> bool:
        """Links a staged file to its final name. Returns False if that is taken or the file system has no links."""
        try:
            self._inside.link(name, self._parent, name)
        except CallFailed as error:
            if error.errno not in (EEXIST, *NO_LINKS):
                raise
            return False
        return True

    def rename(self, staged: str, name: str) -> None:
        """Moves a file, or the directory of a part, to its final name; a file replaces whatever has that name."""
        self._inside.rename(staged, self._parent, name)

    def abandon(self) -> None:
        """Closes the files that are open; errors are ignored."""
        for file in (*self._files, *(file for file, _ in self._unsynced)):
            file.abandon()

    def close(self) -> None:
        """Closes the directory; its files stay."""
        for folder in self._folders:
            folder.close()
        self._inside.close()


def end_shard(fd: int, name: str, length: int, header: bytes) -> None:
    """Gives a file whose data is written its true length, and then its header. Raises CallFailed.

    The header is written through the page cache, since its memory is not aligned as direct I/O requires.
    """
    call(os.ftruncate, name, fd, length)
    flags = call(fcntl.fcntl, name, fd, fcntl.F_GETFL)
    call(fcntl.fcntl, name, fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    write_all(fd, name, header)
