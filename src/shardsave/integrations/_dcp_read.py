"""Reads a checkpoint as DCP asks for it: what there is, and boxes of it into tensors of the caller."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from shardsave._api.load_reports import LoadClock, log_load
from shardsave._api.reports import LoadReport
from shardsave._common.assembled import Chunk
from shardsave._common.layouts import Listed
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.spread import Spread
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._format.index import TRAINING
from shardsave._loading.read import Target, TensorReader
from shardsave._storage.checkpoint import Checkpoint, open_checkpoint
from shardsave._storage.located import Located, StoredChunk
from shardsave._training.read_values import ValueReader
from shardsave.errors import IncompatibleCheckpointError
from shardsave.integrations._dcp_document import Document, decode
from shardsave.integrations._dcp_names import Path, Rule, name_of


class Stored(NamedTuple):
    """An open checkpoint by DCP's names. ``tensors``: name → where it is. ``values``: name → the JSON of a value. ``streams``: the names of
    values that are an ``io.BytesIO``. ``paths``: those of all names."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Located]
    values: Mapping[str, Any]
    streams: frozenset[str]
    paths: Mapping[str, Path]

    def metadata(self) -> Metadata:
        """What DCP wants to know of a checkpoint."""
        described = {name: _described(located) for name, located in self.tensors.items()}
        return Metadata({**described, **{name: BytesStorageMetadata() for name in self.values}}, planner_data=dict(self.paths))

    def place(self, index: MetadataIndex) -> StoredChunk:
        """The stored box that ``index`` means."""
        begin = tuple(index.offset or ())
        return next(chunk for chunk in _chunks(self.tensors[index.fqn]) if chunk.begin == begin)


@uncompiled
@verb()
def open_stored(path: str, prefix: str | None) -> Stored:
    """Opens the checkpoint at ``path``. ``prefix``: what DCP's name of each weight begins with; None: as it was saved, or nothing.

    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError.
    """
    checkpoint = open_checkpoint(path, parts=(TRAINING,))
    for note in checkpoint.shape_notes:
        warn_caller(note)
    weights = {**checkpoint.tensors, **{name: checkpoint.tensors[leader] for name, leader in checkpoint.ties.items()}}
    training, document = checkpoint.training, None
    if training is not None:
        reader = ValueReader(training.tensors, checkpoint.path)
        document = decode(training.shared, reader, weights)
    if document is None or training is None:
        document, in_training = Document(Rule(), {}, {}), {}
    else:
        in_training = dict(training.tensors)
    if prefix is not None:
        document = document._replace(rule=Rule((), prefix), paths={})
    tensors, values, paths = {}, {}, {}
    streams = frozenset(map(name_of, document.streams))
    for weight, located in weights.items():
        path_to = document.path(weight)
        tensors[name_of(path_to)], paths[name_of(path_to)] = located, path_to
    for path_to, value in document.values.items():
        name = name_of(path_to)
        paths[name] = path_to
        if isinstance(value, dict) and value.keys() == {"tensor"} and name not in streams:
            tensors[name] = _stored_tensor(value["tensor"], name, in_training, checkpoint)
        else:
            values[name] = value
    return Stored(checkpoint, tensors, values, streams, paths)


def _stored_tensor(stored: Any, name: str, tensors: Mapping[str, Located], checkpoint: Checkpoint) -> Located:
    if not isinstance(stored, str) or stored not in tensors:
        ValueReader(tensors, checkpoint.path).corrupt(name, "the name of a stored tensor was", stored)
    return tensors[stored]


def _described(located: Located) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(begin), torch.Size(torch_shape(part.dtype, part.shape)))
        for begin, part in _chunks(located)
    ]
    shape = torch.Size(torch_shape(located.dtype, located.shape))
    return TensorStorageMetadata(TensorProperties(BY_NAME[located.dtype].torch), shape, chunks)


def _chunks(located: Located) -> Sequence[StoredChunk]:
    if located.chunks:
        return located.chunks
    return (StoredChunk((0,) * len(torch_shape(located.dtype, located.shape)), located),)


