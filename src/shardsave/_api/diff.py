"""`diff`: which tensors of two checkpoints are equal, by their checksums, and how far the others are apart."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shardsave._api.arguments import check_path, check_progress
from shardsave._common.os_calls import CallFailed, read_at
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.words import human_bytes, some
from shardsave._format.crc64 import crc64, finish, shift
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.compare import Difference, compare
from shardsave._storage.checkpoint import Checkpoint, Located, open_checkpoint
from shardsave._storage.find import cannot_read
from shardsave.errors import CorruptCheckpointError

__all__ = ["DiffReport", "TensorChange", "diff"]

#: How many elements of each side are in memory at a time; an even number, since F4 has two to a byte.
_PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class TensorChange:
    """How the tensor of one name differs; of each pair the first is of ``a``, the second of ``b``.

    ``elements``: how many have another value, of as many as ``shape`` has; none where only bits changed that make no other value
    (the sign of a zero, the kind of a NaN, the dtype). ``nans``: how many of them are NaN on one side only; the largest
    differences are those of the others. ``max_absolute``: of |a - b|. ``max_relative``: of |a - b| / max(|a|, |b|), at most 2,
    or infinite where an infinity has come or gone. All four are None where the shapes differ.
    """

    dtype: tuple[torch.dtype, torch.dtype]
    shape: tuple[tuple[int, ...], tuple[int, ...]]
    elements: int | None
    nans: int | None
    max_absolute: float | None
    max_relative: float | None


@dataclass(frozen=True)
class DiffReport:
    """What differs between the checkpoints ``a`` and ``b``.

    ``equal``: names with the same dtype, shape and bits. ``changed``: how those of both differ. ``added``: names of ``b`` alone,
    ``removed``: of ``a`` alone. ``flags``: of names of both, whether frozen in ``a`` and in ``b`` where that is not the same
    (None: no parameter); the whole is None where one of the two does not know its flags. A tied name counts like any other,
    and has the bytes that it shares. ``ties``: of names of both that are tied to others than before, the name whose bytes each shares
    in ``a`` and in ``b`` (None: it has its own). ``metadata``: of the keys whose values differ, both (None: it is not there). Of files of
    others that tell of no ties, and of metadata of others, nothing is said.
    ``bytes``: of tensor data, read for it. ``seconds``: the whole call, wall clock.
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

    @property
    def same(self) -> bool:
        """Whether nothing differs, as far as it is known, but for metadata: those are no part of a model."""
        return not (self.changed or self.added or self.removed or self.flags or self.ties)

    def __str__(self) -> str:
        parts = [f"{len(self.equal)} equal"]
        for word, names in (("changed", self.changed), ("added", self.added), ("removed", self.removed)):
            parts.append(f"{len(names)} {word}" + (f" ({some(names)})" if names else ""))
        if self.flags is None:
            parts.append("freeze flags unknown")
        else:
            parts.append(f"{len(self.flags)} frozen or thawed" + (f" ({some(self.flags)})" if self.flags else ""))
        if self.ties:
            parts.append(f"{len(self.ties)} tied otherwise ({some(self.ties)})")
        if self.metadata:
            parts.append(f"metadata differ ({some(self.metadata)})")
        return f"{self.a} and {self.b}: {', '.join(parts)}; {human_bytes(self.bytes)} read, {self.seconds:.2f} s"


@verb()
def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: ProgressArgument = None) -> DiffReport:
    """Compares two checkpoints by name, each a directory, an index or one safetensors file, whoever wrote it.

    Where both have checksums, tensors are equal by these and nothing of them is read. Others are read, a few megabytes at a
    time: to see whether they are equal at all, or how far they are apart. What is read is checked against its checksum.

    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.ones(2), "y": torch.zeros(3)}, "before")
        >>> report = shardsave.save({"x": torch.ones(2), "y": torch.tensor([0.0, 0.5, 0.0])}, "after")
        >>> found = shardsave.diff("before", "after")
        >>> found.equal, found.changed["y"].max_absolute
        (('x',), 0.5)
    """
    for path in (a, b):
        check_path(path)
    check_progress(progress)
    started = time.perf_counter()
    with open_checkpoint(a) as left, open_checkpoint(b) as right:
        names = {name: name for name in left.stored_names} | dict(left.ties)
        theirs = {name: name for name in right.stored_names} | dict(right.ties)
        pairs = {name: (left.tensors[names[name]], right.tensors[theirs[name]]) for name in names if name in theirs}
        to_read = {pair for pair in pairs.values() if _must_read(*pair)}
        found: dict[tuple[Located, Located], TensorChange | None] = {}
        total = sum(x.nbytes + y.nbytes for x, y in to_read)
        with Progress(progress, "comparing", total) as shown:
            done = 0
            for pair in sorted(to_read, key=lambda pair: (pair[0].shard, pair[0].offset)):
                found[pair] = _compare_stored((left, pair[0]), (right, pair[1]), shown, done)
                done += pair[0].nbytes + pair[1].nbytes
        equal, changed = [], {}
        for name, pair in pairs.items():
            change = found[pair] if pair in found else _without_reading(*pair)
            if change is None:
                equal.append(name)
            else:
                changed[name] = change
        flags = _changed_flags(left.stored_flags, right.stored_flags, pairs)
        tell_ties = all(side.record is not None or side.ties for side in (left, right))
        ties = _changed_ties(left.ties, right.ties, pairs) if tell_ties else {}
        ours = left.record is not None and right.record is not None
        kept = {**left.metadata, **right.metadata} if ours else {}
        metadata = {key: (left.metadata.get(key), right.metadata.get(key)) for key in kept}
    return DiffReport(
        a=os.fspath(a),
        b=os.fspath(b),
        equal=tuple(equal),
        changed=changed,
        added=tuple(name for name in theirs if name not in names),
        removed=tuple(name for name in names if name not in theirs),
        flags=flags,
        ties=ties,
        metadata={key: (before, after) for key, (before, after) in metadata.items() if before != after},
        bytes=total,
        seconds=time.perf_counter() - started,
    )


