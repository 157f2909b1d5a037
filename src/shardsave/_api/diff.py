"""`diff`: which tensors of two checkpoints are equal, and by how much the other tensors differ."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardsave._api.arguments import check_path, check_progress
from shardsave._api.operators import check_operators
from shardsave._api.reports import Printed
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import count, human_bytes, some
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._format.index import TRAINING
from shardsave._loading.compare import Difference, compare_stored, must_read
from shardsave._loading.selection import stored_names
from shardsave._storage.checkpoint import Checkpoint, Located
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave._storage.training import TrainingFiles
from shardsave._training.differences import differing_values

__all__ = ["DiffReport", "TensorChange", "TrainingDiff", "diff"]

Pair = tuple[Located, Located]


@dataclass(frozen=True)
class TensorChange:
    """The difference of a tensor that both checkpoints have. In each pair, the first value is for ``a`` and the second for ``b``.

    ``elements``: how many elements differ in value; 0 if only the dtype, the sign of a zero or the bits of a NaN changed.
    ``nans``: how many of these are NaN on one side only; the two maxima ignore them. ``max_absolute``: the largest |a - b|.
    ``max_relative``: the largest |a - b| / max(|a|, |b|), at most 2, or infinite if |a - b| is infinite. All four are None if the
    shapes differ.
    """

    dtype: tuple[torch.dtype, torch.dtype]
    shape: tuple[tuple[int, ...], tuple[int, ...]]
    elements: int | None
    nans: int | None
    max_absolute: float | None
    max_relative: float | None


@dataclass(frozen=True)
class TrainingDiff:
    """What differs between the training states of two checkpoints: its tensors, as in a `DiffReport`; and ``values``, the places of all
    else that does (options of an optimizer, a scheduler, generators of random numbers).
    """

    equal: tuple[str, ...]
    changed: Mapping[str, TensorChange]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.changed or self.added or self.removed or self.values)


@dataclass(frozen=True)
class DiffReport(Printed):
    """What differs between the checkpoints ``a`` and ``b``. A tied name counts like any other name.

    ``equal``: names with the same dtype, shape and bits. ``changed``: name → how it differs. ``added``: names only in ``b``.
    ``removed``: names only in ``a``. ``flags``: name → (frozen in ``a``, frozen in ``b``), for names in both whose flag differs (None:
    not a parameter); ``flags`` itself is None if one checkpoint does not record flags. ``ties``: name → (the name whose bytes it
    shares in ``a``, the same in ``b``), for names in both that share bytes with different names in ``a`` and in ``b`` (None: it has
    bytes of its own); empty if a third-party file records no ties. ``metadata``: key → (value in ``a``, value in ``b``), for values
    that differ (None: no such key); empty if a third party wrote one of the two. ``bytes``: how many bytes of tensor data were read
    to compare. ``seconds``: wall time of the whole call. ``training``: what differs between their training states; None if one has
    none. ``only_training``: which of them has one, "a" or "b", if the other has none. ``shared``: the shards of ``b`` that are the same
    files as shards of ``a`` (hard links): nothing in them was read.
    """

    a: str
    b: str
    equal: tuple[str, ...]
    changed: Mapping[str, TensorChange]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    flags: Mapping[str, tuple[bool | None, bool | None]] | None
    ties: Mapping[str, tuple[str | None, str | None]]
    metadata: Mapping[str, tuple[Any, Any]]
    bytes: int
    seconds: float
    training: TrainingDiff | None = None
    only_training: str | None = None
    shared: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs, as far as the files record it. Metadata do not count: they are not part of a model."""
        is_same_training = self.only_training is None and (self.training is None or self.training.same)
        return is_same_training and not (self.changed or self.added or self.removed or self.flags or self.ties)

    def _lines(self) -> Iterator[str]:
        parts = [f"{len(self.equal)} equal"]
        parts += _counted(self)
        if self.flags is None:
            parts.append("freeze flags unknown")
        else:
            parts.append(f"{len(self.flags)} frozen or thawed" + (f" ({some(self.flags)})" if self.flags else ""))
        if self.ties:
            parts.append(f"{len(self.ties)} tied differently ({some(self.ties)})")
        if self.metadata:
            parts.append(f"metadata differ ({some(self.metadata)})")
        if self.training is not None:
            words = ", ".join([f"{len(self.training.equal)} equal", *_counted(self.training)])
            values = self.training.values
            more = f", {count(len(values), 'other value')} changed ({some(values)})" if values else ""
            parts.append(f"training state: {words}{more}")
        if self.only_training is not None:
            parts.append(f"only {self.a if self.only_training == 'a' else self.b} has a training state")
        if self.shared:
            parts.append(f"{count(len(self.shared), 'shard')} in both")
        yield f"{self.a} and {self.b}: {', '.join(parts)}; {human_bytes(self.bytes)} read, {self.seconds:.2f} s"


