"""Saves only what training changes: the parameters that are not frozen, and the buffers that belong to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from shardsave._common.memory import address, memory_key
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._common.words import some
from shardsave._format.file_names import ADAPTER_CONFIG
from shardsave._saving.disk_layout import OnDisk
from shardsave._state.module import EXTRA_STATE, Entry, Source, State
from shardsave._state.wrappers import Names, unwrap


def only_trainable(on_disk: OnDisk, source: Source, state: State) -> tuple[OnDisk, tuple[str, ...]]:
    """Returns the trainable part of ``on_disk``, which is ``state`` of ``source`` as stored, and the names that are left out.

    Configs that say what a whole model is are left out too: a directory with them would open as one, with random weights. The flags of all
    parameters are kept. Raises ValueError if no parameter is trainable.
    """
    if not any(entry.frozen is False for entry in state.entries):
        found = "every parameter is frozen" if state.flags_known else "a mapping of plain tensors says nothing about that"
        raise ValueError(f"only='trainable' needs at least one trainable parameter, {found}; nothing was written")
    buffers = _buffers_to_keep(source, state)
    memory = {memory_key(entry.tensor) for entry in state.entries if entry.name in buffers and _has_key(entry)}
    entries = on_disk.state.entries
    wanted = {entry.name for entry in entries if entry.frozen is False or entry.name in buffers or _is_one_of(entry, memory)}
    groups = {entry.tied_to or entry.name for entry in entries if entry.name in wanted}
    kept = tuple(entry for entry in entries if (entry.tied_to or entry.name) in groups)  # of a tied group all names or none
    left_out = tuple(entry.name for entry in entries if (entry.tied_to or entry.name) not in groups)
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    names = {entry.name for entry in kept}
    in_single_file = names if on_disk.in_single_file is None else on_disk.in_single_file & names
    keeps_file = on_disk.single_file is not None and bool(in_single_file)
    trainable = on_disk._replace(
        state=on_disk.state._replace(entries=kept),
        companions={name: on_disk.companions[name] for name in (ADAPTER_CONFIG,) if keeps_file and name in on_disk.companions},
        module_flags=flags if on_disk.module_flags is None else on_disk.module_flags,
        single_file=on_disk.single_file if keeps_file else None,
        in_single_file=frozenset(in_single_file) if keeps_file and on_disk.in_single_file is not None else None,
        notes=(*on_disk.notes, *_notes(entries, frozenset(left_out))),
    )
    return trainable, left_out


def _notes(entries: Iterable[Entry], left_out: frozenset[str]) -> Iterator[str]:
    if buffers := [entry.name for entry in entries if entry.name in left_out and entry.frozen is None]:
        yield f"buffers of layers without trainable parameters were left out: {some(buffers)}"


def _is_one_of(entry: Entry, memory: set[Hashable]) -> bool:
    """Whether ``entry`` is a buffer that has another name on disk than in the module; ``memory``: of the buffers to keep."""
    return entry.frozen is None and _has_key(entry) and memory_key(entry.tensor) in memory


def _has_key(entry: Entry) -> bool:
    """Whether the `memory_key` of its tensor says where the entry's elements are; one spread over ranks has a tensor of its own."""
    if isinstance(entry.source, Spread):
        return True
    return isinstance(entry.source, TensorSource) and bool(address(entry.tensor))


def _buffers_to_keep(source: Source, state: State) -> set[str]:
    """The names of buffers that training may have changed.

    A layer with a trainable parameter changes its buffers (running statistics, spectral norms, scales). Layers of torch with running
    statistics change them in training mode even if all their parameters are frozen, or if they have none.
    """
    if not isinstance(source, nn.Module):
        return set()
    module = unwrap(source)
    names = Names.of(module)
    own = {entry.name for entry in state.entries if entry.frozen is None}
    kept = set()
    for prefix, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, _NormBase) or _is_trainable(part):
            # The buffers of a parametrization belong to modules below the list that has its parameter.
            parts = (
                part.named_modules(prefix=prefix, remove_duplicate=False)
                if isinstance(part, ParametrizationList)
                else [(prefix, part)]
            )
            for start, owner in parts:
                for attribute in (*owner._buffers, EXTRA_STATE):
                    kept.add(names.plain(f"{start}.{attribute}" if start else attribute))
    return kept & own


def _is_trainable(module: nn.Module) -> bool:
    return any(isinstance(p, torch.Tensor) and p.requires_grad for p in module._parameters.values())
