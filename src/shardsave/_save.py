"""`save`: from a module to a committed checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NoReturn, Union

from torch import nn

from shardsave import _engine
from shardsave._architecture import ExtraTensors, describe
from shardsave._arguments import check_path, check_progress, check_switches, check_timeout
from shardsave._backend import engine_name
from shardsave._checkpoint import descriptor_allowance
from shardsave._collector import collector_still
from shardsave._commit import StagedShard, Transaction
from shardsave._crc64 import crc64, joined
from shardsave._dtypes import BY_TORCH, logical_shape
from shardsave._ending import verb
from shardsave._format import encode_header, with_sums
from shardsave._index import FileRecord, Index, Part, Record, ShardRecord, check_shard_count
from shardsave._json import MAX_DIGITS, NotJSON, glimpse, parse_object
from shardsave._peft import ADAPTER_WEIGHTS, adapted, adapter_companions, adapter_on_disk
from shardsave._plan import ALIGNMENT, Extent, Shard, StoredTensor, blocks, pack
from shardsave._program import Program, capture, check_program
from shardsave._progress import Progress, ProgressArgument
from shardsave._reports import Phases, SaveReport
from shardsave._state import Entry, Source, State, read_state
from shardsave._transformers import companions, on_disk, pretrained
from shardsave._version import __version__
from shardsave.errors import an

#: Far from what any JSON reader's own stack allows.
_METADATA_LEVELS = 64

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@verb()
def save(
    source: Source | State,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: Union[int, str] = "5GB",
    durable: bool = True,
    metadata: Mapping[str, Any] | None = None,
    architecture: bool = False,
    program: Program | None = None,
    adapter_only: bool = False,
    progress: ProgressArgument = None,
    lock_timeout: float = 600.0,
) -> SaveReport:
    """Saves a module, a sub-module, or a mapping of names to tensors, as the checkpoint of ``directory``.

    The tensors keep dtype and shape, parameters their ``requires_grad``; tied tensors are stored once. A checkpoint that is
    there already is replaced by one rename, or stays whole; other files of the directory are not touched.

    Args:
        source: an ``nn.Module`` (wrappers such as ``torch.compile`` and DDP are seen through), or a mapping from names to
            tensors, Parameters or numpy arrays of any dtype that safetensors has.
        directory: created when it is not there.
        max_shard_size: bytes of tensor data in one file, as an int or ``"5GB"``, ``"500MB"``, ``"2GiB"``.
        durable: wait until the checkpoint would survive a loss of power. Without, it survives the end of the process.
        metadata: JSON values by name, given back by ``inspect``; keys are strings on every level, tuples come back as lists.
        architecture: keep the module tree as data too, so that ``build_model`` makes the whole model again without its
            definition having to be called. What cannot be kept as data is refused; hooks are left out with one warning.
        program: ``(args, kwargs)`` for ``forward``, or what ``torch.export.export`` made of the model: keeps what the model computes
            as a graph of torch's operators, which ``load_program`` runs without the model's classes.
        adapter_only: of a PEFT model keep the active adapter alone, laid out as PEFT does, with the flags of the whole model.
        progress: None for a bar when it takes long and stderr is a terminal, True or False to force or forbid it, or a
            callable that gets (bytes done, bytes in all).
        lock_timeout: seconds to wait for another save into the same directory.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UnsupportedTensorError: a tensor cannot be stored; nothing was written.
        UnsupportedModuleError: an architecture or a program was asked for, and cannot be kept (all is listed); nothing was written.
        DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError: nothing was committed, what was there is intact.
        DurabilityUncertainError: the new checkpoint is in place, but perhaps not for good.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2)
        >>> report = shardsave.save(model, "linear-checkpoint")
        >>> report.tensors
        2
    """
    check_path(directory)
    check_switches(durable=durable, architecture=architecture, adapter_only=adapter_only)
    if (architecture or program is not None) and not isinstance(source, nn.Module):
        which = "architecture=True" if architecture else "a program"
        raise TypeError(f"{which} needs an nn.Module, there is none in {an(type(source).__name__)}")
    check_program(program)
    check_progress(progress)
    check_timeout(lock_timeout)
    bound = parse_size(max_shard_size)
    user_metadata = _check_metadata(metadata)
    started = time.perf_counter()
    model = pretrained(source)
    adapter = _check_adapter(source, architecture, program) if adapter_only else None
    beside = adapter_companions(adapter) if adapter is not None else companions(model) if model is not None else {}
    with collector_still():
        state = read_state(source, tensors_only=architecture)
        extra = ExtraTensors(state.entries)
        documents: dict[str, bytes] = {}
        if architecture and isinstance(source, nn.Module):
            documents["architecture"] = describe(source, extra)
        if program is not None and isinstance(source, nn.Module):
            documents["program"] = capture(source, program, extra)
        layout = on_disk(model if not documents else None, state)  # an architecture and a program go by the names in memory
        if adapter is not None:
            layout = adapter_on_disk(adapter, state)
        state = layout.state
        stored = [entry for entry in state.entries if entry.tied_to is None]
        shards = pack([_stored_tensor(entry) for entry in stored], bound) if adapter is None else _one_shard(stored)
        count = len(shards)
        check_shard_count(count)
        pieces = _pieces(shards, stored)
        if extra.kept:
            kept = pack([_stored_tensor(entry) for entry in extra.kept], sys.maxsize)
            shards += kept
            pieces += _pieces(kept, extra.kept)
        headers = [encode_header(shard) for shard in shards]
    total = sum(shard.data_bytes for shard in shards)
    with (
        Progress(progress, "saving", total) as shown,
        Transaction(directory, durable=durable, lock_timeout=lock_timeout) as transaction,
    ):
        names = list(transaction.shard_names(count))
        names += [transaction.part_name("extra", "safetensors") for _ in shards[count:]]
        needed = sum(_padded(len(header), shard) for header, shard in zip(headers, shards))
        transaction.check_space(needed + sum(map(len, documents.values())))
        _reserve(transaction, pieces)
        beside_records = transaction.add_companions(beside)
        planned = time.perf_counter()
        writer = _Writer(transaction, shards, headers, names, pieces, durable, shown, adapter is not None)
        step = min(descriptor_allowance(), 256)
        for first in range(0, len(shards), step):
            writer.write(range(first, min(first + step, len(shards))))
        if adapter is not None:
            transaction.add_second_name(names[0], ADAPTER_WEIGHTS)
            beside_records[ADAPTER_WEIGHTS] = writer.whole[names[0]]
        parts: dict[str, Part] = {}
        for name in names[count:]:
            parts["extra tensors"] = Part(name, writer.records.pop(name))
        for role, document in documents.items():
            parts[role] = _stage_document(transaction, role, document)
        before_commit = time.perf_counter()
        with collector_still():
            record = _record(state, writer.records, transaction, durable, user_metadata)
            record = replace(record, parts=parts, companions=beside_records, module_flags=layout.module_flags)
            index = _index(state, shards[:count], names, record)
        outcome = transaction.commit(index)
    ended = time.perf_counter()
    phases = Phases(
        plan=planned - started,
        transfer=before_commit - planned - writer.sync_seconds,
        sync=writer.sync_seconds,
        commit=ended - before_commit,
    )
    return SaveReport(
        path=os.fspath(directory),
        bytes=total,
        tensors=len(stored),
        shards=count,
        seconds=ended - started,
        phases=phases,
        engine=engine_name(),
        direct=writer.direct,
        staging_bytes=writer.staging_bytes,
        pinned=writer.pinned,
        notes=tuple(dict.fromkeys([*layout.notes, *writer.notes, *outcome.notes])),
        durable=durable,
        leftovers=outcome.leftovers,
        overlaps=state.overlaps,
    )


def _reserve(transaction: Transaction, pieces: Sequence[Sequence[_engine.Piece]]) -> None:
    try:
        _engine.reserve([piece for shard in pieces for piece in shard])
    except _engine.TransferFault as fault:
        reason = fault.detail or f"{os.strerror(fault.errno)} (needs {fault.length} bytes)"
        raise transaction.failure(fault.call, "", fault.errno, reason, None) from fault


class _Writer:
    """Writes shards in groups for which there are descriptors enough, and collects what the index and the report need."""

    def __init__(
        self,
        transaction: Transaction,
        shards: Sequence[Shard],
        headers: Sequence[bytes],
        names: Sequence[str],
        pieces: Sequence[Sequence[_engine.Piece]],
        durable: bool,
        progress: Progress,
        whole_sums: bool = False,
    ) -> None:
        self.records: dict[str, ShardRecord] = {}
        self.whole: dict[str, FileRecord] = {}
        self.sync_seconds = 0.0
        self.direct = True
        self.staging_bytes = 0
        self.pinned = False
        self.notes: list[str] = []
        self._transaction = transaction
        self._shards = shards
        self._headers = headers
        self._names = names
        self._pieces = pieces
        self._durable = durable
        self._progress = progress
        self._whole_sums = whole_sums

    def write(self, group: range) -> None:
        staged = [self._transaction.create(self._names[n], _padded(len(self._headers[n]), self._shards[n])) for n in group]
        pieces = [piece for n in group for piece in self._pieces[n]]
        transfer = self._transfer(staged, group, pieces)
        self.direct &= all(transfer.direct)
        self.staging_bytes = max(self.staging_bytes, transfer.staging_bytes)
        self.pinned |= transfer.pinned
        self.notes.extend(transfer.notes)
        self._progress.run_ended(sum(piece.nbytes for piece in pieces))
        began = time.perf_counter()
        sums = iter(transfer.sums)
        for shard_file, n in zip(staged, group):
            shard = self._shards[n]
            own_sums = list(islice(sums, len(shard.tensors)))
            header = with_sums(self._headers[n], own_sums)
            length = len(header) + shard.data_bytes
            self._transaction.seal(shard_file, length, header)
            self.records[shard_file.name] = ShardRecord(length, len(header), crc64(header))
            if self._whole_sums:
                self.whole[shard_file.name] = FileRecord(length, _whole_sum(header, shard, own_sums))
        self.sync_seconds += time.perf_counter() - began

    def _transfer(self, staged: Sequence[StagedShard], group: range, pieces: Sequence[_engine.Piece]) -> _engine.Transfer:
        extents: list[Extent] = []
        with collector_still():
            for file, n in enumerate(group):
                start = len(self._headers[n])
                for tensor, begin in zip(self._shards[n].tensors, self._shards[n].begins):
                    # Blocks are cut at multiples of the largest dtype, so no element is cut: one byte is the right grain.
                    extents.append(Extent(file, start + begin, tensor.nbytes, len(extents), 1))
            planned = blocks(extents, _engine.BLOCK_BYTES)
        try:
            return _engine.write(
                [shard.file.fd for shard in staged],
                planned,
                pieces,
                direct=self._durable,
                tick=self._progress.tick,
            )
        except _engine.TransferFault as fault:
            needed = sum(_padded(len(header), shard) for header, shard in zip(self._headers, self._shards))
            call = fault.call if fault.file < 0 else f"{fault.call} of {fault.length} bytes at offset {fault.offset}"
            name = staged[max(fault.file, 0)].name
            raise self._transaction.failure(call, name, fault.errno, fault.detail, needed) from fault


def _stored_tensor(entry: Entry) -> StoredTensor:
    tensor = entry.tensor
    dtype = entry.cast or tensor.dtype
    return StoredTensor(
        entry.name, BY_TORCH[dtype].name, logical_shape(tensor), tensor.numel() * dtype.itemsize, bool(entry.frozen)
    )


def _pieces(shards: Sequence[Shard], stored: Sequence[Entry]) -> list[list[_engine.Piece]]:
    pieces = {entry.name: (entry.tensor, entry.cast or entry.tensor.dtype) for entry in stored}
    return [[_engine.Piece(*pieces[name], nbytes) for name, _, _, nbytes, _ in shard.tensors] for shard in shards]


def _one_shard(stored: Sequence[Entry]) -> tuple[Shard, ...]:
    """All in one file, as those want it who look for that one."""
    return pack([_stored_tensor(entry)._replace(frozen=False) for entry in stored], sys.maxsize)


def _whole_sum(header: bytes, shard: Shard, sums: Sequence[int]) -> int:
    """The checksum of a whole file, from those of its parts."""
    whole = crc64(header)
    for tensor, one in zip(shard.tensors, sums):
        whole = joined(whole, one, tensor.nbytes)
    return whole


def _padded(start: int, shard: Shard) -> int:
    return start + -(-shard.data_bytes // ALIGNMENT) * ALIGNMENT


def _record(
    state: State,
    shards: Mapping[str, ShardRecord],
    transaction: Transaction,
    durable: bool,
    metadata: Mapping[str, Any],
) -> Record:
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    return Record(
        durable=durable,
        flags=flags if state.flags_known else None,
        ties={entry.name: entry.tied_to for entry in state.entries if entry.tied_to is not None},
        metadata=metadata,
        shards=shards,
        supersedes=transaction.supersedes,
        writer=f"shardsave {__version__}",
    )


def _index(state: State, shards: Sequence[Shard], names: Sequence[str], record: Record) -> Index:
    shard_of = {tensor.name: name for shard, name in zip(shards, names) for tensor in shard.tensors}
    in_state_order = {entry.name: shard_of[entry.name] for entry in state.entries if entry.tied_to is None}
    return Index(in_state_order, sum(shard.data_bytes for shard in shards), record)


def _stage_document(transaction: Transaction, role: str, document: bytes) -> Part:
    name = transaction.part_name(role, "json")
    transaction.stage(name, document)
    return Part(name, ShardRecord(len(document), len(document), crc64(document)))


def _check_adapter(source: Source | State, architecture: bool, program: Program | None) -> Any:
    adapter = adapted(source)
    if adapter is None:
        raise TypeError(f"adapter_only=True needs a PeftModel, there is none in a {type(source).__name__}")
    if architecture or program is not None:
        raise ValueError("adapter_only=True keeps no architecture and no program: they need the base model's weights")
    return adapter


def parse_size(size: Union[int, str]) -> int:
    """``"5GB"`` → 5·10⁹ and ``"2GiB"`` → 2·2³⁰, bytes; an int is bytes already."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"max_shard_size must be an int of bytes or a string such as '5GB', not {type(size).__name__}")
    if isinstance(size, int):
        count = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(f"max_shard_size must be like '5GB', '500MB' or '2GiB', not {glimpse(size)}")
        number = float(match[1]) * unit
        if math.isinf(number):
            raise ValueError(f"max_shard_size must be a size that some disk may have, not {glimpse(size)}")
        count = int(number)
    if count <= 0:
        raise ValueError(f"max_shard_size must be at least one byte, not {size!r}")
    return count


