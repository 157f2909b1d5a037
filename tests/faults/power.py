"""A model of what a loss of power may leave on disk, for the calls that `faults.beneath` recorded.

Method: names are kept apart from contents. A file certainly has the content of its last fsync, a directory the names of its own last
fsync. Every later change (a name that was made, moved or removed, a write, a new size) may be on disk or not, independently of all
others, in any order; a write may be torn at 512 bytes. Real file systems keep more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Union

from faults.beneath import Recorded

SECTOR = 512

#: Path → the bytes of a file, or None for a directory.
Tree = dict[Path, Union[bytes, None]]

_numbers = count()


@dataclass(frozen=True)
class Change:
    """A change that is not durable yet: bytes at an offset, a new size, or the node of a name (None: the name was removed)."""

    data: bytes = b""
    at: int = 0
    size: int | None = None
    name: str = ""
    node: Node | None = None
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass
class File:
    durable: bytes = b""
    pending: list[Change] = field(default_factory=list)

    def content(self, changes: Sequence[Change], torn: random.Random | None = None) -> bytes:
        """The bytes if, of the pending changes, only ``changes`` reached the disk; with ``torn``, only parts of the writes."""
        content = bytearray(self.durable)
        for change in changes:
            if change.size is not None:
                del content[change.size :]
                content.extend(bytes(change.size - len(content)))
                continue
            for begin in range(0, len(change.data), SECTOR):
                if torn is None or torn.random() < 0.5:
                    part = change.data[begin : begin + SECTOR]
                    content.extend(bytes(max(0, change.at + begin + len(part) - len(content))))
                    content[change.at + begin : change.at + begin + len(part)] = part
        return bytes(content)

    def sync(self) -> None:
        self.durable = self.content(self.pending)
        self.pending = []


@dataclass
class Folder:
    durable: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def set(self, name: str, node: Node | None) -> None:
        self.pending.append(Change(name=name, node=node))
        if node is None:
            del self.now[name]
        else:
            self.now[name] = node

    def sync(self) -> None:
        self.durable = dict(self.now)
        self.pending = []


Node = Union[File, Folder]


class Disk:
    """A folder and everything in it: what is durable, and which changes are pending."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = Folder()

    def apply(self, call: Recorded) -> None:
        """Repeats ``call``. A failed call did nothing: a failed fsync made nothing durable."""
        if call.result < 0 or not call.path.is_relative_to(self._root):
            return
        match call.call:
            case "openat" if call.a & os.O_CREAT and self._find(call.path) is None:
                self._folder(call.path).set(call.path.name, File())
            case "mkdirat" | "mkdir":
                self._folder(call.path).set(call.path.name, Folder())
            case "unlinkat" | "unlink" | "rmdir":
                self._folder(call.path).set(call.path.name, None)
            case "renameat" | "rename":
                node = self._find(call.path)
                self._folder(call.other).set(call.other.name, node)
                self._folder(call.path).set(call.path.name, None)
            case "linkat" | "link":
                self._folder(call.other).set(call.other.name, self._find(call.path))
            case "ioctl":  # a clone: its bytes are on disk already, but nothing says that this file has them until it is synced
                self._file(call.path).pending.append(Change(data=call.data))
            case "pwrite" | "write":
                self._file(call.path).pending.append(Change(data=call.data, at=call.a))
            case "ftruncate":
                self._file(call.path).pending.append(Change(size=call.a))
            case "fallocate":
                file = self._file(call.path)
                if call.a > len(file.content(file.pending)):
                    file.pending.append(Change(size=call.a))
            case "fsync" | "fdatasync":
                node = self._find(call.path)
                assert node is not None, call
                node.sync()

    def after_power_loss(self, chance: random.Random, samples: int) -> Iterator[Tree]:
        """Trees that may be found: with no pending change, with all, with each one alone, with all but one, and ``samples`` at random."""
        changes = list(self._pending(self._top))
        everything = {change.number for change in changes}
        yield self._tree(set())
        yield self._tree(everything)
        for number in sorted(everything):
            yield self._tree({number})
            yield self._tree(everything - {number})
        for _ in range(samples if changes else 0):
            share = chance.random()
            yield self._tree({number for number in sorted(everything) if chance.random() < share}, torn=chance)

    def _tree(self, kept: set[int], torn: random.Random | None = None) -> Tree:
        tree: Tree = {}

        def walk(folder: Folder, path: Path) -> None:
            names = dict(folder.durable)
            for change in folder.pending:
                if change.number in kept:
                    names.pop(change.name, None)
                    if change.node is not None:
                        names[change.name] = change.node
            for name, node in names.items():
                if isinstance(node, Folder):
                    tree[path / name] = None
                    walk(node, path / name)
                else:
                    tree[path / name] = node.content([c for c in node.pending if c.number in kept], torn)

        walk(self._top, Path())
        return tree

    def _pending(self, folder: Folder) -> Iterator[Change]:
        """All pending changes, also those below names that may not be on disk."""
        yield from folder.pending
        below = {id(node): node for node in (*folder.durable.values(), *(c.node for c in folder.pending)) if node is not None}
        for node in below.values():
            yield from self._pending(node) if isinstance(node, Folder) else node.pending

    def _find(self, path: Path) -> Node | None:
        node: Node | None = self._top
        for part in path.relative_to(self._root).parts:
            node = node.now.get(part) if isinstance(node, Folder) else None
        return node

    def _folder(self, path: Path) -> Folder:
        folder = self._find(path.parent)
        assert isinstance(folder, Folder), path
        return folder

    def _file(self, path: Path) -> File:
        file = self._find(path)
        assert isinstance(file, File), path
        return file


#: The modification time of every file, in ns: the model does not record times.
MTIME = 1_700_000_000_000_000_000


def lay_out(tree: Tree, target: Path) -> None:
    """Makes ``tree`` under ``target``, every file with the modification time `MTIME`."""
    target.mkdir()
    for path, content in tree.items():
        if content is None:
            (target / path).mkdir()
        else:
            (target / path).write_bytes(content)
            os.utime(target / path, ns=(MTIME, MTIME))
