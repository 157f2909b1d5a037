"""The checkpoint that was in a directory before a save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardsave._format.file_names import INDEX_NAME, LONE_NAME
from shardsave._format.index import MAX_INDEX_BYTES, FileRecord, Index, Superseded
from shardsave._format.index_parsing import parse_index
from shardsave._storage.directory import Directory
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError


@dataclass(frozen=True)
class Previous:
    """An index, a lone file, both, or nothing.

    ``index_bytes``: the content of the index file. ``unreadable``: why ``index`` is None although that file exists.
    """

    index_bytes: bytes | None = None
    index: Index | None = None
    unreadable: str = ""
    lone: Superseded | None = None

    @property
    def exists(self) -> bool:
        return self.index_bytes is not None or self.lone is not None

    @property
    def files(self) -> frozenset[str]:
        """The files that the index names."""
        return files_of(self.index)

    @property
    def companions(self) -> Mapping[str, FileRecord]:
        return companions_of(self.index)

    def notes(self) -> list[str]:
        """What the report of a save says about the checkpoint that it replaced."""
        notes = []
        if self.unreadable:
            notes.append(f"nothing was removed, since the replaced index cannot be read ({self.unreadable})")
        record = self.index.record if self.index is not None else None
        if self.lone is not None and (record is None or record.supersedes != self.lone):
            notes.append(f"{LONE_NAME}, which was not saved by shardsave, was replaced")
        elif self.index is not None and record is None:
            notes.append("the checkpoint that was replaced was not saved by shardsave")
        return notes


def read_previous(folder: Directory) -> Previous:
    """Reads the checkpoint that is in ``folder``. Raises CallFailed."""
    status = folder.status_of(LONE_NAME, follow=True)
    lone = Superseded(status.st_size, status.st_mtime_ns) if status is not None else None
    index_bytes = folder.read_all(INDEX_NAME, MAX_INDEX_BYTES)
    if index_bytes is None:
        return Previous(lone=lone)
    try:
        return Previous(index_bytes, parse_index(index_bytes, f"index {INDEX_NAME}"), lone=lone)
    except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
        return Previous(index_bytes, unreadable=str(error), lone=lone)


def files_of(index: Index | None) -> frozenset[str]:
    """The files that ``index`` names."""
    if index is None:
        return frozenset()
    named = frozenset(index.weight_map.values())
    record = index.record
    if record is None:
        return named
    return named | record.shards.keys() | {part.file for part in record.parts.values()} | record.companions.keys()


def companions_of(index: Index | None) -> Mapping[str, FileRecord]:
    """The companions that ``index`` names."""
    return index.record.companions if index is not None and index.record is not None else {}
