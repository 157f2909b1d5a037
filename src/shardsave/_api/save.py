"""`save`: from a module to a committed checkpoint."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches, check_timeout, parse_size
from shardsave._api.reports import Phases, SaveReport
from shardsave._common.backend import engine_name
from shardsave._common.gc_pause import collector_still
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._format.crc64 import crc64
from shardsave._format.header import MAX_HEADER_BYTES
from shardsave._format.index import Index, Part, Record, ShardRecord, check_shard_count
from shardsave._format.metadata import check_metadata
from shardsave._huggingface.peft import ADAPTER_WEIGHTS, adapter_companions, adapter_on_disk
from shardsave._huggingface.recognize import peft_model, transformers_model
from shardsave._huggingface.transformers_saving import companions, on_disk
from shardsave._saving.shards import PlannedShard, ShardWriter, plan_shards
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.module import Source, State, read_state
from shardsave._storage.transaction import Transaction
from shardsave._version import __version__
from shardsave.errors import UnsupportedModuleError, an

if TYPE_CHECKING:
    from shardsave._program.capture import Program


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
    there already is replaced by one rename, or stays whole, whoever wrote it; other files of the directory are not touched.

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
        UnsupportedModuleError: an architecture or a program was asked for, and cannot be kept (all is listed), or a module is
            inside of itself; nothing was written.
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
    if program is not None:
        from shardsave._program.capture import check_program  # with it comes torch.export, which few saves need

        check_program(program)
    check_progress(progress)
    check_timeout(lock_timeout)
    bound = parse_size(max_shard_size)
    kept_metadata = check_metadata(metadata)
    adapter = _check_adapter(source, architecture, program) if adapter_only else None
    started = time.perf_counter()
    with collector_still():
        contents = _gather(source, bound, architecture, program, adapter)
    shards = [*contents.shards, *contents.extra]
    total = sum(shard.layout.data_bytes for shard in shards)
    with (
        Progress(progress, "saving", total) as shown,
        Transaction(directory, durable=durable, lock_timeout=lock_timeout) as transaction,
    ):
        names = list(transaction.shard_names(len(contents.shards)))
        extra_names = [transaction.part_name("extra", "safetensors") for _ in contents.extra]
        transaction.check_space(sum(shard.reserved_bytes for shard in shards) + sum(map(len, contents.documents.values())))
        writer = ShardWriter(transaction, shards, names + extra_names, durable=durable, whole_sums=adapter is not None)
        writer.reserve()
        beside = transaction.add_companions(contents.companions)
        planned = time.perf_counter()
        writer.write(shown)
        if adapter is not None:
            transaction.add_second_name(names[0], ADAPTER_WEIGHTS)
            beside[ADAPTER_WEIGHTS] = writer.whole[names[0]]
        parts = {role: _stage_document(transaction, role, document) for role, document in contents.documents.items()}
        for name in extra_names:
            parts["extra tensors"] = Part(name, writer.records.pop(name))
        before_commit = time.perf_counter()
        with collector_still():
            record = Record(
                durable=durable,
                flags=_flags(contents.state),
                ties={entry.name: entry.tied_to for entry in contents.state.entries if entry.tied_to is not None},
                metadata=kept_metadata,
                shards=writer.records,
                supersedes=transaction.supersedes,
                writer=f"shardsave {__version__}",
                parts=parts,
                companions=beside,
                module_flags=contents.module_flags,
            )
            index = _index(contents, names, record)
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
        tensors=len(index.weight_map),
        shards=len(contents.shards),
        seconds=ended - started,
        phases=phases,
        engine=engine_name(),
        direct=writer.direct,
        staging_bytes=writer.staging_bytes,
        pinned=writer.pinned,
        notes=tuple(dict.fromkeys([*contents.notes, *writer.notes, *outcome.notes])),
        durable=durable,
        leftovers=outcome.leftovers,
        overlaps=contents.state.overlaps,
    )


class _Contents(NamedTuple):
    """What a checkpoint is to have. ``extra``: the shards of what the model needs beside its state; ``documents`` by role."""

    state: State
    shards: list[PlannedShard]
    extra: list[PlannedShard]
    documents: Mapping[str, bytes]
    companions: Mapping[str, bytes]
    module_flags: Mapping[str, bool] | None
    notes: tuple[str, ...]


def _gather(source: Source | State, bound: int, architecture: bool, program: Program | None, adapter: Any) -> _Contents:
    """Looks at ``source`` once: from here on it is only read from."""
    model = transformers_model(source)
    try:
        state = read_state(source, tensors_only=architecture)
    except RecursionError as error:
        raise UnsupportedModuleError(
            f"cannot save the model: modules nested less deeply than Python's stack ({sys.getrecursionlimit()}) were expected, they are "
            "deeper, or one is inside of itself; nothing was written"
        ) from error
    extra = ExtraTensors(state.entries if architecture or program is not None else ())
    documents, beside = dict(state.beside.documents), state.beside.companions
    notes: tuple[str, ...] = ()
    if adapter is not None:
        beside = adapter_companions(adapter)
    elif model is not None:
        beside = companions(model)
    if architecture and isinstance(source, nn.Module):
        from shardsave._architecture.describe import describe  # what a plain save does without is imported here

        documents["architecture"] = describe(source, extra)
    if program is not None and isinstance(source, nn.Module):
        from shardsave._program.capture import capture

        captured = capture(source, program, extra)
        documents["program"], notes = captured.document, captured.notes
    for part, document in documents.items():
        if len(document) > MAX_HEADER_BYTES:
            raise UnsupportedModuleError(
                f"cannot save the {part}: at most {MAX_HEADER_BYTES} bytes of it are read again, it has {len(document)}; "
                "nothing was written"
            )
    if documents:
        model = None  # an architecture and a program go by the names in memory
    layout = on_disk(model, state) if adapter is None else adapter_on_disk(adapter, state)
    stored = [entry for entry in layout.state.entries if entry.tied_to is None]
    # An adapter is one file, as those want it who look for that one.
    shards = plan_shards(stored, bound) if adapter is None else plan_shards(stored, sys.maxsize, apart=False)
    check_shard_count(len(shards))
    kept = [*state.beside.extra, *extra.kept]
    kept_shards = plan_shards(kept, sys.maxsize) if kept else []
    return _Contents(layout.state, shards, kept_shards, documents, beside, layout.module_flags, (*layout.notes, *notes))


def _flags(state: State) -> dict[str, bool] | None:
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    return flags if state.flags_known else None


def _index(contents: _Contents, names: Sequence[str], record: Record) -> Index:
    shard_of = {tensor.name: name for shard, name in zip(contents.shards, names) for tensor in shard.layout.tensors}
    in_state_order = {entry.name: shard_of[entry.name] for entry in contents.state.entries if entry.tied_to is None}
    return Index(in_state_order, sum(shard.layout.data_bytes for shard in contents.shards), record)


def _stage_document(transaction: Transaction, role: str, document: bytes) -> Part:
    name = transaction.part_name(role, "json")
    transaction.stage(name, document)
    return Part(name, ShardRecord(len(document), len(document), crc64(document)))


def _check_adapter(source: Source | State, architecture: bool, program: Program | None) -> Any:
    adapter = peft_model(source)
    if adapter is None:
        raise TypeError(f"adapter_only=True needs a PeftModel, there is none in a {type(source).__name__}")
    if architecture or program is not None:
        raise ValueError("adapter_only=True keeps no architecture and no program: they need the base model's weights")
    return adapter
