"""`inspect`: what a checkpoint contains."""

from __future__ import annotations

import os

from shardsave._api.arguments import check_path, check_switches
from shardsave._api.findings import ArchitectureInfo, CheckpointInfo, TensorInfo
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.open_checkpoint import open_checkpoint


@uncompiled
@verb()
def inspect(path: str | os.PathLike[str], *, architecture: bool = False) -> CheckpointInfo:
    """What the checkpoint at ``path`` contains: names, shapes, dtypes, shards, freeze flags, ties and metadata.

    Reads the index and the headers, no tensor data. With ``architecture``, also reads which classes, functions and methods the architecture
    asks for, and imports none of them. Raises CheckpointNotFoundError, CorruptCheckpointError,
    IncompatibleCheckpointError, DirectoryBusyError.

    Never collective: a rank that calls it waits for no other.

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
