"""Ranks read shards of an earlier checkpoint back together: each reads a run of the tensors, with about the same number of bytes.

Rank 0 compares the checksums. What another rank cannot read (its machine does not see the directory, or not this file), rank 0 reads
itself: so what is said of a damaged file is what one process would say.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from errno import ESTALE
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from shardsave._common.os_calls import CallFailed
from shardsave._engine.transfer import TransferFault
from shardsave._format.packing import Shard, StoredTensor
from shardsave._ranks.communicator import Communicator
from shardsave._saving.read_back import sums_on_disk
from shardsave._saving.shards import UnchangedShard
from shardsave._storage.earlier import EarlierCheckpoint, EarlierFolder


class File(NamedTuple):
    """A shard to read: its name, the identity of the file, where its data begins, and the numbers of its tensors in file order."""

    name: str
    identity: Sequence[int]
    data_start: int
    numbers: Sequence[int]


class Question(NamedTuple):
    """The ``files`` in the directory ``path`` that all ranks read together."""

    path: str
    files: Sequence[File]

    @classmethod
    def about(cls, earlier: EarlierCheckpoint, shards: Sequence[UnchangedShard], numbers: dict[str, int]) -> Question:
        """``numbers``: name of a tensor → its number."""
        files = [
            File(one.name, one.identity, one.record.header_length, [numbers[name] for name in shard.planned.names])
            for shard in shards
            for one in [shard.earlier]
        ]
        return cls(earlier.path, files)

    def encode(self) -> bytes:
        return zlib.compress(json.dumps(self).encode(), 1)

    @classmethod
    def decode(cls, data: bytes) -> Question:
        path, files = json.loads(zlib.decompress(data))
        return cls(path, [File(*file) for file in files])


def read_together(
    session: Communicator, question: Question, tensors: Callable[[int], StoredTensor], check: Callable[[], object]
) -> list[list[int] | None] | None:
    """Reads this rank's share. Where it leads, returns the checksums of the tensors in each file; None: some rank could not read it.
    Elsewhere returns None.

    ``tensors``: the tensor with a number. Raises what ``check`` raises.
    """
    layouts = [_layout([tensors(number) for number in file.numbers]) for file in question.files]
    first, stop = _share([tensor.nbytes for layout in layouts for tensor in layout.tensors], session.rank, session.size)
    sums, is_read = np.zeros(stop - first, "<u8"), np.zeros(stop - first, np.bool_)
    with ExitStack() as stack:
        folder: EarlierFolder | None = None
        begin = -first  # of a file's tensors, in the numbers of this share
        for file, layout in zip(question.files, layouts):
            part = slice(max(0, -begin), max(0, min(len(layout.tensors), stop - first - begin)))
            if part.start < part.stop:
                with suppress(CallFailed, TransferFault):
                    folder = folder or stack.enter_context(EarlierFolder(question.path))
                    found = _sums(folder, file, layout, part, check)
                    place = slice(begin + part.start, begin + part.stop)
                    sums[place], is_read[place] = found, True
            begin += len(layout.tensors)
    answers = session.gather("sums on disk", sums.tobytes() + is_read.tobytes())
    if answers is None:
        return None
    # Ranks have their shares in the order of the tensors.
    counts = [len(answer) // (sums.itemsize + 1) for answer in answers]
    all_sums = np.concatenate([np.frombuffer(answer, "<u8", count) for answer, count in zip(answers, counts)]).tolist()
    all_read = np.concatenate(
        [np.frombuffer(answer, np.bool_, -1, sums.itemsize * count) for answer, count in zip(answers, counts)]
    )
    ends = [*accumulate((len(layout.tensors) for layout in layouts), initial=0)]
    return [all_sums[begin:end] if all_read[begin:end].all() else None for begin, end in pairwise(ends)]


def _layout(tensors: Sequence[StoredTensor]) -> Shard:
    *begins, data_bytes = accumulate((tensor.nbytes for tensor in tensors), initial=0)
    return Shard(tuple(tensors), tuple(begins), data_bytes)


def _share(nbytes: Sequence[int], rank: int, ranks: int) -> tuple[int, int]:
    """The first of the tensors that ``rank`` reads, and the first that it does not: those whose middle is in its part of all bytes."""
    lengths = np.array(nbytes, np.int64)
    middles = np.cumsum(lengths) - lengths // 2
    first, stop = np.searchsorted(middles, [lengths.sum() * rank // ranks, lengths.sum() * (rank + 1) // ranks], side="right")
    return (0 if rank == 0 else int(first)), (len(nbytes) if rank == ranks - 1 else int(stop))


def _sums(folder: EarlierFolder, file: File, layout: Shard, part: slice, check: Callable[[], object]) -> Sequence[int]:
    """The checksums of the tensors ``part`` of ``file``. Raises CallFailed, TransferFault, and what ``check`` raises."""
    descriptor = folder.open(file.name, file.identity)
    if descriptor is None:
        raise CallFailed("open", file.name, ESTALE, os.strerror(ESTALE))
    with descriptor:
        return sums_on_disk(descriptor.fd, Shard(layout.tensors[part], layout.begins[part], 0), file.data_start, check)
