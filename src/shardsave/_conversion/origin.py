"""The source of a conversion, from files of a known kind. Their tensors are mapped, not read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from mmap import mmap
from typing import Any, NamedTuple

from shardsave._common.sources import TensorSource
from shardsave._conversion.training import TrainingState, training_of
from shardsave._foreign.dcp import read_distributed
from shardsave._foreign.nested_state import choose_state, refuse_key
from shardsave._foreign.pickled_tensors import Allowed
from shardsave._foreign.survey import Wanted
from shardsave._foreign.torch_file import TorchFile, read_torch_file
from shardsave._format.file_names import ADAPTER_WEIGHTS
from shardsave._format.index import TRAINING, Index, Moment
from shardsave._format.index_parsing import parse_index
from shardsave._loading.mapped import Maps
from shardsave._state.module import Entry
from shardsave._state.parts import Parts
from shardsave._storage.checkpoint import PARTS, Checkpoint
from shardsave._storage.find import find
from shardsave._storage.located import Located
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave._storage.previous import companions_of
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError

#: What ``drop`` must be to leave out the training state.
DROP_TRAINING = "training"


class Origin(NamedTuple):
    """The source of a conversion. ``values``: name → tensor, or another value that the file has under this name.

    ``kind``: "shardsave", "safetensors", "torch" or "distributed". ``flags``: name → frozen; None if unknown. ``mappings``: the
    memory of the tensors. ``files``: every file that has some of them. ``dropped``: the names that are not wanted. ``stored``: those
    tensors of the open ``checkpoint`` that have checksums. ``parts`` and ``module_flags`` are carried over if no name changes,
    ``companions`` always. ``adapter``: those of ``values`` that are in the file of an adapter, which has a config in ``companions``.
    ``training`` is carried over as ``parts`` are, ``moment`` always.
    """

    kind: str
    values: Mapping[str, Any]
    flags: Mapping[str, bool] | None
    metadata: Mapping[str, Any]
    mappings: tuple[mmap, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    stored: tuple[Located, ...] = ()
    parts: Parts = Parts()
    companions: Mapping[str, bytes] = {}
    module_flags: Mapping[str, bool] | None = None
    adapter: frozenset[str] = frozenset()
    training: TrainingState | None = None
    moment: Moment = Moment()


class Request(NamedTuple):
    """What is wanted of a source: the state at ``key``, the names that are ``wanted``; ``allowed``: names that its pickles may have.

    ``training``: whether the training state is wanted. If it is not, and there is one, ``wanted`` is not asked about a tensor of the
    same name: the request meant the training state.
    """

    key: str | None
    wanted: Wanted
    allowed: Allowed
    training: bool = True


def from_checkpoint(path: str, request: Request, closing: ExitStack) -> Origin:
    if request.key is not None:
        refuse_key(path, request.key, "only one mapping of names to tensors, which has no key")
    parts_to_open = [role for role in PARTS if role != TRAINING or request.training]
    checkpoint = closing.enter_context(open_checkpoint(path, parts=parts_to_open))
    record = checkpoint.record
    drops_training = not request.training and TRAINING in checkpoint.parts
    if drops_training:
        request.wanted(DROP_TRAINING)  # the pattern has been used

    def wanted(name: str) -> bool:
        return request.wanted(name, exact=not (drops_training and name == DROP_TRAINING))

    names = {name: name for name in checkpoint.stored_names} | dict(checkpoint.ties)
    chosen = {name: stored for name, stored in names.items() if wanted(name)}
    located = {stored: checkpoint.tensors[stored] for stored in chosen.values()}
    maps = Maps(checkpoint, aligned=False)
    tensors = {
        **maps.tensors({name: t for name, t in located.items() if not t.chunks}),
        **{name: maps.assembled(t) for name, t in located.items() if t.chunks},
    }
    extra = maps.tensors(checkpoint.kept)
    training = training_of(checkpoint.training, maps) if checkpoint.training is not None else None
    parts = Parts(
        checkpoint.documents,
        tuple(Entry(name, "buffer", None, None, TensorSource.of(tensor)) for name, tensor in extra.items()),
    )
    return Origin(
        "shardsave" if record is not None else "safetensors",
        {name: tensors[stored] for name, stored in chosen.items()},
        record.flags if record is not None else None,
        checkpoint.metadata,
        maps.mappings,
        tuple(map(checkpoint.path_of, checkpoint.files)),
        (
            *checkpoint.shape_notes,
            *(f"the {role} was left out: this version of shardsave knows no such part" for role in checkpoint.unknown_parts),
            *([f"the {TRAINING} was left out: drop={DROP_TRAINING!r} asks for that"] if drops_training else []),
        ),
        tuple(name for name in names if name not in chosen),
        checkpoint,
        tuple(t for t in checkpoint.all_located(located.values()) if t.checksum is not None),
        parts,
        module_flags=record.module_flags if record is not None else None,
        adapter=_adapter_of(checkpoint.index) if checkpoint.index is not None else frozenset(),
        training=training,
        moment=checkpoint.moment,
    )


def from_torch(path: str, request: Request) -> Origin:
    return _from_content("torch", read_torch_file(path, request.allowed), path, request, (path,))


def _adapter_of(index: Index) -> frozenset[str]:
    """The names of the tensors in the file of an adapter, if there is one. This file is a second name of the first shard."""
    if ADAPTER_WEIGHTS not in companions_of(index):
        return frozenset()
    first = min(index.weight_map.values())
    return frozenset(name for name, shard in index.weight_map.items() if shard == first)


def from_distributed(path: str, request: Request) -> Origin:
    return _from_content("distributed", read_distributed(path), path, request, ())


def _from_content(kind: str, file: TorchFile, path: str, request: Request, files: tuple[str, ...]) -> Origin:
    choice = choose_state(file.content, request.key, request.wanted, path)
    return Origin(kind, choice.state, None, {}, file.mappings, files, (*file.notes, *choice.notes), choice.dropped)


def from_torch_shards(path: str, request: Request) -> Origin:
    folder, name = os.path.split(path)
    if request.key is not None:
        refuse_key(path, request.key, "in each shard only one mapping of names to tensors, which has no key")
    weight_map = parse_index(find(path).index_bytes or b"", f"index {name}").weight_map
    values: dict[str, Any] = {}
    mappings: list[mmap] = []
    notes: list[str] = []
    shards = dict.fromkeys(weight_map.values())
    for shard in shards:
        file = _read_torch_shard(folder, shard, {name for name, owner in weight_map.items() if owner == shard}, request.allowed)
        values.update(file.content)
        mappings += file.mappings
        notes += file.notes
    in_order = {name: values[name] for name in weight_map if request.wanted(name)}
    files = tuple(os.path.join(folder, shard) for shard in shards)
    dropped = tuple(name for name in weight_map if name not in in_order)
    return Origin("torch", in_order, None, {}, tuple(mappings), files, tuple(notes), dropped)


def _read_torch_shard(folder: str, shard: str, names: set[str], allowed: Allowed) -> TorchFile:
    """Reads a shard that the index lists. The shard must have exactly ``names``."""
    try:
        file = read_torch_file(os.path.join(folder, shard), allowed)
    except CheckpointNotFoundError:
        raise CorruptCheckpointError(
            f"corrupt checkpoint {folder}: the index names {shard}, there is no such file; the checkpoint was copied or "
            f"downloaded in part"
        ) from None
    held = set(file.content) if isinstance(file.content, dict) else set()
    if not isinstance(file.content, dict) or held != names:
        differing = sorted(held ^ names, key=str)
        owner = "the index" if differing[0] in names else "the shard"
        raise CorruptCheckpointError(
            f"corrupt shard {shard}: the names that the index lists for it were expected, {str(differing[0])!r} is only in {owner}; "
            f"index and shard belong to different saves"
        )
    return file