def _check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's metadata as it will be read back: tuples become lists."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping, not {type(metadata).__name__}")
    plain = dict(metadata)
    _check_value(plain, "metadata", _METADATA_LEVELS)
    try:
        return parse_object(json.dumps(plain, allow_nan=False, ensure_ascii=False).encode())
    except NotJSON as error:
        raise TypeError(f"metadata must be JSON values that can be read back: {error.wanted}, {error.found}") from error


def _check_value(value: object, place: str, levels: int) -> None:
    """Refuses what JSON does not have, or what no reader would give back, saying where it is: ``metadata['run'][0]``."""

    def refuse(found: str) -> NoReturn:
        raise TypeError(f"metadata must be JSON values that can be read back: {place} {found}")

    if levels == 0:
        raise TypeError(
            f"metadata must be nested at most {_METADATA_LEVELS} levels deep, or nobody could read it back: "
            f"{place if len(place) <= 80 else place[:80] + '…'} is deeper"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                refuse(f"has the key {glimpse(key)}, which is no string")
            _check_value(key, f"the key {glimpse(key)} of {place}", levels)
            _check_value(inner, f"{place}[{glimpse(key)}]", levels - 1)
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            _check_value(inner, f"{place}[{at}]", levels - 1)
    elif isinstance(value, str):
        if not _encodes(value):
            refuse("has half of a surrogate pair")
    elif isinstance(value, float):
        if not math.isfinite(value):
            refuse(f"is {value}")
    elif isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            refuse(f"has more than {MAX_DIGITS} digits")
    elif value is not None:
        refuse(f"is {an(type(value).__name__)}")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
