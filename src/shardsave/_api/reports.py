"""The reports of a save and a load: frozen values that print as one readable line.

Fields are values, so names and paths in them are as they are in the file. What is printed, and sentences such as notes, are escaped for
a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shardsave._api.arguments import check_timeout
from shardsave._common.log_records import log_record
from shardsave._common.phases import Phases
from shardsave._common.words import build_arguments, count, human_bytes, some
from shardsave._printable import printable
from shardsave._storage.freeing import wait_until_freed

__all__ = ["LoadReport", "Phases", "Report", "SaveReport"]

VERIFIED = {True: "checksums verified", False: "not verified", None: "no checksums stored"}


class Printed:
    """Prints as its `_lines`, each escaped by itself: a line feed in a name starts no line."""

    def _lines(self) -> Iterator[str]:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(printable, self._lines()))


@dataclass(frozen=True)
class Report(Printed):
    """The fields that all reports have.

    ``bytes``: how many bytes of tensor data. ``tensors``: the number of stored tensors; a tied group counts once.
    ``seconds``: wall time of the whole call. ``staging_bytes``: the most staging memory held at one time. ``direct``: whether every
    file was transferred without the page cache.
    """

    path: str
    bytes: int
    tensors: int
    shards: int
    seconds: float
    phases: Phases
    engine: str
    direct: bool
    staging_bytes: int
    pinned: bool
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    @property
    def bytes_per_second(self) -> float:
        """Bytes of tensor data per second of the whole call, wall time."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0

    def _size(self) -> str:
        return human_bytes(self.bytes)

    def _size_and_speed(self) -> str:
        return (
            f"{self._size()}, {count(self.tensors, 'tensor')} in {count(self.shards, 'shard')}, "
            f"{self.seconds:.2f} s ({human_bytes(self.bytes_per_second)}/s)"
        )

    def _engine_and_access(self) -> str:
        words = [self.engine, "direct" if self.direct else "buffered"]
        if self.pinned:
            words.append("pinned")
        return ", ".join(words)

    def _with_notes(self, line: str, *more: str) -> str:
        return "; ".join([line, *more, *self.notes])


class Removing:
    """The report of a call that removes files."""

    def wait_cleaned(self, timeout: float | None = None) -> bool:
        """Waits until the disk space of all files that calls of this process have removed is free. Returns whether it is.

        The names of removed files are gone when a save or a conversion returns; a thread frees their space, because that takes longer the
        larger they are. A next save waits for it, and the end of the process frees it, so this is only needed where other programs rely on
        the space at once. A file that a reader still has open, in this process or another, keeps its space until the reader closes it;
        that is not waited for.

        Args:
            timeout: the most seconds to wait; None waits without limit. In another process than the saver's, nothing is waited for.

        Raises:
            TypeError, ValueError: for a wrong timeout.
        """
        if timeout is not None:
            check_timeout(timeout, "timeout")
        return wait_until_freed(timeout)


