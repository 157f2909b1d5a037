"""What a save may delete: every removal from a checkpoint's directory is in this file.

1. Its own staging directory; if nothing was committed, also the final names that it has given to its files.
2. The staging directories of dead savers of this host, and the final names in their lists.
3. After the commit, the files that the replaced index names: shards, architecture, program, extra tensors, and the directory of its
   training state with those files in it that a save can have made.
4. After the commit, the lone file and the adapter that it replaced, unless they have changed since.
5. After the commit, the files of several ranks that lay there before it, unless they have changed since: they have torch's name for
   such a file, and say in their header which chunks they hold. Readers would take them for a second checkpoint.
6. When a whole checkpoint is removed: the files that its index names; companions only unless they have changed since.

Nothing else, ever. Final names are removed only if a save can have given them (`OWN_PATTERN`, `DIRECTORY_PATTERN` or a companion's
name), if they are regular files (directories, if a save gives the name to one) or symbolic links, and if the current index does not
name them. Of a symbolic link only the link is removed, never what it leads to. A directory is removed once it is empty: what no save can
have made in it stays, and is named. In a shared directory, nothing is removed that belongs to another user, and nothing is removed
because another user's index or list names it (`LockedDirectory.obeys`). Replaced files are removed only once the new index is certain
to stay: with ``durable``, once it is durable. Every file that is removed, and that this save did not make, is named in its report.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec

from shardsave._common.os_calls import CallFailed, call
from shardsave._format.file_names import ADAPTER_CONFIG, DIRECTORY_PATTERN, LONE_NAME, OWN_PATTERN, is_in_directory
from shardsave._format.index import FileRecord, Index, Superseded
from shardsave._storage.companions import ADAPTER_FILES, ADAPTER_NAMES, COMPANION_NAMES, file_record
from shardsave._storage.directory import Directory
from shardsave._storage.freeing import RemovedFiles
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.previous import Previous, companions_of, files_of
from shardsave._storage.sizes import bytes_visible
from shardsave._storage.staging import LIST_NAME, NEW_INDEX_NAME, NONCE_NAME, lists_directory, owner_of, read_list

_P = ParamSpec("_P")


class Cleaner:
    """Removes files from ``folder``, and keeps account of them.

    ``removed``: the names of removed files that this save did not make; ``links``: which of them were symbolic links. ``leftovers``:
    names that could not be removed. ``strangers``: what stays because it belongs to another user, with its bytes on disk.
    ``doubtful``: what stays although it is ours, because others may have changed it, or the index that names it; with its bytes, too.
    ``foreign``: staging directories that stay because their savers may be alive, on other hosts. ``lone_stays``: whether the replaced
    lone file is still there, which other libraries prefer to an index. ``ranks_stay``: the replaced files of several ranks that are still
    there. ``adapter_stays``: the files of another tool's adapter, which other libraries add to the weights.

    ``to_free``: takes the removed files, whose space the caller frees; without it, their space is free when a method returns.
    """

    def __init__(self, folder: LockedDirectory, own_staging: str = "", to_free: RemovedFiles | None = None) -> None:
        self.removed: dict[str, None] = {}
        self.links: list[str] = []
        self.leftovers: dict[str, None] = {}
        self.strangers: dict[str, int] = {}
        self.doubtful: dict[str, int] = {}
        self.foreign: list[str] = []
        self.lone_stays = False
        self.ranks_stay: list[str] = []
        self.adapter_stays: list[str] = []
        self._folder = folder
        self._own_staging = own_staging
        self._to_free = to_free
        self._failures = 0  # removals that failed, so that a later save must try again

    @property
    def failed(self) -> bool:
        """Whether something could not be removed, so that it must be tried again."""
        return self._failures > 0

    def after_commit(self, previous: Previous, new: Index) -> None:
        """Removes what the new index does not need; ``new`` was just committed in place of ``previous``.

        If the replaced index cannot be read, no file is removed that it may name: nobody knows what these files are.
        """
        named = files_of(new)
        if previous.has_lone and LONE_NAME not in named:
            self.remove_lone(new)
            self._attempt(LONE_NAME, self._look_at_lone)
        for name in sorted(previous.ranks.keys() - named):
            if not previous.unreadable:
                self._attempt(name, self._remove_rank, name, previous.ranks[name])
            self._attempt(name, self._look_at_rank, name)
        if not previous.unreadable:
            self._remove_replaced_adapter(previous.companions, companions_of(new))
        if ADAPTER_CONFIG not in companions_of(new):
            self._attempt(ADAPTER_CONFIG, self._look_at_adapter)
        self.remove_dead_staging(named, spare=bool(previous.unreadable))
        for name in sorted(files_of(previous.not_ours) - named):
            self._attempt(name, self._note_stays, name)
        self.remove_staging(self._own_staging, named, finals=previous.files)

    def remove_dead_staging(self, named: frozenset[str], *, spare: bool = False) -> None:
        """Removes what dead savers of this host left, unless it is to be spared; notes what has to stay.

        ``named``: the files of an index that is certain to stay.
        """
        for name in sorted(self._names_in(self._folder)):
            if name != self._own_staging and owner_of(name) is not None:
                self._attempt(name, self._judge_staging, name, named, spare)

    def _judge_staging(self, name: str, named: frozenset[str], spare: bool) -> None:
        if self._folder.knows_dead(name):
            if not spare:
                self.remove_staging(name, named)
        elif self._folder.obeys(name):
            self.foreign.append(name)
        else:
            self._note_stays(name)

    def remove_staging(self, staging: str, named: frozenset[str], *, finals: Iterable[str] | None = None) -> None:
        """Removes a staging directory and the final names of its files, except the files that an index names (``named``).

        ``finals``: the final names; without it, those in the directory's own list. The list is removed last, and only once the final
        names are certain to be gone, so that the next save can finish an interrupted removal.
        """
        failures = self._failures
        with Directory(staging, durable=self._folder.durable) as inside:
            try:
                inside.open_in(self._folder)
                listed = set(read_list(inside) if finals is None else finals) - named
                if finals is None and lists_directory(
                    listed
                ):  # a later version made it, and cleans it whole as long as its list is there
                    return self._fail(staging)
            except CallFailed as error:
                if error.errno == errno.EACCES:  # created under a umask that denies even its owner; it is empty
                    self._attempt(staging, self._folder.rmdir, staging)
                elif error.errno != errno.ENOENT:
                    self._fail(staging)
                return
            contents = self._names_in(inside)
            doomed = final_names(listed, contents, named)
            # A list is proof enough; a companion, and a name given by this save, must be the file that was staged.
            compared = contents if finals is not None else COMPANION_NAMES.intersection(contents)
            for name in sorted(doomed):
                self._attempt(name, self._remove_final, name, inside if name in compared else None)
            if doomed:
                self._attempt(staging, self._folder.sync)
            if self._failures > failures:
                return self._fail(staging)
            for name in sorted(filter(is_staged, contents), key=LIST_NAME.__eq__):  # the list comes last
                self._attempt(f"{staging}/{name}", self._remove_staged, inside, name)
        self._attempt(staging, self._folder.rmdir, staging)

    def _remove_final(self, name: str, inside: Directory | None) -> None:
        status = status_of_final(self._folder, name, inside)
        if status is not None:
            self._remove(name, status)

    def _remove_staged(self, inside: Directory, name: str) -> None:
        status = inside.status_of(name) if DIRECTORY_PATTERN.fullmatch(name) else None
        if status is not None and stat.S_ISDIR(status.st_mode):
            return self._remove_directory(inside, name, status)
        if inside.name == self._own_staging:
            return inside.unlink(name)
        self._unlink(inside, name)
        self.removed[f"{inside.name}/{name}"] = None

    def _remove_directory(self, parent: Directory, name: str, examined: os.stat_result) -> None:
        """Removes the directory ``name`` of a part, with the files in it that a save can have made. All else in it stays, and is named."""
        path = f"{parent.name}/{name}".lstrip("/")
        with parent.enter(name) as inside:
            if not os.path.samestat(examined, call(os.fstat, name, inside.fd)):
                self.leftovers[path] = None  # someone else has just put it there
                return
            statuses = {file: inside.status_of(file) for file in sorted(inside.names())}
            stays = [file for file, status in statuses.items() if status is not None and not self._is_ours_in(file, status)]
            for file in [file for file in statuses if file not in stays]:
                self._attempt(f"{path}/{file}", self._remove_inside, inside, file, f"{path}/{file}")
        self.leftovers.update((f"{path}/{file}", None) for file in stays)
        if not stays:
            parent.rmdir(name)

    def _remove_inside(self, inside: Directory, name: str, path: str) -> None:
        self._unlink(inside, name)
        if not self._own_staging or not path.startswith(f"{self._own_staging}/"):
            self.removed[path] = None

    def _is_ours_in(self, name: str, status: os.stat_result) -> bool:
        """Whether ``name``, in the directory of a part, is a file that a save of this user can have made there, or a link in its place."""
        is_file = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
        return is_file and is_in_directory(name) and self._folder.is_ours(status)

    def remove_files_of(self, removed: Index, named: frozenset[str]) -> None:
        """Removes the files of a checkpoint whose index ``removed`` is not in place any more.

        ``named``: the files of the index that is in place, if there is one. A companion that has changed since it was saved stays.
        """
        for name in sorted(final_names(files_of(removed), (), named)):
            self._attempt(name, self._remove_final, name, None)
        companions = companions_of(removed)
        for name in sorted((COMPANION_NAMES & companions.keys()) - named):
            self._attempt(name, self._remove_unchanged, name, companions[name])

    def remove_lone(self, index: Index) -> None:
        """Removes the lone file that ``index`` says it replaced, and a symbolic link of that name to nothing."""
        superseded = index.record.supersedes if index.record is not None else None
        self._attempt(LONE_NAME, self._remove_superseded, superseded)

    def _remove_superseded(self, superseded: Superseded | None) -> None:
        status = self._folder.status_of(LONE_NAME)
        if status is not None and is_superseded(self._folder, status, superseded):
            self._remove(LONE_NAME, status)

    def _look_at_lone(self) -> None:
        status = self._folder.target_of(LONE_NAME)
        self.lone_stays = status is not None and stat.S_ISREG(status.st_mode)

    def _remove_rank(self, name: str, saved: Superseded | None) -> None:
        status, file = self._folder.status_of(name), self._folder.target_of(name)
        if status is not None and file is not None and (file.st_size, file.st_mtime_ns) == saved:
            self._remove(name, status)

    def _look_at_rank(self, name: str) -> None:
        if self._folder.status_of(name) is not None:
            self.ranks_stay.append(name)

    def _look_at_adapter(self) -> None:
        names = [name for name in ADAPTER_FILES if self._folder.inode_of(name) is not None]  # also of a symbolic link
        self.adapter_stays = names if ADAPTER_CONFIG in names else []  # nobody looks for the others without it

    def _remove_replaced_adapter(self, old: Mapping[str, FileRecord], new: Mapping[str, FileRecord]) -> None:
        """Removes adapter files among the replaced companions ``old`` that are not in ``new``, unless they changed since they were saved.

        Other libraries would otherwise find that adapter and apply it to the new weights.
        """
        for name in sorted(ADAPTER_NAMES & (old.keys() - new.keys())):
            self._attempt(name, self._remove_unchanged, name, old[name])

    def _remove_unchanged(self, name: str, saved: FileRecord) -> None:
        status = self._folder.status_of(name)
        if status is not None and file_record(self._folder, name) == saved:
            self._remove(name, status)

    def _remove(self, name: str, status: os.stat_result) -> None:
        """Removes the file or symbolic link ``name``, unless it belongs to another user of a shared directory."""
        if not self._folder.is_ours(status):
            return self._note_stays(name)
        if stat.S_ISDIR(status.st_mode):
            return self._remove_directory(self._folder, name, status)
        self._unlink(self._folder, name)
        self.removed[name] = None
        if stat.S_ISLNK(status.st_mode):
            self.links.append(name)

    def _unlink(self, folder: Directory, name: str) -> None:
        if self._to_free is not None:
            self._to_free.unlink(folder, name)
        else:
            folder.unlink(name)

    def _note_stays(self, name: str) -> None:
        status = self._folder.status_of(name)
        if status is not None:
            group = self.doubtful if self._folder.is_ours(status) else self.strangers
            group[name] = bytes_visible(self._folder, name)

    def _names_in(self, folder: Directory) -> list[str]:
        try:
            return folder.names()
        except CallFailed:
            self._fail("(the directory could not be listed)")
            return []

    def _fail(self, name: str) -> None:
        self._failures += 1
        self.leftovers[name] = None

    def _attempt(self, name: str, action: Callable[_P, None], *arguments: _P.args, **options: _P.kwargs) -> None:
        """Runs ``action``. Notes ``name`` as a leftover if it failed, unless the file was gone already."""
        try:
            action(*arguments, **options)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                self._fail(name)


def final_names(listed: Iterable[str], contents: Iterable[str], named: frozenset[str]) -> set[str]:
    """The names outside of a staging directory that are removed with it, if their files are those that were staged.

    ``listed``: the final names in its list. ``contents``: the names in it. ``named``: the names that an index needs.
    """
    own = (name for name in listed if OWN_PATTERN.fullmatch(name) or DIRECTORY_PATTERN.fullmatch(name))
    return {*own, *COMPANION_NAMES.intersection(contents)} - named


def status_of_final(folder: Directory, name: str, inside: Directory | None) -> os.stat_result | None:
    """The status of the final name ``name`` if it may be removed: it is a regular file, the directory of a part, or a symbolic link.

    ``inside``: the staging directory, if the file in it must be the same one.
    """
    status = folder.status_of(name)
    is_expected = stat.S_ISDIR if DIRECTORY_PATTERN.fullmatch(name) else stat.S_ISREG
    if status is None or not (is_expected(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        return None
    if inside is not None and inside.inode_of(name) != (status.st_dev, status.st_ino):
        return None  # someone else made it
    return status


def is_staged(name: str) -> bool:
    """Whether a saver gives this name to a file in its staging directory."""
    patterns = (OWN_PATTERN, DIRECTORY_PATTERN)
    return (
        any(p.fullmatch(name) for p in patterns) or name in COMPANION_NAMES or name in (LIST_NAME, NEW_INDEX_NAME, NONCE_NAME)
    )


def is_superseded(folder: Directory, lone: os.stat_result, superseded: Superseded | None) -> bool:
    """Whether the file with the status ``lone`` is the lone file that was replaced, a link to it, or a link to nothing."""
    if stat.S_ISLNK(lone.st_mode):
        target = folder.target_of(LONE_NAME)
        return target is None or (target.st_size, target.st_mtime_ns) == superseded
    return stat.S_ISREG(lone.st_mode) and (lone.st_size, lone.st_mtime_ns) == superseded
