"""The files of a checkpoint that is read: opened, checked against what the index says of them, and held open as long as that may be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from shardsave._common.os_calls import CallFailed, Descriptor, call, descriptor_allowance
from shardsave._format.crc64 import crc64
from shardsave._format.header import Header, parse_header, read_header, read_start
from shardsave._format.index import ShardRecord
from shardsave._storage.find import TORCH_SAVE_HINT, cannot_read, open_checkpoint_file
from shardsave.errors import CorruptCheckpointError, DirectoryBusyError, IncompatibleCheckpointError

#: How a pickle begins, of every protocol that is binary and in use.
_PICKLES = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")


class ShardFiles:
    """Open shards. Their descriptors keep the bytes readable even when a save replaces the files meanwhile.

    ``index_name`` is None without an index, ``records`` where it says nothing of its shards' lengths and headers.
    """

    def __init__(self, path: str, folder: str, index_name: str | None, records: Mapping[str, ShardRecord] | None) -> None:
        self.path = path
        self.shards: tuple[str, ...] = ()
        self.allowance = descriptor_allowance()  # how many shards are held open at a time
        self.records = dict(records) if records is not None else None
        self._folder = folder
        self._named_by = index_name
        self._open: dict[str, Descriptor] = {}
        self._seen: dict[str, tuple[int, ...]] = {}  # which file each shard was when it was first opened

    def path_of(self, shard: str) -> str:
        """The path of ``shard``, for messages and for those who open it themselves."""
        return os.path.join(self._folder, shard)

    def descriptors(self, shards: Sequence[str]) -> list[int]:
        """Open descriptors of ``shards``, at most `allowance` of them; the others are closed first where they are too many."""
        spare = self._open.keys() - set(shards)
        lacking = [shard for shard in shards if shard not in self._open]
        while spare and len(self._open) + len(lacking) > self.allowance:
            self.drop(spare.pop())
        return [self.descriptor(shard) for shard in shards]

    def descriptor(self, shard: str) -> int:
        """An open descriptor of ``shard``; where it was closed for want of descriptors, or by a fork, opened and checked again.

        Raises DirectoryBusyError where it is another file by then.
        """
        if shard not in self._open or self._open[shard].fd < 0:
            self._open[shard], _ = self.open_shard(shard)
        return self._open[shard].fd

    def release(self, shard: str) -> None:
        """Closes ``shard`` when more shards are in use than descriptors can be held for."""
        if len(self.shards) > self.allowance:
            self.drop(shard)

    def drop(self, shard: str) -> None:
        """Closes ``shard``, whose descriptor is not needed for now."""
        if shard in self._open:
            self._open.pop(shard).abandon()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].abandon()

    def hold(self, shard: str, file: Descriptor) -> None:
        if len(self._open) < self.allowance:
            self._open[shard] = file
        else:
            file.abandon()

    def open_shard(self, shard: str) -> tuple[Descriptor, Header]:
        file = self.opened(shard)
        try:
            found = _identity(call(os.fstat, shard, file.fd))
            if self._seen.setdefault(shard, found) != found:
                raise DirectoryBusyError(self._replaced(shard))
            return file, self._checked_header(file.fd, shard)
        except CallFailed as error:
            file.abandon()
            raise cannot_read(self.path_of(shard), error) from error
        except BaseException:
            file.abandon()
            raise

    def opened(self, shard: str) -> Descriptor:
        path = self.path_of(shard)
        file = open_checkpoint_file(path, f"shard {shard}")
        if file is None and shard in self._seen:
            raise DirectoryBusyError(self._replaced(shard))
        if file is None:
            wanted = f"the index names {shard}" if self._named_by is not None else f"{shard} was expected"
            found = "it is a link to nothing" if os.path.islink(path) else "there is no such file"
            raise CorruptCheckpointError(
                f"corrupt checkpoint {self.path}: {wanted}, {found}; the checkpoint was copied or downloaded in part"
            )
        return file

    def _replaced(self, shard: str) -> str:
        if len(self.shards) > self.allowance:
            why = f"only {self.allowance} of {len(self.shards)} shards could be held open"
            advice = "load again, or raise the limit of open files (ulimit -n)"
        else:
            why, advice = "the descriptor was closed by a fork", "open the checkpoint again"
        return (
            f"cannot read {self.path_of(shard)}: the file that was there at first was expected, it was replaced or removed "
            f"during the load, most likely by a save; {why}: {advice}"
        )

    def _checked_header(self, descriptor: int, shard: str) -> Header:
        """The header of ``shard``; where the index has a record of it, not a byte is looked at before its checksum is right."""
        where = f"shard {shard}"
        if self.records is None:
            length = call(os.fstat, shard, descriptor).st_size
            try:
                header = parse_header(read_header(descriptor, length, where), length, where)
            except CorruptCheckpointError:
                self._refuse_torch_save(descriptor, shard)
                raise
            if self._named_by is not None and header.sums is not None:
                raise CorruptCheckpointError(
                    f"corrupt index {self._named_by}: a record of {shard} expected, which shardsave wrote, it has none; "
                    f"one of the two was changed or replaced after it was saved"
                )
            return header
        record = self.records[shard]
        header = parse_header(self.checked_start(descriptor, shard, record), record.length, where)
        if header.sums is None:
            raise CorruptCheckpointError(
                f"corrupt {where}: checksums of its tensors expected, as the index has a record of it, its header has none; "
                f"the file was changed after it was saved"
            )
        return header

    def _refuse_torch_save(self, descriptor: int, shard: str) -> None:
        """What begins like a file of torch.save is not a damaged one of another kind."""
        start = read_start(descriptor, 4)
        kind = "a zip archive" if start == b"PK\3\4" else "a pickle" if start[:2] in _PICKLES else None
        if kind is not None:
            raise IncompatibleCheckpointError(
                f"cannot read {self.path_of(shard)}: a safetensors file was expected, it is {kind}, as torch.save writes; "
                f"{TORCH_SAVE_HINT}; the file is as it was"
            )

    @staticmethod
    def checked_start(descriptor: int, shard: str, record: ShardRecord) -> bytes:
        """The header of ``shard``, or all of it where it has no more; the index says its length and checksum."""
        length = call(os.fstat, shard, descriptor).st_size
        if length != record.length:
            fate = "it was cut, half copied or half downloaded" if length < record.length else "something was appended to it"
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says {record.length} bytes, the file has {length}; {fate}, or it belongs to another save"
            )
        raw = read_start(descriptor, record.header_length)
        if (found := crc64(raw)) != record.header_crc:
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says a header with checksum {record.header_crc:016x}, the file has {found:016x}; "
                f"the file was changed after it was saved, or belongs to another save"
            )
        return raw


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from every other, and from itself before it was changed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
