"""Reads a checkpoint as DCP asks for it: what there is, and boxes of it into tensors of the caller."""

from __future__ import annotations

import io
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from shardsave._api.load_jobs import job_of_load
from shardsave._api.load_reports import LoadClock, log_load
from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT
from shardsave._api.reports import LoadReport
from shardsave._common.assembled import Chunk
from shardsave._common.layouts import Listed
from shardsave._common.memory import PLAIN_TYPES, memory_key
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.spread import Spread
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._format.index import TRAINING
from shardsave._loading.read import Target
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located, StoredChunk
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave._training.read_values import ValueReader
from shardsave.errors import DirectoryBusyError, IncompatibleCheckpointError
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
def read_items(
    stored: Stored,
    plan: LoadPlan,
    planner: LoadPlanner,
    *,
    verify: bool,
    progress: ProgressArgument,
    group: ProcessGroup | None = None,
    timeouts: tuple[float, float] = (RANK_TIMEOUT, PHASE_TIMEOUT),
) -> LoadReport:
    """Reads every item of ``plan`` into the tensors of ``planner``, and hands it the values that are no tensors.

    ``group``: all of its ranks call this, and read each byte once; None: this rank reads for itself.
    """
    clock = LoadClock()
    with job_of_load(None, stored.checkpoint.path, "load", group, *timeouts) as job:
        _, all_have_it = job.attempt(lambda: stored.checkpoint, Checkpoint.identity)
        if not all_have_it:
            raise DirectoryBusyError(
                f"cannot load {stored.checkpoint.path}: one checkpoint was expected on all ranks, a save has replaced it, or the ranks see "
                f"different files; nothing was loaded"
            )
        boxes = [_Box(item, planner, stored) for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        values = [_Value(item, stored) for item in plan.items if item.type is LoadItemType.BYTE_IO]
        once = _without_repeated(boxes)
        targets = _ranges(once) if job.parts is None else _parts_of(once, job.parts.rank)
        targets += [target for value in values for target in value.targets]
        job.checked()
        clock.planned()
        # autograd does not notice these writes; with a new version number, a stale backward raises.
        torch.autograd.graph.increment_version([box.into for box in boxes if not box.into.is_inference()])
        with Progress(progress if job.leads else False, "loading", sum(located.nbytes for located, _ in targets)) as reporter:
            reader = job.reader(stored.checkpoint, verify=verify, progress=reporter)
            reader.read_together(targets)
        clock.transferred()
    for box in boxes:
        box.commit(planner)
    for value in values:
        planner.load_bytes(value.item, value.pickled())
    notes = stored.checkpoint.notes()
    report = clock.report(stored.checkpoint.path, [located for located, _ in targets], reader, notes)
    if job.leads:
        log_load(report, notes, may_be_empty=True)
    return report


class _Box:
    """A box of a stored tensor, or of a chunk of one: the ``sizes`` from index ``begin`` on of ``located``, read into ``tensor``."""

    def __init__(self, item: ReadItem, planner: LoadPlanner, stored: Stored) -> None:
        self.item = item
        self.into = planner.resolve_tensor(item)
        self.located = stored.place(item.storage_index).located
        self.dtype, self.shape = BY_NAME[self.located.dtype].torch, torch_shape(self.located.dtype, self.located.shape)
        self.begin, self.sizes = tuple(item.storage_offsets), tuple(item.lengths)
        self.tensor = _destination(self.into, item, stored).detach()

    @property
    def key(self) -> Hashable:
        """Equal for boxes that get the same elements of the same dtype, as those of tied tensors do."""
        return self.located.shard, self.located.offset, self.begin, self.sizes, self.tensor.dtype, self.tensor.device

    def commit(self, planner: LoadPlanner) -> None:
        if memory_key(self.tensor) != memory_key(self.into.detach()):
            with torch.no_grad():
                self.into.copy_(self.tensor)
        planner.commit_tensor(self.item, self.into)


def _without_repeated(boxes: Sequence[_Box]) -> list[_Box]:
    """``boxes``, each once: a box with the elements of an earlier one will be copied from that."""
    first: dict[Hashable, _Box] = {}
    for box in boxes:
        box.tensor = first.setdefault(box.key, box).tensor
    return [*first.values()]


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


def _ranges(boxes: Sequence[_Box]) -> list[Target]:
    """For each box the range of a file that has it, and what takes it out of that. Nothing for an empty box."""
    targets: list[Target] = []
    for box in boxes:
        if not box.tensor.numel():
            continue
        size = box.dtype.itemsize
        first = _position(box.begin, box.shape)
        stop = _position([at + size - 1 for at, size in zip(box.begin, box.sizes)], box.shape) + 1
        if stop - first == box.tensor.numel():
            targets.append((_range(box.located, first * size, stop * size), box.tensor))
            continue
        # All rows that the box has a part of.
        row = math.prod(box.shape[1:]) * size
        begin, rows = (0, *box.begin[1:]), (box.sizes[0], *box.shape[1:])
        spread = Spread(box.dtype, Listed({0: [(begin, box.sizes)]}, rows), [Chunk(begin, box.tensor)])
        targets.append((_range(box.located, box.begin[0] * row, (box.begin[0] + box.sizes[0]) * row), spread))
    return targets


def _parts_of(boxes: Sequence[_Box], rank: int) -> list[Target]:
    """The stored tensors that ``rank`` needs boxes of, each with these. Boxes that overlap others are targets of their own."""
    targets: list[tuple[Located, list[_Box]]] = []
    latest: dict[tuple[str, int], list[_Box]] = {}
    for box in boxes:
        if not box.tensor.numel():
            continue
        together = latest.get((box.located.shard, box.located.offset))
        if together is None or any(_overlap(box, other) for other in together):
            together = latest[box.located.shard, box.located.offset] = []
            targets.append((box.located, together))
        together.append(box)
    return [(located, _spread(together, rank)) for located, together in targets]


def _overlap(one: _Box, other: _Box) -> bool:
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(one.begin, one.sizes, other.begin, other.sizes))


def _spread(boxes: Sequence[_Box], rank: int) -> Spread:
    layout = Listed({rank: [(box.begin, box.sizes) for box in boxes]}, boxes[0].shape)
    return Spread(boxes[0].dtype, layout, [Chunk(box.begin, box.tensor) for box in boxes])


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
