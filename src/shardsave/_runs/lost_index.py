"""Tells a checkpoint that has lost its index from a save that died before it had one: the latter has left a list of its files."""

from __future__ import annotations

from shardsave._common.os_calls import CallFailed
from shardsave._format.file_names import ADAPTER_WEIGHTS, DIRECTORY_PATTERN, OWN_PATTERN
from shardsave._storage.cleanup import final_names
from shardsave._storage.directory import Directory
from shardsave._storage.staging import lists_directory, owner_of, read_list


def files_without_index(folder: Directory) -> list[str]:
    """The files of a checkpoint in ``folder``, which has no index, that no staging directory names. Raises CallFailed.

    Files get their final names while their staging directory is there, and lose them before it goes.
    """
    names = folder.names()
    files = {name for name in names if _is_of_checkpoint(name)}
    for name in names:
        if files and owner_of(name) is not None:
            try:
                with folder.enter(name) as inside:
                    listed, contents = read_list(inside), inside.names()
            except CallFailed:
                return []  # nobody knows what it explains
            if lists_directory(listed):
                return []
            files -= final_names(listed, contents, frozenset())
    return sorted(files)


def _is_of_checkpoint(name: str) -> bool:
    return OWN_PATTERN.fullmatch(name) is not None or DIRECTORY_PATTERN.fullmatch(name) is not None or name == ADAPTER_WEIGHTS