@uncompiled
@verb()
def read_items(stored: Stored, plan: LoadPlan, planner: LoadPlanner, *, verify: bool, progress: ProgressArgument) -> LoadReport:
    """Reads every item of ``plan`` into the tensors of ``planner``, and hands it the values that are no tensors."""
    clock = LoadClock()
    in_place: list[tuple[ReadItem, torch.Tensor]] = []
    copied: list[tuple[torch.Tensor, torch.Tensor]] = []
    targets: list[Target] = []
    for item in plan.items:
        if item.type is LoadItemType.BYTE_IO:
            continue
        tensor = planner.resolve_tensor(item)
        in_place.append((item, tensor))
        destination = _destination(tensor, item, stored)
        if destination is not tensor:
            copied.append((tensor, destination))
        targets += _targets(item, destination.detach(), stored)
    values = [_Value(item, stored) for item in plan.items if item.type is LoadItemType.BYTE_IO]
    targets += [target for value in values for target in value.targets]
    clock.planned()
    # autograd does not notice these writes; with a new version number, a stale backward raises.
    torch.autograd.graph.increment_version([tensor for _, tensor in in_place if not tensor.is_inference()])
    with Progress(progress, "loading", sum(located.nbytes for located, _ in targets)) as reporter:
        reader = TensorReader(stored.checkpoint, verify=verify, progress=reporter)
        reader.read(targets)
    clock.transferred()
    for tensor, copy in copied:
        with torch.no_grad():
            tensor.copy_(copy)
    for item, tensor in in_place:
        planner.commit_tensor(item, tensor)
    for value in values:
        planner.load_bytes(value.item, value.pickled())
    notes = stored.checkpoint.notes()
    report = clock.report(stored.checkpoint.path, [located for located, _ in targets], reader, notes)
    log_load(report, notes, may_be_empty=True)
    return report


def _destination(tensor: torch.Tensor, item: ReadItem, stored: Stored) -> torch.Tensor:
    """``tensor``, or a copy for a tensor whose memory cannot be filled directly."""
    if tensor.shape != item.lengths:
        raise IncompatibleCheckpointError(
            f"cannot load {stored.checkpoint.path}: a tensor of shape {[*item.lengths]} was expected for {item.dest_index.fqn!r}, as DCP's "
            f"plan says, the planner has {[*tensor.shape]}; nothing was changed"
        )
    if type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided and not tensor.is_meta:
        return tensor
    dtype = BY_NAME[stored.tensors[item.storage_index.fqn].dtype].torch
    return torch.empty(item.lengths, dtype=dtype)


def _targets(item: ReadItem, tensor: torch.Tensor, stored: Stored) -> Iterator[Target]:
    """The range of a file that has the box which ``item`` wants, and what takes the box out of it. Nothing for an empty box."""
    located = stored.place(item.storage_index).located
    dtype, shape = BY_NAME[located.dtype].torch, torch_shape(located.dtype, located.shape)
    if not tensor.numel():
        return
    begin, sizes = tuple(item.storage_offsets), tuple(item.lengths)
    first = _position(begin, shape)
    stop = _position([at + size - 1 for at, size in zip(begin, sizes)], shape) + 1
    if stop - first == tensor.numel():
        yield _range(located, first * dtype.itemsize, stop * dtype.itemsize), tensor
        return
    # All rows that the box has a part of.
    row = math.prod(shape[1:]) * dtype.itemsize
    begin, rows = (0, *begin[1:]), (sizes[0], *shape[1:])
    box = Spread(dtype, Listed({0: [(begin, sizes)]}, rows), [Chunk(begin, tensor)])
    first = item.storage_offsets[0]
    yield _range(located, first * row, (first + sizes[0]) * row), box


def _range(located: Located, begin: int, end: int) -> Located:
    """The bytes from ``begin`` to ``end`` of a stored tensor; only the whole has a checksum."""
    nbytes = end - begin
    checksum = located.checksum if nbytes == located.nbytes else None
    return located._replace(offset=located.offset + begin, nbytes=nbytes, checksum=checksum)


def _position(index: Sequence[int], shape: Sequence[int]) -> int:
    """The number of the element at ``index``, in C order."""
    return sum(at * math.prod(shape[dim + 1 :]) for dim, at in enumerate(index))


class _Value:
    """A value that is no tensor; tensors in it are read with all others."""

    def __init__(self, item: ReadItem, stored: Stored) -> None:
        self.item = item
        training = stored.checkpoint.training
        assert training is not None
        name, reader = item.storage_index.fqn, ValueReader(training.tensors, stored.checkpoint.path)
        self._value = reader.value(stored.values[name], name)
        self._is_stream = name in stored.streams
        if self._is_stream and not (isinstance(self._value, torch.Tensor) and self._value.dtype == torch.uint8):
            reader.corrupt(name, "a tensor of bytes was", stored.values[name])
        self._copies = reader.copies
        self.targets: list[Target] = [(training.tensors[name], tensor) for name, tensor in reader.targets.items()]

    def pickled(self) -> io.BytesIO:
        """What DCP's planner wants: it unpickles at once what is pickled here. No file has a pickle."""
        for tensor, source in self._copies:
            tensor.copy_(source)
        value = io.BytesIO(self._value.numpy().tobytes()) if self._is_stream else self._value
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        return buffer
