"""The final names of what a save stages: chosen so that none is taken in the directory, given to the staged files by the commit."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Set

from shardsave._format.file_names import directory_name, part_name, shard_names
from shardsave._storage.commit_errors import name_taken
from shardsave._storage.directory import Directory
from shardsave._storage.staging import Staging


class FinalNames:
    """The names of the shards and parts of one save in ``folder``, whose path is ``path``, and which of them are in ``staging``.

    ``chosen``: all of them. ``given``: those that files have, or may have, got.
    """

    def __init__(self, folder: Directory, staging: Staging, path: str) -> None:
        self.chosen: list[str] = []
        self.given: list[str] = []
        self._folder = folder
        self._staging = staging
        self._path = path
        self._staged: list[str] = []  # what the commit moves: files, and the directories of parts
        self._directories: set[str] = set()

    def choose_shards(self, count: int, taken: Set[str]) -> tuple[str, ...]:
        """Names for ``count`` shards; none is in ``taken``."""
        names = shard_names(count)
        while not taken.isdisjoint(names):
            names = shard_names(count, secrets.token_hex(4))
        self.chosen.extend(names)
        return names

    def choose_part(self, stem: str, extension: str, taken: Set[str]) -> str:
        """A new name for a part: a committed file is never replaced."""
        return self._choose(lambda tag: part_name(stem, tag, extension), taken)

    def choose_directory(self, stem: str, taken: Set[str]) -> str:
        """A new name for the directory of a part."""
        return self._choose(lambda tag: directory_name(stem, tag), taken)

    def _choose(self, tagged: Callable[[str], str], taken: Set[str]) -> str:
        name = tagged(secrets.token_hex(4))
        while name in taken or name in self.chosen:
            name = tagged(secrets.token_hex(4))
        self.chosen.append(name)
        return name

    def add(self, name: str) -> None:
        """Notes that the file ``name`` is staged. One of a part's directory (``directory/name``) is moved with that."""
        folder = os.path.dirname(name)
        assert folder in ("", *self._directories)
        if not folder:
            self._staged.append(name)

    def add_directory(self, name: str) -> None:
        """Notes that the directory ``name`` of a part is staged."""
        self._staged.append(name)
        self._directories.add(name)

    def drop(self, name: str) -> None:
        """Undoes `add`."""
        self._staged.remove(name)

    def give_all(self, state: str) -> None:
        """Gives all that is staged its final name. ``state``: that of the directory, for a message.

        Raises DirectoryBusyError if another program has made something of that name, and CallFailed.
        """
        for name in self._staged:
            self.given.append(name)
            self._give(name, state)

    def _give(self, name: str, state: str) -> None:
        """By link(2), which unlike rename(2) never replaces a file that another program created.

        The staged name is removed later, with its directory. Without links, and for a directory, rename(2) is used if the final name is
        free.
        """
        if name not in self._directories and self._staging.link(name):
            return
        inode = self._folder.inode_of(name)
        if inode is None:
            self._staging.rename(name, name)
        elif inode != self._staging.inode_of(name):  # the same inode: NFS may report EEXIST for a link that it has just made
            self.given.remove(name)
            raise name_taken(self._path, name, state)