def _counted(difference: DiffReport | TrainingDiff) -> list[str]:
    named = (("changed", difference.changed), ("added", difference.added), ("removed", difference.removed))
    return [f"{len(names)} {word}" + (f" ({some(names)})" if names else "") for word, names in named]


@uncompiled
@verb()
def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: ProgressArgument = None) -> DiffReport:
    """Compares two checkpoints by name, each a directory, an index or one safetensors file, whoever wrote it.

    Tensors with equal checksums are equal, and are not read. Other tensors of equal shape are read, a few megabytes at a time, to learn
    whether they are equal and by how much they differ; what is read is verified against its checksum.

    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError.

    Never collective: a rank that calls it waits for no other.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.ones(2), "y": torch.zeros(3)}, "before")
        >>> report = shardsave.save({"x": torch.ones(2), "y": torch.tensor([0.0, 0.5, 0.0])}, "after")
        >>> report = shardsave.diff("before", "after")
        >>> report.equal, report.changed["y"].max_absolute
        (('x',), 0.5)
    """
    for path in (a, b):
        check_path(path)
        check_operators("compare", path, "nothing was read")
    check_progress(progress)
    started = time.perf_counter()
    with open_checkpoint(a, parts=[TRAINING]) as left, open_checkpoint(b, parts=[TRAINING]) as right:
        left_names, right_names = stored_names(left), stored_names(right)
        pairs = {
            name: (left.tensors[left_names[name]], right.tensors[right_names[name]])
            for name in left_names
            if name in right_names
        }
        old, new = left.training, right.training
        training_pairs = _training_pairs(old, new) if old is not None and new is not None else {}
        to_read = {pair for pair in (*pairs.values(), *training_pairs.values()) if must_read(*pair)}
        total = sum(x.nbytes + y.nbytes for x, y in to_read)
        with Progress(progress, "comparing", total) as reporter:
            differences = _compare_pairs(left, right, to_read, reporter)
        inodes = {left.inode_of(shard) for shard in left.shards}
        shared = tuple(shard for shard in right.shards if right.inode_of(shard) in inodes)
    equal, changed = _compared(pairs, differences)
    has_training = [name for name, training in (("a", old), ("b", new)) if training is not None]
    return DiffReport(
        a=os.fspath(a),
        b=os.fspath(b),
        equal=equal,
        changed=changed,
        added=tuple(name for name in right_names if name not in left_names),
        removed=tuple(name for name in left_names if name not in right_names),
        flags=_changed_flags(left.stored_flags, right.stored_flags, pairs),
        ties=_changed_ties(left, right, pairs),
        metadata=_changed_metadata(left, right),
        bytes=total,
        seconds=time.perf_counter() - started,
        training=_training_diff(old, new, training_pairs, differences) if old is not None and new is not None else None,
        only_training=has_training[0] if len(has_training) == 1 else None,
        shared=shared,
    )


