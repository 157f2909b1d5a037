"""`inspect` and `verify`: what a checkpoint contains, and whether its bytes are still those that were saved."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.findings import ArchitectureInfo, CheckpointInfo, Damage, TensorInfo, VerifyReport
from shardsave._api.reports import Phases
from shardsave._common.backend import engine_name
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import some
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.read import Target, TensorReader
from shardsave._storage.checkpoint import PARTS, Checkpoint, open_checkpoint
from shardsave._storage.second_opinion import SecondOpinion
from shardsave.errors import DirectoryBusyError, ShardSaveError


@uncompiled
@verb()
def inspect(path: str | os.PathLike[str], *, architecture: bool = False) -> CheckpointInfo:
    """What the checkpoint at ``path`` contains: names, shapes, dtypes, shards, freeze flags, ties and metadata.

    Reads the index and the headers, no tensor data. With ``architecture``, also reads which classes, functions and methods the architecture
    asks for, and imports none of them. Raises CheckpointNotFoundError, CorruptCheckpointError,
    IncompatibleCheckpointError, DirectoryBusyError.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save(torch.nn.Linear(4, 2).requires_grad_(False), "frozen-linear")
        >>> sorted(shardsave.inspect("frozen-linear").frozen)
        ['bias', 'weight']
    """
    check_path(path)
    check_switches(architecture=architecture)
    with open_checkpoint(path, parts=["architecture"] if architecture else []) as checkpoint:
        tensors = {}
        for name in checkpoint.stored_names:
            t = checkpoint.tensors[name]
            tensors[name] = TensorInfo(BY_NAME[t.dtype].torch, torch_shape(t.dtype, t.shape), t.nbytes, t.shard)
        total = sum(info.nbytes for info in tensors.values())
        tensors.update({name: tensors[stored] for name, stored in checkpoint.ties.items()})
        flags = checkpoint.flags
        return CheckpointInfo(
            path=os.fspath(path),
            bytes=total,
            shards=checkpoint.shards,
            tensors=tensors,
            parameters=frozenset(flags) if flags is not None else None,
            frozen=frozenset(name for name, frozen in flags.items() if frozen) if flags is not None else None,
            ties=dict(checkpoint.ties),
            metadata=dict(checkpoint.metadata),
            durable=checkpoint.record.durable if checkpoint.record is not None else None,
            parts={role: part.file for role, part in checkpoint.parts.items()},
            companions=tuple(checkpoint.companions),
            notes=checkpoint.notes(),
            architecture=architecture_info(checkpoint),
            part_bytes={role: checkpoint.part_bytes(part) for role, part in checkpoint.parts.items()},
            shared=checkpoint.record.shared if checkpoint.record is not None else (),
            **checkpoint.moment._asdict(),
        )


def architecture_info(checkpoint: Checkpoint) -> ArchitectureInfo | None:
    """What the architecture of ``checkpoint`` asks for; None if it has none, or if it was not opened."""
    data = checkpoint.documents.get("architecture")
    if data is None:
        return None
    from shardsave._architecture.document import Document  # most inspections need none of this
    from shardsave._architecture.summary import summarize
    from shardsave._architecture.trust import script_classes, trust_entries

    asked = summarize(Document(data, f"the architecture in {checkpoint.path}"))
    lacking = [item.lacking for item in asked if item.lacking is not None]
    return ArchitectureInfo(
        uses={item.name: item.uses for item in asked},
        versions={item.name: item.version for item in asked},
        needs={item.name: item.entry for item in lacking if item.entry is not None},
        trust=trust_entries(lacking),
        script_classes=script_classes(lacking),
    )


@uncompiled
@verb()
def verify(path: str | os.PathLike[str], *, keep_going: bool = False, progress: ProgressArgument = None) -> VerifyReport:
    """Reads every byte of the checkpoint at ``path`` and compares it with the stored checksums; loads no tensor.

    Each header is also read by safetensors' own parser; if that refuses it, or reads something else from it, the file counts as damaged.

    With ``keep_going``, damage raises no error: everything that can be read is read, and the report says what is damaged and what is
    intact. Without it, CorruptCheckpointError is raised, which names what is damaged. Other errors are those of `inspect`.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.ones(3)}, "three-ones")
        >>> shardsave.verify("three-ones").verified
        True
    """
    check_path(path)
    check_switches(keep_going=keep_going)
    check_progress(progress)
    started = time.perf_counter()
    broken: dict[str, ShardSaveError] = {}
    opinion = SecondOpinion()
    broken_files = broken if keep_going else None
    with open_checkpoint(path, parts=PARTS, broken=broken_files, header_check=opinion.check) as checkpoint:
        stored = [*checkpoint.all_located(checkpoint.tensors.values())]
        targets: list[Target] = [(place, None) for located in stored for place in located.places]
        planned = time.perf_counter()
        with Progress(progress, "verifying", sum(located.nbytes for located, _ in targets)) as reporter:
            reader = TensorReader(checkpoint, verify=True, progress=reporter)
            if keep_going:
                damaged = [*_unopened(checkpoint, broken), *_read_by_shard(reader, targets)]
            else:
                damaged = []
                reader.read(targets)
        intact = _intact((file for file in checkpoint.files if file not in broken), targets, damaged)
        shards = len(checkpoint.shards)
        unread = [
            f"the {role} was not verified: this version of shardsave knows no such part" for role in checkpoint.unknown_parts
        ]
        elsewhere = _damaged_elsewhere(checkpoint, damaged)
        notes = (*opinion.notes, *unread, *elsewhere, *reader.totals.notes, *checkpoint.notes(whole=True))
    ended = time.perf_counter()
    return VerifyReport(
        path=os.fspath(path),
        bytes=reader.totals.bytes,
        tensors=reader.tensors - (len(targets) - len(stored)),
        shards=shards,
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=ended - planned),
        engine=engine_name(),
        direct=reader.totals.direct,
        staging_bytes=reader.totals.staging_bytes,
        pinned=reader.totals.pinned,
        notes=notes,
        verified=reader.verified if not damaged else False,
        damaged=tuple(damaged),
        intact=intact,
    )


def _unopened(checkpoint: Checkpoint, broken: Mapping[str, ShardSaveError]) -> list[Damage]:
    """The files that could not be opened, each with the names of the tensors that it holds according to the index."""
    names_by_shard: dict[str, list[str]] = {shard: [] for shard in broken}
    for name, shard in (checkpoint.index.weight_map if checkpoint.index is not None else {}).items():
        if shard in names_by_shard:
            names_by_shard[shard].append(name)
    return [Damage(shard, tuple(names_by_shard[shard]), str(error)) for shard, error in broken.items()]


def _read_by_shard(reader: TensorReader, targets: Iterable[Target]) -> list[Damage]:
    """Reads shard after shard, so that one unreadable shard does not keep the others from being verified."""
    by_shard: dict[str, list[Target]] = {}
    for target in targets:
        by_shard.setdefault(target[0].shard, []).append(target)
    damaged = []
    for shard, shard_targets in by_shard.items():
        before = len(reader.damaged)
        try:
            reader.read(shard_targets)
        except DirectoryBusyError:  # the shard was replaced, which is not damage
            raise
        except ShardSaveError as error:
            new = reader.damaged[before:]
            damaged += [Damage(shard, (located.name,), message) for located, message in new]
            if not new:
                damaged.append(Damage(shard, tuple(located.name for located, _ in shard_targets), str(error)))
    return damaged


def _damaged_elsewhere(checkpoint: Checkpoint, damaged: Iterable[Damage]) -> list[str]:
    """A note, if one of the ``damaged`` shards was taken over from an earlier checkpoint, or by a later one."""
    shared = {damage.shard for damage in damaged if checkpoint.is_shared(damage.shard)}
    return (
        [f"other checkpoints may have the same damage, since they share a file with this one: {some(sorted(shared))}"]
        if shared
        else []
    )


def _intact(files: Iterable[str], targets: Iterable[Target], damaged: Iterable[Damage]) -> dict[str, tuple[str, ...]]:
    """File → the names of the tensors in it that are not damaged."""
    damaged_names = {(damage.shard, name) for damage in damaged for name in damage.tensors}
    intact: dict[str, list[str]] = {file: [] for file in files}
    for located, _ in targets:
        if (located.shard, located.name) not in damaged_names:
            intact[located.shard].append(located.name)
    return {file: tuple(names) for file, names in intact.items()}
