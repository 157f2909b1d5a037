"""The open files of a checkpoint that is read: each is checked against its record in the index, and held open if descriptors suffice."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Union

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call, descriptor_allowance, read_at
from shardsave._format.crc64 import crc64
from shardsave._format.header import Header, header_length, parse_header
from shardsave._format.index import ShardRecord
from shardsave._format.other_kinds import START_BYTES, ZIP, is_pickle
from shardsave._storage.find import cannot_read, open_checkpoint_file, refuse_other_kind
from shardsave.errors import CorruptCheckpointError, DirectoryBusyError, IncompatibleCheckpointError, ShardSaveError

#: A further check of a header: gets its bytes, the file's length, what was read from it and the file's name. Raises
#: CorruptCheckpointError.
HeaderCheck = Callable[[bytes, int, Header, str], None]

#: File that could not be opened → its error. None instead of a dict: the first error is raised.
Broken = Union[dict[str, ShardSaveError], None]


class ShardFiles:
    """Open shards. Their descriptors keep the bytes readable even when a save replaces the files meanwhile.

    ``index_name`` is None without an index; ``records`` is None if the index has no records of its shards. ``header_check`` may refuse
    a header that is sound otherwise.
    """

    def __init__(
        self,
        path: str,
        folder: str,
        index_name: str | None,
        records: Mapping[str, ShardRecord] | None,
        header_check: HeaderCheck | None,
    ) -> None:
        self.path = path
        self.shards: tuple[str, ...] = ()
        self.allowance = descriptor_allowance()  # how many shards are held open at the same time
        self.records = dict(records) if records is not None else None
        self.folder = folder
        self._named_by = index_name
        self._header_check = header_check
        self._open: dict[str, Descriptor] = {}
        self._identities: dict[str, tuple[int, ...]] = {}  # of each shard, when it was first opened

    def path_of(self, shard: str) -> str:
        """The path of ``shard``, for messages and for callers that open it themselves."""
        return os.path.join(self.folder, shard)

    def inode_of(self, shard: str) -> tuple[int, ...] | None:
        """Device and inode number of ``shard``, when it was opened; None if it was not."""
        return self._identities[shard][:2] if shard in self._identities else None

    def descriptors(self, shards: Sequence[str]) -> list[int]:
        """Descriptors of ``shards``, at most `allowance` of them. Other shards are closed first if too many would be open."""
        unneeded = self._open.keys() - set(shards)
        closed = [shard for shard in shards if shard not in self._open]
        while unneeded and len(self._open) + len(closed) > self.allowance:
            self.drop(unneeded.pop())
        return [self.descriptor(shard) for shard in shards]

    def descriptor(self, shard: str) -> int:
        """A descriptor of ``shard``. If the shard was closed (because too many were open, or by a fork), it is opened and checked again.

        Raises DirectoryBusyError if the file was replaced in between.
        """
        if shard not in self._open or self._open[shard].fd < 0:
            self._open[shard], _ = self.open_shard(shard)
        return self._open[shard].fd

    def release(self, shard: str) -> None:
        """Closes ``shard`` if not all files can be held open."""
        if len(self._identities) > self.allowance:
            self.drop(shard)

    def drop(self, shard: str) -> None:
        """Closes ``shard``, whose descriptor is not needed for now."""
        if shard in self._open:
            self._open.pop(shard).abandon()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].abandon()

    def hold(self, shard: str, file: Descriptor) -> None:
        """Keeps the opened ``file`` for later, or closes it if too many are open."""
        if len(self._open) < self.allowance:
            self._open[shard] = file
        else:
            file.abandon()

    def open_shard(self, shard: str) -> tuple[Descriptor, Header]:
        """Opens ``shard`` and checks its header. Raises CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError."""
        file = self.open_file(shard)
        try:
            identity = file_identity(call(os.fstat, shard, file.fd))
            if self._identities.setdefault(shard, identity) != identity:
                raise DirectoryBusyError(self._replaced(shard))
            try:
                return file, self._checked_header(file.fd, shard)
            except CorruptCheckpointError:
                self._refuse_other_kind(file.fd, shard)
                raise
        except CallFailed as error:
            file.abandon()
            raise cannot_read(self.path_of(shard), error) from error
        except BaseException:
            file.abandon()
            raise

    def open_file(self, shard: str) -> Descriptor:
        """Opens ``shard``, a shard or another file that the index names. Raises CorruptCheckpointError if it is missing."""
        path = self.path_of(shard)
        file = open_checkpoint_file(path, f"shard {shard}")
        if file is None and shard in self._identities:
            raise DirectoryBusyError(self._replaced(shard))
        if file is None:
            expectation = f"the index names {shard}" if self._named_by is not None else f"{shard} was expected"
            state = "it is a link to nothing" if os.path.islink(path) else "there is no such file"
            raise CorruptCheckpointError(
                f"corrupt checkpoint {self.path}: {expectation}, {state}; the checkpoint was copied or downloaded in part"
            )
        return file

    def read_document(self, name: str) -> bytes:
        """The content of ``name``, a JSON file that the index names. Raises CorruptCheckpointError."""
        assert self.records is not None
        try:
            with self.open_file(name) as file:
                return self.checked_start(file.fd, name, self.records[name])
        except CallFailed as error:
            raise cannot_read(self.path_of(name), error) from error

    def _replaced(self, shard: str) -> str:
        if len(self._identities) > self.allowance:
            cause = f"only {self.allowance} of {len(self._identities)} shards could be held open"
            advice = "load again, or raise the limit of open files (ulimit -n)"
        else:
            cause, advice = "the descriptor was closed by a fork", "open the checkpoint again"
        return (
            f"cannot read {self.path_of(shard)}: the file that was there at first was expected, it was replaced or removed "
            f"during the load, most likely by a save; {cause}: {advice}"
        )

    def _checked_header(self, descriptor: int, shard: str) -> Header:
        """The header of ``shard``. If the index has a record of it, its checksum is compared before anything is parsed."""
        where = f"shard {shard}"
        if self.records is None:
            length = call(os.fstat, shard, descriptor).st_size
            if not length:
                raise CorruptCheckpointError(
                    f"corrupt {where}: {self.path_of(shard)}: a safetensors file was expected, it is empty; the checkpoint was copied "
                    f"or downloaded in part"
                )
            header = self._parsed(read_header(descriptor, length, where), length, shard)
            if self._named_by is not None and header.sums is not None:
                raise CorruptCheckpointError(
                    f"corrupt index {self._named_by}: a record of {shard} expected, since shardsave wrote that file, it has none; "
                    f"one of the two was changed or replaced after it was saved"
                )
            return header
        record = self.records[shard]
        header = self._parsed(self.checked_start(descriptor, shard, record), record.length, shard)
        if header.sums is None:
            raise CorruptCheckpointError(
                f"corrupt {where}: checksums of its tensors expected, as the index has a record of it, its header has none; "
                f"the file was changed after it was saved"
            )
        return header

    def _parsed(self, raw: bytes, length: int, shard: str) -> Header:
        header = parse_header(raw, length, f"shard {shard}")
        if self._header_check is not None:
            self._header_check(raw, length, header, shard)
        return header

    def _refuse_other_kind(self, descriptor: int, shard: str) -> None:
        """Raises the error that names what ``shard`` is, if it begins like a file of another kind and not like a damaged one."""
        start = read_start(descriptor, START_BYTES)
        path = self.path_of(shard)
        pickled = "a zip archive" if start.startswith(ZIP) else "a pickle" if is_pickle(start) else None
        if pickled is not None:
            raise IncompatibleCheckpointError(
                f"cannot read {path}: a safetensors file was expected, it is {pickled}, as torch.save writes; no pickle is read here, "
                f"since that can run code: shardsave convert {path} DST makes a checkpoint of it; the file is as it was"
            )
        refuse_other_kind(start, f"shard {shard}", path, "a safetensors file")

    @staticmethod
    def checked_start(descriptor: int, shard: str, record: ShardRecord) -> bytes:
        """Reads the header of ``shard`` (of a JSON part, the whole file); refuses a length or a checksum that differs from ``record``."""
        length = call(os.fstat, shard, descriptor).st_size
        if length != record.length:
            cause = "it was cut, half copied or half downloaded" if length < record.length else "something was appended to it"
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says {record.length} bytes, the file has {length}; {cause}, "
                f"or it belongs to another save"
            )
        raw = read_start(descriptor, record.header_length)
        if (crc := crc64(raw)) != record.header_crc:
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says a header with checksum {record.header_crc:016x}, the file has {crc:016x}; "
                f"the file was changed after it was saved, or belongs to another save"
            )
        return raw


def read_header(fd: int, file_length: int, where: str) -> bytes:
    """The header of the file behind ``fd``, for `parse_header`; never allocates more than ``file_length`` bytes. Raises CallFailed."""
    start = read_start(fd, 8)
    return start + read_at(fd, header_length(start, file_length, where), 8)


def read_start(fd: int, length: int) -> bytes:
    """The first ``length`` bytes of the file behind ``fd``, or all bytes of a shorter file. Raises CallFailed."""
    return read_at(fd, length, 0)


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """A value that differs between two files, and changes when a file is written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