def _training_pairs(left: TrainingFiles, right: TrainingFiles) -> dict[str, Pair]:
    return {name: (x, right.tensors[name]) for name, x in left.tensors.items() if name in right.tensors}


def _training_diff(
    left: TrainingFiles, right: TrainingFiles, pairs: Mapping[str, Pair], differences: Mapping[Pair, Difference | None]
) -> TrainingDiff:
    equal, changed = _compared(pairs, differences)
    return TrainingDiff(
        equal=equal,
        changed=changed,
        added=tuple(name for name in right.tensors if name not in pairs),
        removed=tuple(name for name in left.tensors if name not in pairs),
        values=differing_values(left.values(), right.values()),
    )


def _compared(
    pairs: Mapping[str, Pair], differences: Mapping[Pair, Difference | None]
) -> tuple[tuple[str, ...], dict[str, TensorChange]]:
    """The names of ``pairs`` that are equal, and how the others differ."""
    changes = {name: _change(pair, differences) for name, pair in pairs.items()}
    changed = {name: change for name, change in changes.items() if change is not None}
    return tuple(name for name in pairs if name not in changed), changed


def _compare_pairs(
    left: Checkpoint, right: Checkpoint, pairs: Iterable[Pair], reporter: Progress
) -> dict[Pair, Difference | None]:
    """Reads and compares ``pairs``, in the order of the left tensors on disk. None: the two tensors are equal."""
    differences: dict[Pair, Difference | None] = {}
    for x, y in sorted(pairs, key=lambda pair: (pair[0].shard, pair[0].offset)):
        differences[x, y] = compare_stored((left, x), (right, y), reporter.tick)
        reporter.run_ended(x.nbytes + y.nbytes)
    return differences


def _change(pair: Pair, differences: Mapping[Pair, Difference | None]) -> TensorChange | None:
    """How the tensors of ``pair`` differ, None if they are equal. ``differences``: the results for the pairs that were read."""
    x, y = pair
    if pair in differences:
        difference = differences[pair]
        if difference is None:
            return None
    else:
        if (x.dtype, x.shape) == (y.dtype, y.shape):
            return None
        difference = Difference() if x.shape == y.shape else None
    return TensorChange(
        dtype=(BY_NAME[x.dtype].torch, BY_NAME[y.dtype].torch),
        shape=(torch_shape(x.dtype, x.shape), torch_shape(y.dtype, y.shape)),
        elements=difference.elements if difference is not None else None,
        nans=difference.nans if difference is not None else None,
        max_absolute=difference.max_absolute if difference is not None else None,
        max_relative=difference.max_relative if difference is not None else None,
    )


def _changed_flags(
    left: Mapping[str, bool] | None, right: Mapping[str, bool] | None, names: Iterable[str]
) -> dict[str, tuple[bool | None, bool | None]] | None:
    if left is None or right is None:
        return None
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def _changed_ties(left: Checkpoint, right: Checkpoint, names: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
    """Those of ``names`` that share bytes with different names in the two checkpoints, whichever name of a group has the bytes."""
    before, after = left.ties, right.ties
    if before == after or not all(side.record is not None or side.ties for side in (left, right)):
        return {}
    groups: list[dict[str, set[str]]] = [{}, {}]
    for name in names:
        for group, ties in zip(groups, (before, after)):
            group.setdefault(ties.get(name, name), set()).add(name)
    pairs = ((name, before.get(name), after.get(name)) for name in names)
    return {name: (old, new) for name, old, new in pairs if old != new and groups[0][old or name] != groups[1][new or name]}


def _changed_metadata(left: Checkpoint, right: Checkpoint) -> dict[str, tuple[Any, Any]]:
    if left.record is None or right.record is None:
        return {}
    keys = {**left.metadata, **right.metadata}
    values = ((key, left.metadata.get(key), right.metadata.get(key)) for key in keys)
    return {key: (before, after) for key, before, after in values if before != after}
