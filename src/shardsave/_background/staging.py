"""Stages a background save in the call: decides what is copied there and what is read while training goes on, and copies the former."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from shardsave._background import snapshot
from shardsave._background.changes import Seen, see
from shardsave._background.drain import Drained
from shardsave._background.owners import COPIED, Choice, choose, memory_of_module, memory_of_optimizer
from shardsave._background.staged_contents import SpreadParts, StagedContents
from shardsave._common.gc_pause import gc_paused
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._engine import engine
from shardsave._format.packing import StoredTensor
from shardsave._saving.contents import Contents

#: Tensors of fewer bytes are always copied in the call.
DRAINED_BYTES = 1 << 20

Wanted = Literal["auto", "snapshot", "ring"]


def stage(
    contents: Contents,
    source: nn.Module | Mapping[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
    wanted: Wanted,
    *,
    check_unchanged: bool,
    workers: int,
    step_timeout: float = 600.0,
    ranks: int = 1,
) -> StagedContents:
    """Copies what must be copied in the call, and notes what the rest is now. ``contents`` were planned from ``source``.

    ``optimizers``: those whose state is saved. ``check_unchanged``: also sum what is not copied, to compare it later. ``workers``: the
    most threads that copy. ``step_timeout``: how many seconds a step waits, then it goes on and the save fails. ``ranks``: how many
    save together; then everything that this one has is copied.
    Raises ValueError if ``wanted`` is ``"ring"`` and the ring cannot be right, OutOfMemoryError if copies were requested and do not fit.
    """
    choice = choose(source, optimizers, wanted) if ranks == 1 else Choice("snapshot", f"{COPIED}: {ranks} ranks save together")
    with gc_paused():
        table = _Table.of(contents)
        drained: dict[int, _Found] = {}
        if choice.mode == "ring":
            drained = _drained(table, source, optimizers)
            if wanted == "auto" and any(_is_shared(seen.tensor) for found in drained.values() for seen in found.owners):
                choice, drained = Choice("snapshot", f"{COPIED}: a parameter is in memory that other processes share"), {}
        copied = [n for n in range(len(table.pieces)) if n not in drained]
    begins, nbytes = snapshot.places([table.nbytes[n] for n in copied], [table.files[n] for n in copied])
    try:
        memory = snapshot.borrow(nbytes, table.device)
    except snapshot.NoRoom as error:
        if wanted != "auto":
            raise snapshot.refusal(error) from None
        choice = Choice("blocking", f"the call ends when everything is written, since a copy does not fit: {error}")
        return StagedContents(contents, choice)
    try:
        started = time.perf_counter()
        # The caller waits meanwhile, so there is a processor more.
        copies = snapshot.take(
            [table.pieces[n] for n in copied], [table.nbytes[n] for n in copied], begins, memory, workers + 1
        )
        copy_seconds = time.perf_counter() - started
        items = [
            Drained(table.tensors[n].name, table.pieces[n], table.nbytes[n], found.owners, found.stepped)
            for n, found in drained.items()
        ]
        if check_unchanged:
            _sum(items, workers)
    except BaseException:
        snapshot.give_back(memory)
        raise
    staging = StagedContents(contents, choice, copies, memory, items, _streams(items), step_timeout, table.spreads)
    staging.copy_seconds = copy_seconds
    return staging


class _Table(NamedTuple):
    """Everything that a save will write: the source and the length of each stored tensor, and what its file says of it. In the place of
    a `Spread`, the boxes that this rank has.

    ``files``: the number of the shard that each is in, ascending; then -1 for boxes. ``device``: the ordinal of a CUDA device that has
    some of it; -1 if none has.
    """

    pieces: list[ByteSource]
    nbytes: list[int]
    tensors: list[StoredTensor]
    files: list[int]
    device: int
    spreads: list[SpreadParts]

    @classmethod
    def of(cls, contents: Contents) -> _Table:
        shards = contents.all_shards
        pieces: list[ByteSource] = [piece for shard in shards for piece in shard.pieces]
        tensors = [tensor for shard in shards for tensor in shard.layout.tensors]
        nbytes = [tensor.nbytes for tensor in tensors]
        files = [number for number, shard in enumerate(shards) for _ in shard.pieces]
        spreads = [
            SpreadParts(piece, [TensorSource(chunk.tensor, piece.dtype) for chunk in piece.local])
            for piece in pieces
            if isinstance(piece, Spread)
        ]
        if spreads:
            plain = [n for n, piece in enumerate(pieces) if not isinstance(piece, Spread)]
            parts = [part for spread in spreads for part in spread.parts]
            pieces = [*(pieces[n] for n in plain), *parts]
            nbytes = [*(nbytes[n] for n in plain), *(part.nbytes for part in parts)]
            files = [*(files[n] for n in plain), *(-1 for _ in parts)]
            tensors = [tensors[n] for n in plain]  # of these alone steps may wait
        device = -1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            device = max((piece.cuda_device for piece in pieces), default=-1)
        return cls(pieces, nbytes, tensors, files, device, spreads)


class _Found(NamedTuple):
    """What has the memory of a stored tensor. ``stepped``: an optimizer is among it."""

    owners: list[Seen]
    stepped: bool


def _drained(
    table: _Table, source: nn.Module | Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[int, _Found]:
    """The numbers of the tensors that can be read after the call, each with the owners of its memory."""
    at_address: dict[int, list[int]] = {}
    for number, nbytes in enumerate(table.nbytes):
        piece = table.pieces[number]
        if nbytes < DRAINED_BYTES or type(piece) is not TensorSource or piece.memory() is None:
            continue
        if not piece.tensor.is_inference():  # such a tensor has no version, so its changes would not be noticed
            at_address.setdefault(piece.tensor.data_ptr(), []).append(number)
    drained: dict[int, _Found] = {}
    if not at_address:
        return drained
    of_optimizers = chain.from_iterable(map(memory_of_optimizer, optimizers))
    of_module = memory_of_module(source) if isinstance(source, nn.Module) else ()
    for tensors, stepped in ((of_optimizers, True), (of_module, False)):
        for tensor in tensors:
            for number in at_address.get(tensor.data_ptr(), ()):
                piece = table.pieces[number]
                assert isinstance(piece, TensorSource)
                if tensor.untyped_storage()._cdata != piece.tensor.untyped_storage()._cdata:
                    continue  # something else is at that address
                owners = drained.setdefault(number, _Found([], stepped)).owners
                if not any(other.tensor is tensor for other in owners):
                    owners.append(see(tensor))
    return drained


def _is_shared(tensor: torch.Tensor) -> bool:
    """Whether other processes may have the memory, too; torch says so of all CUDA memory."""
    return tensor.is_cpu and tensor.untyped_storage().is_shared()


def _sum(items: Sequence[Drained], workers: int) -> None:
    """Notes the checksum that each tensor has now."""
    nbytes = [item.nbytes for item in items]
    begins, _ = snapshot.places(nbytes)
    transfer = engine.gather(
        snapshot.block_table(begins, nbytes), [item.piece for item in items], workers=workers, tick=_ignore
    )
    for item, crc in zip(items, transfer.sums):
        item.sum = crc


def _streams(items: Sequence[Drained]) -> list[torch.cuda.Stream]:
    """For each device that has some of ``items``: a stream that waits for all work that the caller has enqueued there until now."""
    streams = []
    for device in sorted({item.piece.cuda_device for item in items} - {-1}):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        streams.append(stream)
    return streams


def _ignore(_: int) -> None:
    pass
