"""Refuses a directory with several checkpoints, unless the one that was saved last records that it replaced the other."""

from __future__ import annotations

import errno
import os

from shardsave._common.os_calls import CallFailed, call
from shardsave._common.words import some
from shardsave._format.file_names import INDEX_NAME, LONE_NAME
from shardsave._format.index import Index, Record
from shardsave._storage.find import FoundFiles, cannot_read, open_checkpoint_file
from shardsave._storage.rank_files import has_chunks
from shardsave.errors import IncompatibleCheckpointError


def refuse_several(files: FoundFiles, index: Index | None) -> None:
    """Raises IncompatibleCheckpointError if ``files`` belong to more than one checkpoint; ``index`` is that of one of them."""
    if index is not None and files.lone is not None:
        _refuse_unless_superseded(files.folder, index.record, files.lone)
    if index is not None or files.lone is not None:
        _refuse_beside_ranks(files, index)


def _refuse_unless_superseded(folder: str, record: Record | None, lone: str) -> None:
    """Raises IncompatibleCheckpointError for a lone file beside an index, unless the index records that it replaced this file."""
    path = os.path.join(folder, lone)
    try:
        status = call(os.stat, path, path)
    except CallFailed as error:
        if error.errno == errno.ENOENT:
            return  # the save that replaced it has just removed it
        raise cannot_read(path, error) from error
    superseded = record.supersedes if record is not None else None
    if superseded is not None and superseded == (status.st_size, status.st_mtime_ns):
        return
    raise IncompatibleCheckpointError(
        f"cannot tell which checkpoint is meant: {folder}: one of {INDEX_NAME} and {LONE_NAME} was expected, both are there, "
        f"and the index does not record that it replaced the file; give the path of the one to load, or remove the other"
    )


def _refuse_beside_ranks(files: FoundFiles, index: Index | None) -> None:
    """Raises IncompatibleCheckpointError if files of several ranks, which ``index`` does not name, lie beside another checkpoint."""
    named = frozenset(index.weight_map.values()) if index is not None else frozenset()
    for rank in files.ranks:
        if rank in named:
            continue
        path = os.path.join(files.folder, rank)
        try:
            file = open_checkpoint_file(path, f"shard {rank}")
            if file is None:
                continue  # a link to nothing, or the save that replaced it has just removed it
            with file:
                if not has_chunks(file.fd, rank):
                    continue
        except CallFailed as error:
            raise cannot_read(path, error) from error
        other = files.index_name if index is not None else files.lone
        raise IncompatibleCheckpointError(
            f"cannot tell which checkpoint is meant: {files.folder}: one of {other} and the files of several ranks ({some(files.ranks)}) "
            f"was expected, both are there; give the path of {other} to load it, or remove those that are not wanted"
        )