@dataclass(frozen=True)
class SaveReport(Removing, Report):
    """What a save did.

    ``durable``: whether the checkpoint would survive a loss of power now. ``removed``: names of all files that the save removed, or
    replaced by others of the same name, and that it did not make itself: those of the replaced checkpoint (of the index only if
    shardsave did not write it), and what killed saves had left. ``leftovers``: files that should have been removed and could not be.
    ``overlaps``: pairs of tensors that share a part of their memory and were stored separately.
    ``trust``, ``script_classes``: what `build_model` needs to build a saved architecture: the entries of its ``trust``, and the names
    of classes of a script, which it needs in ``classes``. ``cast``: how many tensors were cast to another dtype. ``left_out``: the names
    that ``only="trainable"`` did not save. ``training_bytes``: the length of all files of the training state; 0 without one.
    ``reused``: the shards that were taken over from an earlier checkpoint instead of being written; ``bytes_reused``: of the tensors in
    them; ``bytes_written``: of all other tensors, those of the training state and of other parts included.

    ``staging``: how `save_async` took the tensors: "snapshot", "ring" or "blocking"; "" for a blocking save. ``staging_reason``: why.
    ``stall_seconds``: how long the call stopped its caller; of this, ``queue_seconds`` were for an earlier save in the background.
    ``step_wait_seconds``: how long steps of optimizers waited until their parameters were taken. ``drain_seconds``: from the call until
    all tensors were taken. ``durable_seconds``: from the call until the checkpoint was committed and, unless ``durable=False``, durable.
    In these reports ``seconds`` is the time for planning and writing. ``skipped``: nothing was saved, since another save was in flight.
    ``step``: the argument of the save. ``ranks``: how many processes saved together. Each has the same report, but for ``seconds`` and
    ``phases``, which are its own.
    """

    durable: bool = True
    leftovers: tuple[str, ...] = ()
    overlaps: tuple[tuple[str, str], ...] = ()
    removed: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    script_classes: tuple[str, ...] = ()
    cast: int = 0
    left_out: tuple[str, ...] = ()
    training_bytes: int = 0
    bytes_written: int = 0
    bytes_reused: int = 0
    reused: tuple[str, ...] = ()

    staging: str = ""
    staging_reason: str = ""
    stall_seconds: float = 0.0
    queue_seconds: float = 0.0
    step_wait_seconds: float = 0.0
    drain_seconds: float = 0.0
    durable_seconds: float = 0.0
    skipped: bool = False
    step: int | None = None
    ranks: int = 1

    @property
    def bytes_per_second(self) -> float:
        """Bytes of tensor data that were written, those of the training state included, per second of the whole call, wall time."""
        return self.bytes_written / self.seconds if self.seconds > 0 else 0.0

    def _size(self) -> str:
        training = f" and {human_bytes(self.training_bytes)} of training state" if self.training_bytes else ""
        return f"{super()._size()}{training}"

    def _lines(self) -> Iterator[str]:
        if self.skipped:
            yield self._with_notes(f"skipped saving {self.path}: another save was in flight")
            return
        more = [f"by {self.ranks} ranks"] if self.ranks > 1 else []
        if self.staging:
            more.append(self._staging())
        if self.reused:
            unchanged = f"{human_bytes(self.bytes_reused)} in {count(len(self.reused), 'unchanged shard')}"
            more.append(f"{human_bytes(self.bytes_written)} written, {unchanged} taken over from disk")
        if self.cast:
            more.append(f"{count(self.cast, 'tensor')} cast")
        if self.left_out:
            more.append(f"{count(len(self.left_out), 'name')} left out")
        if self.removed:
            more.append(f"removed or replaced {some(self.removed)}")
        if self.leftovers:
            more.append(f"could not remove {', '.join(self.leftovers)}")
        if self.overlaps:
            more.append(f"overlapping but stored separately: {some(f'{a} and {b}' for a, b in self.overlaps)}")
        if self.trust or self.script_classes:
            more.append(f"build with {build_arguments(self.trust, self.script_classes)}")
        how = f"{self._engine_and_access()}, {'durable' if self.durable else 'not durable'}"
        yield self._with_notes(f"saved {self.path}: {self._size_and_speed()}, {how}", *more)

    def _staging(self) -> str:
        """How a save in the background took the tensors, and how long that and the rest lasted."""
        why = f" ({self.staging_reason})" if self.staging_reason else ""
        queue = f" ({self.queue_seconds:.3f} s for an earlier save)" if self.queue_seconds >= 0.001 else ""
        times = f"stall {self.stall_seconds:.3f} s{queue}, steps waited {self.step_wait_seconds:.3f} s"
        end = "durable" if self.durable else "committed"
        return (
            f"{self.staging}{why}: {times}, drained after {self.drain_seconds:.3f} s, {end} after {self.durable_seconds:.3f} s"
        )


@dataclass(frozen=True)
class Deletion(Printed):
    """For the log: which files a call removed or replaced in the directory ``path``, and which it could not remove."""

    path: str
    removed: tuple[str, ...]
    leftovers: tuple[str, ...] = ()

    def _lines(self) -> Iterator[str]:
        parts = [f"removed or replaced {some(self.removed)}"] if self.removed else []
        parts += [f"could not remove {some(self.leftovers)}"] if self.leftovers else []
        yield f"{self.path}: {'; '.join(parts)}"


def log_deletion(path: str, removed: tuple[str, ...], leftovers: tuple[str, ...] = ()) -> None:
    """Logs what was removed behind a call, if anything was."""
    if removed or leftovers:
        log_record("delete", Deletion(path, removed, leftovers), matters=bool(leftovers))


@dataclass(frozen=True)
class LoadReport(Report):
    """What a load into a module did.

    ``verified``: whether every byte was checked against a stored checksum; None if the files have no checksums. ``missing``: names
    in the module that are not in the checkpoint; ``unexpected``: names in the checkpoint that are not in the module;
    ``mismatched``: names in both whose shapes differ, and which were not loaded. All three are empty after a strict load.
    ``frozen``: how many parameters were set to ``requires_grad=False``; None if flags were not restored. ``changed_flags``: how
    many parameters had another flag before.

    ``ranks``: how many ranks have loaded together. ``bytes`` is then what all of them have read, from so many ``shards``; ``rank_bytes``
    what this one has, and ``tensors`` the number of those of which it has received something.
    """

    verified: bool | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    frozen: int | None = None
    changed_flags: int = 0
    ranks: int = 1
    rank_bytes: int = 0

    def _lines(self) -> Iterator[str]:
        differences = (
            ("missing from the checkpoint", self.missing),
            ("not in the module", self.unexpected),
            ("mismatched", self.mismatched),
        )
        more = [f"{words}: {some(names)}" for words, names in differences if names]
        if self.tensors == 0:
            line = f"nothing was loaded from {self.path}"
            yield self._with_notes(f"{line}: {more[0]}" if more else line, *more[1:])
            return
        changed = f" ({count(self.changed_flags, 'flag')} changed)" if self.changed_flags else ""
        flags = "flags left alone" if self.frozen is None else f"{self.frozen} frozen{changed}"
        checked = VERIFIED[self.verified]
        into = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        yield self._with_notes(
            f"loaded {self.path}{into}: {self._size_and_speed()}, {self._engine_and_access()}, {checked}, {flags}", *more
        )