def _changed_ties(
    before: Mapping[str, str], after: Mapping[str, str], names: Iterable[str]
) -> dict[str, tuple[str | None, str | None]]:
    """Those of ``names`` that share their bytes with others than before, whichever of a group has the bytes."""
    if before == after:
        return {}
    groups: list[dict[str, set[str]]] = [{}, {}]
    for name in names:
        for found, ties in zip(groups, (before, after)):
            found.setdefault(ties.get(name, name), set()).add(name)
    pairs = ((name, before.get(name), after.get(name)) for name in names)
    return {
        name: (left, right)
        for name, left, right in pairs
        if left != right and groups[0][left or name] != groups[1][right or name]
    }


def _must_read(x: Located, y: Located) -> bool:
    """Whether the bytes have something to tell: of equal checksums or other shapes they have not."""
    if x.shape != y.shape or 0 in x.shape:
        return False
    return x.dtype != y.dtype or x.checksum is None or x.checksum != y.checksum


def _without_reading(x: Located, y: Located) -> TensorChange | None:
    if (x.dtype, x.shape) == (y.dtype, y.shape):
        return None
    return _change(x, y, Difference() if x.shape == y.shape else None)


def _change(x: Located, y: Located, difference: Difference | None) -> TensorChange:
    return TensorChange(
        dtype=(BY_NAME[x.dtype].torch, BY_NAME[y.dtype].torch),
        shape=(torch_shape(x.dtype, x.shape), torch_shape(y.dtype, y.shape)),
        elements=difference.elements if difference is not None else None,
        nans=difference.nans if difference is not None else None,
        max_absolute=difference.max_absolute if difference is not None else None,
        max_relative=difference.max_relative if difference is not None else None,
    )


def _compare_stored(
    left: tuple[Checkpoint, Located], right: tuple[Checkpoint, Located], shown: Progress, done: int
) -> TensorChange | None:
    """How two tensors of one shape differ, None where their bytes are the same; both streamed, a piece at a time."""
    x, y = left[1], right[1]
    difference, same = Difference(), x.dtype == y.dtype
    for part, other in zip(_pieces(*left), _pieces(*right), strict=True):  # strict: both come to their last check
        if x.dtype != y.dtype or part != other:
            same = False
            difference = difference.joined(compare(part, x.dtype, other, y.dtype))
        done += len(part) + len(other)
        shown.tick(done)
    return None if same else _change(x, y, difference)


def _pieces(checkpoint: Checkpoint, t: Located) -> Iterator[bytes]:
    """The bytes of a stored tensor by pieces of as many elements each; raises once all have been read and their sum is wrong."""
    step, at, total = _PIECE_ELEMENTS * BY_NAME[t.dtype].bits // 8, 0, 0
    while at < t.nbytes:
        wanted = min(step, t.nbytes - at)
        try:
            part = read_at(checkpoint.descriptor(t.shard), wanted, t.offset + at)
        except CallFailed as error:
            raise cannot_read(checkpoint.path_of(t.shard), error) from error
        if len(part) < wanted:
            raise CorruptCheckpointError(
                f"corrupt shard {t.shard}: tensor {t.name!r} was expected to have {t.nbytes} bytes, the file ends after "
                f"{at + len(part)} of them; it was cut while it was compared"
            )
        at += wanted
        if t.checksum is not None:
            total ^= shift(finish(crc64(part), wanted), t.nbytes - at)  # `finish` undoes itself: the raw sum, which is linear
        yield part
    checkpoint.release(t.shard)
    if t.checksum is not None and (computed := finish(total, t.nbytes)) != t.checksum:
        raise CorruptCheckpointError(
            f"corrupt shard {t.shard}: tensor {t.name!r} has checksum {computed:016x}, its header says {t.checksum:016x}; "
            f"the file was changed after it was saved"
        )


def _changed_flags(
    left: Mapping[str, bool] | None, right: Mapping[str, bool] | None, names: Mapping[str, object]
) -> dict[str, tuple[bool | None, bool | None]] | None:
    if left is None or right is None:
        return None
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}
