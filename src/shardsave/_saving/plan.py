"""What a save would write, computed without writing: the names and lengths of its files, and the memory and disk space that it needs."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed
from shardsave._engine import engine
from shardsave._format.file_names import (
    DIRECTORY_INDEX,
    INDEX_NAME,
    LONE_NAME,
    PART_TENSORS,
    directory_name,
    part_name,
    shard_names,
)
from shardsave._format.index import FileRecord, Part, ShardRecord, Superseded, encode_index
from shardsave._saving.contents import Contents
from shardsave._storage.directory import Directory, missing_folders
from shardsave.errors import SaveNotCommittedError

#: In the place of a tag of eight random hex digits.
_ANY_TAG = "????????"


class PlannedFile(NamedTuple):
    """``name``: a shell pattern, in which ``????????`` stands for random hex digits. ``bytes``: the length of the file."""

    name: str
    bytes: int


def planned_files(contents: Contents, path: str, *, durable: bool) -> list[PlannedFile]:
    """The files that a save of ``contents`` into the directory ``path`` would write now; the index is the last."""
    taken = set(_names_in(path))
    names = shard_names(len(contents.shards))
    if not taken.isdisjoint(names):
        names = shard_names(len(contents.shards), _ANY_TAG)
    extra_names = [part_name("extra", _ANY_TAG, PART_TENSORS) for _ in contents.extra_shards]
    folders = [directory_name(part.stem, _ANY_TAG) for part in contents.directories]
    in_folders = [f"{folder}/{file}" for folder, part in zip(folders, contents.directories) for file in part.shards]
    shard_files = [*names, *extra_names, *in_folders]
    records = {
        name: ShardRecord(len(shard.header) + shard.layout.data_bytes, len(shard.header), 0)
        for name, shard in zip(shard_files, contents.all_shards)
    }
    files = [(name, record.length) for name, record in records.items()]
    documents = {role: (part_name(role, _ANY_TAG, "json"), len(document)) for role, document in contents.documents.items()}
    parts = {role: Part(name, ShardRecord(length, length, 0)) for role, (name, length) in documents.items()}
    files += documents.values()
    for name in extra_names:
        parts["extra tensors"] = Part(name, records.pop(name))
    for folder, part in zip(folders, contents.directories):
        in_folder = {file: records.pop(f"{folder}/{file}") for file in part.shards}
        in_folder |= {file: ShardRecord(len(document), len(document), 0) for file, document in part.documents.items()}
        length = len(part.index(in_folder))
        parts[part.role] = Part(f"{folder}/{DIRECTORY_INDEX}", ShardRecord(length, length, 0))
        files += [(f"{folder}/{file}", len(document)) for file, document in part.documents.items()]
        files.append((f"{folder}/{DIRECTORY_INDEX}", length))
    companions = {name: FileRecord(len(content), 0) for name, content in contents.companions.items()}
    files += [(name, len(content)) for name, content in contents.companions.items()]
    if contents.single_file is not None:  # a second name of the first shard, which takes no space
        companions[contents.single_file] = FileRecord(files[0][1], 0)
    index = contents.index_for(names, records, parts, companions, durable=durable, supersedes=_lone_file(path))
    return [PlannedFile(name, length) for name, length in (*files, (INDEX_NAME, len(encode_index(index))))]


def reserved_bytes(contents: Contents, files: list[PlannedFile]) -> int:
    """The bytes that must be free before the first is written: whole blocks of each shard, and all other files."""
    shards = len(contents.all_shards)
    return sum(shard.reserved_bytes for shard in contents.all_shards) + sum(file.bytes for file in files[shards:])


def staging_bytes(contents: Contents) -> int:
    """The most staging memory that the engine takes for ``contents``; it takes less if there is less."""
    return engine.staging_bytes([piece for shard in contents.all_shards for piece in shard.pieces])


def free_bytes(path: str) -> int | None:
    """The free bytes of the file system that the directory ``path`` is or would be on; None if it does not know them.

    Raises SaveNotCommittedError if no directory can be there, or it cannot be opened.
    """
    try:
        existing, _ = missing_folders(path)
        with Directory() as folder:
            folder.open_for_writing(existing)
            return folder.free_bytes()
    except CallFailed as error:
        raise SaveNotCommittedError(f"cannot save to {path}: {error.words}; nothing was written") from error


def _names_in(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:  # it will be created, or the save will say what is wrong with it
        return []


def _lone_file(path: str) -> Superseded | None:
    """The file that the index would name as replaced."""
    with suppress(OSError):
        status = os.stat(os.path.join(path, LONE_NAME))
        return Superseded(status.st_size, status.st_mtime_ns)
    return None
